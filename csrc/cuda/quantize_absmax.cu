// quantize_absmax and dequantize_absmax on CUDA.
#include "cuda/quantize_absmax_groups.cuh"
#include "cuda/tree_sum.cuh"

namespace qlora_ext::launch {

int64_t workspace_quantize_absmax(const QuantizeAbsmaxParams& p) {
  return p.num_blocks > 0 ? tree_sum_doubles(p.num_blocks) * 8 : 0;
}

const char* quantize_absmax(const QuantizeAbsmaxParams& p, void* stream) {
  if (p.num_blocks <= 0) return nullptr;
  const double* total = nullptr;
  const TreeValues<float> values{.x = p.absmax, .mean = nullptr, .n = p.num_blocks};
  QLORA_EXT_TRY(launch_tree_sum(values, static_cast<double*>(p.workspace), &total, stream));
  const int64_t groups = ceil_div(p.num_blocks, 256);
  return launch_kernel<quantize_absmax_groups>(grid_blocks(ceil_div(groups, kAbsmaxThreads / 32)),
                                               kAbsmaxThreads, sizeof(QuantizeAbsmaxSmem), stream,
                                               p, total);
}

const char* dequantize_absmax(const DequantizeAbsmaxParams& p, void* stream) {
  return launch_kernel<dequantize_absmax_codes>(grid_blocks(ceil_div(p.num_blocks, kAbsmaxThreads)),
                                                kAbsmaxThreads, 0, stream, p);
}

}  // namespace qlora_ext::launch
