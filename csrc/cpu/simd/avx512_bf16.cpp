// Products of bf16 pairs with AVX512_BF16 (Zen 4, Cooper Lake, Sapphire Rapids): twice the
// arithmetic of fp32. The rest comes from the AVX-512 table.
//
// A 4-bit weight is decoded in fp32, as on every path, and then rounded to bf16, like the weight of
// a dense bf16 layer. x is already bf16, and sums are fp32. QLORA_EXT_CPU=avx512 keeps the weights
// in fp32.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// The undefined vectors in GCC 12's own headers trigger this warning (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../scales.h"
#include "simd.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif

#include "blocks.h"

namespace qlora_ext::cpu {
namespace {

// The conversion of two rows leaves the first in words 0-15 and the second in words 16-31.
alignas(64) constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                  21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                  11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// A panel's row is one fp32 vector; two rows make one vector of 16 bf16 pairs.
void pair_bf16(const float* panel, int64_t depth, uint16_t* pairs) {
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int64_t d = 0; d < depth; d += 2) {
    const __m512 even = _mm512_load_ps(panel + d * kPanelWidth);
    const __m512 odd = _mm512_load_ps(panel + (d + 1) * kPanelWidth);
    const __m512bh halves = _mm512_cvtne2ps_pbh(odd, even);
    __m512i words;
    std::memcpy(&words, &halves, sizeof(words));
    _mm512_store_si512(pairs + d * kPanelWidth, _mm512_permutexvar_epi16(interleave, words));
  }
}

__m512bh as_pairs(__m512i words) {
  __m512bh pairs;
  std::memcpy(&pairs, &words, sizeof(pairs));
  return pairs;
}

// Keeps kRows x 16 sums in registers. A pair of x is one 32-bit broadcast.
template <int kRows>
void multiply_rows(const uint16_t* x, int64_t row_stride, const uint16_t* pairs, int64_t depth,
                   float* acc) {
  __m512 sum[kRows];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) sum[m] = _mm512_loadu_ps(acc + m * kPanelWidth);
  for (int64_t d = 0; d < depth; d += 2) {
    const __m512bh right = as_pairs(_mm512_load_si512(pairs + d * kPanelWidth));
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      int32_t left;
      std::memcpy(&left, x + m * row_stride + d, sizeof(left));
      sum[m] = _mm512_dpbf16_ps(sum[m], as_pairs(_mm512_set1_epi32(left)), right);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(acc + m * kPanelWidth, sum[m]);
}

void multiply_bf16(const uint16_t* x, int64_t row_stride, int64_t rows, const uint16_t* pairs,
                   int64_t depth, float* acc) {
  for_each_row_tile<8>(rows, [&](auto count, int64_t row) {
    multiply_rows<count>(x + row * row_stride, row_stride, pairs, depth, acc + row * kPanelWidth);
  });
}

}  // namespace
}  // namespace qlora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qlora_ext::cpu {

// Outside the pragma, because it runs on every x86-64 CPU, before the CPU's features are checked.
Kernels avx512_bf16_kernels() {
  Kernels table = avx512_kernels();
  table.name = "avx512_bf16";
  table.pair_bf16 = pair_bf16;
  table.multiply_bf16 = multiply_bf16;
  return table;
}

}  // namespace qlora_ext::cpu

#endif  // __x86_64__
