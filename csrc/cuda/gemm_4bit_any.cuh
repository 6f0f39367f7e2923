// gemm_4bit_any: y = x W^T + bias + S B^T for any shape, dtype, block size and statistics, on FFMA.
// gemm_4bit_backward_any: dX = dY W + dS A likewise, contracting over N.
//
// Used if the tensor-core kernels cannot run: fp32 x, K not a multiple of 64, blocks of 32, means
// (normalization "standard"), rows that are not 16-byte aligned.
// Moves   the packed weight once per 64 rows of x. Floor: 2 M N K flops at the FFMA rate (33 T
//         products/s on H100); the decode adds ~20 instructions per weight and 64 rows.
// Layout  tile.cuh's 64x64x16; weights are decoded one by one on their way to shared memory.
// Bits    weights are exact fp32 (value * scale + mean); sums are fp32 in a fixed order.
#pragma once

#include "cuda/heuristics.cuh"
#include "cuda/reduce_parts.cuh"
#include "cuda/row_groups.cuh"
#include "cuda/tile.cuh"

namespace qlora_ext {

// C[rows, cols] = A W' + lora_a lora_b', each operand by (row or column, depth).
struct AnyProduct {
  PackedWeight weight;
  const float* table;  // [16], the codebook in GPU memory; or null: weight.values
  Scales scales;
  DenseOperand x;       // x, or dY
  DenseOperand lora_a;  // S, or dS: [rows, R]; data null without a bypass
  DenseOperand lora_b;  // lora_B by n, or lora_A by k: [cols, R]
  int64_t R;
  int64_t cols;   // N, or K
  int64_t depth;  // K, or N
  int64_t depth_per_part;
  const void* bias;  // [cols]; or null
  DType bias_dtype;
  void* out;  // [rows, cols]; with several parts, fp32 [parts, rows, cols]
  DType out_dtype;
};

struct AnySmem {
  TileSmem tile;
  float values[16];  // the codebook: lanes look up different codes
};

// Each op's product.
inline AnyProduct as_any_product(const Gemm4bitParams& p) {
  AnyProduct product{};
  product.weight = p.weight;
  product.table = p.table;
  product.scales = make_scales(p.weight);
  product.x = operand_of_rows(p.x, p.x_stride, p.M, p.dtype);
  product.lora_a = operand_of_rows(p.lora_S, p.S_stride, p.M, DType::kFloat32);
  product.lora_b = operand_of_rows(p.lora_B, p.R, p.weight.N, p.lora_dtype);
  product.R = p.R;
  product.cols = p.weight.N;
  product.depth = p.weight.K;
  product.bias = p.bias;
  product.bias_dtype = p.bias_dtype;
  product.out = p.y;
  product.out_dtype = p.dtype;
  return product;
}

inline AnyProduct as_any_product(const Gemm4bitBackwardParams& p) {
  AnyProduct product{};
  product.weight = p.weight;
  product.scales = make_scales(p.weight);
  product.x = operand_of_rows(p.dY, p.dY_stride, p.M, p.dtype);
  product.lora_a = operand_of_rows(p.lora_dS, p.R, p.M, DType::kFloat32);
  // Row k, depth r.
  product.lora_b = operand_of_columns(p.lora_A, p.weight.K, p.weight.K, p.lora_dtype);
  product.R = p.R;
  product.cols = p.weight.K;
  product.depth = p.weight.N;
  product.out = p.dX;
  product.out_dtype = p.dtype;
  return product;
}

// The block's 64x64 tile from row0 and col0, over [begin, end) of the contraction, in acc.
// kTransposed (backward): columns are k and the contraction runs over n. `x` is what p.x is.
template <bool kTransposed, class X, class Rows>
__device__ __forceinline__ void any_tile(AnySmem& s, const AnyProduct& p, const X& x,
                                         const Rows& rows, int64_t row0, int64_t col0,
                                         int64_t begin, int64_t end, TileAccumulators& acc) {
  const int64_t expert = rows.expert();
  const WeightOperand w{.packed = packed_of(p.weight, expert),
                        .values = s.values,
                        .scales = scales_of(p.scales, p.weight, expert),
                        .K = p.weight.K,
                        .rows = p.cols,
                        .transposed = kTransposed};
  tile_clear(acc);
  tile_product(s.tile, x, w, row0, col0, begin, end, acc);
  if (begin == 0 && p.R > 0) {  // the bypass adds to the same sums
    DenseOperand lora_a = p.lora_a;
    lora_a.rows = rows.end(lora_a.rows);
    tile_product(s.tile, lora_a, p.lora_b.from(expert * p.cols * p.R), row0, col0, 0, p.R, acc);
  }
}

// The codebook. The whole block calls it before any_tile.
__device__ __forceinline__ void any_values(AnySmem& s, const AnyProduct& p) {
  if (threadIdx.x < 16) {
    s.values[threadIdx.x] =
        p.table != nullptr ? __ldg(p.table + threadIdx.x) : p.weight.values[threadIdx.x];
  }
  __syncthreads();
}

template <bool kTransposed>
__device__ __forceinline__ void any_product(const AnyProduct& p) {
  AnySmem& s = ptx::shared_memory<AnySmem>();
  any_values(s, p);
  const int64_t rows = p.x.rows;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kTileSize;
  const int64_t begin = blockIdx.z * p.depth_per_part;
  const int64_t end = begin + p.depth_per_part < p.depth ? begin + p.depth_per_part : p.depth;
  const bool whole = gridDim.z == 1;
  for (int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTileSize; row0 < rows;
       row0 += static_cast<int64_t>(gridDim.y) * kTileSize) {
    TileAccumulators acc;
    any_tile<kTransposed>(s, p, p.x, OneWeight{row0}, row0, col0, begin, end, acc);
    tile_for_each(acc, row0, col0, rows, p.cols, [&](int64_t row, int64_t col, float v) {
      const int64_t i = row * p.cols + col;
      if (whole) {
        if (p.bias != nullptr) v += load_as_float(p.bias, p.bias_dtype, col);
        store_from_float(p.out, p.out_dtype, i, v);
      } else {
        static_cast<float*>(p.out)[blockIdx.z * rows * p.cols + i] = v;
      }
    });
  }
}

template <class = void>  // a template, so that two files may include it
__global__ void __launch_bounds__(kTileThreads) gemm_4bit_any(AnyProduct p) {
  any_product<false>(p);
}

template <class = void>
__global__ void __launch_bounds__(kTileThreads) gemm_4bit_backward_any(AnyProduct p) {
  any_product<true>(p);
}

// A step is 64x64x16, and each part has a depth of at least 256. Estimated, not simulated.
constexpr BlockCost kAnyCost{
    .resident = 2, .least_stages = 16, .stage = 0.5f, .share = 0.3f, .start = 1.0f};

inline Splits any_product_splits(int64_t rows, int64_t cols, int64_t depth) {
  return split_contraction(ceil_div(rows, kTileSize) * ceil_div(cols, kTileSize),
                           ceil_div(std::max<int64_t>(depth, 1), kTileDepth),
                           reduce_parts_cost(rows * cols), kAnyCost);
}

inline int64_t any_product_workspace(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t parts = any_product_splits(rows, cols, depth).count;
  return parts > 1 ? parts * rows * cols * 4 : 0;
}

// Launches the product and, if the contraction is split, its reduction.
template <auto kernel>
const char* launch_any_product(AnyProduct p, void* workspace, void* stream) {
  const int64_t rows = p.x.rows;
  const Splits splits = any_product_splits(rows, p.cols, p.depth);
  const int64_t parts = splits.count;
  const ReduceParts reduce{.parts = static_cast<const float*>(workspace),
                           .num_parts = parts,
                           .rows = rows,
                           .cols = p.cols,
                           .scale = 1.0f,
                           .bias = p.bias,
                           .bias_dtype = p.bias_dtype,
                           .out = p.out,
                           .out_dtype = p.out_dtype};
  p.depth_per_part = splits.stages * kTileDepth;
  if (parts > 1) p.out = workspace;
  QLORA_EXT_TRY(launch_kernel<kernel>(tile_grid(rows, p.cols, parts), kTileThreads, sizeof(AnySmem),
                                      stream, p));
  return parts > 1 ? launch_reduce_parts(reduce, stream) : nullptr;
}

}  // namespace qlora_ext
