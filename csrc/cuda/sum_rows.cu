// sum_rows on CUDA.
#include "cuda/sum_rows_tokens.cuh"

namespace qlora_ext::launch {

const char* sum_rows(const SumRowsParams& p, void* stream) {
  const int64_t width = 16 / dtype_size(p.dtype);
  const bool wide = p.K % width == 0 && p.values_stride % width == 0 && is_aligned(p.values, 16) &&
                    is_aligned(p.out, 16);
  const int64_t threads = p.T * (wide ? p.K / width : p.K);
  const unsigned blocks = grid_blocks(ceil_div(threads, kSumRowsThreads));
  return visit_cuda_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
    return wide ? launch_kernel<sum_rows_tokens<T, kWidth>>(blocks, kSumRowsThreads, 0, stream, p)
                : launch_kernel<sum_rows_tokens<T, 1>>(blocks, kSumRowsThreads, 0, stream, p);
  });
}

}  // namespace qlora_ext::launch
