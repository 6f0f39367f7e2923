// y = x W^T + bias and dX = dY W with a dense, frozen W: checks, allocation, params.
//
// Only the CPU backend has these ops. They are in a header, which its register.cpp includes: every
// backend compiles the .cpp files of this folder, and CUDA has no launchers for them.
#pragma once

#include "common.h"

namespace qlora_ext::host {

// A dense [N, K] weight whose columns (or rows, for the backward) match x's last dimension.
inline Dense as_matrix(const char* op, const Tensor& weight, const char* arg, const Rows& rows,
                       int dim, const Tensor& x) {
  check_tensor(op, "weight", weight);
  QLORA_CHECK(weight.dim() == 2, op, "weight has shape ", list_string(weight.sizes()),
              ", want [N, K]");
  QLORA_CHECK(weight.size(dim) == rows.cols, op, arg, " has ", rows.cols, " columns, want ",
              weight.size(dim), " for a weight of ", list_string(weight.sizes()));
  return as_dense(op, "weight", weight, {weight.size(0), weight.size(1)}, x);
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* op = "linear";
  const DeviceScope scope(x);
  const Rows rows = as_rows(op, "x", x);
  const Dense W = as_matrix(op, weight, "x", rows, 1, x);
  LinearParams p{};
  p.x = rows.data;
  p.weight = W.data;
  p.M = rows.rows;
  p.N = weight.size(0);
  p.K = rows.cols;
  p.x_stride = rows.stride;
  p.dtype = rows.dtype;
  p.weight_dtype = W.dtype;
  Dense dense_bias;
  if (bias) {
    dense_bias = as_dense(op, "bias", *bias, {p.N}, x);
    p.bias = dense_bias.data;
    p.bias_dtype = dense_bias.dtype;
  }
  const Tensor y = empty(op, "y", replace_last(x, p.N), x.scalar_type(), x);
  p.y = y.data_ptr();
  if (y.numel() == 0) return y;
  launch_with_workspace(op, launch::linear, launch::workspace_linear, p, x, scope);
  return y;
}

inline Tensor linear_backward(const Tensor& dY, const Tensor& weight) {
  constexpr const char* op = "linear_backward";
  const DeviceScope scope(dY);
  const Rows rows = as_rows(op, "dY", dY);
  const Dense W = as_matrix(op, weight, "dY", rows, 0, dY);
  LinearBackwardParams p{};
  p.dY = rows.data;
  p.weight = W.data;
  p.M = rows.rows;
  p.N = rows.cols;
  p.K = weight.size(1);
  p.dY_stride = rows.stride;
  p.dtype = rows.dtype;
  p.weight_dtype = W.dtype;
  const Tensor dX = empty(op, "dX", replace_last(dY, p.K), dY.scalar_type(), dY);
  p.dX = dX.data_ptr();
  if (dX.numel() == 0) return dX;
  launch_with_workspace(op, launch::linear_backward, launch::workspace_linear_backward, p, dY,
                        scope);
  return dX;
}

}  // namespace qlora_ext::host
