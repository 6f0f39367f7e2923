// quantize_4bit on CUDA: per block in one kernel, per tensor in a few.
#include "cuda/quantize_4bit_blocks.cuh"
#include "cuda/quantize_4bit_statistics.cuh"

namespace qlora_ext::launch {

namespace {

// A thread block packs whole blocks of 32 to 4096 elements. For anything else (blocksize 0, which
// arrives here as numel) other kernels compute the scale first.
bool per_block(const Quantize4bitParams& p) {
  return p.normalization != Normalization::kNone && p.blocksize >= 32 &&
         p.blocksize <= kQuantizeTile && (p.blocksize & (p.blocksize - 1)) == 0;
}

template <class T>
const char* tensor_statistics(const Quantize4bitParams& p, void* stream) {
  const T* weight = static_cast<const T*>(p.weight);
  if (p.normalization == Normalization::kNone) {
    return launch_kernel<quantize_4bit_unit_scale>(1, 32, 0, stream, p.absmax);
  }
  if (p.normalization == Normalization::kAbsmax) {
    uint32_t* partials = static_cast<uint32_t*>(p.workspace);
    const unsigned grid = grid_blocks(ceil_div(p.numel, kMaxThreads), kMaxPartials);
    QLORA_EXT_TRY(launch_kernel<quantize_4bit_partial_max<T>>(grid, kMaxThreads, sizeof(MaxSmem),
                                                              stream, weight, p.numel, partials));
    return launch_kernel<quantize_4bit_finish_max>(1, kMaxThreads, sizeof(MaxSmem), stream,
                                                   partials, static_cast<int>(grid), p.absmax);
  }
  double* scratch = static_cast<double*>(p.workspace);
  const double* total = nullptr;
  const TreeValues<T> values{.x = weight, .mean = nullptr, .n = p.numel};
  QLORA_EXT_TRY(launch_tree_sum(values, scratch, &total, stream));
  QLORA_EXT_TRY(launch_kernel<quantize_4bit_finish_mean>(1, 32, 0, stream, total, p.numel, p.mean));
  const TreeValues<T> deviations{.x = weight, .mean = p.mean, .n = p.numel};
  QLORA_EXT_TRY(launch_tree_sum(deviations, scratch, &total, stream));
  return launch_kernel<quantize_4bit_finish_scale>(1, 32, 0, stream, total, p.numel, p.std_factor,
                                                   p.absmax);
}

template <class T, Normalization kNorm, bool kVector>
const char* pack(const Quantize4bitParams& p, void* stream) {
  const CodeOrder order = make_code_order(p.codebook);
  const unsigned grid = grid_blocks(ceil_div(p.numel, kQuantizeTile));
  if constexpr (kNorm != Normalization::kNone) {
    if (per_block(p)) {
      return launch_kernel<quantize_4bit_blocks<T, kNorm, kVector>>(
          grid, kQuantizeThreads, sizeof(QuantizeSmem), stream, p, order, log2_floor(p.blocksize));
    }
  }
  QLORA_EXT_TRY(tensor_statistics<T>(p, stream));
  return launch_kernel<quantize_4bit_tensor<T, kNorm, kVector>>(
      grid, kQuantizeThreads, sizeof(QuantizeSmem), stream, p, order);
}

template <class T, Normalization kNorm>
const char* pack(const Quantize4bitParams& p, void* stream) {
  return is_aligned(p.weight, 16) ? pack<T, kNorm, true>(p, stream)
                                  : pack<T, kNorm, false>(p, stream);
}

}  // namespace

int64_t workspace_quantize_4bit(const Quantize4bitParams& p) {
  if (p.numel <= 0 || per_block(p) || p.normalization == Normalization::kNone) return 0;
  if (p.normalization == Normalization::kAbsmax) return kMaxPartials * 4;
  return tree_sum_doubles(p.numel) * 8;
}

const char* quantize_4bit(const Quantize4bitParams& p, void* stream) {
  if (p.numel <= 0) return nullptr;
  return visit_cuda_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.normalization) {
      case Normalization::kStandard: return pack<T, Normalization::kStandard>(p, stream);
      case Normalization::kNone: return pack<T, Normalization::kNone>(p, stream);
      default: return pack<T, Normalization::kAbsmax>(p, stream);
    }
  });
}

}  // namespace qlora_ext::launch
