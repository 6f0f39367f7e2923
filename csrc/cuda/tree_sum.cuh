// The format's one reduction for means: an fp64 sum whose order does not depend on the machine.
// Values are zero-padded to a multiple of 256; each group of 256 is summed by halving
// (v[i] += v[i + 128], then 64, ... 1); the group sums are the next level's values, until one is
// left. Last, 0.0 is added: as padding or, if every group is full, to turn -0.0 into 0.0, as all
// backends do. A warp sums a group: lane l holds values 8l .. 8l + 7, so the first halvings are
// shuffles and the last ones stay in registers.
//
// Moves   the input once; the levels above are 1/256 of it. Floor: bandwidth.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"

namespace qlora_ext {

constexpr int kTreeGroup = 256;

// The sum of a group of `width` values (a power of two from 32 to 256) in width / 8 lanes,
// zero-padded to 256. All of those lanes get it. The whole warp calls it.
__device__ __forceinline__ double tree_sum_group(double (&v)[8], int width) {
#pragma unroll 1  // unrolled, it takes more registers than a block of 512 threads has
  for (int half = 128; half >= 8; half /= 2) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const double other = __shfl_down_sync(0xffffffffu, v[j], half / 8);
      v[j] = __dadd_rn(v[j], half < width ? other : 0.0);
    }
  }
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) v[j] = __dadd_rn(v[j], v[j + half]);
  }
  return __shfl_sync(0xffffffffu, v[0], 0, width / 8);
}

template <class T>
__device__ __forceinline__ double to_double(T v) {
  return static_cast<double>(to_float(v));
}
__device__ __forceinline__ double to_double(double v) { return v; }

// What is summed: x, or (x - mean)^2 in fp64 if there is a mean.
template <class T>
struct TreeValues {
  const T* x;         // [n]
  const float* mean;  // one element; or null
  int64_t n;

  __device__ __forceinline__ double at(int64_t i) const {
    if (i >= n) return 0.0;
    const double value = to_double(x[i]);
    if (mean == nullptr) return value;
    const double deviation = __dsub_rn(value, static_cast<double>(*mean));
    return __dmul_rn(deviation, deviation);
  }

  // Sums group g; the whole warp calls it.
  __device__ __forceinline__ double group(int64_t g) const {
    double v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = at(g * kTreeGroup + threadIdx.x % 32 * 8 + j);
    return tree_sum_group(v, kTreeGroup);
  }
};

constexpr int kTreeThreads = 256;

// One level: sums[g] = sum of group g, a warp for each.
template <class T>
__global__ void __launch_bounds__(kTreeThreads) tree_sum_level(TreeValues<T> values, double* sums) {
  const int64_t groups = (values.n + kTreeGroup - 1) / kTreeGroup;
  const int64_t g = static_cast<int64_t>(blockIdx.x) * (kTreeThreads / 32) + threadIdx.x / 32;
  if (g >= groups) return;  // whole warps return
  const double sum = values.group(g);
  if (threadIdx.x % 32 == 0) sums[g] = sum;
}

// Sums all the remaining levels in one block; the total goes to sums[0]. `sums` has room for
// tree_sum_doubles(n) values; each level's sums follow those of the level before.
template <class T>
__global__ void __launch_bounds__(kTreeThreads)
    tree_sum_finish(TreeValues<T> values, double* sums) {
  constexpr int kWarps = kTreeThreads / 32;
  const int warp = threadIdx.x / 32;
  int64_t n = (values.n + kTreeGroup - 1) / kTreeGroup;
  for (int64_t g = warp; g < n; g += kWarps) {
    const double sum = values.group(g);
    if (threadIdx.x % 32 == 0) sums[g] = sum;
  }
  __syncthreads();
  double* level = sums;
  while (n > 1) {
    const TreeValues<double> above{.x = level, .mean = nullptr, .n = n};
    double* next = level + n;
    n = (n + kTreeGroup - 1) / kTreeGroup;
    for (int64_t g = warp; g < n; g += kWarps) {
      const double sum = above.group(g);
      if (threadIdx.x % 32 == 0) next[g] = sum;
    }
    __syncthreads();
    level = next;
  }
  if (threadIdx.x == 0) sums[0] = __dadd_rn(level[0], 0.0);  // -0.0 becomes 0.0
}

// Doubles of scratch for a sum of n values, all levels.
inline int64_t tree_sum_doubles(int64_t n) {
  int64_t total = 0;
  do {
    n = ceil_div(n, kTreeGroup);
    total += n;
  } while (n > 1);
  return total;
}

// Above this many values the first levels get a grid of their own. One block sums 16384 values in
// 8 turns of its warps; estimated, not measured.
constexpr int64_t kTreeFinishLimit = 16384;

// Enqueues the sum of n >= 1 values; *total is where it will lie, inside `scratch`.
template <class T>
const char* launch_tree_sum(const TreeValues<T>& values, double* scratch, const double** total,
                            void* stream) {
  *total = scratch;
  if (values.n <= kTreeFinishLimit) {
    return launch_kernel<tree_sum_finish<T>>(1, kTreeThreads, 0, stream, values, scratch);
  }
  int64_t n = ceil_div(values.n, kTreeGroup);
  const unsigned warps = kTreeThreads / 32;
  if (const char* error = launch_kernel<tree_sum_level<T>>(
          grid_blocks(ceil_div(n, warps)), kTreeThreads, 0, stream, values, scratch)) {
    return error;
  }
  const TreeValues<double> sums{.x = scratch, .mean = nullptr, .n = n};
  return launch_tree_sum(sums, scratch + n, total, stream);
}

}  // namespace qlora_ext
