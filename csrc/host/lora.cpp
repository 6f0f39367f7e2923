#include "gemm_4bit.h"

namespace qlora_ext::host {

LoraPair as_lora_pair(const char* op, const Tensor& lora_A, const Tensor& lora_B, int64_t N,
                      int64_t K, const Tensor& device_of) {
  LoraPair pair;
  pair.A = as_dense(op, "lora_A", lora_A, {kAnyRank, K}, device_of);
  pair.R = lora_A.size(0);
  QLORA_CHECK(pair.R > 0, op, "lora_A has rank 0, want [r, ", K, "] with r of 1 or more");
  pair.B = as_dense(op, "lora_B", lora_B, {N, pair.R}, device_of);
  QLORA_CHECK(pair.A.dtype == pair.B.dtype, op, "lora_B has dtype ",
              dtype_name(lora_B.scalar_type()), ", want lora_A's ",
              dtype_name(lora_A.scalar_type()));
  return pair;
}

Tensor shrink(const char* op, const Tensor& x, const Tensor& lora_A, double scaling,
              const DeviceScope& scope) {
  const Rows rows = as_rows(op, "x", x);
  const Dense A = as_dense(op, "lora_A", lora_A, {kAnyRank, rows.cols}, x);
  const int64_t R = lora_A.size(0);
  const Tensor S = empty(op, "S", replace_last(x, R), ScalarType::Float, x);
  LoraShrinkParams p{};
  p.x = rows.data;
  p.lora_A = A.data;
  p.S = static_cast<float*>(S.data_ptr());
  p.M = rows.rows;
  p.R = R;
  p.K = rows.cols;
  p.x_stride = rows.stride;
  p.scaling = as_scaling(op, scaling);
  p.dtype = rows.dtype;
  p.lora_dtype = A.dtype;
  if (S.numel() == 0) return S;
  launch_with_workspace(op, launch::lora_shrink, launch::workspace_lora_shrink, p, x, scope);
  return S;
}

Tensor lora_shrink(const Tensor& x, const Tensor& lora_A, double scaling) {
  const DeviceScope scope(x);
  return shrink("lora_shrink", x, lora_A, scaling, scope);
}

std::tuple<Tensor, Tensor> shrink_backward(const char* op, const Tensor& dS, const Tensor& x,
                                           const Tensor& lora_A, double scaling, bool need_dx,
                                           const DeviceScope& scope) {
  const Rows rows = as_rows(op, "x", x);
  const Dense A = as_dense(op, "lora_A", lora_A, {kAnyRank, rows.cols}, x);
  const int64_t R = lora_A.size(0);
  const Rows dS_rows = as_rank_rows(op, "dS", dS, rows.rows, R, x);
  const Tensor dense_dS = contiguous(op, "dS", dS_rows.tensor, 4);  // kernels take no strides of dS
  Tensor dA = empty(op, "dA", {R, rows.cols}, lora_A.scalar_type(), x);
  const Tensor dx =
      empty(op, "dx", need_dx ? replace_last(x, rows.cols) : Ints{0}, x.scalar_type(), x);
  LoraShrinkBackwardParams p{};
  p.dS = static_cast<const float*>(dense_dS.data_ptr());
  p.x = rows.data;
  p.lora_A = A.data;
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dA = dA.data_ptr();
  p.M = rows.rows;
  p.R = R;
  p.K = rows.cols;
  p.x_stride = rows.stride;
  p.scaling = as_scaling(op, scaling);
  p.dtype = rows.dtype;
  p.lora_dtype = A.dtype;
  if (p.M == 0 || p.R == 0 || p.K == 0) {
    fill_zeros(dA);
    fill_zeros(dx);
    return {dx, dA};
  }
  launch_with_workspace(op, launch::lora_shrink_backward, launch::workspace_lora_shrink_backward, p,
                        x, scope);
  return {dx, dA};
}

std::tuple<Tensor, Tensor> lora_shrink_backward(const Tensor& dS, const Tensor& x,
                                                const Tensor& lora_A, double scaling,
                                                bool need_dx) {
  const DeviceScope scope(x);
  return shrink_backward("lora_shrink_backward", dS, x, lora_A, scaling, need_dx, scope);
}

std::tuple<Tensor, Tensor> expand_backward(const char* op, const Tensor& dY, const Tensor& lora_S,
                                           const Tensor& lora_B, double scaling,
                                           const DeviceScope& scope) {
  const Rows rows = as_rows(op, "dY", dY);
  const Dense B = as_dense(op, "lora_B", lora_B, {rows.cols, kAnyRank}, dY);
  const int64_t R = lora_B.size(1);
  const Rows S = as_rank_rows(op, "lora_S", lora_S, rows.rows, R, dY);
  Tensor dS = empty(op, "dS", replace_last(dY, R), ScalarType::Float, dY);
  Tensor dB = empty(op, "dB", {rows.cols, R}, lora_B.scalar_type(), dY);
  LoraExpandBackwardParams p{};
  p.dY = rows.data;
  p.S = static_cast<const float*>(S.data);
  p.lora_B = B.data;
  p.dS = static_cast<float*>(dS.data_ptr());
  p.dB = dB.data_ptr();
  p.M = rows.rows;
  p.R = R;
  p.N = rows.cols;
  p.dY_stride = rows.stride;
  p.S_stride = S.stride;
  p.scaling = as_scaling(op, scaling);
  p.dtype = rows.dtype;
  p.lora_dtype = B.dtype;
  if (p.M == 0 || p.R == 0 || p.N == 0) {
    fill_zeros(dS);
    fill_zeros(dB);
    return {dS, dB};
  }
  launch_with_workspace(op, launch::lora_expand_backward, launch::workspace_lora_expand_backward, p,
                        dY, scope);
  return {dS, dB};
}

std::tuple<Tensor, Tensor> lora_expand_backward(const Tensor& dY, const Tensor& lora_S,
                                                const Tensor& lora_B) {
  const DeviceScope scope(dY);
  return expand_backward("lora_expand_backward", dY, lora_S, lora_B, 1.0, scope);
}

}  // namespace qlora_ext::host
