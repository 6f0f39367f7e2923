// The last block of a tile to arrive adds the parts that all of them wrote, so that a split
// contraction takes one launch. For small tiles; reduce_parts adds the parts of large ones with the
// whole GPU.
//
// Count   a tile's blocks count their arrivals in a 64-bit word of the workspace: 56 bits of launch
//         id and 8 of count. The workspace may hold anything before. A word with another id has
//         counted nothing, so each block first puts the id there, while its loads are in flight.
//         What lay there passes for the id with probability 2^-56. The last block leaves a zero,
//         because the launches of a replayed graph all have the same id.
// Order   part, barrier, fence, count; count, fence, barrier, parts of all blocks. The order of the
//         sum depends on shapes alone, so it is the same from run to run whoever comes last.
// Cost    a fence, an atomic and a load: three trips to L2, compared with a launch.
#pragma once

#include <atomic>
#include <random>

#include "cuda/heuristics.cuh"
#include "cuda/ptx.cuh"

namespace qlora_ext {

constexpr int kArrivalBits = 8;
constexpr int64_t kMostArrivals = (1 << kArrivalBits) - 1;
static_assert(kMostParts <= kMostArrivals, "a tile's blocks can be counted");

// A number that no other launch of this process has, of 56 bits that look random.
inline unsigned long long launch_id() {
  static std::atomic<unsigned long long> next{std::random_device{}() * 0x9e3779b97f4a7c15ull};
  unsigned long long id = next.fetch_add(0x9e3779b97f4a7c15ull, std::memory_order_relaxed);
  id = (id ^ (id >> 30)) * 0xbf58476d1ce4e5b9ull;  // splitmix64
  id = (id ^ (id >> 27)) * 0x94d049bb133111ebull;
  return (id ^ (id >> 31)) >> kArrivalBits;
}

// The words of one launch.
struct Arrivals {
  unsigned long long* words;  // [tiles]
  unsigned long long id;      // its low bits are zero
};

// Bytes of workspace for the words of this many tiles. The parts lie behind them.
inline int64_t arrival_bytes(int64_t tiles) { return (tiles * 8 + 255) / 256 * 256; }

inline float* parts_behind(void* workspace, int64_t bytes) {
  return reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes);
}

// The words at the start of `workspace`, `bytes` of them, for the launch that comes next.
inline const char* make_arrivals(void* workspace, int64_t bytes, void* stream, Arrivals& arrivals) {
  arrivals = {.words = static_cast<unsigned long long*>(workspace),
              .id = launch_id() << kArrivalBits};
  return initialize_in_debug(workspace, bytes, stream);
}

// One block's arrival at its tile, which the blocks along z have in common. Without words nothing is
// counted.
class Arrival {
 public:
  // Reads the word; expect() uses it.
  __device__ __forceinline__ explicit Arrival(const Arrivals& arrivals)
      : word_(arrivals.words), id_(arrivals.id), found_(arrivals.id) {
    if (!counts()) return;
    word_ += static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) found_ = ptx::load_relaxed(word_);
  }
  __device__ __forceinline__ bool counts() const { return word_ != nullptr; }

  // Puts the id there. Another block of the tile may have done so meanwhile.
  __device__ __forceinline__ void expect() const {
    if ((found_ ^ id_) >> kArrivalBits != 0) atomicCAS(word_, found_, id_);
  }

  // Whether this block is the last of `blocks`. If it is, the parts of all are visible. All threads
  // call it, after they wrote their share of the block's part.
  __device__ __forceinline__ bool is_last(unsigned blocks) const {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      __threadfence();
      const unsigned long long before = atomicAdd(word_, 1ull);
      last = (before & kMostArrivals) == blocks - 1;
      if (last) {
        atomicExch(word_, 0ull);
        __threadfence();
      }
    }
    return __syncthreads_or(last);
  }

 private:
  unsigned long long* word_;
  unsigned long long id_;
  unsigned long long found_;  // by thread 0
};

// Adds the parts of the tile's `count` elements: element i lies at locate(i) in a part, parts are
// `numel` apart, and store(i, locate(i), sum) takes the sum. With fewer elements than threads,
// groups of threads take every so many parts, and their sums are added in order. `sums` is shared
// memory for a float of each of the kThreads threads; the whole block calls it. Only the last turn
// has groups, so nothing writes to `sums` after they are read.
template <int kThreads, class Locate, class Store>
__device__ __forceinline__ void add_parts(const float* parts, int num_parts, int64_t numel,
                                          int count, float* sums, Locate locate, Store store) {
  const int tid = threadIdx.x;
#pragma unroll 1
  for (int first = 0; first < count; first += kThreads) {
    const int width = min(count - first, kThreads);
    const int groups = min(kThreads / width, num_parts);
    const int group = tid / width, i = first + tid % width;
    float sum = 0.0f;
    if (group < groups) {
      const float* at = parts + locate(i);
#pragma unroll 8
      for (int part = group; part < num_parts; part += groups) sum += __ldcg(at + part * numel);
    }
    if (groups > 1) {
      sums[tid] = sum;
      __syncthreads();
      for (int other = 1; other < groups && group == 0; ++other) sum += sums[other * width + tid];
    }
    if (group == 0) store(i, locate(i), sum);
  }
}

}  // namespace qlora_ext
