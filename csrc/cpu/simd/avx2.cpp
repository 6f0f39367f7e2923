// The inner kernels with AVX2, FMA and F16C: 8 weights to a vector.
//
// 4-bit codes become values in registers, never by a look-up in memory. Long runs of codes take
// byte shuffles of the codebook's four byte planes. Others take two 8-entry permutes and a blend
// on the code's top bit. Products use FMA. The quantizer and the decoder never do, because the
// format fixes their bits (the build passes -ffp-contract=off).
//
// Headers with external linkage are included before the target pragma. After it, their inline
// functions would be compiled for AVX2, and the linker might pick those for a CPU without it.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../half.h"
#include "../scales.h"
#include "simd.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "blocks.h"

namespace qlora_ext::cpu {
namespace {

constexpr int64_t kLanes = 8;

// ---- fp16 and bf16 ----

__m256 load_fp32(const float* src) { return _mm256_loadu_ps(src); }

__m128i load_8_halves(const uint16_t* src) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
}

__m256 load_fp16(const uint16_t* src) { return _mm256_cvtph_ps(load_8_halves(src)); }

__m256 load_bf16(const uint16_t* src) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_8_halves(src)), 16));
}

void store_fp32(float* dst, __m256 v) { _mm256_storeu_ps(dst, v); }

void store_16_halves(uint16_t* dst, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), v);
}

// 8 fp32 values rounded to bf16 (nearest even), one in each 32-bit lane; a NaN becomes 0x7fc0, as
// in bf16_from_float.
__m256i round_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}

// 16 fp32 values -> 16 values of 16 bits, in order.
__m256i to_bf16(__m256 low, __m256 high) {
  const __m256i halves = _mm256_packus_epi32(round_bf16(low), round_bf16(high));
  return _mm256_permute4x64_epi64(halves, 0xd8);  // the pack works within 128-bit halves
}

__m256i to_fp16(__m256 low, __m256 high) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(high, kNearest), _mm256_cvtps_ph(low, kNearest));
}

void to_float(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* half = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  switch (dtype) {
    case DType::kFloat32:
      if (n > 0) std::memcpy(dst, src, n * sizeof(float));
      return;
    case DType::kFloat16:
      for (; i + kLanes <= n; i += kLanes) store_fp32(dst + i, load_fp16(half + i));
      for (; i < n; ++i) dst[i] = fp16_to_float(half[i]);
      return;
    case DType::kBFloat16:
      for (; i + kLanes <= n; i += kLanes) store_fp32(dst + i, load_bf16(half + i));
      for (; i < n; ++i) dst[i] = bf16_to_float(half[i]);
      return;
  }
}

void from_float(const float* src, int64_t n, DType dtype, void* dst) {
  uint16_t* half = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  switch (dtype) {
    case DType::kFloat32:
      if (n > 0) std::memcpy(dst, src, n * sizeof(float));
      return;
    case DType::kFloat16:
      for (; i + 16 <= n; i += 16) {
        store_16_halves(half + i, to_fp16(load_fp32(src + i), load_fp32(src + i + kLanes)));
      }
      for (; i < n; ++i) half[i] = fp16_from_float(src[i]);
      return;
    case DType::kBFloat16:
      for (; i + 16 <= n; i += 16) {
        store_16_halves(half + i, to_bf16(load_fp32(src + i), load_fp32(src + i + kLanes)));
      }
      for (; i < n; ++i) half[i] = bf16_from_float(src[i]);
      return;
  }
}

// ---- the quantizer ----

// Magnitudes compare as integers, with Inf and NaN the largest, so one pass finds all three.
float max_abs_of(const float* x, int64_t n) {
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m256i bits = _mm256_castps_si256(load_fp32(x + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude_mask));
  }
  __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  uint32_t result = static_cast<uint32_t>(_mm_cvtsi128_si32(four));
  for (; i < n; ++i) result = std::max(result, float_bits(x[i]) & 0x7fffffffu);
  return float_from_bits(result);
}

void max_abs(const float* x, int64_t n, int64_t blocksize, float* largest) {
  for (int64_t first = 0; first < n; first += blocksize) {
    *largest++ = max_abs_of(x + first, std::min(blocksize, n - first));
  }
}

// The 15 thresholds as a search tree. A comparison yields -1 for true, so positions are negative:
// entry i of a level lies in lane (-i) mod 8. That saves a negation at each level.
struct Decision {
  __m256 root;           // t[7]
  __m256 second[2];      // t[3], t[11]
  __m256 third;          // t[1], t[5], t[9], t[13]
  __m256 fourth;         // t[0], t[2], ... t[14]
  __m128i code_of_rank;  // bytes; ranks 8 to 15 carry the sign of a sign-magnitude codebook
  bool sign_magnitude;

  explicit Decision(const Codebook& book) : sign_magnitude(book.sign_magnitude) {
    const float* t = book.thresholds;
    root = _mm256_set1_ps(t[7]);
    second[0] = _mm256_set1_ps(t[3]);
    second[1] = _mm256_set1_ps(t[11]);
    third = _mm256_setr_ps(t[1], 0, 0, 0, 0, t[13], t[9], t[5]);
    fourth = _mm256_setr_ps(t[0], t[14], t[12], t[10], t[8], t[6], t[4], t[2]);
    alignas(16) uint8_t codes[16];
    for (int rank = 0; rank < 16; ++rank) {
      codes[rank] = sign_magnitude && rank >= 8 ? book.order[rank - 8] | 8 : book.order[rank];
    }
    code_of_rank = _mm_load_si128(reinterpret_cast<const __m128i*>(codes));
  }
};

__m256i greater(__m256 a, __m256 b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }

// 2 * a + b.
__m256i descend(__m256i a, __m256i b) { return _mm256_add_epi32(_mm256_add_epi32(a, a), b); }

// -(number of thresholds below v), minus 8 for a negative v under sign-magnitude.
template <bool kSignMagnitude>
__m256i negative_rank(__m256 v, const Decision& decision) {
  const __m256 sign_bit = _mm256_set1_ps(-0.0f);
  const __m256 compared = kSignMagnitude ? _mm256_andnot_ps(sign_bit, v) : v;
  const __m256i above_root = greater(compared, decision.root);
  const __m256 second =
      _mm256_blendv_ps(decision.second[0], decision.second[1], _mm256_castsi256_ps(above_root));
  const __m256i at2 = descend(above_root, greater(compared, second));
  const __m256 third = _mm256_permutevar8x32_ps(decision.third, at2);
  const __m256i at3 = descend(at2, greater(compared, third));
  const __m256 fourth = _mm256_permutevar8x32_ps(decision.fourth, at3);
  const __m256i rank = descend(at3, greater(compared, fourth));
  if (!kSignMagnitude) return rank;
  const __m256i negative = greater(_mm256_setzero_ps(), v);
  return _mm256_add_epi32(rank, _mm256_slli_epi32(negative, 3));
}

__m256 normalize(__m256 w, const Normalizer& normalizer) {
  const __m256 centred = _mm256_sub_ps(w, _mm256_set1_ps(normalizer.mean));
  const __m256 v = _mm256_mul_ps(centred, _mm256_set1_ps(normalizer.inverse_scale));
  if (!normalizer.clip) return v;
  return _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-1.0f)), _mm256_set1_ps(1.0f));
}

// Four vectors of negative ranks -> 32 codes -> 16 bytes, high nibble first.
__m128i pack_codes(const __m256i ranks[4], const Decision& decision) {
  const __m256i pair01 = _mm256_packs_epi32(ranks[0], ranks[1]);
  const __m256i pair23 = _mm256_packs_epi32(ranks[2], ranks[3]);
  // The packs work within 128-bit halves: put the eight groups of four back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i shuffled = _mm256_packs_epi16(pair01, pair23);
  const __m256i in_order = _mm256_permutevar8x32_epi32(shuffled, order);
  const __m256i codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(decision.code_of_rank),
                                            _mm256_abs_epi8(in_order));
  const __m256i bytes = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
  return _mm_packus_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

template <bool kSignMagnitude>
void encode_32(const float* x, const Normalizer& normalizer, const Decision& decision,
               uint8_t* packed) {
  __m256i ranks[4];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m256 v = normalize(load_fp32(x + i * kLanes), normalizer);
    ranks[i] = negative_rank<kSignMagnitude>(v, decision);
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), pack_codes(ranks, decision));
}

template <bool kSignMagnitude>
void encode_block(const float* x, int64_t n, const Normalizer& normalizer, const Decision& decision,
                  uint8_t* packed) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    encode_32<kSignMagnitude>(x + i, normalizer, decision, packed + i / 2);
  }
  if (i == n) return;
  float rest[32] = {};
  uint8_t bytes[16];
  std::copy(x + i, x + n, rest);
  encode_32<kSignMagnitude>(rest, normalizer, decision, bytes);
  if (n & 1) bytes[(n - i) / 2] &= 0xf0;  // clears the unused nibble
  std::copy_n(bytes, (n - i + 1) / 2, packed + i / 2);
}

void encode(const float* x, int64_t n, int64_t blocksize, const Normalizer* normalizers,
            const Codebook& codebook, uint8_t* packed) {
  const Decision decision(codebook);
  for (int64_t first = 0; first < n; first += blocksize, ++normalizers) {
    const int64_t count = std::min(blocksize, n - first);
    if (decision.sign_magnitude) {
      encode_block<true>(x + first, count, *normalizers, decision, packed + first / 2);
    } else {
      encode_block<false>(x + first, count, *normalizers, decision, packed + first / 2);
    }
  }
}

// Bisection over the 255 thresholds of the dynamic map, 8 scales at a time.
void encode_scales(const float* absmax, int64_t n, float offset, float inverse_scale,
                   uint8_t* code) {
  const float* thresholds = kDynamicMapThresholds.values;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = std::min(kLanes, n - i);
    alignas(32) float scales[kLanes] = {};
    std::copy_n(absmax + i, count, scales);
    const __m256 v = _mm256_mul_ps(_mm256_sub_ps(load_fp32(scales), _mm256_set1_ps(offset)),
                                   _mm256_set1_ps(inverse_scale));
    __m256i at = _mm256_setzero_si256();
    for (int step = 128; step > 0; step /= 2) {
      const __m256 threshold = _mm256_i32gather_ps(thresholds + step - 1, at, 4);
      const __m256i below = greater(v, threshold);
      at = _mm256_add_epi32(at, _mm256_and_si256(below, _mm256_set1_epi32(step)));
    }
    alignas(32) int32_t codes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes), at);
    for (int64_t lane = 0; lane < count; ++lane) code[i + lane] = static_cast<uint8_t>(codes[lane]);
  }
}

// ---- the decoder ----

struct Table {
  __m256 low;   // values of codes 0 to 7
  __m256 high;  // values of codes 8 to 15

  explicit Table(const float values[16]) : low(load_fp32(values)), high(load_fp32(values + 8)) {}
};

// The codebook scaled by a block: fp32 multiply, then fp32 add.
Table scaled_table(const PackedWeight& weight, int64_t block) {
  Table table(weight.values);
  const __m256 scale = _mm256_set1_ps(block_scale(weight, block));
  table.low = _mm256_mul_ps(table.low, scale);
  table.high = _mm256_mul_ps(table.high, scale);
  if (weight.mean != nullptr) {
    const __m256 mean = _mm256_set1_ps(weight.mean[block]);
    table.low = _mm256_add_ps(table.low, mean);
    table.high = _mm256_add_ps(table.high, mean);
  }
  return table;
}

// Eight codes from four bytes, in order, each in the low four bits of its lane. The bits above are
// not cleared, since `look_up` does not read them.
__m256i codes_of(const uint8_t* packed) {
  int32_t bytes;
  std::memcpy(&bytes, packed, sizeof(bytes));
  return _mm256_srlv_epi32(_mm256_set1_epi32(bytes),
                           _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}

__m256 look_up(const Table& table, __m256i codes) {
  const __m256 low = _mm256_permutevar8x32_ps(table.low, codes);
  const __m256 high = _mm256_permutevar8x32_ps(table.high, codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

void decode_fp32(const PackedWeight& weight, int64_t first, int64_t n, float* out) {
  for_each_block(weight, first, n, [&](int64_t i, int64_t end, int64_t block) {
    const Table table = scaled_table(weight, block);
    alignas(32) float values[16];
    _mm256_store_ps(values, table.low);
    _mm256_store_ps(values + 8, table.high);
    for (; i < end && ((first + i) & 1) != 0; ++i)
      out[i] = values[code_at(weight.packed, first + i)];
    for (; i + kLanes <= end; i += kLanes) {
      store_fp32(out + i, look_up(table, codes_of(weight.packed + (first + i) / 2)));
    }
    for (; i < end; ++i) out[i] = values[code_at(weight.packed, first + i)];
  });
}

// A block's 16 values, rounded to 16 bits, as tables of their low and their high bytes.
struct HalfTable {
  __m256i values;
  __m256i low;
  __m256i high;

  HalfTable(const Table& table, DType dtype)
      : values(dtype == DType::kBFloat16 ? to_bf16(table.low, table.high)
                                         : to_fp16(table.low, table.high)) {
    const __m256i low_bytes = _mm256_and_si256(values, _mm256_set1_epi16(0x00ff));
    const __m256i packed = _mm256_packus_epi16(low_bytes, _mm256_srli_epi16(values, 8));
    low = _mm256_permute4x64_epi64(packed, 0x88);
    high = _mm256_permute4x64_epi64(packed, 0xdd);
  }
};

// 16 bytes -> 32 values of 16 bits: one byte shuffle for their low bytes, one for the high ones.
void decode_32_halves(const uint8_t* packed, const HalfTable& table, uint16_t* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m128i odd = _mm_and_si128(bytes, nibble);
  const __m256i codes =
      _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  const __m256i low = _mm256_shuffle_epi8(table.low, codes);
  const __m256i high = _mm256_shuffle_epi8(table.high, codes);
  const __m256i first = _mm256_unpacklo_epi8(low, high);   // values 0-7 and 16-23
  const __m256i second = _mm256_unpackhi_epi8(low, high);  // values 8-15 and 24-31
  __m256i* const dst = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(dst, _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256(dst + 1, _mm256_permute2x128_si256(first, second, 0x31));
}

void decode_halves(const PackedWeight& weight, int64_t first, int64_t n, DType dtype,
                   uint16_t* out) {
  for_each_block(weight, first, n, [&](int64_t i, int64_t end, int64_t block) {
    const HalfTable table(scaled_table(weight, block), dtype);
    const auto decode_one = [&](int64_t at) {
      alignas(32) uint16_t values[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(values), table.values);
      out[at] = values[code_at(weight.packed, first + at)];
    };
    for (; i < end && ((first + i) & 1) != 0; ++i) decode_one(i);
    for (; i + 32 <= end; i += 32) {
      decode_32_halves(weight.packed + (first + i) / 2, table, out + i);
    }
    for (; i < end; ++i) decode_one(i);
  });
}

void decode(const PackedWeight& weight, int64_t first, int64_t n, DType dtype, void* out) {
  if (dtype == DType::kFloat32) return decode_fp32(weight, first, n, static_cast<float*>(out));
  return decode_halves(weight, first, n, dtype, static_cast<uint16_t*>(out));
}

// The codebook in fp32 as four planes of bytes, the lowest first.
struct BytePlanes {
  __m256i plane[4];

  explicit BytePlanes(const float values[16]) {
    alignas(16) uint8_t bytes[4][16];
    for (int code = 0; code < 16; ++code) {
      for (int i = 0; i < 4; ++i) {
        bytes[i][code] = static_cast<uint8_t>(float_bits(values[code]) >> (8 * i));
      }
    }
    for (int i = 0; i < 4; ++i) {
      const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i]));
      plane[i] = _mm256_broadcastsi128_si256(half);
    }
  }
};

// Looks up 32 codes, one per byte. out[j] has the values of bytes 4j ... 4j + 3 of the lower 16
// codes, then those of the upper 16. A value costs 3/8 of a shuffle, counting the unpacks; with
// permutes of fp32 lanes and a blend it would cost 5/8 of such an instruction.
void look_up_32(const BytePlanes& planes, __m256i codes, __m256 out[4]) {
  const __m256i b0 = _mm256_shuffle_epi8(planes.plane[0], codes);
  const __m256i b1 = _mm256_shuffle_epi8(planes.plane[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(planes.plane[2], codes);
  const __m256i b3 = _mm256_shuffle_epi8(planes.plane[3], codes);
  const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
  const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// ---- panels ----

// dst[i * kPanelWidth + c] = src[c * stride + i] for i, c < 8.
void transpose_8x8(const float* src, int64_t stride, float* dst) {
  // A register holds four elements of row c and four of row c + 4.
  const auto halves = [&](int64_t c, int64_t at) {
    const __m128 upper = _mm_loadu_ps(src + (c + 4) * stride + at);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(src + c * stride + at)), upper,
                                1);
  };
#pragma GCC unroll 2
  for (int64_t at = 0; at < kLanes; at += 4) {
    const __m256 r0 = halves(0, at), r1 = halves(1, at), r2 = halves(2, at), r3 = halves(3, at);
    const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
    const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
    store_fp32(dst + (at + 0) * kPanelWidth, _mm256_shuffle_ps(low01, low23, 0x44));
    store_fp32(dst + (at + 1) * kPanelWidth, _mm256_shuffle_ps(low01, low23, 0xee));
    store_fp32(dst + (at + 2) * kPanelWidth, _mm256_shuffle_ps(high01, high23, 0x44));
    store_fp32(dst + (at + 3) * kPanelWidth, _mm256_shuffle_ps(high01, high23, 0xee));
  }
}

// panel[d][c] = src[c * stride + d] for fp32 rows.
void transpose_fp32(const float* src, int64_t stride, int64_t width, int64_t depth, float* panel) {
  int64_t d = 0;
  for (; width == kPanelWidth && d + kLanes <= depth; d += kLanes) {
    transpose_8x8(src + d, stride, panel + d * kPanelWidth);
    transpose_8x8(src + kLanes * stride + d, stride, panel + d * kPanelWidth + kLanes);
  }
  for (; d < depth; ++d) {
    for (int64_t c = 0; c < kPanelWidth; ++c) {
      panel[d * kPanelWidth + c] = c < width ? src[c * stride + d] : 0.0f;
    }
  }
}

constexpr int64_t kSlab = 64;  // depth that is converted, then transposed, at a time: 4 KB

void pack_columns(const void* src, DType dtype, int64_t stride, int64_t width, int64_t depth,
                  float* panel) {
  if (dtype == DType::kFloat32) {
    return transpose_fp32(static_cast<const float*>(src), stride, width, depth, panel);
  }
  alignas(32) float slab[kPanelWidth * kSlab];
  for (int64_t d = 0; d < depth; d += kSlab) {
    const int64_t count = std::min(kSlab, depth - d);
    for (int64_t c = 0; c < width; ++c) {
      to_float(element(src, dtype, c * stride + d), dtype, count, slab + c * kSlab);
    }
    transpose_fp32(slab, kSlab, width, count, panel + d * kPanelWidth);
  }
}

void pack_rows(const void* src, DType dtype, int64_t stride, int64_t width, int64_t depth,
               float* panel) {
  for (int64_t d = 0; d < depth; ++d, panel += kPanelWidth) {
    to_float(element(src, dtype, d * stride), dtype, width, panel);
    std::fill(panel + width, panel + kPanelWidth, 0.0f);
  }
}

// Any shape: decodes row by row, then transposes.
void decode_columns_any(const PackedWeight& weight, int64_t row, int64_t k, int64_t width,
                        int64_t depth, float* panel) {
  alignas(32) float slab[kPanelWidth * kSlab];
  for (int64_t d = 0; d < depth; d += kSlab) {
    const int64_t count = std::min(kSlab, depth - d);
    for (int64_t c = 0; c < width; ++c) {
      decode_fp32(weight, (row + c) * weight.K + k + d, count, slab + c * kSlab);
    }
    transpose_fp32(slab, kSlab, width, count, panel + d * kPanelWidth);
  }
}

// bytes[i] = bytes 4i ... 4i + 3 of each of eight rows, one row per lane: 64 codes of each row.
void load_rows(const uint8_t* packed, int64_t row_bytes, __m256i bytes[8]) {
  const auto halves = [&](int64_t row, int64_t at) {
    const __m128i* lower = reinterpret_cast<const __m128i*>(packed + row * row_bytes + at);
    const __m128i* upper = reinterpret_cast<const __m128i*>(packed + (row + 4) * row_bytes + at);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(lower)),
                                   _mm_loadu_si128(upper), 1);
  };
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i r0 = halves(0, half * 16), r1 = halves(1, half * 16);
    const __m256i r2 = halves(2, half * 16), r3 = halves(3, half * 16);
    const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
    const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
    bytes[half * 4 + 0] = _mm256_unpacklo_epi64(low01, low23);
    bytes[half * 4 + 1] = _mm256_unpackhi_epi64(low01, low23);
    bytes[half * 4 + 2] = _mm256_unpacklo_epi64(high01, high23);
    bytes[half * 4 + 3] = _mm256_unpackhi_epi64(high01, high23);
  }
}

// The same for what is left if 64 does not divide the depth: four bytes of each row.
__m256i load_row_ends(const uint8_t* packed, int64_t row_bytes) {
  int32_t lanes[kLanes];
#pragma GCC unroll 8
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    std::memcpy(&lanes[lane], packed + lane * row_bytes, sizeof(int32_t));
  }
  return _mm256_setr_epi32(lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6],
                           lanes[7]);
}

// panel[i][0..7] = the value of the i-th of eight codes, for eight rows. Each lane of `bytes` holds
// the four bytes of one row. Even elements are high nibbles.
template <bool kMean>
void decode_eight(__m256i bytes, const BytePlanes& planes, __m256 scale, __m256 mean,
                  float* panel) {
  // First bytes of four rows, then their second bytes, ...: out[j] of look_up_32 is then byte j of
  // all eight rows.
  const __m256i by_byte = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i ordered = _mm256_shuffle_epi8(bytes, by_byte);
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int64_t odd = 0; odd < 2; ++odd) {
    __m256 values[4];
    const __m256i codes = odd ? ordered : _mm256_srli_epi16(ordered, 4);
    look_up_32(planes, _mm256_and_si256(codes, nibble), values);
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < 4; ++byte) {
      __m256 value = _mm256_mul_ps(values[byte], scale);
      if (kMean) value = _mm256_add_ps(value, mean);
      _mm256_store_ps(panel + (2 * byte + odd) * kPanelWidth, value);
    }
  }
}

// panel[d][0..7] = W[row + lane][k + d] for eight rows. Rows and blocks must be multiples of 8
// elements. Transposes the packed bytes, then looks them up.
template <bool kMean>
void decode_eight_columns(const PackedWeight& weight, int64_t row, int64_t k, int64_t depth,
                          float* panel) {
  const BytePlanes planes(weight.values);
  const uint8_t* packed = weight.packed + (row * weight.K + k) / 2;
  const RowScales<kLanes> scales(weight, row, k, depth);
  int64_t stretch = 0;
  const auto decode_at = [&](int64_t d, __m256i bytes) {
    if (d >= scales.end[stretch]) ++stretch;
    const __m256 scale = _mm256_load_ps(scales.scale[stretch]);
    const __m256 mean = kMean ? _mm256_load_ps(scales.mean[stretch]) : _mm256_setzero_ps();
    decode_eight<kMean>(bytes, planes, scale, mean, panel + d * kPanelWidth);
  };
  int64_t d = 0;
  for (; d + 64 <= depth; d += 64) {
    if (d % kLineCodes == 0) prefetch_rows(packed + (d + kDepth) / 2, weight.K / 2, kLanes);
    __m256i bytes[8];
    load_rows(packed + d / 2, weight.K / 2, bytes);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) decode_at(d + i * 8, bytes[i]);
  }
  for (; d < depth; d += 8) decode_at(d, load_row_ends(packed + d / 2, weight.K / 2));
}

void decode_columns(const PackedWeight& weight, int64_t row, int64_t k, int64_t width,
                    int64_t depth, float* panel) {
  const bool regular = width == kPanelWidth && (weight.K | weight.blocksize | k | depth) % 8 == 0;
  if (!regular) return decode_columns_any(weight, row, k, width, depth, panel);
  for (int64_t half = 0; half < kPanelWidth; half += kLanes) {
    if (weight.mean == nullptr) {
      decode_eight_columns<false>(weight, row + half, k, depth, panel + half);
    } else {
      decode_eight_columns<true>(weight, row + half, k, depth, panel + half);
    }
  }
}

// One row of a panel: 16 elements in whole bytes and one block.
void decode_16(const PackedWeight& weight, const Table& table, int64_t first, float* out) {
  const int64_t block = block_of(weight, first);
  const __m256 scale = _mm256_set1_ps(block_scale(weight, block));
  const uint8_t* packed = weight.packed + first / 2;
  __m256 left = _mm256_mul_ps(look_up(table, codes_of(packed)), scale);
  __m256 right = _mm256_mul_ps(look_up(table, codes_of(packed + 4)), scale);
  if (weight.mean != nullptr) {
    const __m256 mean = _mm256_set1_ps(weight.mean[block]);
    left = _mm256_add_ps(left, mean);
    right = _mm256_add_ps(right, mean);
  }
  store_fp32(out, left);
  store_fp32(out + kLanes, right);
}

void decode_rows(const PackedWeight& weight, int64_t row, int64_t k, int64_t width, int64_t depth,
                 float* panel) {
  const bool regular = width == kPanelWidth && (weight.K | weight.blocksize | k) % 16 == 0;
  const Table table(weight.values);
  for (int64_t d = 0; d < depth; ++d, panel += kPanelWidth) {
    const int64_t first = (row + d) * weight.K + k;
    if (regular) {
      prefetch(weight.packed + (first + kPrefetchRows * weight.K) / 2);
      decode_16(weight, table, first, panel);
      continue;
    }
    decode_fp32(weight, first, width, panel);
    std::fill(panel + width, panel + kPanelWidth, 0.0f);
  }
}

// ---- products ----

float sum_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The vector operations that dot_any (blocks.h) needs.
struct Avx2 {
  static constexpr int64_t kLanes = 8;
  using Vector = __m256;
  using Table = cpu::Table;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* src) { return load_fp32(src); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vector a, Vector b) { return sum_lanes(_mm256_add_ps(a, b)); }
  static Table scaled_table(const PackedWeight& weight, int64_t block) {
    return cpu::scaled_table(weight, block);
  }
  static Vector decode(const Table& table, const uint8_t* packed) {
    return look_up(table, codes_of(packed));
  }
  static float value_of(const Table& table, int code) {
    alignas(32) float values[16];
    _mm256_store_ps(values, table.low);
    _mm256_store_ps(values + 8, table.high);
    return values[code];
  }
};

// Puts x into the order of look_up_32's output for a group: 32 even elements, then 32 odd ones.
void arrange_group(const float* x, float* arranged) {
  const auto halves = [&](int64_t at) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + at)),
                                _mm_loadu_ps(x + kGroup / 2 + at), 1);
  };
  for (int64_t j = 0; j < 4; ++j) {
    const __m256 lower = halves(8 * j), upper = halves(8 * j + 4);
    _mm256_store_ps(arranged + 8 * j, _mm256_shuffle_ps(lower, upper, 0x88));
    _mm256_store_ps(arranged + kGroup / 2 + 8 * j, _mm256_shuffle_ps(lower, upper, 0xdd));
  }
}

// One row of W times kRows rows of x, which is arranged as [depth / kGroup][kRows][kGroup].
template <int kRows>
void dot_groups(const BytePlanes& planes, const uint8_t* packed, const float* scales, int64_t ahead,
                int64_t depth, const float* x, float* sums) {
  constexpr int kChains = kRows <= 2 ? 2 : 1;  // enough chains to hide the FMA's latency
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256 total[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) total[m] = _mm256_setzero_ps();
  for (int64_t d = 0; d < depth; d += kGroup, packed += kGroup / 2, x += kRows * kGroup) {
    prefetch(packed + ahead);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    __m256 sum[kRows][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      for (int c = 0; c < kChains; ++c) sum[m][c] = _mm256_setzero_ps();
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      __m256 values[4];
      const __m256i codes = odd ? bytes : _mm256_srli_epi16(bytes, 4);
      look_up_32(planes, _mm256_and_si256(codes, nibble), values);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const __m256 left = _mm256_load_ps(x + m * kGroup + odd * (kGroup / 2) + 8 * j);
          sum[m][j % kChains] = _mm256_fmadd_ps(left, values[j], sum[m][j % kChains]);
        }
      }
    }
    const __m256 scale = _mm256_broadcast_ss(scales + d / kGroup);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m256 whole = kChains == 2 ? _mm256_add_ps(sum[m][0], sum[m][1]) : sum[m][0];
      total[m] = _mm256_fmadd_ps(whole, scale, total[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) sums[m] += sum_lanes(total[m]);
}

template <int kRows>
void dot_rows(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
              const float* x, int64_t x_stride, float (*sums)[kMaxDotRows]) {
  if (!has_groups(weight, k, depth)) {
    return dot_any<Avx2, kRows>(weight, row, rows, k, depth, x, x_stride, sums);
  }
  alignas(32) float arranged[kMaxDotElements];
  for (int m = 0; m < kRows; ++m) {
    for (int64_t d = 0; d < depth; d += kGroup) {
      arrange_group(x + m * x_stride + d, arranged + d * kRows + m * kGroup);
    }
  }
  const BytePlanes planes(weight.values);
  float scales[kMaxDotElements / kGroup];
  const int64_t ahead = prefetch_distance(weight, depth);
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t first = (row + n) * weight.K + k;
    group_scales(weight, first, depth / kGroup, scales);
    dot_groups<kRows>(planes, weight.packed + first / 2, scales, ahead, depth, arranged, sums[n]);
  }
}

void dot(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
         const float* x, int64_t x_stride, int64_t M, float (*sums)[kMaxDotRows]) {
  with_count<kMaxDotRows>(
      M, [&](auto count) { dot_rows<count>(weight, row, rows, k, depth, x, x_stride, sums); });
}

// Keeps kRows x 16 sums in registers: 12 accumulators, 2 panel vectors and a broadcast at 6 rows.
template <int kRows>
void multiply_rows(const float* x, int64_t row_stride, int64_t depth_stride, const float* panel,
                   int64_t depth, float* acc) {
  __m256 sum[kRows][2];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    sum[m][0] = load_fp32(acc + m * kPanelWidth);
    sum[m][1] = load_fp32(acc + m * kPanelWidth + kLanes);
  }
  for (int64_t d = 0; d < depth; ++d) {
    const __m256 right0 = load_fp32(panel + d * kPanelWidth);
    const __m256 right1 = load_fp32(panel + d * kPanelWidth + kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m256 left = _mm256_broadcast_ss(x + m * row_stride + d * depth_stride);
      sum[m][0] = _mm256_fmadd_ps(left, right0, sum[m][0]);
      sum[m][1] = _mm256_fmadd_ps(left, right1, sum[m][1]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    store_fp32(acc + m * kPanelWidth, sum[m][0]);
    store_fp32(acc + m * kPanelWidth + kLanes, sum[m][1]);
  }
}

void multiply(const float* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
              const float* panel, int64_t depth, float* acc) {
  for_each_row_tile<6>(rows, [&](auto count, int64_t row) {
    multiply_rows<count>(x + row * row_stride, row_stride, depth_stride, panel, depth,
                         acc + row * kPanelWidth);
  });
}

}  // namespace

const Kernels kAvx2Kernels = {
    .name = "avx2",
    .to_float = to_float,
    .from_float = from_float,
    .max_abs = max_abs,
    .encode = encode,
    .encode_scales = encode_scales,
    .decode = decode,
    .decode_columns = decode_columns,
    .decode_rows = decode_rows,
    .dot = dot,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .multiply = multiply,
    .multiply_two = nullptr,
    .pair_bf16 = nullptr,
    .multiply_bf16 = nullptr,
};

}  // namespace qlora_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
