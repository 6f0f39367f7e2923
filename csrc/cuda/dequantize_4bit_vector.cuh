// dequantize_4bit_vector: rows of a packed weight, or columns of those rows, to fp32, fp16 or bf16,
// 16 bytes at a time.
//
// Moves   0.516 B/weight in (nested scales, block 64), 2 B out for 16-bit types.
// Floor   those bytes over memory bandwidth: 4096x14336 to bf16 is 49 us on H100, 34 us on H200.
//         5 weights per clock and SM at that rate, so ~25 instructions per weight are free.
// Layout  a chunk is 32 weights = one 16-byte load and never spans two blocks (blocks are multiples
//         of 32 elements from an aligned start). A lane loads one chunk; its quad then transposes
//         4x4 words, so that the quad's stores cover 64 contiguous bytes of a chunk.
// Shared  the codebook once per bank (2 KiB: look-ups without bank conflicts) and the scale map.
// Bits    value * scale, then + mean, each rounded to fp32, then rounded once to the output.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"

namespace qlora_ext {

constexpr int kDequantizeThreads = 256;
constexpr int kChunk = 32;  // weights of one 16-byte load

struct DequantizeSmem {
  float values[16][32];  // [code][bank]
  float map[256];        // the dynamic map
};

__device__ __forceinline__ void fill_dequantize_smem(DequantizeSmem& s, const PackedWeight& w) {
  static_assert(kDequantizeThreads == 256, "a thread fills one entry of the map");
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int entry = threadIdx.x + i * kDequantizeThreads;
    s.values[entry / 32][entry % 32] = w.values[entry / 32];
  }
  s.map[threadIdx.x] = kDeviceDynamicMap[threadIdx.x];
  __syncthreads();
}

// On lane i of each quad, words[j] becomes what lane j held in words[i].
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = bit == 1 ? 2 * pair : pair;
      const uint32_t received =
          __shfl_xor_sync(0xffffffffu, upper ? words[low] : words[low + bit], bit);
      (upper ? words[low] : words[low + bit]) = received;
    }
  }
}

// A chunk as loaded. Kernels load their first one before they fill shared memory.
struct LoadedChunk {
  uint4 packed;
  LoadedScale scale;
  float mean;
};

// Chunk `source` of the weight, or zeros.
template <bool kMean>
__device__ __forceinline__ LoadedChunk load_chunk(const uint8_t* packed, const Scales& scales,
                                                  int64_t source, bool exists) {
  LoadedChunk chunk{};
  if (exists) {
    chunk.packed = ptx::load_streaming(reinterpret_cast<const uint4*>(packed) + source);
    const int64_t block = source * kChunk >> scales.shift;
    chunk.scale = load_scale(scales, block);
    if constexpr (kMean) chunk.mean = __ldg(scales.mean + block);
  }
  return chunk;
}

// Decodes a loaded chunk into chunk `target` of the output. The whole warp calls it, with 32
// consecutive targets. Targets from num_targets on are skipped.
template <class T, bool kMean>
__device__ __forceinline__ void decode_chunk(const DequantizeSmem& s, const LoadedChunk& loaded,
                                             int64_t target, int64_t num_targets, T* out) {
  const int lane = threadIdx.x % 32;
  uint32_t words[4] = {loaded.packed.x, loaded.packed.y, loaded.packed.z, loaded.packed.w};
  const float scale = decode_scale(loaded.scale, s.map), mean = loaded.mean;
  transpose_in_quad(words, lane);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float chunk_scale = __shfl_sync(0xffffffffu, scale, j, 4);
    const float chunk_mean = kMean ? __shfl_sync(0xffffffffu, mean, j, 4) : 0.0f;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int code = (words[j] >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15;
      v[i] = __fmul_rn(s.values[code][lane], chunk_scale);
      if constexpr (kMean) v[i] = __fadd_rn(v[i], chunk_mean);
    }
    const int64_t chunk = target - lane % 4 + j;
    if (chunk < num_targets) store_eight(out + chunk * kChunk + lane % 4 * 8, v);
  }
}

// `range` starts at a multiple of 32. If it has a gap, its width and gap are multiples of 32 too.
// `out` is 16-byte aligned.
template <class T, bool kMean>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_4bit_vector(PackedWeight w, Scales scales, ColumnRange range, T* out) {
  DequantizeSmem& s = ptx::shared_memory<DequantizeSmem>();
  const int64_t num_chunks = range.count / kChunk;
  const ColumnRange chunks{.first = range.first / kChunk,
                           .count = num_chunks,
                           .width = range.width / kChunk,
                           .gap = range.gap / kChunk};
  const int64_t target = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  const LoadedChunk chunk =
      load_chunk<kMean>(w.packed, scales, chunks.source(target), target < num_chunks);
  fill_dequantize_smem(s, w);
  decode_chunk<T, kMean>(s, chunk, target, num_chunks, out);
  const int64_t tail = num_chunks * kChunk + threadIdx.x;
  if (blockIdx.x == 0 && tail < range.count) {  // only if there is no gap
    out[tail] = from_float<T>(decode_weight(w.packed, scales, w.values, range.source(tail)));
  }
}

}  // namespace qlora_ext
