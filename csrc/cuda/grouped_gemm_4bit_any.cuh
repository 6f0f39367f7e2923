// grouped_gemm_4bit_any, grouped_gemm_4bit_backward_any: the products of a mixture of experts for
// any shape, dtype, block size and statistics, on FFMA: the tiles of gemm_4bit_any.cuh, scheduled by
// row_groups.cuh.
//
// Moves   an expert's packed weight once per 64 of its rows. With few rows of each expert most of a
//         tile is idle, and the time is that of decoding the weights.
// Bits    as gemm_4bit_any without splits of the contraction.
#pragma once

#include "cuda/gemm_4bit_any.cuh"
#include "cuda/grouped_operand.cuh"

namespace qlora_ext {

struct GroupedAnyProduct {
  AnyProduct product;  // of expert 0, with all M rows
  RowGroups groups;
};

template <bool kTransposed>
__device__ __forceinline__ void grouped_any_product(const GroupedAnyProduct& p) {
  const AnyProduct& product = p.product;
  ExpertRows rows;
  if (!find_tile<kTileSize>(p.groups, rows)) return;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % p.groups.column_tiles) * kTileSize;
  if (rows.index >= p.groups.groups.E) {
    zero_tile(rows, kTileSize, product.out, product.out_dtype, product.cols, col0, kTileSize);
    return;
  }
  AnySmem& s = ptx::shared_memory<AnySmem>();
  any_values(s, product);
  TileAccumulators acc;
  if constexpr (kTransposed) {  // dY is in the order of the experts
    any_tile<true>(s, product, up_to(product.x, rows.last), rows, rows.first, col0, 0,
                   product.depth, acc);
  } else {
    const IndexedOperand<false> x{product.x, rows, rows.last};
    any_tile<false>(s, product, x, rows, rows.first, col0, 0, product.depth, acc);
  }
  tile_for_each(
      acc, rows.first, col0, rows.last, product.cols, [&](int64_t row, int64_t col, float v) {
        if (product.bias != nullptr) {
          v += load_as_float(product.bias, product.bias_dtype, rows.expert() * product.cols + col);
        }
        store_from_float(product.out, product.out_dtype, row * product.cols + col, v);
      });
}

// Templates, so that two files may include them.
template <class = void>
__global__ void __launch_bounds__(kTileThreads) grouped_gemm_4bit_any(GroupedAnyProduct p) {
  grouped_any_product<false>(p);
}

template <class = void>
__global__ void __launch_bounds__(kTileThreads)
    grouped_gemm_4bit_backward_any(GroupedAnyProduct p) {
  grouped_any_product<true>(p);
}

template <auto kernel>
const char* launch_grouped_any_product(AnyProduct p, const Groups& groups, void* stream) {
  p.depth_per_part = p.depth;
  return launch_row_groups<kernel, kTileSize>(GroupedAnyProduct{.product = p, .groups = {}}, groups,
                                              {.column_tiles = ceil_div(p.cols, kTileSize)},
                                              kTileThreads, sizeof(AnySmem), stream);
}

}  // namespace qlora_ext
