// out = dequantize(W) + scaling B A, summed in fp32 and rounded once.
//
// Moves 0.516 bytes in and 2 or 4 out per weight, with R multiplies each. Limited by writing the
// output up to a rank of about 16, by arithmetic above.
#include "matmul.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kRegionRows = 64;      // rows of W per task
constexpr int64_t kRegionColumns = 256;  // columns of W per task
constexpr int64_t kGrain = 2;            // regions worth waking a thread for

void merge_region(const MergeLora4bitParams& p, const Region& region) {
  const int64_t K = p.weight.K;
  Accumulators sums;
  clear(region, sums);
  add_product(rows_of(p.lora_B, p.lora_dtype, p.R, p.R), region,
              RowPanels{p.lora_A, p.lora_dtype, K}, sums);
  store(region, sums, p.dtype, K, p.out, [&](int64_t n, float* values) {
    float weight[kRegionColumns];
    kernels().decode(p.weight, n * K + region.column, region.columns, DType::kFloat32, weight);
    for (int64_t c = 0; c < region.columns; ++c) values[c] = weight[c] + p.scaling * values[c];
  });
}

}  // namespace
}  // namespace cpu

const char* launch::merge_lora_4bit(const MergeLora4bitParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  for_each_region(p.weight.N, p.weight.K, kRegionRows, kRegionColumns, kGrain,
                  [&](const Region& region) { merge_region(p, region); });
  return nullptr;
}

}  // namespace qlora_ext
