// The products of the LoRA bypass: S = scaling x A^T, and the gradients of x, A, S and B.
//
// At ranks of 8 to 64 each of these is limited by reading x or dY (M x K) once; A, B and S stay in
// cache. All sums have one fixed order, so gradients repeat bit for bit.
#include "groups.h"
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

// A region of out [M, columns] = left * right * scaling.
template <class Right>
void shrink_region(const LeftOperand& left, const Right& right, const Region& region,
                   int64_t columns, float scaling, DType dtype, void* out) {
  Accumulators sums;
  clear(region, sums);
  add_product(left, region, right, sums);
  store(region, sums, dtype, columns, out,
        [&](int64_t, float* values) { scale_by(scaling, region.columns, values); });
}

// out [M, columns] = left [M, depth] * right [depth, columns] * scaling.
template <class Right>
void shrink(const LeftOperand& left, const Right& right, int64_t M, int64_t columns, float scaling,
            DType dtype, void* out) {
  const int64_t width = std::min(columns, kShrinkColumns);
  for_each_region(M, columns, kShrinkRows, kShrinkColumns,
                  grain_of(kShrinkRows * width * left.depth), [&](const Region& region) {
                    shrink_region(left, right, region, columns, scaling, dtype, out);
                  });
}

// The same for the rows of each expert; right_of(e) is what expert e's rows are multiplied by.
template <class RightOf>
void grouped_shrink(const Groups& groups, const LeftOperand& left, const RightOf& right_of,
                    int64_t columns, float scaling, DType dtype, void* out) {
  zero_rest(groups, dtype, columns, out);
  const auto pieces = pieces_of(groups, [](int64_t) { return kShrinkRows; });
  for_each_part(
      pieces, [](const Piece& piece) { return piece.rows; }, columns, kShrinkColumns, left.depth,
      [&](const Piece& piece, int64_t column, int64_t width) {
        const Region region{.row = 0, .rows = piece.rows, .column = column, .columns = width};
        shrink_region(left.from(piece.row), right_of(piece.expert), region, columns, scaling, dtype,
                      element(out, dtype, piece.row * columns));
      });
}

// How many rows of a gradient [R, columns] fit the accumulators.
int64_t gradient_rows(int64_t R) {
  return std::min(R, kMaxAccumulatorRows * kPanelWidth / kGradientColumns);
}

// The gradient of A or B, region by region: sums = left^T [R, M] * right [M, columns].
// finish(region, sums) stores a region.
template <class Finish>
void factor_gradient(const LeftOperand& left, const RowPanels& right, int64_t R, int64_t columns,
                     const Finish& finish) {
  const int64_t rows = gradient_rows(R);
  for_each_region(R, columns, rows, kGradientColumns,
                  grain_of(rows * kGradientColumns * left.depth), [&](const Region& region) {
                    Accumulators sums;
                    clear(region, sums);
                    add_product(left, region, right, sums);
                    finish(region, sums);
                  });
}

// The same for each expert, those without rows too. `right` has the M rows of all.
template <class Finish>
void grouped_factor_gradient(const Groups& groups, const float* left, int64_t left_stride,
                             const RowPanels& right, int64_t R, int64_t columns,
                             const Finish& finish) {
  std::vector<Piece> experts;
  for (int64_t e = 0; e < groups.E; ++e) experts.push_back(rows_of_expert(groups, e));
  for_each_part(
      experts, [](const Piece& expert) { return expert.rows; }, columns, kGradientColumns, R,
      [&](const Piece& expert, int64_t column, int64_t width) {
        const LeftOperand mine =
            columns_of(left + expert.row * left_stride, left_stride, expert.rows);
        RowPanels rows = right;
        if (rows.index != nullptr) {
          rows.index += expert.row;
        } else {
          rows.source = element(right.source, right.dtype, expert.row * right.stride);
        }
        for (int64_t r = 0; r < R; r += gradient_rows(R)) {
          const Region region{.row = r,
                              .rows = std::min(gradient_rows(R), R - r),
                              .column = column,
                              .columns = width};
          Accumulators sums;
          clear(region, sums);
          add_product(mine, region, rows, sums);
          finish(expert.expert, region, sums);
        }
      });
}

// Stores a region of dA [R, K] * scaling.
void store_scaled(const Region& region, Accumulators& sums, DType dtype, int64_t K, float scaling,
                  void* dA) {
  store(region, sums, dtype, K, dA,
        [&](int64_t, float* values) { scale_by(scaling, region.columns, values); });
}

// Stores a region of dB^T [R, N] into dB [N, R].
void store_transposed(const Region& region, Accumulators& sums, DType dtype, int64_t R, void* dB) {
  for (int64_t tile = 0; tile < region.tiles(); ++tile) {
    for (int64_t c = 0; c < region.tile_width(tile); ++c) {
      const int64_t n = region.column + tile * kPanelWidth + c;
      for (int64_t r = 0; r < region.rows; ++r) {
        const float* value = sums.row(region, tile, r) + c;
        kernels().from_float(value, 1, dtype, element(dB, dtype, n * R + region.row + r));
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
         p.R, p.scaling, DType::kFloat32, p.S);
  return nullptr;
}

const char* launch::lora_shrink_backward(const LoraShrinkBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  if (p.dx != nullptr) {
    shrink(rows_of(p.dS, DType::kFloat32, p.R, p.R), RowPanels{p.lora_A, p.lora_dtype, p.K}, p.M,
           p.K, p.scaling, p.dtype, p.dx);
  }
  factor_gradient(columns_of(p.dS, p.R, p.M), RowPanels{p.x, p.dtype, p.x_stride}, p.R, p.K,
                  [&](const Region& region, Accumulators& sums) {
                    store_scaled(region, sums, p.lora_dtype, p.K, p.scaling, p.dA);
                  });
  return nullptr;
}

const char* launch::lora_expand_backward(const LoraExpandBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  shrink(rows_of(p.dY, p.dtype, p.dY_stride, p.N), RowPanels{p.lora_B, p.lora_dtype, p.R}, p.M, p.R,
         p.scaling, DType::kFloat32, p.dS);
  factor_gradient(columns_of(p.S, p.S_stride, p.M), RowPanels{p.dY, p.dtype, p.dY_stride}, p.R, p.N,
                  [&](const Region& region, Accumulators& sums) {
                    store_transposed(region, sums, p.lora_dtype, p.R, p.dB);
                  });
  return nullptr;
}

const char* launch::grouped_lora_shrink(const GroupedLoraShrinkParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  grouped_shrink(
      p.groups, rows_of(p.x, p.dtype, p.x_stride, p.K, p.groups.rows),
      [&](int64_t e) {
        return ColumnPanels{of_expert(p.lora_A, p.lora_dtype, e, p.R * p.K), p.lora_dtype, p.K};
      },
      p.R, p.scaling, DType::kFloat32, p.S);
  return nullptr;
}

const char* launch::grouped_lora_shrink_backward(const GroupedLoraShrinkBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  if (p.dx != nullptr) {
    grouped_shrink(
        p.groups, rows_of(p.dS, DType::kFloat32, p.R, p.R),
        [&](int64_t e) {
          return RowPanels{of_expert(p.lora_A, p.lora_dtype, e, p.R * p.K), p.lora_dtype, p.K};
        },
        p.K, p.scaling, p.dtype, p.dx);
  }
  const RowPanels x{p.x, p.dtype, p.x_stride, p.groups.rows};
  grouped_factor_gradient(p.groups, p.dS, p.R, x, p.R, p.K,
                          [&](int64_t e, const Region& region, Accumulators& sums) {
                            store_scaled(region, sums, p.lora_dtype, p.K, p.scaling,
                                         element(p.dA, p.lora_dtype, e * p.R * p.K));
                          });
  return nullptr;
}

const char* launch::grouped_lora_expand_backward(const GroupedLoraExpandBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  grouped_shrink(
      p.groups, rows_of(p.dY, p.dtype, p.dY_stride, p.N),
      [&](int64_t e) {
        return RowPanels{of_expert(p.lora_B, p.lora_dtype, e, p.N * p.R), p.lora_dtype, p.R};
      },
      p.R, p.scaling, DType::kFloat32, p.dS);
  const RowPanels dY{p.dY, p.dtype, p.dY_stride};
  grouped_factor_gradient(p.groups, p.S, p.S_stride, dY, p.R, p.N,
                          [&](int64_t e, const Region& region, Accumulators& sums) {
                            store_transposed(region, sums, p.lora_dtype, p.R,
                                             element(p.dB, p.lora_dtype, e * p.N * p.R));
                          });
  return nullptr;
}

int64_t launch::workspace_lora_shrink(const LoraShrinkParams&) { return 0; }
int64_t launch::workspace_lora_shrink_backward(const LoraShrinkBackwardParams&) { return 0; }
int64_t launch::workspace_lora_expand_backward(const LoraExpandBackwardParams&) { return 0; }

int64_t launch::workspace_grouped_lora_shrink(const GroupedLoraShrinkParams&) { return 0; }
int64_t launch::workspace_grouped_lora_shrink_backward(const GroupedLoraShrinkBackwardParams&) {
  return 0;
}
int64_t launch::workspace_grouped_lora_expand_backward(const GroupedLoraExpandBackwardParams&) {
  return 0;
}

}  // namespace qlora_ext
