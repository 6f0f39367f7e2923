// The LoRA bypass's own products on CUDA: S = x A^T, and the gradients of A, B, S and x.
#include "cuda/lora_tile.cuh"

namespace qlora_ext::launch {

namespace {

// A part has at least this much depth: below it the reduction costs more than it saves.
// Not yet tuned on silicon.
constexpr int64_t kLeastDepth = 128;

struct Plan {
  int64_t parts;
  int64_t depth_per_part;
  int64_t bytes;  // of workspace
};

Plan plan_product(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t tiles = ceil_div(rows, kTileSize) * ceil_div(cols, kTileSize);
  const int64_t wanted = choose_parts(tiles, depth, kLeastDepth, device_info().sm_count);
  const int64_t per_part = align_up(ceil_div(depth < 1 ? 1 : depth, wanted), kTileDepth);
  const int64_t parts = depth < 1 ? 1 : ceil_div(depth, per_part);
  return {parts, per_part, parts > 1 ? parts * rows * cols * 4 : 0};
}

// out[rows, cols] = scale * A B^T.
const char* product(const DenseOperand& a, const DenseOperand& b, int64_t depth, float scale,
                    void* out, DType out_dtype, void* workspace, void* stream) {
  if (a.rows <= 0 || b.rows <= 0) return nullptr;
  const Plan plan = plan_product(a.rows, b.rows, depth);
  const bool whole = plan.parts == 1;
  const LoraProduct p{a, b, depth, plan.depth_per_part, scale, whole ? out : workspace, out_dtype};
  QLORA_EXT_TRY(launch_kernel<lora_tile>(tile_grid(a.rows, b.rows, plan.parts), kTileThreads,
                                         sizeof(TileSmem), stream, p));
  if (whole) return nullptr;
  return launch_reduce_parts({static_cast<const float*>(workspace), plan.parts, a.rows, b.rows,
                              scale, nullptr, DType::kFloat32, out, out_dtype},
                             stream);
}

int64_t max_bytes(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t workspace_lora_shrink(const LoraShrinkParams& p) {
  return plan_product(p.M, p.R, p.K).bytes;
}

const char* lora_shrink(const LoraShrinkParams& p, void* stream) {
  return product({p.x, p.x_stride, 1, p.M, p.dtype}, {p.lora_A, p.K, 1, p.R, p.lora_dtype}, p.K,
                 p.scaling, p.S, DType::kFloat32, p.workspace, stream);
}

int64_t workspace_lora_shrink_backward(const LoraShrinkBackwardParams& p) {
  const int64_t dA = plan_product(p.R, p.K, p.M).bytes;
  return p.dx == nullptr ? dA : max_bytes(dA, plan_product(p.M, p.K, p.R).bytes);
}

const char* lora_shrink_backward(const LoraShrinkBackwardParams& p, void* stream) {
  // dA[r, k] = scaling * sum over m of dS[m, r] x[m, k]
  QLORA_EXT_TRY(product({p.dS, 1, p.R, p.R, DType::kFloat32}, {p.x, 1, p.x_stride, p.K, p.dtype},
                        p.M, p.scaling, p.dA, p.lora_dtype, p.workspace, stream));
  if (p.dx == nullptr) return nullptr;
  // dx[m, k] = scaling * sum over r of dS[m, r] A[r, k]
  return product({p.dS, p.R, 1, p.M, DType::kFloat32}, {p.lora_A, 1, p.K, p.K, p.lora_dtype}, p.R,
                 p.scaling, p.dx, p.dtype, p.workspace, stream);
}

int64_t workspace_lora_expand_backward(const LoraExpandBackwardParams& p) {
  return max_bytes(plan_product(p.M, p.R, p.N).bytes, plan_product(p.N, p.R, p.M).bytes);
}

const char* lora_expand_backward(const LoraExpandBackwardParams& p, void* stream) {
  // dS[m, r] = scaling * sum over n of dY[m, n] B[n, r]
  QLORA_EXT_TRY(product({p.dY, p.dY_stride, 1, p.M, p.dtype}, {p.lora_B, 1, p.R, p.R, p.lora_dtype},
                        p.N, p.scaling, p.dS, DType::kFloat32, p.workspace, stream));
  // dB[n, r] = sum over m of dY[m, n] S[m, r]
  return product({p.dY, 1, p.dY_stride, p.N, p.dtype}, {p.S, 1, p.S_stride, p.R, DType::kFloat32},
                 p.M, 1.0f, p.dB, p.lora_dtype, p.workspace, stream);
}

}  // namespace qlora_ext::launch
