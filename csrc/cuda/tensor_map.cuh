// Encodes tensor maps on the host. The driver's function is looked up at the first call: the
// library is imported where there is no driver, so it must not need one by itself.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/tensor_spec.cuh"
#include "cuda/wgmma.cuh"

namespace qlora_ext {

// Null, or what failed.
inline const char* encode_tensor_map(ptx::TensorMap& map, const TensorSpec& spec) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return "tensor map: the driver has no cuTensorMapEncodeTiled";
  const CUtensorMapDataType type =
      spec.element == TensorElement::kU8    ? CU_TENSOR_MAP_DATA_TYPE_UINT8
      : spec.element == TensorElement::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle swizzle = spec.swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : spec.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : spec.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t size[3], stride[2];
  cuuint32_t box[3];
  const cuuint32_t steps[3] = {1, 1, 1};
  for (int i = 0; i < spec.rank; ++i) {
    size[i] = spec.size[i];
    box[i] = spec.box[i];
    if (i + 1 < spec.rank) stride[i] = spec.stride[i];
  }
  const CUresult result =
      encode(&map, type, static_cast<cuuint32_t>(spec.rank), spec.base, size, stride, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "tensor map: the driver refused its sizes or strides";
}

}  // namespace qlora_ext
