// embedding_4bit on CUDA: which kernel, and how it is launched.
#include "cuda/embedding_4bit_rows.cuh"

namespace qlora_ext::launch {

const char* embedding_4bit(const Embedding4bitParams& p, void* stream) {
  const Scales scales = make_scales(p.weight);
  const int64_t count = p.M * p.weight.K;
  if (count <= 0) return nullptr;
  const bool vectors =
      p.weight.K % kChunk == 0 && is_aligned(p.weight.packed, 16) && is_aligned(p.out, 16);
  return visit_cuda_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!vectors) {
      return launch_kernel<embedding_4bit_any<T>>(grid_blocks(ceil_div(count, 256)), 256, 0, stream,
                                                  p, scales);
    }
    const unsigned grid = grid_blocks(ceil_div(count / kChunk, kDequantizeThreads));
    if (scales.mean != nullptr) {
      return launch_kernel<embedding_4bit_rows<T, true>>(grid, kDequantizeThreads,
                                                         sizeof(DequantizeSmem), stream, p, scales);
    }
    return launch_kernel<embedding_4bit_rows<T, false>>(grid, kDequantizeThreads,
                                                        sizeof(DequantizeSmem), stream, p, scales);
  });
}

}  // namespace qlora_ext::launch
