// What a tensor map describes, for tensor_map.cuh and its host twin.
#pragma once

#include "cuda/wgmma_layout.cuh"

namespace qlora_ext {

enum class TensorElement { kU8, kF16, kBf16 };

struct TensorSpec {
  void* base;  // 16-byte aligned
  TensorElement element;
  int rank;            // 2 or 3
  uint64_t size[3];    // in elements, the contiguous dimension first
  uint64_t stride[2];  // in bytes, of the other dimensions; multiples of 16
  uint32_t box[3];     // in elements, up to 256 each; one row is as wide as the swizzle
  Swizzle swizzle;
};

constexpr int bytes_of(TensorElement element) { return element == TensorElement::kU8 ? 1 : 2; }

}  // namespace qlora_ext
