// Registers the product's ops a second time, as torch.ops.qlora_ext_simt.*: CPU tensors in, the
// CUDA kernels run by the emulated machine.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cuda/launch.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/stream_workspace.h"
#include "host/common.h"
#include "params.h"
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

const int32_t* host_values(const Tensor&) { return nullptr; }

void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
               double beta) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
}

Tensor stream_workspace(const char*, int64_t bytes, void*) {
  return torch::stable::empty({bytes}, ScalarType::Byte);
}

}  // namespace qlora_ext::host

STABLE_TORCH_LIBRARY(qlora_ext_simt, m) {
  for (const char* schema : qlora_ext::kSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(qlora_ext_simt, CPU, m) { qlora_ext::host::register_ops(m); }

// What dispatch decides for aligned operands of a shape on the device set now, nothing run:
// [0] parts that the contraction is cut into, [1] lines of W in a chunk for cuBLAS, or 0,
// [2] whether the last block of a tile adds the parts.
extern "C" __attribute__((visibility("default"))) void simt_plan(const char* op, int64_t M,
                                                                 int64_t N, int64_t K, int64_t R,
                                                                 int dtype, int64_t* plan) {
  using namespace qlora_ext;
  const auto type = static_cast<DType>(dtype);
  PackedWeight w{};
  w.N = N;
  w.K = K;
  w.blocksize = 64;
  w.num_blocks = N * K / 64;
  const std::string name = op;
  int64_t bytes = 0, numel = 1;
  plan[1] = plan[2] = 0;
  if (name == "gemm_4bit") {
    Gemm4bitParams p{};
    p.weight = w;
    p.M = M;
    p.x_stride = K;
    p.dtype = type;
    bytes = launch::workspace_gemm_4bit(p);
    plan[1] = launch::chunk_rows_gemm_4bit(p);
    numel = M * N;
  } else if (name == "gemm_4bit_backward") {
    Gemm4bitBackwardParams p{};
    p.weight = w;
    p.M = M;
    p.dY_stride = N;
    p.dtype = type;
    bytes = launch::workspace_gemm_4bit_backward(p);
    plan[1] = launch::chunk_columns_gemm_4bit_backward(p);
    numel = M * K;
  } else {
    const bool over_rows = name == "lora_shrink_backward";  // dA
    const int64_t length = over_rows ? K : M, depth = over_rows ? M : K;
    const LoraPlan lora = plan_lora_mma(length, R, depth);
    plan[0] = lora.parts;
    plan[2] = lora.arrivals > 0;
    return;
  }
  plan[0] = bytes > 0 ? bytes / 4 / numel : 1;  // the counted words are fewer: N >= 128
  plan[2] = bytes > plan[0] * numel * 4;
}
