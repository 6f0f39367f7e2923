// A block's scale, and the codebook multiplied by it.
#pragma once

#include "../codebook.h"

namespace qlora_ext::cpu {

// fp32 multiply, then fp32 add: the format forbids an FMA (-ffp-contract=off).
inline float nested_scale(uint8_t code, const float* nested, int64_t block) {
  const float scaled = kDynamicMap[code] * nested[1 + (block >> 8)];
  return scaled + nested[0];
}

inline float block_scale(const PackedWeight& weight, int64_t block) {
  if (weight.absmax != nullptr) return weight.absmax[block];
  return nested_scale(weight.absmax_code[block], weight.nested, block);
}

// The 16 values that a block's codes stand for. Looking up a code here gives the same bits as
// scaling after the look-up, with 16 multiplies per block instead of one per weight.
inline void scaled_codebook(const PackedWeight& weight, int64_t block, float table[16]) {
  const float scale = block_scale(weight, block);
  for (int code = 0; code < 16; ++code) table[code] = weight.values[code] * scale;
  if (weight.mean == nullptr) return;
  for (int code = 0; code < 16; ++code) table[code] += weight.mean[block];
}

// Decision thresholds of the dynamic map, ascending.
struct DynamicMapThresholds {
  float values[255];
  constexpr DynamicMapThresholds() : values() {
    for (int i = 0; i < 255; ++i) values[i] = dynamic_map_threshold(i);
  }
};
constexpr DynamicMapThresholds kDynamicMapThresholds;

// The code of flat element `index`: the high nibble holds the even element.
inline int code_at(const uint8_t* packed, int64_t index) {
  const int byte = packed[index >> 1];
  return (index & 1) ? byte & 15 : byte >> 4;
}

}  // namespace qlora_ext::cpu
