// merge_lora_4bit_tile: out = dequantize(W) + scaling * B A, in fp32, rounded once to the output.
//
// Moves   0.516 B/weight in, sizeof(T) out, and A and B once per tile. Floor: those bytes (49 us
//         for 4096x14336 to bf16 on H100) up to rank ~16, then R FFMA per weight.
// Layout  tile.cuh's: d is the rank. The weight is decoded in the epilogue.
// Merging happens once per training run, so the kernel is simple.
#pragma once

#include "cuda/tile.cuh"

namespace qlora_ext {

static __global__ void __launch_bounds__(kTileThreads)
    merge_lora_4bit_tile(MergeLora4bitParams p, Scales scales) {
  TileSmem& s = ptx::shared_memory<TileSmem>();
  const int64_t N = p.weight.N, K = p.weight.K;
  const DenseOperand b{
      .data = p.lora_B, .row_stride = p.R, .depth_stride = 1, .rows = N, .dtype = p.lora_dtype};
  // Row k, depth r.
  const DenseOperand a{
      .data = p.lora_A, .row_stride = 1, .depth_stride = K, .rows = K, .dtype = p.lora_dtype};
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kTileSize;
  for (int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTileSize; row0 < N;
       row0 += static_cast<int64_t>(gridDim.y) * kTileSize) {
    TileAccumulators acc;
    tile_clear(acc);
    tile_product(s, b, a, row0, col0, 0, p.R, acc);
    tile_for_each(acc, row0, col0, N, K, [&](int64_t n, int64_t k, float product) {
      const float w = decode_weight(p.weight.packed, scales, p.weight.values, n * K + k);
      store_from_float(p.out, p.dtype, n * K + k, w + p.scaling * product);
    });
  }
}

}  // namespace qlora_ext
