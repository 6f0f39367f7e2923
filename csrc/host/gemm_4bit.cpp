// y = x W^T + bias + S B^T; S is given or computed here.
#include "gemm_4bit.h"

namespace qlora_ext::host {

int64_t check_input(const char* op, const Tensor& x, const Weight& w) {
  const int64_t rows = check_rows(op, "x", x);
  QLORA_CHECK(x.size(x.dim() - 1) == w.view.K, op, "x has shape ", list_string(x.sizes()),
              ", want [..., ", w.view.K, "] for a weight of [", w.view.N, ", ", w.view.K, "]");
  return rows;
}

namespace {

// [S | 1] and [B | bias], padded with zeros to a multiple of 8 ranks: their product is
// S B^T + bias.
struct Bypass {
  Tensor S;  // [M, R], dtype
  Tensor B;  // [N, R], dtype
};

Bypass bypass_with_bias(const Tensor& S, const Tensor& B, const Tensor& bias) {
  const int64_t ranks = S.size(1), zeros = 7 - ranks % 8;
  using torch::stable::pad;
  const Tensor bias_column = torch::stable::reshape(bias, {bias.numel(), 1});
  const Tensor bias_last = pad(bias_column, {ranks, zeros});
  return {.S = pad(pad(S, {0, 1}, "constant", 1.0), {0, zeros}),
          .B = torch::stable::subtract(pad(B, {0, 1 + zeros}), bias_last, -1.0)};
}

// Decodes the weight a few rows at a time into one chunk and lets torch's matmul multiply it:
// y[:, rows] = x * chunk^T. A second matmul adds the bypass to y. So y is rounded twice, as in an
// unfused LoRA layer; the fused kernel rounds once. The bias is one more rank of the bypass: by
// itself it would cost torch another pass over y.
void gemm_in_chunks(const char* op, const Gemm4bitParams& p, int64_t chunk_rows, const Rows& x,
                    const Tensor& y, const Dense& bias, const Rows& lora_S, const Dense& lora_B,
                    const DeviceScope& scope) {
  const ScalarType dtype = x.tensor.scalar_type();
  const int64_t N = p.weight.N, K = p.weight.K;
  const Tensor x2 = torch::stable::reshape(x.tensor, {p.M, K});
  Tensor y2 = torch::stable::view(y, {p.M, N});
  Tensor chunk = empty(op, "a chunk of the weight", {std::min(chunk_rows, N), K}, dtype, y);
  Tensor bias_row;
  if (p.bias != nullptr) bias_row = torch::stable::to(bias.tensor, dtype);
  Bypass bypass;
  if (p.R > 0) {
    bypass.S = torch::stable::to(torch::stable::reshape(lora_S.tensor, {p.M, p.R}), dtype);
    bypass.B = torch::stable::to(lora_B.tensor, dtype);
    if (p.bias != nullptr) bypass = bypass_with_bias(bypass.S, bypass.B, bias_row);
  }
  for (int64_t begin = 0; begin < N; begin += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, N - begin);
    const Dequantize4bitParams decode{.weight = p.weight,
                                      .row_begin = begin,
                                      .row_end = begin + rows,
                                      .out = chunk.data_ptr(),
                                      .dtype = p.dtype};
    check_launch(op, launch::dequantize_4bit(decode, scope.stream()));
    Tensor W = narrow(chunk, 0, 0, rows);
    Tensor y_columns = narrow(y2, 1, begin, rows);
    const bool bias_alone = p.bias != nullptr && p.R == 0;
    const Tensor self = bias_alone ? narrow(bias_row, 0, begin, rows) : y_columns;
    addmm_out(y_columns, self, x2, transpose(W, 0, 1), bias_alone ? 1.0 : 0.0);
    if (p.R == 0) continue;
    Tensor B_rows = narrow(bypass.B, 0, begin, rows);
    addmm_out(y_columns, y_columns, bypass.S, transpose(B_rows, 0, 1), 1.0);
  }
}

}  // namespace

Tensor gemm_forward(const char* op, const Tensor& x, const Weight& w, const OptionalTensor& bias,
                    const OptionalTensor& lora_S, const OptionalTensor& lora_B,
                    const DeviceScope& scope) {
  check_input(op, x, w);
  const Rows rows = as_rows(op, "x", x);
  Gemm4bitParams p{};
  p.weight = w.view;
  p.x = rows.data;
  p.M = rows.rows;
  p.x_stride = rows.stride;
  p.dtype = rows.dtype;
  Dense dense_bias, dense_B;
  if (bias) {
    dense_bias = as_dense(op, "bias", *bias, {p.weight.N}, x);
    p.bias = dense_bias.data;
    p.bias_dtype = dense_bias.dtype;
  }
  check_both(op, "lora_S", lora_S, "lora_B", lora_B);
  Rows rows_S;
  if (lora_S) {
    dense_B = as_dense(op, "lora_B", *lora_B, {p.weight.N, kAnyRank}, x);
    p.R = lora_B->size(1);
    rows_S = as_rank_rows(op, "lora_S", *lora_S, p.M, p.R, x);
    p.lora_S = static_cast<const float*>(rows_S.data);
    p.lora_B = dense_B.data;
    p.S_stride = rows_S.stride;
    p.lora_dtype = dense_B.dtype;
  }
  const Tensor y = empty(op, "y", replace_last(x, p.weight.N), x.scalar_type(), x);
  p.y = y.data_ptr();
  if (y.numel() == 0) return y;
  if (const int64_t chunk_rows = launch::chunk_rows_gemm_4bit(p)) {
    gemm_in_chunks(op, p, chunk_rows, rows, y, dense_bias, rows_S, dense_B, scope);
    return y;
  }
  launch_with_workspace(op, launch::gemm_4bit, launch::workspace_gemm_4bit, p, x, scope);
  return y;
}

Tensor gemm_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                 const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                 int64_t blocksize, const std::string& quant_type, const OptionalFloats& codebook,
                 const OptionalTensor& bias, const OptionalTensor& lora_S,
                 const OptionalTensor& lora_B) {
  constexpr const char* op = "gemm_4bit";
  const DeviceScope scope(x);
  check_matrix(op, shape);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, x);
  return gemm_forward(op, x, w, bias, lora_S, lora_B, scope);
}

std::tuple<Tensor, Tensor> lora_gemm_4bit(
    const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
    const OptionalTensor& mean, const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const OptionalTensor& bias, const OptionalTensor& lora_S) {
  constexpr const char* op = "lora_gemm_4bit";
  const DeviceScope scope(x);
  check_matrix(op, shape);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, x);
  check_input(op, x, w);
  as_lora_pair(op, lora_A, lora_B, w.view.N, w.view.K, x);
  as_scaling(op, scaling);
  // An op must not return its input, and the caller already has S.
  if (lora_S) {
    return {gemm_forward(op, x, w, bias, lora_S, lora_B, scope),
            empty(op, "S", {0}, ScalarType::Float, x)};
  }
  const Tensor S = shrink(op, x, lora_A, scaling, scope);
  return {gemm_forward(op, x, w, bias, S, lora_B, scope), S};
}

}  // namespace qlora_ext::host
