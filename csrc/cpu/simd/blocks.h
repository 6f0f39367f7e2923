// How an instruction set's file walks the blocks of a 4-bit weight.
//
// Included below the file's target pragma, so that loop bodies inline into these functions;
// therefore everything here has internal linkage, one copy for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../params.h"
#include "../scales.h"

namespace qlora_ext::cpu {
namespace {

inline int64_t block_of(const PackedWeight& weight, int64_t index) {
  const int64_t blocksize = weight.blocksize;
  if (index < blocksize) return 0;
  if ((blocksize & (blocksize - 1)) == 0) return index >> __builtin_ctzll(blocksize);
  return index / blocksize;
}

// Calls run(at, end, block) for the stretches of [first, first + n) that share a block: elements
// first + at ... first + end - 1.
template <class Run>
inline void for_each_block(const PackedWeight& weight, int64_t first, int64_t n, const Run& run) {
  int64_t block = block_of(weight, first);
  for (int64_t at = 0; at < n; ++block) {
    const int64_t end = std::min(n, (block + 1) * weight.blocksize - first);
    run(at, end, block);
    at = end;
  }
}

// Elements that share a scale wherever rows and blocks divide by them: `dot` decodes them with the
// codebook as it is, and scales their sum.
constexpr int64_t kGroup = 64;

inline bool has_groups(const PackedWeight& weight, int64_t k, int64_t depth) {
  return weight.mean == nullptr && (weight.K | weight.blocksize | k | depth) % kGroup == 0;
}

// scale[g] = the scale of elements [first + g * kGroup, first + (g + 1) * kGroup).
inline void group_scales(const PackedWeight& weight, int64_t first, int64_t groups, float* scale) {
  if (weight.blocksize != kGroup || weight.absmax != nullptr) {
    for (int64_t g = 0; g < groups; ++g) {
      scale[g] = block_scale(weight, block_of(weight, first + g * kGroup));
    }
    return;
  }
  const int64_t block = first / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    scale[g] = nested_scale(weight.absmax_code[block + g], weight.nested, block + g);
  }
}

// How many bytes ahead of the codes in use `dot` fetches: along the row, or where only a part of each
// row is read, the same part of a later row.
inline int64_t prefetch_distance(const PackedWeight& weight, int64_t depth) {
  return depth == weight.K ? 1024 : 4 * weight.K / 2;
}

}  // namespace
}  // namespace qlora_ext::cpu
