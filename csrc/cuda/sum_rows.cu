// sum_rows on CUDA.
#include "cuda/sum_rows_tokens.cuh"

namespace qlora_ext::launch {

const char* sum_rows(const SumRowsParams& p, void* stream) {
  constexpr int kWidth = 8;
  const bool wide = p.K % kWidth == 0 && p.values_stride * dtype_size(p.dtype) % 16 == 0 &&
                    is_aligned(p.values, 16) && is_aligned(p.out, 16);
  return visit_cuda_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t units = p.T * (wide ? p.K / kWidth : p.K);
    const unsigned blocks = grid_blocks(ceil_div(units, kSumRowsThreads));
    return wide ? launch_kernel<sum_rows_tokens<T, kWidth>>(blocks, kSumRowsThreads, 0, stream, p)
                : launch_kernel<sum_rows_tokens<T, 1>>(blocks, kSumRowsThreads, 0, stream, p);
  });
}

}  // namespace qlora_ext::launch
