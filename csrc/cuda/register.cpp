// Registers the CUDA backend and defines what host/common.h needs from a backend. This is a shared
// library of its own, loaded only if torch.version.cuda is set: a CPU-only torch lacks the symbols
// that it links to.
#define USE_CUDA  // without it the shim does not declare its CUDA functions
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "../host/common.h"
#include "cuda/launch.cuh"
#include "cuda/stream_workspace.h"

namespace qlora_ext::host {

DeviceScope::DeviceScope(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  CUDAGuardHandle guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard));
  guard_ = guard;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream_);
  if (error != AOTI_TORCH_SUCCESS) aoti_torch_delete_cuda_guard(guard);  // no destructor will run
  TORCH_ERROR_CODE_CHECK(error);
}

DeviceScope::~DeviceScope() { aoti_torch_delete_cuda_guard(static_cast<CUDAGuardHandle>(guard_)); }

bool DeviceScope::is_capturing() const { return stream_is_capturing(stream_); }

int64_t DeviceScope::read(const Tensor& flag) const {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor on_host = torch::stable::to(flag, cpu);
  return *static_cast<const int64_t*>(on_host.data_ptr());
}

const int32_t* host_values(const Tensor&) { return nullptr; }

void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
               double beta) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
}

namespace {

// Makes `stream` torch's current one on the current device.
struct StreamScope {
  StreamScope(const char* op, void* stream) {
    QLORA_CHECK(
        aoti_torch_get_current_device_index(&device) == AOTI_TORCH_SUCCESS &&
            aoti_torch_create_cuda_stream_guard(stream, device, &guard) == AOTI_TORCH_SUCCESS,
        op, "torch could not make the stream current, want a stream of the current GPU");
  }
  ~StreamScope() { aoti_torch_delete_cuda_stream_guard(guard); }
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

  int32_t device = 0;
  CUDAStreamGuardHandle guard = nullptr;
};

}  // namespace

Tensor stream_workspace(const char* op, int64_t bytes, void* stream) {
  const StreamScope scope(op, stream);
  const int64_t stride = 1;
  AtenTensorHandle memory;
  const AOTITorchError error =
      aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                               aoti_torch_device_type_cuda(), scope.device, &memory);
  QLORA_CHECK(error == AOTI_TORCH_SUCCESS, op, "torch could not allocate ", bytes,
              " bytes for its workspace, want more free memory");
  return Tensor(memory);
}

}  // namespace qlora_ext::host

STABLE_TORCH_LIBRARY_IMPL(qlora_ext, CUDA, m) { qlora_ext::host::register_ops(m); }
