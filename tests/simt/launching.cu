// csrc/cuda/launch.cuh itself, not its twin, over a CUDA runtime that only notes what it is asked:
// which calls a launch makes, and what it says when one fails (test_simt_launching.py).
//
//     launching SCENARIO [CALL=ERROR ...]     CALL fails with cudaError_t number ERROR; CALL `kernel`:
//                                             what was launched does, at the next synchronization
//
// Prints what each launch returned, then the calls in their order.
#include "../../csrc/cuda/launch.cuh"

#include <cstring>
#include <map>
#include <vector>

namespace {

std::vector<std::string> calls;
std::map<std::string, int> errors;
int device = 0;
bool capturing = false;
bool launched = false;

cudaError_t called(const std::string& call) {
  calls.push_back(call);
  const auto found = errors.find(call.substr(0, call.find(' ')));
  return found == errors.end() ? cudaSuccess : static_cast<cudaError_t>(found->second);
}

}  // namespace

// The functions of the runtime that launch.cuh may link to; another one is an error at link.
extern "C" {
cudaError_t cudaGetDevice(int* d) { return *d = device, called("cudaGetDevice"); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor       ? 0
           : attribute == cudaDevAttrMultiProcessorCount          ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                                                                  : 50 << 20;
  return called("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->sharedSizeBytes = 1024;
  return called("cudaFuncGetAttributes");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return called("cudaFuncSetAttribute " + std::to_string(value));
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** arguments, size_t bytes,
                             cudaStream_t stream) {
  launched = true;
  return called("cudaLaunchKernel grid " + std::to_string(grid.x) + " block " +
                std::to_string(block.x) + " shared " + std::to_string(bytes) + " stream " +
                std::to_string(reinterpret_cast<uintptr_t>(stream)) + " argument " +
                std::to_string(*static_cast<int*>(arguments[0])));
}
cudaError_t cudaMemsetAsync(void*, int value, size_t bytes, cudaStream_t stream) {
  return called("cudaMemsetAsync " + std::to_string(value) + " bytes " + std::to_string(bytes) +
                " stream " + std::to_string(reinterpret_cast<uintptr_t>(stream)));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return called("cudaStreamIsCapturing");
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  const cudaError_t error = called("cudaStreamSynchronize");
  return launched && errors.count("kernel") ? static_cast<cudaError_t>(errors["kernel"]) : error;
}
cudaError_t cudaGetLastError() { return called("cudaGetLastError"); }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "cudaErrorIllegalAddress" : "cudaErrorOther";
}
const char* cudaGetErrorString(cudaError_t) { return "as the runtime words it"; }
}

namespace qlora_ext {

template <int kTiles>
__global__ void product(int) {}

}  // namespace qlora_ext

int main(int argc, char** argv) {
  using namespace qlora_ext;
  const std::string scenario = argc > 1 ? argv[1] : "";
  for (int i = 2; i < argc; ++i) {
    const char* equals = std::strchr(argv[i], '=');
    if (equals != nullptr) errors[std::string(argv[i], equals - argv[i])] = std::atoi(equals + 1);
  }
  void* const stream = reinterpret_cast<void*>(uintptr_t{7});
  const auto launch = [&](unsigned grid, size_t shared_bytes) {
    const char* sentence = launch_kernel<product<4>>(grid, 256, shared_bytes, stream, 5);
    std::printf("%s\n", sentence == nullptr ? "null" : sentence);
  };
  if (scenario == "launch") {
    launch(3, 1000);
  } else if (scenario == "empty") {
    launch(0, 1000);
  } else if (scenario == "capture") {
    capturing = true;
    launch(3, 1000);
  } else if (scenario == "devices") {  // much shared memory: twice on each of two devices
    for (device = 0; device < 2; ++device) {
      launch(3, 100000);
      launch(3, 90000);
    }
  } else if (scenario == "workspace") {
    char memory[256];
    const char* sentence = initialize_in_debug(memory, sizeof memory, stream);
    std::printf("%s\n", sentence == nullptr ? "null" : sentence);
  } else if (scenario == "properties") {
    for (int i = 0; i < 2; ++i) {
      const DeviceInfo& info = device_info();
      std::printf("%d %d %d %lld\n", info.arch, info.sm_count, info.shared_bytes,
                  static_cast<long long>(info.l2_bytes));
    }
  } else {
    return 2;
  }
  std::printf("--\n");
  for (const std::string& call : calls) std::printf("%s\n", call.c_str());
  return 0;
}
