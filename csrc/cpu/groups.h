// Which rows of a grouped product belong to which expert.
#pragma once

#include <algorithm>
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

// The rows of expert e. The host has checked that offsets are in [0, M] and never decrease.
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

// Calls f(part, column, columns) in parallel for every part and every `width` of the `columns`.
// rows_of(part) is how many rows it multiplies: experts may have very different numbers, so threads
// get equal shares of the work and not of the parts. A part's columns follow each other, because
// they share its rows. `depth` is that of the contraction.
template <class T, class RowsOf, class F>
void for_each_part(const std::vector<T>& parts, const RowsOf& rows_of, int64_t columns,
                   int64_t width, int64_t depth, const F& f) {
  constexpr int64_t kFixedCost = 8;  // of a task, in rows: decoding W
  const int64_t tasks = ceil_div(columns, width);
  std::vector<int64_t> start = {0};  // of each part, in units of a row's work
  for (const T& part : parts) start.push_back(start.back() + tasks * (kFixedCost + rows_of(part)));
  parallel_for(start.back(), grain_of(width * depth), [&](int64_t begin, int64_t end) {
    // The tasks that start in [begin, end).
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; i < parts.size() && start[i] < end; ++i) {
      const int64_t cost = kFixedCost + rows_of(parts[i]);
      int64_t task = begin > start[i] ? ceil_div(begin - start[i], cost) : 0;
      for (; task < tasks && start[i] + task * cost < end; ++task) {
        f(parts[i], task * width, std::min(width, columns - task * width));
      }
    }
  });
}

// How many rows of `depth` a grouped product copies or packs at a time.
inline int64_t slab_rows(int64_t depth) {
  return std::max<int64_t>(8, kMaxWorkspace / packed_bytes(1, std::max<int64_t>(1, depth)));
}

// Calls f(slab) for runs of pieces that have at most `most` rows together; no piece has more.
template <class F>
void for_each_slab(const std::vector<Piece>& pieces, int64_t most, const F& f) {
  for (auto begin = pieces.begin(), end = begin; begin != pieces.end(); begin = end) {
    while (end != pieces.end() && end->row + end->rows - begin->row <= most) ++end;
    f(std::vector<Piece>(begin, end));
  }
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
