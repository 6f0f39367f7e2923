// The canonical fp64 sum behind means and standard deviations. Values are zero-padded to a
// multiple of 256, and each group of 256 is summed by halving. The group sums are the next level's
// values, until one is left. Every backend adds in this order, so all get the same bits with any
// number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "parallel.h"

namespace qlora_ext::cpu {

constexpr int64_t kTreeGroup = 256;
constexpr int64_t kTreeChunk = kTreeGroup * kTreeGroup;  // values that one task sums

// Sums values[0..255] by halving; overwrites them.
inline double sum_group(double* values) {
  for (int64_t half = kTreeGroup / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

// Sums an array in place, level by level. n >= 1.
inline double tree_sum(double* values, int64_t n) {
  double group[kTreeGroup];
  do {
    const int64_t num_groups = ceil_div(n, kTreeGroup);
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t count = std::min(kTreeGroup, n - g * kTreeGroup);
      std::copy_n(values + g * kTreeGroup, count, group);
      std::fill(group + count, group + kTreeGroup, 0.0);
      values[g] = sum_group(group);
    }
    n = num_groups;
  } while (n > 1);
  return values[0];
}

// Sums at most kTreeChunk values. load(begin, count, out) writes `count` of them, from `begin` on.
// Once one value is left, further levels only add zeros, so chunks combine as the whole tree would.
template <class Load>
double tree_sum_chunk(int64_t begin, int64_t end, const Load& load) {
  double sums[kTreeGroup];
  sums[0] = 0.0;
  double group[kTreeGroup];
  int64_t num_groups = 0;
  for (int64_t at = begin; at < end; at += kTreeGroup) {
    const int64_t count = std::min(kTreeGroup, end - at);
    load(at, count, group);
    std::fill(group + count, group + kTreeGroup, 0.0);
    sums[num_groups++] = sum_group(group);
  }
  return tree_sum(sums, num_groups);
}

inline int64_t tree_sum_workspace(int64_t n) {
  return ceil_div(n, kTreeChunk) * static_cast<int64_t>(sizeof(double));
}

// Sums n >= 1 values in parallel; `partial` holds tree_sum_workspace(n) bytes.
template <class Load>
double parallel_tree_sum(int64_t n, double* partial, const Load& load) {
  const int64_t num_chunks = ceil_div(n, kTreeChunk);
  parallel_for(num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kTreeChunk;
      partial[chunk] = tree_sum_chunk(first, std::min(n, first + kTreeChunk), load);
    }
  });
  return tree_sum(partial, num_chunks);
}

}  // namespace qlora_ext::cpu
