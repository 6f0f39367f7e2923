// One thread's stream of block scales, decoded a stage ahead of the warps that multiply by them.
#pragma once

#include "cuda/format.cuh"

namespace qlora_ext {

constexpr int kRun = 64;  // elements along k that one scale covers in the fused kernels

// A scale takes three steps in three iterations, so that no step waits for the one before: load the
// code, look it up in the map, multiply and add. A run is 64 elements from flat index 64 * run.
template <bool kNested>
struct ScalePipeline {
  const uint8_t* codes;
  const float* scales;  // absmax2, one for 256 codes; or the fp32 scales
  int run_shift;        // run -> block
  float factor;         // 1 keeps the scale's own bits
  float offset;
  int code;
  float loaded;
  float map_value, multiplier;

  __device__ __forceinline__ ScalePipeline(const Scales& s, int shift, float scale_factor)
      : run_shift(shift), factor(scale_factor), offset(0.0f), code(0), loaded(0.0f) {
    codes = s.code;
    scales = kNested ? s.nested + 1 : s.absmax;
    if constexpr (kNested) offset = __ldg(s.nested);
  }

  __device__ __forceinline__ void fetch(uint32_t run) {
    const uint32_t block = run >> run_shift;
    if constexpr (kNested) code = __ldg(codes + block);
    loaded = __ldg(scales + (kNested ? block >> 8 : block));
  }
  __device__ __forceinline__ void look_up() {
    if constexpr (kNested) map_value = __ldg(kDeviceDynamicMap + code);
    multiplier = loaded;
  }
  // The canonical bits (product, then sum, never an FMA) times `factor`.
  __device__ __forceinline__ float value() const {
    float scale = multiplier;
    if constexpr (kNested) scale = __fadd_rn(__fmul_rn(map_value, multiplier), offset);
    return __fmul_rn(scale, factor);
  }
};

// The shift from a 32-bit run index to its block, from the element's shift (63: one scale in all).
inline int run_shift(const Scales& scales) {
  const int shift = scales.shift - log2_floor(kRun);
  return shift < 31 ? shift : 31;
}

// What the fused kernels require of a weight: runs of 64 that share a scale, no means, 16-byte
// rows, run indices of 32 bits.
inline bool has_uniform_runs(const PackedWeight& w) {
  return w.mean == nullptr && w.K > 0 && w.K % kRun == 0 && w.K < (int64_t{1} << 30) &&
         (w.num_blocks <= 1 || w.blocksize % kRun == 0) && is_aligned(w.packed, 16) &&
         w.N * (w.K / kRun) < (int64_t{1} << 31);
}

}  // namespace qlora_ext
