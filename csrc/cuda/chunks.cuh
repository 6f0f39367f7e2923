// How much of W to decode at a time where cuBLAS does the product (large M).
#pragma once

#include <algorithm>

#include "cuda/format.cuh"

namespace qlora_ext {

constexpr int64_t kChunkBytes = int64_t{16} << 20;  // may stay in L2 until cuBLAS reads it
constexpr int64_t kMatmulTile = 128;                // cuBLAS tiles are 128 or 256 wide

// How many of the `lines` of W that each make a column of the [M, lines] result go into a chunk:
// rows of W forward (lines N, depth K), columns of W backward (lines K, depth N). As many as
// kChunkBytes hold, or, where that is more, the fewest that give each SM one 128x128 tile of the
// chunk's product: such a chunk is larger than kChunkBytes. Chunks are of equal size, a multiple of
// 128 lines. Not yet tuned on silicon.
inline int64_t chunk_lines(int64_t M, int64_t lines, int64_t depth, DType dtype, int64_t sm_count) {
  const int64_t cache = kChunkBytes / (std::max<int64_t>(depth, 1) * dtype_size(dtype));
  const int64_t wave = ceil_div(sm_count, ceil_div(M, kMatmulTile)) * kMatmulTile;
  const int64_t most = std::max(cache / kMatmulTile * kMatmulTile, wave);
  const int64_t chunks = ceil_div(lines, most);
  return std::min(lines, align_up(ceil_div(lines, chunks), kMatmulTile));
}

}  // namespace qlora_ext
