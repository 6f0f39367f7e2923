// How many rows of W to decode at a time where cuBLAS does the product (large M).
#pragma once

#include <algorithm>

#include "cuda/format.cuh"

namespace qlora_ext {

constexpr int64_t kChunkBytes = int64_t{16} << 20;  // stays in L2 between the two passes
constexpr int64_t kMatmulTile = 128;                // cuBLAS tiles are 128 or 256 wide

// Rows of a dense chunk [rows, K]: as many as 16 MiB hold, or, where that is more, the fewest that
// give each SM one 128x128 tile of an [M, rows] product. Chunks are of equal size.
inline int64_t chunk_rows(int64_t M, int64_t N, int64_t K, DType dtype, int64_t sm_count) {
  const int64_t cache = kChunkBytes / (std::max<int64_t>(K, 1) * dtype_size(dtype));
  const int64_t wave = ceil_div(sm_count, ceil_div(M, kMatmulTile)) * kMatmulTile;
  const int64_t most = std::max(cache / kMatmulTile * kMatmulTile, wave);
  const int64_t chunks = ceil_div(N, most);
  return std::min(N, align_up(ceil_div(N, chunks), kMatmulTile));
}

}  // namespace qlora_ext
