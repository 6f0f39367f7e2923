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

// A store of the running thread, wherever it goes: what the async proxy must not see unfenced.
extern uintptr_t shared_memory_begin;
extern size_t shared_memory_bytes;
void note_store_at(const void* shared, size_t bytes);
inline void note_store(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) - shared_memory_begin < shared_memory_bytes) {
    note_store_at(at, bytes);
  }
}

// ---------------------------------------------------------------- Hopper (hopper.cpp)

void fence_proxy_async();
void fence_mbarrier_init();
void mbarrier_init(uint32_t address, int arrivals);
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);
void copy_async_arrive(uint32_t mbarrier);

// What the 128 bytes of a CUtensorMap are here: a tensor of 2 or 3 dimensions and a box of it.
struct alignas(64) TensorMap {
  static constexpr uint64_t kMagic = 0x70616d20726f736e;
  uint64_t magic;
  uint32_t rank;
  uint32_t element_bytes;
  uint64_t size[3];    // in elements, the contiguous dimension first
  uint64_t stride[2];  // in bytes, of the others
  uint32_t box[3];
  uint32_t swizzle;  // bytes of a row that it permutes in chunks of 16, or 0
  unsigned char* base;
  unsigned char rest[40];

  uint32_t box_bytes() const { return element_bytes * box[0] * box[1] * (rank > 2 ? box[2] : 1); }
  // What is wrong with it, or null.
  static const char* encode(TensorMap& map, void* base, int element_bytes, int rank,
                            const uint64_t* size, const uint64_t* stride_bytes, const uint32_t* box,
                            int swizzle_bytes);
};
static_assert(sizeof(TensorMap) == 128);

// Copies poison their destination now, and land when the mbarrier's phase completes.
void bulk_copy(uint32_t address, const void* global, uint32_t bytes, uint32_t mbarrier);
void tensor_load(uint32_t address, const TensorMap& map, const int32_t* at, int rank,
                 uint32_t mbarrier);
void bulk_store(void* global, uint32_t address, uint32_t bytes);
void tensor_store(const TensorMap& map, const int32_t* at, int rank, uint32_t address);
void bulk_commit();
void bulk_wait(int pending, bool only_read, Site site);

struct StmatrixOperand {
  uint32_t address;  // of one row, given by this lane
  const uint32_t* d;
  unsigned char* written[8];  // the 16-bit elements that this lane gave
};
extern const Meeting kStmatrixX4Trans;
// Each lane's own stores, after the meeting.
inline void note_stmatrix(const StmatrixOperand& operand) {
  for (unsigned char* at : operand.written) {
#if defined(__SANITIZE_THREAD__)
    auto* element = reinterpret_cast<volatile uint16_t*>(at);
    *element = *element;
#endif
    note_store(at, 2);
  }
}

// A product of a warpgroup: D += A B or D = A B. Registers are taken by their places, which must
// stay what they are until the wait.
struct WgmmaOperand {
  uint32_t* const* d;  // [n / 2]
  uint32_t* const* a;  // [4]
  uint64_t descriptor;
  int n;
  bool bf16;
  bool accumulate;
};
void wgmma(const WgmmaOperand& operand, Site site);
void wgmma_fence();
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void setmaxnreg(uint32_t registers, bool increase, Site site);

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
