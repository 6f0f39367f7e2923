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

#include "cuda/tile.cuh"

namespace qlora_ext {

constexpr int kLoraThreads = 256;
constexpr int kLoraTile = 128;  // rows, or columns, of the long operand per block: 16 for each warp
constexpr int kLoraStep = 64;   // of the contraction per step

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

// The small operand's [ranks, 64] tile as hi and lo halves; rows padded by one 16-byte access.
template <int kRankTiles>
struct SmallTile {
  static constexpr int kRanks = 8 * kRankTiles;
  static constexpr int kPitch = kLoraStep + 8;
  __nv_bfloat16 half[2][kRanks][kPitch];  // [hi, lo]
};

template <int kRankTiles>
struct LoraRowsSmem {
  SmallTile<kRankTiles> small[2];
};

template <int kRankTiles>
struct LoraColumnsSmem {
  static constexpr int kStages = 3;
  SmallTile<kRankTiles> small[2];
  uint16_t big[kStages][kLoraStep][kLoraTile];  // 16-byte units, unit ^ (row & 7)
};

// v minus `high`, its bf16 half. 0 if v is Inf or NaN or rounds to Inf.
__device__ __forceinline__ float rest_of(float v, float high) {
  const float rest = __fsub_rn(v, high);
  return fabsf(rest) <= 1e38f ? rest : 0.0f;
}

// A fragment of the long operand in bf16. If it is fp16, two of them, whose sum is exact.
template <class T>
struct BigFragment {
  static constexpr int kHalves = std::is_same_v<T, __half> ? 2 : 1;
  uint32_t half[kHalves][4];

  __device__ __forceinline__ explicit BigFragment(const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kHalves == 1) {
        half[0][i] = a[i];
      } else {
        const float low = __half2float(__ushort_as_half(static_cast<unsigned short>(a[i])));
        const float high = __half2float(__ushort_as_half(static_cast<unsigned short>(a[i] >> 16)));
        half[0][i] = pack_pair<__nv_bfloat16>(low, high);
        half[1][i] =
            pack_pair<__nv_bfloat16>(rest_of(low, __uint_as_float(half[0][i] << 16)),
                                     rest_of(high, __uint_as_float(half[0][i] & 0xffff0000u)));
      }
    }
  }
};

// acc += the long operand times one half of the small one. Its hi half (0) multiplies both halves
// of the long one, its lo half only the first.
template <class Arch, class T>
__device__ __forceinline__ void multiply_halves(float (&acc)[4], const BigFragment<T>& big,
                                                const uint32_t (&small)[2], int small_half) {
  ptx::mma_k16<Arch, __nv_bfloat16>(acc, big.half[0], small);
  if constexpr (BigFragment<T>::kHalves == 2) {
    if (small_half == 0) ptx::mma_k16<Arch, __nv_bfloat16>(acc, big.half[1], small);
  }
}

// This thread's share of the small tiles, in registers between load and store. Its elements lie a
// fixed distance apart; neighbouring threads have neighbouring elements.
template <int kRankTiles>
struct SmallLoader {
  static constexpr int kRanks = 8 * kRankTiles;
  static constexpr int kCount = kRanks * kLoraStep / kLoraThreads;  // 2 to 8
  const DenseOperand& small;
  int rank, depth;            // of the first element in the tile
  int rank_step, depth_step;  // to the next
  int ranks;                  // that exist, from the tile's first
  int64_t first, step;        // element offsets
  float v[kCount];

  __device__ __forceinline__ SmallLoader(const DenseOperand& operand, int64_t rank0, int64_t d0)
      : small(operand) {
    const int tid = threadIdx.x;
    if (small.depth_is_contiguous()) {
      rank = tid / kLoraStep, depth = tid % kLoraStep;
      rank_step = kLoraThreads / kLoraStep, depth_step = 0;
    } else {
      rank = tid % kRanks, depth = tid / kRanks;
      rank_step = 0, depth_step = kLoraThreads / kRanks;
    }
    ranks = static_cast<int>(min(small.rows - rank0, static_cast<int64_t>(kRanks)));
    first = (rank0 + rank) * small.row_stride + (d0 + depth) * small.depth_stride;
    step = rank_step * small.row_stride + depth_step * small.depth_stride;
  }

  // Loads the next tile. `left` is how much of the depth remains.
  __device__ __forceinline__ void load(int64_t left) {
    const int depths = static_cast<int>(min(left, static_cast<int64_t>(kLoraStep)));
    const bool wide = small.dtype == DType::kFloat32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = 0.0f;
      if (rank + i * rank_step >= ranks || depth + i * depth_step >= depths) continue;
      const int64_t at = first + i * step;
      if (wide) {
        v[i] = static_cast<const float*>(small.data)[at];
      } else {
        const unsigned short bits = static_cast<const unsigned short*>(small.data)[at];
        v[i] = small.dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                              : __uint_as_float(static_cast<uint32_t>(bits) << 16);
      }
    }
    first += kLoraStep * small.depth_stride;
  }

  // With T fp16, a value that is not a finite bf16 goes into lo, which multiplies one half of the
  // long operand. Hi multiplies both; the second may be zero, and Inf times zero is NaN.
  template <class T>
  __device__ __forceinline__ void store(SmallTile<kRankTiles>& tile) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = rank + i * rank_step, d = depth + i * depth_step;
      const __nv_bfloat16 high = __float2bfloat16_rn(v[i]);
      const __nv_bfloat16 rest = __float2bfloat16_rn(rest_of(v[i], to_float(high)));
      tile.half[0][r][d] = high;
      tile.half[1][r][d] = rest;
      if constexpr (std::is_same_v<T, __half>) {
        if (fabsf(to_float(high)) <= 3.4e38f) continue;
        tile.half[0][r][d] = __float2bfloat16_rn(0.0f);
        tile.half[1][r][d] = high;
      }
    }
  }
};

// A bf16 adapter has no lo half, unless T is fp16: see store().
template <class T>
__device__ __forceinline__ int halves_of(const DenseOperand& small) {
  if (std::is_same_v<T, __half>) return 2;
  return small.dtype == DType::kFloat32 || small.dtype == DType::kFloat16 ? 2 : 1;
}

template <int kRankTiles>
__device__ __forceinline__ void clear(float (&acc)[kRankTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[tile][i] = 0.0f;
  }
}

// acc[tile][i] is row 16 * warp + g (+ 8 for i >= 2), rank 8 * tile + 2t + i % 2.
template <int kRankTiles>
__device__ __forceinline__ void store_lora(const LoraMma& p, const float (&acc)[kRankTiles][4],
                                           int64_t row0, int64_t rows, int64_t rank0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int64_t rank = rank0 + tile * 8 + lane % 4 * 2 + i % 2;
      if (row >= rows || rank >= p.small.rows) continue;
      const int64_t at = row * p.out_stride + rank * p.rank_stride;
      if (gridDim.z > 1) {
        static_cast<float*>(p.out)[blockIdx.z * p.out_numel + at] = acc[tile][i];
      } else {
        store_from_float(p.out, p.out_dtype, at, p.scale * acc[tile][i]);
      }
    }
  }
}

// Blocks: x 128 rows, y ranks, z parts of the depth.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, kRankTiles <= 2 ? 2 : 1) lora_rows_mma(LoraMma p) {
  if constexpr (!ptx::is_compiled<Arch>()) {
    ptx::trap();
  } else {
    auto& s = ptx::shared_memory<LoraRowsSmem<kRankTiles>>();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kLoraTile;
    const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * 8 * kRankTiles;
    const int64_t begin = blockIdx.z * p.depth_per_part;
    const int64_t end = min(begin + p.depth_per_part, p.big_cols);
    const int halves = halves_of<T>(p.small);
    const T* rows[2];
    bool valid[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + threadIdx.x / 32 * 16 + g + half * 8;
      valid[half] = row < p.big_rows;
      rows[half] = static_cast<const T*>(p.big) + (valid[half] ? row : 0) * p.big_stride + t * 16;
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
                ptx::load_streaming(reinterpret_cast<const uint4*>(rows[half] + d0 + i * 8));
          }
        }
      }
    };
    float acc[kRankTiles][4];
    clear(acc);
    SmallLoader<kRankTiles> loader(p.small, rank0, begin);
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
          const __nv_bfloat16* small = &s.small[buffer].half[half][tile * 8 + g][t * 16];
          const uint4 low = reinterpret_cast<const uint4*>(small)[0];
          const uint4 high = reinterpret_cast<const uint4*>(small)[1];
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
    store_lora(p, acc, row0, p.big_rows, rank0);
  }
}

// Blocks: x 128 columns, y ranks, z parts of the rows.
template <class Arch, class T, int kRankTiles>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_columns_mma(LoraMma p) {
  if constexpr (!ptx::is_compiled<Arch>()) {
    ptx::trap();
  } else {
    using Smem = LoraColumnsSmem<kRankTiles>;
    constexpr int kAhead = Smem::kStages - 1;
    constexpr int kUnits = kLoraTile / 8;             // 16-byte units of a row
    constexpr int kCopyRows = kLoraThreads / kUnits;  // rows of one copy by all
    constexpr int kCopies = kLoraStep / kCopyRows;    // copies per thread and stage
    auto& s = ptx::shared_memory<Smem>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kLoraTile;
    const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * 8 * kRankTiles;
    const int64_t begin = blockIdx.z * p.depth_per_part;
    const int64_t end = min(begin + p.depth_per_part, p.big_rows);
    const int halves = halves_of<T>(p.small);

    const int unit = threadIdx.x % kUnits, copy_row = threadIdx.x / kUnits;
    const bool in_columns = col0 + unit * 8 < p.big_cols;
    const uint32_t target = ptx::shared_address(s.big) + copy_row * (kLoraTile * 2) +
                            (unit ^ (copy_row & 7)) * 16;  // kCopyRows is a multiple of 8
    static_assert(kCopyRows % 8 == 0, "the swizzle is the same for each of a thread's rows");
    const auto copy_stage = [&](int64_t m0, int slot) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int64_t m = m0 + copy_row + i * kCopyRows;
        const bool valid = in_columns && m < end;
        const T* source =
            static_cast<const T*>(p.big) + (valid ? m * p.big_stride + col0 + unit * 8 : 0);
        ptx::cp_async_16_zfill(target + (slot * kLoraStep + i * kCopyRows) * (kLoraTile * 2),
                               source, valid ? 16 : 0);
      }
      ptx::cp_async_commit();
    };
    // ldmatrix: lane l gives row l % 8 of matrix l / 8. Matrices 0 and 1 are rows 0-7 of the warp's
    // two units of columns, 2 and 3 are rows 8-15. Transposed, they are the fragment's registers
    // 0 to 3.
    const int read_row = lane % 8 + lane / 16 * 8;
    const int read_unit = (warp * 2 + lane / 8 % 2) ^ (lane % 8);
    const uint32_t read = ptx::shared_address(s.big) + read_row * (kLoraTile * 2) + read_unit * 16;

    float acc[kRankTiles][4];
    clear(acc);
    SmallLoader<kRankTiles> loader(p.small, rank0, begin);
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
            const __nv_bfloat16* small =
                &s.small[buffer].half[half][tile * 8 + g][step * 16 + t * 2];
            const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(small),
                                   *reinterpret_cast<const uint32_t*>(small + 8)};
            multiply_halves<Arch>(acc[tile], a, b, half);
          }
        }
      }
      loader.template store<T>(s.small[buffer ^ 1]);
      slot = slot == kAhead ? 0 : slot + 1;
      buffer ^= 1;
    }
    ptx::cp_async_wait<0>();
    store_lora(p, acc, col0, p.big_cols, rank0);
  }
}

}  // namespace qlora_ext
