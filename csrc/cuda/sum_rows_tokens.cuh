// sum_rows_tokens: out[t] = sum of values[order[i]] over token t's part of `order`, in fp32, in that
// order, rounded once. It brings the results of a mixture's experts, sorted by expert, back together.
//
// Moves   each summed row of values once, out once. Floor: these bytes over bandwidth; 512 tokens of
//         8 rows of 2048 in bf16 are 19 MB, 6.3 us on H100.
// Layout  a thread has kWidth neighbouring columns of one token (16 bytes, or one).
// Trust   order and ends are data: ends are cut to [0, L], a part that ends before it begins is
//         empty, and an index outside [0, M) adds nothing.
#pragma once

#include "cuda/tile.cuh"

namespace qlora_ext {

constexpr int kSumRowsThreads = 256;

// kWidth neighbouring values: 16 bytes, or one value.
template <class T, int kWidth>
union RowPiece {
  uint4 vector;
  T values[kWidth];
};

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
      const T* source = static_cast<const T*>(p.values) + row * p.values_stride + column;
      RowPiece<T, kWidth> piece;
      if constexpr (kWidth > 1) {
        piece.vector = __ldg(reinterpret_cast<const uint4*>(source));
      } else {
        piece.values[0] = *source;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] = __fadd_rn(sum[j], to_float(piece.values[j]));
    }
    T* out = static_cast<T*>(p.out) + t * p.K + column;
    RowPiece<T, kWidth> piece;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) piece.values[j] = from_float<T>(sum[j]);
    if constexpr (kWidth > 1) {
      __stcg(reinterpret_cast<uint4*>(out), piece.vector);
    } else {
      *out = piece.values[0];
    }
  }
}

}  // namespace qlora_ext
