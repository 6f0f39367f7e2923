// Weights -> 4-bit codes and one scale per block.
//
// Reads the weight once (twice for blocks larger than kChunk), writes half a byte per weight and
// 4 bytes per block. Computes a block's statistics and its codes while it is in L1.
#include <cmath>

#include "half.h"
#include "parallel.h"
#include "simd/simd.h"
#include "tree_sum.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kChunk = 4096;  // weights converted to fp32 at a time; the largest block size
constexpr int64_t kMaxBlocks = kChunk / 32;  // blocks of the smallest size in a chunk
constexpr int64_t kGrain = 32768;            // weights worth waking a thread for

struct Statistics {
  float scale;
  float mean;
};

// Zero if the reciprocal is not finite. Every weight of the block then gets the code of zero.
float inverse_or_zero(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

Normalizer normalizer_of(const Quantize4bitParams& p, const Statistics& statistics) {
  const bool standard = p.normalization == Normalization::kStandard;
  return {.mean = standard ? statistics.mean : 0.0f,
          .inverse_scale = inverse_or_zero(statistics.scale),
          .clip = standard};
}

void store_statistics(const Quantize4bitParams& p, int64_t block, const Statistics& statistics) {
  p.absmax[block] = statistics.scale;
  if (p.normalization == Normalization::kStandard) p.mean[block] = statistics.mean;
}

// Weights [first, first + n) in fp32: in place, or converted into `buffer`.
const float* load(const Quantize4bitParams& p, int64_t first, int64_t n, float* buffer) {
  const void* weight = element(p.weight, p.dtype, first);
  if (p.dtype == DType::kFloat32) return static_cast<const float*>(weight);
  kernels().to_float(weight, p.dtype, n, buffer);
  return buffer;
}

// *lowest = min(*lowest, index), atomically: the order of the threads does not matter.
void report_bad_index(int64_t index, int64_t* lowest) {
  int64_t seen = __atomic_load_n(lowest, __ATOMIC_RELAXED);
  while (index < seen && !__atomic_compare_exchange_n(lowest, &seen, index, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

// Reports the first NaN or Inf of a block, which starts at flat index `first`; `largest` is its
// max |w|.
void check_finite(const Quantize4bitParams& p, const float* w, int64_t first, float largest) {
  if (std::isfinite(largest)) return;
  int64_t i = 0;
  while (std::isfinite(w[i])) ++i;
  report_bad_index(first + i, p.bad_index);
}

double square(double x) { return x * x; }

Statistics standard_statistics(const Quantize4bitParams& p, double sum, double sum_of_squares,
                               int64_t n) {
  const double deviation = std::sqrt(sum_of_squares / static_cast<double>(n));
  return {.scale = static_cast<float>(p.std_factor * deviation),
          .mean = static_cast<float>(sum / static_cast<double>(n))};
}

// Statistics of a block that is already in fp32.
Statistics block_statistics(const Quantize4bitParams& p, const float* w, int64_t n, float largest) {
  if (p.normalization == Normalization::kAbsmax) return {.scale = largest, .mean = 0.0f};
  if (p.normalization == Normalization::kNone) return {.scale = 1.0f, .mean = 0.0f};
  const double sum = tree_sum_chunk(
      0, n, [&](int64_t at, int64_t count, double* out) { std::copy_n(w + at, count, out); });
  const double mean = static_cast<float>(sum / static_cast<double>(n));
  const double squares = tree_sum_chunk(0, n, [&](int64_t at, int64_t count, double* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = square(w[at + i] - mean);
  });
  return standard_statistics(p, sum, squares, n);
}

// Quantizes whole blocks, at most kChunk weights, so that they stay in L1 from statistics to codes.
void quantize_blocks(const Quantize4bitParams& p, int64_t first_block, int64_t num_blocks) {
  alignas(64) float buffer[kChunk];
  float largest[kMaxBlocks];
  Normalizer normalizers[kMaxBlocks];
  const int64_t first = first_block * p.blocksize;
  const int64_t n = std::min(num_blocks * p.blocksize, p.numel - first);
  const float* w = load(p, first, n, buffer);
  kernels().max_abs(w, n, p.blocksize, largest);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t at = b * p.blocksize;
    check_finite(p, w + at, first + at, largest[b]);
    const Statistics statistics =
        block_statistics(p, w + at, std::min(p.blocksize, n - at), largest[b]);
    store_statistics(p, first_block + b, statistics);
    normalizers[b] = normalizer_of(p, statistics);
  }
  kernels().encode(w, n, p.blocksize, normalizers, p.codebook, p.packed + first / 2);
}

void quantize_small_blocks(const Quantize4bitParams& p) {
  const int64_t per_chunk = std::min(kMaxBlocks, std::max<int64_t>(1, kChunk / p.blocksize));
  const int64_t num_chunks = ceil_div(p.num_blocks, per_chunk);
  parallel_for(num_chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t block = chunk * per_chunk;
      quantize_blocks(p, block, std::min(per_chunk, p.num_blocks - block));
    }
  });
}

// Calls f(first, w, n) in parallel for chunks of [begin, end), in fp32.
template <class F>
void for_each_chunk(const Quantize4bitParams& p, int64_t begin, int64_t end, const F& f) {
  const int64_t num_chunks = ceil_div(end - begin, kChunk);
  parallel_for(num_chunks, kGrain / kChunk, [&](int64_t chunk_begin, int64_t chunk_end) {
    alignas(64) float buffer[kChunk];
    for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      const int64_t first = begin + chunk * kChunk;
      const int64_t n = std::min(kChunk, end - first);
      f(first, load(p, first, n, buffer), n);
    }
  });
}

// *largest = max(*largest, value), atomically. value >= 0, so its bits compare as an integer.
void raise(float value, uint32_t* largest) {
  const uint32_t bits = float_bits(value);
  uint32_t seen = __atomic_load_n(largest, __ATOMIC_RELAXED);
  while (bits > seen && !__atomic_compare_exchange_n(largest, &seen, bits, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

// Statistics of a block of any size, in parallel; `partial` is the tree sum's workspace.
Statistics wide_block_statistics(const Quantize4bitParams& p, int64_t begin, int64_t end,
                                 double* partial) {
  uint32_t largest_bits = 0;
  for_each_chunk(p, begin, end, [&](int64_t first, const float* w, int64_t n) {
    float largest;
    kernels().max_abs(w, n, n, &largest);
    check_finite(p, w, first, largest);
    raise(largest, &largest_bits);
  });
  if (p.normalization == Normalization::kAbsmax) {
    return {.scale = float_from_bits(largest_bits), .mean = 0.0f};
  }
  if (p.normalization == Normalization::kNone) return {.scale = 1.0f, .mean = 0.0f};

  const auto load_group = [&](int64_t at, int64_t count, double* out) {
    float buffer[kTreeGroup];
    std::copy_n(load(p, begin + at, count, buffer), count, out);
  };
  const int64_t n = end - begin;
  const double sum = parallel_tree_sum(n, partial, load_group);
  const double mean = static_cast<float>(sum / static_cast<double>(n));
  const double squares = parallel_tree_sum(n, partial, [&](int64_t at, int64_t count, double* out) {
    load_group(at, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] = square(out[i] - mean);
  });
  return standard_statistics(p, sum, squares, n);
}

// Blocks larger than kChunk, mostly one scale per tensor: one after another, each in parallel.
void quantize_wide_blocks(const Quantize4bitParams& p) {
  for (int64_t block = 0; block < p.num_blocks; ++block) {
    const int64_t begin = block * p.blocksize;
    const int64_t end = std::min(p.numel, begin + p.blocksize);
    const Statistics statistics =
        wide_block_statistics(p, begin, end, static_cast<double*>(p.workspace));
    store_statistics(p, block, statistics);
    const Normalizer normalizer = normalizer_of(p, statistics);
    for_each_chunk(p, begin, end, [&](int64_t first, const float* w, int64_t n) {
      kernels().encode(w, n, n, &normalizer, p.codebook, p.packed + first / 2);
    });
  }
}

}  // namespace
}  // namespace cpu

const char* launch::quantize_4bit(const Quantize4bitParams& p, void*) {
  if (const char* error = cpu::cpu_path_error()) return error;
  if (p.numel == 0) return nullptr;
  if (p.blocksize <= cpu::kChunk) {
    cpu::quantize_small_blocks(p);
  } else {
    cpu::quantize_wide_blocks(p);
  }
  return nullptr;
}

int64_t launch::workspace_quantize_4bit(const Quantize4bitParams& p) {
  const bool sums = p.normalization == Normalization::kStandard && p.blocksize > cpu::kChunk;
  return sums ? cpu::tree_sum_workspace(std::min(p.blocksize, p.numel)) : 0;
}

}  // namespace qlora_ext
