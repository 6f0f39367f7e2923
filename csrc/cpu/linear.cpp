// y = x W^T + bias and dX = dY W with a dense W in fp32, bf16 or fp16, for the layers of a model
// that stay unquantized. fp32 accumulation, one rounding.
//
// On a CPU without bf16 or fp16 instructions, torch multiplies those types at a fraction of its
// fp32 speed. Here W is converted to fp32 a panel at a time, just as gemm_4bit decodes a 4-bit W.
#include "matmul.h"

namespace qlora_ext {
namespace cpu {
namespace {

// out [M, columns] = left * right + bias, which may be null; `fill` writes panels of `right`.
template <class Fill>
void multiply(const LeftOperand& left, int64_t M, int64_t columns, const Fill& fill,
              const void* bias, DType bias_dtype, DType dtype, void* out, void* workspace) {
  const int64_t chunk = chunk_rows(M, left.depth, kRegionTiles);
  const int64_t width = kRegionTiles * kPanelWidth;
  for (int64_t row = 0; row < M; row += chunk) {
    const int64_t rows = std::min(chunk, M - row);
    const LeftOperand packed = pack(left, row, rows, static_cast<float*>(workspace));
    for_each_region(rows, columns, rows, width, grain_of(rows * width * left.depth),
                    [&](const Region& region) {
                      Accumulators sums;
                      clear(region, sums);
                      add_product(packed, region, fill, sums);
                      float added[kRegionTiles * kPanelWidth] = {};
                      if (bias != nullptr) {
                        kernels().to_float(element(bias, bias_dtype, region.column), bias_dtype,
                                           region.columns, added);
                      }
                      store(region, sums, dtype, columns, element(out, dtype, row * columns),
                            [&](int64_t, float* values) {
                              for (int64_t c = 0; c < region.columns; ++c) values[c] += added[c];
                            });
                    });
  }
}

int64_t workspace_of(int64_t M, int64_t depth) {
  return packed_bytes(chunk_rows(M, depth, kRegionTiles), depth);
}

}  // namespace
}  // namespace cpu

const char* launch::linear(const LinearParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  if (p.M == 0 || p.N == 0) return nullptr;
  multiply(rows_of(p.x, p.dtype, p.x_stride, p.K), p.M, p.N,
           ColumnPanels{p.weight, p.weight_dtype, p.K}, p.bias, p.bias_dtype, p.dtype, p.y,
           p.workspace);
  return nullptr;
}

const char* launch::linear_backward(const LinearBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  if (p.M == 0 || p.K == 0) return nullptr;
  multiply(rows_of(p.dY, p.dtype, p.dY_stride, p.N), p.M, p.K,
           RowPanels{p.weight, p.weight_dtype, p.K}, nullptr, DType::kFloat32, p.dtype, p.dX,
           p.workspace);
  return nullptr;
}

int64_t launch::workspace_linear(const LinearParams& p) { return cpu::workspace_of(p.M, p.K); }

int64_t launch::workspace_linear_backward(const LinearBackwardParams& p) {
  return cpu::workspace_of(p.M, p.N);
}

}  // namespace qlora_ext
