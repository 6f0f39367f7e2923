#include "common.h"

namespace qlora_ext::host {

namespace {

void dequantize_into(const char* op, const Weight& w, DType dtype, const Tensor& out,
                     const DeviceScope& scope) {
  if (out.numel() == 0) return;
  const Dequantize4bitParams p{
      .weight = w.view, .row_begin = 0, .row_end = w.view.N, .out = out.data_ptr(), .dtype = dtype};
  check_launch(op, launch::dequantize_4bit(p, scope.stream()));
}

}  // namespace

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
                       const OptionalTensor& mean, const Ints& shape, int64_t blocksize,
                       const std::string& quant_type, const OptionalFloats& codebook,
                       ScalarType dtype) {
  constexpr const char* op = "dequantize_4bit";
  const DeviceScope scope(packed);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, packed);
  const DType out_dtype = float_dtype(op, "dtype: the output", dtype);
  const Tensor out = empty(op, "the result", shape, dtype, packed);
  dequantize_into(op, w, out_dtype, out, scope);
  return out;
}

void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
                         const OptionalTensor& mean, const Ints& shape, int64_t blocksize,
                         const std::string& quant_type, const OptionalFloats& codebook,
                         const Tensor& out) {
  constexpr const char* op = "dequantize_4bit";
  const DeviceScope scope(packed);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, packed);
  check_tensor(op, "out", out);
  const auto sizes = out.sizes();
  QLORA_CHECK(Ints(sizes.begin(), sizes.end()) == shape, op, "out has shape ", list_string(sizes),
              ", want ", list_string(shape));
  QLORA_CHECK(out.is_contiguous(), op, "out is not contiguous, want a contiguous tensor");
  check_same_device(op, "out", out, packed);
  const DType dtype = float_dtype(op, "out", out.scalar_type());
  const uintptr_t past = reinterpret_cast<uintptr_t>(out.data_ptr()) % dtype_size(dtype);
  QLORA_CHECK(past == 0, op, "out starts ", past, " bytes past a multiple of ", dtype_size(dtype),
              ", want an aligned tensor");
  dequantize_into(op, w, dtype, out, scope);
}

}  // namespace qlora_ext::host
