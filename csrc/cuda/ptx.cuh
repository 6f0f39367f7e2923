// All inline PTX of this repository, and nothing else, so that kernels read like CUDA C++. What
// CUDA C++ cannot express is a function here, named after its instruction.
//
// tests/simt/include/cuda/ptx.cuh has a host twin of every function below, so that the same kernel
// source runs under g++. Add a new function to both files, with a test in tests/simt.
//
// Rules that let one kernel source serve nvcc and the emulator (docs/kernels.md has the reasons):
//   - include this file and launch.cuh as "cuda/ptx.cuh" and "cuda/launch.cuh" (never "ptx.cuh":
//     a quoted include looks next to the including file first and would miss the twin), and no
//     CUDA header directly;
//   - no `__shared__` variable: a kernel has a struct, reached by ptx::shared_memory<Smem>();
//   - no `<<<>>>`, no `asm`, no `__CUDA_ARCH__`; launch through launch_kernel<kernel>(...);
//   - a kernel that depends on the architecture takes a tag (Sm75, Sm80, Sm90a) as a template
//     argument and begins with `if constexpr (!ptx::is_compiled<Arch, Smem>()) ptx::trap();`
//     (without Smem if it needs no more than 48 KiB);
//   - blocks do not wait for each other: a block may count arrivals (atomicAdd after
//     __threadfence) and the last one may reduce, but nothing spins;
//   - lanes exchange values only through *_sync intrinsics, ldmatrix, mma, or shared memory with
//     __syncwarp() or a barrier between write and read.
//
// Shared addresses are 32-bit, from ptx::shared_address(pointer).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace qlora_ext {

// Architecture tags: the oldest architecture whose instructions a kernel variant uses.
struct Sm75 {  // fp16 m16n8k8; copies to shared memory are plain loads and stores
  static constexpr int kNumber = 75;
};
struct Sm80 {  // cp.async, m16n8k16, bf16
  static constexpr int kNumber = 80;
};
struct Sm90a {  // bulk copies, mbarrier, wgmma: compute_90a only, not newer architectures
  static constexpr int kNumber = 90;
};

namespace ptx {

// Whether a kernel variant for Arch with this shared memory has a body. Each device binary has
// exactly one of Sm75 and Sm80, and Sm90a only if it was compiled for sm_90a. Other variants only
// trap. So do variants that need more shared memory than a block may have on any device that runs
// this binary (8.6's binary also runs on 8.7, which has as much as 8.0). Dispatch never launches
// them, because it asks the device.
template <class Arch, class Smem = char>
__host__ __device__ constexpr bool is_compiled() {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Smem) > (__CUDA_ARCH__ >= 1200 ? 101376 : 232448)) return false;
  if constexpr (std::is_same_v<Arch, Sm75>) return __CUDA_ARCH__ < 800;
  if constexpr (std::is_same_v<Arch, Sm80>) return __CUDA_ARCH__ >= 800;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same_v<Arch, Sm90a>) return true;
#endif
  return false;
#else
  return true;
#endif
}

// ---------------------------------------------------------------- shared memory, lanes

// The kernel's dynamic shared memory as its struct; launch it with sizeof(Smem) bytes or more.
// Uninitialized, aligned to 1024 bytes (wgmma's 128-byte swizzle repeats every 1024).
template <class Smem>
__device__ __forceinline__ Smem& shared_memory() {
  static_assert(std::is_trivially_default_constructible_v<Smem>, "shared memory is raw bytes");
  static_assert(alignof(Smem) <= 1024, "the arena is aligned to 1024 bytes");
  extern __shared__ __align__(1024) unsigned char qlora_ext_shared_memory[];
  return *reinterpret_cast<Smem*>(qlora_ext_shared_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One thread of a converged warp: true in exactly one lane of the full warp.
__device__ __forceinline__ bool elect_one() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
#else
  return (threadIdx.x & 31) == 0;
#endif
}

// Stops the whole grid with an error ("unspecified launch failure" or "an illegal instruction").
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// Prints which index was out of range, on the host's standard output at its next synchronization,
// and stops the grid. Not inlined: the kernel that calls it has no stack for printf's arguments.
[[noreturn]] static __device__ __noinline__ void trap_index(const char* op, long long index,
                                                            long long position, long long rows) {
  printf("%s: indices has %lld at flat position %lld, want values in [0, %lld)\n", op, index,
         position, rows);
  trap();
  __builtin_unreachable();
}

// ---------------------------------------------------------------- bits

// Four bytes picked out of the eight of (hi:lo). Nibble i of `selector` picks byte i: its low
// three bits are the index (0-3 lo, 4-7 hi), its top bit replicates the picked byte's sign.
// __byte_perm would take an extra instruction to mask those top bits.
__device__ __forceinline__ uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(lo), "r"(hi), "r"(selector));
  return d;
}

// ---------------------------------------------------------------- global loads

// Loads read-only data that is used once, without displacing what L1 holds.
__device__ __forceinline__ uint4 load_streaming(const uint4* pointer) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(pointer));
  return v;
}
__device__ __forceinline__ uint2 load_streaming(const uint2* pointer) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(pointer));
  return v;
}
__device__ __forceinline__ uint32_t load_streaming(const uint32_t* pointer) {
  uint32_t v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(pointer));
  return v;
}

// Reads what other blocks may change by atomics meanwhile.
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* pointer) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(pointer) : "memory");
  return v;
}

// ---------------------------------------------------------------- shared loads

// Loads 16 bytes of shared memory if `condition` holds, else leaves `v` as it is. Lanes that do not
// load cost no wavefront, and there is no branch.
__device__ __forceinline__ void load_shared_if(uint4& v, uint32_t shared, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred %%loads;\n"
      "setp.ne.u32 %%loads, %5, 0;\n"
      "@%%loads ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "r"(shared), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

// ---------------------------------------------------------------- cp.async
// Global to shared, without registers. The issuing thread may read the bytes after cp_async_wait,
// other threads only after a barrier as well. Source and destination are aligned to the size. On
// sm_75 these are plain loads and stores, and commit and wait do nothing.
//
// None takes an L2 policy (`L2::cache_hint`). For sm_90 and newer, ptxas 12.9.86 to 13.3 compiles
// `cp.async` with a policy to a copy whose address uses uniform registers that nothing wrote
// (13.4.59 does not). A driver that compiles PTX has the same ptxas inside. bench/sass_flow.py
// looks for it.

#if __CUDA_ARCH__ < 800
namespace detail {
// Built from words with constant indices: a byte array would be kept in local memory.
__device__ __forceinline__ void copy_now(uint32_t shared, const void* global, int valid_bytes) {
  uint4 vector;
  if (valid_bytes >= 16) {
    vector = *static_cast<const uint4*>(global);
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i >= valid_bytes) continue;
      words[i / 4] |= static_cast<uint32_t>(static_cast<const unsigned char*>(global)[i])
                      << (8 * (i % 4));
    }
    memcpy(&vector, words, sizeof(vector));
  }
  *static_cast<uint4*>(__cvta_shared_to_generic(shared)) = vector;
}
}  // namespace detail
#endif

// 16 bytes, bypassing L1.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
  detail::copy_now(shared, global, 16);
#endif
}

// Reads valid_bytes (0 to 16) and fills the rest of the 16 with zeros. With 0 nothing is read,
// but `global` must still be an aligned pointer.
__device__ __forceinline__ void cp_async_16_zfill(uint32_t shared, const void* global,
                                                  int valid_bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid_bytes)
               : "memory");
#else
  detail::copy_now(shared, global, valid_bytes);
#endif
}

// Closes this thread's current group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's newest groups are still under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---------------------------------------------------------------- ldmatrix
// Loads four 8x8 matrices of 16-bit elements, transposed. Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, 16-byte aligned) and receives, in d[i], row l / 4, columns 2 * (l % 4)
// and + 1 of the transposed matrix i. All 32 lanes take part.

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// ---------------------------------------------------------------- mma.sync
// D[16, 8] += A[16, k] * B[k, 8], fp32 accumulators, A row-major, B column-major (B[k][n] with k
// contiguous, as a weight [N, K] is). With g = lane / 4 and t = lane % 4, and the lower k (or n)
// in the low half of a register:
//   d[0], d[1]: D[g][2t], D[g][2t + 1];     d[2], d[3]: D[g + 8][2t], D[g + 8][2t + 1]
//   a[0]: A[g][2t, +1]                      a[1]: A[g + 8][2t, +1]
//   a[2]: A[g][2t + 8, +9]                  a[3]: A[g + 8][2t + 8, +9]        (k16 only)
//   b[0]: B[2t, +1][g]                      b[1]: B[2t + 8, +9][g]            (k16 only)
// T is __half or __nv_bfloat16. All 32 lanes take part.

// sm_75 onwards, fp16 only.
__device__ __forceinline__ void mma_m16n8k8_f16(float (&d)[4], uint32_t a0, uint32_t a1,
                                                uint32_t b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// sm_80 onwards.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>,
                "mma_m16n8k16: T is __half or __nv_bfloat16");
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  trap();
#endif
}

// The k16 product with the instructions of Arch. On Sm75 (fp16 only) it is two k8 steps, whose
// fragments are the two halves of the k16 ones.
template <class Arch, class T>
__device__ __forceinline__ void mma_k16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Arch, Sm75>) {
    static_assert(std::is_same_v<T, __half>, "mma_k16: sm_75 multiplies fp16 only");
    mma_m16n8k8_f16(d, a[0], a[1], b[0]);
    mma_m16n8k8_f16(d, a[2], a[3], b[1]);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
}

// ---------------------------------------------------------------- barriers and fences

// Named barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives without waiting; the others wait with barrier_sync and the same count.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes this thread's writes to shared memory visible to bulk copies and wgmma, and vice versa.
__device__ __forceinline__ void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  trap();
#endif
}

// ---------------------------------------------------------------- mbarrier, bulk copies (sm_90)
// An mbarrier is 8 bytes of shared memory, 8-byte aligned. A phase completes when its expected
// arrivals have arrived and its expected bytes have landed; phases alternate parity 0, 1, 0, ...
// Waiting for the parity of the phase before the first (1) returns at once.

__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
#else
  trap();
#endif
}

// After mbarrier_init and before the barrier that lets other threads and bulk copies use it.
__device__ __forceinline__ void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  trap();
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  trap();
#endif
}

// Arrives, and makes the current phase expect `bytes` more from bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t mbarrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
               : "memory");
#else
  trap();
#endif
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(mbarrier), "r"(parity)
        : "memory");
  } while (done == 0);
#else
  trap();
#endif
}

// Copies `bytes` (a multiple of 16) from 16-byte aligned global memory to 16-byte aligned shared
// memory. They count towards the mbarrier's current phase. One thread issues it.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(mbarrier)
      : "memory");
#else
  trap();
#endif
}
// Moves registers between warpgroups; every warp of the warpgroup executes it.
template <int registers>
__device__ __forceinline__ void setmaxnreg_increase() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#else
  trap();
#endif
}
template <int registers>
__device__ __forceinline__ void setmaxnreg_decrease() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#else
  trap();
#endif
}

}  // namespace ptx
}  // namespace qlora_ext
