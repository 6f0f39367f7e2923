// The only 4-bit tables, decision thresholds and 8-bit scale map in the repository.
// A new codebook goes here: one table, one line in kNamedCodebooks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "params.h"

namespace qlora_ext {

// NF4: quantiles of N(0, 1), QLoRA (arXiv 2305.14314), appendix E; the bits are bitsandbytes'.
constexpr double kNF4[16] = {-1.0f,        -0.6961928f,  -0.52507305f,  -0.3949175f,
                             -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                             0.0795803f,   0.1609302f,   0.2461123f,    0.33791524f,
                             0.44070983f,  0.562617f,    0.72295684f,   1.0f};

// FP4 (E2M1 with one subnormal), divided by its largest value; codes are sign-magnitude.
constexpr double kFP4[16] = {
    0.0f, 0.0052083335f,  0.6666667f,  1.0f,  0.33333334f,  0.5f,  0.16666667f,  0.25f,
    0.0f, -0.0052083335f, -0.6666667f, -1.0f, -0.33333334f, -0.5f, -0.16666667f, -0.25f};

// 16 evenly spaced levels without a zero, to two decimals.
constexpr double kLinear[16] = {-1.0, -0.87, -0.73, -0.60, -0.47, -0.33, -0.20, -0.07,
                                0.07, 0.20,  0.33,  0.47,  0.60,  0.73,  0.87,  1.0};

struct NamedCodebook {
  const char* name;
  const double* levels;  // [16], by code; kernels get them rounded to fp32
  bool sign_magnitude;
};

constexpr NamedCodebook kNamedCodebooks[] = {
    {"nf4", kNF4, false},
    {"fp4", kFP4, true},
    {"linear", kLinear, false},
};

// Companding maps a weight in [-1, 1] to [-1, 1] before its nearest level is chosen. With k > 0:
//   logarithmic: f(w) = sign(w) * log(1 + k|w|) / log(1 + k), finer near zero;
//   exponential: f(w) = sign(w) * (exp(k|w|) - 1) / (exp(k) - 1), finer near one.
enum class Companding { kNone, kLogarithmic, kExponential };

// f^-1, in double.
inline double inverse_companding(double level, Companding companding, double k) {
  const double magnitude = std::fabs(level);
  double w = magnitude;
  if (companding == Companding::kLogarithmic) w = std::expm1(magnitude * std::log1p(k)) / k;
  if (companding == Companding::kExponential) w = std::log1p(magnitude * std::expm1(k)) / k;
  return std::copysign(w, level);
}

// Builds the decision rule for 16 levels. The thresholds are the midpoints between neighbours in
// the companded domain, mapped back. `values` are mapped back too, so kernels need not know about
// companding. The levels may come in any order. The caller refuses NaN and Inf.
//
// If fp32 cannot hold a midpoint, it is rounded: to nearest if the levels are fp32 numbers (NF4,
// FP4, as in bitsandbytes), down if they are decimals (linear). Rounded down, x > threshold gives
// the same answer as x > midpoint. Example: 0.73 and 0.87 meet at 0.8, and fp32's 0.8 is above it.
inline Codebook make_codebook(const double* levels, bool sign_magnitude,
                              Companding companding = Companding::kNone, double k = 1.0) {
  Codebook book;
  book.sign_magnitude = sign_magnitude;
  const int num_ranks = sign_magnitude ? 8 : 16;  // sign-magnitude: codes 0..7 are the positives
  bool levels_are_fp32 = true;
  for (int code = 0; code < 16; ++code) {
    book.order[code] = static_cast<uint8_t>(code);
    book.values[code] = static_cast<float>(inverse_companding(levels[code], companding, k));
    levels_are_fp32 &= levels[code] == static_cast<double>(static_cast<float>(levels[code]));
  }
  std::stable_sort(book.order, book.order + num_ranks,
                   [&](uint8_t a, uint8_t b) { return levels[a] < levels[b]; });
  for (int i = 0; i < 15; ++i) {
    if (i + 1 >= num_ranks) {
      book.thresholds[i] = std::numeric_limits<float>::infinity();
      continue;
    }
    const double midpoint =
        inverse_companding((levels[book.order[i]] + levels[book.order[i + 1]]) / 2, companding, k);
    float threshold = static_cast<float>(midpoint);
    if (!levels_are_fp32 && threshold > midpoint) {
      threshold = std::nextafter(threshold, -std::numeric_limits<float>::infinity());
    }
    book.thresholds[i] = threshold;
  }
  return book;
}

inline const NamedCodebook* find_codebook(const std::string& name) {
  for (const NamedCodebook& entry : kNamedCodebooks) {
    if (name == entry.name) return &entry;
  }
  return nullptr;
}

// The signed dynamic map for 8-bit scales (Dettmers, arXiv 2110.02861): for i = 0..6 the
// midpoints of linspace(0.1, 1, 2^i + 1) times 10^(i-6), both signs, plus 0 and 1, sorted.
// The bits are those of torch's fp32 linspace, as in bitsandbytes' checkpoints.
// A macro, because device code needs it as the initializer of a __device__ array.
// clang-format off
#define QLORA_EXT_DYNAMIC_MAP \
  -0.99296874f, -0.9789063f, -0.96484375f, -0.9507812f, -0.93671876f, -0.92265624f, -0.9085938f, -0.89453125f, \
  -0.8804687f, -0.86640626f, -0.85234374f, -0.8382813f, -0.82421875f, -0.8101562f, -0.79609376f, -0.78203124f, \
  -0.7679688f, -0.75390625f, -0.7398437f, -0.72578126f, -0.7117188f, -0.6976563f, -0.68359375f, -0.6695312f, \
  -0.65546876f, -0.6414063f, -0.6273438f, -0.61328125f, -0.5992187f, -0.58515626f, -0.5710938f, -0.5570313f, \
  -0.54296875f, -0.5289062f, -0.5148437f, -0.50078124f, -0.4867187f, -0.47265625f, -0.45859373f, -0.44453126f, \
  -0.43046874f, -0.41640624f, -0.40234375f, -0.38828123f, -0.37421876f, -0.36015624f, -0.34609374f, -0.33203125f, \
  -0.31796873f, -0.30390626f, -0.28984374f, -0.27578127f, -0.26171875f, -0.24765624f, -0.23359375f, -0.21953125f, \
  -0.20546874f, -0.19140625f, -0.17734376f, -0.16328125f, -0.14921875f, -0.13515624f, -0.12109375f, -0.107031256f, \
  -0.09859375f, -0.09578126f, -0.092968754f, -0.09015625f, -0.08734375f, -0.08453125f, -0.08171876f, -0.07890625f, \
  -0.07609375f, -0.07328125f, -0.070468746f, -0.067656256f, -0.06484375f, -0.06203125f, -0.059218753f, -0.05640625f, \
  -0.05359375f, -0.05078125f, -0.04796875f, -0.04515625f, -0.042343747f, -0.03953125f, -0.036718752f, -0.03390625f, \
  -0.03109375f, -0.028281251f, -0.02546875f, -0.02265625f, -0.019843752f, -0.01703125f, -0.01421875f, -0.01140625f, \
  -0.00971875f, -0.009156249f, -0.00859375f, -0.00803125f, -0.00746875f, -0.00690625f, -0.00634375f, -0.00578125f, \
  -0.0052187503f, -0.0046562497f, -0.00409375f, -0.0035312497f, -0.00296875f, -0.00240625f, -0.00184375f, -0.0012812499f, \
  -0.0009437501f, -0.00083125f, -0.00071875006f, -0.0006062501f, -0.00049375003f, -0.00038125002f, -0.00026875004f, -0.00015625001f, \
  -8.875e-05f, -6.625e-05f, -4.375e-05f, -2.1249998e-05f, -7.75e-06f, -3.2500002e-06f, -5.5000004e-07f, 0.0f, \
  5.5000004e-07f, 3.2500002e-06f, 7.75e-06f, 2.1249998e-05f, 4.375e-05f, 6.625e-05f, 8.875e-05f, 0.00015625001f, \
  0.00026875004f, 0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f, 0.00083125f, 0.0009437501f, 0.0012812499f, \
  0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f, 0.00409375f, 0.0046562497f, 0.0052187503f, 0.00578125f, \
  0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f, 0.00859375f, 0.009156249f, 0.00971875f, 0.01140625f, \
  0.01421875f, 0.01703125f, 0.019843752f, 0.02265625f, 0.02546875f, 0.028281251f, 0.03109375f, 0.03390625f, \
  0.036718752f, 0.03953125f, 0.042343747f, 0.04515625f, 0.04796875f, 0.05078125f, 0.05359375f, 0.05640625f, \
  0.059218753f, 0.06203125f, 0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f, 0.07890625f, \
  0.08171876f, 0.08453125f, 0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f, 0.09859375f, 0.107031256f, \
  0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f, 0.17734376f, 0.19140625f, 0.20546874f, 0.21953125f, \
  0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f, 0.28984374f, 0.30390626f, 0.31796873f, 0.33203125f, \
  0.34609374f, 0.36015624f, 0.37421876f, 0.38828123f, 0.40234375f, 0.41640624f, 0.43046874f, 0.44453126f, \
  0.45859373f, 0.47265625f, 0.4867187f, 0.50078124f, 0.5148437f, 0.5289062f, 0.54296875f, 0.5570313f, \
  0.5710938f, 0.58515626f, 0.5992187f, 0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f, \
  0.68359375f, 0.6976563f, 0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f, \
  0.79609376f, 0.8101562f, 0.82421875f, 0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f, \
  0.9085938f, 0.92265624f, 0.93671876f, 0.9507812f, 0.96484375f, 0.9789063f, 0.99296874f, 1.0f
// clang-format on

constexpr float kDynamicMap[256] = {QLORA_EXT_DYNAMIC_MAP};
constexpr int kDynamicMapZero = 127;  // index of 0.0

// Decision threshold between dynamic-map codes i and i + 1: the fp32 midpoint.
constexpr float dynamic_map_threshold(int i) {
  return static_cast<float>((static_cast<double>(kDynamicMap[i]) + kDynamicMap[i + 1]) / 2);
}

}  // namespace qlora_ext
