// The format as kernels read it: conversions that round once, scales, single weights.
// Everything here is bit-exact with the CPU backend. So products and sums are __f*_rn, which the
// compiler never contracts into an FMA.
#pragma once

#include "codebook.h"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace qlora_ext {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// Two values in one register, the first in the low half; T is __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

// Stores eight consecutive values, 16-byte aligned. __stcg, because nvcc splits a plain uint4 store
// into four if it cannot prove the alignment.
template <class T>
__device__ __forceinline__ void store_eight(T* out, const float (&v)[8]) {
  uint4* vectors = reinterpret_cast<uint4*>(out);
  if constexpr (sizeof(T) == 2) {
    __stcg(vectors, make_uint4(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]),
                               pack_pair<T>(v[4], v[5]), pack_pair<T>(v[6], v[7])));
  } else {
    __stcg(vectors, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                               __float_as_uint(v[3])));
    __stcg(vectors + 1, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]),
                                   __float_as_uint(v[6]), __float_as_uint(v[7])));
  }
}

// Visits the device's own types: visit_cuda_dtype(dtype, [&](auto tag) {
//   using T = typename decltype(tag)::type; ... });
template <class F>
decltype(auto) visit_cuda_dtype(DType dtype, F&& f) {
  return visit_dtype<float, __half, __nv_bfloat16>(dtype, f);
}

// The signed dynamic map. Not __constant__: the constant cache serves one address at a time, and
// lanes look up different codes. Kernels that look up often copy it to shared memory.
static __device__ const float kDeviceDynamicMap[256] = {QLORA_EXT_DYNAMIC_MAP};

// What a kernel needs to find a weight's scales: element i is in block i >> shift.
// If the weight has only one block, shift is 63.
struct Scales {
  const uint8_t* code;  // [num_blocks], or null: absmax is given
  const float* absmax;  // [num_blocks], or null: nested
  const float* nested;  // [1 + ceil(num_blocks / 256)]: offset, then absmax2
  const float* mean;    // [num_blocks], or null
  int shift;
};

inline int log2_floor(int64_t v) {
  int shift = 0;
  while (v >> (shift + 1)) ++shift;
  return shift;
}

inline Scales make_scales(const PackedWeight& w) {
  return {.code = w.absmax_code,
          .absmax = w.absmax,
          .nested = w.nested,
          .mean = w.mean,
          .shift = w.num_blocks <= 1 ? 63 : log2_floor(w.blocksize)};
}

// The scale of one block as loaded, before the look-up of its code.
struct LoadedScale {
  int code;          // -1: `multiplier` is the scale
  float multiplier;  // absmax2 of its group of 256 codes
  float offset;
};
__device__ __forceinline__ LoadedScale load_scale(const Scales& scales, int64_t block) {
  if (scales.code == nullptr) return {-1, __ldg(scales.absmax + block), 0.0f};
  return {__ldg(scales.code + block), __ldg(scales.nested + 1 + (block >> 8)),
          __ldg(scales.nested)};
}
// `map` is the dynamic map, in global or shared memory.
__device__ __forceinline__ float decode_scale(const LoadedScale& scale, const float* map) {
  if (scale.code < 0) return scale.multiplier;
  return __fadd_rn(__fmul_rn(map[scale.code], scale.multiplier), scale.offset);
}
__device__ __forceinline__ float decode_scale(const Scales& scales, int64_t block,
                                              const float* map) {
  return decode_scale(load_scale(scales, block), map);
}

// The 4-bit code of flat element i: the high nibble holds the even element.
__device__ __forceinline__ int code_at(const uint8_t* packed, int64_t i) {
  const int byte = __ldg(packed + (i >> 1));
  return (i & 1) ? byte & 15 : byte >> 4;
}

// One weight, any shape and block size: value * scale, then + mean. `values` is the codebook.
__device__ __forceinline__ float decode_weight(const uint8_t* packed, const Scales& scales,
                                               const float* values, int64_t i) {
  const int64_t block = i >> scales.shift;
  const float v =
      __fmul_rn(values[code_at(packed, i)], decode_scale(scales, block, kDeviceDynamicMap));
  return scales.mean == nullptr ? v : __fadd_rn(v, __ldg(scales.mean + block));
}

// The flat elements that a dequantizer reads, in order: from `first` on, `width` of every
// `width + gap`.
struct ColumnRange {
  int64_t first;
  int64_t count;  // of elements to read
  int64_t width;
  int64_t gap;  // 0: whole rows

  __device__ __forceinline__ int64_t source(int64_t i) const {
    return first + i + (gap == 0 ? 0 : i / width * gap);
  }
};

// 1 / scale as the quantizer uses it. If it is not `usable`, all values get the code of zero.
struct Reciprocal {
  float value;
  bool usable;
};
__device__ __forceinline__ Reciprocal reciprocal(float scale) {
  const float inverse = __frcp_rn(scale);
  return {inverse, scale != 0.0f && fabsf(inverse) <= 3.402823466e38f};
}

inline int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Grids have at most 2^31 - 1 blocks along x; kernels with more work than that loop over it.
inline unsigned grid_blocks(int64_t blocks, int64_t limit = 2147483647) {
  return static_cast<unsigned>(blocks < limit ? blocks : limit);
}

// For launchers that run several kernels: returns the launch's error if it failed.
#define QLORA_EXT_TRY(launch_call)                       \
  do {                                                   \
    if (const char* error = (launch_call)) return error; \
  } while (false)

}  // namespace qlora_ext
