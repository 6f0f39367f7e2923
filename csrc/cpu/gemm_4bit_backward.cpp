// dX = dY W + dS A with W in 4 bits: the contraction runs over the rows of W.
//
// W's rows are decoded, without a transpose, into panels [n, 16 columns] that stay in L1. The
// bypass is added as one more block of the contraction.
#include "groups.h"
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

// Each piece's dY is packed into its own rows of the workspace, a slab of pieces at a time.
const char* launch::grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams& p, void*) {
  using namespace cpu;
  if (const char* error = cpu_path_error()) return error;
  const int64_t N = p.weight.first.N;
  const int64_t K = p.weight.first.K;
  zero_rest(p.groups, p.dtype, K, p.dX);
  const LeftOperand all = rows_of(p.dY, p.dtype, p.dY_stride, N);
  const std::vector<Piece> pieces =
      pieces_of(p.groups, [&](int64_t rows) { return chunk_rows(rows, N, kRegionTiles); });
  struct ExpertRows {
    Gemm4bitBackwardParams p;  // of a piece of an expert's rows
    LeftOperand dY;
  };
  const int64_t most = p.workspace == nullptr ? p.groups.M : slab_rows(N);
  for_each_slab(pieces, most, [&](const std::vector<Piece>& run) {
    std::vector<ExpertRows> slab;
    for (const Piece& piece : run) {
      ExpertRows e{.p = p.of_first(), .dY = all.from(piece.row)};
      e.p.weight = p.weight.expert(piece.expert);
      e.p.lora_dS = p.R > 0 ? p.lora_dS + piece.row * p.R : nullptr;
      e.p.lora_A = of_expert(p.lora_A, p.lora_dtype, piece.expert, p.R * K);
      e.p.dX = element(p.dX, p.dtype, piece.row * K);
      e.p.M = piece.rows;
      if (packs(rows_of_expert(p.groups, piece.expert).rows, all)) {
        float* packed = static_cast<float*>(p.workspace) +
                        (piece.row - run.front().row) * packed_bytes(1, N) / int64_t{sizeof(float)};
        e.dY = pack(all, piece.row, piece.rows, packed);
      }
      slab.push_back(e);
    }
    for_each_part(
        slab, [](const ExpertRows& e) { return e.p.M; }, K, kRegionTiles * kPanelWidth, N,
        [&](const ExpertRows& e, int64_t column, int64_t columns) {
          const LeftOperand dS = rows_of(e.p.lora_dS, DType::kFloat32, p.R, p.R);
          const Region region{.row = 0, .rows = e.p.M, .column = column, .columns = columns};
          backward_region(e.p, e.dY, dS, region, 0);
        });
  });
  return nullptr;
}

int64_t launch::workspace_grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams& p) {
  using namespace cpu;
  const int64_t N = p.weight.first.N;
  if (!packs(p.groups.M, rows_of(p.dY, p.dtype, p.dY_stride, N))) return 0;
  return std::min(p.groups.M, slab_rows(N)) * packed_bytes(1, N);
}

int64_t launch::workspace_gemm_4bit_backward(const Gemm4bitBackwardParams& p) {
  if (!cpu::packs(p.M, cpu::all_rows(p))) return 0;
  return cpu::packed_bytes(cpu::chunk_rows(p.M, p.weight.N, cpu::kRegionTiles), p.weight.N);
}

int64_t launch::chunk_columns_gemm_4bit_backward(const Gemm4bitBackwardParams&) { return 0; }

}  // namespace qlora_ext
