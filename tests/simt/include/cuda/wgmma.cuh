// Host twin of csrc/cuda/wgmma.cuh.
#pragma once

#include "cuda/ptx.cuh"

namespace qlora_ext::ptx {

inline void cp_async_mbarrier_arrive(uint32_t mbarrier) { simt::copy_async_arrive(mbarrier); }

// ---------------------------------------------------------------- bulk stores, tensor maps (sm_90)
using TensorMap = simt::TensorMap;

inline void prefetch_tensor_map(const TensorMap&) {}
inline void tensor_load(uint32_t shared, const TensorMap& map, int c0, int c1, uint32_t mbarrier) {
  const int32_t at[] = {c0, c1};
  simt::tensor_load(shared, map, at, 2, mbarrier);
}
inline void tensor_load(uint32_t shared, const TensorMap& map, int c0, int c1, int c2,
                        uint32_t mbarrier) {
  const int32_t at[] = {c0, c1, c2};
  simt::tensor_load(shared, map, at, 3, mbarrier);
}
inline void tensor_store(const TensorMap& map, int c0, int c1, uint32_t shared) {
  const int32_t at[] = {c0, c1};
  simt::tensor_store(map, at, 2, shared);
}
inline void tensor_store(const TensorMap& map, int c0, int c1, int c2, uint32_t shared) {
  const int32_t at[] = {c0, c1, c2};
  simt::tensor_store(map, at, 3, shared);
}
inline void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  simt::bulk_store(global, shared, bytes);
}
inline void bulk_commit() { simt::bulk_commit(); }
template <int pending>
inline void bulk_wait_read(SIMT_SITE) {
  simt::bulk_wait(pending, true, SIMT_HERE);
}
template <int pending>
inline void bulk_wait(SIMT_SITE) {
  simt::bulk_wait(pending, false, SIMT_HERE);
}

// ---------------------------------------------------------------- stmatrix
inline void stmatrix_x4_trans(uint32_t shared, const uint32_t (&d)[4], SIMT_SITE) {
  simt::StmatrixOperand operand{shared, d, {}};
  simt::meet(simt::kStmatrixX4Trans, 0xffffffffu, &operand, SIMT_HERE);
  simt::note_stmatrix(operand);
}

// ---------------------------------------------------------------- wgmma (sm_90a)
// Registers are taken by reference: the machine poisons d until the wait, and sees there whether
// anything wrote to d or a. So a must live until the wait.

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
