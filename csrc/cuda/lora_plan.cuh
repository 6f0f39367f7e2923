// Dispatch of the LoRA products: which kernel, and how a contraction is cut.
#pragma once

#include <algorithm>

#include "cuda/heuristics.cuh"
#include "cuda/last_block.cuh"
#include "cuda/lora_mma_operands.cuh"

namespace qlora_ext {

// lora_mma.cuh takes a 16-bit x or dY whose rows, of `cols` contiguous elements, are 16-byte
// aligned. fp16 is multiplied as bf16 too, which sm_75 lacks.
inline bool lora_mma_can_run(const void* big, DType dtype, int64_t stride, int64_t cols) {
  return dtype != DType::kFloat32 && device_info().arch >= 80 && is_aligned(big, 16) &&
         stride % 8 == 0 && cols % 8 == 0;
}

// mma tiles of 8 ranks in a block: 1, 2 or 4; more ranks take more blocks.
inline int lora_rank_tiles(int64_t ranks) { return ranks <= 8 ? 1 : ranks <= 16 ? 2 : 4; }

// f(tag of the long operand's type, its rank tiles as a constant)
template <class F>
const char* visit_lora_mma(DType dtype, int64_t ranks, F&& f) {
  return visit_dtype<__half, __half, __nv_bfloat16>(dtype, [&](auto tag) {
    switch (lora_rank_tiles(ranks)) {
      case 1: return f(tag, std::integral_constant<int, 1>{});
      case 2: return f(tag, std::integral_constant<int, 2>{});
      default: return f(tag, std::integral_constant<int, 4>{});
    }
  });
}

// What a block's step costs. lora_mma.cuh's kernels wait for memory: a step is 16 KiB of the long
// operand, with one more in flight. A step of lora_tile.cuh's is 64x64x16 FFMA. A part has a depth
// of at least 128. Estimated, not simulated.
constexpr BlockCost kLoraMmaCost{
    .resident = 2, .least_stages = 2, .stage = 0.8f, .share = 0.25f, .start = 1.0f};
constexpr BlockCost kLoraTileCost{
    .resident = 2, .least_stages = 8, .stage = 0.5f, .share = 0.3f, .start = 1.0f};

// How a product out[rows, cols] over `depth` is cut.
struct LoraPlan {
  bool mma;
  int64_t parts;
  int64_t depth_per_part;
  int64_t bytes;     // of workspace
  int64_t arrivals;  // of these, the bytes that count arrivals; 0: reduce_parts adds the parts
};

inline LoraPlan as_lora_plan(bool mma, const Splits& splits, int64_t numel, int64_t arrivals) {
  const bool split = splits.count > 1;
  return {.mma = mma,
          .parts = splits.count,
          .depth_per_part = splits.stages * (mma ? kLoraStep : kTileDepth),
          .bytes = split ? arrivals + splits.count * numel * 4 : 0,
          .arrivals = split ? arrivals : 0};
}

inline Splits split_lora(bool mma, int64_t tiles, int64_t depth, const Reduction& reduction) {
  return split_contraction(tiles,
                           ceil_div(std::max<int64_t>(depth, 1), mma ? kLoraStep : kTileDepth),
                           reduction, mma ? kLoraMmaCost : kLoraTileCost);
}

inline LoraPlan plan_lora_parts(bool mma, int64_t tiles, int64_t numel, int64_t depth) {
  return as_lora_plan(mma, split_lora(mma, tiles, depth, reduce_parts_cost(numel)), numel, 0);
}

// The same for the kernels of lora_mma.cuh, where the last block of a tile adds the parts if that
// takes less time.
inline LoraPlan plan_lora_mma(int64_t length, int64_t ranks, int64_t depth) {
  const int64_t tile_ranks = 8 * lora_rank_tiles(ranks), numel = length * ranks;
  const int64_t tiles = ceil_div(length, kLoraTile) * ceil_div(ranks, tile_ranks);
  const int64_t tile_numel = std::min<int64_t>(length, kLoraTile) * std::min(ranks, tile_ranks);
  const Splits one_launch = split_lora(true, tiles, depth, last_block_cost(tile_numel));
  const Splits two = split_lora(true, tiles, depth, reduce_parts_cost(numel));
  return one_launch.time <= two.time ? as_lora_plan(true, one_launch, numel, arrival_bytes(tiles))
                                     : as_lora_plan(true, two, numel, 0);
}

}  // namespace qlora_ext
