// dequantize_4bit on CUDA: which kernel, and how it is launched.
#include "cuda/dequantize_4bit_any.cuh"
#include "cuda/dequantize_4bit_vector.cuh"

namespace qlora_ext::launch {

const char* dequantize_4bit(const Dequantize4bitParams& p, void* stream) {
  const Scales scales = make_scales(p.weight);
  const int64_t columns = p.columns();
  const ColumnRange range{.first = p.row_begin * p.weight.K + p.col_begin,
                          .count = (p.row_end - p.row_begin) * columns,
                          .width = columns,
                          .gap = p.weight.K - columns};
  if (range.count <= 0) return nullptr;
  // Vector loads need every 32 weights from the first to lie in one aligned 16-byte chunk.
  const bool vectors = range.first % kChunk == 0 && range.gap % kChunk == 0 &&
                       (range.gap == 0 || columns % kChunk == 0) &&
                       is_aligned(p.weight.packed, 16) && is_aligned(p.out, 16);
  return visit_cuda_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out = static_cast<T*>(p.out);
    if (!vectors) {
      return launch_kernel<dequantize_4bit_any<T>>(grid_blocks(ceil_div(range.count, 256)), 256, 0,
                                                   stream, p.weight, scales, range, out);
    }
    const int64_t chunks = range.count < kChunk ? 1 : range.count / kChunk;
    const unsigned grid = grid_blocks(ceil_div(chunks, kDequantizeThreads));
    if (scales.mean != nullptr) {
      return launch_kernel<dequantize_4bit_vector<T, true>>(
          grid, kDequantizeThreads, sizeof(DequantizeSmem), stream, p.weight, scales, range, out);
    }
    return launch_kernel<dequantize_4bit_vector<T, false>>(
        grid, kDequantizeThreads, sizeof(DequantizeSmem), stream, p.weight, scales, range, out);
  });
}

}  // namespace qlora_ext::launch
