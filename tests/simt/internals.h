// The machine's state, for machine.cpp and hopper.cpp. The host twins see include/simt/machine.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simt/machine.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

// Defined by the build for the ThreadSanitizer library: the machine itself is not instrumented.
#ifndef SIMT_TSAN
#define SIMT_TSAN 0
#endif
#if SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qlora_ext::simt {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxMasks = 32;  // different masks that one warp uses in one block

struct Copy {
  unsigned char* destination;
  const void* source;
  int bytes;
  int valid_bytes;
};

struct Warp;

enum class State { kParked, kReady, kWaiting, kFinished };

struct Fiber {
  Thread thread{};  // first: `current` is a pointer to it
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  Warp* warp = nullptr;
  uint32_t linear = 0;
  State state = State::kParked;
  // What a waiting thread waits for, for reports.
  const char* waits_in = "";
  Site site{"", 0};
  int reduced = 0;             // result of a reducing barrier
  std::vector<Copy> copies;    // cp.async under way, oldest first
  std::vector<size_t> groups;  // committed groups: how many of `copies` each holds
  size_t uncommitted = 0;
#if SIMT_ASAN
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
#if SIMT_TSAN
  void* tsan = nullptr;
#endif
};

#if SIMT_TSAN
constexpr int kFiberSets = 2;  // neighbouring blocks run on different fibers: blocks are unordered
#else
constexpr int kFiberSets = 1;
#endif

// Addresses that ThreadSanitizer orders threads by. They alternate by generation: with one, a
// thread that is late to leave would be ordered after what the others did next, and a missing
// second barrier in a loop would not be found. And each set of fibers has its own.
struct SyncObjects {
  char objects[kFiberSets][2];
  void* at(int64_t generation);
};

// Lanes of one mask that have arrived at a meeting.
struct Gathering {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  uint32_t generation = 0;
  const Meeting* meeting = nullptr;
  Site site{"", 0};
  void* operands[32];
  SyncObjects sync;
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  uint32_t alive = 0;
  Fiber* lanes[32] = {};
  Gathering gatherings[kMaxMasks];  // by mask, few
  int num_gatherings = 0;
  // First arrival of this warp at each barrier, in the generation under way.
  struct Arrival {
    int64_t generation = -1;
    uint32_t lanes = 0;
    Site site{"", 0};
  } arrival[16];
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  int64_t generation = 0;
  int count = 0;  // of true predicates
  Reduce reduce = Reduce::kNone;
  const char* what = "";
  std::vector<Fiber*> waiting;
  SyncObjects sync;
};

// An arrival at an mbarrier that waits for the copies (cp.async) which its thread had under way.
struct CopyArrival {
  Fiber* thread;
  std::vector<Copy> copies;
};

struct Mbarrier {
  uint32_t address = 0;
  int arrivals = 0;
  int pending = 0;
  Fiber* unfenced = nullptr;               // who initialized it, until that thread's fence
  std::vector<CopyArrival> copy_arrivals;  // of `pending`, those that came
  int64_t bytes = 0;                       // expected and not landed
  int64_t phase = 0;
  std::vector<Copy> copies;
  std::vector<Fiber*> waiting;
  SyncObjects sync;
};

constexpr uint32_t kRedZone = 4096;           // on either side of the block's shared memory
constexpr uint32_t kArenaBytes = 256 * 1024;  // between the red zones, at most
constexpr unsigned char kCanary = 0xc5;

struct Machine {
  Fiber main;
  std::vector<std::unique_ptr<Fiber>> fibers[kFiberSets];
  Warp warps[kMaxWarps];
  int num_warps = 0;
  int num_threads = 0;
  int finished = 0;
  int warp_at = 0;  // the warp that is being run
  int set = 0;      // of fibers
  Fiber* running = nullptr;
  std::vector<Fiber*> late;  // run when nothing else can
  Barrier barriers[16];
  unsigned char* arena = nullptr;  // starts with a red zone, so that 0 is no shared address
  uint32_t shared_bytes = 0;
  void (*call)(void*) = nullptr;
  void* closure = nullptr;
  Kernel* kernel = nullptr;
  std::string error;
  char begin_sync, end_sync, fence_sync;
  char bulk_sync[kFiberSets];
  void* copy_engine[kFiberSets] = {};
  bool main_stack_known = false;

  int poison = 0xff;
  bool poison_stacks = false;
  bool reverse = false;
  bool ptx = false;         // run translations
  int64_t last_blocks = 0;  // 0: all of them
  Device device{80, 4, 0};
  Stream stream{};

  std::string traced;  // the kernel whose first block's accesses to shared memory are noted
  std::vector<SharedAccess> trace;
};

inline Machine& machine() {
  static Machine* m = new Machine;  // never destroyed: fibers may be parked in it at exit
  return *m;
}
inline Fiber& self() { return *machine().running; }

#if SIMT_TSAN
inline void tsan_acquire(void* object) { __tsan_acquire(object); }
inline void tsan_release(void* object) { __tsan_release(object); }
extern "C" void __tsan_read_range(void* address, unsigned long size);
extern "C" void __tsan_write_range(void* address, unsigned long size);
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
inline void note_read(const void* p, size_t n) { __tsan_read_range(const_cast<void*>(p), n); }
inline void note_write(void* p, size_t n) { __tsan_write_range(p, n); }
#else
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void note_read(const void*, size_t) {}
inline void note_write(void*, size_t) {}
#endif

// While it lives, what the C library does on the machine's behalf (allocate, copy) is no access
// of the running CUDA thread.
struct Quiet {
#if SIMT_TSAN
  Quiet() { __tsan_ignore_thread_begin(); }
  ~Quiet() { __tsan_ignore_thread_end(); }
#else
  Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

template <class T>
float to_float(uint16_t bits);
template <>
inline float to_float<__nv_bfloat16>(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
template <>
inline float to_float<__half>(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  static const float* const table = [] {
    auto* values = new float[65536];
    for (uint32_t i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      values[i] = __half2float(__half(raw));
    }
    return values;
  }();
  return table[bits];
#endif
}

// ---------------------------------------------------------------- machine.cpp

const char* base_name(const char* file);
std::string thread_name(const Fiber& f);
// Parks the running thread until make_ready; others go on.
void wait(Fiber& self, const char* what, Site site);
void make_ready(Fiber& f);
// Parks the running thread until nothing else can run.
void let_others_run(const char* what, Site site);
inline unsigned char* shared_begin() { return machine().arena + kRedZone; }

// Nobody may write to where a copy is under way: it could land later and undo that. The poison
// that its issue left must still be there.
bool overwritten(const Copy& copy);
std::string overwritten_sentence(const Copy& copy);
void land(const Copy& copy);

// ---------------------------------------------------------------- hopper.cpp

void hopper_begin_block();
void hopper_end_thread();  // the running one has returned
// Copies that arrivals of this thread at mbarriers wait for land now.
void land_copies_of_arrivals(Fiber& f);
std::string stuck_mbarriers();  // what is missing at those that threads wait for

}  // namespace qlora_ext::simt
