// A 16-bit codebook table is multiplied by this factor before it is rounded, and the scales are
// divided by it. Host code.
//
// A product with a rounded table makes the same error in every weight of one code. With factor 1
// bf16 NF4 has a mean error of 4.6e-4 of the weights' RMS, which adds up if x has a mean: for
// x = |N(0, 1)| and K = 4096 the error is 2.3e-2, against 3.0e-3 for weights that are dequantized
// to bf16 one by one. Levels times 1.19 happen to lie near bf16 numbers and their errors cancel:
// the error is 1.2e-3. (Measured on 2026-11-24 in fp64 on a CPU.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/format.cuh"

namespace qlora_ext {

// The share of each code among normally distributed weights of deviation `sigma`, relative to their
// block's scale: the probability between the midpoints to its neighbours.
inline void code_shares(const float* values, double sigma, double* shares) {
  int order[16];
  for (int i = 0; i < 16; ++i) order[i] = i;
  std::sort(order, order + 16, [&](int a, int b) { return values[a] < values[b]; });
  double below = 0;  // the distribution function at the lower border of the cell
  for (int i = 0; i < 16; ++i) {
    const double border =
        i == 15 ? INFINITY : (static_cast<double>(values[order[i]]) + values[order[i + 1]]) / 2;
    const double up_to = i == 15 ? 1.0 : 0.5 * std::erfc(-border / (sigma * std::sqrt(2.0)));
    shares[order[i]] = up_to - below;
    below = up_to;
  }
}

// Deviation of normally distributed weights, relative to the median of the largest magnitude among
// n of them.
inline double relative_deviation(double n) {
  double low = 0.1, high = 10;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (n * std::log(std::erf(middle / std::sqrt(2.0))) < std::log(0.5) ? low : high) = middle;
  }
  return 1 / low;
}

template <class T>
float rounded(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__float2half_rn(v));
  } else {
    return __bfloat162float(__float2bfloat16_rn(v));
  }
}

// Tries 4096 factors that bring the largest value into [1, 2), so that any codebook fits fp16.
// (From 2^127 on into [2, 4), since the factor's reciprocal must be an fp32 number too.) Takes the
// one with the least RMS error + 64 * mean error. 64 is the root of a typical K, by which an error
// in the mean grows faster than a random one. Judges each factor by the worst of three widths of
// the weights' distribution, since real weights are only roughly normal.
template <class T>
float search_table_factor(const float* values, int64_t blocksize) {
  constexpr int kWidths = 3;
  const double sigma = relative_deviation(std::max<double>(static_cast<double>(blocksize), 2));
  float largest = 0;
  for (int code = 0; code < 16; ++code) largest = std::max(largest, std::fabs(values[code]));
  if (largest == 0) return 1;
  const float power = std::ldexp(1.0f, std::clamp(-std::ilogb(largest), -126, 126));
  double shares[kWidths][16];
  for (int w = 0; w < kWidths; ++w) {
    code_shares(values, sigma * largest * (0.75 + 0.25 * w), shares[w]);
  }
  float best = power;
  double best_cost = INFINITY;
  for (int i = 0; i < 4096; ++i) {
    const float factor = power * (1 + i / 4096.0f);
    double errors[16];
    bool fits = true;
    for (int code = 0; code < 16; ++code) {
      const float v = values[code] * factor;
      fits = fits && std::fabs(v) < 2;
      errors[code] = rounded<T>(v) / static_cast<double>(factor) - values[code];
    }
    if (!fits) break;
    double cost = 0;
    for (int w = 0; w < kWidths; ++w) {
      double mean = 0, square = 0, size = 0;
      for (int code = 0; code < 16; ++code) {
        mean += shares[w][code] * errors[code];
        square += shares[w][code] * errors[code] * errors[code];
        size += shares[w][code] * values[code] * values[code];
      }
      cost = std::max(cost, (std::sqrt(square) + 64 * std::fabs(mean)) / std::sqrt(size));
    }
    if (cost < best_cost) best_cost = cost, best = factor;
  }
  return best;
}

// The search takes about a millisecond, so each thread remembers the last few results. Models use
// one or two codebooks. The block size is rounded down to a power of two, at most 2^20, so that
// scales per tensor do not need an entry for each shape.
template <class T>
float table_factor(const float* values, int64_t blocksize) {
  struct Entry {
    float values[16];
    int shift = -1;
    float factor = 0;
  };
  const int shift = std::min(log2_floor(std::max<int64_t>(blocksize, 1)), 20);
  constexpr int kEntries = 8;
  static thread_local Entry entries[kEntries];
  static thread_local int next = 0;
  for (const Entry& entry : entries) {
    if (entry.shift == shift && std::memcmp(entry.values, values, sizeof(entry.values)) == 0) {
      return entry.factor;
    }
  }
  Entry& entry = entries[next];
  next = (next + 1) % kEntries;
  std::memcpy(entry.values, values, sizeof(entry.values));
  entry.shift = shift;
  entry.factor = search_table_factor<T>(values, int64_t{1} << shift);
  return entry.factor;
}

}  // namespace qlora_ext
