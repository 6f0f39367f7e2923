// quantize_4bit_blocks: packs a weight with one scale (and mean) per block of 32 to 4096 elements.
// quantize_4bit_tensor: packs with one scale for the whole tensor, which is computed before.
//
// Moves   2 or 4 B/weight in, 0.5 B + 4 B / blocksize out. Floor: 2.516 B/weight for bf16 with
//         double quantization; 4096x14336 is 49 us on H100, 34 us on H200. The model says that its
//         instructions take longer: 124 to 146 us on both (docs/generated/kernel_model.md).
// Layout  a thread block packs 4096 elements, a thread 8 neighbours: one or two 16-byte loads and
//         one 4-byte store. blocksize / 8 threads share a scale: shuffles inside a warp, shared
//         memory across warps.
// Decide  rank = number of thresholds below v, by four halvings; each lane reads its own bank.
// Bits    as docs/format.md says, no FMA. absmax is the integer maximum of |bits|, which also finds
//         NaN and Inf.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"
#include "cuda/tree_sum.cuh"

namespace qlora_ext {

constexpr int kQuantizeThreads = 512;
constexpr int kQuantizeTile = 8 * kQuantizeThreads;  // elements; the largest block size
static_assert(kQuantizeTile == 4096, "every block size divides the tile");

struct QuantizeSmem {
  float thresholds[16][32];  // [i][bank]; the last row is never reached
  uint32_t warp_max[kQuantizeThreads / 32];
  double warp_sum[kQuantizeThreads / 32];
};

// rank -> code, four bits each, and the sign rule, in registers.
struct CodeOrder {
  uint64_t codes;
  bool sign_magnitude;
};

inline CodeOrder make_code_order(const Codebook& book) {
  CodeOrder order{0, book.sign_magnitude};
  for (int rank = 0; rank < 16; ++rank) {
    order.codes |= static_cast<uint64_t>(book.order[rank] & 15) << (4 * rank);
  }
  return order;
}

__device__ __forceinline__ void fill_thresholds(QuantizeSmem& s, const Codebook& book) {
  if (threadIdx.x < 15 * 32)
    s.thresholds[threadIdx.x / 32][threadIdx.x % 32] = book.thresholds[threadIdx.x / 32];
}

__device__ __forceinline__ uint32_t encode(const QuantizeSmem& s, const CodeOrder& order, float v) {
  const int lane = threadIdx.x % 32;
  const float key = order.sign_magnitude ? fabsf(v) : v;
  int rank = key > s.thresholds[7][lane] ? 8 : 0;
#pragma unroll
  for (int step = 4; step >= 1; step /= 2) {
    rank += key > s.thresholds[rank + step - 1][lane] ? step : 0;
  }
  const uint32_t code = static_cast<uint32_t>(order.codes >> (4 * rank)) & 15;
  return code | (order.sign_magnitude && v < 0.0f ? 8u : 0u);
}

// Loads eight neighbours from flat index `first` on, zeros beyond `numel`.
template <class T, bool kVector>
__device__ __forceinline__ void load_eight(const T* x, int64_t first, int64_t numel,
                                           float (&v)[8]) {
  if (kVector && first + 8 <= numel) {
    T values[8];
    constexpr int kLoads = sizeof(T) * 8 / 16;
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      loaded[i] = ptx::load_streaming(reinterpret_cast<const uint4*>(x + first) + i);
    }
    memcpy(values, loaded, sizeof(values));
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = first + i < numel ? to_float(x[first + i]) : 0.0f;
}

// Largest |v| as bits. Above 0x7f7fffff, one of the values is NaN or Inf.
__device__ __forceinline__ uint32_t max_magnitude_bits(const float (&v)[8]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, __float_as_uint(v[i]) & 0x7fffffffu);
  return bits;
}

// Lowers *bad_index to the first NaN or Inf of these eight, if there is one.
__device__ __forceinline__ void report_bad(const float (&v)[8], uint32_t magnitude_bits,
                                           int64_t first, int64_t* bad_index) {
  if (magnitude_bits <= 0x7f7fffffu) return;
  for (int i = 0; i < 8; ++i) {
    if ((__float_as_uint(v[i]) & 0x7fffffffu) > 0x7f7fffffu) {
      atomicMin(reinterpret_cast<unsigned long long*>(bad_index),
                static_cast<unsigned long long>(first + i));
      return;
    }
  }
}

// Packs eight values, even elements in high nibbles. The nibbles beyond `numel` are zero.
__device__ __forceinline__ void pack_eight(const QuantizeSmem& s, const CodeOrder& order,
                                           const float (&v)[8], int64_t first, int64_t numel,
                                           uint8_t* packed) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t code = encode(s, order, v[i]);
    if (first + i < numel) word |= code << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
  }
  if (first + 8 <= numel) {
    *reinterpret_cast<uint32_t*>(packed + first / 2) = word;
    return;
  }
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (first + 2 * b < numel) packed[first / 2 + b] = static_cast<uint8_t>(word >> (8 * b));
  }
}

// Returns the sum of a block's values, in the format's order, to each of the block's threads.
// present: how many groups of 256 have elements (the last block may be short).
__device__ __forceinline__ double block_tree_sum(QuantizeSmem& s, double (&v)[8], int blocksize,
                                                 int present) {
  if (blocksize <= kTreeGroup) return __dadd_rn(tree_sum_group(v, blocksize), 0.0);
  const double group = tree_sum_group(v, kTreeGroup);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // all threads have read the previous call's sums
  if (lane == 0) s.warp_sum[warp] = group;
  __syncthreads();
  const int groups = blocksize / kTreeGroup;  // 2 to 16
  double sum = lane < groups ? s.warp_sum[warp / groups * groups + lane] : 0.0;
  if (present > 1) {
    sum = __dadd_rn(sum, 0.0);  // for the halvings that only add padding
#pragma unroll
    for (int half = 8; half >= 1; half /= 2) {
      const double other = __shfl_down_sync(0xffffffffu, sum, half);
      if (half < groups) sum = __dadd_rn(sum, other);
    }
  }
  return __shfl_sync(0xffffffffu, __dadd_rn(sum, 0.0), 0);  // never -0.0
}

// mean, and scale = c * std, of a block with `count` elements.
__device__ __forceinline__ void standard_statistics(QuantizeSmem& s, const float (&x)[8], int valid,
                                                    int64_t count, int blocksize, float std_factor,
                                                    float& mean, float& scale) {
  const int present = static_cast<int>((count + kTreeGroup - 1) / kTreeGroup);
  const double n = static_cast<double>(count > 0 ? count : 1);
  double v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = static_cast<double>(x[i]);
  mean = static_cast<float>(__ddiv_rn(block_tree_sum(s, v, blocksize, present), n));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const double deviation = __dsub_rn(static_cast<double>(x[i]), static_cast<double>(mean));
    v[i] = i < valid ? __dmul_rn(deviation, deviation) : 0.0;
  }
  const double variance = __ddiv_rn(block_tree_sum(s, v, blocksize, present), n);
  scale = static_cast<float>(__dmul_rn(static_cast<double>(std_factor), __dsqrt_rn(variance)));
}

// The value whose code is looked up.
template <Normalization kNorm>
__device__ __forceinline__ float normalize(float x, float mean, const Reciprocal& inverse) {
  if constexpr (kNorm == Normalization::kNone) return x;
  if (!inverse.usable) return 0.0f;
  if constexpr (kNorm == Normalization::kAbsmax) return __fmul_rn(x, inverse.value);
  return fminf(fmaxf(__fmul_rn(__fsub_rn(x, mean), inverse.value), -1.0f), 1.0f);
}

template <class T, Normalization kNorm, bool kVector>
__global__ void __launch_bounds__(kQuantizeThreads, 1)
    quantize_4bit_blocks(Quantize4bitParams p, CodeOrder order, int shift) {
  QuantizeSmem& s = ptx::shared_memory<QuantizeSmem>();
  fill_thresholds(s, p.codebook);
  const int blocksize = 1 << shift;
  const int threads = blocksize / 8;  // that share a scale
  const int warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQuantizeTile + threadIdx.x * 8;
  const int64_t block = first >> shift;
  float x[8];
  load_eight<T, kVector>(static_cast<const T*>(p.weight), first, p.numel, x);
  uint32_t magnitude = max_magnitude_bits(x);
  report_bad(x, magnitude, first, p.bad_index);

  float scale = 0, mean = 0;
  if constexpr (kNorm == Normalization::kAbsmax) {
#pragma unroll
    for (int distance = 16; distance >= 1; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, magnitude, distance);
      if (distance < threads) magnitude = max(magnitude, other);
    }
    if (threads > 32) {
      if (threadIdx.x % 32 == 0) s.warp_max[warp] = magnitude;
      __syncthreads();
      const int warps = threads / 32;
      for (int i = 0; i < warps; ++i) {
        magnitude = max(magnitude, s.warp_max[warp / warps * warps + i]);
      }
    }
    scale = __uint_as_float(magnitude);
  } else {
    const int64_t left = p.numel - first;
    const int valid = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    const int64_t in_block = p.numel - (block << shift);
    const int64_t count = in_block < blocksize ? (in_block > 0 ? in_block : 0) : blocksize;
    standard_statistics(s, x, valid, count, blocksize, p.std_factor, mean, scale);
  }
  __syncthreads();  // all threads see the thresholds
  const Reciprocal inverse = reciprocal(scale);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = normalize<kNorm>(x[i], mean, inverse);
  if (first >= p.numel) return;
  pack_eight(s, order, x, first, p.numel, p.packed);
  if (threadIdx.x % threads == 0) {
    p.absmax[block] = scale;
    if constexpr (kNorm == Normalization::kStandard) p.mean[block] = mean;
  }
}

template <class T, Normalization kNorm, bool kVector>
__global__ void __launch_bounds__(kQuantizeThreads, 1)
    quantize_4bit_tensor(Quantize4bitParams p, CodeOrder order) {
  QuantizeSmem& s = ptx::shared_memory<QuantizeSmem>();
  fill_thresholds(s, p.codebook);
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQuantizeTile + threadIdx.x * 8;
  if (first >= p.numel) return;
  float x[8];
  load_eight<T, kVector>(static_cast<const T*>(p.weight), first, p.numel, x);
  report_bad(x, max_magnitude_bits(x), first, p.bad_index);
  const float mean = kNorm == Normalization::kStandard ? *p.mean : 0.0f;
  const Reciprocal inverse = reciprocal(kNorm == Normalization::kNone ? 1.0f : *p.absmax);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = normalize<kNorm>(x[i], mean, inverse);
  pack_eight(s, order, x, first, p.numel, p.packed);
}

}  // namespace qlora_ext
