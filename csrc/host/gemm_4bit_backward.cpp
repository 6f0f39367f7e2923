// dX = dY W + dS A, and for the LoRA op also dA and dB. W is decoded chunk by chunk; it is dense as
// a whole only if it fits in one chunk (heuristics.cuh).
#include "gemm_4bit.h"

namespace qlora_ext::host {

namespace {

// Decodes the weight a few columns at a time and lets torch's matmul multiply them. Each
// dX[:, columns] = dY * W[:, columns] is a whole sum, rounded once, or twice with a bypass.
void backward_in_chunks(const char* op, const Gemm4bitBackwardParams& p, int64_t chunk_columns,
                        const Rows& dY, const Tensor& dX, const Tensor& lora_dS,
                        const Tensor& lora_A, const DeviceScope& scope) {
  const ScalarType dtype = dY.tensor.scalar_type();
  const int64_t N = p.weight.N, K = p.weight.K;
  const Tensor dY2 = torch::stable::reshape(dY.tensor, {p.M, N});
  Tensor dX2 = torch::stable::view(dX, {p.M, K});
  Tensor chunk = empty(op, "a chunk of the weight", {N * std::min(chunk_columns, K)}, dtype, dX);
  Tensor dS, A;
  if (p.R > 0) {
    dS = torch::stable::to(torch::stable::reshape(lora_dS, {p.M, p.R}), dtype);
    A = torch::stable::to(lora_A, dtype);
  }
  for (int64_t begin = 0; begin < K; begin += chunk_columns) {
    const int64_t columns = std::min(chunk_columns, K - begin);
    const Dequantize4bitParams decode{.weight = p.weight,
                                      .row_begin = 0,
                                      .row_end = N,
                                      .out = chunk.data_ptr(),
                                      .dtype = p.dtype,
                                      .col_begin = begin,
                                      .col_end = begin + columns};
    check_launch(op, launch::dequantize_4bit(decode, scope.stream()));
    const Tensor W = torch::stable::view(narrow(chunk, 0, 0, N * columns), {N, columns});
    Tensor dX_columns = narrow(dX2, 1, begin, columns);
    addmm_out(dX_columns, dX_columns, dY2, W, 0.0);
    if (p.R == 0) continue;
    addmm_out(dX_columns, dX_columns, dS, narrow(A, 1, begin, columns), 1.0);
  }
}

}  // namespace

Tensor gemm_backward(const char* op, const Tensor& dY, const Weight& w,
                     const OptionalTensor& lora_dS, const OptionalTensor& lora_A,
                     const DeviceScope& scope) {
  const Rows rows = as_rows(op, "dY", dY);
  QLORA_CHECK(rows.cols == w.view.N, op, "dY has shape ", list_string(dY.sizes()), ", want [..., ",
              w.view.N, "] for a weight of [", w.view.N, ", ", w.view.K, "]");
  Gemm4bitBackwardParams p{};
  p.weight = w.view;
  p.dY = rows.data;
  p.M = rows.rows;
  p.dY_stride = rows.stride;
  p.dtype = rows.dtype;
  check_both(op, "lora_dS", lora_dS, "lora_A", lora_A);
  Dense dense_A;
  Tensor dense_dS;
  if (lora_dS) {
    dense_A = as_dense(op, "lora_A", *lora_A, {kAnyRank, p.weight.K}, dY);
    p.R = lora_A->size(0);
    const Rows rows_dS = as_rank_rows(op, "lora_dS", *lora_dS, p.M, p.R, dY);
    dense_dS = contiguous(op, "lora_dS", rows_dS.tensor, 4);
    p.lora_dS = static_cast<const float*>(dense_dS.data_ptr());
    p.lora_A = dense_A.data;
    p.lora_dtype = dense_A.dtype;
  }
  Tensor dX = empty(op, "dX", replace_last(dY, p.weight.K), dY.scalar_type(), dY);
  p.dX = dX.data_ptr();
  if (dX.numel() == 0) return dX;
  if (const int64_t columns = p.weight.N > 0 ? launch::chunk_columns_gemm_4bit_backward(p) : 0) {
    backward_in_chunks(op, p, columns, rows, dX, dense_dS, dense_A.tensor, scope);
    return dX;
  }
  launch_with_workspace(op, launch::gemm_4bit_backward, launch::workspace_gemm_4bit_backward, p, dY,
                        scope);
  return dX;
}

Tensor gemm_4bit_backward(const Tensor& dY, const Tensor& packed, const Tensor& absmax,
                          const OptionalTensor& nested, const OptionalTensor& mean,
                          const Ints& shape, int64_t blocksize, const std::string& quant_type,
                          const OptionalFloats& codebook, const OptionalTensor& lora_dS,
                          const OptionalTensor& lora_A) {
  constexpr const char* op = "gemm_4bit_backward";
  const DeviceScope scope(dY);
  check_matrix(op, shape);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, dY);
  return gemm_backward(op, dY, w, lora_dS, lora_A, scope);
}

std::tuple<Tensor, Tensor, Tensor> lora_gemm_4bit_backward(
    const Tensor& dY, const Tensor& x, const Tensor& lora_S, const Tensor& packed,
    const Tensor& absmax, const OptionalTensor& nested, const OptionalTensor& mean,
    const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    bool need_dx) {
  constexpr const char* op = "lora_gemm_4bit_backward";
  const DeviceScope scope(dY);
  check_matrix(op, shape);
  const Weight w =
      as_weight(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, dY);
  const int64_t x_rows = check_input(op, x, w);
  check_same_device(op, "x", x, dY);
  const int64_t dY_rows = check_rows(op, "dY", dY);
  QLORA_CHECK(x_rows == dY_rows, op, "x has shape ", list_string(x.sizes()), ", want the ", dY_rows,
              " rows of dY, which has shape ", list_string(dY.sizes()));
  as_lora_pair(op, lora_A, lora_B, w.view.N, w.view.K, dY);
  // S includes the scaling, so dB = dY^T S is final. The dS returned is the gradient of x A^T.
  const auto [dS, dB] = expand_backward(op, dY, lora_S, lora_B, scaling, scope);
  const auto [no_dx, dA] = shrink_backward(op, dS, x, lora_A, 1.0, /*need_dx=*/false, scope);
  if (!need_dx) return {empty(op, "dX", {0}, dY.scalar_type(), dY), dA, dB};
  return {gemm_backward(op, dY, w, dS, lora_A, scope), dA, dB};
}

}  // namespace qlora_ext::host
