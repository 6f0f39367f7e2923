// Double quantization: fp32 scales <-> 8-bit codes of the signed dynamic map, in groups of 256,
// around the mean of all scales.
//
// Moves 4 bytes in and 1 out per scale (and back); a whole block of weights shares a scale.
#include <cmath>

#include "parallel.h"
#include "scales.h"
#include "simd/simd.h"
#include "tree_sum.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kGroup = 256;  // scales that share one absmax2
constexpr int64_t kGrain = 16;   // groups worth waking a thread for

float mean_of(const QuantizeAbsmaxParams& p) {
  const double sum = parallel_tree_sum(
      p.num_blocks, static_cast<double*>(p.workspace),
      [&](int64_t at, int64_t count, double* out) { std::copy_n(p.absmax + at, count, out); });
  return static_cast<float>(sum / static_cast<double>(p.num_blocks));
}

float max_deviation(const float* absmax, int64_t n, float offset) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(absmax[i] - offset));
  return largest;
}

// Zero if the reciprocal is not finite. Every scale of the group then gets the code of zero.
float inverse_or_zero(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

void quantize_group(const QuantizeAbsmaxParams& p, int64_t group, float offset) {
  const int64_t first = group * kGroup;
  const int64_t n = std::min(kGroup, p.num_blocks - first);
  const float absmax2 = max_deviation(p.absmax + first, n, offset);
  p.nested[1 + group] = absmax2;
  kernels().encode_scales(p.absmax + first, n, offset, inverse_or_zero(absmax2), p.code + first);
}

}  // namespace
}  // namespace cpu

const char* launch::quantize_absmax(const QuantizeAbsmaxParams& p, void*) {
  if (const char* error = cpu::cpu_path_error()) return error;
  if (p.num_blocks == 0) {
    p.nested[0] = 0.0f;
    return nullptr;
  }
  const float offset = cpu::mean_of(p);
  p.nested[0] = offset;
  const int64_t num_groups = ceil_div(p.num_blocks, cpu::kGroup);
  cpu::parallel_for(num_groups, cpu::kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) cpu::quantize_group(p, group, offset);
  });
  return nullptr;
}

int64_t launch::workspace_quantize_absmax(const QuantizeAbsmaxParams& p) {
  return cpu::tree_sum_workspace(p.num_blocks);
}

const char* launch::dequantize_absmax(const DequantizeAbsmaxParams& p, void*) {
  if (const char* error = cpu::cpu_path_error()) return error;
  cpu::parallel_for(p.num_blocks, cpu::kGrain * cpu::kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      p.absmax[block] = cpu::nested_scale(p.code[block], p.nested, block);
    }
  });
  return nullptr;
}

}  // namespace qlora_ext
