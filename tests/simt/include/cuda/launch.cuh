// Host twin of csrc/cuda/launch.cuh: the same names, run by the emulated machine. Each kernel
// instantiation that a launcher names registers itself when the library is loaded. So the compiler
// itself lists what dispatch can reach.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <typeinfo>

#include "simt/builtins.h"
#include "simt/machine.h"

namespace qlora_ext {

struct DeviceInfo {
  int arch = 0;
  int sm_count = 1;
  int shared_bytes = 0;
  int64_t l2_bytes = 0;
};

inline const DeviceInfo& device_info() {
  static DeviceInfo info;
  const simt::Device& device = simt::device();
  info.arch = device.arch;
  info.sm_count = device.sm_count;
  info.shared_bytes = device.shared_bytes;
  info.l2_bytes = 40 << 20;
  return info;
}

inline bool stream_is_capturing(void*) { return simt::stream().capturing; }

namespace detail {

template <auto kernel>
std::string kernel_name() {
  const std::string name = __PRETTY_FUNCTION__;
  const size_t begin = name.find("kernel = ");
  const size_t end = name.find_first_of(";]", begin);
  if (begin == std::string::npos || end == std::string::npos) return name;
  std::string kernel_name = name.substr(begin + 9, end - begin - 9);
  for (const char* scope : {"qlora_ext::", "{anonymous}::"}) {
    const std::string text = scope;
    for (size_t at; (at = kernel_name.find(text)) != std::string::npos;) {
      kernel_name.erase(at, text.size());
    }
  }
  return kernel_name;
}

}  // namespace detail

// For compute-sanitizer; the emulated machine's tests fill workspaces with what they want.
inline const char* initialize_in_debug(void*, int64_t, void*) { return nullptr; }

template <auto kernel>
struct Launcher;

template <class... Params, void (*kernel)(Params...)>
struct Launcher<kernel> {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel parameters are limited to 4 KiB");

  static inline simt::Kernel& registered =
      simt::register_kernel(detail::kernel_name<kernel>().c_str(), typeid(Launcher).name());

  static const char* launch(dim3 grid, dim3 block, size_t shared_bytes, void*, Params... params) {
    auto body = [&] { kernel(params...); };
    void* const arguments[] = {&params...};
    return simt::run(registered, grid, block, shared_bytes,
                     {[](void* closure) { (*static_cast<decltype(body)*>(closure))(); },
                      &body,
                      arguments,
                      {sizeof(Params)...}});
  }
};

template <auto kernel, class... Args>
const char* launch_kernel(dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                          const Args&... args) {
  return Launcher<kernel>::launch(grid, block, shared_bytes, stream, args...);
}

}  // namespace qlora_ext
