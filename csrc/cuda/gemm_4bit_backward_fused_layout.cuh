// The layout of gemm_4bit_backward_fused.cuh: tiles, shared memory, parameters.
#pragma once

#include "cuda/scale_pipeline.cuh"

namespace qlora_ext {

template <class Arch, int kTilesM>
struct BackwardTraits {
  static constexpr int kThreads = 256;
  static constexpr int kTileM = 8 * kTilesM;
  static constexpr int kTileK = 256;           // columns of dX
  static constexpr int kStageN = 64;           // rows of W per stage
  static constexpr int kRuns = kTileK / kRun;  // = warps along k
  static_assert(kRuns * kStageN == kThreads, "a stage has one scale for each thread");
  static constexpr bool kCompact = std::is_same_v<Arch, Sm75>;
  static constexpr int kStages = kTilesM <= 4 ? 2 : 3;
  static constexpr int kTableBytes = kCompact ? 16 * 32 * 4 : 256 * 256;
  static constexpr int kWRowBytes = kTileK / 2;
  static constexpr int kWStageBytes = kStageN * kWRowBytes;
  static constexpr int kYRowBytes = 2 * kStageN;
  static constexpr int kYStageBytes = kTileM * kYRowBytes;
  static constexpr int kYCopies = kYStageBytes / 16 / kThreads;  // 16-byte copies per thread
  static constexpr int kScalePitch = kStageN + 8;                // conflict-free writes
  static constexpr int kSumBytes = kTileM * kTileK * 4;
};

// Table and stages. At the end the same memory holds the sums of one half of the warps.
template <class Arch, int kTilesM>
union BackwardSmem {
  using Traits = BackwardTraits<Arch, kTilesM>;
  struct {
    unsigned char table[Traits::kTableBytes];
    unsigned char w[Traits::kStages][Traits::kWStageBytes];  // 32-byte segments, run ^ (n / 8 & 3)
    unsigned char y[Traits::kStages][Traits::kYStageBytes];  // 16-byte units, unit ^ (m & 1) * 4
    float scales[2][Traits::kRuns][Traits::kScalePitch];     // [buffer][run][n]
  };
  float sums[Traits::kTileM][Traits::kTileK];
};

struct BackwardParams {
  Gemm4bitBackwardParams gemm;
  Scales scales;
  int run_shift;        // run index -> block index
  int64_t n_per_split;  // a multiple of kStageN, or all
  float* parts;         // [splits, M, K] if splits > 1
};

// Without splits of the contraction.
inline BackwardParams make_backward_params(const Gemm4bitBackwardParams& p) {
  BackwardParams fused{};
  fused.gemm = p;
  fused.scales = make_scales(p.weight);
  fused.run_shift = run_shift(fused.scales);
  fused.n_per_split = p.weight.N;
  fused.parts = static_cast<float*>(p.workspace);
  return fused;
}

}  // namespace qlora_ext
