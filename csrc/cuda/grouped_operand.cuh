// x or dY of a mixture of experts as an operand of tile.cuh: one expert's rows, through an index.
#pragma once

#include "cuda/row_groups.cuh"

namespace qlora_ext {

// Element (row, d) of the operand is x[source(row), d]; if transposed, for a contraction over the
// rows, element (column, d) is x[source(d), column], and `rows` counts columns. A row outside x is
// zero.
template <bool kTransposed>
struct IndexedOperand {
  const DenseOperand& x;
  const ExpertRows& indices;
  int64_t rows;

  __device__ __forceinline__ bool depth_is_contiguous() const { return !kTransposed; }
  __device__ __forceinline__ float at(int64_t row, int64_t d) const {
    const int64_t m = indices.source(kTransposed ? d : row);
    if (m < 0) return 0.0f;
    return kTransposed ? x.at(m, row) : x.at(m, d);
  }
};

// The first `rows` rows of an operand.
__device__ __forceinline__ DenseOperand up_to(const DenseOperand& operand, int64_t rows) {
  DenseOperand other = operand;
  other.rows = rows;
  return other;
}

}  // namespace qlora_ext
