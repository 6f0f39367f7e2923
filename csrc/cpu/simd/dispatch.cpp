// Chooses the kernel table, once per process.
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace qlora_ext::cpu {
namespace {

struct Path {
  const Kernels* kernels;
  bool supported;  // by the CPU we run on
};

bool has_avx2() {
#if defined(__x86_64__)
  // Every CPU with AVX2 and FMA converts fp16 (F16C) too.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

struct Choice {
  const Kernels* kernels;
  const char* error;
};

Choice choose() {
  const Path paths[] = {  // best first
#if defined(__x86_64__)
      {&kAvx2Kernels, has_avx2()},
#endif
      {&kPortableKernels, true},
  };
  const char* forced = std::getenv("QLORA_EXT_CPU");
  const bool automatic = forced == nullptr || *forced == '\0';
  for (const Path& path : paths) {
    if (!automatic && std::strcmp(forced, path.kernels->name) != 0) continue;
    if (path.supported) return {path.kernels, nullptr};
    if (!automatic) {
      return {&kPortableKernels, "QLORA_EXT_CPU=avx2: this CPU lacks AVX2 or FMA, want portable"};
    }
  }
  return {&kPortableKernels, "QLORA_EXT_CPU: unknown value, want portable or avx2"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }

const char* cpu_path() {
  return choice().error == nullptr ? choice().kernels->name : nullptr;
}

const char* cpu_path_error() { return choice().error; }

}  // namespace qlora_ext::cpu
