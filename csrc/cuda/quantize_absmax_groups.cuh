// quantize_absmax_groups: fp32 scales to 8-bit codes of the signed dynamic map, an absmax2 per 256.
// dequantize_absmax_codes: back to fp32.
//
// Moves   4 B in and 1.016 B out per scale, one scale per 64 weights: launches cost more than the
//         bytes. The offset (mean of all scales) is an fp64 tree sum that ran before.
// Layout  a warp quantizes one group of 256; lane l holds scales l, l + 32, ...
// Shared  the map's 255 decision thresholds, fp32 midpoints.
// Bits    v = (absmax - offset) * (1 / absmax2), IEEE; code = number of thresholds below v.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"

namespace qlora_ext {

constexpr int kAbsmaxThreads = 256;

struct QuantizeAbsmaxSmem {
  float thresholds[256];  // the last one is +inf
};

static __global__ void __launch_bounds__(kAbsmaxThreads)
    quantize_absmax_groups(QuantizeAbsmaxParams p, const double* total) {
  QuantizeAbsmaxSmem& s = ptx::shared_memory<QuantizeAbsmaxSmem>();
  const int lane = threadIdx.x % 32;
  {
    const int i = threadIdx.x;
    s.thresholds[i] =
        i == 255
            ? __int_as_float(0x7f800000)
            : static_cast<float>(__dmul_rn(__dadd_rn(static_cast<double>(kDeviceDynamicMap[i]),
                                                     static_cast<double>(kDeviceDynamicMap[i + 1])),
                                           0.5));
  }
  __syncthreads();
  const float offset = static_cast<float>(__ddiv_rn(*total, static_cast<double>(p.num_blocks)));
  if (blockIdx.x == 0 && threadIdx.x == 0) p.nested[0] = offset;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kAbsmaxThreads / 32) + threadIdx.x / 32;
  if (group * 256 >= p.num_blocks) return;  // whole warps return
  float v[8];
  float absmax2 = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t i = group * 256 + j * 32 + lane;
    v[j] = i < p.num_blocks ? __fsub_rn(p.absmax[i], offset) : 0.0f;
    absmax2 = fmaxf(absmax2, fabsf(v[j]));
  }
#pragma unroll
  for (int distance = 16; distance >= 1; distance /= 2) {
    absmax2 = fmaxf(absmax2, __shfl_xor_sync(0xffffffffu, absmax2, distance));
  }
  if (lane == 0) p.nested[1 + group] = absmax2;
  const Reciprocal inverse = reciprocal(absmax2);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t i = group * 256 + j * 32 + lane;
    const float scaled = inverse.usable ? __fmul_rn(v[j], inverse.value) : 0.0f;
    int code = 0;  // 255 sorted thresholds: eight halvings
#pragma unroll
    for (int step = 128; step >= 1; step /= 2) {
      code += scaled > s.thresholds[code + step - 1] ? step : 0;
    }
    if (i < p.num_blocks) p.code[i] = static_cast<uint8_t>(code);
  }
}

static __global__ void __launch_bounds__(kAbsmaxThreads)
    dequantize_absmax_codes(DequantizeAbsmaxParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAbsmaxThreads + threadIdx.x;
  if (i >= p.num_blocks) return;
  const Scales scales{
      .code = p.code, .absmax = nullptr, .nested = p.nested, .mean = nullptr, .shift = 0};
  p.absmax[i] = decode_scale(scales, i, kDeviceDynamicMap);
}

}  // namespace qlora_ext
