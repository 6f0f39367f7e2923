// Inline PTX for Hopper and nothing else, as ptx.cuh: tensor maps, bulk stores, stmatrix, products of
// warpgroups. Its host twin is tests/simt/include/cuda/wgmma.cuh.
#pragma once

#include <cuda.h>

#include "cuda/ptx.cuh"

namespace qlora_ext::ptx {

// ---------------------------------------------------------------- cp.async and mbarriers (sm_90)
// Arrives once the cp.async that this thread has issued so far have landed. It's one of the
// arrivals that mbarrier_init counts. The thread's own stores before it are ordered as by an
// arrival; what cp.async wrote was written by the generic proxy.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
#else
  trap();
#endif
}

// ---------------------------------------------------------------- stmatrix (sm_90)
// The inverse of ldmatrix_x4_trans: stores four 8x8 matrices of 16-bit elements, transposed.
// Addresses and registers are as there.

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t shared, const uint32_t (&d)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
      : "memory");
#else
  trap();
#endif
}

// ---------------------------------------------------------------- tensor maps (sm_90)
// A tensor map (tensor_map.cuh) is a kernel's `const __grid_constant__ ptx::TensorMap` parameter.
// It names a tensor of 2 or 3 dimensions, a box of it, and the swizzle of the box in shared memory.
// c0 is the first element of the box along the contiguous dimension, c1 along the next. `shared` is
// a multiple of 128, and of the swizzle's period (8 lines) if a descriptor is to name it.
using TensorMap = CUtensorMap;

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  trap();
#endif
}

// Brings a box. What lies outside the tensor becomes zero. All bytes of the box count towards the
// mbarrier's current phase, those too. One thread issues it.
__device__ __forceinline__ void tensor_load(uint32_t shared, const TensorMap& map, int c0, int c1,
                                            uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(&map), "r"(c0), "r"(c1), "r"(mbarrier)
      : "memory");
#else
  trap();
#endif
}
__device__ __forceinline__ void tensor_load(uint32_t shared, const TensorMap& map, int c0, int c1,
                                            int c2, uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(mbarrier)
      : "memory");
#else
  trap();
#endif
}

// Writes a box, without what lies outside the tensor. Everybody who stored to the box makes a
// fence_proxy_async, then a barrier, then one thread issues the copy and closes the group.
__device__ __forceinline__ void tensor_store(const TensorMap& map, int c0, int c1,
                                             uint32_t shared) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
          &map),
      "r"(c0), "r"(c1), "r"(shared)
      : "memory");
#else
  trap();
#endif
}
__device__ __forceinline__ void tensor_store(const TensorMap& map, int c0, int c1, int c2,
                                             uint32_t shared) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
          &map),
      "r"(c0), "r"(c1), "r"(c2), "r"(shared)
      : "memory");
#else
  trap();
#endif
}

// `bytes` (a multiple of 16) from shared to global memory, both 16-byte aligned.
__device__ __forceinline__ void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
#else
  trap();
#endif
}

// Closes this thread's current group of stores.
__device__ __forceinline__ void bulk_commit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  trap();
#endif
}

// Waits until all but this thread's `pending` newest groups have read their shared memory. Before a
// thread returns none may be left.
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#else
  trap();
#endif
}

// The same, until they have written as well.
template <int pending>
__device__ __forceinline__ void bulk_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
#else
  trap();
#endif
}

// ---------------------------------------------------------------- wgmma (sm_90a)
// D[64, N] += A[64, 16] B[16, N], fp32 accumulators, A in registers and B in shared memory by a
// descriptor (wgmma_layout.cuh). With warp = thread / 32 % 4, g = lane / 4, t = lane % 4, and the
// lower k in the low half of a register:
//   a[0]: A[16 warp + g][2t, +1]            a[1]: A[16 warp + g + 8][2t, +1]
//   a[2]: A[16 warp + g][2t + 8, +9]        a[3]: A[16 warp + g + 8][2t + 8, +9]
//   d[4j], d[4j + 1]: D[16 warp + g][8j + 2t, +1]
//   d[4j + 2], d[4j + 3]: D[16 warp + g + 8][8j + 2t, +1]
//
// All 128 threads of a warpgroup execute each of these. A product runs on after it is issued:
//   wgmma_pin(d); wgmma_pin(a);     // nvcc moves no access to the registers beyond this
//   wgmma_fence();                  // before the first product, and after any write to a or d
//   wgmma_k16<T>(d, a, descriptor);
//   wgmma_commit();                 // closes the group
//   wgmma_wait<0>(d);
// Between wgmma_k16 and the wait for its group nothing may read or write d, or write a or B. The
// arrays live until the wait: the host twin looks at them there.
// Products with the same d may follow each other without a wait. What ordinary stores wrote to B
// needs a fence_proxy_async by the writer first.

template <int n>
__device__ __forceinline__ void wgmma_pin(float (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int n>
__device__ __forceinline__ void wgmma_pin(uint32_t (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

__device__ __forceinline__ void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  trap();
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  trap();
#endif
}

// Waits until at most `pending` of the newest groups are in flight.
template <int pending, int n>
__device__ __forceinline__ void wgmma_wait(float (&d)[n]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#else
  trap();
#endif
  wgmma_pin(d);
}

// Operands: %0 to %(N/2 - 1) are d, then a, the descriptor, and whether D is added to.
#define QLORA_EXT_D32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QLORA_EXT_D64                                                                            \
  QLORA_EXT_D32                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QLORA_EXT_D128                                                                           \
  QLORA_EXT_D64                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QLORA_EXT_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QLORA_EXT_F16(i) \
  QLORA_EXT_F4(i), QLORA_EXT_F4(i + 4), QLORA_EXT_F4(i + 8), QLORA_EXT_F4(i + 12)
#define QLORA_EXT_F32 QLORA_EXT_F16(0), QLORA_EXT_F16(16)
#define QLORA_EXT_F64 QLORA_EXT_F32, QLORA_EXT_F16(32), QLORA_EXT_F16(48)
#define QLORA_EXT_F128 \
  QLORA_EXT_F64, QLORA_EXT_F16(64), QLORA_EXT_F16(80), QLORA_EXT_F16(96), QLORA_EXT_F16(112)

// clang-format off
#define QLORA_EXT_WGMMA(n, kind, count, a0, a1, a2, a3, b, add)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\n"                                \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." kind "." kind                 \
               " {" QLORA_EXT_D##count "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b               \
               ", p, 1, 1, 0;\n}\n"                                                            \
               : QLORA_EXT_F##count                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor),                  \
                 "r"(accumulate ? 1 : 0))
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_EXT_WGMMA_K16(n, count, a0, a1, a2, a3, b, add)                                  \
  if constexpr (std::is_same_v<T, __half>) {                                                   \
    QLORA_EXT_WGMMA(n, "f16", count, a0, a1, a2, a3, b, add);                                  \
  } else {                                                                                     \
    QLORA_EXT_WGMMA(n, "bf16", count, a0, a1, a2, a3, b, add);                                 \
  }
#else
#define QLORA_EXT_WGMMA_K16(n, count, a0, a1, a2, a3, b, add) trap()
#endif
// clang-format on

// T is __half or __nv_bfloat16; N is twice the number of accumulators. If not `accumulate`,
// D = A B. All threads of a warpgroup pass the same descriptor and `accumulate`.
template <class T>
__device__ __forceinline__ void wgmma_k16(float (&d)[32], const uint32_t (&a)[4],
                                          uint64_t descriptor, bool accumulate = true) {
  QLORA_EXT_WGMMA_K16(64, 32, "%32", "%33", "%34", "%35", "%36", "%37");
}
template <class T>
__device__ __forceinline__ void wgmma_k16(float (&d)[64], const uint32_t (&a)[4],
                                          uint64_t descriptor, bool accumulate = true) {
  QLORA_EXT_WGMMA_K16(128, 64, "%64", "%65", "%66", "%67", "%68", "%69");
}
template <class T>
__device__ __forceinline__ void wgmma_k16(float (&d)[128], const uint32_t (&a)[4],
                                          uint64_t descriptor, bool accumulate = true) {
  QLORA_EXT_WGMMA_K16(256, 128, "%128", "%129", "%130", "%131", "%132", "%133");
}

#undef QLORA_EXT_WGMMA_K16
#undef QLORA_EXT_WGMMA
#undef QLORA_EXT_D32
#undef QLORA_EXT_D64
#undef QLORA_EXT_D128
#undef QLORA_EXT_F4
#undef QLORA_EXT_F16
#undef QLORA_EXT_F32
#undef QLORA_EXT_F64
#undef QLORA_EXT_F128

}  // namespace qlora_ext::ptx
