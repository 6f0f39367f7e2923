// y = x W^T + bias + S B^T with W in 4 bits; fp32 accumulation, one rounding.
//
// Few rows of x: dot products with each row of W, which is read once and decoded in registers
// (docs/cpu.md says what limits them). More rows: W is decoded, transposed, into panels that stay
// in L1, and the LoRA bypass is added as one more block of the contraction.
#include "matmul.h"
#include "scales.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kFewRows = 8;     // up to here: dot products
constexpr int64_t kDotRegion = 32;  // rows of W per task, for few rows of x
constexpr int64_t kDotAlign = 128;  // x is cut at multiples of this: whole groups of any path

// The bias of columns [n, n + count), in fp32; zeros without one.
void load_bias(const Gemm4bitParams& p, int64_t n, int64_t count, float* bias) {
  std::fill_n(bias, count, 0.0f);
  if (p.bias == nullptr) return;
  kernels().to_float(element(p.bias, p.bias_dtype, n), p.bias_dtype, count, bias);
}

// ---- few rows of x ----

// sums[m] += S[row + m, :] . B[n, :] for `rows` rows.
void add_bypass(const Gemm4bitParams& p, int64_t n, int64_t row, int64_t rows, float* sums) {
  float lora_B[kDepth];
  for (int64_t r = 0; r < p.R; r += kDepth) {
    const int64_t depth = std::min(kDepth, p.R - r);
    kernels().to_float(element(p.lora_B, p.lora_dtype, n * p.R + r), p.lora_dtype, depth, lora_B);
    for (int64_t m = 0; m < rows; ++m) {
      const float* lora_S = p.lora_S + (row + m) * p.S_stride + r;
      for (int64_t i = 0; i < depth; ++i) sums[m] += lora_S[i] * lora_B[i];
    }
  }
}

// Columns [region.column, + columns) of y for rows [row, row + rows), rows <= kMaxDotRows.
void dot_rows_region(const Gemm4bitParams& p, const Region& region, int64_t row, int64_t rows) {
  alignas(64) float converted[kMaxDotElements];
  float sums[kDotRegion][kMaxDotRows] = {};
  const int64_t K = p.weight.K;
  const int64_t most = kMaxDotElements / rows / kDotAlign * kDotAlign;
  for (int64_t k = 0; k < K; k += most) {
    const int64_t depth = std::min(most, K - k);
    const float* x = static_cast<const float*>(element(p.x, p.dtype, row * p.x_stride + k));
    int64_t x_stride = p.x_stride;
    if (p.dtype != DType::kFloat32) {
      for (int64_t m = 0; m < rows; ++m) {
        kernels().to_float(element(p.x, p.dtype, (row + m) * p.x_stride + k), p.dtype, depth,
                           converted + m * depth);
      }
      x = converted;
      x_stride = depth;
    }
    kernels().dot(p.weight, region.column, region.columns, k, depth, x, x_stride, rows, sums);
  }
  float bias[kDotRegion];
  load_bias(p, region.column, region.columns, bias);
  for (int64_t i = 0; i < region.columns; ++i) {
    add_bypass(p, region.column + i, row, rows, sums[i]);
  }
  for (int64_t m = 0; m < rows; ++m) {
    float values[kDotRegion];
    for (int64_t i = 0; i < region.columns; ++i) values[i] = sums[i][m] + bias[i];
    void* y = element(p.y, p.dtype, (row + m) * p.weight.N + region.column);
    kernels().from_float(values, region.columns, p.dtype, y);
  }
}

// Decodes the region's weights once for each kMaxDotRows rows of x; after the first time their
// bytes come from the cache.
void few_rows_region(const Gemm4bitParams& p, const Region& region) {
  for (int64_t row = 0; row < p.M; row += kMaxDotRows) {
    dot_rows_region(p, region, row, std::min(kMaxDotRows, p.M - row));
  }
}

// ---- many rows of x ----

// `x` and `lora_S` start at row `row`, where the chunk starts; the region's rows count from there.
void many_rows_region(const Gemm4bitParams& p, const LeftOperand& x, const LeftOperand& lora_S,
                      const Region& region, int64_t row) {
  Accumulators sums;
  clear(region, sums);
  const auto decode = [&](int64_t n, int64_t width, int64_t k, int64_t depth, float* panel) {
    kernels().decode_columns(p.weight, n, k, width, depth, panel);
  };
  if (multiplies_bf16(x)) {
    add_product_bf16(x, region, decode, sums);
  } else {
    add_product(x, region, decode, sums);
  }
  add_product(lora_S, region, ColumnPanels{p.lora_B, p.lora_dtype, p.R}, sums);
  void* y = element(p.y, p.dtype, row * p.weight.N);
  float bias[kRegionTiles * kPanelWidth];
  load_bias(p, region.column, region.columns, bias);
  store(region, sums, p.dtype, p.weight.N, y, [&](int64_t, float* values) {
    for (int64_t c = 0; c < region.columns; ++c) values[c] += bias[c];
  });
}

LeftOperand all_rows(const Gemm4bitParams& p) {
  return rows_of(p.x, p.dtype, p.x_stride, p.weight.K);
}

// Two passes of dot products (8 rows) beat fp32 panels; only one pass beats panels in bf16.
bool has_few_rows(const Gemm4bitParams& p) {
  return p.M <= (multiplies_bf16(all_rows(p)) ? kMaxDotRows : kFewRows);
}

void many_rows(const Gemm4bitParams& p) {
  const int64_t K = p.weight.K;
  const int64_t N = p.weight.N;
  const int64_t chunk = chunk_rows(p.M, K, kRegionTiles);
  for (int64_t row = 0; row < p.M; row += chunk) {
    const int64_t rows = std::min(chunk, p.M - row);
    const LeftOperand x = packs(p.M, all_rows(p))
                              ? pack(all_rows(p), row, rows, static_cast<float*>(p.workspace))
                              : all_rows(p).from(row);
    const LeftOperand lora_S =
        rows_of(p.lora_S + (p.R > 0 ? row * p.S_stride : 0), DType::kFloat32, p.S_stride, p.R);
    const int64_t columns = kRegionTiles * kPanelWidth;
    for_each_region(rows, N, rows, columns, grain_of(rows * columns * K),
                    [&](const Region& region) { many_rows_region(p, x, lora_S, region, row); });
  }
}

}  // namespace
}  // namespace cpu

const char* launch::gemm_4bit(const Gemm4bitParams& p, void*) {
  if (const char* error = cpu::cpu_path_error()) return error;
  if (p.M == 0 || p.weight.N == 0) return nullptr;
  if (cpu::has_few_rows(p)) {
    cpu::for_each_region(p.M, p.weight.N, p.M, cpu::kDotRegion,
                         cpu::grain_of(p.M * cpu::kDotRegion * p.weight.K),
                         [&](const cpu::Region& region) { cpu::few_rows_region(p, region); });
  } else {
    cpu::many_rows(p);
  }
  return nullptr;
}

int64_t launch::workspace_gemm_4bit(const Gemm4bitParams& p) {
  if (!cpu::packs(p.M, cpu::all_rows(p))) return 0;
  return cpu::packed_bytes(cpu::chunk_rows(p.M, p.weight.K, cpu::kRegionTiles), p.weight.K);
}

int64_t launch::chunk_rows_gemm_4bit(const Gemm4bitParams&) { return 0; }

}  // namespace qlora_ext
