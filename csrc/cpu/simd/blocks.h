// How an instruction set's file walks the blocks of a 4-bit weight.
//
// Included below the file's target pragma, so that loop bodies inline into these functions;
// therefore everything here has internal linkage, one copy for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../params.h"

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

}  // namespace
}  // namespace qlora_ext::cpu
