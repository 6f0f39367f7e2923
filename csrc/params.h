// The boundary between host and device code: plain structs that kernels read, and the launchers
// that each backend defines. Neither this header nor device code includes a torch header.
#pragma once

#include <cstdint>

namespace qlora_ext {

enum class DType : int8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Bytes of one element.
inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A 4-bit codebook: 16 values, and the rule that picks one.
// rank = number of thresholds t with v > t (strict: a tie takes the lower rank), where
// v = sign_magnitude ? |x| : x; then code = order[rank] | (sign_magnitude && x < 0 ? 8 : 0).
// Unused thresholds are +inf, so that one loop over 15 serves every codebook.
struct Codebook {
  float values[16];      // by code
  float thresholds[15];  // ascending
  uint8_t order[16];     // rank -> code
  bool sign_magnitude;   // FP4: thresholds on |x|, the sign is bit 3
};

// A frozen 4-bit weight as kernels read it: the checkpoint's bytes, never repacked.
// Weight (n, k) has flat index i = n * K + k, scale block i / blocksize, and
// value = values[code] * scale (+ mean), each step rounded to fp32.
struct PackedWeight {
  const uint8_t* packed;       // [ceil(N * K / 2)], flat row-major, high nibble = even element
  const uint8_t* absmax_code;  // [num_blocks] 8-bit scales, or null: scales are not nested
  const float* absmax;         // [num_blocks] fp32 scales, or null: scales are nested
  const float* nested;         // [1 + ceil(num_blocks / 256)]: offset, then absmax2; or null
  const float* mean;           // [num_blocks], normalization "standard" only; or null
  int64_t N;                   // rows (out_features)
  int64_t K;                   // columns (in_features); 1-d weights are N = 1
  int64_t blocksize;           // elements per scale; N * K for one scale per tensor
  int64_t num_blocks;          // ceil(N * K / blocksize)
  float values[16];            // the codebook, by code
};

// A stack of E such weights: in each array, the experts' parts follow one another.
struct PackedStack {
  PackedWeight first;  // expert 0; N, K, blocksize and num_blocks are those of each expert
  int64_t E;

  PackedWeight expert(int64_t e) const {
    PackedWeight weight = first;
    weight.packed += e * (first.N * first.K / 2);  // K is even
    if (first.absmax_code != nullptr) weight.absmax_code += e * first.num_blocks;
    if (first.absmax != nullptr) weight.absmax += e * first.num_blocks;
    if (first.nested != nullptr) weight.nested += e * (1 + ceil_div(first.num_blocks, 256));
    if (first.mean != nullptr) weight.mean += e * first.num_blocks;
    return weight;
  }
};

enum class Normalization : int8_t { kAbsmax = 0, kStandard = 1, kNone = 2 };

struct Quantize4bitParams {
  const void* weight;  // [numel], dtype, contiguous
  uint8_t* packed;     // [ceil(numel / 2)]
  float* absmax;       // [num_blocks]: absmax; std_factor * std; or 1
  float* mean;         // [num_blocks], kStandard only; or null
  int64_t* bad_index;  // one element: numel before the launch, then the lowest flat index of a
                       // NaN or Inf weight if there is one
  int64_t numel;
  int64_t blocksize;
  int64_t num_blocks;
  float std_factor;  // c in scale = c * std (population standard deviation)
  Normalization normalization;
  DType dtype;
  Codebook codebook;
  void* workspace;  // workspace_quantize_4bit() bytes, 256-byte aligned
};

// offset = mean(absmax). code = index of the entry of the signed dynamic map that is nearest to
// (absmax - offset) / absmax2.
struct QuantizeAbsmaxParams {
  const float* absmax;  // [num_blocks]
  uint8_t* code;        // [num_blocks]
  float* nested;        // [1 + ceil(num_blocks / 256)]: offset, then absmax2
  int64_t num_blocks;
  void* workspace;  // workspace_quantize_absmax() bytes
};

struct DequantizeAbsmaxParams {
  const uint8_t* code;  // [num_blocks]
  const float* nested;  // [1 + ceil(num_blocks / 256)]
  float* absmax;        // [num_blocks] out
  int64_t num_blocks;
};

struct Dequantize4bitParams {
  PackedWeight weight;
  int64_t row_begin;  // rows [row_begin, row_end) of the weight are decoded
  int64_t row_end;
  void* out;  // [row_end - row_begin, columns], contiguous, dtype
  DType dtype;
  int64_t col_begin = 0;  // columns [col_begin, col_end) of those rows; both 0: all K
  int64_t col_end = 0;

  int64_t columns() const { return col_end == 0 ? weight.K : col_end - col_begin; }
};

// y = x * W^T + bias + lora_S * lora_B^T, accumulated in fp32 and rounded once to dtype.
struct Gemm4bitParams {
  PackedWeight weight;
  const void* x;        // [M, K], dtype, rows x_stride apart, k contiguous
  const void* bias;     // [N], bias_dtype; or null
  const float* lora_S;  // [M, R] fp32, rows S_stride apart, already scaled; or null
  const void* lora_B;   // [N, R], lora_dtype, contiguous; or null
  void* y;              // [M, N], dtype, contiguous
  int64_t M;
  int64_t R;  // 0 without a bypass
  int64_t x_stride;
  int64_t S_stride;
  DType dtype;
  DType bias_dtype;
  DType lora_dtype;
  void* workspace;  // workspace_gemm_4bit() bytes
  // [16] in GPU memory, or null. The codebook, for callers that don't have it on the host (CUDA, no
  // nested scales, M at most 8). weight.values then only choose how a 16-bit table is rounded.
  const float* table;
};

// dX = dY * W + lora_dS * lora_A: the contraction runs over [N | R].
struct Gemm4bitBackwardParams {
  PackedWeight weight;
  const void* dY;        // [M, N], dtype, rows dY_stride apart
  const float* lora_dS;  // [M, R] fp32, contiguous, already scaled; or null
  const void* lora_A;    // [R, K], lora_dtype, contiguous; or null
  void* dX;              // [M, K], dtype, contiguous
  int64_t M;
  int64_t R;
  int64_t dY_stride;
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// The products of a mixture of experts. The M rows are sorted by expert: expert e has the rows from
// offsets[e - 1] (0 for the first) to offsets[e]. Rows from offsets[E - 1] on belong to no expert, and
// their results are zeros. x has T rows; row m reads row rows[m] of it, or row m if rows is null.
// Both are device memory, and a CUDA kernel must not trust them: it takes
// min(max(offsets), M) and reads zeros for a row outside [0, T).
struct Groups {
  const int32_t* offsets;  // [E]
  const int32_t* rows;     // [M]; or null: T is M
  int64_t E;
  int64_t M;
  int64_t T;
};

// y[m] = x[rows[m]] * W_e^T + bias_e + lora_S[m] * lora_B_e^T.
struct GroupedGemm4bitParams {
  PackedStack weight;
  Groups groups;
  const void* x;        // [T, K], dtype, rows x_stride apart
  const void* bias;     // [E, N], bias_dtype; or null
  const float* lora_S;  // [M, R] fp32, rows S_stride apart, already scaled; or null
  const void* lora_B;   // [E, N, R], lora_dtype; or null
  void* y;              // [M, N], dtype, contiguous
  int64_t R;            // 0 without a bypass
  int64_t x_stride;
  int64_t S_stride;
  DType dtype;
  DType bias_dtype;
  DType lora_dtype;
  void* workspace;

  // The product as that of expert 0 with all M rows.
  Gemm4bitParams of_first() const {
    return {.weight = weight.first,
            .x = x,
            .bias = bias,
            .lora_S = lora_S,
            .lora_B = lora_B,
            .y = y,
            .M = groups.M,
            .R = R,
            .x_stride = x_stride,
            .S_stride = S_stride,
            .dtype = dtype,
            .bias_dtype = bias_dtype,
            .lora_dtype = lora_dtype,
            .workspace = nullptr,
            .table = nullptr};
  }
};

// dX[m] = dY[m] * W_e + lora_dS[m] * lora_A_e.
struct GroupedGemm4bitBackwardParams {
  PackedStack weight;
  Groups groups;         // rows is null
  const void* dY;        // [M, N], dtype, rows dY_stride apart
  const float* lora_dS;  // [M, R] fp32, contiguous, already scaled; or null
  const void* lora_A;    // [E, R, K], lora_dtype; or null
  void* dX;              // [M, K], dtype, contiguous
  int64_t R;
  int64_t dY_stride;
  DType dtype;
  DType lora_dtype;
  void* workspace;

  // The product as that of expert 0 with all M rows.
  Gemm4bitBackwardParams of_first() const {
    return {.weight = weight.first,
            .dY = dY,
            .lora_dS = lora_dS,
            .lora_A = lora_A,
            .dX = dX,
            .M = groups.M,
            .R = R,
            .dY_stride = dY_stride,
            .dtype = dtype,
            .lora_dtype = lora_dtype,
            .workspace = nullptr};
  }
};

// S[m] = scaling * x[rows[m]] * A_e^T.
struct GroupedLoraShrinkParams {
  Groups groups;
  const void* x;       // [T, K], dtype, rows x_stride apart
  const void* lora_A;  // [E, R, K], lora_dtype
  float* S;            // [M, R] fp32, contiguous
  int64_t R;
  int64_t K;
  int64_t x_stride;
  float scaling;
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// dA_e = scaling * dS_e^T * x_e, and dx[m] = scaling * dS[m] * A_e if asked for.
struct GroupedLoraShrinkBackwardParams {
  Groups groups;
  const float* dS;     // [M, R] fp32, contiguous
  const void* x;       // [T, K], dtype, rows x_stride apart
  const void* lora_A;  // [E, R, K], lora_dtype
  void* dx;            // [M, K], dtype, contiguous; or null
  void* dA;            // [E, R, K], lora_dtype, contiguous
  int64_t R;
  int64_t K;
  int64_t x_stride;
  float scaling;
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// dS[m] = scaling * dY[m] * B_e and dB_e = dY_e^T * S_e.
struct GroupedLoraExpandBackwardParams {
  Groups groups;       // rows is null
  const void* dY;      // [M, N], dtype, rows dY_stride apart
  const float* S;      // [M, R] fp32, rows S_stride apart
  const void* lora_B;  // [E, N, R], lora_dtype
  float* dS;           // [M, R] fp32, contiguous
  void* dB;            // [E, N, R], lora_dtype, contiguous
  int64_t R;
  int64_t N;
  int64_t dY_stride;
  int64_t S_stride;
  float scaling;  // multiplies dS only
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// out[t] = sum of values[order[i]] for i from ends[t - 1] (0 for the first) to ends[t], in that
// order, in fp32, rounded once.
struct SumRowsParams {
  const void* values;    // [M, K], dtype, rows values_stride apart
  const int32_t* order;  // [L]
  const int32_t* ends;   // [T]
  void* out;             // [T, K], dtype, contiguous
  int64_t M;
  int64_t L;
  int64_t T;
  int64_t K;
  int64_t values_stride;
  DType dtype;
};

// S = scaling * x * A^T.
struct LoraShrinkParams {
  const void* x;       // [M, K], dtype, rows x_stride apart
  const void* lora_A;  // [R, K], lora_dtype, contiguous
  float* S;            // [M, R] fp32, contiguous
  int64_t M;
  int64_t R;
  int64_t K;
  int64_t x_stride;
  float scaling;
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// dA = scaling * dS^T * x, and dx = scaling * dS * A if asked for.
struct LoraShrinkBackwardParams {
  const float* dS;     // [M, R] fp32, contiguous
  const void* x;       // [M, K], dtype, rows x_stride apart
  const void* lora_A;  // [R, K], lora_dtype, contiguous
  void* dx;            // [M, K], dtype, contiguous; or null
  void* dA;            // [R, K], lora_dtype, contiguous
  int64_t M;
  int64_t R;
  int64_t K;
  int64_t x_stride;
  float scaling;
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// dS = scaling * dY * B and dB = dY^T * S: two products, so dY is read twice, the second time from
// a cache if it fits.
struct LoraExpandBackwardParams {
  const void* dY;      // [M, N], dtype, rows dY_stride apart
  const float* S;      // [M, R] fp32, rows S_stride apart
  const void* lora_B;  // [N, R], lora_dtype, contiguous
  float* dS;           // [M, R] fp32, contiguous
  void* dB;            // [N, R], lora_dtype, contiguous
  int64_t M;
  int64_t R;
  int64_t N;
  int64_t dY_stride;
  int64_t S_stride;
  float scaling;  // multiplies dS only; 1 gives the gradient of S itself
  DType dtype;
  DType lora_dtype;
  void* workspace;
};

// out = dequantize(W) + scaling * B * A in fp32, rounded once to dtype.
struct MergeLora4bitParams {
  PackedWeight weight;
  const void* lora_A;  // [R, K], lora_dtype, contiguous
  const void* lora_B;  // [N, R], lora_dtype, contiguous
  void* out;           // [N, K], dtype, contiguous
  int64_t R;
  float scaling;
  DType dtype;
  DType lora_dtype;
};

// out[i] = dequantize(W)[indices[i]].
struct Embedding4bitParams {
  PackedWeight weight;
  const int64_t* indices;  // [M], each in [0, N); checked on the CPU, never clamped
  void* out;               // [M, K], dtype, contiguous
  int64_t* bad_index;      // CPU: position of the first bad index, or M; CUDA: null, it traps
  int64_t M;
  DType dtype;
};

// y = x W^T + bias with a dense W, accumulated in fp32 and rounded once to dtype. Only the CPU
// backend has it, for bf16 and fp16 layers that stay unquantized: torch's matmul is slow for them.
struct LinearParams {
  const void* x;       // [M, K], dtype, rows x_stride apart
  const void* weight;  // [N, K], weight_dtype, contiguous
  const void* bias;    // [N], bias_dtype; or null
  void* y;             // [M, N], dtype, contiguous
  int64_t M;
  int64_t N;
  int64_t K;
  int64_t x_stride;
  DType dtype;
  DType weight_dtype;
  DType bias_dtype;
  void* workspace;
};

// dX = dY W with a dense W.
struct LinearBackwardParams {
  const void* dY;      // [M, N], dtype, rows dY_stride apart
  const void* weight;  // [N, K], weight_dtype, contiguous
  void* dX;            // [M, K], dtype, contiguous
  int64_t M;
  int64_t N;
  int64_t K;
  int64_t dY_stride;
  DType dtype;
  DType weight_dtype;
  void* workspace;
};

// Each backend defines these. A launcher returns null, or an error that says what went wrong
// (CUDA: the failed call and its error). `stream` is a cudaStream_t, null on the CPU.
// A workspace_ function returns how many bytes of scratch its launcher needs; 0: none.
namespace launch {
const char* quantize_4bit(const Quantize4bitParams&, void* stream);
const char* quantize_absmax(const QuantizeAbsmaxParams&, void* stream);
const char* dequantize_absmax(const DequantizeAbsmaxParams&, void* stream);
const char* dequantize_4bit(const Dequantize4bitParams&, void* stream);
const char* gemm_4bit(const Gemm4bitParams&, void* stream);
const char* gemm_4bit_backward(const Gemm4bitBackwardParams&, void* stream);
const char* lora_shrink(const LoraShrinkParams&, void* stream);
const char* lora_shrink_backward(const LoraShrinkBackwardParams&, void* stream);
const char* lora_expand_backward(const LoraExpandBackwardParams&, void* stream);
const char* merge_lora_4bit(const MergeLora4bitParams&, void* stream);
const char* embedding_4bit(const Embedding4bitParams&, void* stream);

const char* grouped_gemm_4bit(const GroupedGemm4bitParams&, void* stream);
const char* grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams&, void* stream);
const char* grouped_lora_shrink(const GroupedLoraShrinkParams&, void* stream);
const char* grouped_lora_shrink_backward(const GroupedLoraShrinkBackwardParams&, void* stream);
const char* grouped_lora_expand_backward(const GroupedLoraExpandBackwardParams&, void* stream);
const char* sum_rows(const SumRowsParams&, void* stream);

const char* linear(const LinearParams&, void* stream);                   // CPU only
const char* linear_backward(const LinearBackwardParams&, void* stream);  // CPU only

int64_t workspace_quantize_4bit(const Quantize4bitParams&);
int64_t workspace_quantize_absmax(const QuantizeAbsmaxParams&);
int64_t workspace_gemm_4bit(const Gemm4bitParams&);
int64_t workspace_gemm_4bit_backward(const Gemm4bitBackwardParams&);
int64_t workspace_lora_shrink(const LoraShrinkParams&);
int64_t workspace_lora_shrink_backward(const LoraShrinkBackwardParams&);
int64_t workspace_lora_expand_backward(const LoraExpandBackwardParams&);
int64_t workspace_grouped_gemm_4bit(const GroupedGemm4bitParams&);
int64_t workspace_grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams&);
int64_t workspace_grouped_lora_shrink(const GroupedLoraShrinkParams&);
int64_t workspace_grouped_lora_shrink_backward(const GroupedLoraShrinkBackwardParams&);
int64_t workspace_grouped_lora_expand_backward(const GroupedLoraExpandBackwardParams&);
int64_t workspace_linear(const LinearParams&);
int64_t workspace_linear_backward(const LinearBackwardParams&);

// How many rows (forward) or columns (backward) of W to decode at a time into a dense chunk that
// torch's matmul (cuBLAS) multiplies. 0: the launcher does the whole op. A chunk yields whole
// columns of the result. Chosen from shapes, dtype and device (CUDA: heuristics.cuh).
int64_t chunk_rows_gemm_4bit(const Gemm4bitParams&);
int64_t chunk_columns_gemm_4bit_backward(const Gemm4bitBackwardParams&);
}  // namespace launch

}  // namespace qlora_ext
