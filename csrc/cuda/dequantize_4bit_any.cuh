// dequantize_4bit_any: rows, or columns of rows, that start in the middle of a 16-byte chunk
// (odd K, K = 40, ...).
//
// Moves   the same bytes as dequantize_4bit_vector, one weight per thread and step.
// Bits    the same. A fallback: coalesced but narrow, several times the vector kernel's time.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"

namespace qlora_ext {

template <class T>
__global__ void __launch_bounds__(256)
    dequantize_4bit_any(PackedWeight w, Scales scales, ColumnRange range, T* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < range.count;
       i += stride) {
    out[i] = from_float<T>(decode_weight(w.packed, scales, w.values, range.source(i)));
  }
}

}  // namespace qlora_ext
