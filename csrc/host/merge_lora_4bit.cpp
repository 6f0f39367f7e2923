#include "common.h"

namespace qlora_ext::host {

Tensor merge_lora_4bit(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
                       const OptionalTensor& mean, const Ints& shape, int64_t blocksize,
                       const std::string& quant_type, const OptionalFloats& codebook,
                       const Tensor& lora_A, const Tensor& lora_B, double scaling,
                       ScalarType dtype) {
  constexpr const char* op = "merge_lora_4bit";
  const DeviceScope scope(packed);
  check_matrix(op, shape);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, packed);
  MergeLora4bitParams p{};
  p.weight = w.view;
  const LoraPair lora = as_lora_pair(op, lora_A, lora_B, w.view.N, w.view.K, packed);
  p.lora_A = lora.A.data;
  p.lora_B = lora.B.data;
  p.R = lora.R;
  p.lora_dtype = lora.A.dtype;
  p.scaling = as_scaling(op, scaling);
  p.dtype = float_dtype(op, "dtype: the output", dtype);
  const Tensor out = empty(op, "the result", shape, dtype, packed);
  p.out = out.data_ptr();
  if (out.numel() > 0) check_launch(op, launch::merge_lora_4bit(p, scope.stream()));
  return out;
}

}  // namespace qlora_ext::host
