// lora_rows_mma and lora_columns_mma: the LoRA products of one long operand (x or dY, bf16 or fp16)
// and one of small rank (A, B, S, dS: fp32 or 16-bit), on tensor cores.
//
//   rows     out[m, r] = scale * sum over d of big[m, d] small[r, d]    S = x A^T, dS = dY B
//   columns  out[c, r] = scale * sum over m of big[m, c] small[r, m]    dA = dS^T x, dB = dY^T S
//
// Moves   the long operand once per 32 ranks; the small one once per 128 rows (or columns) of it.
// Floor   the long operand's bytes over bandwidth: M = 2048, K = 4096 is 5.6 us on H100.
// MMA     m16n8k16 of bf16: 16 rows (columns) of the long operand by 8 ranks. fp32 accumulators.
// Rounding negligible. The small operand is split into hi + lo, both bf16 (two mma), which keeps 16
//         of its bits: fp32 adapters stay nearly fp32. A long operand in bf16 is exact. One in fp16
//         is split too, exactly (11 bits into 8 and 3), because fp16 lacks the range for the small
//         operand's halves: a gradient's lo would vanish, an S beyond 65504 would be Inf. That is a
//         third mma; lo times lo, 2^-17 of the product, is left out. An Inf in the small operand
//         has no lo half and stays Inf. An Inf in the long one times lo (zero, or of the other
//         sign) is NaN.
// Layout  stages of 16 KiB of the long operand by cp.async, two or three ahead. rows: 128 x 64; a
//         lane reads 32 consecutive bytes of its two rows as mma fragments, k permuted as in
//         gemm_4bit_fused. columns: 64 x 128, ldmatrix.trans.
// Order   the last block of a tile adds the parts of the contraction in order (last_block.cuh). No
//         float atomics.
#pragma once

#include "cuda/last_block.cuh"
#include "cuda/lora_mma_operands.cuh"
#include "cuda/row_groups.cuh"

namespace qlora_ext {

struct LoraMma {
  const void* big;  // T, rows big_stride apart, 16-byte aligned, big_stride a multiple of 8
  int64_t big_stride;
  int64_t big_rows;        // M
  int64_t big_cols;        // K or N, a multiple of 8
  DenseOperand small;      // by (rank, depth)
  int64_t depth_per_part;  // a multiple of kLoraStep
  float scale;
  void* out;  // element (row or column i, rank r) at i * out_stride + r * rank_stride
  int64_t out_stride;
  int64_t rank_stride;
  int64_t out_numel;
  DType out_dtype;
  float* parts;       // with several parts of the depth: [parts, out_numel]; or null
  Arrivals arrivals;  // if the last block adds them
};

template <int kRankTiles>
__device__ __forceinline__ void clear(float (&acc)[kRankTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[tile][i] = 0.0f;
  }
}

// Stores the block's results, or its part of them; then the last block of the tile may store the
// sums. acc[tile][i] is row 16 * warp + g (+ 8 for i >= 2), rank 8 * tile + 2t + i % 2. The result
// starts at element `first` of out. `sums` is shared memory that no thread reads any more.
template <class Rows, int kRankTiles>
__device__ __forceinline__ void store_lora(const LoraMma& p, const float (&acc)[kRankTiles][4],
                                           int64_t row0, int64_t rows, int64_t rank0, int64_t first,
                                           const Arrival& arrival, float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool split = !Rows::kGrouped && p.parts != nullptr;
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int64_t rank = rank0 + tile * 8 + lane % 4 * 2 + i % 2;
      if (row >= rows || rank >= p.small.rows) continue;
      const int64_t at = first + row * p.out_stride + rank * p.rank_stride;
      if (split) {
        p.parts[blockIdx.z * p.out_numel + at] = acc[tile][i];
      } else {
        store_from_float(p.out, p.out_dtype, at, p.scale * acc[tile][i]);
      }
    }
  }
  if (!arrival.counts() || !arrival.is_last(gridDim.z)) return;
  const int num_rows = static_cast<int>(min(rows - row0, static_cast<int64_t>(kLoraTile)));
  const int num_ranks = min(static_cast<int>(p.small.rows - rank0), 8 * kRankTiles);
  const bool ranks_first = p.rank_stride == 1;  // neighbouring threads: neighbouring addresses
  const auto locate = [&](int i) {
    const int row = ranks_first ? i / num_ranks : i % num_rows;
    const int rank = ranks_first ? i % num_ranks : i / num_rows;
    return first + (row0 + row) * p.out_stride + (rank0 + rank) * p.rank_stride;
  };
  add_parts<kLoraThreads>(
      p.parts, gridDim.z, p.out_numel, num_rows * num_ranks, sums, locate,
      [&](int, int64_t at, float sum) { store_from_float(p.out, p.out_dtype, at, p.scale * sum); });
}

// The block's 128 rows from rows.first. Blocks: y ranks, z parts of the depth. `small` is what p.small
// is for these rows.
template <class Arch, class T, int kRankTiles, class Rows>
__device__ __forceinline__ void lora_rows(const LoraMma& p, const DenseOperand& small,
                                          const Rows& rows) {
  using Smem = LoraRowsSmem<kRankTiles>;
  constexpr int kAhead = Smem::kStages - 1;
  constexpr int kUnits = kLoraStep / 8;             // 16-byte units of a row
  constexpr int kCopyRows = kLoraThreads / kUnits;  // rows of one copy by all
  constexpr int kCopies = kLoraTile / kCopyRows;    // copies per thread and stage
  auto& s = ptx::shared_memory<Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t row0 = rows.first;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * 8 * kRankTiles;
  const int64_t begin = blockIdx.z * p.depth_per_part;
  const int64_t end = min(begin + p.depth_per_part, p.big_cols);
  const int halves = halves_of<T>(small);

  const int unit = threadIdx.x % kUnits, copy_row = threadIdx.x / kUnits;
  const uint32_t target =
      ptx::shared_address(s.big) + copy_row * (kLoraStep * 2) + (unit ^ (copy_row & 1)) * 16;
  static_assert(kCopyRows % 2 == 0, "the swizzle is the same for each of a thread's rows");
  // The thread's pieces of the next stage. A row that does not exist, or whose index is outside x,
  // is filled with zeros.
  const T* source[kCopies];
  int bytes[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t row = row0 + copy_row + i * kCopyRows;
    const int64_t from = row < rows.end(p.big_rows) ? rows.source(row) : -1;
    source[i] =
        static_cast<const T*>(p.big) + max(from, int64_t{0}) * p.big_stride + begin + unit * 8;
    bytes[i] = from < 0 ? 0 : 16;
  }
  int64_t left = end - begin - unit * 8;  // of the depth, from the thread's pieces on
  const auto copy_stage = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      ptx::cp_async_16_zfill(target + (slot * kLoraTile + i * kCopyRows) * (kLoraStep * 2),
                             source[i], left > 0 ? bytes[i] : 0);
      source[i] += kLoraStep;
    }
    left -= kLoraStep;
    ptx::cp_async_commit();
  };
  const int read = (warp * 16 + g) * (kLoraStep * 2) + ((t * 2) ^ (g & 1)) * 16;

  float acc[kRankTiles][4];
  clear(acc);
  SmallLoader<kRankTiles> loader(small, rank0, begin);
#pragma unroll 1
  for (int stage = 0; stage < kAhead; ++stage) copy_stage(stage);
  const Arrival arrival(Rows::kGrouped ? Arrivals{} : p.arrivals);
  loader.load(end - begin);
  loader.template store<T>(s.small[0]);
  arrival.expect();
  int slot = 0, buffer = 0;
  for (int64_t d0 = begin; d0 < end; d0 += kLoraStep) {
    ptx::cp_async_wait<kAhead - 1>();
    __syncthreads();  // all threads see stage and small tile and have read the ones before
    copy_stage(slot == 0 ? kAhead : slot - 1);
    loader.load(end - d0 - kLoraStep);
    uint4 now[2][2];  // [row g, g + 8][16 bytes of the lane's 32]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* stage = reinterpret_cast<const unsigned char*>(s.big[slot][half * 8]);
      now[half][0] = *reinterpret_cast<const uint4*>(stage + read);
      now[half][1] = *reinterpret_cast<const uint4*>(stage + (read ^ 16));
    }
    const BigFragment<T> a[4] = {
        BigFragment<T>({now[0][0].x, now[1][0].x, now[0][0].y, now[1][0].y}),
        BigFragment<T>({now[0][0].z, now[1][0].z, now[0][0].w, now[1][0].w}),
        BigFragment<T>({now[0][1].x, now[1][1].x, now[0][1].y, now[1][1].y}),
        BigFragment<T>({now[0][1].z, now[1][1].z, now[0][1].w, now[1][1].w})};
    for (int half = 0; half < halves; ++half) {
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        const __nv_bfloat16* ranks = &s.small[buffer].half[half][tile * 8 + g][t * 16];
        const uint4 low = reinterpret_cast<const uint4*>(ranks)[0];
        const uint4 high = reinterpret_cast<const uint4*>(ranks)[1];
        const uint32_t b[4][2] = {
            {low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          multiply_halves<Arch>(acc[tile], a[step], b[step], half);
        }
      }
    }
    loader.template store<T>(s.small[buffer ^ 1]);
    slot = slot == kAhead ? 0 : slot + 1;
    buffer ^= 1;
  }
  ptx::cp_async_wait<0>();
  store_lora<Rows>(p, acc, row0, rows.end(p.big_rows), rank0,
                   Rows::kGrouped ? blockIdx.z * p.out_numel : 0, arrival,
                   reinterpret_cast<float*>(s.small));
}

// Blocks: x 128 rows, y ranks, z parts of the depth.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_rows_mma(LoraMma p) {
  if constexpr (!ptx::is_compiled<Arch, LoraRowsSmem<kRankTiles>>()) {
    ptx::trap();
  } else {
    lora_rows<Arch, T, kRankTiles>(p, p.small,
                                   OneWeight{static_cast<int64_t>(blockIdx.x) * kLoraTile});
  }
}

// The block's 128 columns from col0, over the rows [begin, end). Blocks: y ranks.
template <class Arch, class T, int kRankTiles, class Rows>
__device__ __forceinline__ void lora_columns(const LoraMma& p, const DenseOperand& small,
                                             const Rows& rows, int64_t col0, int64_t begin,
                                             int64_t end) {
  using Smem = LoraColumnsSmem<kRankTiles>;
  constexpr int kAhead = Smem::kStages - 1;
  constexpr int kUnits = kLoraTile / 8;             // 16-byte units of a row
  constexpr int kCopyRows = kLoraThreads / kUnits;  // rows of one copy by all
  constexpr int kCopies = kLoraStep / kCopyRows;    // copies per thread and stage
  auto& s = ptx::shared_memory<Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * 8 * kRankTiles;
  const int halves = halves_of<T>(small);

  const int unit = threadIdx.x % kUnits, copy_row = threadIdx.x / kUnits;
  const bool in_columns = col0 + unit * 8 < p.big_cols;
  const uint32_t target = ptx::shared_address(s.big) + copy_row * (kLoraTile * 2) +
                          (unit ^ (copy_row & 7)) * 16;  // kCopyRows is a multiple of 8
  static_assert(kCopyRows % 8 == 0, "the swizzle is the same for each of a thread's rows");
  // Where x has the rows of the next stage to copy, read a stage ahead.
  [[maybe_unused]] int next[kCopies];
  const auto find_rows = [&](int64_t m0) {
    if constexpr (Rows::kGrouped) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int64_t m = m0 + copy_row + i * kCopyRows;
        next[i] = m < end ? static_cast<int>(rows.source(m)) : -1;
      }
    }
  };
  find_rows(begin);
  const auto copy_stage = [&](int64_t m0, int slot) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t m = m0 + copy_row + i * kCopyRows;
      bool valid = in_columns && m < end;
      int64_t from = m;
      if constexpr (Rows::kGrouped) {
        from = next[i];
        valid = valid && from >= 0;
      }
      const T* source =
          static_cast<const T*>(p.big) + (valid ? from * p.big_stride + col0 + unit * 8 : 0);
      ptx::cp_async_16_zfill(target + (slot * kLoraStep + i * kCopyRows) * (kLoraTile * 2), source,
                             valid ? 16 : 0);
    }
    ptx::cp_async_commit();
    find_rows(m0 + kLoraStep);
  };
  // ldmatrix: lane l gives row l % 8 of matrix l / 8. Matrices 0 and 1 are rows 0-7 of the warp's
  // two units of columns, 2 and 3 are rows 8-15. Transposed, they are the fragment's registers
  // 0 to 3.
  const int read_row = lane % 8 + lane / 16 * 8;
  const int read_unit = (warp * 2 + lane / 8 % 2) ^ (lane % 8);
  const uint32_t read = ptx::shared_address(s.big) + read_row * (kLoraTile * 2) + read_unit * 16;

  float acc[kRankTiles][4];
  clear(acc);
  SmallLoader<kRankTiles> loader(small, rank0, begin);
  for (int stage = 0; stage < kAhead; ++stage) copy_stage(begin + stage * kLoraStep, stage);
  const Arrival arrival(Rows::kGrouped ? Arrivals{} : p.arrivals);
  loader.load(end - begin);
  loader.template store<T>(s.small[0]);
  arrival.expect();
  int slot = 0, buffer = 0;
  for (int64_t m0 = begin; m0 < end; m0 += kLoraStep) {
    ptx::cp_async_wait<kAhead - 1>();
    __syncthreads();  // all threads see stage and small tile and have read the ones before
    copy_stage(m0 + kAhead * kLoraStep, slot == 0 ? kAhead : slot - 1);
    loader.load(end - m0 - kLoraStep);
#pragma unroll
    for (int step = 0; step < kLoraStep / 16; ++step) {
      uint32_t loaded[4];
      ptx::ldmatrix_x4_trans(loaded, read + (slot * kLoraStep + step * 16) * (kLoraTile * 2));
      const BigFragment<T> a(loaded);
      for (int half = 0; half < halves; ++half) {
#pragma unroll
        for (int tile = 0; tile < kRankTiles; ++tile) {
          const __nv_bfloat16* ranks = &s.small[buffer].half[half][tile * 8 + g][step * 16 + t * 2];
          const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(ranks),
                                 *reinterpret_cast<const uint32_t*>(ranks + 8)};
          multiply_halves<Arch>(acc[tile], a, b, half);
        }
      }
    }
    loader.template store<T>(s.small[buffer ^ 1]);
    slot = slot == kAhead ? 0 : slot + 1;
    buffer ^= 1;
  }
  ptx::cp_async_wait<0>();
  store_lora<Rows>(p, acc, col0, p.big_cols, rank0, rows.expert() * p.out_numel, arrival,
                   reinterpret_cast<float*>(s.small));
}

// Blocks: x 128 columns, y ranks, z parts of the rows.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_columns_mma(LoraMma p) {
  if constexpr (!ptx::is_compiled<Arch, LoraColumnsSmem<kRankTiles>>()) {
    ptx::trap();
  } else {
    const int64_t begin = blockIdx.z * p.depth_per_part;
    lora_columns<Arch, T, kRankTiles>(p, p.small, OneWeight{begin},
                                      static_cast<int64_t>(blockIdx.x) * kLoraTile, begin,
                                      min(begin + p.depth_per_part, p.big_rows));
  }
}

}  // namespace qlora_ext
