// The products of the LoRA bypass: S = scaling x A^T, and the gradients of x, A, S and B.
//
// At ranks of 8 to 64 each of these is limited by reading x or dY (M x K) once; A, B and S stay in
// cache. All sums have one fixed order, so gradients repeat bit for bit.
#include "matmul.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kShrinkRows = 48;       // rows a task converts and multiplies by all of A or B
constexpr int64_t kShrinkColumns = 64;    // columns of A^T or B per task
constexpr int64_t kGradientColumns = 64;  // columns of dA or dB^T per task

void scale_by(float scaling, int64_t width, float* values) {
  for (int64_t c = 0; c < width; ++c) values[c] *= scaling;
}

// out [M, R] fp32 = left [M, depth] * right [depth, R] * scaling.
template <class Right>
void shrink(const LeftOperand& left, const Right& right, int64_t M, int64_t R, float scaling,
            float* out) {
  for_each_region(M, R, kShrinkRows, kShrinkColumns, grain_of(kShrinkRows * R * left.depth),
                  [&](const Region& region) {
                    Accumulators sums;
                    clear(region, sums);
                    add_product(left, region, right, sums);
                    store(region, sums, DType::kFloat32, R, out, [&](int64_t, float* values) {
                      scale_by(scaling, region.columns, values);
                    });
                  });
}

// The gradient of A or B, region by region: sums = left^T [R, M] * right [M, columns].
// finish(region, sums) stores a region.
template <class Finish>
void factor_gradient(const float* left, int64_t left_stride, const RowPanels& right, int64_t M,
                     int64_t R, int64_t columns, const Finish& finish) {
  const int64_t rows = std::min(R, kMaxAccumulatorRows * kPanelWidth / kGradientColumns);
  for_each_region(R, columns, rows, kGradientColumns, grain_of(rows * kGradientColumns * M),
                  [&](const Region& region) {
                    Accumulators sums;
                    clear(region, sums);
                    add_product(columns_of(left, left_stride, M), region, right, sums);
                    finish(region, sums);
                  });
}

// dx [M, K] = scaling * dS * A.
void shrink_input_gradient(const LoraShrinkBackwardParams& p) {
  const LeftOperand dS = rows_of(p.dS, DType::kFloat32, p.R, p.R);
  const RowPanels lora_A{p.lora_A, p.lora_dtype, p.K};
  for_each_region(p.M, p.K, kShrinkRows, kShrinkColumns,
                  grain_of(kShrinkRows * kShrinkColumns * p.R), [&](const Region& region) {
                    Accumulators sums;
                    clear(region, sums);
                    add_product(dS, region, lora_A, sums);
                    store(region, sums, p.dtype, p.K, p.dx, [&](int64_t, float* values) {
                      scale_by(p.scaling, region.columns, values);
                    });
                  });
}

// Stores a region of dB^T [R, N] into dB [N, R].
void store_transposed(const LoraExpandBackwardParams& p, const Region& region, Accumulators& sums) {
  for (int64_t tile = 0; tile < region.tiles(); ++tile) {
    for (int64_t c = 0; c < region.tile_width(tile); ++c) {
      const int64_t n = region.column + tile * kPanelWidth + c;
      for (int64_t r = 0; r < region.rows; ++r) {
        const float* value = sums.row(region, tile, r) + c;
        kernels().from_float(value, 1, p.lora_dtype,
                             element(p.dB, p.lora_dtype, n * p.R + region.row + r));
      }
    }
  }
}

}  // namespace
}  // namespace cpu

const char* launch::lora_shrink(const LoraShrinkParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  shrink(rows_of(p.x, p.dtype, p.x_stride, p.K), ColumnPanels{p.lora_A, p.lora_dtype, p.K}, p.M,
         p.R, p.scaling, p.S);
  return nullptr;
}

const char* launch::lora_shrink_backward(const LoraShrinkBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  if (p.dx != nullptr) shrink_input_gradient(p);
  factor_gradient(p.dS, p.R, RowPanels{p.x, p.dtype, p.x_stride}, p.M, p.R, p.K,
                  [&](const Region& region, Accumulators& sums) {
                    store(region, sums, p.lora_dtype, p.K, p.dA, [&](int64_t, float* values) {
                      scale_by(p.scaling, region.columns, values);
                    });
                  });
  return nullptr;
}

const char* launch::lora_expand_backward(const LoraExpandBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  shrink(rows_of(p.dY, p.dtype, p.dY_stride, p.N), RowPanels{p.lora_B, p.lora_dtype, p.R}, p.M, p.R,
         p.scaling, p.dS);
  factor_gradient(
      p.S, p.S_stride, RowPanels{p.dY, p.dtype, p.dY_stride}, p.M, p.R, p.N,
      [&](const Region& region, Accumulators& sums) { store_transposed(p, region, sums); });
  return nullptr;
}

int64_t launch::workspace_lora_shrink(const LoraShrinkParams&) { return 0; }
int64_t launch::workspace_lora_shrink_backward(const LoraShrinkBackwardParams&) { return 0; }
int64_t launch::workspace_lora_expand_backward(const LoraExpandBackwardParams&) { return 0; }

}  // namespace qlora_ext
