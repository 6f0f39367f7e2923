// Which rows of which weight a block multiplies. The tile code of a product asks its `Rows`, so a
// grouped product needs another scheduler but no other tile code: OneWeight for a plain product,
// ExpertRows for a mixture of experts.
//
// Sched   expert e has ceil(rows / tile) tiles of rows, and blocks find theirs from the offsets in
//         device memory: nothing waits for the host. The host launches row_slots() slots for each
//         tile of columns, an upper bound for any offsets; a slot without rows exits. The slots of
//         expert e begin at floor(begin / tile) + e and end by floor(end / tile) + e + 1. So a block
//         needs only the experts' ends, and no sum over earlier experts. With few rows (decoding) a
//         slot is one row instead, and a block works only if a tile begins there.
// Cost    each warp reads the offsets, 32 at a time: a load, 5 shuffles and a vote. Not measured.
// Trust   offsets and rows are data: ends are min(running maximum, M) from 0 on, and an index
//         outside [0, T) reads zeros. The rows past the last end count as expert E, which has none.
#pragma once

#include <algorithm>

#include "cuda/tile.cuh"

namespace qlora_ext {

// All M rows of one weight, tile by tile.
struct OneWeight {
  static constexpr bool kGrouped = false;
  int64_t first;  // row of the block's tile

  __device__ __forceinline__ static int64_t expert() { return 0; }
  __device__ __forceinline__ static int64_t end(int64_t M) { return M; }
  __device__ __forceinline__ static int64_t source(int64_t m) { return m; }
};

// Rows of one expert.
struct ExpertRows {
  static constexpr bool kGrouped = true;
  int index;  // of the expert; E: rows without one
  int first;  // row of the block's tile
  int last;   // the end of the expert's rows
  const int32_t* rows;
  int T;

  __device__ __forceinline__ int64_t expert() const { return index; }
  __device__ __forceinline__ int64_t end(int64_t) const { return last; }
  // The row of x that sorted row m takes, or -1.
  __device__ __forceinline__ int64_t source(int64_t m) const {
    if (rows == nullptr) return m;
    const int row = __ldg(rows + m);
    return row >= 0 && row < T ? row : -1;
  }
};

// The groups as a kernel gets them. Blocks along x are slots times tiles of columns, columns first.
struct RowGroups {
  Groups groups;
  uint32_t column_tiles;
  bool slot_is_row;
};

// Slots for tiles of `tile` rows.
struct RowSlots {
  int64_t count;
  bool are_rows;
};
inline RowSlots row_slots(const Groups& groups, int64_t tile) {
  const int64_t bound = groups.M / tile + groups.E + 1;
  return {.count = std::min(groups.M, bound), .are_rows = groups.M <= bound};
}

// Blocks along y are the kernel's own; `parts`, along z, are of the contraction.
struct RowGroupsGrid {
  int64_t column_tiles;
  int64_t y = 1;
  int64_t parts = 1;
};

// Launches `kernel`, whose `params` have RowGroups `groups`, on tiles of kTile rows.
template <auto kernel, int kTile, class Params>
const char* launch_row_groups(Params params, const Groups& groups, const RowGroupsGrid& size,
                              int threads, size_t shared_bytes, void* stream) {
  const RowSlots slots = row_slots(groups, kTile);
  params.groups = {.groups = groups,
                   .column_tiles = static_cast<uint32_t>(size.column_tiles),
                   .slot_is_row = slots.are_rows};
  const int64_t blocks = slots.count * size.column_tiles;
  if (blocks > INT32_MAX) return "it needs more than 2^31 - 1 blocks, want fewer rows in a call";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(size.y),
                  static_cast<unsigned>(size.parts));
  return launch_kernel<kernel>(grid, threads, shared_bytes, stream, params);
}

// The same with a block of each tile of columns for each expert, whatever its rows.
template <auto kernel, class Params>
const char* launch_experts(Params params, const Groups& groups, const RowGroupsGrid& size,
                           int threads, size_t shared_bytes, void* stream) {
  params.groups = {.groups = groups,
                   .column_tiles = static_cast<uint32_t>(size.column_tiles),
                   .slot_is_row = false};
  const int64_t blocks = groups.E * size.column_tiles;
  if (blocks > INT32_MAX) return "it needs more than 2^31 - 1 blocks, want fewer rows in a call";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(size.y),
                  static_cast<unsigned>(size.parts));
  return launch_kernel<kernel>(grid, threads, shared_bytes, stream, params);
}

// The first expert that `passed(expert, end of its rows)` is false for; it must be false from some
// expert on. Whole warps call it.
template <class Passed>
__device__ __forceinline__ ExpertRows find_expert(const Groups& groups, Passed passed) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const int E = static_cast<int>(groups.E), M = static_cast<int>(groups.M);
  ExpertRows found{
      .index = E, .first = 0, .last = M, .rows = groups.rows, .T = static_cast<int>(groups.T)};
  int count = 32;  // of these 32 that have passed
  // Written without a break and in one piece of control flow: nvcc 13.0 took minutes for
  // compute_75's backward kernel with one.
#pragma unroll 1
  for (int e0 = 0; e0 < E && count == 32; e0 += 32) {
    const int e = e0 + lane;
    int end = e < E ? max(min(__ldg(groups.offsets + e), M), found.first) : M;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) end = max(end, __shfl_up_sync(kAll, end, delta));
    count = __popc(__ballot_sync(kAll, e < E && passed(e, end)));
    const int before = __shfl_sync(kAll, end, max(count - 1, 0));
    found.first = count > 0 ? before : found.first;
    found.last = count < 32 ? __shfl_sync(kAll, end, count % 32) : M;
    found.index = min(e0 + count, E);
  }
  return found;
}

// The rows of this block's slot. False if it has none.
template <int kTile>
__device__ __forceinline__ bool find_tile(const RowGroups& p, ExpertRows& found) {
  const int slot = static_cast<int>(blockIdx.x / p.column_tiles);
  found = find_expert(p.groups, [&](int e, int end) {
    return (p.slot_is_row ? end : end / kTile + e + 1) <= slot;
  });
  const int begin = found.first;
  found.first = p.slot_is_row ? slot : begin + (slot - begin / kTile - found.index) * kTile;
  return p.slot_is_row ? (slot - begin) % kTile == 0 : found.first < found.last;
}

// All rows of one expert, or none.
__device__ __forceinline__ ExpertRows rows_of_expert(const Groups& groups, int expert) {
  return find_expert(groups, [&](int e, int) { return e < expert; });
}

// Zeros in the tile's rows of out [M, columns], from column col0 on, `width` of them at most.
__device__ __forceinline__ void zero_tile(const ExpertRows& rows, int tile, void* out, DType dtype,
                                          int64_t columns, int64_t col0, int width) {
  const int count = min(rows.last - rows.first, tile);
  for (int i = threadIdx.x; i < count * width; i += blockDim.x) {
    const int64_t row = rows.first + i / width, column = col0 + i % width;
    if (column < columns) store_from_float(out, dtype, row * columns + column, 0.0f);
  }
}

// An expert's own part of a weight.
__device__ __forceinline__ const uint8_t* packed_of(const PackedWeight& w, int64_t expert) {
  return w.packed + expert * (w.N * w.K / 2);
}
__device__ __forceinline__ Scales scales_of(const Scales& scales, const PackedWeight& w,
                                            int64_t expert) {
  Scales own = scales;
  if (own.code != nullptr) own.code += expert * w.num_blocks;
  if (own.absmax != nullptr) own.absmax += expert * w.num_blocks;
  if (own.nested != nullptr) own.nested += expert * (1 + ((w.num_blocks + 255) >> 8));
  if (own.mean != nullptr) own.mean += expert * w.num_blocks;
  return own;
}

}  // namespace qlora_ext
