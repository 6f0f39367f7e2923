// ptx_to_cpp.py translates PTX to C++ that calls these functions: one for each instruction, on the
// bits of registers, with the semantics of NVIDIA's "Parallel Thread Execution ISA". The emulated
// machine does instructions of whole warps, barriers and asynchronous copies.
//
// Addresses: generic, global, local and parameter space are the host's own; shared memory has its
// 32-bit addresses, as on a device, and each access is checked for bounds and alignment.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "simt/builtins.h"
#include "simt/machine.h"

namespace qlora_ext::isa {

struct half {};
struct bfloat16 {};

// The unsigned integer that holds a T in a register.
template <class T, size_t bytes = sizeof(T)>
struct BitsOf {
  using type = std::conditional_t<
      bytes == 1, uint8_t,
      std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint64_t>>>;
};
template <>
struct BitsOf<bool> {
  using type = bool;
};
template <>
struct BitsOf<half> {
  using type = uint16_t;
};
template <>
struct BitsOf<bfloat16> {
  using type = uint16_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
T from_bits(Bits<T> bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// Every NaN becomes the one that arithmetic gives on a device.
template <class T>
Bits<T> to_bits(T value) {
  if constexpr (std::is_same_v<T, float>) {
    if (std::isnan(value)) return 0x7fffffffu;
  }
  if constexpr (std::is_same_v<T, double>) {
    if (std::isnan(value)) return 0x7fffffffffffffffull;
  }
  Bits<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---------------------------------------------------------------- arithmetic
// Integers wrap around.

#define PTX_BINARY(name, op)                                 \
  template <class T>                                         \
  Bits<T> name(Bits<T> a, Bits<T> b) {                       \
    if constexpr (std::is_floating_point_v<T>)               \
      return to_bits<T>(from_bits<T>(a) op from_bits<T>(b)); \
    else                                                     \
      return static_cast<Bits<T>>(a op b);                   \
  }
PTX_BINARY(add, +)
PTX_BINARY(sub, -)
#undef PTX_BINARY

template <class T>
Bits<T> mul(Bits<T> a, Bits<T> b) {
  if constexpr (std::is_floating_point_v<T>) {
    return to_bits<T>(from_bits<T>(a) * from_bits<T>(b));
  } else {
    return static_cast<Bits<T>>(static_cast<uint64_t>(a) * b);
  }
}
template <class T>
Bits<T> mul_hi(Bits<T> a, Bits<T> b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  const Wide product = static_cast<Wide>(from_bits<T>(a)) * static_cast<Wide>(from_bits<T>(b));
  return static_cast<Bits<T>>(product >> (8 * sizeof(T)));
}
// The product is twice as wide as its operands, which have 16 or 32 bits.
template <class T>
auto mul_wide(Bits<T> a, Bits<T> b) {
  using Wide = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  using Signed = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  return static_cast<Wide>(static_cast<Signed>(from_bits<T>(a)) *
                           static_cast<Signed>(from_bits<T>(b)));
}
template <class T>
Bits<T> mad(Bits<T> a, Bits<T> b, Bits<T> c) {
  return add<T>(mul<T>(a, b), c);
}
template <class T>
Bits<T> fma(Bits<T> a, Bits<T> b, Bits<T> c) {
  if constexpr (std::is_same_v<T, half>) {
    return __half_as_ushort(__hfma(__ushort_as_half(a), __ushort_as_half(b), __ushort_as_half(c)));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __bfloat16_as_ushort(
        __hfma(__ushort_as_bfloat16(a), __ushort_as_bfloat16(b), __ushort_as_bfloat16(c)));
  } else {
    return to_bits<T>(std::fma(from_bits<T>(a), from_bits<T>(b), from_bits<T>(c)));
  }
}
template <class T>
Bits<T> div(Bits<T> a, Bits<T> b) {
  if constexpr (std::is_floating_point_v<T>) {
    return to_bits<T>(from_bits<T>(a) / from_bits<T>(b));
  } else {
    if (b == 0) simt::fail("div: division by zero");
    return static_cast<Bits<T>>(from_bits<T>(a) / from_bits<T>(b));
  }
}
template <class T>
Bits<T> rem(Bits<T> a, Bits<T> b) {
  if (b == 0) simt::fail("rem: division by zero");
  return static_cast<Bits<T>>(from_bits<T>(a) % from_bits<T>(b));
}
template <class T>
Bits<T> rcp(Bits<T> a) {
  return to_bits<T>(T{1} / from_bits<T>(a));
}
template <class T>
Bits<T> sqrt(Bits<T> a) {
  return to_bits<T>(std::sqrt(from_bits<T>(a)));
}

// Of a NaN and a number they return the number. -0 is less than +0.
template <class T>
Bits<T> max(Bits<T> a, Bits<T> b) {
  const T x = from_bits<T>(a), y = from_bits<T>(b);
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(x) || (x == y && std::signbit(x))) return to_bits<T>(y);
    return to_bits<T>(std::isnan(y) || x >= y ? x : y);
  } else {
    return static_cast<Bits<T>>(x > y ? x : y);
  }
}
template <class T>
Bits<T> min(Bits<T> a, Bits<T> b) {
  const T x = from_bits<T>(a), y = from_bits<T>(b);
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(x) || (x == y && !std::signbit(x))) return to_bits<T>(y);
    return to_bits<T>(std::isnan(y) || x <= y ? x : y);
  } else {
    return static_cast<Bits<T>>(x < y ? x : y);
  }
}
template <class T>
Bits<T> abs(Bits<T> a) {
  if constexpr (std::is_floating_point_v<T>) {
    return a & ~(Bits<T>{1} << (8 * sizeof(T) - 1));
  } else {
    return from_bits<T>(a) < 0 ? static_cast<Bits<T>>(0 - a) : a;
  }
}
template <class T>
Bits<T> neg(Bits<T> a) {
  if constexpr (std::is_floating_point_v<T>) {
    return a ^ (Bits<T>{1} << (8 * sizeof(T) - 1));
  } else {
    return static_cast<Bits<T>>(0 - a);
  }
}

// ---------------------------------------------------------------- bits

template <class T>
Bits<T> bit_not(Bits<T> a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return static_cast<Bits<T>>(~a);
}
template <class T>
Bits<T> bit_and(Bits<T> a, Bits<T> b) {
  return static_cast<Bits<T>>(a & b);
}
template <class T>
Bits<T> bit_or(Bits<T> a, Bits<T> b) {
  return static_cast<Bits<T>>(a | b);
}
template <class T>
Bits<T> bit_xor(Bits<T> a, Bits<T> b) {
  return static_cast<Bits<T>>(a ^ b);
}
// A shift by the width or more gives zeros, or a signed value's sign.
template <class T>
Bits<T> shl(Bits<T> a, uint32_t amount) {
  return amount >= 8 * sizeof(T) ? Bits<T>{0} : static_cast<Bits<T>>(a << amount);
}
template <class T>
Bits<T> shr(Bits<T> a, uint32_t amount) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if (std::is_signed_v<T>) amount = std::min(amount, kBits - 1);
  return amount >= kBits ? Bits<T>{0} : static_cast<Bits<T>>(from_bits<T>(a) >> amount);
}
// b with `length` bits from `position` on replaced by the low bits of a.
template <class T>
Bits<T> bfi(Bits<T> a, Bits<T> b, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  Bits<T> d = b;
  for (uint32_t i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
    const Bits<T> bit = Bits<T>{1} << (position + i);
    d = (a >> i) & 1 ? d | bit : d & ~bit;
  }
  return d;
}

// ---------------------------------------------------------------- comparison

// With a NaN, ordered comparisons are false and those with a `u` are true.
#define PTX_SETP(name, op, unordered)                       \
  template <class T>                                        \
  bool setp_##name(Bits<T> a, Bits<T> b) {                  \
    const T x = from_bits<T>(a), y = from_bits<T>(b);       \
    if constexpr (std::is_floating_point_v<T>) {            \
      if (std::isnan(x) || std::isnan(y)) return unordered; \
    }                                                       \
    return x op y;                                          \
  }
PTX_SETP(eq, ==, false)
PTX_SETP(ne, !=, false)
PTX_SETP(lt, <, false)
PTX_SETP(le, <=, false)
PTX_SETP(gt, >, false)
PTX_SETP(ge, >=, false)
PTX_SETP(equ, ==, true)
PTX_SETP(neu, !=, true)
PTX_SETP(ltu, <, true)
PTX_SETP(leu, <=, true)
PTX_SETP(gtu, >, true)
PTX_SETP(geu, >=, true)
#undef PTX_SETP

// ---------------------------------------------------------------- conversion

template <class To, class From>
Bits<To> cvt(Bits<From> bits) {
  if constexpr (std::is_same_v<From, half>) {
    return cvt<To, float>(to_bits<float>(__half2float(__ushort_as_half(bits))));
  } else if constexpr (std::is_same_v<From, bfloat16>) {
    return cvt<To, float>(static_cast<uint32_t>(bits) << 16);
  } else if constexpr (std::is_same_v<To, half>) {
    static_assert(std::is_same_v<From, float>);
    const float value = from_bits<float>(bits);
    return std::isnan(value) ? 0x7fff : __half_as_ushort(__float2half_rn(value));
  } else if constexpr (std::is_same_v<To, bfloat16>) {
    static_assert(std::is_same_v<From, float>);
    const float value = from_bits<float>(bits);
    return std::isnan(value) ? 0x7fff : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  } else {
    return to_bits<To>(static_cast<To>(from_bits<From>(bits)));
  }
}
template <class T>
uint32_t cvt_pair(uint32_t low, uint32_t high) {
  return cvt<T, float>(low) | static_cast<uint32_t>(cvt<T, float>(high)) << 16;
}

template <class Half>
auto pack(Half low, Half high) {
  using Whole = std::conditional_t<sizeof(Half) == 2, uint32_t, uint64_t>;
  return static_cast<Whole>(low) | static_cast<Whole>(high) << (8 * sizeof(Half));
}
template <class Whole, class Low, class High>
void unpack(Whole whole, Low&& low, High&& high) {
  using Half = std::conditional_t<sizeof(Whole) == 4, uint16_t, uint32_t>;
  low = static_cast<Half>(whole);
  high = static_cast<Half>(whole >> (8 * sizeof(Half)));
}

// ---------------------------------------------------------------- memory

inline uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

inline unsigned char* pointer(uint64_t address, uint32_t bytes) {
  if (address % bytes != 0) {
    simt::fail("a memory access at %p is misaligned, want a multiple of %u",
               reinterpret_cast<void*>(address), bytes);
  }
  return reinterpret_cast<unsigned char*>(address);
}
inline unsigned char* shared_pointer(uint64_t address, uint32_t bytes, int line) {
  simt::trace_shared(static_cast<uint32_t>(address), bytes, line);
  return simt::shared_pointer(static_cast<uint32_t>(address), bytes, bytes, "shared memory access");
}
inline uint32_t shared_begin() { return simt::shared_address(simt::shared_memory(0, "")); }
inline uint64_t shared_to_generic(uint64_t address) {
  return isa::address(simt::shared_pointer(static_cast<uint32_t>(address), 1, 1, "cvta.shared"));
}
inline uint64_t generic_to_shared(uint64_t address) {
  return simt::shared_address(reinterpret_cast<const void*>(address));
}

// A value narrower than its register is extended: with its sign if it is signed, else with zeros.
template <class T, class... Registers>
void load(const unsigned char* from, Registers&... registers) {
  const T* element = reinterpret_cast<const T*>(from);
  auto one = [&](auto& target) {
    using Register = std::remove_reference_t<decltype(target)>;
    static_assert(sizeof(Register) >= sizeof(T));
    if constexpr (std::is_floating_point_v<T>) {
      target = *reinterpret_cast<const Bits<T>*>(element);
    } else {
      target = static_cast<Register>(*element);
    }
    ++element;
  };
  (one(registers), ...);
}
template <class T, class... Values>
void store(unsigned char* to, Values... values) {
  Bits<T>* element = reinterpret_cast<Bits<T>*>(to);
  ((*element++ = static_cast<Bits<T>>(values)), ...);
  simt::note_store(to, sizeof...(values) * sizeof(T));
}

template <class T, class Choose>
Bits<T> atomic(unsigned char* at, Choose choose) {
  Bits<T>* word = reinterpret_cast<Bits<T>*>(at);
  Bits<T> old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, choose(old), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  simt::note_store(at, sizeof(T));
  return old;
}
template <class T>
Bits<T> atom_add(unsigned char* at, Bits<T> value) {
  static_assert(!std::is_floating_point_v<T>, "a sum by atomics depends on the order of blocks");
  return atomic<T>(at, [&](Bits<T> old) { return add<T>(old, value); });
}
template <class T>
Bits<T> atom_min(unsigned char* at, Bits<T> value) {
  return atomic<T>(at, [&](Bits<T> old) { return min<T>(old, value); });
}
template <class T>
Bits<T> atom_max(unsigned char* at, Bits<T> value) {
  return atomic<T>(at, [&](Bits<T> old) { return max<T>(old, value); });
}
template <class T>
Bits<T> atom_exch(unsigned char* at, Bits<T> value) {
  return atomic<T>(at, [&](Bits<T>) { return value; });
}
template <class T>
Bits<T> atom_cas(unsigned char* at, Bits<T> expected, Bits<T> value) {
  return atomic<T>(at, [&](Bits<T> old) { return old == expected ? value : old; });
}
inline uint64_t load_relaxed(const unsigned char* from) {
  return __atomic_load_n(reinterpret_cast<const uint64_t*>(from), __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------- copies, warps, blocks

inline void cp_async_16(uint64_t shared, uint64_t global, uint32_t valid_bytes, int line) {
  simt::trace_shared(static_cast<uint32_t>(shared), 16, line);
  if (valid_bytes > 16) simt::fail("cp.async: %u valid bytes, want 0 to 16", valid_bytes);
  const auto* source = reinterpret_cast<const volatile unsigned char*>(global);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  for (uint32_t i = 0; i < valid_bytes; ++i) (void)source[i];
#endif
  simt::copy_async(static_cast<uint32_t>(shared), const_cast<const unsigned char*>(source), 16,
                   static_cast<int>(valid_bytes), "cp.async");
}

inline void bar_sync(simt::Site site) {
  simt::barrier_sync(0, 0, true, simt::Reduce::kNone, 0, "bar.sync", site);
}

inline bool bar_red_or(bool predicate, simt::Site site) {
  return simt::barrier_sync(0, 0, true, simt::Reduce::kOr, predicate, "bar.red.or", site) != 0;
}

inline void barrier_sync(int id, int threads, simt::Site site) {
  simt::barrier_sync(id, threads, false, simt::Reduce::kNone, 0, "barrier.cta.sync", site);
}
inline void barrier_arrive(int id, int threads, simt::Site site) {
  simt::barrier_arrive(id, threads, site);
}

// shfl.sync d|valid, value, b, c, mask: c holds the clamp in its low five bits and the mask of the
// segment in bits 8 to 12. A lane whose source lies outside keeps its own value.
template <class Choose, class Valid>
void shuffle(const simt::Meeting& meeting, uint32_t& d, Valid& valid, uint32_t value, uint32_t c,
             uint32_t mask, simt::Site site, Choose choose) {
  const uint32_t lane = simt::current->lane, clamp = c & 31, segment = c >> 8 & 31;
  const uint32_t first = lane & segment, last = first | (clamp & ~segment);
  bool inside = false;
  const uint32_t source = choose(lane, first, last, segment, inside);
  valid = inside;
  simt::ShuffleOperand operand{value, 0, inside ? source : lane};
  simt::meet(meeting, mask, &operand, site);
  d = static_cast<uint32_t>(operand.result);
}
template <class Valid>
void shfl_idx(uint32_t& d, Valid& valid, uint32_t value, uint32_t b, uint32_t c, uint32_t mask,
              simt::Site site) {
  shuffle(simt::kShuffle, d, valid, value, c, mask, site,
          [&](uint32_t, uint32_t first, uint32_t last, uint32_t segment, bool& inside) {
            const uint32_t source = first | (b & 31 & ~segment);
            inside = source <= last;
            return source;
          });
}
template <class Valid>
void shfl_up(uint32_t& d, Valid& valid, uint32_t value, uint32_t b, uint32_t c, uint32_t mask,
             simt::Site site) {
  shuffle(simt::kShuffleUp, d, valid, value, c, mask, site,
          [&](uint32_t lane, uint32_t, uint32_t last, uint32_t, bool& inside) {
            const int source = static_cast<int>(lane) - static_cast<int>(b & 31);
            inside = source >= static_cast<int>(last);
            return static_cast<uint32_t>(source);
          });
}
template <class Valid>
void shfl_down(uint32_t& d, Valid& valid, uint32_t value, uint32_t b, uint32_t c, uint32_t mask,
               simt::Site site) {
  shuffle(simt::kShuffleDown, d, valid, value, c, mask, site,
          [&](uint32_t lane, uint32_t, uint32_t last, uint32_t, bool& inside) {
            inside = lane + (b & 31) <= last;
            return lane + (b & 31);
          });
}
template <class Valid>
void shfl_bfly(uint32_t& d, Valid& valid, uint32_t value, uint32_t b, uint32_t c, uint32_t mask,
               simt::Site site) {
  shuffle(simt::kShuffleXor, d, valid, value, c, mask, site,
          [&](uint32_t lane, uint32_t, uint32_t last, uint32_t, bool& inside) {
            inside = (lane ^ (b & 31)) <= last;
            return lane ^ (b & 31);
          });
}

// d holds C, and gets A B + C.
inline void mma(const simt::Meeting& meeting, uint32_t (&d)[4], const uint32_t* a,
                const uint32_t* b, simt::Site site) {
  float sums[4];
  std::memcpy(sums, d, sizeof sums);
  simt::MmaOperand operand{sums, a, b};
  simt::meet(meeting, 0xffffffffu, &operand, site);
  std::memcpy(d, sums, sizeof sums);
}

inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint64_t shared, simt::Site site) {
  simt::trace_shared(static_cast<uint32_t>(shared), 16, site.line);
  simt::LdmatrixOperand operand{static_cast<uint32_t>(shared), d, {}};
  simt::meet(simt::kLdmatrixX4Trans, 0xffffffffu, &operand, site);
#if defined(__SANITIZE_THREAD__)
  for (const unsigned char* at : operand.read)
    (void)*reinterpret_cast<const volatile uint16_t*>(at);
#endif
}

inline void stmatrix_x4_trans(uint64_t shared, const uint32_t (&d)[4], simt::Site site) {
  simt::trace_shared(static_cast<uint32_t>(shared), 16, site.line);
  simt::StmatrixOperand operand{static_cast<uint32_t>(shared), d, {}};
  simt::meet(simt::kStmatrixX4Trans, 0xffffffffu, &operand, site);
  simt::note_stmatrix(operand);
}

inline const simt::TensorMap& tensor_map(uint64_t at) {
  return *reinterpret_cast<const simt::TensorMap*>(pointer(at, 64));
}

// The registers that a kernel's wgmma takes, as one thread sees them: what is in flight, and what
// was written after the last wgmma.fence. Here each access counts; on the host twin the machine
// compares values.
template <int count>
struct Watch {
  bool unfenced[count];        // at first all: a fence stands before the first product
  int group_of_d[count] = {};  // the newest group in flight that takes it, from 1; or 0
  int group_of_a[count] = {};
  int group = 1;  // being issued

  Watch() { std::fill(unfenced, unfenced + count, true); }

  void read(int i, int line) {
    if (group_of_d[i] != 0) simt::fail("line %d reads an accumulator of wgmma in flight", line);
  }
  void write(int i, int line) {
    if (group_of_d[i] != 0) simt::fail("line %d writes an accumulator of wgmma in flight", line);
    if (group_of_a[i] != 0) simt::fail("line %d writes a register of A of wgmma in flight", line);
    unfenced[i] = true;
  }
  void fence() { std::fill(unfenced, unfenced + count, false); }
  // `num_d` accumulators, then the four registers of A.
  void product(const int* numbers, int num_d, int line) {
    for (int i = 0; i < num_d + 4; ++i) {
      if (unfenced[numbers[i]]) {
        simt::fail("wgmma at line %d: %s was written after the last wgmma_fence", line,
                   i < num_d ? "an accumulator" : "a register of A");
      }
    }
    for (int i = 0; i < num_d; ++i) group_of_d[numbers[i]] = group;
    for (int i = num_d; i < num_d + 4; ++i) group_of_a[numbers[i]] = group;
  }
  void commit() { ++group; }
  void wait(int pending) {
    const int done = group - 1 - pending;
    for (int* groups : {group_of_d, group_of_a}) {
      for (int i = 0; i < count; ++i) {
        if (groups[i] <= done) groups[i] = 0;
      }
    }
  }
};

// ---------------------------------------------------------------- printf, trap

// What was printed last, for the error of a trap. Knows %s and %lld.
inline std::string& printed() {
  static std::string text;
  return text;
}
inline void vprintf(unsigned char* returned, const unsigned char* format_parameter,
                    const unsigned char* arguments_parameter) {
  const char* format;
  const unsigned char* arguments;
  std::memcpy(&format, format_parameter, sizeof format);
  std::memcpy(&arguments, arguments_parameter, sizeof arguments);
  std::string& text = printed();
  text.clear();
  for (const char* at = format; *at != '\0'; ++at) {
    if (std::strncmp(at, "%s", 2) == 0 || std::strncmp(at, "%lld", 4) == 0) {
      const bool is_string = at[1] == 's';
      long long value;
      std::memcpy(&value, arguments, sizeof value);
      arguments += sizeof value;
      text += is_string ? std::string(reinterpret_cast<const char*>(value)) : std::to_string(value);
      at += is_string ? 1 : 3;
    } else if (*at != '\n') {
      text += *at;
    }
  }
  std::memset(returned, 0, 4);
}
inline void trap() { simt::fail("%s", printed().empty() ? "trap" : printed().c_str()); }

}  // namespace qlora_ext::isa
