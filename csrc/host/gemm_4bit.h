// Shared by the plain and the LoRA ops. Each function takes the name of the op that the user
// called, for its error messages.
#pragma once

#include "common.h"

namespace qlora_ext::host {

// Checks that x's rows have the weight's K columns. Returns the number of rows.
int64_t check_input(const char* op, const Tensor& x, const Weight& w);

Tensor gemm_forward(const char* op, const Tensor& x, const Weight& w, const OptionalTensor& bias,
                    const OptionalTensor& lora_S, const OptionalTensor& lora_B,
                    const DeviceScope& scope);

Tensor gemm_backward(const char* op, const Tensor& dY, const Weight& w,
                     const OptionalTensor& lora_dS, const OptionalTensor& lora_A,
                     const DeviceScope& scope);

// S = scaling * x * A^T.
Tensor shrink(const char* op, const Tensor& x, const Tensor& lora_A, double scaling,
              const DeviceScope& scope);

// dx = scaling * dS * A (empty unless need_dx), dA = scaling * dS^T * x.
std::tuple<Tensor, Tensor> shrink_backward(const char* op, const Tensor& dS, const Tensor& x,
                                           const Tensor& lora_A, double scaling, bool need_dx,
                                           const DeviceScope& scope);

// dS = scaling * dY * B, dB = dY^T * S.
std::tuple<Tensor, Tensor> expand_backward(const char* op, const Tensor& dY, const Tensor& lora_S,
                                           const Tensor& lora_B, double scaling,
                                           const DeviceScope& scope);

}  // namespace qlora_ext::host
