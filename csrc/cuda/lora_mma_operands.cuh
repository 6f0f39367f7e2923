// The operands of lora_mma.cuh: shared memory, and the halves in which they are multiplied.
#pragma once

#include "cuda/tile.cuh"

namespace qlora_ext {

constexpr int kLoraThreads = 256;
constexpr int kLoraTile = 128;  // rows, or columns, of the long operand per block: 16 for each warp
constexpr int kLoraStep = 64;   // of the contraction per step

// The small operand's [ranks, 64] tile as hi and lo halves; rows padded by one 16-byte access.
template <int kRankTiles>
struct SmallTile {
  static constexpr int kRanks = 8 * kRankTiles;
  static constexpr int kPitch = kLoraStep + 8;
  __nv_bfloat16 half[2][kRanks][kPitch];  // [hi, lo]
};

template <int kRankTiles>
struct LoraRowsSmem {
  // With 32 ranks two blocks of four stages would not fit A100's SM.
  static constexpr int kStages = kRankTiles <= 2 ? 4 : 3;
  SmallTile<kRankTiles> small[2];
  uint16_t big[kStages][kLoraTile][kLoraStep];  // 16-byte units, unit ^ (row & 1)
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

}  // namespace qlora_ext
