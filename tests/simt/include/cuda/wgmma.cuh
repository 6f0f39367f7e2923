// Host twin of csrc/cuda/wgmma.cuh. Registers are taken by reference: the machine poisons d until
// the wait, and sees there whether anything wrote to d or a. So a must live until the wait.
#pragma once

#include "cuda/ptx.cuh"

namespace qlora_ext::ptx {

// g++ keeps accesses where they are: the registers' addresses are known to the machine.
template <int n>
inline void wgmma_pin(float (&)[n]) {}
template <int n>
inline void wgmma_pin(uint32_t (&)[n]) {}

inline void wgmma_fence() { simt::wgmma_fence(); }
inline void wgmma_commit(SIMT_SITE) { simt::wgmma_commit(SIMT_HERE); }
template <int pending, int n>
inline void wgmma_wait(float (&)[n], SIMT_SITE) {
  simt::wgmma_wait(pending, SIMT_HERE);
}

template <class T, int n>
inline void wgmma_k16(float (&d)[n], const uint32_t (&a)[4], uint64_t descriptor,
                      bool accumulate = true, SIMT_SITE) {
  static_assert(n == 32 || n == 64 || n == 128, "wgmma_k16: N is 64, 128 or 256");
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>,
                "wgmma_k16: T is __half or __nv_bfloat16");
  uint32_t* accumulators[n];
  uint32_t* operand[4];
  for (int i = 0; i < n; ++i) accumulators[i] = reinterpret_cast<uint32_t*>(&d[i]);
  for (int i = 0; i < 4; ++i) operand[i] = const_cast<uint32_t*>(&a[i]);
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  simt::wgmma({accumulators, operand, descriptor, 2 * n, bf16, accumulate}, SIMT_HERE);
}

}  // namespace qlora_ext::ptx
