// y = x W^T + bias + S B^T with W in 4 bits; fp32 accumulation, one rounding.
//
// Few rows of x: dot products with each row of W, which is read once and decoded in registers
// (docs/cpu.md says what limits them). More rows: W is decoded, transposed, into panels that stay
// in L1, and the LoRA bypass is added as one more block of the contraction.
//
// A mixture of experts does the same for each expert's rows. The threads share the tasks of all
// experts.
#include "groups.h"
#include "matmul.h"
#include "scales.h"

namespace qlora_ext {
namespace cpu {
namespace {

constexpr int64_t kFewRows = 8;     // up to here: dot products (groups.h counts on it)
constexpr int64_t kDotRegion = 32;  // rows of W per task, for few rows of x
static_assert(kDotRegion == kRegionTiles * kPanelWidth);  // a grouped product cuts columns once
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

// Up to how many rows of x dot products win: two passes of them (8 rows) beat fp32 panels, and only
// one pass beats panels in bf16.
int64_t few_rows(const LeftOperand& x) { return multiplies_bf16(x) ? kMaxDotRows : kFewRows; }

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

// ---- experts ----

LeftOperand all_rows(const GroupedGemm4bitParams& p) {
  return rows_of(p.x, p.dtype, p.x_stride, p.weight.first.K, p.groups.rows);
}

// Whether no row of x is copied: kernels read rows in place only if they are evenly spaced.
bool reads_in_place(const GroupedGemm4bitParams& p) {
  return p.groups.rows == nullptr && multiplies_bf16(all_rows(p));
}

// What the tasks of one piece of an expert's rows multiply.
struct ExpertRows {
  Gemm4bitParams p;  // of this piece alone
  bool few;
  bool packed;    // x is packed to fp32
  LeftOperand x;  // of the piece's rows
};

ExpertRows rows_of_piece(const GroupedGemm4bitParams& p, const Piece& piece, int64_t slot) {
  const int64_t K = p.weight.first.K;
  const int64_t N = p.weight.first.N;
  ExpertRows e{.p = p.of_first(), .few = false, .packed = false, .x = {}};
  e.p.weight = p.weight.expert(piece.expert);
  e.p.bias = of_expert(p.bias, p.bias_dtype, piece.expert, N);
  e.p.lora_S = p.R > 0 ? p.lora_S + piece.row * p.S_stride : nullptr;
  e.p.lora_B = of_expert(p.lora_B, p.lora_dtype, piece.expert, N * p.R);
  e.p.y = element(p.y, p.dtype, piece.row * N);
  e.p.M = piece.rows;
  // As gemm_4bit would choose for all of the expert's rows.
  const LeftOperand all = all_rows(p);
  const int64_t rows = rows_of_expert(p.groups, piece.expert).rows;
  const bool copied = p.groups.rows != nullptr;
  e.few = rows <= few_rows(all);
  e.packed = !e.few && (packs(rows, all) || (copied && !multiplies_bf16(all)));
  char* copy = static_cast<char*>(p.workspace) + (p.workspace ? slot * packed_bytes(1, K) : 0);
  if (e.packed) {
    e.x = packed_rows(reinterpret_cast<const float*>(copy), piece.rows, K);
    return e;
  }
  e.p.x = copied ? copy : element(p.x, p.dtype, piece.row * p.x_stride);
  e.p.x_stride = copied ? K : p.x_stride;
  e.x = rows_of(e.p.x, p.dtype, e.p.x_stride, K);
  return e;
}

// Copies the rows of x that `slab` needs, in parallel.
void copy_rows(const GroupedGemm4bitParams& p, const std::vector<ExpertRows>& slab,
               const std::vector<Piece>& pieces) {
  const LeftOperand x = all_rows(p);
  const int64_t first = pieces.front().row;
  const int64_t last = pieces.back().row + pieces.back().rows;
  std::vector<int32_t> owner(static_cast<size_t>(last - first));  // a row's piece
  for (size_t i = 0; i < pieces.size(); ++i) {
    std::fill_n(owner.begin() + (pieces[i].row - first), pieces[i].rows, static_cast<int32_t>(i));
  }
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, x.depth));
  parallel_for(last - first, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const ExpertRows& e = slab[owner[m]];
      const int64_t at = first + m - pieces[owner[m]].row;
      if (e.packed) {
        float* packed = const_cast<float*>(static_cast<const float*>(e.x.data));
        pack_row(x, first + m, at, e.p.M, packed);
      } else if (p.groups.rows != nullptr) {
        char* copy = const_cast<char*>(static_cast<const char*>(e.p.x));
        const int64_t bytes = x.depth * dtype_size(p.dtype);
        std::memcpy(copy + at * bytes, element(p.x, p.dtype, x.offset_of(first + m)), bytes);
      }
    }
  });
}

// Multiplies pieces whose copied rows fit the workspace together.
void multiply_slab(const GroupedGemm4bitParams& p, const std::vector<Piece>& pieces) {
  std::vector<ExpertRows> slab;
  slab.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    slab.push_back(rows_of_piece(p, piece, piece.row - pieces.front().row));
  }
  if (!reads_in_place(p) && p.weight.first.K > 0) copy_rows(p, slab, pieces);
  for_each_part(
      slab, [](const ExpertRows& e) { return e.p.M; }, p.weight.first.N, kDotRegion,
      p.weight.first.K,
      [&](const ExpertRows& e, int64_t column, int64_t columns) {
        const Region region{.row = 0, .rows = e.p.M, .column = column, .columns = columns};
        if (e.few) {
          few_rows_region(e.p, region);
        } else {
          const LeftOperand lora_S = rows_of(e.p.lora_S, DType::kFloat32, p.S_stride, p.R);
          many_rows_region(e.p, e.x, lora_S, region, 0);
        }
      });
}

}  // namespace
}  // namespace cpu

const char* launch::gemm_4bit(const Gemm4bitParams& p, void*) {
  if (const char* error = cpu::cpu_path_error()) return error;
  if (p.M == 0 || p.weight.N == 0) return nullptr;
  if (p.M <= cpu::few_rows(cpu::all_rows(p))) {
    cpu::for_each_region(p.M, p.weight.N, p.M, cpu::kDotRegion,
                         cpu::grain_of(p.M * cpu::kDotRegion * p.weight.K),
                         [&](const cpu::Region& region) { cpu::few_rows_region(p, region); });
  } else {
    cpu::many_rows(p);
  }
  return nullptr;
}

const char* launch::grouped_gemm_4bit(const GroupedGemm4bitParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  zero_rest(p.groups, p.dtype, p.weight.first.N, p.y);
  const LeftOperand x = all_rows(p);
  const std::vector<Piece> pieces = pieces_of(p.groups, [&](int64_t rows) {
    return rows <= few_rows(x) ? rows : chunk_rows(rows, x.depth, kRegionTiles);
  });
  const int64_t most = reads_in_place(p) ? p.groups.M : slab_rows(x.depth);
  for_each_slab(pieces, most, [&](const std::vector<Piece>& slab) { multiply_slab(p, slab); });
  return nullptr;
}

int64_t launch::workspace_grouped_gemm_4bit(const GroupedGemm4bitParams& p) {
  if (cpu::reads_in_place(p)) return 0;
  return std::min(p.groups.M, cpu::slab_rows(p.weight.first.K)) *
         cpu::packed_bytes(1, p.weight.first.K);
}

int64_t launch::workspace_gemm_4bit(const Gemm4bitParams& p) {
  if (!cpu::packs(p.M, cpu::all_rows(p))) return 0;
  return cpu::packed_bytes(cpu::chunk_rows(p.M, p.weight.K, cpu::kRegionTiles), p.weight.K);
}

int64_t launch::chunk_rows_gemm_4bit(const Gemm4bitParams&) { return 0; }

}  // namespace qlora_ext
