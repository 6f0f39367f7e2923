// The one matrix product of the CPU backend, C = left * right, shared by every op.
//
// A task owns a region of C and keeps it in fp32 accumulators on its stack. It walks the
// contraction in blocks of kDepth; for each block it fills a panel [kDepth, 16] of the right
// operand (decoded from 4 bits, or converted) that stays in the L1 cache, and multiplies the
// block's left rows by it. So W is decoded once per region and never has a dense copy, and each
// element is summed in one fixed order with any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"
#include "parallel.h"
#include "simd/simd.h"

namespace qlora_ext::cpu {

constexpr int64_t kGrainMacs = 65536;          // multiplies worth waking a thread for
constexpr int64_t kRegionTiles = 2;            // 32 columns of the result per task
constexpr int64_t kUnpackedRows = 16;          // up to here the left operand is read in place
constexpr int64_t kMaxAccumulatorRows = 1024;  // rows x tiles of a region: 64 KB of stack
constexpr int64_t kMaxConvertedRows = 64;  // rows a task converts to fp32 itself: 64 KB of stack
constexpr int64_t kMaxRegionColumns = 256;
constexpr int64_t kMaxWorkspace = int64_t{16} << 20;

// How many regions of `macs` multiplies each are worth waking a thread for.
inline int64_t grain_of(int64_t macs) {
  return std::max<int64_t>(1, kGrainMacs / std::max<int64_t>(1, macs));
}

// The left operand [rows, depth]. Element (m, d) lies at
// data[m * row_stride + (d / kDepth) * block_stride + (d % kDepth) * depth_stride].
struct LeftOperand {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t depth_stride;  // 1, or anything for fp32
  int64_t block_stride;
  int64_t depth;
  const int32_t* index = nullptr;  // row m is row index[m] of data; or null

  // The rows from `row` on.
  LeftOperand from(int64_t row) const {
    LeftOperand rest = *this;
    if (index != nullptr) {
      rest.index = index + row;
    } else {
      rest.data = element(data, dtype, row * row_stride);
    }
    return rest;
  }

  int64_t offset_of(int64_t row) const { return (index ? index[row] : row) * row_stride; }
};

inline LeftOperand rows_of(const void* data, DType dtype, int64_t row_stride, int64_t depth,
                           const int32_t* index = nullptr) {
  return {.data = data,
          .dtype = dtype,
          .row_stride = row_stride,
          .depth_stride = 1,
          .block_stride = kDepth,
          .depth = depth,
          .index = index};
}

// The transpose of fp32 `data` [depth, rows], whose rows are depth_stride elements apart.
inline LeftOperand columns_of(const float* data, int64_t depth_stride, int64_t depth) {
  return {.data = data,
          .dtype = DType::kFloat32,
          .row_stride = 1,
          .depth_stride = depth_stride,
          .block_stride = kDepth * depth_stride,
          .depth = depth};
}

// Panels of a dense right operand: right[d, c] = source[d, c], rows `stride` elements apart. With an
// index, right[d, c] = source[index[d], c].
struct RowPanels {
  const void* source;
  DType dtype;
  int64_t stride;
  const int32_t* index = nullptr;

  void operator()(int64_t column, int64_t width, int64_t d, int64_t depth, float* panel) const {
    for (int64_t i = 0; index != nullptr && i < depth; ++i) {
      kernels().pack_rows(element(source, dtype, index[d + i] * stride + column), dtype, stride,
                          width, 1, panel + i * kPanelWidth);
    }
    if (index != nullptr) return;
    kernels().pack_rows(element(source, dtype, d * stride + column), dtype, stride, width, depth,
                        panel);
  }
};

// The same for the transpose: right[d, c] = source[c, d].
struct ColumnPanels {
  const void* source;
  DType dtype;
  int64_t stride;

  void operator()(int64_t column, int64_t width, int64_t d, int64_t depth, float* panel) const {
    kernels().pack_columns(element(source, dtype, column * stride + d), dtype, stride, width, depth,
                           panel);
  }
};

// A region of C: what one task computes.
struct Region {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;

  int64_t tiles() const { return ceil_div(columns, kPanelWidth); }
  int64_t tile_width(int64_t tile) const {
    return std::min(kPanelWidth, columns - tile * kPanelWidth);
  }
};

// Accumulators of a region: [tiles][rows][kPanelWidth].
struct Accumulators {
  alignas(64) float values[kMaxAccumulatorRows * kPanelWidth];

  float* row(const Region& region, int64_t tile, int64_t m) {
    return values + (tile * region.rows + m) * kPanelWidth;
  }
};

// Calls f(region) in parallel for the regions of a [rows, columns] result.
template <class F>
void for_each_region(int64_t rows, int64_t columns, int64_t region_rows, int64_t region_columns,
                     int64_t grain, const F& f) {
  const int64_t across = ceil_div(columns, region_columns);
  parallel_for(ceil_div(rows, region_rows) * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * region_rows;
      const int64_t column = i % across * region_columns;
      f(Region{.row = row,
               .rows = std::min(region_rows, rows - row),
               .column = column,
               .columns = std::min(region_columns, columns - column)});
    }
  });
}

// sums += left[region.row :, :] * right[:, region.column :].
// fill(column, width, d, depth, panel) writes right[d : d + depth, column : column + width].
template <class Fill>
void add_product(const LeftOperand& left, const Region& region, const Fill& fill,
                 Accumulators& sums) {
  alignas(64) float panel[2 * kDepth * kPanelWidth];
  alignas(64) float converted[kMaxConvertedRows * kDepth];
  const Kernels& simd = kernels();
  const bool converts = left.dtype != DType::kFloat32 || left.index != nullptr;
  const int64_t row_stride = converts ? kDepth : left.row_stride;
  for (int64_t d = 0; d < left.depth; d += kDepth) {
    const int64_t depth = std::min(kDepth, left.depth - d);
    const int64_t block = d / kDepth * left.block_stride;
    const float* x =
        converts ? converted
                 : static_cast<const float*>(left.data) + region.row * left.row_stride + block;
    for (int64_t m = 0; converts && m < region.rows; ++m) {
      const void* row = element(left.data, left.dtype, left.offset_of(region.row + m) + block);
      simd.to_float(row, left.dtype, depth, converted + m * kDepth);
    }
    for (int64_t tile = 0; tile < region.tiles();) {
      fill(region.column + tile * kPanelWidth, region.tile_width(tile), d, depth, panel);
      if (simd.multiply_two != nullptr && tile + 1 < region.tiles()) {
        fill(region.column + (tile + 1) * kPanelWidth, region.tile_width(tile + 1), d, depth,
             panel + depth * kPanelWidth);
        simd.multiply_two(x, row_stride, left.depth_stride, region.rows, panel, depth,
                          sums.row(region, tile, 0));
        tile += 2;
      } else {
        simd.multiply(x, row_stride, left.depth_stride, region.rows, panel, depth,
                      sums.row(region, tile, 0));
        ++tile;
      }
    }
  }
}

// Whether this CPU can multiply `left` in bf16. Ask only if the right operand may be rounded to
// bf16: W may be, LoRA's fp32 factors may not.
inline bool multiplies_bf16(const LeftOperand& left) {
  return left.dtype == DType::kBFloat16 && kernels().multiply_bf16 != nullptr &&
         left.depth % 2 == 0;
}

// Whether a product of M rows packs `left` into a workspace. For few rows it does not pay.
inline bool packs(int64_t M, const LeftOperand& left) {
  return M > kUnpackedRows && !multiplies_bf16(left);
}

// add_product with the right operand rounded to bf16. `left` is bf16 and read in place.
template <class Fill>
void add_product_bf16(const LeftOperand& left, const Region& region, const Fill& fill,
                      Accumulators& sums) {
  alignas(64) float panel[kDepth * kPanelWidth];
  alignas(64) uint16_t pairs[kDepth * kPanelWidth];
  const Kernels& simd = kernels();
  const uint16_t* x = static_cast<const uint16_t*>(left.data) + region.row * left.row_stride;
  for (int64_t d = 0; d < left.depth; d += kDepth) {
    const int64_t depth = std::min(kDepth, left.depth - d);
    for (int64_t tile = 0; tile < region.tiles(); ++tile) {
      fill(region.column + tile * kPanelWidth, region.tile_width(tile), d, depth, panel);
      simd.pair_bf16(panel, depth, pairs);
      simd.multiply_bf16(x + d, left.row_stride, region.rows, pairs, depth,
                         sums.row(region, tile, 0));
    }
  }
}

// Clears the sums of a region.
inline void clear(const Region& region, Accumulators& sums) {
  std::fill_n(sums.values, region.tiles() * region.rows * kPanelWidth, 0.0f);
}

// Rounds a region into out [*, out_stride]. finish(row, values) may change one row's fp32 values,
// region.columns of them, before they are rounded.
template <class Finish>
void store(const Region& region, Accumulators& sums, DType dtype, int64_t out_stride, void* out,
           const Finish& finish) {
  float values[kMaxRegionColumns];
  for (int64_t m = 0; m < region.rows; ++m) {
    for (int64_t tile = 0; tile < region.tiles(); ++tile) {
      std::copy_n(sums.row(region, tile, m), kPanelWidth, values + tile * kPanelWidth);
    }
    finish(region.row + m, values);
    const int64_t at = (region.row + m) * out_stride + region.column;
    kernels().from_float(values, region.columns, dtype, element(out, dtype, at));
  }
}

// A left operand packed to fp32 blocks [depth / kDepth][rows][kDepth]. It is converted once instead
// of once per region, and avoids the cache conflicts of a large power-of-two row stride.
inline int64_t packed_bytes(int64_t rows, int64_t depth) {
  return rows * ceil_div(depth, kDepth) * kDepth * static_cast<int64_t>(sizeof(float));
}

// `rows` packed rows.
inline LeftOperand packed_rows(const float* packed, int64_t rows, int64_t depth) {
  return {.data = packed,
          .dtype = DType::kFloat32,
          .row_stride = kDepth,
          .depth_stride = 1,
          .block_stride = rows * kDepth,
          .depth = depth};
}

// Writes row m of `left` as row `at` of `rows` packed ones.
inline void pack_row(const LeftOperand& left, int64_t m, int64_t at, int64_t rows, float* packed) {
  for (int64_t d = 0; d < left.depth; d += kDepth) {
    const void* from = element(left.data, left.dtype, left.offset_of(m) + d);
    kernels().to_float(from, left.dtype, std::min(kDepth, left.depth - d),
                       packed + (d / kDepth * rows + at) * kDepth);
  }
}

inline LeftOperand pack(const LeftOperand& left, int64_t row, int64_t rows, float* packed) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, left.depth));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) pack_row(left, row + m, m, rows, packed);
  });
  return packed_rows(packed, rows, left.depth);
}

// How many rows of a product to take at a time: as many as fit the accumulators and, if packed, the
// workspace. With more rows decoding W costs less: at 512 about 2% of the arithmetic.
inline int64_t chunk_rows(int64_t rows, int64_t depth, int64_t tiles) {
  const int64_t fitting = kMaxWorkspace / std::max<int64_t>(1, packed_bytes(1, depth));
  const int64_t limit = std::max<int64_t>(1, std::min(fitting, kMaxAccumulatorRows / tiles));
  const int64_t chunks = std::max<int64_t>(1, ceil_div(rows, limit));
  return ceil_div(rows, chunks);  // equal chunks: no short last one
}

}  // namespace qlora_ext::cpu
