#include "common.h"

namespace qlora_ext::host {

Tensor embedding_4bit(const Tensor& indices, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                      int64_t blocksize, const std::string& quant_type,
                      const OptionalFloats& codebook, ScalarType dtype) {
  constexpr const char* op = "embedding_4bit";
  check_tensor(op, "indices", indices);
  const bool is_long = indices.scalar_type() == ScalarType::Long;
  QLORA_CHECK(is_long || indices.scalar_type() == ScalarType::Int, op, "indices has dtype ",
              dtype_name(indices.scalar_type()), ", want int64 or int32");
  check_matrix(op, shape);
  const DeviceScope scope(indices);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, indices);
  Embedding4bitParams p{};
  p.weight = w.view;
  p.dtype = float_dtype(op, "dtype: the output", dtype);
  p.M = indices.numel();
  Tensor rows = contiguous(op, "indices", indices, is_long ? 8 : 4);
  if (!is_long) rows = torch::stable::to(rows, ScalarType::Long);
  p.indices = static_cast<const int64_t*>(rows.data_ptr());
  const auto sizes = indices.sizes();
  Ints out_shape(sizes.begin(), sizes.end());
  out_shape.push_back(w.view.K);
  const Tensor out = empty(op, "the result", out_shape, dtype, indices);
  p.out = out.data_ptr();
  if (p.M == 0) return out;
  // Only the CPU reports a bad index here. On a GPU it traps the kernel, as in torch's embedding.
  int64_t bad_index = p.M;
  p.bad_index = indices.is_cpu() ? &bad_index : nullptr;
  check_launch(op, launch::embedding_4bit(p, scope.stream()));
  QLORA_CHECK(bad_index >= p.M, op, "indices has ", p.indices[bad_index], " at flat position ",
              bad_index, ", want values in [0, ", w.view.N, ")");
  return out;
}

}  // namespace qlora_ext::host
