// 4-bit codes -> values, rounded once to the output's dtype.
//
// Moves 0.516 bytes in and 2 or 4 out per weight: bound by writing the output.
#include <algorithm>

#include "half.h"
#include "parallel.h"
#include "simd/simd.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kChunk = 4096;  // weights a task decodes per call
constexpr int64_t kGrain = 8;     // chunks worth waking a thread for

}  // namespace
}  // namespace cpu

const char* launch::dequantize_4bit(const Dequantize4bitParams& p, void*) {
  if (const char* error = cpu::cpu_path_error()) return error;
  const int64_t columns = p.columns();
  if (columns != p.weight.K) {
    const int64_t grain = cpu::kGrain * cpu::kChunk / std::max<int64_t>(columns, 1) + 1;
    cpu::parallel_for(p.row_end - p.row_begin, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        cpu::kernels().decode(p.weight, (p.row_begin + row) * p.weight.K + p.col_begin, columns,
                              p.dtype, cpu::element(p.out, p.dtype, row * columns));
      }
    });
    return nullptr;
  }
  const int64_t first = p.row_begin * p.weight.K;
  const int64_t n = p.row_end * p.weight.K - first;
  const int64_t num_chunks = ceil_div(n, cpu::kChunk);
  cpu::parallel_for(num_chunks, cpu::kGrain, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * cpu::kChunk;
    const int64_t count = std::min(n, end * cpu::kChunk) - at;
    cpu::kernels().decode(p.weight, first + at, count, p.dtype, cpu::element(p.out, p.dtype, at));
  });
  return nullptr;
}

}  // namespace qlora_ext
