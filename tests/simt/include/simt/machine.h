// The emulated machine's interface for the host twins: one block at a time, one fiber per CUDA
// thread, and a scheduler that switches fibers only where CUDA threads meet or wait. machine.cpp
// implements it.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace qlora_ext::simt {

// The running CUDA thread, as the builtins read it.
struct Thread {
  uint3 thread_index;
  uint3 block_index;
  dim3 block_dim;
  dim3 grid_dim;
  uint32_t lane;
};
extern Thread* current;

// Where in a kernel something was called: __builtin_LINE() as a default argument is the caller's.
struct Site {
  const char* file;
  int line;
};

// Stops the block. The launch returns an error with the kernel, the block, the thread and this
// text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---------------------------------------------------------------- lanes of a warp
// Every lane of `mask` calls with the same kind. When the last one has arrived, `run` is called
// once with every lane's operand, and all go on. `orders`: this also orders their memory accesses.
struct Meeting {
  const char* what;  // the intrinsic's name; lanes that meet must agree on it
  bool aligned;      // .aligned: all from one source line
  bool orders;       // only for __syncwarp
  void (*run)(void* const* operands, uint32_t mask);  // null: nothing to do
};
void meet(const Meeting& meeting, uint32_t mask, void* operand, Site site);

struct ShuffleOperand {
  uint64_t value;
  uint64_t result;
  uint32_t source;  // lane
};
extern const Meeting kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kSyncWarp;

struct VoteOperand {
  uint32_t value;
  uint32_t result;
};
extern const Meeting kAny, kAll, kBallot;
extern const Meeting kReduceAdd, kReduceMinSigned, kReduceMaxSigned, kReduceMinUnsigned,
    kReduceMaxUnsigned, kReduceAnd, kReduceOr, kReduceXor;

struct LdmatrixOperand {
  uint32_t address;  // of one row, given by this lane
  uint32_t* d;
  const unsigned char* read[8];  // the 16-bit elements that this lane received
};
extern const Meeting kLdmatrixX4Trans;

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
extern const Meeting kMma16816F16, kMma16816Bf16, kMma1688F16;

// ---------------------------------------------------------------- the block
enum class Reduce { kNone, kCount, kAnd, kOr };
int barrier_sync(int id, int threads, bool whole_block, Reduce reduce, int predicate,
                 const char* what, Site site);
void barrier_arrive(int id, int threads, Site site);
void thread_fence();
void yield();

// ---------------------------------------------------------------- shared memory
// The block's dynamic shared memory; `bytes` is what the kernel's struct needs.
void* shared_memory(size_t bytes, const char* type);
uint32_t shared_address(const void* pointer);
// The bytes behind a shared address, checked for bounds and alignment.
unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what);

// Poisons [address, + bytes) now; the bytes land at the thread's wait.
void copy_async(uint32_t address, const void* global, int bytes, int valid_bytes, const char* what);
void copy_async_commit();
void copy_async_wait(int pending);

// One lane's access to shared memory, noted while simt_trace_begin's kernel runs its first block.
// `line` is the instruction's in the PTX.
struct SharedAccess {
  int32_t line;
  uint32_t thread;
  uint32_t address;
  uint32_t bytes;
};
extern bool tracing;
void note_shared(uint32_t address, uint32_t bytes, int line);
inline void trace_shared(uint32_t address, uint32_t bytes, int line) {
  if (tracing) note_shared(address, bytes, line);
}

void mbarrier_init(uint32_t address, int arrivals);
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);
void bulk_copy(uint32_t address, const void* global, uint32_t bytes, uint32_t mbarrier);

// ---------------------------------------------------------------- launching
struct Kernel {
  const char* name;
  std::string function;  // as the demangler writes it, without its parameters
  int64_t launches;
};
// `launcher`: the mangled name of Launcher<kernel>, which contains the kernel's.
Kernel& register_kernel(const char* name, const char* launcher);

// A kernel as nvcc compiled it: a function of its parameters' addresses (ptx_to_cpp.py). `arch` is
// that of its binary, `parameters` has the bytes of each, `max_threads` is from __launch_bounds__.
using Translation = void (*)(void* const* arguments);
bool register_translation(int arch, const char* mangled, Translation run,
                          std::vector<size_t> parameters, int64_t max_threads);
extern uint64_t register_poison;  // what registers hold before anything is written to them

// What a launch runs in every thread: call(closure), which is the kernel as g++ compiled it, or its
// translation for the device if that was asked for.
struct Launch {
  void (*call)(void*);
  void* closure;
  void* const* arguments;
  std::vector<size_t> parameters;
};
// Runs every block. Returns null or an error message.
const char* run(Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, const Launch& launch);

struct Device {
  int arch;
  int sm_count;
  int shared_bytes;
};
const Device& device();

// The only stream. Work on it runs immediately.
struct Stream {
  bool capturing;            // as if into a graph
  int64_t synchronizations;  // so far
};
Stream& stream();

}  // namespace qlora_ext::simt
