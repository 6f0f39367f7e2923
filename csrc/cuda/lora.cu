// The LoRA bypass's own products on CUDA: S = x A^T, and the gradients of A, B, S and x.
#include <algorithm>

#include "cuda/lora_mma.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/lora_tile.cuh"

namespace qlora_ext::launch {

namespace {

// One product of a long operand big[M, cols] and a small one that has a row per rank.
struct Product {
  DenseOperand big;    // by (row, column): x or dY
  int64_t cols;        // of big
  DenseOperand small;  // by (rank, depth)
  bool over_rows;      // the contraction runs over big's rows, so out is by column and rank
  float scale;
  void* out;
  DType out_dtype;
  bool rank_major;  // out is [rank, column]; else [row or column, rank]

  int64_t length() const { return over_rows ? cols : big.rows; }
  int64_t depth() const { return over_rows ? big.rows : cols; }
};

LoraPlan plan_product(const Product& p) {
  const int64_t length = p.length(), ranks = p.small.rows;
  if (lora_mma_can_run(p.big.data, p.big.dtype, p.big.row_stride, p.cols)) {
    return plan_lora_mma(length, ranks, p.depth());
  }
  const int64_t tiles = ceil_div(length, kTileSize) * ceil_div(ranks, kTileSize);
  return plan_lora_parts(false, tiles, length * ranks, p.depth());
}

template <class T, int kRankTiles>
const char* launch_mma(const Product& p, const LoraMma& mma, int64_t parts, void* stream) {
  const unsigned ranks = grid_blocks(ceil_div(p.small.rows, 8 * kRankTiles));
  const unsigned tiles = grid_blocks(ceil_div(p.length(), kLoraTile));
  const unsigned z = static_cast<unsigned>(parts);
  if (p.over_rows) {
    return launch_kernel<lora_columns_mma<Sm80, T, kRankTiles>>(
        dim3(tiles, ranks, z), kLoraThreads, sizeof(LoraColumnsSmem<kRankTiles>), stream, mma);
  }
  return launch_kernel<lora_rows_mma<Sm80, T, kRankTiles>>(
      dim3(tiles, ranks, z), kLoraThreads, sizeof(LoraRowsSmem<kRankTiles>), stream, mma);
}

const char* run_mma(const Product& p, const LoraPlan& plan, void* workspace, void* stream) {
  const int64_t length = p.length(), ranks = p.small.rows;
  LoraMma mma{.big = p.big.data,
              .big_stride = p.big.row_stride,
              .big_rows = p.big.rows,
              .big_cols = p.cols,
              .small = p.small,
              .depth_per_part = plan.depth_per_part,
              .scale = p.scale,
              .out = p.out,
              .out_stride = p.rank_major ? 1 : ranks,
              .rank_stride = p.rank_major ? length : 1,
              .out_numel = length * ranks,
              .out_dtype = p.out_dtype,
              .parts = nullptr,
              .arrivals = {}};
  if (plan.parts > 1) mma.parts = parts_behind(workspace, plan.arrivals);
  if (plan.arrivals > 0) {
    QLORA_EXT_TRY(make_arrivals(workspace, plan.arrivals, stream, mma.arrivals));
  }
  return visit_lora_mma(p.big.dtype, ranks, [&](auto tag, auto tiles) {
    return launch_mma<typename decltype(tag)::type, tiles()>(p, mma, plan.parts, stream);
  });
}

// out[rows, cols] = scale * A B^T by FFMA tiles. Any side may be the long one.
const char* run_tile(const DenseOperand& a, const DenseOperand& b, int64_t depth, float scale,
                     const LoraPlan& plan, void* out, DType out_dtype, void* stream) {
  const LoraProduct p{.a = a,
                      .b = b,
                      .depth = depth,
                      .depth_per_part = plan.depth_per_part,
                      .scale = scale,
                      .out = out,
                      .out_dtype = out_dtype};
  return launch_kernel<lora_tile>(tile_grid(a.rows, b.rows, plan.parts), kTileThreads,
                                  sizeof(TileSmem), stream, p);
}

// The long operand by (column, row), for a contraction over its rows.
DenseOperand transposed(const Product& p) {
  return {.data = p.big.data,
          .row_stride = p.big.depth_stride,
          .depth_stride = p.big.row_stride,
          .rows = p.cols,
          .dtype = p.big.dtype};
}

const char* run(const Product& p, void* workspace, void* stream) {
  const int64_t length = p.length(), ranks = p.small.rows;
  if (length <= 0 || ranks <= 0) return nullptr;
  const LoraPlan plan = plan_product(p);
  void* out = plan.parts == 1 ? p.out : workspace;
  const DenseOperand big = p.over_rows ? transposed(p) : p.big;
  const char* error =
      plan.mma       ? run_mma(p, plan, workspace, stream)
      : p.rank_major ? run_tile(p.small, big, p.depth(), p.scale, plan, out, p.out_dtype, stream)
                     : run_tile(big, p.small, p.depth(), p.scale, plan, out, p.out_dtype, stream);
  if (error != nullptr || plan.parts == 1 || plan.arrivals > 0) return error;
  const ReduceParts reduce{.parts = static_cast<const float*>(workspace),
                           .num_parts = plan.parts,
                           .rows = p.rank_major ? ranks : length,
                           .cols = p.rank_major ? length : ranks,
                           .scale = p.scale,
                           .bias = nullptr,
                           .bias_dtype = DType::kFloat32,
                           .out = p.out,
                           .out_dtype = p.out_dtype};
  return launch_reduce_parts(reduce, stream);
}

// S[m, r] = scaling * sum over k of x[m, k] A[r, k]
Product shrink(const LoraShrinkParams& p) {
  return {.big = operand_of_rows(p.x, p.x_stride, p.M, p.dtype),
          .cols = p.K,
          .small = operand_of_rows(p.lora_A, p.K, p.R, p.lora_dtype),
          .over_rows = false,
          .scale = p.scaling,
          .out = p.S,
          .out_dtype = DType::kFloat32,
          .rank_major = false};
}

// dA[r, k] = scaling * sum over m of dS[m, r] x[m, k]
Product gradient_of_A(const LoraShrinkBackwardParams& p) {
  return {.big = operand_of_rows(p.x, p.x_stride, p.M, p.dtype),
          .cols = p.K,
          .small = operand_of_columns(p.dS, p.R, p.R, DType::kFloat32),
          .over_rows = true,
          .scale = p.scaling,
          .out = p.dA,
          .out_dtype = p.lora_dtype,
          .rank_major = true};
}

// dS[m, r] = scaling * sum over n of dY[m, n] B[n, r]
Product gradient_of_S(const LoraExpandBackwardParams& p) {
  return {.big = operand_of_rows(p.dY, p.dY_stride, p.M, p.dtype),
          .cols = p.N,
          .small = operand_of_columns(p.lora_B, p.R, p.R, p.lora_dtype),
          .over_rows = false,
          .scale = p.scaling,
          .out = p.dS,
          .out_dtype = DType::kFloat32,
          .rank_major = false};
}

// dB[n, r] = sum over m of dY[m, n] S[m, r]
Product gradient_of_B(const LoraExpandBackwardParams& p) {
  return {.big = operand_of_rows(p.dY, p.dY_stride, p.M, p.dtype),
          .cols = p.N,
          .small = operand_of_columns(p.S, p.S_stride, p.R, DType::kFloat32),
          .over_rows = true,
          .scale = 1.0f,
          .out = p.dB,
          .out_dtype = p.lora_dtype,
          .rank_major = false};
}

}  // namespace

int64_t workspace_lora_shrink(const LoraShrinkParams& p) { return plan_product(shrink(p)).bytes; }

const char* lora_shrink(const LoraShrinkParams& p, void* stream) {
  return run(shrink(p), p.workspace, stream);
}

int64_t workspace_lora_shrink_backward(const LoraShrinkBackwardParams& p) {
  return plan_product(gradient_of_A(p)).bytes;
}

const char* lora_shrink_backward(const LoraShrinkBackwardParams& p, void* stream) {
  QLORA_EXT_TRY(run(gradient_of_A(p), p.workspace, stream));
  if (p.dx == nullptr || p.M <= 0 || p.K <= 0) return nullptr;
  // dx[m, k] = scaling * sum over r of dS[m, r] A[r, k]. The contraction is the rank, never split.
  const LoraPlan whole{.mma = false,
                       .parts = 1,
                       .depth_per_part = align_up(std::max<int64_t>(p.R, 1), kTileDepth),
                       .bytes = 0,
                       .arrivals = 0};
  const DenseOperand dS = operand_of_rows(p.dS, p.R, p.M, DType::kFloat32);
  const DenseOperand lora_A = operand_of_columns(p.lora_A, p.K, p.K, p.lora_dtype);
  return run_tile(dS, lora_A, p.R, p.scaling, whole, p.dx, p.dtype, stream);
}

int64_t workspace_lora_expand_backward(const LoraExpandBackwardParams& p) {
  return std::max(plan_product(gradient_of_S(p)).bytes, plan_product(gradient_of_B(p)).bytes);
}

const char* lora_expand_backward(const LoraExpandBackwardParams& p, void* stream) {
  QLORA_EXT_TRY(run(gradient_of_S(p), p.workspace, stream));
  return run(gradient_of_B(p), p.workspace, stream);
}

}  // namespace qlora_ext::launch
