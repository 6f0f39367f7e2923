// out[t] = sum of values[order[i]] over token t's entries of `order`, in fp32, rounded once.
//
// A mixture of experts computes k results for each token, sorted by expert; this brings them
// together. It reads every row of values once.
#include <algorithm>

#include "half.h"
#include "parallel.h"
#include "simd/simd.h"

namespace qlora_ext {

const char* launch::sum_rows(const SumRowsParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  constexpr int64_t kColumns = 512;  // of a row at a time: 4 KB of stack
  const int64_t per_token = p.K * (1 + p.L / std::max<int64_t>(1, p.T));
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, per_token));
  parallel_for(p.T, grain, [&](int64_t begin, int64_t end) {
    float sum[kColumns], row[kColumns];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < p.K; k += kColumns) {
        const int64_t columns = std::min(kColumns, p.K - k);
        std::fill_n(sum, columns, 0.0f);
        for (int64_t i = t > 0 ? p.ends[t - 1] : 0; i < p.ends[t]; ++i) {
          const int64_t at = p.order[i] * p.values_stride + k;
          kernels().to_float(element(p.values, p.dtype, at), p.dtype, columns, row);
          for (int64_t c = 0; c < columns; ++c) sum[c] += row[c];
        }
        kernels().from_float(sum, columns, p.dtype, element(p.out, p.dtype, t * p.K + k));
      }
    }
  });
  return nullptr;
}

}  // namespace qlora_ext
