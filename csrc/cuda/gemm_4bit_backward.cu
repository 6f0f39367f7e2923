// gemm_4bit_backward on CUDA: which kernel, and how it is launched.
#include "cuda/gemm_4bit_any.cuh"
#include "cuda/gemm_4bit_backward_fused.cuh"
#include "cuda/heuristics.cuh"

namespace qlora_ext::launch {

namespace {

enum class Variant {
  kFused4,  // gemm_4bit_backward_fused with 4 or 8 mma tiles of 8 rows of dY
  kFused8,
  // kWgmma: planned as gemm_4bit_backward_wgmma.cuh, the transposed twin of the forward's (sm_90a).
  kChunks,  // the host decodes a few columns of W at a time, cuBLAS multiplies them
  kAny,     // FFMA, any shape
};

bool fused_can_run(const Gemm4bitBackwardParams& p, const DeviceInfo& device) {
  return fused_can_read(p.weight, p.dY, p.dY_stride, p.dtype, device) && is_aligned(p.dX, 16);
}

Variant choose(const Gemm4bitBackwardParams& p) {
  const DeviceInfo& device = device_info();
  const bool turing = device.arch < 80;
  if (!fused_can_run(p, device)) return p.M <= kAnyMaxRows ? Variant::kAny : Variant::kChunks;
  if (p.M > fused_max_rows(device)) return Variant::kChunks;
  // 64 rows at a time need 114 KiB of shared memory: A100, H100 and B200, but not sm_86, 89, 120.
  const bool wide =
      !turing && device.shared_bytes >= static_cast<int>(sizeof(BackwardSmem<Sm80, 8>));
  return p.M <= 32 || !wide ? Variant::kFused4 : Variant::kFused8;
}

// A stage is 64 rows of W by 256 columns. The registers leave room for one block per SM.
template <int kTilesM>
constexpr BlockCost kFusedCost{.resident = 1,
                               .least_stages = 4,
                               .stage = backward_stage(kTilesM),
                               .share = 0.0f,
                               .start = 1.2f};

// Splits of N. A tile is 256 columns wide, so without splits K = 4096 gives only 16 blocks.
template <int kTilesM>
Splits fused_splits(const Gemm4bitBackwardParams& p) {
  using Traits = BackwardTraits<Sm80, kTilesM>;  // Sm75's tiles are the same
  return split_contraction(ceil_div(p.weight.K, Traits::kTileK) * ceil_div(p.M, Traits::kTileM),
                           ceil_div(p.weight.N, Traits::kStageN),
                           reduce_parts_cost(p.M * p.weight.K), kFusedCost<kTilesM>);
}

template <int kTilesM>
int64_t workspace_fused(const Gemm4bitBackwardParams& p) {
  const int64_t splits = fused_splits<kTilesM>(p).count;
  return splits > 1 ? splits * p.M * p.weight.K * 4 : 0;
}

template <class Arch, class T, int kTilesM>
const char* backward_fused(const Gemm4bitBackwardParams& p, void* stream) {
  using Traits = BackwardTraits<Arch, kTilesM>;
  BackwardParams fused = make_backward_params(p);
  const Splits splits = fused_splits<kTilesM>(p);
  fused.n_per_split = splits.stages * Traits::kStageN;
  const dim3 grid(grid_blocks(ceil_div(p.weight.K, Traits::kTileK)),
                  static_cast<unsigned>(ceil_div(p.M, Traits::kTileM)),
                  static_cast<unsigned>(splits.count));
  constexpr size_t kBytes = sizeof(BackwardSmem<Arch, kTilesM>);
  QLORA_EXT_TRY(fused.scales.code != nullptr
                    ? (launch_kernel<gemm_4bit_backward_fused<Arch, T, kTilesM, true>>(
                          grid, Traits::kThreads, kBytes, stream, fused))
                    : (launch_kernel<gemm_4bit_backward_fused<Arch, T, kTilesM, false>>(
                          grid, Traits::kThreads, kBytes, stream, fused)));
  if (splits.count == 1) return nullptr;
  const ReduceParts reduce{.parts = fused.parts,
                           .num_parts = splits.count,
                           .rows = p.M,
                           .cols = p.weight.K,
                           .scale = 1.0f,
                           .bias = nullptr,
                           .bias_dtype = DType::kFloat32,
                           .out = p.dX,
                           .out_dtype = p.dtype};
  return launch_reduce_parts(reduce, stream);
}

template <int kTilesM>
const char* backward_fused(const Gemm4bitBackwardParams& p, void* stream) {
  return visit_fused<kTilesM>(p.dtype, [&](auto arch, auto type) {
    return backward_fused<decltype(arch), typename decltype(type)::type, kTilesM>(p, stream);
  });
}

bool is_empty(const Gemm4bitBackwardParams& p) { return p.M <= 0 || p.weight.K <= 0; }

}  // namespace

int64_t workspace_gemm_4bit_backward(const Gemm4bitBackwardParams& p) {
  if (is_empty(p)) return 0;
  switch (choose(p)) {
    case Variant::kFused4: return workspace_fused<4>(p);
    case Variant::kFused8: return workspace_fused<8>(p);
    default: return any_product_workspace(p.M, p.weight.K, p.weight.N);
  }
}

int64_t chunk_columns_gemm_4bit_backward(const Gemm4bitBackwardParams& p) {
  if (is_empty(p) || choose(p) != Variant::kChunks) return 0;
  return chunk_lines(p.M, p.weight.K, p.weight.N, p.dtype);
}

const char* gemm_4bit_backward(const Gemm4bitBackwardParams& p, void* stream) {
  if (is_empty(p)) return nullptr;
  switch (choose(p)) {
    case Variant::kFused4: return backward_fused<4>(p, stream);
    case Variant::kFused8: return backward_fused<8>(p, stream);
    default:  // also kChunks, if the caller did not ask chunk_columns_gemm_4bit_backward first
      return launch_any_product<gemm_4bit_backward_any<>>(as_any_product(p), p.workspace, stream);
  }
}

}  // namespace qlora_ext::launch
