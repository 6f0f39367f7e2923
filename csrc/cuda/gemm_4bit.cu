// gemm_4bit on CUDA: which kernel, and how it is launched.
#include "cuda/gemm_4bit_any.cuh"
#include "cuda/gemm_4bit_fused.cuh"
#include "cuda/heuristics.cuh"
#include "cuda/reduce_parts.cuh"

namespace qlora_ext::launch {

namespace {

enum class Variant {
  kFused1,  // gemm_4bit_fused with 1, 2, 4 or 8 mma tiles of 8 rows of x
  kFused2,
  kFused4,
  kFused8,
  // kWgmma: planned as gemm_4bit_wgmma.cuh, for sm_90a and M of about 128 to 4096. Producer warps
  //         decode W into swizzled shared memory, consumers run wgmma on it.
  kChunks,  // the host decodes a few rows of W at a time, cuBLAS multiplies them
  kAny,     // FFMA, any shape
};

bool fused_can_run(const Gemm4bitParams& p, const DeviceInfo& device) {
  return fused_can_read(p.weight, p.x, p.x_stride, p.dtype, device);
}

Variant choose(const Gemm4bitParams& p) {
  const DeviceInfo& device = device_info();
  const bool turing = device.arch < 80;
  if (!fused_can_run(p, device)) return p.M <= kAnyMaxRows ? Variant::kAny : Variant::kChunks;
  if (p.M > fused_max_rows(device)) return Variant::kChunks;
  if (p.M <= 8) return Variant::kFused1;
  if (p.M <= 16) return Variant::kFused2;
  // 64 rows at a time need 131 KiB of shared memory: A100, H100 and B200, but not sm_86, 89, 120.
  const bool wide = !turing && device.shared_bytes >= static_cast<int>(sizeof(FusedSmem<Sm80, 8>));
  return p.M <= 32 || !wide ? Variant::kFused4 : Variant::kFused8;
}

// Two blocks fit an SM with 228 KiB of shared memory; from 32 rows on they need too many registers.
template <int kTilesM>
BlockCost fused_cost(const DeviceInfo& device) {
  constexpr float kStage = fused_stage(kTilesM);
  const bool two =
      kTilesM <= 2 && device.shared_bytes >= 2 * int{sizeof(FusedSmem<Sm80, 1>)} + 1024;
  return {.resident = two ? 2 : 1,
          .least_stages = 4,
          .stage = kStage,
          .share = kFusedShare * kStage,
          .start = 1.2f};
}

template <int kTilesM>
int64_t fused_tiles(const Gemm4bitParams& p) {
  using Traits = FusedTraits<Sm80, kTilesM>;
  return ceil_div(p.weight.N, Traits::kTileN) * ceil_div(p.M, Traits::kTileM);
}

// Splits of K. The launch and its workspace must get the same answer on every architecture, and do:
// Sm75 has the tiles of Sm80.
template <int kTilesM>
Splits fused_splits(const Gemm4bitParams& p) {
  using Traits = FusedTraits<Sm80, kTilesM>;
  return split_contraction(fused_tiles<kTilesM>(p), ceil_div(p.weight.K, Traits::kTileK),
                           last_block_adds<kTilesM> ? last_block_cost(p.M * Traits::kTileN)
                                                    : reduce_parts_cost(p.M * p.weight.N),
                           fused_cost<kTilesM>(device_info()));
}

// Bytes of the workspace that count the blocks of each tile. The parts lie behind them.
template <int kTilesM>
int64_t fused_arrivals(const Gemm4bitParams& p) {
  return last_block_adds<kTilesM> ? arrival_bytes(fused_tiles<kTilesM>(p)) : 0;
}

template <int kTilesM>
int64_t workspace_fused(const Gemm4bitParams& p) {
  const int64_t splits = fused_splits<kTilesM>(p).count;
  return splits > 1 ? fused_arrivals<kTilesM>(p) + splits * p.M * p.weight.N * 4 : 0;
}

template <class Arch, class T, int kTilesM>
const char* gemm_fused(const Gemm4bitParams& p, void* stream) {
  using Traits = FusedTraits<Arch, kTilesM>;
  FusedParams fused = make_fused_params<T>(p);
  const Splits splits = fused_splits<kTilesM>(p);
  fused.k_per_split = splits.stages * Traits::kTileK;
  if (splits.count > 1) {
    const int64_t bytes = fused_arrivals<kTilesM>(p);
    fused.parts = parts_behind(p.workspace, bytes);
    if (bytes > 0) QLORA_EXT_TRY(make_arrivals(p.workspace, bytes, stream, fused.arrivals));
  }
  const dim3 grid(grid_blocks(ceil_div(p.weight.N, Traits::kTileN)),
                  static_cast<unsigned>(ceil_div(p.M, Traits::kTileM)),
                  static_cast<unsigned>(splits.count));
  constexpr size_t kBytes = sizeof(FusedSmem<Arch, kTilesM>);
  QLORA_EXT_TRY(fused.scales.code != nullptr
                    ? (launch_kernel<gemm_4bit_fused<Arch, T, kTilesM, true>>(
                          grid, Traits::kThreads, kBytes, stream, fused))
                    : (launch_kernel<gemm_4bit_fused<Arch, T, kTilesM, false>>(
                          grid, Traits::kThreads, kBytes, stream, fused)));
  if (splits.count == 1 || last_block_adds<kTilesM>) return nullptr;
  const ReduceParts reduce{.parts = fused.parts,
                           .num_parts = splits.count,
                           .rows = p.M,
                           .cols = p.weight.N,
                           .scale = 1.0f,
                           .bias = p.bias,
                           .bias_dtype = p.bias_dtype,
                           .out = p.y,
                           .out_dtype = p.dtype};
  return launch_reduce_parts(reduce, stream);
}

template <int kTilesM>
const char* gemm_fused(const Gemm4bitParams& p, void* stream) {
  return visit_fused<kTilesM>(p.dtype, [&](auto arch, auto type) {
    return gemm_fused<decltype(arch), typename decltype(type)::type, kTilesM>(p, stream);
  });
}

bool is_empty(const Gemm4bitParams& p) { return p.M <= 0 || p.weight.N <= 0; }

}  // namespace

int64_t workspace_gemm_4bit(const Gemm4bitParams& p) {
  if (is_empty(p)) return 0;
  switch (choose(p)) {
    case Variant::kFused1: return workspace_fused<1>(p);
    case Variant::kFused2: return workspace_fused<2>(p);
    case Variant::kFused4: return workspace_fused<4>(p);
    case Variant::kFused8: return workspace_fused<8>(p);
    default: return any_product_workspace(p.M, p.weight.N, p.weight.K);
  }
}

int64_t chunk_rows_gemm_4bit(const Gemm4bitParams& p) {
  if (is_empty(p) || choose(p) != Variant::kChunks) return 0;
  return chunk_lines(p.M, p.weight.N, p.weight.K, p.dtype);
}

const char* gemm_4bit(const Gemm4bitParams& p, void* stream) {
  if (is_empty(p)) return nullptr;
  if (p.table != nullptr && (p.M > 8 || p.weight.absmax_code != nullptr)) {
    return "a codebook in GPU memory needs fp32 scales and at most 8 rows of x";
  }
  switch (choose(p)) {
    case Variant::kFused1: return gemm_fused<1>(p, stream);
    case Variant::kFused2: return gemm_fused<2>(p, stream);
    case Variant::kFused4: return gemm_fused<4>(p, stream);
    case Variant::kFused8: return gemm_fused<8>(p, stream);
    default:  // also kChunks, if the caller did not ask chunk_rows_gemm_4bit first
      return launch_any_product<gemm_4bit_any<>>(as_any_product(p), p.workspace, stream);
  }
}

}  // namespace qlora_ext::launch
