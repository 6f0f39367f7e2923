// sum_rows_tokens: out[t] = sum of values[order[i]] over token t's part of `order`, in fp32, in that
// order, rounded once. It brings the results of a mixture's experts, sorted by expert, back together.
//
// Moves   each summed row of values once, out once. Floor: these bytes over bandwidth; 512 tokens of
//         8 rows of 2048 in bf16 are 19 MB, 5.6 us on H100.
// Layout  a thread has kWidth neighbouring columns of one token (8: 16-byte accesses).
// Trust   order and ends are data: ends are cut to [0, L], a part that ends before it begins is
//         empty, and an index outside [0, M) adds nothing.
#pragma once

#include "cuda/tile.cuh"

namespace qlora_ext {

constexpr int kSumRowsThreads = 256;

template <class T, int kWidth>
__device__ __forceinline__ void add_row(const T* row, float (&sum)[kWidth]) {
  if constexpr (kWidth == 1) {
    sum[0] = __fadd_rn(sum[0], to_float(row[0]));
  } else {
    constexpr int kLoads = kWidth * static_cast<int>(sizeof(T)) / 16;
    union {
      uint4 vectors[kLoads];
      T values[kWidth];
    };
#pragma unroll
    for (int i = 0; i < kLoads; ++i) vectors[i] = __ldg(reinterpret_cast<const uint4*>(row) + i);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = __fadd_rn(sum[i], to_float(values[i]));
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSumRowsThreads) sum_rows_tokens(SumRowsParams p) {
  const int64_t units = p.K / kWidth;  // of a row; K is a multiple of kWidth
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSumRowsThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSumRowsThreads + threadIdx.x;
       i < p.T * units; i += stride) {
    const int64_t t = i / units, column = i % units * kWidth;
    const int64_t begin = t > 0 ? max(__ldg(p.ends + t - 1), 0) : 0;
    const int64_t end = min(static_cast<int64_t>(__ldg(p.ends + t)), p.L);
    float sum[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] = 0.0f;
#pragma unroll 4
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = __ldg(p.order + at);
      if (row < 0 || row >= p.M) continue;
      add_row<T, kWidth>(static_cast<const T*>(p.values) + row * p.values_stride + column, sum);
    }
    T* out = static_cast<T*>(p.out) + t * p.K + column;
    if constexpr (kWidth == 8) {
      store_eight(out, sum);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[j] = from_float<T>(sum[j]);
    }
  }
}

}  // namespace qlora_ext
