// gemm_4bit_backward_fused: dX = dY W + dS A on tensor cores, contracting over N, the weight
// decoded in registers on its way from the checkpoint's bytes to mma fragments.
//
// Moves   the packed weight once per kTileM rows of dY (0.516 B/weight), dY once per 256 columns.
// Floor   2 M N K flops; mma.sync reaches ~63% of Hopper's peak. At M = 64, 4096x14336 moves 30 MB,
//         10 us on H100.
// MMA     m16n8k16 with the weight as A (16 columns k of dX) and dY as B (8 rows m): D is dX
//         transposed. fp32 accumulators.
// Order   rows and contraction are permuted inside the tile: lane (g, t) of a warp owns the 8
//         columns k = 8g .. 8g + 7 of the warp's 64, and the 8 rows n = 8t .. 8t + 7 of its 32. So
//         a 4-byte load gets the lane's columns of one row of W without a transpose, and the lane
//         ends with 8 neighbouring columns of dX: one 16-byte store.
// Decode  pair table: a whole byte selects two fp32 values; one copy per pair of banks and 256
//         bytes between entries, so that one PRMT (offset = byte * 256 + lane * 8) and one LDS.64
//         decode two weights. The scale varies along the contraction, so it multiplies the weight:
//         value * scale in fp32, rounded once to T, has the same bits as from dequantize_4bit.
// Scales  one for 64 columns of a row, decoded once per stage and thread, one stage ahead.
// Warps   8: four runs of 64 columns by two halves of each stage's 64 rows n, added at the end.
//         Blocks along n (splits) write parts that reduce_parts adds in order.
// Bypass  dS A is R / 16 more mma steps into the same accumulators; dS and A are rounded to T: with
//         fp16, a dS beyond 65504 becomes Inf.
// Shared  65536 table + stages of 8192 W + 128 B a row of dY: 92416 bytes at 32 rows (2 stages),
//         116992 at 64 (3 stages). sm_75: a 2 KiB table of single values instead.
#pragma once

#include "cuda/gemm_4bit_backward_fused_layout.cuh"
#include "cuda/reduce_parts.cuh"
#include "cuda/row_groups.cuh"

namespace qlora_ext {

// One block's tile: columns k0.. of dX, rows m0.., contraction over rows [n_begin, + length) of W.
template <class Arch, class T, int kTilesM, bool kNested, class Rows>
struct BackwardTile {
  using Traits = BackwardTraits<Arch, kTilesM>;

  const BackwardParams& p;
  BackwardSmem<Arch, kTilesM>& s;
  const Rows rows;
  int64_t k0, m0, n_begin;
  int length;             // of the contraction in this block; the n below count from n_begin
  int lane, warp_n, run;  // this warp's half of a stage's rows, and its 64 columns

  // Copies: this thread's first 16-byte pieces of W and of dY in a stage. The next ones lie 32 rows
  // below.
  const uint8_t* w_source;
  const T* y_source;
  uint32_t w_target, y_target;  // shared addresses in stage 0
  int w_n, y_n;                 // n of the pieces, counted from the stage's first
  int y_rows;                   // how many rows of dY exist from the first piece's on
  bool w_valid;                 // the piece's columns are below K

  ScalePipeline<kNested> scale_pipeline;
  uint32_t next_run, last_run;
  float* scale_target;

  uint32_t lane_bytes;  // lane * 8 (compact: lane * 4)
  int w_read, y_read;

  float acc[4][kTilesM][4];  // [byte of the lane's word][8 rows m][mma register]

  __device__ __forceinline__ BackwardTile(const BackwardParams& params,
                                          BackwardSmem<Arch, kTilesM>& smem, const Rows& block_rows,
                                          int64_t column_tile)
      : p(params),
        s(smem),
        rows(block_rows),
        scale_pipeline(scales_of(params.scales, params.gemm.weight, block_rows.expert()),
                       params.run_shift, 1.0f) {
    const int tid = threadIdx.x;
    k0 = column_tile * Traits::kTileK;
    m0 = rows.first;
    n_begin = blockIdx.z * p.n_per_split;
    length = static_cast<int>(min(p.n_per_split, p.gemm.weight.N - n_begin));
    lane = tid % 32;
    run = tid / 32 % Traits::kRuns;
    warp_n = tid / 32 / Traits::kRuns;
    locate_copies(tid);
    locate_scales(tid);
    const int g = lane / 4, t = lane % 4;
    lane_bytes = Traits::kCompact ? lane * 4 : lane * 8;
    w_read = (warp_n * 32 + t * 8) * Traits::kWRowBytes + (run ^ t) * 32 + g * 4;
    y_read = g * Traits::kYRowBytes + ((warp_n * 4 + t) ^ (g & 1) * 4) * 16;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
#pragma unroll
      for (int tile = 0; tile < kTilesM; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[byte][tile][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void locate_copies(int tid) {
    const int64_t K = p.gemm.weight.K;
    const int piece = tid % 8;  // of a row of W, two per run
    w_n = tid / 8;
    w_valid = k0 + piece * 32 < K;
    w_source =
        packed_of(p.gemm.weight, rows.expert()) + ((n_begin + w_n) * K + k0 + piece * 32) / 2;
    w_target = ptx::shared_address(s.w) + w_n * Traits::kWRowBytes +
               ((piece / 2) ^ (w_n / 8 & 3)) * 32 + piece % 2 * 16;

    const int unit = tid % 8, m = tid / 8;
    y_n = unit * 8;
    y_rows =
        static_cast<int>(min(rows.end(p.gemm.M) - m0, static_cast<int64_t>(Traits::kTileM))) - m;
    y_source = static_cast<const T*>(p.gemm.dY) + (m0 + m) * p.gemm.dY_stride + n_begin + y_n;
    y_target = ptx::shared_address(s.y) + m * Traits::kYRowBytes + (unit ^ (m & 1) * 4) * 16;
  }

  __device__ __forceinline__ void locate_scales(int tid) {
    const uint32_t runs_per_row = static_cast<uint32_t>(p.gemm.weight.K / kRun);
    const int tile_run = tid % Traits::kRuns, n = tid / Traits::kRuns;
    const uint32_t column = min(static_cast<uint32_t>(k0 / kRun) + tile_run, runs_per_row - 1);
    next_run = static_cast<uint32_t>(n_begin + n) * runs_per_row + column;
    last_run = static_cast<uint32_t>(n_begin + length - 1) * runs_per_row + column;
    scale_target = &s.scales[0][tile_run][n];
  }

  // Rows beyond the contraction repeat the last scale; their dY is zero.
  __device__ __forceinline__ void fetch_scale() {
    scale_pipeline.fetch(min(next_run, last_run));
    next_run += static_cast<uint32_t>(p.gemm.weight.K);  // 64 rows of K / 64 runs
  }
  __device__ __forceinline__ void store_scale(int buffer) {
    scale_target[buffer * (Traits::kRuns * Traits::kScalePitch)] = scale_pipeline.value();
  }

  __device__ __forceinline__ void fill_table() {
    const float* values = p.gemm.weight.values;
    if constexpr (Traits::kCompact) {  // [code][lane]
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int i = step * Traits::kThreads + threadIdx.x;
        *reinterpret_cast<float*>(s.table + i * 4) = values[i / 32];
      }
    } else {  // entry b: the values of byte b, the high nibble's (lower k) first, for each lane
#pragma unroll 4
      for (int step = 0; step < 16; ++step) {
        const int i = step * Traits::kThreads + threadIdx.x;
        const float high = values[i / 16 >> 4], low = values[i / 16 & 15];
        *reinterpret_cast<float4*>(s.table + i * 16) = make_float4(high, low, high, low);
      }
    }
  }

  // Starts the copies of the stage whose first row is `n`. Beyond the contraction dY is filled with
  // zeros, so W may be anything there; also beyond K, whose columns are not stored.
  __device__ __forceinline__ void copy_stage(int n, int slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t target = w_target + slot * Traits::kWStageBytes + i * 32 * Traits::kWRowBytes;
      if (w_valid && n + w_n + i * 32 < length) {
        ptx::cp_async_16(target, w_source + i * (16 * p.gemm.weight.K));
      }
    }
    const int left = length - n - y_n;  // elements of dY in this thread's 16 bytes
    const int bytes = left >= 8 ? 16 : left > 0 ? 2 * left : 0;
    const T* source = bytes > 0 ? y_source : static_cast<const T*>(p.gemm.dY);
#pragma unroll
    for (int i = 0; i < Traits::kYCopies; ++i) {
      const uint32_t target = y_target + slot * Traits::kYStageBytes + i * 32 * Traits::kYRowBytes;
      if (n < length && i * 32 < y_rows) {
        ptx::cp_async_16_zfill(target, source + (bytes > 0 ? i * (32 * p.gemm.dY_stride) : 0),
                               bytes);
      }
    }
    w_source += Traits::kStageN / 2 * p.gemm.weight.K;
    y_source += Traits::kStageN;
    ptx::cp_async_commit();
  }

  // The two values of byte `i` of `word`, the lower k first.
  __device__ __forceinline__ float2 decode_byte(uint32_t word, int i) const {
    if constexpr (Traits::kCompact) {
      const uint32_t high = (word >> (8 * i + 4) & 15) << 7 | lane_bytes;
      const uint32_t low = (word >> (8 * i) & 15) << 7 | lane_bytes;
      return make_float2(*reinterpret_cast<const float*>(s.table + high),
                         *reinterpret_cast<const float*>(s.table + low));
    } else {
      const uint32_t offset =
          ptx::prmt(word, lane_bytes, 0x5504 | i << 4);  // byte * 256 + lane * 8
      return *reinterpret_cast<const float2*>(s.table + offset);
    }
  }

  // This warp's 32 rows x 64 columns of a stage times the stage's rows of dY.
  __device__ __forceinline__ void multiply(int slot, int buffer) {
    const unsigned char* w = s.w[slot] + w_read;
    const unsigned char* y = s.y[slot] + y_read;
    const float* scale = &s.scales[buffer][run][warp_n * 32 + lane % 4 * 8];
    uint4 b[kTilesM];  // two mma steps each
#pragma unroll
    for (int tile = 0; tile < kTilesM; ++tile) {
      b[tile] = *reinterpret_cast<const uint4*>(y + tile * (8 * Traits::kYRowBytes));
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t words[4];  // rows n of this step
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = *reinterpret_cast<const uint32_t*>(w + (step * 4 + i) * Traits::kWRowBytes);
      }
      const float4 loaded = *reinterpret_cast<const float4*>(scale + step * 4);
      const float scales[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        float high[4], low[4];  // columns 8g + 2 * byte and + 1
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = decode_byte(words[i], byte);
          high[i] = __fmul_rn(pair.x, scales[i]);
          low[i] = __fmul_rn(pair.y, scales[i]);
        }
        const uint32_t a[4] = {pack_pair<T>(high[0], high[1]), pack_pair<T>(low[0], low[1]),
                               pack_pair<T>(high[2], high[3]), pack_pair<T>(low[2], low[3])};
#pragma unroll
        for (int tile = 0; tile < kTilesM; ++tile) {
          const uint32_t fragment[2] = {step == 0 ? b[tile].x : b[tile].z,
                                        step == 0 ? b[tile].y : b[tile].w};
          ptx::mma_k16<Arch, T>(acc[byte][tile], a, fragment);
        }
      }
    }
  }

  // acc += A^T dS^T over the rank: the two halves of the warps take 16 ranks in turn.
  __device__ __forceinline__ void add_bypass() {
    const Gemm4bitBackwardParams& gemm = p.gemm;
    const int g = lane / 4, t = lane % 4;
    const int64_t k = k0 + run * kRun + g * 8;
    const int64_t first = rows.expert() * gemm.R;  // row of lora_A
    for (int64_t r0 = warp_n * 16; r0 < gemm.R; r0 += 32) {
      const int64_t r = r0 + t * 4;
      const int ranks = static_cast<int>(min(max(gemm.R - r, int64_t{0}), int64_t{4}));
      float v[4][8];  // [rank][column]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float four[4];
          load_four(gemm.lora_A, gemm.lora_dtype, (first + r + i) * gemm.weight.K + k + half * 4,
                    i < ranks && k < gemm.weight.K ? 4 : 0, four);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i][half * 4 + j] = four[j];
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTilesM; ++tile) {
        const int64_t m = m0 + tile * 8 + g;
        float dS[4];
        load_four(gemm.lora_dS, DType::kFloat32, m * gemm.R + r, m < rows.end(gemm.M) ? ranks : 0,
                  dS);
        const uint32_t b[2] = {pack_pair<T>(dS[0], dS[1]), pack_pair<T>(dS[2], dS[3])};
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          const int high = 2 * byte, low = 2 * byte + 1;
          const uint32_t a[4] = {
              pack_pair<T>(v[0][high], v[1][high]), pack_pair<T>(v[0][low], v[1][low]),
              pack_pair<T>(v[2][high], v[3][high]), pack_pair<T>(v[2][low], v[3][low])};
          ptx::mma_k16<Arch, T>(acc[byte][tile], a, b);
        }
      }
    }
  }

  // Adds the sums of the two halves of the warps and stores rounded dX, or a part for reduce_parts.
  __device__ __forceinline__ void store_tile() {
    const Gemm4bitBackwardParams& gemm = p.gemm;
    const int g = lane / 4, t = lane % 4;
    const int column = run * kRun + g * 8;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (warp_n == 1) {
      for_each_row([&](int tile, int i) {
        float4* sums = reinterpret_cast<float4*>(&s.sums[tile * 8 + t * 2 + i][column]);
        sums[0] =
            make_float4(acc[0][tile][i], acc[0][tile][i + 2], acc[1][tile][i], acc[1][tile][i + 2]);
        sums[1] =
            make_float4(acc[2][tile][i], acc[2][tile][i + 2], acc[3][tile][i], acc[3][tile][i + 2]);
      });
    }
    __syncthreads();
    if (warp_n == 1 || k0 + column >= gemm.weight.K) return;
    for_each_row([&](int tile, int i) {
      const int row = tile * 8 + t * 2 + i;
      const int64_t m = m0 + row;
      if (m >= rows.end(gemm.M)) return;
      const float4* sums = reinterpret_cast<const float4*>(&s.sums[row][column]);
      const float4 left = sums[0], right = sums[1];
      const float v[8] = {acc[0][tile][i] + left.x,  acc[0][tile][i + 2] + left.y,
                          acc[1][tile][i] + left.z,  acc[1][tile][i + 2] + left.w,
                          acc[2][tile][i] + right.x, acc[2][tile][i + 2] + right.y,
                          acc[3][tile][i] + right.z, acc[3][tile][i + 2] + right.w};
      const int64_t at = m * gemm.weight.K + k0 + column;
      if (!Rows::kGrouped && gridDim.z > 1) {
        store_eight(p.parts + blockIdx.z * gemm.M * gemm.weight.K + at, v);
      } else {
        store_eight(static_cast<T*>(gemm.dX) + at, v);
      }
    });
  }

  // Calls f(mma tile, i) for each row of dX that this lane holds: row m = 8 * tile + 2t + i, with
  // i = 0 or 1.
  template <class F>
  __device__ __forceinline__ static void for_each_row(F f) {
#pragma unroll
    for (int tile = 0; tile < kTilesM; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) f(tile, i);
    }
  }

  __device__ __forceinline__ void run_all() {
    constexpr int kAhead = Traits::kStages - 1;
    for (int stage = 0; stage < kAhead; ++stage) copy_stage(stage * Traits::kStageN, stage);
    fetch_scale();
    fill_table();
    scale_pipeline.look_up();
    store_scale(0);
    fetch_scale();
    scale_pipeline.look_up();
    fetch_scale();
    int slot = 0, buffer = 0;
    for (int n = 0; n < length; n += Traits::kStageN) {
      ptx::cp_async_wait<kAhead - 1>();
      __syncthreads();  // all threads see this stage and have read the one before
      copy_stage(n + kAhead * Traits::kStageN, slot == 0 ? kAhead : slot - 1);
      store_scale(buffer ^ 1);
      scale_pipeline.look_up();
      fetch_scale();
      multiply(slot, buffer);
      slot = slot == kAhead ? 0 : slot + 1;
      buffer ^= 1;
    }
    if (blockIdx.z == 0 && p.gemm.R > 0) add_bypass();
    store_tile();
  }
};

template <class Arch, class T, int kTilesM, bool kNested>
__global__ void __launch_bounds__(256, 1) gemm_4bit_backward_fused(BackwardParams p) {
  if constexpr (!ptx::is_compiled<Arch, BackwardSmem<Arch, kTilesM>>()) {
    ptx::trap();
  } else {
    const OneWeight rows{static_cast<int64_t>(blockIdx.y) * BackwardTraits<Arch, kTilesM>::kTileM};
    BackwardTile<Arch, T, kTilesM, kNested, OneWeight> tile(
        p, ptx::shared_memory<BackwardSmem<Arch, kTilesM>>(), rows, blockIdx.x);
    tile.run_all();
  }
}

}  // namespace qlora_ext
