// Chooses the kernel table, once per process.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace qlora_ext::cpu {
namespace {

struct Choice {
  Kernels kernels;
  std::string error;  // empty, or why QLORA_EXT_CPU cannot be honoured
};

struct Path {
  Kernels kernels;
  bool supported;     // by the CPU we run on
  const char* needs;  // what a CPU needs for it
};

#if defined(__x86_64__)
// Clang 14's __builtin_cpu_supports does not know "f16c".
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Every path in this build, the best first.
std::vector<Path> all_paths() {
  return {
#if defined(__x86_64__)
      {avx512_bf16_kernels(), has_avx512_bf16(), "AVX512_BF16"},
      {avx512_kernels(), has_avx512(), "AVX-512 F, BW, VL and VBMI"},
      {kAvx2Kernels, has_avx2(), "AVX2, FMA and F16C"},
#endif
      {kPortableKernels, true, ""},
  };
}

Choice choose() {
  const char* forced = std::getenv("QLORA_EXT_CPU");
  const bool automatic = forced == nullptr || *forced == '\0';
  std::string names;
  for (const Path& path : all_paths()) {
    const std::string name = path.kernels.name;
    names += (names.empty() ? "" : ", ") + name;
    if (!automatic && name != forced) continue;
    if (path.supported) return {path.kernels, ""};
    if (!automatic) {
      return {kPortableKernels, "QLORA_EXT_CPU is " + name + ", but this CPU lacks " + path.needs +
                                    "; unset it to use the best path of this CPU"};
    }
  }
  return {kPortableKernels, "QLORA_EXT_CPU is " + std::string(forced) + ", want one of " + names};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return choice().kernels; }

const char* cpu_path() { return choice().error.empty() ? choice().kernels.name : nullptr; }

std::vector<std::string> cpu_paths() {
  std::vector<std::string> names;
  for (const Path& path : all_paths()) names.push_back(path.kernels.name);
  return names;
}

const char* cpu_path_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace qlora_ext::cpu
