#include "common.h"

namespace qlora_ext::host {

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax) {
  constexpr const char* op = "quantize_absmax";
  QLORA_CHECK(absmax.numel() % 4 == 0, op, "absmax has ", absmax.numel(),
              " bytes, want 4 a scale (fp32 bytes)");
  QuantizeAbsmaxParams p{};
  p.num_blocks = absmax.numel() / 4;
  const DeviceScope scope(absmax);
  Tensor keep;
  const uint8_t* source =
      as_bytes(op, "absmax", absmax, absmax.numel(), "fp32 scales", absmax, keep);
  const Tensor code = empty(op, "code", {p.num_blocks}, ScalarType::Byte, absmax);
  Tensor nested =
      empty(op, "nested", {4 * (1 + ceil_div(p.num_blocks, 256))}, ScalarType::Byte, absmax);
  if (p.num_blocks == 0) {
    torch::stable::fill_(nested, 0);
    return {code, nested};
  }
  p.absmax = reinterpret_cast<const float*>(source);
  p.code = static_cast<uint8_t*>(code.data_ptr());
  p.nested = static_cast<float*>(nested.data_ptr());
  launch_with_workspace(op, launch::quantize_absmax, launch::workspace_quantize_absmax, p, absmax,
                        scope);
  return {code, nested};
}

Tensor dequantize_absmax(const Tensor& code, const Tensor& nested) {
  constexpr const char* op = "dequantize_absmax";
  const int64_t num_blocks = code.numel();
  std::array<Tensor, 2> keep;
  const uint8_t* codes =
      as_bytes(op, "code", code, num_blocks, "one 8-bit code a scale", code, keep[0]);
  const uint8_t* statistics =
      as_bytes(op, "nested", nested, 4 * (1 + ceil_div(num_blocks, 256)),
               "fp32 offset, then one fp32 scale for 256 codes", code, keep[1]);
  const DeviceScope scope(code);
  const Tensor absmax = empty(op, "absmax", {4 * num_blocks}, ScalarType::Byte, code);
  if (num_blocks == 0) return absmax;
  const DequantizeAbsmaxParams p{.code = codes,
                                 .nested = reinterpret_cast<const float*>(statistics),
                                 .absmax = static_cast<float*>(absmax.data_ptr()),
                                 .num_blocks = num_blocks};
  check_launch(op, launch::dequantize_absmax(p, scope.stream()));
  return absmax;
}

}  // namespace qlora_ext::host
