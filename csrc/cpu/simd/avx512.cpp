// The decoders and the products with AVX-512 (F, BW, VL, VBMI: Ice Lake, Zen 4 and later).
//
// The 16 values of a codebook fit one register, so one permute decodes 16 weights, and one
// multishift puts the 16 codes of 8 bytes into their lanes. The rest comes from the AVX2 table.
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

#include "../half.h"
#include "../scales.h"
#include "simd.h"

#if defined(__clang__)
#pragma clang attribute push(                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx2,fma,f16c")
#endif

#include "blocks.h"

namespace qlora_ext::cpu {
namespace {

constexpr int64_t kLanes = 16;
static_assert(kLanes == kPanelWidth, "a panel's row is one vector");

// ---- codes and values ----

// Sixteen codes from eight bytes, in order, each in the low four bits of its lane. The bits above
// are not cleared, since `look_up` does not read them.
__m512i codes_of(const uint8_t* packed) {
  int64_t bytes;
  std::memcpy(&bytes, packed, sizeof(bytes));
  // The two lanes of 64-bit element j start at the bits of codes 2j (high nibble) and 2j + 1.
  const __m512i starts =
      _mm512_setr_epi64(4LL | 0LL << 32, 12LL | 8LL << 32, 20LL | 16LL << 32, 28LL | 24LL << 32,
                        36LL | 32LL << 32, 44LL | 40LL << 32, 52LL | 48LL << 32, 60LL | 56LL << 32);
  return _mm512_multishift_epi64_epi8(starts, _mm512_set1_epi64(bytes));
}

__m512 look_up(__m512 table, __m512i codes) { return _mm512_permutexvar_ps(codes, table); }

// The codebook scaled by a block: fp32 multiply, then fp32 add.
__m512 scaled_table(const PackedWeight& weight, int64_t block) {
  const __m512 scale = _mm512_set1_ps(block_scale(weight, block));
  const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(weight.values), scale);
  if (weight.mean == nullptr) return table;
  return _mm512_add_ps(table, _mm512_set1_ps(weight.mean[block]));
}

void decode_fp32(const PackedWeight& weight, int64_t first, int64_t n, float* out) {
  for_each_block(weight, first, n, [&](int64_t i, int64_t end, int64_t block) {
    const __m512 table = scaled_table(weight, block);
    const auto decode_one = [&](int64_t at) {
      const __m512i code = _mm512_set1_epi32(code_at(weight.packed, first + at));
      out[at] = _mm512_cvtss_f32(look_up(table, code));
    };
    for (; i < end && ((first + i) & 1) != 0; ++i) decode_one(i);
    for (; i + kLanes <= end; i += kLanes) {
      _mm512_storeu_ps(out + i, look_up(table, codes_of(weight.packed + ((first + i) >> 1))));
    }
    for (; i < end; ++i) decode_one(i);
  });
}

// ---- 16-bit outputs ----

// Round to nearest even; a NaN becomes 0x7fc0, as in bf16_from_float.
__m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, is_nan, 0x7fc0));
}

__m256i to_half(__m512 v, DType dtype) {
  if (dtype == DType::kBFloat16) return to_bf16(v);
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 32 codes from 16 bytes, each in the low bits of a 16-bit lane.
__m512i half_codes_of(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  // Two bytes (four codes) in each 64-bit element.
  const __m512i starts = _mm512_set1_epi64(4LL | 0LL << 16 | 12LL << 32 | 8LL << 48);
  return _mm512_multishift_epi64_epi8(starts, _mm512_cvtepu16_epi64(bytes));
}

void decode_halves(const PackedWeight& weight, int64_t first, int64_t n, DType dtype,
                   uint16_t* out) {
  for_each_block(weight, first, n, [&](int64_t i, int64_t end, int64_t block) {
    const __m256i rounded = to_half(scaled_table(weight, block), dtype);
    const __m512i table = _mm512_broadcast_i64x4(rounded);
    const auto decode_one = [&](int64_t at) {
      const __m512i code =
          _mm512_set1_epi16(static_cast<short>(code_at(weight.packed, first + at)));
      const __m512i value = _mm512_permutexvar_epi16(code, table);
      out[at] = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(value)));
    };
    for (; i < end && ((first + i) & 1) != 0; ++i) decode_one(i);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const __m512i codes = half_codes_of(weight.packed + ((first + i) >> 1));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(codes, table));
    }
    for (; i < end; ++i) decode_one(i);
  });
}

void decode(const PackedWeight& weight, int64_t first, int64_t n, DType dtype, void* out) {
  if (dtype == DType::kFloat32) return decode_fp32(weight, first, n, static_cast<float*>(out));
  return decode_halves(weight, first, n, dtype, static_cast<uint16_t*>(out));
}

// ---- panels ----

// bytes[i] = bytes 4i ... 4i + 3 of each of sixteen rows, one row per lane: 32 codes of each row.
void load_rows(const uint8_t* packed, int64_t row_bytes, __m512i bytes[4]) {
  // Row r goes into 128-bit part r / 4 of quarter r % 4, so that the lanes end up in order.
  const auto quarter = [&](int64_t row) {
    const auto part = [&](int64_t i) {
      const uint8_t* at = packed + (row + 4 * i) * row_bytes;
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    };
    const __m256i lower = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
    const __m256i upper = _mm256_inserti128_si256(_mm256_castsi128_si256(part(2)), part(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
  };
  const __m512i r0 = quarter(0), r1 = quarter(1), r2 = quarter(2), r3 = quarter(3);
  const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
  bytes[0] = _mm512_unpacklo_epi64(low01, low23);
  bytes[1] = _mm512_unpackhi_epi64(low01, low23);
  bytes[2] = _mm512_unpacklo_epi64(high01, high23);
  bytes[3] = _mm512_unpackhi_epi64(high01, high23);
}

// panel[i] = the values of the i-th of eight codes of sixteen rows. Even elements are high nibbles.
template <bool kMean>
void decode_eight(__m512i bytes, __m512 table, __m512 scale, __m512 mean, float* panel) {
  const auto put = [&](int64_t i, __m512i codes) {
    __m512 value = _mm512_mul_ps(look_up(table, codes), scale);
    if (kMean) value = _mm512_add_ps(value, mean);
    _mm512_store_ps(panel + i * kPanelWidth, value);
  };
  put(0, _mm512_srli_epi32(bytes, 4));
  put(1, bytes);
  put(2, _mm512_srli_epi32(bytes, 12));
  put(3, _mm512_srli_epi32(bytes, 8));
  put(4, _mm512_srli_epi32(bytes, 20));
  put(5, _mm512_srli_epi32(bytes, 16));
  put(6, _mm512_srli_epi32(bytes, 28));
  put(7, _mm512_srli_epi32(bytes, 24));
}

// Sixteen rows. Rows and blocks must be multiples of 8 elements, the depth a multiple of 32.
// Transposes the packed bytes; then a shift moves each row's next code into place.
template <bool kMean>
void decode_sixteen_columns(const PackedWeight& weight, int64_t row, int64_t k, int64_t depth,
                            float* panel) {
  const __m512 table = _mm512_loadu_ps(weight.values);
  const uint8_t* packed = weight.packed + (row * weight.K + k) / 2;
  const RowScales<kLanes> scales(weight, row, k, depth);
  int64_t stretch = 0;
  for (int64_t d = 0; d < depth; d += 32) {
    if (d % kLineCodes == 0) prefetch_rows(packed + (d + kDepth) / 2, weight.K / 2, kLanes);
    __m512i bytes[4];
    load_rows(packed + d / 2, weight.K / 2, bytes);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      if (d + 8 * i >= scales.end[stretch]) ++stretch;
      const __m512 scale = _mm512_load_ps(scales.scale[stretch]);
      const __m512 mean = kMean ? _mm512_load_ps(scales.mean[stretch]) : _mm512_setzero_ps();
      decode_eight<kMean>(bytes[i], table, scale, mean, panel + (d + 8 * i) * kPanelWidth);
    }
  }
}

void decode_columns(const PackedWeight& weight, int64_t row, int64_t k, int64_t width,
                    int64_t depth, float* panel) {
  const bool regular =
      width == kPanelWidth && depth % 32 == 0 && (weight.K | weight.blocksize | k) % 8 == 0;
  if (!regular) return kAvx2Kernels.decode_columns(weight, row, k, width, depth, panel);
  if (weight.mean == nullptr) return decode_sixteen_columns<false>(weight, row, k, depth, panel);
  return decode_sixteen_columns<true>(weight, row, k, depth, panel);
}

void decode_rows(const PackedWeight& weight, int64_t row, int64_t k, int64_t width, int64_t depth,
                 float* panel) {
  const bool regular = width == kPanelWidth && (weight.K | weight.blocksize | k) % 16 == 0;
  if (!regular) return kAvx2Kernels.decode_rows(weight, row, k, width, depth, panel);
  const __m512 table = _mm512_loadu_ps(weight.values);
  int64_t first = row * weight.K + k;
  for (int64_t d = 0; d < depth; ++d, first += weight.K, panel += kPanelWidth) {
    prefetch(weight.packed + (first + kPrefetchRows * weight.K) / 2);
    const int64_t block = block_of(weight, first);
    const __m512 scale = _mm512_set1_ps(block_scale(weight, block));
    __m512 value = _mm512_mul_ps(look_up(table, codes_of(weight.packed + first / 2)), scale);
    if (weight.mean != nullptr) {
      value = _mm512_add_ps(value, _mm512_set1_ps(weight.mean[block]));
    }
    _mm512_store_ps(panel, value);
  }
}

// ---- products ----

// The vector operations that dot_any (blocks.h) needs.
struct Avx512 {
  static constexpr int64_t kLanes = 16;
  using Vector = __m512;
  using Table = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* src) { return _mm512_loadu_ps(src); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vector a, Vector b) { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
  static Table scaled_table(const PackedWeight& weight, int64_t block) {
    return cpu::scaled_table(weight, block);
  }
  static Vector decode(Table table, const uint8_t* packed) {
    return look_up(table, codes_of(packed));
  }
  static float value_of(Table table, int code) {
    return _mm512_cvtss_f32(look_up(table, _mm512_set1_epi32(code)));
  }
};

// Two groups (64 bytes) are decoded together: a shift moves each 32-bit lane's next code into
// place. After shift i, lane l has element 8 * l + (i ^ 1), since even elements are high nibbles.
constexpr int64_t kPair = 2 * kGroup;

// x in that order: arranged[16 * i + l] = x[8 * l + (i ^ 1)].
void arrange_pair(const float* x, float* arranged) {
  // Lane 4 * i + l takes element 8 * l + i of 32, for i and l from 0 to 3.
  const __m512i firsts =
      _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i seconds = _mm512_add_epi32(firsts, _mm512_set1_epi32(4));
#pragma GCC unroll 2
  for (int64_t half = 0; half < 2; ++half) {
    const __m512i index = half == 0 ? firsts : seconds;
    const auto quarter = [&](int64_t q) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(x + 32 * q), index,
                                    _mm512_loadu_ps(x + 32 * q + 16));
    };
    const __m512 q0 = quarter(0), q1 = quarter(1), q2 = quarter(2), q3 = quarter(3);
    const __m512 low01 = _mm512_shuffle_f32x4(q0, q1, 0x44);
    const __m512 low23 = _mm512_shuffle_f32x4(q2, q3, 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(q0, q1, 0xee);
    const __m512 high23 = _mm512_shuffle_f32x4(q2, q3, 0xee);
    float* const out = arranged + half * 4 * kLanes;
    _mm512_store_ps(out + 1 * kLanes, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_store_ps(out + 0 * kLanes, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_store_ps(out + 3 * kLanes, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_store_ps(out + 2 * kLanes, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}

// total[m] += x[m] . W for the two groups in `bytes`; x is arranged, [kRows][kPair].
template <int kRows>
void add_pair(__m512i bytes, __m512 table, const float scales[2], const float* x,
              __m512 total[kRows]) {
  const __m512 lower = _mm512_set1_ps(scales[0]);
  const __m512 scale = _mm512_mask_mov_ps(lower, 0xff00, _mm512_set1_ps(scales[1]));
  __m512 sum[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 value = look_up(table, _mm512_srli_epi32(bytes, 4 * i));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m512 left = _mm512_load_ps(x + m * kPair + i * kLanes);
      sum[m][i % 2] =
          i < 2 ? _mm512_mul_ps(left, value) : _mm512_fmadd_ps(left, value, sum[m][i % 2]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    total[m] = _mm512_fmadd_ps(_mm512_add_ps(sum[m][0], sum[m][1]), scale, total[m]);
  }
}

// One row of W times kRows rows of x, which is arranged as [depth / kPair][kRows][kPair]. A group
// of zeros pads an odd number of groups.
template <int kRows>
void dot_groups(__m512 table, const uint8_t* packed, const float* scales, int64_t ahead,
                int64_t depth, const float* x, float* sums) {
  __m512 total[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) total[m] = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + kPair <= depth; d += kPair) {
    prefetch(packed + d / 2 + ahead);
    const __m512i bytes = _mm512_loadu_si512(packed + d / 2);
    add_pair<kRows>(bytes, table, scales + d / kGroup, x + d * kRows, total);
  }
  if (d < depth) {
    const __m256i* last = reinterpret_cast<const __m256i*>(packed + d / 2);
    const __m512i bytes = _mm512_zextsi256_si512(_mm256_loadu_si256(last));
    add_pair<kRows>(bytes, table, scales + d / kGroup, x + d * kRows, total);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) sums[m] += _mm512_reduce_add_ps(total[m]);
}

template <int kRows>
void dot_rows(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
              const float* x, int64_t x_stride, float (*sums)[kMaxDotRows]) {
  if (!has_groups(weight, k, depth)) {
    return dot_any<Avx512, kRows>(weight, row, rows, k, depth, x, x_stride, sums);
  }
  alignas(64) float arranged[kMaxDotElements + kMaxDotRows * kGroup];
  for (int m = 0; m < kRows; ++m) {
    const float* left = x + m * x_stride;
    float* out = arranged + m * kPair;
    int64_t d = 0;
    for (; d + kPair <= depth; d += kPair) arrange_pair(left + d, out + d * kRows);
    if (d == depth) continue;
    float last[kPair] = {};
    std::copy_n(left + d, kGroup, last);
    arrange_pair(last, out + d * kRows);
  }
  const __m512 table = _mm512_loadu_ps(weight.values);
  float scales[kMaxDotElements / kGroup + 1];
  scales[depth / kGroup] = 0.0f;  // of the padding
  const int64_t ahead = prefetch_distance(weight, depth);
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t first = (row + n) * weight.K + k;
    group_scales(weight, first, depth / kGroup, scales);
    dot_groups<kRows>(table, weight.packed + first / 2, scales, ahead, depth, arranged, sums[n]);
  }
}

void dot(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
         const float* x, int64_t x_stride, int64_t M, float (*sums)[kMaxDotRows]) {
  with_count<kMaxDotRows>(
      M, [&](auto count) { dot_rows<count>(weight, row, rows, k, depth, x, x_stride, sums); });
}

// Keeps kRows x 16 sums in registers; x is broadcast from memory as an operand of the FMA. Eight
// rows hide the FMA's latency, and L1 can deliver the panel once per eight rows.
template <int kRows>
void multiply_rows(const float* x, int64_t row_stride, int64_t depth_stride, const float* panel,
                   int64_t depth, float* acc) {
  __m512 sum[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) sum[m] = _mm512_loadu_ps(acc + m * kPanelWidth);
  for (int64_t d = 0; d < depth; ++d) {
    const __m512 right = _mm512_loadu_ps(panel + d * kPanelWidth);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m512 left = _mm512_set1_ps(x[m * row_stride + d * depth_stride]);
      sum[m] = _mm512_fmadd_ps(left, right, sum[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(acc + m * kPanelWidth, sum[m]);
}

// acc[2][rows][kPanelWidth] += x [kRows, depth] * panels [2][depth][kPanelWidth]: each element of x
// that is loaded serves two vectors.
template <int kRows>
void multiply_rows_two(const float* x, int64_t row_stride, int64_t depth_stride,
                       const float* panels, int64_t depth, int64_t rows, float* acc) {
  __m512 sum[2][kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    sum[0][m] = _mm512_loadu_ps(acc + m * kPanelWidth);
    sum[1][m] = _mm512_loadu_ps(acc + (rows + m) * kPanelWidth);
  }
  for (int64_t d = 0; d < depth; ++d) {
    const __m512 right0 = _mm512_loadu_ps(panels + d * kPanelWidth);
    const __m512 right1 = _mm512_loadu_ps(panels + (depth + d) * kPanelWidth);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m512 left = _mm512_set1_ps(x[m * row_stride + d * depth_stride]);
      sum[0][m] = _mm512_fmadd_ps(left, right0, sum[0][m]);
      sum[1][m] = _mm512_fmadd_ps(left, right1, sum[1][m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    _mm512_storeu_ps(acc + m * kPanelWidth, sum[0][m]);
    _mm512_storeu_ps(acc + (rows + m) * kPanelWidth, sum[1][m]);
  }
}

void multiply_two(const float* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
                  const float* panels, int64_t depth, float* acc) {
  for_each_row_tile<8>(rows, [&](auto count, int64_t row) {
    multiply_rows_two<count>(x + row * row_stride, row_stride, depth_stride, panels, depth, rows,
                             acc + row * kPanelWidth);
  });
}

void multiply(const float* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
              const float* panel, int64_t depth, float* acc) {
  for_each_row_tile<8>(rows, [&](auto count, int64_t row) {
    multiply_rows<count>(x + row * row_stride, row_stride, depth_stride, panel, depth,
                         acc + row * kPanelWidth);
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
Kernels avx512_kernels() {
  Kernels table = kAvx2Kernels;
  table.name = "avx512";
  table.decode = decode;
  table.decode_columns = decode_columns;
  table.decode_rows = decode_rows;
  table.dot = dot;
  table.multiply = multiply;
  table.multiply_two = multiply_two;
  return table;
}

}  // namespace qlora_ext::cpu

#endif  // __x86_64__
