// reduce_parts: out[i] = scale * (part 0 + part 1 + ... in this order) + bias, rounded once.
// The second step of every product whose contraction is split over blocks. The order of the sum is
// fixed, so results are the same from run to run. With float atomics they would not be.
//
// Moves   4 B per part and element in (from L2, just written), the output once. Floor: a launch.
#pragma once

#include "cuda/tile.cuh"

namespace qlora_ext {

struct ReduceParts {
  const float* parts;  // [num_parts, rows, cols]
  int64_t num_parts;
  int64_t rows;
  int64_t cols;
  float scale;
  const void* bias;  // [cols], bias_dtype; or null
  DType bias_dtype;
  void* out;  // [rows, cols], out_dtype
  DType out_dtype;
};

static __global__ void __launch_bounds__(256) reduce_parts(ReduceParts p) {
  const int64_t count = p.rows * p.cols;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count; i += stride) {
    float sum = 0;
    for (int64_t part = 0; part < p.num_parts; ++part) sum += p.parts[part * count + i];
    sum *= p.scale;
    if (p.bias != nullptr) sum += load_as_float(p.bias, p.bias_dtype, i % p.cols);
    store_from_float(p.out, p.out_dtype, i, sum);
  }
}

inline const char* launch_reduce_parts(const ReduceParts& p, void* stream) {
  return launch_kernel<reduce_parts>(grid_blocks(ceil_div(p.rows * p.cols, 256)), 256, 0, stream,
                                     p);
}

}  // namespace qlora_ext
