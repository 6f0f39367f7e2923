// Kernels with one planted bug each, and their clean twins: what the harness must find, and what
// it must pass. `planted NAME` runs the bug, `planted clean [NAME]` every twin or one; each prints
// "ok" and its output's bytes, or the launch's sentence (exit 3); a sanitizer ends the program itself.
// test_simt_harness.py holds the verdicts.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "planted_hopper.cuh"

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace qlora_ext {

constexpr int kThreads = 64;

struct Io {
  const uint32_t* in;  // [1024], 16-byte aligned
  uint32_t* out;       // [1024]
  unsigned* counter;   // zero
};

struct Smem {
  alignas(16) uint32_t a[256];
  alignas(16) uint32_t b[256];
  alignas(16) uint64_t mbarrier[2];
};

__device__ __forceinline__ Smem& smem() { return ptx::shared_memory<Smem>(); }

// ---------------------------------------------------------------- racecheck

// Every turn of the loop writes what the turn before may still be reading.
template <bool bug>
__global__ void second_barrier(Io io) {
  const unsigned t = threadIdx.x;
  uint32_t sum = 0;
  for (uint32_t turn = 0; turn < 4; ++turn) {
    smem().a[t] = io.in[t] + turn;
    __syncthreads();
    sum += smem().a[(t + 33) % kThreads];
    if (!bug) __syncthreads();
  }
  io.out[t] = sum;
}

// A shuffle does not order memory.
template <bool bug>
__global__ void shuffle_is_no_fence(Io io) {
  const unsigned t = threadIdx.x;
  smem().a[t] = io.in[t];
  const uint32_t other = __shfl_xor_sync(0xffffffffu, io.in[t], 1);
  if (!bug) __syncwarp();
  io.out[t] = smem().a[t ^ 1] + other;
}

template <bool bug>
__global__ void ldmatrix_is_no_fence(Io io) {
  const unsigned t = threadIdx.x;
  if (t >= 32) return;
  reinterpret_cast<uint4*>(smem().a)[t] = reinterpret_cast<const uint4*>(io.in)[t];
  if (!bug) __syncwarp();
  uint32_t d[4];
  ptx::ldmatrix_x4_trans(d, ptx::shared_address(smem().a + 4 * (t ^ 1)));
  for (int i = 0; i < 4; ++i) io.out[4 * t + i] = d[i];
}

// cp_async_wait is this thread's own: others need a barrier too.
template <bool bug>
__global__ void copied_by_another(Io io) {
  const unsigned t = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(smem().a + 4 * t), io.in + 4 * t);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!bug) __syncthreads();
  io.out[t] = smem().a[(4 * t + 5) % 256];
}

// The last block to arrive adds up what the others wrote.
template <bool bug>
__global__ void last_block(Io io) {
  const unsigned t = threadIdx.x;
  io.out[kThreads * (1 + blockIdx.x) + t] = io.in[kThreads * blockIdx.x + t];
  if (!bug) __threadfence();
  __syncthreads();
  if (t == 0) {
    smem().b[0] = atomicAdd(io.counter, 1u) == gridDim.x - 1;
    if (!bug) __threadfence();
  }
  __syncthreads();
  if (smem().b[0] == 0) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += io.out[kThreads * (1 + b) + t];
  io.out[t] = sum;
}

template <bool bug>
__global__ void blocks_overlap(Io io) {
  const unsigned t = threadIdx.x;
  io.out[blockIdx.x * (bug ? kThreads - 1 : kThreads) + t] = io.in[t];
}

// A stage that is filled again before everybody has read it.
template <bool bug>
__global__ void mbarrier_refill(Io io) {
  const unsigned t = threadIdx.x;
  uint32_t* const stages[2] = {smem().a, bug ? smem().a : smem().b};
  const uint32_t full[2] = {ptx::shared_address(&smem().mbarrier[0]),
                            ptx::shared_address(&smem().mbarrier[1])};
  if (t == 0) {
    for (uint32_t mbarrier : full) ptx::mbarrier_init(mbarrier, 1);
    ptx::fence_mbarrier_init();
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_arrive_expect(full[stage], 1024);
      ptx::bulk_copy(ptx::shared_address(stages[stage]), io.in + 256 * stage, 1024, full[stage]);
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(full[0], 0);
  const uint32_t first = stages[0][4 * t];
  ptx::mbarrier_wait(full[1], 0);
  io.out[t] = first + stages[1][4 * t];
}

// ---------------------------------------------------------------- memcheck

template <bool bug>
__global__ void misaligned_load(Io io) {
  const unsigned t = threadIdx.x;
  const uint4 v = *reinterpret_cast<const uint4*>(io.in + 4 * t + (bug ? 1 : 0));
  io.out[t] = v.x + v.w;
}

template <bool bug>
__global__ void beyond_shared(Io io) {
  const unsigned t = threadIdx.x;
  uint32_t* words = reinterpret_cast<uint32_t*>(&smem());
  const unsigned count = sizeof(Smem) / 4;
  words[t == 0 && bug ? count + 2 : t] = io.in[t];
  io.out[t] = words[t];
}

template <bool bug>
__global__ void beyond_shared_member(Io io) {
  const unsigned t = threadIdx.x;
  smem().a[t == 0 && bug ? 256 * io.in[0] : t] = io.in[t];
  io.out[t] = t == 0 ? 0 : smem().a[t];
}

template <bool bug>
__global__ void beyond_global(Io io) {
  const unsigned t = threadIdx.x;
  io.out[t] = io.in[t + 1024 - kThreads + (bug ? 1 : 0)];
}

template <bool bug>
__global__ void copy_beyond_global(Io io) {
  const unsigned t = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(smem().a + 4 * t),
                   io.in + 1024 - 4 * kThreads + 4 * t + (bug ? 4 : 0));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  io.out[t] = smem().a[4 * t];
}

template <bool bug>
__global__ void copy_beyond_shared(Io io) {
  const unsigned t = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(smem().b) + 16 * t + (bug ? 1024 : 0), io.in + 4 * t);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  io.out[t] = smem().b[4 * t];
}

template <bool bug>
__global__ void ldmatrix_misaligned(Io io) {
  const unsigned t = threadIdx.x;
  for (int i = 0; i < 4; ++i) smem().a[4 * t + i] = io.in[4 * t + i];
  __syncthreads();
  uint32_t d[4];
  ptx::ldmatrix_x4_trans(d, ptx::shared_address(smem().a) + 16 * (t % 8) + (bug ? 8 : 0));
  io.out[t] = d[0];
}

// ---------------------------------------------------------------- initcheck

template <bool bug>
__global__ void uninitialized_shared(Io io) {
  const unsigned t = threadIdx.x;
  if (!bug || t != 5) smem().a[t] = io.in[t];
  __syncthreads();
  io.out[t] = smem().a[(t + 1) % kThreads];
}

template <bool bug>
__global__ void uninitialized_local(Io io) {
  const unsigned t = threadIdx.x;
  volatile uint32_t v[8];
  for (unsigned i = 0; i < (bug ? 7 : 8); ++i) v[i] = io.in[t] + i;
  io.out[t] = v[io.in[t] % 8] + v[7];
}

template <bool bug>
__global__ void output_not_written(Io io) {
  const unsigned t = threadIdx.x;
  if (!bug || t != 5) io.out[t] = io.in[t];
}

template <bool bug>
__global__ void copy_not_waited(Io io) {
  const unsigned t = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(smem().a + 4 * t), io.in + 4 * t);
  ptx::cp_async_commit();
  ptx::cp_async_16(ptx::shared_address(smem().b + 4 * t), io.in + 256 + 4 * t);
  ptx::cp_async_commit();
  ptx::cp_async_wait<bug ? 1 : 0>();
  __syncthreads();
  io.out[t] = smem().a[4 * t] + smem().b[4 * t];
}

// A prefetch that nobody needs any more may land on what replaced it.
template <bool bug>
__global__ void reused_under_copy(Io io) {
  const unsigned t = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(smem().a + 4 * t), io.in + 4 * t);
  ptx::cp_async_commit();
  if (!bug) ptx::cp_async_wait<0>();
  __syncthreads();
  smem().a[t] = io.in[t] + 1;
  __syncthreads();
  io.out[t] = smem().a[(t + 9) % kThreads];
}

template <bool bug>
__global__ void bulk_copy_not_waited(Io io) {
  const unsigned t = threadIdx.x;
  const uint32_t full = ptx::shared_address(&smem().mbarrier[0]);
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(full, 1024);
    ptx::bulk_copy(ptx::shared_address(smem().a), io.in, 1024, full);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, bug ? 1 : 0);  // the wrong parity returns at once
  io.out[t] = smem().a[t];
}

// ---------------------------------------------------------------- synccheck

template <bool bug>
__global__ void barrier_in_branch(Io io) {
  const unsigned t = threadIdx.x;
  smem().a[t] = io.in[t];
  if (!bug || t < 16) __syncthreads();
  io.out[t] = smem().a[t];
}

// All threads come to some barrier, but lanes of one warp to different ones.
template <bool bug>
__global__ void barrier_in_both_branches(Io io) {
  const unsigned t = threadIdx.x;
  smem().a[t] = io.in[t];
  if (t % 32 < (bug ? 16 : 32)) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  io.out[t] = smem().a[t];
}

template <bool bug>
__global__ void returned_before_barrier(Io io) {
  const unsigned t = threadIdx.x;
  if (bug && t == 7) return;
  __syncthreads();
  io.out[t] = io.in[t];
}

template <bool bug>
__global__ void lanes_missing_from_shuffle(Io io) {
  const unsigned t = threadIdx.x;
  uint32_t v = io.in[t];
  if (t % 32 < 16) v += __shfl_xor_sync(bug ? 0xffffffffu : 0x0000ffffu, v, 1);
  io.out[t] = v;
}

template <bool bug>
__global__ void shuffle_from_outside(Io io) {
  const unsigned t = threadIdx.x;
  uint32_t v = io.in[t];
  if (t % 32 < 16) v += __shfl_sync(0x0000ffffu, v, bug ? 20 : 3);
  io.out[t] = v;
}

template <bool bug>
__global__ void named_barriers_cross(Io io) {
  const unsigned t = threadIdx.x;
  const bool first = t < 32;
  ptx::barrier_sync(first || !bug ? 1 : 2, 64);
  ptx::barrier_sync(first || !bug ? 2 : 1, 64);
  io.out[t] = io.in[t];
}

template <bool bug>
__global__ void too_few_bytes(Io io) {
  const unsigned t = threadIdx.x;
  const uint32_t full = ptx::shared_address(&smem().mbarrier[0]);
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (t == 0) {
    ptx::mbarrier_arrive_expect(full, 1024);
    ptx::bulk_copy(ptx::shared_address(smem().a), io.in, bug ? 512 : 1024, full);
  }
  ptx::mbarrier_wait(full, 0);
  io.out[t] = smem().a[t];
}

struct Big {
  unsigned char bytes[4096];
};
template <bool bug>
__global__ void launched_with_too_little(Io io) {
  const unsigned t = threadIdx.x;
  ptx::shared_memory<std::conditional_t<bug, Big, Smem>>();
  io.out[t] = io.in[t];
}

// ---------------------------------------------------------------- running them

struct Case {
  std::function<const char*(const Io&)> run[2];  // clean, bug
};

#define PLANTED(name, blocks)                                                                \
  {                                                                                          \
    #name, Case {                                                                            \
      {                                                                                      \
        [](const Io& io) {                                                                   \
          return launch_kernel<name<false>>(blocks, kThreads, sizeof(Smem), nullptr, io);    \
        },                                                                                   \
            [](const Io& io) {                                                               \
              return launch_kernel<name<true>>(blocks, kThreads, sizeof(Smem), nullptr, io); \
            }                                                                                \
      }                                                                                      \
    }                                                                                        \
  }

#define HOPPER(name, clean, bug)                                                             \
  {                                                                                          \
    name, Case {                                                                             \
      {                                                                                      \
        [](const Io& io) { return clean(io.out); }, [](const Io& io) { return bug(io.out); } \
      }                                                                                      \
    }                                                                                        \
  }
#define PRODUCT(name, bug) \
  HOPPER(name, hopper::run_product<hopper::Bug::kNone>, hopper::run_product<hopper::Bug::bug>)

const std::map<std::string, Case>& cases() {
  static const std::map<std::string, Case> all = {
      PLANTED(second_barrier, 1),
      PLANTED(shuffle_is_no_fence, 1),
      PLANTED(ldmatrix_is_no_fence, 1),
      PLANTED(copied_by_another, 1),
      PLANTED(last_block, 4),
      PLANTED(blocks_overlap, 4),
      PLANTED(mbarrier_refill, 1),
      PLANTED(misaligned_load, 1),
      PLANTED(beyond_shared, 1),
      PLANTED(beyond_shared_member, 1),
      PLANTED(beyond_global, 1),
      PLANTED(copy_beyond_global, 1),
      PLANTED(copy_beyond_shared, 1),
      PLANTED(ldmatrix_misaligned, 1),
      PLANTED(uninitialized_shared, 1),
      PLANTED(uninitialized_local, 1),
      PLANTED(output_not_written, 1),
      PLANTED(copy_not_waited, 1),
      PLANTED(reused_under_copy, 1),
      PLANTED(bulk_copy_not_waited, 1),
      PLANTED(barrier_in_branch, 1),
      PLANTED(barrier_in_both_branches, 1),
      PLANTED(returned_before_barrier, 1),
      PLANTED(lanes_missing_from_shuffle, 1),
      PLANTED(shuffle_from_outside, 1),
      PLANTED(named_barriers_cross, 1),
      PLANTED(too_few_bytes, 1),
      PLANTED(launched_with_too_little, 1),
      PRODUCT("wgmma_mbarrier_init_not_fenced", kMbarrierInitNotFenced),
      PRODUCT("wgmma_too_many_bytes_expected", kTooManyBytesExpected),
      PRODUCT("wgmma_too_few_bytes_expected", kTooFewBytesExpected),
      PRODUCT("wgmma_stage_reused", kStageReused),
      PRODUCT("wgmma_wrong_swizzle", kWrongSwizzle),
      PRODUCT("wgmma_wrong_stride", kWrongStride),
      PRODUCT("wgmma_no_first_fence", kNoFirstFence),
      PRODUCT("wgmma_no_fence", kNoFence),
      PRODUCT("wgmma_a_written_after_fence", kAWrittenAfterFence),
      PRODUCT("wgmma_a_written_in_flight", kAWrittenInFlight),
      PRODUCT("wgmma_accumulator_written_in_flight", kAccumulatorWrittenInFlight),
      PRODUCT("wgmma_accumulator_read_in_flight", kAccumulatorReadInFlight),
      PRODUCT("wgmma_not_waited", kNotWaited),
      PRODUCT("wgmma_warp_missing", kWarpMissing),
      PRODUCT("wgmma_staging_not_fenced", kStagingNotFenced),
      PRODUCT("wgmma_staging_reused", kStagingReused),
      PRODUCT("wgmma_store_not_read", kStoreNotRead),
      PRODUCT("wgmma_registers", kRegisters),
      PRODUCT("wgmma_registers_of_three_warps", kRegistersOfThreeWarps),
      PRODUCT("wgmma_arrived_twice", kArrivedTwice),
      PRODUCT("wgmma_one_thread_waits", kOneThreadWaits),
      HOPPER("wgmma_b_not_fenced", (hopper::run_stored<true, true>),
             (hopper::run_stored<false, true>)),
      HOPPER("wgmma_copy_not_waited", (hopper::run_stored<true, true>),
             (hopper::run_stored<true, false>)),
  };
  return all;
}

int run_one(const std::function<const char*(const Io&)>& launch) {
  // Exactly 1024 words each, so that the next one is out of bounds.
  const char* poison = std::getenv("SIMT_POISON");
  auto* in = static_cast<uint32_t*>(std::aligned_alloc(64, 4096));
  auto* out = static_cast<uint32_t*>(std::aligned_alloc(64, 4096));
  for (uint32_t i = 0; i < 1024; ++i) in[i] = 3 * i + 1;
  std::memset(out, poison ? std::atoi(poison) : 0, 4096);
  unsigned counter = 0;
  const char* error = launch(Io{in, out, &counter});
  if (error != nullptr) {
    std::puts(error);
    return 3;
  }
  std::printf("ok ");
  for (int i = 0; i < kThreads; ++i) std::printf("%08x", out[i]);
  std::puts("");
  std::free(in);
  std::free(out);
  return 0;
}

}  // namespace qlora_ext

int main(int argc, char** argv) {
  using namespace qlora_ext;
  if (argc == 2 && std::strcmp(argv[1], "list") == 0) {
    for (const auto& entry : cases()) std::puts(entry.first.c_str());
    return 0;
  }
  if (argc >= 2 && std::strcmp(argv[1], "clean") == 0) {
    for (const auto& entry : cases()) {
      if (argc == 3 && entry.first != argv[2]) continue;
      std::printf("%s ", entry.first.c_str());
      if (run_one(entry.second.run[0]) != 0) return 3;
    }
    return 0;
  }
  if (argc != 2 || cases().count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: planted list|clean [NAME]|NAME\n");
    return 2;
  }
  return run_one(cases().at(argv[1]).run[1]);
}
