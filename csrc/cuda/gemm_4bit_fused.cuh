// gemm_4bit_fused: y = x W^T + bias + S B^T on tensor cores, the weight decoded in registers on its
// way from the checkpoint's bytes to mma fragments. One kernel for M = 1 (decode) to a few hundred.
//
// Moves   the packed weight once per kTileM rows of x (0.516 B/weight), x once per kTileN columns.
// Floor   M <= 16: the weight's bytes over bandwidth: 4096x14336 10.1 us, 8192x8192 11.5 us (H100).
//         From M ~ 69 (H100) the tensor cores: mma.sync reaches ~63% of Hopper's peak.
// MMA     m16n8k16 with the weight as A (16 rows n) and x as B (8 rows m), so that M = 8 wastes
//         nothing and M = 1 costs no more instructions than M = 8. fp32 accumulators.
// k order k is permuted inside each run of 64: lane t of a quad owns its elements 16t .. 16t + 15,
//         8 consecutive bytes of W and 32 of x, and mma step j takes 4j .. 4j + 3 from each lane.
// Decode  pair table: a whole byte selects two 16-bit values. The table has one copy per bank, so
//         look-ups never conflict, and 256 bytes between entries, so that one PRMT (table offset =
//         byte * 256 + lane * 4) and one LDS decode two weights. The packed stages fill the other
//         128 bytes of each 256.
// Scales  64 elements along k share one scale (blocksize a multiple of 64, K too), so the scale
//         multiplies the accumulator of four mma: fp32, 1/8 FFMA per weight and 8 rows. Nested
//         scales are decoded once per stage and thread, one stage ahead, without FMA.
// Warps   8: each owns 32 rows n and one run of 64 k of every stage; warps along k hold partial
//         sums that are added in order at the end. Blocks along k (splits) write partial sums to
//         the workspace. Up to 16 rows the last block of a tile adds them in order (last_block.cuh),
//         above reduce_parts does.
// Bypass  S B^T is R / 16 more mma steps into the same accumulators; S and B are rounded to T: with
//         fp16, an S beyond 65504 becomes Inf.
// Rounding the codebook, times a factor that makes its errors small and cancel (table_factor.cuh),
//         is rounded to T; scale, sums and bias are fp32; y is rounded once.
// Shared  65536 table + packed stages, 32768 x (65536 at 64 rows), 2304 scales: 100608 bytes, two
//         blocks per SM on H100, one on A100 and on sm_86/89/120 (limit 101376).
#pragma once

#include "cuda/gemm_4bit_fused_layout.cuh"
#include "cuda/row_groups.cuh"

namespace qlora_ext {

// This thread's 16-byte pieces of a stage of x: `kCount` rows `kStep` apart.
template <class T, class Rows, int kCount, int kStep>
struct RowPieces {
  const T* source;

  __device__ __forceinline__ void locate(const T* x, int64_t stride, const Rows&, int64_t row,
                                         int) {
    source = x + row * stride;
  }
  __device__ __forceinline__ void copy(uint32_t target, int i, int64_t stride) const {
    ptx::cp_async_16(target, source + i * (kStep * stride));
  }
  __device__ __forceinline__ void advance(int elements) { source += elements; }
};

// The same through an index. A row outside x is filled with zeros.
template <class T, int kCount, int kStep>
struct RowPieces<T, ExpertRows, kCount, kStep> {
  const T* source;
  int row[kCount];

  __device__ __forceinline__ void locate(const T* x, int64_t, const ExpertRows& rows, int64_t first,
                                         int count) {
    source = x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      row[i] = i * kStep < count ? static_cast<int>(rows.source(first + i * kStep)) : -1;
    }
  }
  __device__ __forceinline__ void copy(uint32_t target, int i, int64_t stride) const {
    ptx::cp_async_16_zfill(target, source + max(row[i], 0) * stride, row[i] < 0 ? 0 : 16);
  }
  __device__ __forceinline__ void advance(int elements) { source += elements; }
};

// One block's tile: [kTileN] columns n0.. of y, [kTileM] rows m0.., contraction [k_begin, k_end).
template <class Arch, class T, int kTilesM, bool kNested, class Rows>
struct FusedTile {
  using Traits = FusedTraits<Arch, kTilesM>;
  static constexpr bool kAddsParts = !Rows::kGrouped && last_block_adds<kTilesM>;

  const FusedParams& p;
  FusedSmem<Arch, kTilesM>& s;
  const Rows rows;
  int64_t n0, m0, k_begin;
  int length;             // of the contraction in this block; the k below count from k_begin
  int lane, warp_n, run;  // this warp's 32 rows and run of 64

  // Copies: this thread's first 16-byte pieces of W and of x in a stage. Its other pieces lie a
  // fixed number of rows below.
  const uint8_t* w_source;
  RowPieces<T, Rows, Traits::kXCopies, Traits::kXCopyRows> x_pieces;
  uint32_t w_target, x_target;  // shared addresses in stage 0
  int w_k, x_k;                 // k of the pieces, counted from the stage's first
  int w_rows, x_rows;           // how many rows exist from the first piece's on

  // Scales: this thread's (row, run) of a stage.
  ScalePipeline<kNested> scale_pipeline;
  uint32_t next_run, last_run;  // flat run index of the next fetch; the last one of this row
  float* scale_target;

  // Fragments: what this lane reads of a stage.
  uint32_t lane_bytes;  // lane * 4 (compact: lane % 16 * 4)
  int w_read, x_read, x_read_other;
  bool has_row;         // with one mma tile of rows: whether this lane's row of x exists
  uint4 x_low, x_high;  // what it read last; zeros without a row

  float acc[2][kTilesM][4];  // [16 rows n][8 rows m][mma register]

  __device__ __forceinline__ FusedTile(const FusedParams& params, FusedSmem<Arch, kTilesM>& smem,
                                       const Rows& block_rows, int64_t column_tile)
      : p(params),
        s(smem),
        rows(block_rows),
        scale_pipeline(scales_of(params.scales, params.gemm.weight, block_rows.expert()),
                       params.run_shift, params.scale_factor) {
    const int tid = threadIdx.x;
    n0 = column_tile * Traits::kTileN;
    m0 = rows.first;
    k_begin = blockIdx.z * p.k_per_split;
    length = static_cast<int>(min(p.k_per_split, p.gemm.weight.K - k_begin));
    lane = tid % 32;
    warp_n = tid / 32 / Traits::kRuns;
    run = tid / 32 % Traits::kRuns;
    locate_copies(tid);
    locate_scales(tid);
    const int g = lane / 4, t = lane % 4;
    lane_bytes = Traits::kCompact ? lane % 16 * 4 : lane * 4;
    w_read = Traits::kFirstLine + Traits::segment(warp_n * 32 + g, run) + t * 8;
    const int unit = run * 8 + t * 2;
    x_read = g * Traits::kXRowBytes + (unit ^ (g & 1)) * 16;
    x_read_other = x_read ^ 16;
    has_row = g < rows.end(p.gemm.M) - m0;
    x_low = x_high = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < kTilesM; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[half][tile][i] = 0.0f;
      }
    }
  }

  // Rows beyond N repeat the last one (their results are not stored).
  __device__ __forceinline__ int64_t weight_row(int n) const {
    return min(n0 + n, p.gemm.weight.N - 1);
  }

  __device__ __forceinline__ void locate_copies(int tid) {
    constexpr int kPieces = Traits::kTileK / 32;  // of a packed row
    const int64_t K = p.gemm.weight.K;
    const int piece = tid % kPieces, n = tid / kPieces;
    w_k = piece * 32;
    const int segment = Traits::segment(n, piece / 2) + piece % 2 * 16;
    w_target = ptx::shared_address(s.table) + Traits::kFirstLine + segment;
    w_source = packed_of(p.gemm.weight, rows.expert()) + ((n0 + n) * K + k_begin + w_k) / 2;
    w_rows = static_cast<int>(min(p.gemm.weight.N - n0, static_cast<int64_t>(Traits::kTileN))) - n;

    constexpr int kUnits = Traits::kTileK / 8;  // of a row of x
    const int unit = tid % kUnits, m = tid / kUnits;
    x_k = unit * 8;
    x_target = ptx::shared_address(s.x) + m * Traits::kXRowBytes + (unit ^ (m & 1)) * 16;
    x_rows =
        static_cast<int>(min(rows.end(p.gemm.M) - m0, static_cast<int64_t>(Traits::kTileM))) - m;
    x_pieces.locate(static_cast<const T*>(p.gemm.x) + k_begin + x_k, p.gemm.x_stride, rows, m0 + m,
                    x_rows);
  }

  __device__ __forceinline__ void locate_scales(int tid) {
    const int stage_run = tid % Traits::kRuns, n = tid / Traits::kRuns;
    const uint32_t first =
        static_cast<uint32_t>((weight_row(n) * p.gemm.weight.K + k_begin) / kRun);
    next_run = first + stage_run;
    last_run = first + length / kRun - 1;
    scale_target = &s.scales[0][stage_run][n];
  }

  __device__ __forceinline__ float codebook_value(int code) const {
    if constexpr (kTilesM == 1 && !kNested) {
      if (p.gemm.table != nullptr) return __ldg(p.gemm.table + code);
    }
    return p.gemm.weight.values[code];
  }

  // Entry b of the pair table: the two values of byte b, the high nibble's (lower k) first.
  __device__ __forceinline__ void fill_table() {
    constexpr int kLanes = Traits::kCompact ? 4 : 8;  // that write one entry
#pragma unroll
    for (int step = 0; step < kLanes; ++step) {
      const int i = step * Traits::kThreads + threadIdx.x;
      const int entry = i / kLanes;
      const uint32_t pair = pack_pair<T>(codebook_value(entry >> 4) * p.table_factor,
                                         codebook_value(entry & 15) * p.table_factor);
      *reinterpret_cast<uint4*>(s.table + entry * Traits::kPairStride + i % kLanes * 16) =
          make_uint4(pair, pair, pair, pair);
    }
  }

  // Zeros for the rows of x beyond M, in every stage. With one mma tile of rows no lane reads them.
  __device__ __forceinline__ void fill_rows_beyond() {
    if constexpr (kTilesM == 1) return;
    constexpr int kRowUnits = Traits::kXRowBytes / 16;
    const int64_t left = rows.end(p.gemm.M) - m0;
    const int count = left < Traits::kTileM ? static_cast<int>(left) : Traits::kTileM;
#pragma unroll 1
    for (int stage = 0; stage < Traits::kStages; ++stage) {
#pragma unroll 1
      for (int i = count * kRowUnits + threadIdx.x; i < Traits::kTileM * kRowUnits;
           i += Traits::kThreads) {
        *reinterpret_cast<uint4*>(s.x[stage] + i * 16) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Starts the copies of the stage whose first k is `k`. Rows of W beyond N are not copied: they
  // affect only columns of y that are not stored.
  __device__ __forceinline__ void copy_stage(int k, int slot) {
    constexpr int kWCopyRows = Traits::kTileN / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t target =
          w_target + (slot * Traits::kStageLines + i * 32) * Traits::kLineStride;
      if (k + w_k < length && i * kWCopyRows < w_rows) {
        ptx::cp_async_16(target, w_source + i * (kWCopyRows * p.gemm.weight.K / 2));
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kXCopies; ++i) {
      const uint32_t target =
          x_target + slot * Traits::kXStageBytes + i * Traits::kXCopyRows * Traits::kXRowBytes;
      if (k + x_k < length && i * Traits::kXCopyRows < x_rows) {
        x_pieces.copy(target, i, p.gemm.x_stride);
      }
    }
    w_source += Traits::kTileK / 2;
    x_pieces.advance(Traits::kTileK);
    ptx::cp_async_commit();
  }

  // After the last run this fetches its scale again, which nothing uses.
  __device__ __forceinline__ void fetch_scale() {
    scale_pipeline.fetch(min(next_run, last_run));
    next_run += Traits::kRuns;
  }
  __device__ __forceinline__ void store_scale(int buffer) {
    scale_target[buffer * (Traits::kRuns * Traits::kScalePitch)] = scale_pipeline.value();
  }

  // The two values of byte `i` of `word`, ready for an mma fragment.
  __device__ __forceinline__ uint32_t decode_byte(uint32_t word, int i) const {
    uint32_t offset;
    if constexpr (Traits::kCompact) {
      offset = (i == 0 ? word << 6 : word >> (8 * i - 6)) & (255 * 64);
      offset |= lane_bytes;
    } else {
      offset = ptx::prmt(word, lane_bytes, 0x5504 | i << 4);  // byte i * 256 + lane * 4
    }
    return *reinterpret_cast<const uint32_t*>(s.table + offset);
  }

  // This warp's 32 x 64 weights of a stage times the stage's rows of x.
  __device__ __forceinline__ void multiply(int slot, int buffer) {
    constexpr int kEightRows = 8 * (Traits::kTileK / kRun) / 4 * Traits::kLineStride;
    const unsigned char* w = s.table + w_read + slot * (Traits::kStageLines * Traits::kLineStride);
    uint32_t a[2][4][4];  // [16 rows n][mma step][register]
#pragma unroll
    for (int row = 0; row < 4; ++row) {  // g, g + 8, g + 16, g + 24
      const uint2 packed = *reinterpret_cast<const uint2*>(w + row * kEightRows);
#pragma unroll
      for (int byte = 0; byte < 8; ++byte) {
        a[row / 2][byte / 2][row % 2 + byte % 2 * 2] =
            decode_byte(byte < 4 ? packed.x : packed.y, byte % 4);
      }
    }
    const float* scale = &s.scales[buffer][run][warp_n * 32 + lane / 4];
    float scales[4];
#pragma unroll
    for (int row = 0; row < 4; ++row) scales[row] = scale[row * 8];
    const unsigned char* x = s.x[slot];
#pragma unroll
    for (int tile = 0; tile < kTilesM; ++tile) {
      const unsigned char* eight = x + tile * (8 * Traits::kXRowBytes);
      uint4 low, high;
      if constexpr (kTilesM == 1) {
        const uint32_t stage = ptx::shared_address(x);
        ptx::load_shared_if(x_low, stage + x_read, has_row);
        ptx::load_shared_if(x_high, stage + x_read_other, has_row);
        low = x_low, high = x_high;
      } else {
        low = *reinterpret_cast<const uint4*>(eight + x_read);
        high = *reinterpret_cast<const uint4*>(eight + x_read_other);
      }
      const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int step = 0; step < 4; ++step) ptx::mma_k16<Arch, T>(sum, a[half][step], b[step]);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[half][tile][i] += scales[half * 2 + i / 2] * sum[i];
      }
    }
  }

  // acc += B S^T over the rank: warps along k take 16 ranks in turn.
  __device__ __forceinline__ void add_bypass() {
    const Gemm4bitParams& gemm = p.gemm;
    const int g = lane / 4, t = lane % 4;
    const int64_t first = rows.expert() * gemm.weight.N;  // row of lora_B
    for (int64_t r0 = run * 16; r0 < gemm.R; r0 += Traits::kRuns * 16) {
      const int64_t r = r0 + t * 4;
      const int ranks = static_cast<int>(min(max(gemm.R - r, int64_t{0}), int64_t{4}));
      uint32_t a[2][4];
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        const int64_t n = n0 + warp_n * 32 + row * 8 + g;
        float v[4];
        load_four(gemm.lora_B, gemm.lora_dtype, (first + n) * gemm.R + r,
                  n < gemm.weight.N ? ranks : 0, v);
        a[row / 2][row % 2] = pack_pair<T>(v[0], v[1]);
        a[row / 2][row % 2 + 2] = pack_pair<T>(v[2], v[3]);
      }
#pragma unroll
      for (int tile = 0; tile < kTilesM; ++tile) {
        const int64_t m = m0 + tile * 8 + g;
        float v[4];
        load_four(gemm.lora_S, DType::kFloat32, m * gemm.S_stride + r,
                  m < rows.end(gemm.M) ? ranks : 0, v);
        const uint32_t b[2] = {pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3])};
#pragma unroll
        for (int half = 0; half < 2; ++half) ptx::mma_k16<Arch, T>(acc[half][tile], a[half], b);
      }
    }
  }

  // Element `at` of y, in column n, from its sum.
  __device__ __forceinline__ void store_y(int64_t at, int64_t n, float v) const {
    const Gemm4bitParams& gemm = p.gemm;
    if (gemm.bias != nullptr)
      v += load_as_float(gemm.bias, gemm.bias_dtype, rows.expert() * gemm.weight.N + n);
    static_cast<T*>(gemm.y)[at] = from_float<T>(v);
  }

  // Adds the parts of all blocks of the tile. The last one calls it.
  __device__ __forceinline__ void add_parts_of_tile() {
    const int64_t N = p.gemm.weight.N;
    const int num_rows = static_cast<int>(min(p.gemm.M - m0, static_cast<int64_t>(Traits::kTileM)));
    const int columns = static_cast<int>(min(N - n0, static_cast<int64_t>(Traits::kTileN)));
    const auto locate = [&](int i) { return (m0 + i / columns) * N + n0 + i % columns; };
    add_parts<Traits::kThreads>(
        p.parts, gridDim.z, p.gemm.M * N, num_rows * columns, reinterpret_cast<float*>(s.table),
        locate, [&](int i, int64_t at, float sum) { store_y(at, n0 + i % columns, sum); });
  }

  // Adds the sums of the warps along k in order and stores rounded y, or a part of it.
  __device__ __forceinline__ void store_tile() {
    float* sums = reinterpret_cast<float*>(s.table);  // [run][m][n]
    static_assert(Traits::kRuns * Traits::kTileM * Traits::kTileN * 4 <= Traits::kTableBytes,
                  "partial sums fit where the table was");
    const int g = lane / 4, t = lane % 4;
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < kTilesM; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = warp_n * 32 + half * 16 + i / 2 * 8 + g;
          const int m = tile * 8 + t * 2 + i % 2;
          sums[(run * Traits::kTileM + m) * Traits::kTileN + n] = acc[half][tile][i];
        }
      }
    }
    __syncthreads();
    const Gemm4bitParams& gemm = p.gemm;
    const int64_t N = gemm.weight.N;
    for (int i = threadIdx.x; i < Traits::kTileM * Traits::kTileN; i += Traits::kThreads) {
      const int64_t m = m0 + i / Traits::kTileN, n = n0 + i % Traits::kTileN;
      if (m >= rows.end(gemm.M) || n >= N) continue;
      float v = 0.0f;
#pragma unroll
      for (int r = 0; r < Traits::kRuns; ++r) v += sums[r * Traits::kTileM * Traits::kTileN + i];
      if (!Rows::kGrouped && gridDim.z > 1) {
        p.parts[(blockIdx.z * gemm.M + m) * N + n] = v;
      } else {
        store_y(m * N + n, n, v);
      }
    }
  }

  __device__ __forceinline__ void run_all() {
    constexpr int kAhead = Traits::kStages - 1;
    for (int stage = 0; stage < kAhead; ++stage) copy_stage(stage * Traits::kTileK, stage);
    fetch_scale();
    const Arrival arrival(kAddsParts ? p.arrivals : Arrivals{});
    fill_table();
    fill_rows_beyond();
    arrival.expect();
    scale_pipeline.look_up();
    store_scale(0);
    fetch_scale();
    scale_pipeline.look_up();
    fetch_scale();
    for (int k = 0; k < length;) {
#pragma unroll
      for (int slot = 0; slot < Traits::kStages; ++slot) {  // slots are then immediate offsets
        if (k >= length) break;
        ptx::cp_async_wait<kAhead - 1>();
        __syncthreads();  // all threads see this stage and have read the one before
        copy_stage(k + kAhead * Traits::kTileK, (slot + kAhead) % Traits::kStages);
        store_scale((slot + 1) % 2);
        scale_pipeline.look_up();
        fetch_scale();
        if (k + run * kRun < length) multiply(slot, slot % 2);
        k += Traits::kTileK;
      }
    }
    if (blockIdx.z == 0 && p.gemm.R > 0) add_bypass();
    store_tile();
    if (arrival.counts() && arrival.is_last(gridDim.z)) add_parts_of_tile();
  }
};

// Blocks per SM that registers must allow: two, since shared memory has room for two on H100. From
// 32 rows of x on, two blocks would spill.
template <int kTilesM>
constexpr int kFusedBlocksPerSm = kTilesM <= 2 ? 2 : 1;

template <class Arch, class T, int kTilesM, bool kNested>
__global__ void __launch_bounds__(256, kFusedBlocksPerSm<kTilesM>) gemm_4bit_fused(FusedParams p) {
  if constexpr (!ptx::is_compiled<Arch, FusedSmem<Arch, kTilesM>>()) {
    ptx::trap();
  } else {
    const OneWeight rows{static_cast<int64_t>(blockIdx.y) * FusedTraits<Arch, kTilesM>::kTileM};
    FusedTile<Arch, T, kTilesM, kNested, OneWeight> tile(
        p, ptx::shared_memory<FusedSmem<Arch, kTilesM>>(), rows, blockIdx.x);
    tile.run_all();
  }
}

}  // namespace qlora_ext
