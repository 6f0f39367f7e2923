// The LoRA products of a mixture of experts: lora_mma.cuh's and tile.cuh's tiles, scheduled by
// row_groups.cuh.
//
//   rows     out[m, r] = scale * sum over d of x[rows[m], d] small_e[r, d]     S = x A_e^T, dS = dY B_e
//            out[m, c] likewise, with any number of columns (dx = dS A_e)
//   columns  out_e[c, r] = scale * sum over e's rows m of x[rows[m], c] small[m, r]   dA_e, dB_e
//
// Moves   rows: an expert's adapter once per 128 of its rows. columns: x once per 32 ranks; a block
//         adds all of its expert's rows, so a single expert with most rows uses few SMs.
// Order   fixed by an expert's rows alone. No float atomics.
#pragma once

#include "cuda/grouped_operand.cuh"
#include "cuda/lora_mma.cuh"

namespace qlora_ext {

struct GroupedLoraMma {
  LoraMma product;  // of expert 0, with all M rows
  RowGroups groups;
  int64_t small_step;  // elements of `small` from one expert to the next
};

// out is fp32. Blocks: x slots of 128 rows, y ranks, z parts of the depth.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, kRankTiles <= 2 ? 2 : 1)
    grouped_lora_rows_mma(GroupedLoraMma p) {
  if constexpr (!ptx::is_compiled<Arch, LoraRowsSmem<kRankTiles>>()) {
    ptx::trap();
  } else {
    ExpertRows rows;
    if (!find_tile<kLoraTile>(p.groups, rows)) return;
    if (rows.index >= p.groups.groups.E) {
      float* out = static_cast<float*>(p.product.out) + blockIdx.z * p.product.out_numel;
      zero_tile(rows, kLoraTile, out, DType::kFloat32, p.product.small.rows,
                static_cast<int64_t>(blockIdx.y) * 8 * kRankTiles, 8 * kRankTiles);
      return;
    }
    lora_rows<Arch, T, kRankTiles>(p.product, p.product.small.from(rows.expert() * p.small_step),
                                   rows);
  }
}

// Blocks: x experts of 128 columns each, y ranks.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, 2) grouped_lora_columns_mma(GroupedLoraMma p) {
  if constexpr (!ptx::is_compiled<Arch, LoraColumnsSmem<kRankTiles>>()) {
    ptx::trap();
  } else {
    const ExpertRows rows =
        rows_of_expert(p.groups.groups, static_cast<int>(blockIdx.x / p.groups.column_tiles));
    const int64_t col0 = static_cast<int64_t>(blockIdx.x % p.groups.column_tiles) * kLoraTile;
    lora_columns<Arch, T, kRankTiles>(p.product, p.product.small, rows, col0, rows.first,
                                      rows.last);
  }
}

// A and B by (row, depth). B is an expert's own, or, in a contraction over rows, A and B are all.
struct GroupedLoraProduct {
  DenseOperand a;
  DenseOperand b;
  int64_t columns;  // of out
  int64_t depth;
  int64_t depth_per_part;
  int64_t b_step;  // elements of b from one expert to the next
  RowGroups groups;
  float scale;
  void* out;  // with several parts, fp32 [parts, M, columns]
  DType out_dtype;
};

// out[m, c] = scale * sum over d of a[rows[m], d] b_e[c, d]. Blocks: x slots of 64 rows, with tiles
// of columns; z parts of the depth.
static __global__ void __launch_bounds__(kTileThreads)
    grouped_lora_rows_tile(GroupedLoraProduct p) {
  ExpertRows rows;
  if (!find_tile<kTileSize>(p.groups, rows)) return;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % p.groups.column_tiles) * kTileSize;
  const int64_t begin = blockIdx.z * p.depth_per_part;
  const int64_t end = min(begin + p.depth_per_part, p.depth);
  const int64_t part = blockIdx.z * p.groups.groups.M * p.columns;  // 0 unless out is fp32
  if (rows.index >= p.groups.groups.E) {
    zero_tile(rows, kTileSize, static_cast<char*>(p.out) + part * 4, p.out_dtype, p.columns, col0,
              kTileSize);
    return;
  }
  const IndexedOperand<false> a{p.a, rows, rows.last};
  TileAccumulators acc;
  tile_clear(acc);
  tile_product(ptx::shared_memory<TileSmem>(), a, p.b.from(rows.expert() * p.b_step), rows.first,
               col0, begin, end, acc);
  tile_for_each(acc, rows.first, col0, rows.last, p.columns,
                [&](int64_t row, int64_t col, float v) {
                  store_from_float(p.out, p.out_dtype, part + row * p.columns + col, p.scale * v);
                });
}

// out_e[r, c] (if not kRankMajor: [c, r]) = scale * sum over e's rows m of b[r, m] a[c, rows[m]], a
// of p.columns columns. Blocks: x experts, with tiles of columns; y ranks.
template <bool kRankMajor>
__global__ void __launch_bounds__(kTileThreads) grouped_lora_columns_tile(GroupedLoraProduct p) {
  const ExpertRows rows =
      rows_of_expert(p.groups.groups, static_cast<int>(blockIdx.x / p.groups.column_tiles));
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % p.groups.column_tiles) * kTileSize;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * kTileSize;
  const IndexedOperand<true> a{p.a, rows, p.columns};
  TileAccumulators acc;
  tile_clear(acc);
  tile_product(ptx::shared_memory<TileSmem>(), p.b, a, rank0, col0, rows.first, rows.last, acc);
  const int64_t first = rows.expert() * p.b.rows * p.columns;
  tile_for_each(acc, rank0, col0, p.b.rows, p.columns, [&](int64_t rank, int64_t col, float v) {
    const int64_t at = kRankMajor ? rank * p.columns + col : col * p.b.rows + rank;
    store_from_float(p.out, p.out_dtype, first + at, p.scale * v);
  });
}

}  // namespace qlora_ext
