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
// Layout  rows: no shared memory for the long operand. A lane loads 32 consecutive bytes of its two
//         rows (a quad: 128) straight into mma fragments, k permuted as in gemm_4bit_fused, while
//         the next 64 k are in flight. columns: 64 x 128 stages by cp.async, ldmatrix.trans.
// Order   parts of the contraction are added by reduce_parts in order. No float atomics.
#pragma once

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
  int64_t out_numel;  // with several parts out is fp32 [parts, out_numel]
  DType out_dtype;
};

template <int kRankTiles>
__device__ __forceinline__ void clear(float (&acc)[kRankTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[tile][i] = 0.0f;
  }
}

// acc[tile][i] is row 16 * warp + g (+ 8 for i >= 2), rank 8 * tile + 2t + i % 2. The result starts
// at element `first` of out.
template <class Rows, int kRankTiles>
__device__ __forceinline__ void store_lora(const LoraMma& p, const float (&acc)[kRankTiles][4],
                                           int64_t row0, int64_t rows, int64_t rank0,
                                           int64_t first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int64_t rank = rank0 + tile * 8 + lane % 4 * 2 + i % 2;
      if (row >= rows || rank >= p.small.rows) continue;
      const int64_t at = first + row * p.out_stride + rank * p.rank_stride;
      if (!Rows::kGrouped && gridDim.z > 1) {
        static_cast<float*>(p.out)[blockIdx.z * p.out_numel + at] = acc[tile][i];
      } else {
        store_from_float(p.out, p.out_dtype, at, p.scale * acc[tile][i]);
      }
    }
  }
}

// The block's 128 rows from rows.first. Blocks: y ranks, z parts of the depth. `small` is what p.small
// is for these rows.
template <class Arch, class T, int kRankTiles, class Rows>
__device__ __forceinline__ void lora_rows(const LoraMma& p, const DenseOperand& small,
                                          const Rows& rows) {
  auto& s = ptx::shared_memory<LoraRowsSmem<kRankTiles>>();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t row0 = rows.first;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * 8 * kRankTiles;
  const int64_t begin = blockIdx.z * p.depth_per_part;
  const int64_t end = min(begin + p.depth_per_part, p.big_cols);
  const int halves = halves_of<T>(small);
  const T* big[2];
  bool valid[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = row0 + threadIdx.x / 32 * 16 + g + half * 8;
    valid[half] = row < rows.end(p.big_rows);
    int64_t source = valid[half] ? rows.source(row) : 0;
    if constexpr (Rows::kGrouped) {
      valid[half] = valid[half] && source >= 0;
      source = max(source, int64_t{0});
    }
    big[half] = static_cast<const T*>(p.big) + source * p.big_stride + t * 16;
  }
  uint4 next[2][2];  // [row g, g + 8][16 bytes of the lane's 32]
  const auto load_rows = [&](int64_t d0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        next[half][i] = make_uint4(0, 0, 0, 0);
        if (valid[half] && d0 + t * 16 + i * 8 < end) {
          next[half][i] =
              ptx::load_streaming(reinterpret_cast<const uint4*>(big[half] + d0 + i * 8));
        }
      }
    }
  };
  float acc[kRankTiles][4];
  clear(acc);
  SmallLoader<kRankTiles> loader(small, rank0, begin);
  loader.load(end - begin);
  load_rows(begin);
  loader.template store<T>(s.small[0]);
  __syncthreads();
  int buffer = 0;
  for (int64_t d0 = begin; d0 < end; d0 += kLoraStep) {
    const uint4 now[2][2] = {{next[0][0], next[0][1]}, {next[1][0], next[1][1]}};
    load_rows(d0 + kLoraStep);
    loader.load(end - d0 - kLoraStep);
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
    loader.template store<T>(
        s.small[buffer ^ 1]);  // last read before the previous iteration's barrier
    __syncthreads();
    buffer ^= 1;
  }
  store_lora<Rows>(p, acc, row0, rows.end(p.big_rows), rank0,
                   Rows::kGrouped ? blockIdx.z * p.out_numel : 0);
}

// Blocks: x 128 rows, y ranks, z parts of the depth.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, kRankTiles <= 2 ? 2 : 1) lora_rows_mma(LoraMma p) {
  if constexpr (!ptx::is_compiled<Arch>()) {
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
  loader.load(end - begin);
  loader.template store<T>(s.small[0]);
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
  store_lora<Rows>(p, acc, col0, p.big_cols, rank0, rows.expert() * p.out_numel);
}

// Blocks: x 128 columns, y ranks, z parts of the rows.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_columns_mma(LoraMma p) {
  if constexpr (!ptx::is_compiled<Arch>()) {
    ptx::trap();
  } else {
    const int64_t begin = blockIdx.z * p.depth_per_part;
    lora_columns<Arch, T, kRankTiles>(p, p.small, OneWeight{begin},
                                      static_cast<int64_t>(blockIdx.x) * kLoraTile, begin,
                                      min(begin + p.depth_per_part, p.big_rows));
  }
}

}  // namespace qlora_ext
