// The ops that the CPU backend alone has, as host functions.
#pragma once

#include "../../host/ops.h"

namespace qlora_ext::host {

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Tensor linear_backward(const Tensor& dY, const Tensor& weight);

}  // namespace qlora_ext::host
