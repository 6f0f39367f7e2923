// Registers the product's ops a second time, as torch.ops.qlora_ext_simt.*: CPU tensors in, the
// CUDA kernels run by the emulated machine.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cuda/launch.cuh"
#include "host/common.h"
#include "schemas.h"

namespace qlora_ext::host {

DeviceScope::DeviceScope(const Tensor&) {}
DeviceScope::~DeviceScope() = default;
bool DeviceScope::is_capturing() const { return stream_is_capturing(stream_); }
int64_t DeviceScope::read(const Tensor& flag) const {
  QLORA_CHECK(!is_capturing(), "simt", "a synchronization while the stream is being captured");
  ++simt::stream().synchronizations;
  return *static_cast<const int64_t*>(flag.data_ptr());
}

void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
               double beta) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace qlora_ext::host

STABLE_TORCH_LIBRARY(qlora_ext_simt, m) {
  for (const char* schema : qlora_ext::kSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(qlora_ext_simt, CPU, m) { qlora_ext::host::register_ops(m); }
