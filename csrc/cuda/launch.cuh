// Kernels are launched only by launch_kernel<kernel>(grid, block, shared bytes, stream, params...),
// which checks every status and returns null or an error that names the kernel. device_info() tells
// dispatch about the current device. tests/simt/include/cuda/launch.cuh is the host twin.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace qlora_ext {

// Properties that dispatch reads; cached per device.
struct DeviceInfo {
  int arch = 0;          // 10 * major + minor; 0 if the device could not be read
  int sm_count = 1;      // never 0, so that a launch happens and reports the error
  int shared_bytes = 0;  // most shared memory that one block may have
  int64_t l2_bytes = 0;
};

namespace detail {

// The returned text lives until this thread's next failed launch.
inline const char* launch_error(const std::string& what, const char* call, cudaError_t status) {
  static thread_local std::string message;
  message = what + ": " + call + " failed: " + cudaGetErrorName(status) + " (" +
            cudaGetErrorString(status) + ")";
  if (status == cudaErrorNoKernelImageForDevice) {
    message +=
        ". qlora_ext was built for other GPUs: build it again on a machine with this one, or "
        "with its compute capability in TORCH_CUDA_ARCH_LIST";
  }
  return message.c_str();
}

inline constexpr int kMaxDevices = 64;

inline DeviceInfo read_device(int device) {
  DeviceInfo info;
  int major = 0, minor = 0, l2_bytes = 0;
  const bool read =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&info.sm_count, cudaDevAttrMultiProcessorCount, device) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&info.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device) == cudaSuccess;
  if (!read) return DeviceInfo{};  // arch 0: the launch that follows reports the real error
  info.arch = 10 * major + minor;
  info.l2_bytes = l2_bytes;
  return info;
}

// QLORA_EXT_DEBUG=1: synchronize and check before and after each launch, except under capture, when
// nothing runs.
inline bool debug_launches() {
  static const bool debug = [] {
    const char* value = std::getenv("QLORA_EXT_DEBUG");
    return value != nullptr && value[0] != '\0' && value[0] != '0';
  }();
  return debug;
}

// "gemm_4bit_fused<Sm80, __half, 4, true>" from the compiler's own name of this function.
template <auto kernel>
std::string kernel_name() {
  const std::string name = __PRETTY_FUNCTION__;
  const size_t begin = name.find("kernel = ");
  const size_t end = name.find_first_of(";]", begin);
  if (begin == std::string::npos || end == std::string::npos) return name;
  std::string kernel_name = name.substr(begin + 9, end - begin - 9);
  const std::string scope = "qlora_ext::";
  for (size_t at; (at = kernel_name.find(scope)) != std::string::npos;) {
    kernel_name.erase(at, scope.size());
  }
  return kernel_name;
}

}  // namespace detail

inline const DeviceInfo& device_info() {
  static std::array<std::atomic<const DeviceInfo*>, detail::kMaxDevices> cache{};
  static const DeviceInfo unknown;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= detail::kMaxDevices) {
    return unknown;
  }
  const DeviceInfo* info = cache[device].load(std::memory_order_acquire);
  if (info != nullptr) return *info;
  const DeviceInfo* fresh = new DeviceInfo(detail::read_device(device));  // never freed
  if (cache[device].compare_exchange_strong(info, fresh)) return *fresh;
  delete fresh;  // another thread was first
  return *info;
}

// Whether the stream (a cudaStream_t) is being captured into a graph. Also true for the legacy
// stream while another one is being captured: CUDA then answers with an error.
inline bool stream_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

// Under QLORA_EXT_DEBUG=1 fills memory that a kernel may read before anything wrote it, so that
// compute-sanitizer's initcheck finds only faults. Otherwise it does nothing.
inline const char* initialize_in_debug(void* memory, int64_t bytes, void* stream) {
  if (!detail::debug_launches()) return nullptr;
  const cudaError_t status =
      cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return detail::launch_error("the workspace", "cudaMemsetAsync", status);
}

// Launches kernel(args...) with `shared_bytes` of dynamic shared memory on `stream`, a
// cudaStream_t. A grid with a zero extent launches nothing. Args are converted to the kernel's
// parameter types.
template <auto kernel>
struct Launcher;

template <class... Params, void (*kernel)(Params...)>
struct Launcher<kernel> {
  static const char* launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                            Params... params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
    const void* address = reinterpret_cast<const void*>(kernel);
    const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
    if (const char* error = allow_shared_bytes(address, shared_bytes)) return error;
    void* arguments[] = {&params...};
    const bool debug = detail::debug_launches() && !stream_is_capturing(stream);
    cudaError_t status = debug ? cudaStreamSynchronize(cuda_stream) : cudaSuccess;
    if (status != cudaSuccess) {
      return detail::launch_error("before " + detail::kernel_name<kernel>(), "other work", status);
    }
    status = cudaLaunchKernel(address, grid, block, arguments, shared_bytes, cuda_stream);
    if (status != cudaSuccess) {
      cudaGetLastError();  // clears the error, so that no later check finds it again
      return detail::launch_error(detail::kernel_name<kernel>(), "launch", status);
    }
    if (debug) status = cudaStreamSynchronize(cuda_stream);
    if (status != cudaSuccess) {
      return detail::launch_error(detail::kernel_name<kernel>(), "run", status);
    }
    return nullptr;
  }

 private:
  // More than 48 KiB must be allowed once per kernel and device.
  static const char* allow_shared_bytes(const void* address, size_t shared_bytes) {
    if (shared_bytes <= 48 * 1024) return nullptr;
    static std::array<std::atomic<size_t>, detail::kMaxDevices> allowed{};
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) {
      return detail::launch_error(detail::kernel_name<kernel>(), "cudaGetDevice", status);
    }
    const bool cached = device >= 0 && device < detail::kMaxDevices;
    if (cached && allowed[device].load(std::memory_order_relaxed) >= shared_bytes) return nullptr;
    // Allows the device's limit, not just this launch's need, so that two threads cannot lower each
    // other's.
    int limit = 0;
    status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) {
      cudaFuncAttributes attributes;
      status = cudaFuncGetAttributes(&attributes, address);
      if (status == cudaSuccess) limit -= static_cast<int>(attributes.sharedSizeBytes);
    }
    if (status == cudaSuccess) {
      status = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
    if (status != cudaSuccess) {
      cudaGetLastError();
      return detail::launch_error(detail::kernel_name<kernel>(), "cudaFuncSetAttribute", status);
    }
    if (cached) allowed[device].store(static_cast<size_t>(limit), std::memory_order_relaxed);
    return nullptr;
  }
};

template <auto kernel, class... Args>
const char* launch_kernel(dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                          const Args&... args) {
  return Launcher<kernel>::launch(grid, block, shared_bytes, stream, args...);
}

}  // namespace qlora_ext
