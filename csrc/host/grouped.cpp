// The ops of a mixture of experts: the products of gemm_4bit.cpp, gemm_4bit_backward.cpp and lora.cpp
// with one weight for each group of rows.
#include <limits>

#include "common.h"

namespace qlora_ext::host {

namespace {

const int32_t* as_int32(const char* op, const char* arg, const Tensor& tensor, const char* meaning,
                        const Tensor& device_of, Tensor& keep) {
  check_tensor(op, arg, tensor);
  QLORA_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1, op, arg, " has dtype ",
              dtype_name(tensor.scalar_type()), " and shape ", list_string(tensor.sizes()),
              ", want int32 ", meaning);
  check_same_device(op, arg, tensor, device_of);
  keep = contiguous(op, arg, tensor, 4);
  return static_cast<const int32_t*>(keep.data_ptr());
}

// Ends of ranges in [0, limit]. On a GPU the values are not known here; kernels cut them.
void check_ends(const char* op, const char* arg, const Tensor& ends, int64_t limit,
                const char* limit_of) {
  const int32_t* values = host_values(ends);
  if (values == nullptr) return;
  int64_t before = 0;
  for (int64_t i = 0; i < ends.numel(); ++i) {
    QLORA_CHECK(values[i] >= before && values[i] <= limit, op, arg, "[", i, "] is ", values[i],
                i > 0 ? " after " : "", i > 0 ? std::to_string(before) : "",
                ", want ends from 0 to ", limit, " (", limit_of, ") that never decrease");
    before = values[i];
  }
}

// Indices in [0, limit). On a GPU the values are not known here; kernels read zeros instead.
void check_indices(const char* op, const char* arg, const Tensor& indices, int64_t limit,
                   const char* limit_of) {
  const int32_t* values = host_values(indices);
  if (values == nullptr) return;
  for (int64_t i = 0; i < indices.numel(); ++i) {
    QLORA_CHECK(values[i] >= 0 && values[i] < limit, op, arg, "[", i, "] is ", values[i],
                ", want indices in [0, ", limit, ") (", limit_of, ")");
  }
}

// The groups of M sorted rows, checked.
struct GroupTensors {
  Groups view;
  Tensor offsets;
  Tensor rows;
};

GroupTensors as_groups(const char* op, int64_t E, int64_t T, const Tensor& offsets,
                       const OptionalTensor& rows, const Tensor& device_of) {
  GroupTensors groups;
  groups.view.offsets = as_int32(op, "offsets", offsets, "[E], the end of each expert's rows",
                                 device_of, groups.offsets);
  QLORA_CHECK(offsets.size(0) == E, op, "offsets has ", offsets.size(0), " ends, want ", E,
              ", one for each expert");
  groups.view.E = E;
  groups.view.T = T;
  groups.view.M = T;
  groups.view.rows = nullptr;
  if (rows) {
    groups.view.rows =
        as_int32(op, "rows", *rows, "[M], the row of x that each takes", device_of, groups.rows);
    groups.view.M = rows->size(0);
    check_indices(op, "rows", groups.rows, T, "the rows of x");
  }
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  QLORA_CHECK(T <= most && groups.view.M <= most, op, "x has ", T, " rows and the result ",
              groups.view.M, ", want at most ", most, " in one call");
  check_ends(op, "offsets", groups.offsets, groups.view.M, "the number of sorted rows");
  return groups;
}

// [rows, columns] of a matrix argument.
Rows as_matrix(const char* op, const char* arg, const Tensor& x, int64_t columns) {
  const Rows rows = as_rows(op, arg, x);
  QLORA_CHECK(x.dim() == 2 && (columns < 0 || rows.cols == columns), op, arg, " has shape ",
              list_string(x.sizes()), ", want [rows, ",
              columns < 0 ? std::string("columns") : std::to_string(columns), "]");
  return rows;
}

// S or dS: fp32 [M, R].
Rows as_rank_matrix(const char* op, const char* arg, const Tensor& S, int64_t M, int64_t R,
                    const Tensor& device_of) {
  const Rows rows = as_rank_rows(op, arg, S, M, R, device_of);
  QLORA_CHECK(S.dim() == 2, op, arg, " has shape ", list_string(S.sizes()), ", want [", M, ", ", R,
              "]");
  return rows;
}

Tensor gemm_forward(const char* op, const Tensor& x, const Stack& w, const Tensor& offsets,
                    const OptionalTensor& rows, const OptionalTensor& bias,
                    const OptionalTensor& lora_S, const OptionalTensor& lora_B,
                    const DeviceScope& scope) {
  const int64_t E = w.view.E, N = w.view.first.N;
  const Rows x_rows = as_matrix(op, "x", x, w.view.first.K);
  const GroupTensors groups = as_groups(op, E, x_rows.rows, offsets, rows, x);
  GroupedGemm4bitParams p{};
  p.weight = w.view;
  p.groups = groups.view;
  p.x = x_rows.data;
  p.x_stride = x_rows.stride;
  p.dtype = x_rows.dtype;
  Dense dense_bias, dense_B;
  if (bias) {
    dense_bias = as_dense(op, "bias", *bias, {E, N}, x);
    p.bias = dense_bias.data;
    p.bias_dtype = dense_bias.dtype;
  }
  check_both(op, "lora_S", lora_S, "lora_B", lora_B);
  Rows rows_S;
  if (lora_S) {
    dense_B = as_dense(op, "lora_B", *lora_B, {E, N, kAnyRank}, x);
    p.R = lora_B->size(2);
    rows_S = as_rank_matrix(op, "lora_S", *lora_S, p.groups.M, p.R, x);
    p.lora_S = static_cast<const float*>(rows_S.data);
    p.lora_B = dense_B.data;
    p.S_stride = rows_S.stride;
    p.lora_dtype = dense_B.dtype;
  }
  const Tensor y = empty(op, "y", {p.groups.M, N}, x.scalar_type(), x);
  p.y = y.data_ptr();
  if (y.numel() == 0) return y;
  launch_with_workspace(op, launch::grouped_gemm_4bit, launch::workspace_grouped_gemm_4bit, p, x,
                        scope);
  return y;
}

Tensor gemm_backward(const char* op, const Tensor& dY, const Stack& w, const Tensor& offsets,
                     const OptionalTensor& lora_dS, const OptionalTensor& lora_A,
                     const DeviceScope& scope) {
  const int64_t E = w.view.E, K = w.view.first.K;
  const Rows rows = as_matrix(op, "dY", dY, w.view.first.N);
  const GroupTensors groups = as_groups(op, E, rows.rows, offsets, std::nullopt, dY);
  GroupedGemm4bitBackwardParams p{};
  p.weight = w.view;
  p.groups = groups.view;
  p.dY = rows.data;
  p.dY_stride = rows.stride;
  p.dtype = rows.dtype;
  check_both(op, "lora_dS", lora_dS, "lora_A", lora_A);
  Dense dense_A;
  Tensor dense_dS;
  if (lora_dS) {
    dense_A = as_dense(op, "lora_A", *lora_A, {E, kAnyRank, K}, dY);
    p.R = lora_A->size(1);
    const Rows rows_dS = as_rank_matrix(op, "lora_dS", *lora_dS, p.groups.M, p.R, dY);
    dense_dS = contiguous(op, "lora_dS", rows_dS.tensor, 4);
    p.lora_dS = static_cast<const float*>(dense_dS.data_ptr());
    p.lora_A = dense_A.data;
    p.lora_dtype = dense_A.dtype;
  }
  const Tensor dX = empty(op, "dX", {p.groups.M, K}, dY.scalar_type(), dY);
  p.dX = dX.data_ptr();
  if (dX.numel() == 0) return dX;
  launch_with_workspace(op, launch::grouped_gemm_4bit_backward,
                        launch::workspace_grouped_gemm_4bit_backward, p, dY, scope);
  return dX;
}

Tensor shrink(const char* op, const Tensor& x, const Tensor& lora_A, double scaling,
              const Tensor& offsets, const OptionalTensor& rows, const DeviceScope& scope) {
  check_tensor(op, "offsets", offsets);
  const Rows x_rows = as_matrix(op, "x", x, -1);
  const Dense A = as_dense(op, "lora_A", lora_A, {offsets.numel(), kAnyRank, x_rows.cols}, x);
  const GroupTensors groups = as_groups(op, lora_A.size(0), x_rows.rows, offsets, rows, x);
  GroupedLoraShrinkParams p{};
  p.groups = groups.view;
  p.x = x_rows.data;
  p.lora_A = A.data;
  p.R = lora_A.size(1);
  p.K = x_rows.cols;
  p.x_stride = x_rows.stride;
  p.scaling = as_scaling(op, scaling);
  p.dtype = x_rows.dtype;
  p.lora_dtype = A.dtype;
  const Tensor S = empty(op, "S", {p.groups.M, p.R}, ScalarType::Float, x);
  p.S = static_cast<float*>(S.data_ptr());
  if (S.numel() == 0) return S;
  launch_with_workspace(op, launch::grouped_lora_shrink, launch::workspace_grouped_lora_shrink, p,
                        x, scope);
  return S;
}

std::tuple<Tensor, Tensor> shrink_backward(const char* op, const Tensor& dS, const Tensor& x,
                                           const Tensor& lora_A, double scaling,
                                           const Tensor& offsets, const OptionalTensor& rows,
                                           bool need_dx, const DeviceScope& scope) {
  check_tensor(op, "offsets", offsets);
  const Rows x_rows = as_matrix(op, "x", x, -1);
  const int64_t K = x_rows.cols;
  const Dense A = as_dense(op, "lora_A", lora_A, {offsets.numel(), kAnyRank, K}, x);
  const GroupTensors groups = as_groups(op, lora_A.size(0), x_rows.rows, offsets, rows, x);
  GroupedLoraShrinkBackwardParams p{};
  p.groups = groups.view;
  p.R = lora_A.size(1);
  const Rows dS_rows = as_rank_matrix(op, "dS", dS, p.groups.M, p.R, x);
  const Tensor dense_dS = contiguous(op, "dS", dS_rows.tensor, 4);
  p.dS = static_cast<const float*>(dense_dS.data_ptr());
  p.x = x_rows.data;
  p.lora_A = A.data;
  p.K = K;
  p.x_stride = x_rows.stride;
  p.scaling = as_scaling(op, scaling);
  p.dtype = x_rows.dtype;
  p.lora_dtype = A.dtype;
  const Tensor dx = empty(op, "dx", need_dx ? Ints{p.groups.M, K} : Ints{0}, x.scalar_type(), x);
  const Tensor dA = empty(op, "dA", {p.groups.E, p.R, K}, lora_A.scalar_type(), x);
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dA = dA.data_ptr();
  if (p.groups.M == 0 || p.R == 0 || K == 0) {
    fill_zeros(dx);
    fill_zeros(dA);
    return {dx, dA};
  }
  launch_with_workspace(op, launch::grouped_lora_shrink_backward,
                        launch::workspace_grouped_lora_shrink_backward, p, x, scope);
  return {dx, dA};
}

std::tuple<Tensor, Tensor> expand_backward(const char* op, const Tensor& dY, const Tensor& lora_S,
                                           const Tensor& lora_B, double scaling,
                                           const Tensor& offsets, const DeviceScope& scope) {
  check_tensor(op, "offsets", offsets);
  const Rows rows = as_matrix(op, "dY", dY, -1);
  const int64_t N = rows.cols;
  const Dense B = as_dense(op, "lora_B", lora_B, {offsets.numel(), N, kAnyRank}, dY);
  const GroupTensors groups = as_groups(op, lora_B.size(0), rows.rows, offsets, std::nullopt, dY);
  GroupedLoraExpandBackwardParams p{};
  p.groups = groups.view;
  p.R = lora_B.size(2);
  const Rows S = as_rank_matrix(op, "lora_S", lora_S, p.groups.M, p.R, dY);
  p.dY = rows.data;
  p.S = static_cast<const float*>(S.data);
  p.lora_B = B.data;
  p.N = N;
  p.dY_stride = rows.stride;
  p.S_stride = S.stride;
  p.scaling = as_scaling(op, scaling);
  p.dtype = rows.dtype;
  p.lora_dtype = B.dtype;
  const Tensor dS = empty(op, "dS", {p.groups.M, p.R}, ScalarType::Float, dY);
  const Tensor dB = empty(op, "dB", {p.groups.E, N, p.R}, lora_B.scalar_type(), dY);
  p.dS = static_cast<float*>(dS.data_ptr());
  p.dB = dB.data_ptr();
  if (p.groups.M == 0 || p.R == 0 || N == 0) {
    fill_zeros(dS);
    fill_zeros(dB);
    return {dS, dB};
  }
  launch_with_workspace(op, launch::grouped_lora_expand_backward,
                        launch::workspace_grouped_lora_expand_backward, p, dY, scope);
  return {dS, dB};
}

// lora_A [E, r, K] and lora_B [E, N, r] of one dtype, r of 1 or more.
void check_pair(const char* op, const Tensor& lora_A, const Tensor& lora_B, const PackedStack& w,
                const Tensor& device_of) {
  const Dense A = as_dense(op, "lora_A", lora_A, {w.E, kAnyRank, w.first.K}, device_of);
  const int64_t R = lora_A.size(1);
  QLORA_CHECK(R > 0, op, "lora_A has rank 0, want [", w.E, ", r, ", w.first.K,
              "] with r of 1 or more");
  const Dense B = as_dense(op, "lora_B", lora_B, {w.E, w.first.N, R}, device_of);
  QLORA_CHECK(A.dtype == B.dtype, op, "lora_B has dtype ", dtype_name(lora_B.scalar_type()),
              ", want lora_A's ", dtype_name(lora_A.scalar_type()));
}

}  // namespace

Tensor grouped_gemm_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& nested, const OptionalTensor& mean,
                         const Ints& shape, int64_t blocksize, const std::string& quant_type,
                         const OptionalFloats& codebook, const Tensor& offsets,
                         const OptionalTensor& rows, const OptionalTensor& bias,
                         const OptionalTensor& lora_S, const OptionalTensor& lora_B) {
  constexpr const char* op = "grouped_gemm_4bit";
  const DeviceScope scope(x);
  const Stack w =
      as_stack(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, x);
  return gemm_forward(op, x, w, offsets, rows, bias, lora_S, lora_B, scope);
}

Tensor grouped_gemm_4bit_backward(const Tensor& dY, const Tensor& packed, const Tensor& absmax,
                                  const OptionalTensor& nested, const OptionalTensor& mean,
                                  const Ints& shape, int64_t blocksize,
                                  const std::string& quant_type, const OptionalFloats& codebook,
                                  const Tensor& offsets, const OptionalTensor& lora_dS,
                                  const OptionalTensor& lora_A) {
  constexpr const char* op = "grouped_gemm_4bit_backward";
  const DeviceScope scope(dY);
  const Stack w =
      as_stack(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, dY);
  return gemm_backward(op, dY, w, offsets, lora_dS, lora_A, scope);
}

Tensor grouped_lora_shrink(const Tensor& x, const Tensor& lora_A, double scaling,
                           const Tensor& offsets, const OptionalTensor& rows) {
  const DeviceScope scope(x);
  return shrink("grouped_lora_shrink", x, lora_A, scaling, offsets, rows, scope);
}

std::tuple<Tensor, Tensor> grouped_lora_shrink_backward(const Tensor& dS, const Tensor& x,
                                                        const Tensor& lora_A, double scaling,
                                                        const Tensor& offsets,
                                                        const OptionalTensor& rows, bool need_dx) {
  const DeviceScope scope(x);
  return shrink_backward("grouped_lora_shrink_backward", dS, x, lora_A, scaling, offsets, rows,
                         need_dx, scope);
}

std::tuple<Tensor, Tensor> grouped_lora_expand_backward(const Tensor& dY, const Tensor& lora_S,
                                                        const Tensor& lora_B,
                                                        const Tensor& offsets) {
  const DeviceScope scope(dY);
  return expand_backward("grouped_lora_expand_backward", dY, lora_S, lora_B, 1.0, offsets, scope);
}

std::tuple<Tensor, Tensor> grouped_lora_gemm_4bit(
    const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
    const OptionalTensor& mean, const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const Tensor& offsets, const OptionalTensor& rows, const OptionalTensor& bias) {
  constexpr const char* op = "grouped_lora_gemm_4bit";
  const DeviceScope scope(x);
  const Stack w =
      as_stack(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, x);
  as_matrix(op, "x", x, w.view.first.K);
  check_pair(op, lora_A, lora_B, w.view, x);
  const Tensor S = shrink(op, x, lora_A, scaling, offsets, rows, scope);
  return {gemm_forward(op, x, w, offsets, rows, bias, S, lora_B, scope), S};
}

std::tuple<Tensor, Tensor, Tensor> grouped_lora_gemm_4bit_backward(
    const Tensor& dY, const Tensor& x, const Tensor& lora_S, const Tensor& packed,
    const Tensor& absmax, const OptionalTensor& nested, const OptionalTensor& mean,
    const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const Tensor& offsets, const OptionalTensor& rows, bool need_dx) {
  constexpr const char* op = "grouped_lora_gemm_4bit_backward";
  const DeviceScope scope(dY);
  const Stack w =
      as_stack(op, packed, absmax, nested, mean, shape, blocksize, quant_type, codebook, dY);
  check_pair(op, lora_A, lora_B, w.view, dY);
  as_matrix(op, "x", x, w.view.first.K);
  check_same_device(op, "x", x, dY);
  const int64_t M = rows ? rows->numel() : x.size(0);
  QLORA_CHECK(as_matrix(op, "dY", dY, w.view.first.N).rows == M, op, "dY has shape ",
              list_string(dY.sizes()), ", want ", M, " rows like ", rows ? "`rows`" : "x");
  // S includes the scaling, so dB = dY^T S is final. The dS returned is the gradient of x A^T.
  const auto [dS, dB] = expand_backward(op, dY, lora_S, lora_B, scaling, offsets, scope);
  const auto [no_dx, dA] =
      shrink_backward(op, dS, x, lora_A, 1.0, offsets, rows, /*need_dx=*/false, scope);
  if (!need_dx) return {empty(op, "dX", {0}, dY.scalar_type(), dY), dA, dB};
  return {gemm_backward(op, dY, w, offsets, dS, lora_A, scope), dA, dB};
}

Tensor sum_rows(const Tensor& values, const Tensor& order, const Tensor& ends) {
  constexpr const char* op = "sum_rows";
  const DeviceScope scope(values);
  const Rows rows = as_matrix(op, "values", values, -1);
  Tensor keep_order, keep_ends;
  SumRowsParams p{};
  p.order = as_int32(op, "order", order, "[L], rows of values", values, keep_order);
  p.ends =
      as_int32(op, "ends", ends, "[T], the end of each sum's part of order", values, keep_ends);
  p.values = rows.data;
  p.M = rows.rows;
  p.L = order.size(0);
  p.T = ends.size(0);
  p.K = rows.cols;
  p.values_stride = rows.stride;
  p.dtype = rows.dtype;
  check_indices(op, "order", keep_order, p.M, "the rows of values");
  check_ends(op, "ends", keep_ends, p.L, "the size of order");
  const Tensor out = empty(op, "the result", {p.T, p.K}, values.scalar_type(), values);
  p.out = out.data_ptr();
  if (out.numel() == 0) return out;
  check_launch(op, launch::sum_rows(p, scope.stream()));
  return out;
}

}  // namespace qlora_ext::host
