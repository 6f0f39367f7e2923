// The checked halves that the plain and the LoRA ops share.
#pragma once

#include "common.h"

namespace qlora_ext::host {

Tensor gemm_forward(const char* op, const Tensor& x, const Weight& w, const OptionalTensor& bias,
                    const OptionalTensor& lora_S, const OptionalTensor& lora_B,
                    const DeviceScope& scope);

Tensor gemm_backward(const char* op, const Tensor& dY, const Weight& w,
                     const OptionalTensor& lora_dS, const OptionalTensor& lora_A,
                     const DeviceScope& scope);

// dS = scaling * dY * B, dB = dY^T * S.
std::tuple<Tensor, Tensor> expand_backward(const char* op, const Tensor& dY, const Tensor& lora_S,
                                           const Tensor& lora_B, double scaling,
                                           const DeviceScope& scope);

}  // namespace qlora_ext::host
