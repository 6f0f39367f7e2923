// Dispatch's arithmetic. It decides which operands tensor cores take, up to how many rows a kernel
// decodes W itself, how a contraction is split over blocks, and how much of W is decoded at a time
// for cuBLAS. The choices minimise a modelled time. The model's constants come from a simulation of
// the compiled kernels (docs/kernels.md, "Dispatch").
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.cuh"
#include "cuda/scale_pipeline.cuh"
#include "dispatch.h"

namespace qlora_ext {

inline bool has_tensor_cores(DType dtype, const DeviceInfo& device) {
  return dtype == DType::kFloat16    ? device.arch >= 75
         : dtype == DType::kBFloat16 ? device.arch >= 80
                                     : false;
}

// f(architecture, tag of the 16-bit type) of the fused kernels that this device runs for a dtype.
// sm_75 has only fp16, and kernels of at most four mma tiles of rows.
template <int kTilesM, class F>
const char* visit_fused(DType dtype, const F& f) {
  if (device_info().arch < 80) {
    if constexpr (kTilesM <= 4) return f(Sm75{}, TypeTag<__half>{});
  }
  return dtype == DType::kFloat16 ? f(Sm80{}, TypeTag<__half>{})
                                  : f(Sm80{}, TypeTag<__nv_bfloat16>{});
}

// What the tensor-core kernels require of a weight and of the rows of x or dY.
inline bool fused_can_read(const PackedWeight& w, const void* x, int64_t stride, DType dtype,
                           const DeviceInfo& device) {
  return has_tensor_cores(dtype, device) && has_uniform_runs(w) && is_aligned(x, 16) &&
         stride % 8 == 0;
}

// Up to this many rows of x (backward: of dY) the kernel decodes W itself. Above, W is decoded to
// memory and cuBLAS multiplies it. On Ampere, Ada and consumer Blackwell mma.sync reaches the
// tensor cores' full rate. Hopper and data-centre Blackwell need wgmma and tcgen05 for that;
// mma.sync reaches about 60%. At 128 rows of 14336x4096 on an H200 the model gives the kernel 0.85
// to 0.90 of the time of two passes (docs/generated/kernel_model.md).
inline int64_t fused_max_rows(const DeviceInfo& device) {
  if (device.arch < 80) return 64;
  return device.arch >= 90 && device.arch < 120 ? 128 : 256;
}
// One FFMA tile has 64 rows. Above that cuBLAS is far ahead.
constexpr int64_t kAnyMaxRows = 64;

// Simulated time of a stage (16384 weights) of gemm_4bit_fused and of its backward, in a block alone
// on its SM, by mma tiles of 8 rows: 631, 733, 1013 and 1657 cycles at 1.7 GHz; 1154 and 1653.
constexpr float fused_stage(int tiles) {
  return tiles == 1 ? 0.37f : tiles == 2 ? 0.43f : tiles == 4 ? 0.6f : 0.97f;
}
constexpr float backward_stage(int tiles) { return tiles == 4 ? 0.68f : 0.97f; }
// What a further block on the SM adds to fused_stage.
constexpr float kFusedShare = 0.6f;

// ---------------------------------------------------------------- grouped products

// A tile of `rows` rows, and the time of a stage of it on an SM.
struct RowTile {
  int rows;
  float time;
};

// Which of the tiles takes the least time for M rows of E experts, if the experts that have rows
// have about the same number. Those take half a tile more than their rows fill, on average.
inline int best_row_tile(int64_t M, int64_t E, std::initializer_list<RowTile> tiles) {
  const float mean =
      static_cast<float>(M) / static_cast<float>(std::max<int64_t>(1, std::min(E, M)));
  int best = 0;
  float least = 0;
  for (const RowTile& tile : tiles) {
    const float size = static_cast<float>(tile.rows);
    const float count = static_cast<float>(M) <= size ? 1.0f : std::max(1.0f, mean / size + 0.5f);
    if (best == 0 || count * tile.time < least) {
      best = tile.rows;
      least = count * tile.time;
    }
  }
  return best;
}

// ---------------------------------------------------------------- splits of a contraction

// What one kernel's blocks cost, in microseconds.
struct BlockCost {
  int resident;          // blocks that an SM holds at once
  int64_t least_stages;  // that a split must have
  float stage;           // one stage of a block that has its SM to itself
  float share;           // what each further resident block adds to that
  float start;           // time before the first stage: filling a table, the first loads
};

struct Splits {
  int64_t count;
  int64_t stages;     // per split; the last may have fewer
  float time = 0.0f;  // in microseconds
};

constexpr int64_t kMostParts = 64;

// What it costs to add the parts of a split.
struct Reduction {
  float once;
  float part;  // each
};
// A second launch, which reads them from L2 at 5 TB/s.
constexpr Reduction reduce_parts_cost(int64_t numel) {
  return {.once = 1.8f, .part = 8 / 5e6f * static_cast<float>(numel)};
}
// The last block of each tile: three trips to L2, and one more for each eight loads of its 256
// threads. Estimated, not simulated.
constexpr Reduction last_block_cost(int64_t tile_numel) {
  return {.once = 1.2f, .part = 0.35f / 2048 * static_cast<float>(tile_numel)};
}

// The split of `stages` with the least time for the kernel and its reduction. Blocks run in waves
// of SMs x resident, so a grid a little larger than a full wave costs a whole extra one. The split
// sets the order of the sums, so it depends on nothing but shapes and the device.
inline Splits split_contraction(int64_t tiles, int64_t stages, const Reduction& reduction,
                                const BlockCost& cost) {
  const int64_t sms = device_info().sm_count;
  // Beyond eight waves of blocks a further split gains nothing.
  const int64_t most = std::clamp<int64_t>(
      std::min(stages / cost.least_stages, 8 * sms * cost.resident / std::max<int64_t>(tiles, 1)),
      1, kMostParts);
  Splits best{.count = 1, .stages = stages};
  float least = 0;
  for (int64_t wanted = 1; wanted <= most; ++wanted) {
    const int64_t per_split = ceil_div(stages, wanted);
    const int64_t count = stages > 0 ? ceil_div(stages, per_split) : 1;
    const int64_t blocks = tiles * count;
    const int64_t full_waves = blocks / (sms * cost.resident);
    const int64_t rest = ceil_div(blocks - full_waves * sms * cost.resident, sms);  // blocks an SM
    const auto turns = [&](int64_t resident) {
      return cost.start + static_cast<float>(per_split) *
                              (cost.stage + cost.share * static_cast<float>(resident - 1));
    };
    float time = static_cast<float>(full_waves) * turns(cost.resident);
    if (rest > 0) time += turns(rest);
    if (count > 1) time += reduction.once + reduction.part * static_cast<float>(count);
    if (wanted == 1 || time < least) {
      least = time;
      best = {.count = count, .stages = per_split, .time = time};
    }
  }
  return best;
}

// ---------------------------------------------------------------- chunks of W for cuBLAS

// What limits cuBLAS's product and the decoding of a chunk: numbers from data sheets, reduced as
// far as measured ceilings of the same family fall short (H100: 788 of 989 TFLOP/s).
struct DeviceSpeed {
  float sm_mflop_us;  // million flops an SM does in a microsecond (TFLOP/s), 16-bit operands
  float sm_fp32;      // the same for fp32 operands, without TF32
  float memory;       // TB/s
  float l2;           // TB/s
};

inline DeviceSpeed device_speed(const DeviceInfo& device) {
  if (device.arch < 80) {  // T4
    return {.sm_mflop_us = 1.0f, .sm_fp32 = 0.20f, .memory = 0.27f, .l2 = 1.0f};
  }
  if (device.arch == 80) {  // A100
    return {.sm_mflop_us = 2.5f, .sm_fp32 = 0.18f, .memory = 1.7f, .l2 = 3.5f};
  }
  if (device.arch < 90) {  // RTX 3090 to 4090
    return {.sm_mflop_us = 1.3f, .sm_fp32 = 0.43f, .memory = 0.9f, .l2 = 3.0f};
  }
  if (device.arch < 100) {  // H100, H200
    return {.sm_mflop_us = 6.0f, .sm_fp32 = 0.43f, .memory = 3.6f, .l2 = 5.0f};
  }
  if (device.arch < 120) {  // B200
    return {.sm_mflop_us = 11.0f, .sm_fp32 = 0.45f, .memory = 7.0f, .l2 = 8.0f};
  }
  // RTX 5090
  return {.sm_mflop_us = 1.3f, .sm_fp32 = 0.55f, .memory = 1.5f, .l2 = 4.0f};
}

// cuBLAS's time for [M, lines] over `depth`, in microseconds, with the best of its tiles. Each tile
// reaches a share of the peak and runs in waves of one tile per SM.
inline float product_time(int64_t M, int64_t lines, int64_t depth, float sm_mflop_us, int64_t sms) {
  struct Tile {
    int64_t rows, columns;
    float share;
  };
  constexpr Tile kTiles[] = {
      {.rows = 128, .columns = 256, .share = 1.0f},  {.rows = 256, .columns = 128, .share = 1.0f},
      {.rows = 128, .columns = 128, .share = 0.86f}, {.rows = 64, .columns = 256, .share = 0.8f},
      {.rows = 64, .columns = 128, .share = 0.66f},
  };
  float best = 0;
  for (const Tile& tile : kTiles) {
    const int64_t waves = ceil_div(ceil_div(M, tile.rows) * ceil_div(lines, tile.columns), sms);
    const float flops = 2 * static_cast<float>(waves * tile.rows * tile.columns) *
                        static_cast<float>(depth) / tile.share;
    if (best == 0 || flops < best) best = flops;
  }
  return best / (sm_mflop_us * 1e6f);
}

constexpr int64_t kMostChunkBytes = int64_t{128} << 20;
constexpr int64_t kLeastChunkBytesPerSm = int64_t{128}
                                          << 10;  // less is mostly launches; 132 SMs: 16 MiB
constexpr int64_t kChunkStep = 128;               // lines: cuBLAS's tiles are 128 or 256 wide
constexpr float kChunkLaunches = 3.3f;            // microseconds: decode, multiply
constexpr float kChunkSlack = 1.03f;              // how much slower a smaller chunk may be

// How many lines of W go into a chunk. Each line makes one column of the [M, lines] result: it is a
// row of W forward (lines N, depth K), a column of W backward (lines K, depth N). Takes the
// smallest chunk whose modelled time is within 3% of the best. Small chunks stay in L2 until cuBLAS
// reads them; large ones fill its waves. Chunks are of equal size, a multiple of 128 lines.
inline int64_t chunk_lines(int64_t M, int64_t lines, int64_t depth, DType dtype) {
  const DeviceInfo& device = device_info();
  const DeviceSpeed speed = device_speed(device);
  const float sm_mflop_us = dtype == DType::kFloat32 ? speed.sm_fp32 : speed.sm_mflop_us;
  const int64_t line_bytes = std::max<int64_t>(depth, 1) * dtype_size(dtype);
  const auto chunk_time = [&](int64_t count) {
    const float bytes = static_cast<float>(count * line_bytes);
    const float in_l2 = std::min(1.0f, static_cast<float>(device.l2_bytes) / 2 / bytes);
    const float decode = bytes * (in_l2 / speed.l2 + (1 - in_l2) / speed.memory) / 1e6f;
    return kChunkLaunches + decode + product_time(M, count, depth, sm_mflop_us, device.sm_count);
  };
  const auto time_of = [&](int64_t size) {
    const int64_t rest = lines % size;
    return static_cast<float>(lines / size) * chunk_time(size) + (rest > 0 ? chunk_time(rest) : 0);
  };
  const int64_t most_lines =
      std::max<int64_t>(kMostChunkBytes / line_bytes / kChunkStep * kChunkStep, kChunkStep);
  const int64_t least_lines =
      std::max<int64_t>(kLeastChunkBytesPerSm * device.sm_count / line_bytes, kChunkStep);
  constexpr int64_t kMostCuts = 64;  // to compare; for a huge weight, the coarsest ones
  const int64_t first = ceil_div(lines, most_lines);
  const int64_t last = std::max(first, std::min(lines / least_lines, first + kMostCuts));
  const auto size_of = [&](int64_t chunks) {
    return std::min(lines, align_up(ceil_div(lines, chunks), kChunkStep));
  };
  float least = time_of(size_of(first));
  for (int64_t chunks = first + 1; chunks <= last; ++chunks) {
    least = std::min(least, time_of(size_of(chunks)));
  }
  int64_t chunks = last;
  while (chunks > first && time_of(size_of(chunks)) > kChunkSlack * least) --chunks;
  return size_of(chunks);
}

}  // namespace qlora_ext
