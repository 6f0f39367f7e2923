// The grouped LoRA products on CUDA: S = x A_e^T for each expert, and the gradients of A, B, S and x.
#include "cuda/grouped_lora.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/reduce_parts.cuh"

namespace qlora_ext::launch {

namespace {

// One product of x or dY, [T, cols], and an adapter or its gradient.
struct Product {
  Groups groups;
  DenseOperand big;    // by (row, column)
  int64_t cols;        // of big
  DenseOperand small;  // by (rank, depth); over rows, depth is all M rows
  float scale;
  void* out;
  DType out_dtype;

  int64_t ranks() const { return small.rows; }
};

// How the contraction over columns is cut; the tiles of rows are an upper bound.
LoraPlan plan_over_columns(const Product& p) {
  const Groups& groups = p.groups;
  const bool mma = lora_mma_can_run(p.big.data, p.big.dtype, p.big.row_stride, p.cols);
  const int64_t rows = mma ? kLoraTile : kTileSize;
  const int64_t columns = mma ? 8 * lora_rank_tiles(p.ranks()) : kTileSize;
  const int64_t tiles = std::min(groups.M, groups.M / rows + std::max<int64_t>(groups.E, 1));
  const int64_t numel = groups.M * p.ranks();
  return plan_lora_parts(mma, tiles * ceil_div(p.ranks(), columns), numel, p.cols);
}

LoraMma mma_of(const Product& p, int64_t depth_per_part, void* out) {
  return {.big = p.big.data,
          .big_stride = p.big.row_stride,
          .big_rows = p.groups.M,
          .big_cols = p.cols,
          .small = p.small,
          .depth_per_part = depth_per_part,
          .scale = p.scale,
          .out = out,
          .out_stride = p.ranks(),
          .rank_stride = 1,
          .out_numel = p.groups.M * p.ranks(),
          .out_dtype = p.out_dtype,
          .parts = nullptr,
          .arrivals = {}};
}

const char* run_over_columns(const Product& p, const LoraPlan& plan, void* out, void* stream) {
  if (plan.mma) {
    return visit_lora_mma(p.big.dtype, p.ranks(), [&](auto tag, auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      const GroupedLoraMma grouped{.product = mma_of(p, plan.depth_per_part, out),
                                   .groups = {},
                                   .small_step = p.ranks() * p.cols};
      using T = typename decltype(tag)::type;
      return launch_row_groups<grouped_lora_rows_mma<Sm80, T, kTiles>, kLoraTile>(
          grouped, p.groups,
          {.column_tiles = 1, .y = ceil_div(p.ranks(), 8 * kTiles), .parts = plan.parts},
          kLoraThreads, sizeof(LoraRowsSmem<kTiles>), stream);
    });
  }
  const GroupedLoraProduct product{.a = p.big,
                                   .b = p.small,
                                   .columns = p.ranks(),
                                   .depth = p.cols,
                                   .depth_per_part = plan.depth_per_part,
                                   .b_step = p.ranks() * p.cols,
                                   .groups = {},
                                   .scale = p.scale,
                                   .out = out,
                                   .out_dtype = p.out_dtype};
  return launch_row_groups<grouped_lora_rows_tile, kTileSize>(
      product, p.groups, {.column_tiles = ceil_div(p.ranks(), kTileSize), .parts = plan.parts},
      kTileThreads, sizeof(TileSmem), stream);
}

// S[m, r] = scale * sum over columns of x[rows[m], column] small_e[r, column]
const char* over_columns(const Product& p, void* workspace, void* stream) {
  const LoraPlan plan = plan_over_columns(p);
  if (plan.parts == 1) return run_over_columns(p, plan, p.out, stream);
  Product unscaled = p;
  unscaled.scale = 1.0f;
  QLORA_EXT_TRY(run_over_columns(unscaled, plan, workspace, stream));
  const ReduceParts reduce{.parts = static_cast<const float*>(workspace),
                           .num_parts = plan.parts,
                           .rows = p.groups.M,
                           .cols = p.ranks(),
                           .scale = p.scale,
                           .bias = nullptr,
                           .bias_dtype = DType::kFloat32,
                           .out = p.out,
                           .out_dtype = p.out_dtype};
  return launch_reduce_parts(reduce, stream);
}

// out_e[r, c] (or [c, r]) = scale * sum over e's rows m of small[r, m] x[rows[m], c]
template <bool kRankMajor>
const char* over_rows(const Product& p, void* stream) {
  if (lora_mma_can_run(p.big.data, p.big.dtype, p.big.row_stride, p.cols)) {
    LoraMma mma = mma_of(p, kLoraStep, p.out);
    mma.out_stride = kRankMajor ? 1 : p.ranks();
    mma.rank_stride = kRankMajor ? p.cols : 1;
    mma.out_numel = p.cols * p.ranks();
    return visit_lora_mma(p.big.dtype, p.ranks(), [&](auto tag, auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      using T = typename decltype(tag)::type;
      return launch_experts<grouped_lora_columns_mma<Sm80, T, kTiles>>(
          GroupedLoraMma{.product = mma, .groups = {}, .small_step = 0}, p.groups,
          {.column_tiles = ceil_div(p.cols, kLoraTile), .y = ceil_div(p.ranks(), 8 * kTiles)},
          kLoraThreads, sizeof(LoraColumnsSmem<kTiles>), stream);
    });
  }
  const GroupedLoraProduct product{.a = p.big,
                                   .b = p.small,
                                   .columns = p.cols,
                                   .depth = p.groups.M,
                                   .depth_per_part = p.groups.M,
                                   .b_step = 0,
                                   .groups = {},
                                   .scale = p.scale,
                                   .out = p.out,
                                   .out_dtype = p.out_dtype};
  return launch_experts<grouped_lora_columns_tile<kRankMajor>>(
      product, p.groups,
      {.column_tiles = ceil_div(p.cols, kTileSize), .y = ceil_div(p.ranks(), kTileSize)},
      kTileThreads, sizeof(TileSmem), stream);
}

// S[m, r] = scaling * sum over k of x[rows[m], k] A_e[r, k]
Product shrink(const GroupedLoraShrinkParams& p) {
  return {.groups = p.groups,
          .big = operand_of_rows(p.x, p.x_stride, p.groups.T, p.dtype),
          .cols = p.K,
          .small = operand_of_rows(p.lora_A, p.K, p.R, p.lora_dtype),
          .scale = p.scaling,
          .out = p.S,
          .out_dtype = DType::kFloat32};
}

// dS[m, r] = scaling * sum over n of dY[m, n] B_e[n, r]
Product gradient_of_S(const GroupedLoraExpandBackwardParams& p) {
  return {.groups = p.groups,
          .big = operand_of_rows(p.dY, p.dY_stride, p.groups.M, p.dtype),
          .cols = p.N,
          .small = operand_of_columns(p.lora_B, p.R, p.R, p.lora_dtype),
          .scale = p.scaling,
          .out = p.dS,
          .out_dtype = DType::kFloat32};
}

}  // namespace

int64_t workspace_grouped_lora_shrink(const GroupedLoraShrinkParams& p) {
  return plan_over_columns(shrink(p)).bytes;
}
int64_t workspace_grouped_lora_shrink_backward(const GroupedLoraShrinkBackwardParams&) { return 0; }
int64_t workspace_grouped_lora_expand_backward(const GroupedLoraExpandBackwardParams& p) {
  return plan_over_columns(gradient_of_S(p)).bytes;
}

const char* grouped_lora_shrink(const GroupedLoraShrinkParams& p, void* stream) {
  return over_columns(shrink(p), p.workspace, stream);
}

const char* grouped_lora_shrink_backward(const GroupedLoraShrinkBackwardParams& p, void* stream) {
  // dA_e[r, k] = scaling * sum over m of dS[m, r] x[rows[m], k]
  QLORA_EXT_TRY(over_rows<true>({.groups = p.groups,
                                 .big = operand_of_rows(p.x, p.x_stride, p.groups.T, p.dtype),
                                 .cols = p.K,
                                 .small = operand_of_columns(p.dS, p.R, p.R, DType::kFloat32),
                                 .scale = p.scaling,
                                 .out = p.dA,
                                 .out_dtype = p.lora_dtype},
                                stream));
  if (p.dx == nullptr) return nullptr;
  // dx[m, k] = scaling * sum over r of dS[m, r] A_e[r, k]
  Groups in_order = p.groups;
  in_order.rows = nullptr;
  in_order.T = p.groups.M;
  const GroupedLoraProduct product{.a = operand_of_rows(p.dS, p.R, p.groups.M, DType::kFloat32),
                                   .b = operand_of_columns(p.lora_A, p.K, p.K, p.lora_dtype),
                                   .columns = p.K,
                                   .depth = p.R,
                                   .depth_per_part = p.R,
                                   .b_step = p.R * p.K,
                                   .groups = {},
                                   .scale = p.scaling,
                                   .out = p.dx,
                                   .out_dtype = p.dtype};
  return launch_row_groups<grouped_lora_rows_tile, kTileSize>(
      product, in_order, {.column_tiles = ceil_div(p.K, kTileSize)}, kTileThreads, sizeof(TileSmem),
      stream);
}

const char* grouped_lora_expand_backward(const GroupedLoraExpandBackwardParams& p, void* stream) {
  Product product = gradient_of_S(p);
  QLORA_EXT_TRY(over_columns(product, p.workspace, stream));
  // dB_e[n, r] = sum over m of dY[m, n] S[m, r]
  product.small = operand_of_columns(p.S, p.S_stride, p.R, DType::kFloat32);
  product.scale = 1.0f;
  product.out = p.dB;
  product.out_dtype = p.lora_dtype;
  return over_rows<false>(product, stream);
}

}  // namespace qlora_ext::launch
