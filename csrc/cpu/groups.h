// Which rows of a grouped product belong to which expert.
#pragma once

#include <cstring>
#include <vector>

#include "matmul.h"

namespace qlora_ext::cpu {

// Consecutive rows of one expert.
struct Piece {
  int64_t expert;
  int64_t row;
  int64_t rows;
};

// The rows of expert e. The host has checked that offsets rise from 0 or more to at most M.
inline Piece rows_of_expert(const Groups& groups, int64_t e) {
  const int64_t begin = e > 0 ? groups.offsets[e - 1] : 0;
  return {.expert = e, .row = begin, .rows = groups.offsets[e] - begin};
}

// All experts' rows, in order, cut into pieces of at most most(rows of the expert) rows.
template <class Most>
std::vector<Piece> pieces_of(const Groups& groups, const Most& most) {
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < groups.E; ++e) {
    const Piece all = rows_of_expert(groups, e);
    const int64_t step = all.rows > 0 ? most(all.rows) : 1;
    for (int64_t row = 0; row < all.rows; row += step) {
      pieces.push_back({.expert = e, .row = all.row + row, .rows = std::min(step, all.rows - row)});
    }
  }
  return pieces;
}

// Calls f(piece, column, columns) in parallel for every piece and every `width` of the `columns`.
// Each thread gets some columns of all pieces rather than all columns of some, because experts may
// have very different numbers of rows. `depth` is that of the contraction.
template <class T, class F>
void for_each_piece(const std::vector<T>& pieces, int64_t rows, int64_t columns, int64_t width,
                    int64_t depth, const F& f) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (count == 0) return;
  const int64_t mean_rows = ceil_div(rows, count);
  parallel_for(ceil_div(columns, width) * count, grain_of(mean_rows * width * depth),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t column = i / count * width;
                   f(pieces[i % count], column, std::min(width, columns - column));
                 }
               });
}

// How many rows of `depth` a grouped product copies or packs at a time.
inline int64_t slab_rows(int64_t depth) {
  return std::max<int64_t>(8, kMaxWorkspace / packed_bytes(1, std::max<int64_t>(1, depth)));
}

// Zeros in the rows of out [M, columns] that no expert has.
inline void zero_rest(const Groups& groups, DType dtype, int64_t columns, void* out) {
  const int64_t end = groups.E > 0 ? groups.offsets[groups.E - 1] : 0;
  const size_t bytes = static_cast<size_t>((groups.M - end) * columns * dtype_size(dtype));
  if (bytes > 0) std::memset(element(out, dtype, end * columns), 0, bytes);
}

// Element e * each of a stack's tensor; null stays null.
inline const void* of_expert(const void* stack, DType dtype, int64_t e, int64_t each) {
  return stack == nullptr ? nullptr : element(stack, dtype, e * each);
}

}  // namespace qlora_ext::cpu
