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

template <class Arch, class T, int kTilesM>
const char* grouped_fused(const GroupedGemm4bitBackwardParams& p, void* stream) {
  using Traits = BackwardTraits<Arch, kTilesM>;
  GroupedBackwardParams grouped{};
  grouped.fused = make_backward_params(p.of_first());
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
  return visit_fused<kTilesM>(p.dtype, [&](auto arch, auto type) {
    return grouped_fused<decltype(arch), typename decltype(type)::type, kTilesM>(p, stream);
  });
}

}  // namespace

int64_t workspace_grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams&) { return 0; }

const char* grouped_gemm_4bit_backward(const GroupedGemm4bitBackwardParams& p, void* stream) {
  const DeviceInfo& device = device_info();
  if (!fused_can_read(p.weight.first, p.dY, p.dY_stride, p.dtype, device) ||
      !is_aligned(p.dX, 16)) {
    return launch_grouped_any_product<grouped_gemm_4bit_backward_any<>>(
        as_any_product(p.of_first()), p.groups, stream);
  }
  return row_tile(p.groups, device) == 32 ? grouped_fused<4>(p, stream)
                                          : grouped_fused<8>(p, stream);
}

}  // namespace qlora_ext::launch
