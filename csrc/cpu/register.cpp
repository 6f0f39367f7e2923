// Registers the CPU backend and defines what host/common.h needs from a backend.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../host/common.h"
#include "../host/linear.h"

namespace qlora_ext::host {

DeviceScope::DeviceScope(const Tensor&) {}
DeviceScope::~DeviceScope() = default;
bool DeviceScope::is_capturing() const { return false; }
int64_t DeviceScope::read(const Tensor& flag) const {
  return *static_cast<const int64_t*>(flag.data_ptr());
}

const int32_t* host_values(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.data_ptr());
}

void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
               double beta) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace qlora_ext::host

STABLE_TORCH_LIBRARY_IMPL(qlora_ext, CPU, m) {
  qlora_ext::host::register_ops(m);
  m.impl("linear", TORCH_BOX(&qlora_ext::host::linear));
  m.impl("linear_backward", TORCH_BOX(&qlora_ext::host::linear_backward));
}
