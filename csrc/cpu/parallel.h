// torch's own thread pool, reached through its C shim so that kernels see no torch C++ header.
#pragma once

#include <cstdint>

extern "C" {
// Declared by torch/csrc/stable/c/shim.h (torch >= 2.10); returns nonzero on failure.
typedef int32_t AOTITorchError;
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                  void (*func)(int64_t, int64_t, void*), void* ctx);
}

namespace qlora_ext::cpu {

// Calls f(begin, end) over disjoint ranges that cover [0, n). f must not throw, and what it
// computes for an index must not depend on where the ranges are cut: results are then the same
// for any number of threads.
template <class F>
void parallel_for(int64_t n, int64_t grain_size, const F& f) {
  if (n <= 0) return;
  torch_parallel_for(
      0, n, grain_size,
      [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace qlora_ext::cpu
