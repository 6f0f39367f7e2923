// Statistics of a whole tensor, for quantize_4bit with one scale: partial maxima, then one number.
//
// Moves   the weight once (absmax) or twice (standard: mean, then deviations). Floor: bandwidth.
// Order   a maximum has none; sums are tree_sum.cuh's. No float atomics.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"

namespace qlora_ext {

constexpr int kMaxThreads = 256;
constexpr int kMaxPartials = 1024;

struct MaxSmem {
  uint32_t warp_max[kMaxThreads / 32];
};

// Returns the largest v of the block's threads, in thread 0.
__device__ __forceinline__ uint32_t block_max(MaxSmem& s, uint32_t v) {
#pragma unroll
  for (int distance = 16; distance >= 1; distance /= 2) {
    v = max(v, __shfl_xor_sync(0xffffffffu, v, distance));
  }
  if (threadIdx.x % 32 == 0) s.warp_max[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kMaxThreads / 32; ++warp) v = max(v, s.warp_max[warp]);
  }
  return v;
}

// partials[block] = bits of the largest |weight| that the block saw.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_4bit_partial_max(const T* weight, int64_t numel, uint32_t* partials) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kMaxThreads;
  uint32_t bits = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x; i < numel;
       i += stride) {
    bits = max(bits, __float_as_uint(to_float(weight[i])) & 0x7fffffffu);
  }
  bits = block_max(ptx::shared_memory<MaxSmem>(), bits);
  if (threadIdx.x == 0) partials[blockIdx.x] = bits;
}

// absmax[0] from the partial maxima: one block.
static __global__ void __launch_bounds__(kMaxThreads)
    quantize_4bit_finish_max(const uint32_t* partials, int count, float* absmax) {
  uint32_t bits = 0;
  for (int i = threadIdx.x; i < count; i += kMaxThreads) bits = max(bits, partials[i]);
  bits = block_max(ptx::shared_memory<MaxSmem>(), bits);
  if (threadIdx.x == 0) *absmax = __uint_as_float(bits);
}

// mean[0] from the sum of the weights; then, once *variance_total is the sum of squared
// deviations, scale[0] = std_factor * std. One thread each.
static __global__ void quantize_4bit_finish_mean(const double* total, int64_t numel, float* mean) {
  if (threadIdx.x == 0) *mean = static_cast<float>(__ddiv_rn(*total, static_cast<double>(numel)));
}
static __global__ void quantize_4bit_finish_scale(const double* total, int64_t numel,
                                                  float std_factor, float* scale) {
  if (threadIdx.x != 0) return;
  const double std = __dsqrt_rn(__ddiv_rn(*total, static_cast<double>(numel)));
  *scale = static_cast<float>(__dmul_rn(static_cast<double>(std_factor), std));
}
static __global__ void quantize_4bit_unit_scale(float* scale) {
  if (threadIdx.x == 0) *scale = 1.0f;
}

}  // namespace qlora_ext
