// Shared by the files of the x86 instruction sets: they walk the blocks of a 4-bit weight, prefetch
// it and choose a loop for a number of rows. Each file has its own decoders.
//
// Include this below the target pragma, so that loop bodies inline into these functions. That is
// why everything here has internal linkage: one copy per instruction set. This file includes
// nothing, because a header's inline functions would be compiled for this instruction set, and the
// linker might then use them on a CPU without it. Include these above the pragma:
// <immintrin.h>, <algorithm>, <type_traits>, "../scales.h" and "simd.h".
#pragma once

namespace qlora_ext::cpu {
namespace {

inline int64_t block_of(const PackedWeight& weight, int64_t index) {
  const int64_t blocksize = weight.blocksize;
  if (index < blocksize) return 0;
  if ((blocksize & (blocksize - 1)) == 0) return index >> __builtin_ctzll(blocksize);
  return index / blocksize;
}

// Calls run(at, end, block) for the stretches of [first, first + n) that share a block: elements
// first + at ... first + end - 1.
template <class Run>
inline void for_each_block(const PackedWeight& weight, int64_t first, int64_t n, const Run& run) {
  int64_t block = block_of(weight, first);
  for (int64_t at = 0; at < n; ++block) {
    const int64_t end = std::min(n, (block + 1) * weight.blocksize - first);
    run(at, end, block);
    at = end;
  }
}

// If rows and blocks are multiples of this many elements, a group shares one scale: `dot` then
// decodes it with the unscaled codebook and scales the sum.
constexpr int64_t kGroup = 64;

inline bool has_groups(const PackedWeight& weight, int64_t k, int64_t depth) {
  return weight.mean == nullptr && (weight.K | weight.blocksize | k | depth) % kGroup == 0;
}

// scale[g] = the scale of elements [first + g * kGroup, first + (g + 1) * kGroup).
inline void group_scales(const PackedWeight& weight, int64_t first, int64_t groups, float* scale) {
  if (weight.blocksize != kGroup || weight.absmax != nullptr) {
    for (int64_t g = 0; g < groups; ++g) {
      scale[g] = block_scale(weight, block_of(weight, first + g * kGroup));
    }
    return;
  }
  const int64_t block = first / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    scale[g] = nested_scale(weight.absmax_code[block + g], weight.nested, block + g);
  }
}

// ---- prefetching ----

// How far ahead of the codes in use to prefetch. The hardware's prefetcher stops at every page.
constexpr int64_t kPrefetch = 1024;    // bytes along a row
constexpr int64_t kPrefetchRows = 16;  // rows down a column

constexpr int64_t kLineCodes = 128;  // codes of a cache line

inline void prefetch(const uint8_t* packed) {
  _mm_prefetch(reinterpret_cast<const char*>(packed), _MM_HINT_T0);
}

// Prefetches the next panel. A panel reads two cache lines of each row, too few to start the
// hardware's prefetcher.
inline void prefetch_rows(const uint8_t* packed, int64_t row_bytes, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) prefetch(packed + row * row_bytes);
}

// How many bytes ahead of the codes in use `dot` prefetches: along the row, or the same part of a
// later row if it reads only a part of each.
inline int64_t prefetch_distance(const PackedWeight& weight, int64_t depth) {
  return depth == weight.K ? kPrefetch : 4 * weight.K / 2;
}

// ---- panels ----

// The scales (and means) of kLanes rows, one per lane, for each stretch of a panel's depth in which
// no row enters its next block. All are stored before the first vector load, because a load right
// after its kLanes stores waits for the last of them.
template <int64_t kLanes>
struct RowScales {
  alignas(kLanes * sizeof(float)) float scale[kDepth / 8][kLanes];
  alignas(kLanes * sizeof(float)) float mean[kDepth / 8][kLanes];
  int64_t end[kDepth / 8];

  RowScales(const PackedWeight& weight, int64_t row, int64_t k, int64_t depth) {
    for (int64_t d = 0, stretch = 0; d < depth; d = end[stretch++]) {
      int64_t count = weight.blocksize;
      int64_t index = row * weight.K + k + d;
      for (int64_t lane = 0; lane < kLanes; ++lane, index += weight.K) {
        const int64_t block = block_of(weight, index);
        scale[stretch][lane] = block_scale(weight, block);
        if (weight.mean != nullptr) mean[stretch][lane] = weight.mean[block];
        count = std::min(count, (block + 1) * weight.blocksize - index);
      }
      end[stretch] = d + count;
    }
  }
};

// ---- products ----

// Calls f(std::integral_constant<int, count>) if `count` is 1 to kMost, else does nothing.
template <int kMost, class F>
inline void with_count(int64_t count, const F& f) {
  if constexpr (kMost > 0) {
    if (count == kMost) return f(std::integral_constant<int, kMost>{});
    with_count<kMost - 1>(count, f);
  }
}

// Calls f(std::integral_constant<int, rows of the tile>, first row) for tiles of kTile rows, then
// for the remaining rows.
template <int kTile, class F>
inline void for_each_row_tile(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + kTile <= rows; row += kTile) f(std::integral_constant<int, kTile>{}, row);
  with_count<kTile - 1>(rows - row, [&](auto count) { f(count, row); });
}

// One row of W, of any shape, times kRows rows of x, block by block, each with its scaled codebook.
// `Simd` has an instruction set's vector types and operations.
template <class Simd, int kRows>
inline void dot_any_row(const PackedWeight& weight, int64_t first, int64_t n, const float* x,
                        int64_t x_stride, float* sums) {
  constexpr int64_t kLanes = Simd::kLanes;
  typename Simd::Vector acc[kRows][2];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = Simd::zero();
  for_each_block(weight, first, n, [&](int64_t i, int64_t end, int64_t block) {
    const typename Simd::Table table = Simd::scaled_table(weight, block);
    const auto add_one = [&](int64_t at) {
      const float w = Simd::value_of(table, code_at(weight.packed, first + at));
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) sums[m] += x[m * x_stride + at] * w;
    };
    if (i < end && ((first + i) & 1) != 0) add_one(i++);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const uint8_t* packed = weight.packed + ((first + i) >> 1);
      prefetch(packed + kPrefetch);
      const typename Simd::Vector w0 = Simd::decode(table, packed);
      const typename Simd::Vector w1 = Simd::decode(table, packed + kLanes / 2);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const float* row = x + m * x_stride + i;
        acc[m][0] = Simd::multiply_add(Simd::load(row), w0, acc[m][0]);
        acc[m][1] = Simd::multiply_add(Simd::load(row + kLanes), w1, acc[m][1]);
      }
    }
    for (; i < end; ++i) add_one(i);
  });
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) sums[m] += Simd::sum(acc[m][0], acc[m][1]);
}

// `dot` for any shape: columns [k, k + depth) of `rows` rows of W, times kRows rows of x.
template <class Simd, int kRows>
inline void dot_any(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
                    const float* x, int64_t x_stride, float (*sums)[kMaxDotRows]) {
  for (int64_t n = 0; n < rows; ++n) {
    dot_any_row<Simd, kRows>(weight, (row + n) * weight.K + k, depth, x, x_stride, sums[n]);
  }
}

}  // namespace
}  // namespace qlora_ext::cpu
