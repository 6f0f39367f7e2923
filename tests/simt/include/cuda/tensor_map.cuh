// Host twin of csrc/cuda/tensor_map.cuh.
#pragma once

#include "cuda/tensor_spec.cuh"
#include "cuda/wgmma.cuh"

namespace qlora_ext {

inline const char* encode_tensor_map(ptx::TensorMap& map, const TensorSpec& spec) {
  const int swizzle = spec.swizzle == Swizzle::kNone ? 0 : static_cast<int>(spec.swizzle);
  return simt::TensorMap::encode(map, spec.base, bytes_of(spec.element), spec.rank, spec.size,
                                 spec.stride, spec.box, swizzle);
}

}  // namespace qlora_ext
