// dX = dY W + dS A with W in 4 bits: the contraction runs over the rows of W.
//
// W's rows are decoded, without a transpose, into panels [n, 16 columns] that stay in L1. The
// bypass is added as one more block of the contraction.
#include "matmul.h"

namespace qlora_ext {
namespace cpu {
namespace {

LeftOperand all_rows(const Gemm4bitBackwardParams& p) {
  return rows_of(p.dY, p.dtype, p.dY_stride, p.weight.N);
}

// `dY` and `dS` start at row `row`, where the chunk starts; the region's rows count from there.
void backward_region(const Gemm4bitBackwardParams& p, const LeftOperand& dY, const LeftOperand& dS,
                     const Region& region, int64_t row) {
  const int64_t K = p.weight.K;
  Accumulators sums;
  clear(region, sums);
  const auto decode = [&](int64_t k, int64_t width, int64_t n, int64_t depth, float* panel) {
    kernels().decode_rows(p.weight, n, k, width, depth, panel);
  };
  if (multiplies_bf16(dY)) {
    add_product_bf16(dY, region, decode, sums);
  } else {
    add_product(dY, region, decode, sums);
  }
  add_product(dS, region, RowPanels{p.lora_A, p.lora_dtype, K}, sums);
  store(region, sums, p.dtype, K, element(p.dX, p.dtype, row * K), [](int64_t, float*) {});
}

}  // namespace
}  // namespace cpu

const char* launch::gemm_4bit_backward(const Gemm4bitBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  if (p.M == 0) return nullptr;
  const int64_t N = p.weight.N;
  const int64_t K = p.weight.K;
  const int64_t chunk = chunk_rows(p.M, N, kRegionTiles);
  for (int64_t row = 0; row < p.M; row += chunk) {
    const int64_t rows = std::min(chunk, p.M - row);
    const LeftOperand dY = packs(p.M, all_rows(p))
                               ? pack(all_rows(p), row, rows, static_cast<float*>(p.workspace))
                               : all_rows(p).from(row);
    const LeftOperand dS = rows_of(p.lora_dS + row * p.R, DType::kFloat32, p.R, p.R);
    const int64_t columns = kRegionTiles * kPanelWidth;
    for_each_region(rows, K, rows, columns, grain_of(rows * columns * N),
                    [&](const Region& region) { backward_region(p, dY, dS, region, row); });
  }
  return nullptr;
}

int64_t launch::workspace_gemm_4bit_backward(const Gemm4bitBackwardParams& p) {
  if (!cpu::packs(p.M, cpu::all_rows(p))) return 0;
  return cpu::packed_bytes(cpu::chunk_rows(p.M, p.weight.N, cpu::kRegionTiles), p.weight.N);
}

int64_t launch::chunk_columns_gemm_4bit_backward(const Gemm4bitBackwardParams&) { return 0; }

}  // namespace qlora_ext
