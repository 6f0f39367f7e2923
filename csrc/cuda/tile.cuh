// An fp32 FFMA tile product over operands of any dtype, stride and shape: the body of every
// fallback kernel and of the small LoRA products.
//
// C[row, col] = sum over d of A(row, d) * B(col, d), a 64x64 tile of C per block of 256 threads
// (4x4 each), 16 steps of d at a time through shared memory, the next 16 prefetched in registers.
// Sums run over d in order, so results do not depend on the machine. Limited by FFMA: a step of
// 64x64x16 takes 256 FFMA and 32 16-byte shared loads per thread.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"

namespace qlora_ext {

constexpr int kTileThreads = 256;
constexpr int kTileSize = 64;   // rows and columns
constexpr int kTileDepth = 16;  // d per step

struct TileSmem {
  float a[kTileDepth][kTileSize + 4];  // [d][row], rows padded by one 16-byte access
  float b[kTileDepth][kTileSize + 4];  // [d][col]
};

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
}

// v[i] = data[first + i] for i < count, zero for the rest of the four.
__device__ __forceinline__ void load_four(const void* data, DType dtype, int64_t first, int count,
                                          float (&v)[4]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = i < count ? static_cast<const float*>(data)[first + i] : 0.0f;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned short bits =
        i < count ? static_cast<const unsigned short*>(data)[first + i] : 0;  // zero in both types
    v[i] = dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                    : __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
}

__device__ __forceinline__ void store_from_float(void* data, DType dtype, int64_t i, float v) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = v;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[i] = from_float<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(v);
  }
}

// A dense operand: element (row, d) at row * row_stride + d * depth_stride.
struct DenseOperand {
  const void* data;
  int64_t row_stride;
  int64_t depth_stride;
  int64_t rows;
  DType dtype;

  __device__ __forceinline__ bool depth_is_contiguous() const { return depth_stride == 1; }
  __device__ __forceinline__ float at(int64_t row, int64_t d) const {
    return load_as_float(data, dtype, row * row_stride + d * depth_stride);
  }
  // The same, `elements` further on.
  __device__ __forceinline__ DenseOperand from(int64_t elements) const {
    DenseOperand other = *this;
    other.data = static_cast<const char*>(data) + elements * (dtype == DType::kFloat32 ? 4 : 2);
    return other;
  }
};

// The rows of a matrix, `stride` elements apart, as an operand; or its columns.
inline DenseOperand operand_of_rows(const void* data, int64_t stride, int64_t rows, DType dtype) {
  return {.data = data, .row_stride = stride, .depth_stride = 1, .rows = rows, .dtype = dtype};
}
inline DenseOperand operand_of_columns(const void* data, int64_t stride, int64_t columns,
                                       DType dtype) {
  return {.data = data, .row_stride = 1, .depth_stride = stride, .rows = columns, .dtype = dtype};
}

// A packed weight W[n, k] as an operand: rows are n and d is k; if transposed, the other way round.
struct WeightOperand {
  const uint8_t* packed;
  const float* values;  // [16], the codebook
  Scales scales;
  int64_t K;
  int64_t rows;
  bool transposed;

  __device__ __forceinline__ bool depth_is_contiguous() const { return !transposed; }
  __device__ __forceinline__ float at(int64_t row, int64_t d) const {
    const int64_t i = transposed ? d * K + row : row * K + d;
    return decode_weight(packed, scales, values, i);
  }
};

// This thread's four of an operand's 64x16 elements, and where they lie in the tile.
template <class Operand>
struct TileSlice {
  float v[4];

  __device__ __forceinline__ static int row_of(bool depth_first, int i) {
    const int element = threadIdx.x + i * kTileThreads;
    return depth_first ? element / kTileDepth : element % kTileSize;
  }
  __device__ __forceinline__ static int depth_of(bool depth_first, int i) {
    const int element = threadIdx.x + i * kTileThreads;
    return depth_first ? element % kTileDepth : element / kTileSize;
  }

  // Zeros beyond the operand's rows and from depth_end on.
  __device__ __forceinline__ void load(const Operand& operand, int64_t row0, int64_t d0,
                                       int64_t depth_end) {
    const bool depth_first = operand.depth_is_contiguous();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + row_of(depth_first, i), d = d0 + depth_of(depth_first, i);
      v[i] = row < operand.rows && d < depth_end ? operand.at(row, d) : 0.0f;
    }
  }

  __device__ __forceinline__ void store(const Operand& operand,
                                        float (&tile)[kTileDepth][kTileSize + 4]) const {
    const bool depth_first = operand.depth_is_contiguous();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tile[depth_of(depth_first, i)][row_of(depth_first, i)] = v[i];
    }
  }
};

// Accumulators: acc[i][j] is C[row0 + 4 * (threadIdx.x / 16) + i, col0 + 4 * (threadIdx.x % 16) +
// j].
struct TileAccumulators {
  float v[4][4];
};

__device__ __forceinline__ void tile_clear(TileAccumulators& acc) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc.v[i][j] = 0.0f;
  }
}

// acc += A(row, d) * B(col, d) over d in [depth_begin, depth_end). The whole block calls it.
template <class A, class B>
__device__ __forceinline__ void tile_product(TileSmem& s, const A& a, const B& b, int64_t row0,
                                             int64_t col0, int64_t depth_begin, int64_t depth_end,
                                             TileAccumulators& acc) {
  const int row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
  TileSlice<A> next_a;
  TileSlice<B> next_b;
  next_a.load(a, row0, depth_begin, depth_end);
  next_b.load(b, col0, depth_begin, depth_end);
  for (int64_t d0 = depth_begin; d0 < depth_end; d0 += kTileDepth) {
    __syncthreads();  // all threads have read the previous step
    next_a.store(a, s.a);
    next_b.store(b, s.b);
    __syncthreads();
    next_a.load(a, row0, d0 + kTileDepth, depth_end);
    next_b.load(b, col0, d0 + kTileDepth, depth_end);
#pragma unroll
    for (int d = 0; d < kTileDepth; ++d) {
      const float4 left = *reinterpret_cast<const float4*>(&s.a[d][row]);
      const float4 right = *reinterpret_cast<const float4*>(&s.b[d][col]);
      const float rows[4] = {left.x, left.y, left.z, left.w};
      const float cols[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc.v[i][j] += rows[i] * cols[j];
      }
    }
  }
}

// Calls f(row, col, value) for each accumulator inside [rows, cols].
template <class F>
__device__ __forceinline__ void tile_for_each(const TileAccumulators& acc, int64_t row0,
                                              int64_t col0, int64_t rows, int64_t cols, F f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + threadIdx.x / 16 * 4 + i, col = col0 + threadIdx.x % 16 * 4 + j;
      if (row < rows && col < cols) f(row, col, acc.v[i][j]);
    }
  }
}

// Tiles of a [rows, cols] output: columns along x, rows along y (a block takes several if there are
// more than 65535), parts of the depth along z.
inline dim3 tile_grid(int64_t rows, int64_t cols, int64_t splits = 1) {
  return dim3(grid_blocks(ceil_div(cols, kTileSize)), grid_blocks(ceil_div(rows, kTileSize), 65535),
              static_cast<unsigned>(splits));
}

}  // namespace qlora_ext
