// The inner kernels of the CPU backend: one table of functions per instruction set, chosen once,
// at run time. A new instruction set is a new file with such a table and a line in dispatch.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../params.h"

namespace qlora_ext::cpu {

// Columns of the right operand in a panel, for every instruction set.
constexpr int64_t kPanelWidth = 16;
// Largest depth of a panel, along the contraction. A panel is then 16 KB of L1.
constexpr int64_t kDepth = 256;
// Most rows of x that `dot` takes at once, and most elements of x in all (16 KB).
constexpr int64_t kMaxDotRows = 4;
constexpr int64_t kMaxDotElements = 4096;

// How a weight becomes the v that the codebook compares: v = (w - mean) * inverse_scale.
struct Normalizer {
  float mean;           // 0 except for normalization "standard"
  float inverse_scale;  // 0 for a block without a usable scale: every v is 0
  bool clip;            // v is clipped to [-1, 1]
};

struct Kernels {
  const char* name;

  // dst[i] = float(src[i]).
  void (*to_float)(const void* src, DType dtype, int64_t n, float* dst);
  // dst[i] = src[i], rounded to nearest even.
  void (*from_float)(const float* src, int64_t n, DType dtype, void* dst);

  // For each block of `blocksize` elements (the last may be short): max |x|, or Inf or NaN if x has
  // one there.
  void (*max_abs)(const float* x, int64_t n, int64_t blocksize, float* largest);
  // Packs the codes of n weights, the first in a high nibble. An odd n leaves a low nibble of 0.
  // Block b is normalised by normalizers[b].
  void (*encode)(const float* x, int64_t n, int64_t blocksize, const Normalizer* normalizers,
                 const Codebook& codebook, uint8_t* packed);
  // code[i] = nearest dynamic-map entry to (absmax[i] - offset) * inverse_scale.
  void (*encode_scales)(const float* absmax, int64_t n, float offset, float inverse_scale,
                        uint8_t* code);

  // Decodes flat elements [first, first + n), rounded to dtype.
  void (*decode)(const PackedWeight& weight, int64_t first, int64_t n, DType dtype, void* out);
  // panel[d][c] = W[row + c][k + d] for c < width <= kPanelWidth, d < depth <= kDepth; else 0.
  void (*decode_columns)(const PackedWeight& weight, int64_t row, int64_t k, int64_t width,
                         int64_t depth, float* panel);
  // panel[d][c] = W[row + d][k + c] for c < width <= kPanelWidth, d < depth <= kDepth; else 0.
  void (*decode_rows)(const PackedWeight& weight, int64_t row, int64_t k, int64_t width,
                      int64_t depth, float* panel);
  // sums[n][m] += sum over d < depth of x[m * x_stride + d] * W[row + n][k + d], for n < rows and
  // m < M <= kMaxDotRows, where M * depth <= kMaxDotElements.
  void (*dot)(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
              const float* x, int64_t x_stride, int64_t M, float (*sums)[kMaxDotRows]);

  // panel[d][c] = src[d * stride + c] for c < width, zero beyond.
  void (*pack_rows)(const void* src, DType dtype, int64_t stride, int64_t width, int64_t depth,
                    float* panel);
  // panel[d][c] = src[c * stride + d] for c < width, zero beyond.
  void (*pack_columns)(const void* src, DType dtype, int64_t stride, int64_t width, int64_t depth,
                       float* panel);
  // acc[m][c] += sum over d of x[m * row_stride + d * depth_stride] * panel[d][c], in order of d.
  void (*multiply)(const float* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
                   const float* panel, int64_t depth, float* acc);

  // The same for two panels at once, [2][depth][kPanelWidth], into acc[2][rows][kPanelWidth]; null
  // if it would not be faster.
  void (*multiply_two)(const float* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
                       const float* panels, int64_t depth, float* acc);

  // The same product in bf16, for CPUs with instructions for it; null on other paths.
  // pairs[d / 2][c] = (panel[d][c], panel[d + 1][c]), rounded to bf16, for an even depth.
  void (*pair_bf16)(const float* panel, int64_t depth, uint16_t* pairs);
  // acc[m][c] += sum over d of x[m * row_stride + d] * panel[d][c], in order of pairs of d.
  void (*multiply_bf16)(const uint16_t* x, int64_t row_stride, int64_t rows, const uint16_t* pairs,
                        int64_t depth, float* acc);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
Kernels avx512_kernels();       // kAvx2Kernels with the decoders and the products replaced
Kernels avx512_bf16_kernels();  // avx512_kernels() with products of bf16 added
#endif

// The table in use: the one that QLORA_EXT_CPU names, else the best that this CPU runs.
const Kernels& kernels();

// Names of all tables of this build, the best first; a CPU may lack what some of them need.
std::vector<std::string> cpu_paths();

// Name of the table in use, or null after an error.
const char* cpu_path();

// Null, or an error that says why QLORA_EXT_CPU cannot be honoured; every launcher returns it.
const char* cpu_path_error();

}  // namespace qlora_ext::cpu
