// lora_tile: the small products around a LoRA bypass on FFMA, any dtype and shape. Each is
// C = scale * A B^T with one small side (the rank). Its long side is cut into parts, which
// reduce_parts adds in order.
//
// Moves   x (or dY) once per 64 ranks, the adapter once per 64 rows. Floor: x's bytes over
//         bandwidth; M = 2048, K = 4096 in bf16 is 5.6 us on H100.
// Layout  tile.cuh's 64x64 tile. At rank 16 three quarters of it are idle, which costs FFMA time
//         only if M is large.
// Order   fixed: the number of parts depends on shapes and the SM count alone. No float atomics.
#pragma once

#include "cuda/reduce_parts.cuh"
#include "cuda/tile.cuh"

namespace qlora_ext {

struct LoraProduct {
  DenseOperand a;
  DenseOperand b;
  int64_t depth;
  int64_t depth_per_part;  // a multiple of kTileDepth
  float scale;
  void* out;  // [a.rows, b.rows]; with several parts, fp32 [parts, a.rows, b.rows]
  DType out_dtype;
};

static __global__ void __launch_bounds__(kTileThreads) lora_tile(LoraProduct p) {
  TileSmem& s = ptx::shared_memory<TileSmem>();
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kTileSize;
  const int64_t begin = blockIdx.z * p.depth_per_part;
  const int64_t end = begin + p.depth_per_part < p.depth ? begin + p.depth_per_part : p.depth;
  const bool whole = gridDim.z == 1;
  for (int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTileSize; row0 < p.a.rows;
       row0 += static_cast<int64_t>(gridDim.y) * kTileSize) {
    TileAccumulators acc;
    tile_clear(acc);
    tile_product(s, p.a, p.b, row0, col0, begin, end, acc);
    tile_for_each(acc, row0, col0, p.a.rows, p.b.rows, [&](int64_t row, int64_t col, float v) {
      const int64_t i = row * p.b.rows + col;
      if (whole) {
        store_from_float(p.out, p.out_dtype, i, p.scale * v);
      } else {
        static_cast<float*>(p.out)[blockIdx.z * p.a.rows * p.b.rows + i] = v;
      }
    });
  }
}

}  // namespace qlora_ext
