// embedding_4bit_rows: looks up rows of a packed weight by index and decodes them.
//
// Moves   K * 0.516 B in and K * sizeof(T) out per index. Floor: those bytes over bandwidth.
// Layout  as dequantize_4bit_vector (K a multiple of 32, so rows start on a 16-byte chunk). Chunks
//         of the output are consecutive; each comes from the row that its index names.
// Checks  an index outside [0, N) prints an error and traps, as in torch's own embedding, without a
//         synchronization. Such an index is never used to read.
#pragma once

#include "cuda/dequantize_4bit_vector.cuh"

namespace qlora_ext {

__device__ __forceinline__ int64_t checked_row(const Embedding4bitParams& p, int64_t i) {
  const int64_t row = __ldg(reinterpret_cast<const long long*>(p.indices) + i);
  if (row < 0 || row >= p.weight.N) ptx::trap_index("embedding_4bit", row, i, p.weight.N);
  return row;
}

template <class T, bool kMean>
__global__ void __launch_bounds__(kDequantizeThreads)
    embedding_4bit_rows(Embedding4bitParams p, Scales scales) {
  DequantizeSmem& s = ptx::shared_memory<DequantizeSmem>();
  const int64_t chunks_per_row = p.weight.K / kChunk;
  const int64_t num_chunks = p.M * chunks_per_row;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  int64_t source = 0;
  if (target < num_chunks) {
    const int64_t i = target / chunks_per_row;
    source = checked_row(p, i) * chunks_per_row + (target - i * chunks_per_row);
  }
  const LoadedChunk chunk = load_chunk<kMean>(p.weight.packed, scales, source, target < num_chunks);
  fill_dequantize_smem(s, p.weight);
  decode_chunk<T, kMean>(s, chunk, target, num_chunks, static_cast<T*>(p.out));
}

// Any K, one weight per thread and step.
template <class T>
__global__ void __launch_bounds__(256) embedding_4bit_any(Embedding4bitParams p, Scales scales) {
  const int64_t K = p.weight.K;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  for (int64_t target = begin; target < p.M * K; target += stride) {
    const int64_t i = target / K;
    const int64_t source = checked_row(p, i) * K + (target - i * K);
    static_cast<T*>(p.out)[target] =
        from_float<T>(decode_weight(p.weight.packed, scales, p.weight.values, source));
  }
}

}  // namespace qlora_ext
