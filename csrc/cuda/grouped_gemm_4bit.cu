// grouped_gemm_4bit on CUDA: which kernel, and how it is launched.
#include "cuda/grouped_gemm_4bit_any.cuh"
#include "cuda/grouped_gemm_4bit_fused.cuh"
#include "cuda/heuristics.cuh"

namespace qlora_ext::launch {

namespace {

// Rows of the fused kernel's tile.
int row_tile(const Groups& groups, const DeviceInfo& device) {
  // Two blocks of up to 16 rows share an SM with 228 KiB of shared memory, so each takes less of it.
  const bool two = device.shared_bytes >= 2 * int{sizeof(FusedSmem<Sm80, 1>)} + 1024;
  const float share = two ? (1 + kFusedShare) / 2 : 1.0f;
  const RowTile eight{.rows = 8, .time = share * fused_stage(1)};
  const RowTile sixteen{.rows = 16, .time = share * fused_stage(2)};
  const RowTile thirty_two{.rows = 32, .time = fused_stage(4)};
  const bool wide =
      device.arch >= 80 && device.shared_bytes >= static_cast<int>(sizeof(FusedSmem<Sm80, 8>));
  if (!wide) return best_row_tile(groups.M, groups.E, {eight, sixteen, thirty_two});
  const RowTile sixty_four{.rows = 64, .time = fused_stage(8)};
  return best_row_tile(groups.M, groups.E, {eight, sixteen, thirty_two, sixty_four});
}

template <class Arch, class T, int kTilesM>
const char* grouped_fused(const GroupedGemm4bitParams& p, void* stream) {
  using Traits = FusedTraits<Arch, kTilesM>;
  GroupedFusedParams grouped{};
  grouped.fused = make_fused_params<T>(p.of_first());
  const int64_t column_tiles = ceil_div(p.weight.first.N, Traits::kTileN);
  constexpr size_t kBytes = sizeof(FusedSmem<Arch, kTilesM>);
  return grouped.fused.scales.code != nullptr
             ? launch_row_groups<grouped_gemm_4bit_fused<Arch, T, kTilesM, true>, Traits::kTileM>(
                   grouped, p.groups, {.column_tiles = column_tiles}, Traits::kThreads, kBytes,
                   stream)
             : launch_row_groups<grouped_gemm_4bit_fused<Arch, T, kTilesM, false>, Traits::kTileM>(
                   grouped, p.groups, {.column_tiles = column_tiles}, Traits::kThreads, kBytes,
                   stream);
}

template <int kTilesM>
const char* grouped_fused(const GroupedGemm4bitParams& p, void* stream) {
  return visit_fused<kTilesM>(p.dtype, [&](auto arch, auto type) {
    return grouped_fused<decltype(arch), typename decltype(type)::type, kTilesM>(p, stream);
  });
}

}  // namespace

int64_t workspace_grouped_gemm_4bit(const GroupedGemm4bitParams&) { return 0; }

const char* grouped_gemm_4bit(const GroupedGemm4bitParams& p, void* stream) {
  const DeviceInfo& device = device_info();
  if (!fused_can_read(p.weight.first, p.x, p.x_stride, p.dtype, device)) {
    return launch_grouped_any_product<grouped_gemm_4bit_any<>>(as_any_product(p.of_first()),
                                                               p.groups, stream);
  }
  switch (row_tile(p.groups, device)) {
    case 8: return grouped_fused<1>(p, stream);
    case 16: return grouped_fused<2>(p, stream);
    case 32: return grouped_fused<4>(p, stream);
    default: return grouped_fused<8>(p, stream);
  }
}

}  // namespace qlora_ext::launch
