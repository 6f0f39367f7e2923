// Host twins of the CUDA builtins that kernels use directly: names and semantics of the CUDA C++
// Programming Guide and the CUDA Math API. The toolkit's headers give the types, conversions and
// simple half arithmetic; this file gives the rest. A missing twin is a compile error.
#pragma once

#include <vector_types.h>
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "simt/machine.h"

// ---------------------------------------------------------------- specifiers
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ a_kernel_reaches_its_shared_memory_by_ptx_shared_memory_only
#undef __managed__
#define __managed__ managed_memory_is_not_used_here

// ---------------------------------------------------------------- indices
#define threadIdx (::qlora_ext::simt::current->thread_index)
#define blockIdx (::qlora_ext::simt::current->block_index)
#define blockDim (::qlora_ext::simt::current->block_dim)
#define gridDim (::qlora_ext::simt::current->grid_dim)
#undef warpSize
inline constexpr int warpSize = 32;

// A caller's source line, for reports.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE \
  ::qlora_ext::simt::Site { file, line }

// ---------------------------------------------------------------- barriers, fences
inline void __syncthreads(SIMT_SITE) {
  ::qlora_ext::simt::barrier_sync(0, 0, true, ::qlora_ext::simt::Reduce::kNone, 0, "__syncthreads",
                                  SIMT_HERE);
}
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return ::qlora_ext::simt::barrier_sync(0, 0, true, ::qlora_ext::simt::Reduce::kCount, predicate,
                                         "__syncthreads_count", SIMT_HERE);
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  return ::qlora_ext::simt::barrier_sync(0, 0, true, ::qlora_ext::simt::Reduce::kAnd, predicate,
                                         "__syncthreads_and", SIMT_HERE);
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return ::qlora_ext::simt::barrier_sync(0, 0, true, ::qlora_ext::simt::Reduce::kOr, predicate,
                                         "__syncthreads_or", SIMT_HERE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  ::qlora_ext::simt::meet(::qlora_ext::simt::kSyncWarp, mask, nullptr, SIMT_HERE);
}
inline void __threadfence() { ::qlora_ext::simt::thread_fence(); }
inline void __threadfence_block() { ::qlora_ext::simt::thread_fence(); }
inline void __threadfence_system() { ::qlora_ext::simt::thread_fence(); }
inline void __nanosleep(unsigned) { ::qlora_ext::simt::yield(); }
inline void __trap() { ::qlora_ext::simt::fail("trap"); }

// ---------------------------------------------------------------- shuffles, votes, reductions
namespace qlora_ext::simt {

template <class T>
inline T shuffle(const Meeting& meeting, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves 4 or 8 bytes");
  ShuffleOperand operand{};
  std::memcpy(&operand.value, &value, sizeof(T));
  operand.source = static_cast<uint32_t>(source);
  meet(meeting, mask, &operand, site);
  std::memcpy(&value, &operand.result, sizeof(T));
  return value;
}

inline void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("shuffle: width is %d, want a power of two up to 32", width);
  }
}

inline uint32_t vote(const Meeting& meeting, unsigned mask, uint32_t value, Site site) {
  VoteOperand operand{value, 0};
  meet(meeting, mask, &operand, site);
  return operand.result;
}

}  // namespace qlora_ext::simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  ::qlora_ext::simt::check_width(width);
  const int lane = static_cast<int>(::qlora_ext::simt::current->lane);
  return ::qlora_ext::simt::shuffle(::qlora_ext::simt::kShuffle, mask, value,
                                    (lane & ~(width - 1)) | (source & (width - 1)), SIMT_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  ::qlora_ext::simt::check_width(width);
  const int lane = static_cast<int>(::qlora_ext::simt::current->lane);
  const int source = lane - static_cast<int>(delta);
  return ::qlora_ext::simt::shuffle(::qlora_ext::simt::kShuffleUp, mask, value,
                                    source < (lane & ~(width - 1)) ? lane : source, SIMT_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  ::qlora_ext::simt::check_width(width);
  const int lane = static_cast<int>(::qlora_ext::simt::current->lane);
  const int source = lane + static_cast<int>(delta);
  return ::qlora_ext::simt::shuffle(::qlora_ext::simt::kShuffleDown, mask, value,
                                    source > (lane | (width - 1)) ? lane : source, SIMT_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  ::qlora_ext::simt::check_width(width);
  const int lane = static_cast<int>(::qlora_ext::simt::current->lane);
  const int source = lane ^ lane_mask;
  return ::qlora_ext::simt::shuffle(::qlora_ext::simt::kShuffleXor, mask, value,
                                    source > (lane | (width - 1)) ? lane : source, SIMT_HERE);
}

inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return static_cast<int>(
      ::qlora_ext::simt::vote(::qlora_ext::simt::kAny, mask, predicate != 0, SIMT_HERE));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return static_cast<int>(
      ::qlora_ext::simt::vote(::qlora_ext::simt::kAll, mask, predicate != 0, SIMT_HERE));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kBallot, mask, predicate != 0, SIMT_HERE);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kReduceAdd, mask, value, SIMT_HERE);
}
inline int __reduce_add_sync(unsigned mask, int value, SIMT_SITE) {
  return static_cast<int>(::qlora_ext::simt::vote(::qlora_ext::simt::kReduceAdd, mask,
                                                  static_cast<uint32_t>(value), SIMT_HERE));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kReduceMinUnsigned, mask, value, SIMT_HERE);
}
inline int __reduce_min_sync(unsigned mask, int value, SIMT_SITE) {
  return static_cast<int>(::qlora_ext::simt::vote(::qlora_ext::simt::kReduceMinSigned, mask,
                                                  static_cast<uint32_t>(value), SIMT_HERE));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kReduceMaxUnsigned, mask, value, SIMT_HERE);
}
inline int __reduce_max_sync(unsigned mask, int value, SIMT_SITE) {
  return static_cast<int>(::qlora_ext::simt::vote(::qlora_ext::simt::kReduceMaxSigned, mask,
                                                  static_cast<uint32_t>(value), SIMT_HERE));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kReduceAnd, mask, value, SIMT_HERE);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kReduceOr, mask, value, SIMT_HERE);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return ::qlora_ext::simt::vote(::qlora_ext::simt::kReduceXor, mask, value, SIMT_HERE);
}

// ---------------------------------------------------------------- atomics
// Relaxed, as CUDA's are: ordering needs a fence. Only for integers, since a float sum by atomics
// would depend on the order of blocks, which this project does not allow.
#define SIMT_ATOMIC(T)                                                                            \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }            \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }          \
  inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }            \
  inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }              \
  inline T atomicXor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }            \
  inline T atomicCAS(T* p, T expected, T v) {                                                     \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);      \
    return expected;                                                                              \
  }                                                                                               \
  inline T atomicMin(T* p, T v) {                                                                 \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                 \
    while (v < old &&                                                                             \
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                             \
    return old;                                                                                   \
  }                                                                                               \
  inline T atomicMax(T* p, T v) {                                                                 \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                 \
    while (old < v &&                                                                             \
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                             \
    return old;                                                                                   \
  }
SIMT_ATOMIC(int)
SIMT_ATOMIC(unsigned)
SIMT_ATOMIC(unsigned long long)
SIMT_ATOMIC(long long)  // on the device: min, max, and, or, xor only
#undef SIMT_ATOMIC
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

// ---------------------------------------------------------------- loads and stores with hints
#define SIMT_LOAD(name)       \
  template <class T>          \
  inline T name(const T* p) { \
    return *p;                \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name)            \
  template <class T>                \
  inline void name(T* p, T value) { \
    *p = value;                     \
  }
SIMT_STORE(__stwb)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)
#undef SIMT_STORE

// ---------------------------------------------------------------- integers and bits
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= ((x >> i) & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned index = (selector >> (4 * i)) & 7u;
    r |= static_cast<unsigned>((bytes >> (8 * index)) & 0xffu) << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  const uint64_t both = (static_cast<uint64_t>(hi) << 32) | lo;
  return static_cast<unsigned>((both << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  const uint64_t both = (static_cast<uint64_t>(hi) << 32) | lo;
  return static_cast<unsigned>(both >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned lo, unsigned hi, unsigned shift) {
  return shift >= 32 ? lo : __funnelshift_l(lo, hi, shift);
}
inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned shift) {
  return shift >= 32 ? hi : __funnelshift_r(lo, hi, shift);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(static_cast<unsigned>(a) >> (8 * i)) *
         static_cast<int8_t>(static_cast<unsigned>(b) >> (8 * i));
  }
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += ((a >> (8 * i)) & 0xffu) * ((b >> (8 * i)) & 0xffu);
  return c;
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// These take mixed integer types, as CUDA's global min and max do.
template <class A, class B,
          class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B,
          class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---------------------------------------------------------------- bit casts
namespace qlora_ext::simt {
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace qlora_ext::simt
inline int __float_as_int(float x) { return ::qlora_ext::simt::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return ::qlora_ext::simt::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return ::qlora_ext::simt::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return ::qlora_ext::simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) {
  return ::qlora_ext::simt::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) { return ::qlora_ext::simt::bit_cast<double>(x); }

// ---------------------------------------------------------------- floating point
// Each is one IEEE operation; the build sets -ffp-contract=off, so none of them fuses.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a >= 1.0f ? 1.0f : (a > 0.0f ? a : 0.0f); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
// glibc declares functions of these names.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __exp2f(x) ::exp2f(x)
#define __log2f(x) ::log2f(x)
#define __powf(x, y) ::powf(x, y)

inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __int2double_rn(int x) { return static_cast<double>(x); }

// fma of the 16-bit types. Product and sum are exact in fp64 if their exponents are within 53 bits
// of each other, so there is only one rounding.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(std::fma(static_cast<double>(__half2float(a)),
                                static_cast<double>(__half2float(b)),
                                static_cast<double>(__half2float(c))));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(std::fma(static_cast<double>(__bfloat162float(a)),
                                    static_cast<double>(__bfloat162float(b)),
                                    static_cast<double>(__bfloat162float(c))));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
