// Host twin of csrc/cuda/ptx.cuh: the same names and signatures, with the semantics of the PTX ISA
// on the emulated machine. Every function there has one here.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/builtins.h"
#include "simt/machine.h"

namespace qlora_ext {

struct Sm75 {
  static constexpr int kNumber = 75;
};
struct Sm80 {
  static constexpr int kNumber = 80;
};
struct Sm90a {
  static constexpr int kNumber = 90;
};

namespace ptx {

// The emulator runs every variant.
template <class Arch, class Smem = char>
constexpr bool is_compiled() {
  return true;
}

// ---------------------------------------------------------------- shared memory, lanes
template <class Smem>
inline Smem& shared_memory() {
  static_assert(std::is_trivially_default_constructible_v<Smem>, "shared memory is raw bytes");
  static_assert(alignof(Smem) <= 1024, "the arena is aligned to 1024 bytes");
  return *static_cast<Smem*>(simt::shared_memory(sizeof(Smem), __PRETTY_FUNCTION__));
}
inline uint32_t shared_address(const void* pointer) { return simt::shared_address(pointer); }
inline bool elect_one() { return simt::current->lane == 0; }
inline void trap() { simt::fail("trap"); }
inline void trap_index(const char* op, long long index, long long position, long long rows) {
  simt::fail("%s: indices has %lld at flat position %lld, want values in [0, %lld)", op, index,
             position, rows);
}

// ---------------------------------------------------------------- bits
inline uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(hi) << 32) | lo;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = (selector >> (4 * i)) & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 0xffu;
    if (nibble & 8u) byte = (byte & 0x80u) ? 0xffu : 0u;
    d |= byte << (8 * i);
  }
  return d;
}

// ---------------------------------------------------------------- global loads
inline uint4 load_streaming(const uint4* pointer) { return *pointer; }
inline uint2 load_streaming(const uint2* pointer) { return *pointer; }
inline uint32_t load_streaming(const uint32_t* pointer) { return *pointer; }
inline unsigned long long load_relaxed(const unsigned long long* pointer) {
  return __atomic_load_n(pointer, __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------- shared loads
inline void load_shared_if(uint4& v, uint32_t shared, bool condition) {
  if (condition) v = *reinterpret_cast<uint4*>(simt::shared_pointer(shared, 16, 16, "ld.shared"));
}

// ---------------------------------------------------------------- cp.async
namespace detail {
// Defined here, where the sanitizers see it, so that a bad source is reported where it is issued.
inline void copy(uint32_t shared, const void* global, int valid_bytes, const char* what) {
  if (valid_bytes < 0 || valid_bytes > 16) {
    simt::fail("%s: %d valid bytes, want 0 to 16", what, valid_bytes);
  }
  const volatile unsigned char* source = static_cast<const volatile unsigned char*>(global);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  for (int i = 0; i < valid_bytes; ++i) (void)source[i];
#else
  (void)source;
#endif
  simt::copy_async(shared, global, 16, valid_bytes, what);
}
}  // namespace detail

inline void cp_async_16(uint32_t shared, const void* global) {
  detail::copy(shared, global, 16, "cp_async_16");
}
inline void cp_async_16_zfill(uint32_t shared, const void* global, int valid_bytes) {
  detail::copy(shared, global, valid_bytes, "cp_async_16_zfill");
}
inline void cp_async_commit() { simt::copy_async_commit(); }
template <int pending>
inline void cp_async_wait() {
  simt::copy_async_wait(pending);
}

// ---------------------------------------------------------------- ldmatrix
inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared, SIMT_SITE) {
  simt::LdmatrixOperand operand{shared, d, {}};
  simt::meet(simt::kLdmatrixX4Trans, 0xffffffffu, &operand, SIMT_HERE);
#if defined(__SANITIZE_THREAD__)
  // Each lane reads the elements that it receives, here, so that races are seen.
  for (const unsigned char* at : operand.read)
    (void)*reinterpret_cast<const volatile uint16_t*>(at);
#endif
}

// ---------------------------------------------------------------- mma.sync
inline void mma_m16n8k8_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, SIMT_SITE) {
  const uint32_t a[2] = {a0, a1};
  simt::MmaOperand operand{d, a, &b0};
  simt::meet(simt::kMma1688F16, 0xffffffffu, &operand, SIMT_HERE);
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>,
                "mma_m16n8k16: T is __half or __nv_bfloat16");
  simt::MmaOperand operand{d, a, b};
  simt::meet(std::is_same_v<T, __half> ? simt::kMma16816F16 : simt::kMma16816Bf16, 0xffffffffu,
             &operand, SIMT_HERE);
}
template <class Arch, class T>
inline void mma_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  if constexpr (std::is_same_v<Arch, Sm75>) {
    static_assert(std::is_same_v<T, __half>, "mma_k16: sm_75 multiplies fp16 only");
    mma_m16n8k8_f16(d, a[0], a[1], b[0], file, line);
    mma_m16n8k8_f16(d, a[2], a[3], b[1], file, line);
  } else {
    mma_m16n8k16<T>(d, a, b, file, line);
  }
}

// ---------------------------------------------------------------- barriers and fences
inline void barrier_sync(int id, int threads, SIMT_SITE) {
  simt::barrier_sync(id, threads, false, simt::Reduce::kNone, 0, "barrier_sync", SIMT_HERE);
}
inline void barrier_arrive(int id, int threads, SIMT_SITE) {
  simt::barrier_arrive(id, threads, SIMT_HERE);
}
inline void fence_proxy_async() { simt::fence_proxy_async(); }

// ---------------------------------------------------------------- mbarrier, bulk copies (sm_90)
inline void mbarrier_init(uint32_t mbarrier, int arrivals) {
  simt::mbarrier_init(mbarrier, arrivals);
}
inline void fence_mbarrier_init() {
  simt::fence_mbarrier_init();
  simt::fence_proxy_async();
}
inline void mbarrier_arrive(uint32_t mbarrier) { simt::mbarrier_arrive(mbarrier, 0); }
inline void mbarrier_arrive_expect(uint32_t mbarrier, uint32_t bytes) {
  simt::mbarrier_arrive(mbarrier, bytes);
}
inline void mbarrier_wait(uint32_t mbarrier, uint32_t parity, SIMT_SITE) {
  simt::mbarrier_wait(mbarrier, parity, SIMT_HERE);
}
inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t mbarrier) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  const volatile unsigned char* source = static_cast<const volatile unsigned char*>(global);
  for (uint32_t i = 0; i < bytes; ++i) (void)source[i];
#endif
  simt::bulk_copy(shared, global, bytes, mbarrier);
}

template <int registers>
inline void setmaxnreg_increase(SIMT_SITE) {
  simt::setmaxnreg(registers, true, SIMT_HERE);
}
template <int registers>
inline void setmaxnreg_decrease(SIMT_SITE) {
  simt::setmaxnreg(registers, false, SIMT_HERE);
}

}  // namespace ptx
}  // namespace qlora_ext
