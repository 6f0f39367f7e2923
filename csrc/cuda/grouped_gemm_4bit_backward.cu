// grouped_gemm_4bit_backward on CUDA: which kernel, and how it is launched.
#include "cuda/grouped_gemm_4bit_any.cuh"
#include "cuda/grouped_gemm_4bit_fused.cuh"
#include "cuda/heuristics.cuh"

namespace qlora_ext::launch {

namespace {

// Rows of the fused kernel's tile.
int row_tile(const Groups& groups, const DeviceInfo& device) {
  if (device.arch < 80 || device.shared_bytes < static_cast<int>(sizeof(BackwardSmem<Sm80, 8>))) {
    return 32;
  }
  return best_row_tile(
      groups.M, groups.E,
      {{.rows = 32, .time = backward_stage(4)}, {.rows = 64, .time = backward_stage(8)}});
}

// The product as that of expert 0 with all rows.
Gemm4bitBackwardParams of_first(const GroupedGemm4bitBackwardParams& p) {
  return {.weight = p.weight.first,
          .dY = p.dY,
          .lora_dS = p.lora_dS,
          .lora_A = p.lora_A,
          .dX = p.dX,
          .M = p.groups.M,
          .R = p.R,
          .dY_stride = p.dY_stride,
          .dtype = p.dtype,
          .lora_dtype = p.lora_dtype,
          .workspace = nullptr};
}

template <class Arch, class T, int kTilesM>
const char* grouped_fused(const GroupedGemm4bitBackwardParams& p, void* stream) {
  using Traits = BackwardTraits<Arch, kTilesM>;
  GroupedBackwardParams grouped{};
  grouped.fused = make_backward_params(of_first(p));
  const int64_t column_tiles = ceil_div(p.weight.first.K, Traits::kTileK);
  constexpr size_t kBytes = sizeof(BackwardSmem<Arch, kTilesM>);
  return grouped.fused.scales.code != nullptr
             ? launch_row_groups<grouped_gemm_4bit_backward_fused<Arch, T, kTilesM, true>,
                                 Traits::kTileM>(grouped, p.groups, {.column_tiles = column_tiles},
                                                 Traits::kThreads, kBytes, stream)
             : launch_row_groups<grouped_gemm_4bit_backward_fused<Arch, T, kTilesM, false>,
                                 Traits::kTileM>(grouped, p.groups, {.column_tiles = column_tiles},
                                                 Traits::kThreads, kBytes, stream);
}

template <int kTilesM>
const char* grouped_fused(const GroupedGemm4bitBackwardParams& p, void* stream) {
  if (device_info().arch < 80) {
    if constexpr (kTilesM <= 4) return grouped_fused<Sm75, __half, kTilesM>(p, stream);
  }
  return p.dtype == DType::kFloat16 ? grouped_fused<Sm80, __half, kTilesM>(p, stream)
                                    : grouped_fused<Sm80, __nv_bfloat16, kTilesM>(p, stream);
}

}  // namespace

int64_t workspace_grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams&) { return 0; }

const char* grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams& p, void* stream) {
  const DeviceInfo& device = device_info();
  if (!fused_can_read(p.weight.first, p.dY, p.dY_stride, p.dtype, device) ||
      !is_aligned(p.dX, 16)) {
    return launch_grouped_any_product<grouped_gemm_4bit_backward_any<>>(as_any_product(of_first(p)),
                                                                        p.groups, stream);
  }
  return row_tile(p.groups, device) == 32 ? grouped_fused<4>(p, stream)
                                          : grouped_fused<8>(p, stream);
}

}  // namespace qlora_ext::launch
