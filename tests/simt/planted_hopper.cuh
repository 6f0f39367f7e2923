// The planted bugs of Hopper's instructions, for planted.cu: one small product in the shape of a
// warp-specialized kernel, y[m, n] = sum over k of x[m, k] w[n, k], and what can be wrong in it.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/wgmma.cuh"

#include <cstdint>
#include <cstring>
#include <vector>

namespace qlora_ext::hopper {

constexpr int kTokens = 64, kRows = 64, kK = 64, kSteps = 4, kStages = 2;
constexpr int kColumns = kK * kSteps;
constexpr int kConsumers = 128, kBlock = 384;  // one thread of the second warpgroup fetches

enum class Bug {
  kNone,
  kMbarrierInitNotFenced,
  kTooManyBytesExpected,
  kTooFewBytesExpected,
  kStageReused,
  kWrongSwizzle,
  kWrongStride,
  kNoFirstFence,
  kNoFence,
  kAWrittenAfterFence,
  kAWrittenInFlight,
  kAccumulatorWrittenInFlight,
  kAccumulatorReadInFlight,
  kNotWaited,
  kWarpMissing,
  kStagingNotFenced,
  kStagingReused,
  kStoreNotRead,
  kRegisters,
  kRegistersOfThreeWarps,
  kArrivedTwice,
  kOneThreadWaits,
};

struct Params {
  const uint16_t* w;  // [kRows, kColumns]
};

struct Smem {
  alignas(1024) uint16_t x[kStages][kTokens * kK];
  alignas(1024) uint16_t staging[kTokens * kRows / 2];
  alignas(8) uint64_t full[kStages], empty[kStages];
};

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

template <Bug bug>
__global__ void __launch_bounds__(kBlock)
    product(const __grid_constant__ ptx::TensorMap x_map,
            const __grid_constant__ ptx::TensorMap y_map, Params p) {
  Smem& smem = ptx::shared_memory<Smem>();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&smem.full[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&smem.empty[i]), 1);
    }
    if (bug != Bug::kMbarrierInitNotFenced) ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (tid >= kConsumers) {
    if (bug != Bug::kRegistersOfThreeWarps || warp != 5) {
      ptx::setmaxnreg_decrease<bug == Bug::kRegisters ? 160 : 40>();
    }
    if (tid > kConsumers) return;
    for (int step = 0; step < kSteps; ++step) {
      const int slot = step % kStages;
      const uint32_t full = ptx::shared_address(&smem.full[slot]);
      ptx::mbarrier_wait(ptx::shared_address(&smem.empty[slot]), 1 ^ (step / kStages & 1));
      ptx::mbarrier_arrive_expect(full, bug == Bug::kTooManyBytesExpected  ? 16384
                                        : bug == Bug::kTooFewBytesExpected ? 4096
                                                                           : 8192);
      ptx::tensor_load(ptx::shared_address(smem.x[slot]), x_map, step * kK, 0, full);
    }
    return;
  }

  ptx::setmaxnreg_increase<232>();
  const int row = warp * 16 + lane / 4;
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p.w) + row * kColumns / 2 + lane % 4;
  float d[32];
  uint32_t a[2][4][4];
  const auto fetch = [&](uint32_t (&to)[4][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        to[i][r] = w[(step * 4 + i) * 8 + r / 2 * 4 + r % 2 * 8 * kColumns / 2];
      }
    }
  };
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.0f;
  fetch(a[0], 0);
  float early = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int slot = step % kStages;
    uint32_t (&now)[4][4] = a[step % 2];
    if (bug != Bug::kOneThreadWaits || tid == 0) {
      ptx::mbarrier_wait(ptx::shared_address(&smem.full[slot]), step / kStages & 1);
    }
    const uint64_t b =
        wgmma_descriptor(ptx::shared_address(smem.x[slot]), bug == Bug::kWrongStride ? 512 : 1024,
                         bug == Bug::kWrongSwizzle ? Swizzle::k64 : Swizzle::k128);
    ptx::wgmma_pin(d);
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma_pin(now[i]);
    if (bug != Bug::kNoFirstFence && (bug != Bug::kNoFence || step == 0)) ptx::wgmma_fence();
    if (bug == Bug::kAWrittenAfterFence && step == 2) now[1][2] = w[5];
    if (bug == Bug::kWarpMissing && warp == 2) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma_k16<__nv_bfloat16>(d, now[i], b + 2 * i);
    ptx::wgmma_commit();
    if (step + 1 < kSteps) fetch(a[bug == Bug::kAWrittenInFlight ? step % 2 : ~step & 1], step + 1);
    if (bug == Bug::kAccumulatorWrittenInFlight) d[3] += 1.0f;
    if (bug == Bug::kAccumulatorReadInFlight) early += d[5];
    const bool release = lane == 0 && warp == 0;
    if (bug == Bug::kStageReused && release) {
      ptx::mbarrier_arrive(ptx::shared_address(&smem.empty[slot]));
    }
    if (bug == Bug::kNotWaited && step + 1 == kSteps) return;
    ptx::wgmma_wait<0>(d);
    if (bug != Bug::kStageReused && release) {
      ptx::mbarrier_arrive(ptx::shared_address(&smem.empty[slot]));
    }
  }
  d[0] += early;

  // y[m][n]: 32 tokens at a time through the staging area.
  const uint32_t staging = ptx::shared_address(smem.staging);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // two 8x8 tiles of tokens by two of rows
      const int c = part * 16 + j * 8;
      const uint32_t words[4] = {pack(d[c], d[c + 1]), pack(d[c + 2], d[c + 3]),
                                 pack(d[c + 4], d[c + 5]), pack(d[c + 6], d[c + 7])};
      const int m = j * 16 + lane / 16 * 8 + lane % 8, column = warp * 16 + lane / 8 % 2 * 8;
      ptx::stmatrix_x4_trans(staging + swizzled(m * 128 + column * 2, Swizzle::k128), words);
    }
    if (bug != Bug::kStagingNotFenced) ptx::fence_proxy_async();
    ptx::barrier_sync(1, kConsumers);
    if (tid == 0) {
      ptx::tensor_store(y_map, 0, part * 32, staging);
      ptx::bulk_commit();
      if (bug != Bug::kStagingReused && (bug != Bug::kStoreNotRead || part == 0)) {
        ptx::bulk_wait_read<0>();
      }
    }
    if (bug == Bug::kArrivedTwice) ptx::barrier_arrive(2, kConsumers + 32);
    if (bug == Bug::kArrivedTwice) ptx::barrier_arrive(2, kConsumers + 32);
    ptx::barrier_sync(1, kConsumers);
  }
  if (bug == Bug::kStagingReused && tid == 0) ptx::bulk_wait_read<0>();
}

// B stored by the threads themselves, and packed by cp.async: the writer's fence, and the arrival
// that waits for copies.
template <bool fenced, bool waits>
__global__ void __launch_bounds__(kBlock) stored(Params p, const uint16_t* x, float* y) {
  Smem& smem = ptx::shared_memory<Smem>();
  const int tid = threadIdx.x;
  const uint32_t full = ptx::shared_address(&smem.full[0]);
  if (tid == 0) {
    ptx::mbarrier_init(full, kConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (tid >= 2 * kConsumers) return;
  if (tid >= kConsumers) {  // [kTokens, 16] of x, in rows of 32 bytes
    const int m = (tid - kConsumers) / 2, half = tid % 2;
    ptx::cp_async_16(ptx::shared_address(smem.staging) + m * 32 + half * 16,
                     x + m * kColumns + half * 8);
    if (waits) {
      ptx::cp_async_mbarrier_arrive(full);
    } else {
      ptx::mbarrier_arrive(full);
    }
    ptx::cp_async_commit();
    return;
  }
  ptx::mbarrier_wait(full, 0);
  const uint32_t m = tid / 2, half = tid % 2;
  const uint4 chunk = *reinterpret_cast<const uint4*>(smem.staging + m * 16 + half * 8);
  *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(smem.x[0]) +
                            swizzled(m * 32 + half * 16, Swizzle::k32)) = chunk;
  if (fenced) ptx::fence_proxy_async();
  ptx::barrier_sync(1, kConsumers);
  const int lane = tid % 32, row = tid / 32 * 16 + lane / 4;
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p.w) + row * kColumns / 2 + lane % 4;
  uint32_t a[4] = {w[0], w[8 * kColumns / 2], w[4], w[8 * kColumns / 2 + 4]};
  float d[32];
  ptx::wgmma_pin(a);
  ptx::wgmma_fence();
  ptx::wgmma_k16<__nv_bfloat16>(
      d, a, wgmma_descriptor(ptx::shared_address(smem.x[0]), 256, Swizzle::k32), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int e = 0; e < 32; ++e) {
    y[(e / 4 * 8 + lane % 4 * 2 + e % 2) * kRows + row + e / 2 % 2 * 8] = d[e];
  }
}

struct Data {
  alignas(16) uint16_t x[kTokens * kColumns];
  alignas(16) uint16_t w[kRows * kColumns];
  alignas(16) float y[kTokens * kRows];  // `product` writes 16 bits
};

// Runs `launch(data)` and folds y into 64 words.
template <class F>
const char* with_data(uint32_t* out, F&& launch) {
  static Data data;
  const char* poison = std::getenv("SIMT_POISON");
  std::memset(data.y, poison ? std::atoi(poison) : 0, sizeof data.y);
  const auto bf16 = [](int value) {
    const float f = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  for (int i = 0; i < kTokens * kColumns; ++i) data.x[i] = bf16(i * 7 % 11 - 5 + i / 256 % 3);
  for (int i = 0; i < kRows * kColumns; ++i) data.w[i] = bf16(i * 5 % 13 - 6 + i / 256 % 2);
  const char* error = launch(data);
  for (int i = 0; i < 64; ++i) out[i] = 0;
  for (int i = 0; i < kTokens * kRows; ++i) {
    uint32_t word;
    std::memcpy(&word, &data.y[i], 4);
    out[i % 64] = out[i % 64] * 31 + word;
  }
  return error;
}

template <Bug bug>
const char* run_product(uint32_t* out) {
  return with_data(out, [](Data& data) -> const char* {
    ptx::TensorMap x_map, y_map;
    const TensorElement bf16 = TensorElement::kBf16;
    std::memset(data.y + kTokens * kRows / 2, 0, sizeof data.y / 2);
    if (const char* error = encode_tensor_map(x_map, {data.x,
                                                      bf16,
                                                      2,
                                                      {kColumns, kTokens, 1},
                                                      {2 * kColumns, 0},
                                                      {kK, kTokens, 1},
                                                      Swizzle::k128})) {
      return error;
    }
    if (const char* error = encode_tensor_map(y_map, {data.y,
                                                      bf16,
                                                      2,
                                                      {kRows, kTokens, 1},
                                                      {2 * kRows, 0},
                                                      {kRows, 32, 1},
                                                      Swizzle::k128})) {
      return error;
    }
    return launch_kernel<product<bug>>(1, kBlock, sizeof(Smem), nullptr, x_map, y_map,
                                       Params{data.w});
  });
}

template <bool fenced, bool waits>
const char* run_stored(uint32_t* out) {
  return with_data(out, [](Data& data) {
    const uint16_t* const x = data.x;
    float* const y = data.y;
    return launch_kernel<stored<fenced, waits>>(1, kBlock, sizeof(Smem), nullptr, Params{data.w}, x,
                                                y);
  });
}

}  // namespace qlora_ext::hopper
