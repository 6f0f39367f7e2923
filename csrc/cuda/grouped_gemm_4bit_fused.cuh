// grouped_gemm_4bit_fused: y[m] = x[rows[m]] W_e^T + bias_e + S[m] B_e^T for every expert e in one
// launch: the tiles of gemm_4bit_fused.cuh, scheduled by row_groups.cuh.
// grouped_gemm_4bit_backward_fused: dX[m] = dY[m] W_e + dS[m] A_e likewise.
//
// Moves   each expert's packed weight once per kTileM of its rows (from L2 after the first, as the
//         tiles of an expert run next to each other); x through `rows`, without a gathered copy.
// Floor   decoding, 8 experts of 1536x2048 with a row each: 13 MB, 4.3 us on H100; 4096 rows of each
//         of 128 experts: the tensor cores (mma.sync, ~63% of Hopper's peak).
// Bits    as gemm_4bit_fused without splits of the contraction.
#pragma once

#include "cuda/gemm_4bit_backward_fused.cuh"
#include "cuda/gemm_4bit_fused.cuh"

namespace qlora_ext {

struct GroupedFusedParams {
  FusedParams fused;  // of expert 0, with all M rows
  RowGroups groups;
};

template <class Arch, class T, int kTilesM, bool kNested>
__global__ void __launch_bounds__(256, kFusedBlocksPerSm<kTilesM>)
    grouped_gemm_4bit_fused(GroupedFusedParams p) {
  if constexpr (!ptx::is_compiled<Arch, FusedSmem<Arch, kTilesM>>()) {
    ptx::trap();
  } else {
    using Traits = FusedTraits<Arch, kTilesM>;
    ExpertRows rows;
    if (!find_tile<Traits::kTileM>(p.groups, rows)) return;
    const int64_t column_tile = blockIdx.x % p.groups.column_tiles;
    if (rows.index >= p.groups.groups.E) {
      zero_tile(rows, Traits::kTileM, p.fused.gemm.y, p.fused.gemm.dtype, p.fused.gemm.weight.N,
                column_tile * Traits::kTileN, Traits::kTileN);
      return;
    }
    FusedTile<Arch, T, kTilesM, kNested, ExpertRows> tile(
        p.fused, ptx::shared_memory<FusedSmem<Arch, kTilesM>>(), rows, column_tile);
    tile.run_all();
  }
}

struct GroupedBackwardParams {
  BackwardParams fused;  // of expert 0, with all M rows
  RowGroups groups;
};

template <class Arch, class T, int kTilesM, bool kNested>
__global__ void __launch_bounds__(256, 1)
    grouped_gemm_4bit_backward_fused(GroupedBackwardParams p) {
  if constexpr (!ptx::is_compiled<Arch, BackwardSmem<Arch, kTilesM>>()) {
    ptx::trap();
  } else {
    using Traits = BackwardTraits<Arch, kTilesM>;
    ExpertRows rows;
    if (!find_tile<Traits::kTileM>(p.groups, rows)) return;
    const int64_t column_tile = blockIdx.x % p.groups.column_tiles;
    if (rows.index >= p.groups.groups.E) {
      zero_tile(rows, Traits::kTileM, p.fused.gemm.dX, p.fused.gemm.dtype, p.fused.gemm.weight.K,
                column_tile * Traits::kTileK, Traits::kTileK);
      return;
    }
    BackwardTile<Arch, T, kTilesM, kNested, ExpertRows> tile(
        p.fused, ptx::shared_memory<BackwardSmem<Arch, kTilesM>>(), rows, column_tile);
    tile.run_all();
  }
}

}  // namespace qlora_ext
