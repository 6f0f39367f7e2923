// The layout of gemm_4bit_fused.cuh: tiles, shared memory, parameters.
#pragma once

#include "cuda/last_block.cuh"
#include "cuda/scale_pipeline.cuh"
#include "cuda/table_factor.cuh"

namespace qlora_ext {

// kTilesM mma tiles of 8 rows of x. A stage is always 16384 weights (8 KiB). Few rows of x leave
// room for long rows of W; with many rows, more columns per block pay off.
template <class Arch, int kTilesM>
struct FusedTraits {
  static constexpr int kThreads = 256;
  static constexpr int kTileM = 8 * kTilesM;
  static constexpr int kTileN = kTilesM == 1 ? 32 : kTilesM == 2 ? 64 : 128;
  static constexpr int kTileK = 16384 / kTileN;
  static constexpr int kRuns = kTileK / kRun;  // = warps along k
  static constexpr int kWarpsN = kTileN / 32;
  static_assert(kRuns * kWarpsN * 32 == kThreads, "one run of 64 and 32 rows n for each warp");
  static_assert(kRuns * kTileN == kThreads, "a stage has one scale for each thread");

  // sm_75 has 64 KiB of shared memory: a compact table (two lanes share a bank) and two stages.
  static constexpr bool kCompact = std::is_same_v<Arch, Sm75>;
  static constexpr int kStages = kCompact ? 2 : 4;
  static constexpr int kPairStride = kCompact ? 64 : 256;   // bytes between table entries
  static constexpr int kLineStride = kCompact ? 128 : 256;  // between 128-byte lines of packed W
  static constexpr int kFirstLine = kCompact ? 256 * 64 : 128;
  static constexpr int kStageLines = 64;
  static constexpr int kTableBytes = 256 * 64 + (kCompact ? kStages * 8192 : 48 * 1024);
  static_assert(kCompact || kStages * kStageLines == 256, "stages fill the table's gaps exactly");

  static constexpr int kXRowBytes = 2 * kTileK;
  static constexpr int kXStageBytes = kTileM * kXRowBytes;
  static constexpr int kXCopies = kXStageBytes / 16 / kThreads;  // 16-byte copies per thread
  static constexpr int kXCopyRows = kThreads / (kTileK / 8);     // rows between two copies
  static constexpr int kScalePitch = kTileN + 32 / kRuns;        // conflict-free writes

  // The 32-byte segment of run `run` of row `n`, as a byte offset into a stage: XOR swizzled so
  // that four neighbouring rows lie in different banks.
  __device__ __forceinline__ static int segment(int n, int run) {
    constexpr int kRowSegments = kTileK / kRun;  // 8, 4 or 2
    const int linear = n * kRowSegments + run;
    const int swizzle = kRowSegments == 2 ? (n >> 1) & 1 : n & 3;
    return linear / 4 * kLineStride + ((linear % 4) ^ swizzle) * 32;
  }
};

template <class Arch, int kTilesM>
struct FusedSmem {
  using Traits = FusedTraits<Arch, kTilesM>;
  unsigned char table[Traits::kTableBytes];  // pair table, packed stages; at the end partial sums
  unsigned char x[Traits::kStages][Traits::kXStageBytes];  // 16-byte units, unit ^ (row & 1)
  float scales[2][Traits::kRuns][Traits::kScalePitch];     // [buffer][run][n]
};

struct FusedParams {
  Gemm4bitParams gemm;
  Scales scales;
  int run_shift;        // run index -> block index
  float table_factor;   // of the pair table: table_factor.cuh
  float scale_factor;   // its inverse, multiplied into the scales
  int64_t k_per_split;  // a multiple of kTileK, or all
  float* parts;         // [splits, M, N] if splits > 1
  Arrivals arrivals;    // if splits > 1 and last_block_adds
};

// Whether the last block of a tile adds the parts of a split. In larger tiles one block would take
// longer than a launch that uses the whole GPU.
template <int kTilesM>
constexpr bool last_block_adds = kTilesM <= 2;

// Without splits of the contraction.
template <class T>
FusedParams make_fused_params(const Gemm4bitParams& p) {
  FusedParams fused{};
  fused.gemm = p;
  fused.scales = make_scales(p.weight);
  fused.run_shift = run_shift(fused.scales);
  fused.table_factor = table_factor<T>(p.weight.values, p.weight.blocksize);
  fused.scale_factor = 1 / fused.table_factor;
  fused.k_per_split = p.weight.K;
  return fused;
}

}  // namespace qlora_ext
