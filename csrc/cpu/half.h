// Scalar conversions of fp16 and bf16 as bit patterns, with the same results as F16C and torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace qlora_ext::cpu {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float bf16_to_float(uint16_t half) { return float_from_bits(uint32_t{half} << 16); }

// Round to nearest even; a NaN becomes torch's quiet NaN.
inline uint16_t bf16_from_float(float value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = float_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf and NaN; a signalling NaN is quieted, as F16C does
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return float_from_bits(sign | 0x7f800000u | (magnitude << 13) | quiet);
  }
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;  // exact
  return float_from_bits(sign | float_bits(subnormal));
}

// Round to nearest even; magnitudes from 65520 on become infinite.
inline uint16_t fp16_from_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal results are multiples of 2^-24. Adding 0.5 rounds to nearest even and leaves the
    // result in the low mantissa bits.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Address of element `index` in a buffer of `dtype`.
inline const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * dtype_size(dtype);
}

inline void* element(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + index * dtype_size(dtype);
}

}  // namespace qlora_ext::cpu
