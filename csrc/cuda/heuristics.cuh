// What the dispatch of gemm_4bit and its backward shares: which operands tensor cores take, up to how
// many rows a kernel decodes W itself, and into how many blocks a contraction is split.
#pragma once

#include "cuda/reduce_parts.cuh"

namespace qlora_ext {

inline bool has_tensor_cores(DType dtype, const DeviceInfo& device) {
  return dtype == DType::kFloat16    ? device.arch >= 75
         : dtype == DType::kBFloat16 ? device.arch >= 80
                                     : false;
}

// Rows of x (backward: of dY) from which decoding W to memory and cuBLAS wins over decoding it in the
// kernel. By napkin, not yet by a bench on silicon: two passes cost 1 + 335 / M of the dense product
// on H100, the fused kernels reach at best 63% of the tensor peak (mma.sync on Hopper), ~100% on
// Ampere.
constexpr int64_t kFusedMaxRows = 256;
constexpr int64_t kFusedMaxRowsTuring = 64;
// FFMA tiles of 64 rows: beyond one of them cuBLAS is far ahead.
constexpr int64_t kAnyMaxRows = 64;

// Stages that a split has at least: below that the prologue outweighs what parallelism brings.
constexpr int64_t kLeastStages = 4;

struct Splits {
  int64_t count;
  int64_t stages;  // of each but the last
};

// Splits of a contraction of `stages` that fill the device when there are few tiles. A block that
// has a whole SM can keep its memory busy, so from 0.6 tiles per SM on there is no split and no
// second launch. By napkin, not yet by a bench on silicon.
inline Splits split_contraction(int64_t tiles, int64_t stages) {
  const int64_t sm_count = device_info().sm_count;
  int64_t splits = 1;
  if (tiles * 10 < sm_count * 6) splits = choose_parts(tiles, stages, kLeastStages, sm_count, 1);
  const int64_t stages_per_split = ceil_div(stages, splits);
  return {ceil_div(stages, stages_per_split), stages_per_split};
}

}  // namespace qlora_ext
