// Hopper's instructions on values that a test supplies, for probe.cu.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/wgmma.cuh"

namespace qlora_ext {

struct WgmmaIo {
  const unsigned char* image;          // what shared memory holds
  const uint32_t* a;                   // [128, 4], registers by thread
  float* d;                            // [128, n], in and out
  int bytes;                           // of the image, a multiple of 16
  int start, stride, leading, layout;  // of the descriptor
  int accumulate;
};

struct ImageSmem {
  alignas(1024) unsigned char image[65536];
  alignas(8) uint64_t mbarrier;
};

__device__ __forceinline__ uint64_t descriptor_of(const WgmmaIo& io, uint32_t image) {
  const Swizzle swizzles[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
  return wgmma_descriptor(image + io.start, io.stride, swizzles[io.layout], io.leading);
}

__device__ __forceinline__ void fill_image(ImageSmem& smem, const WgmmaIo& io) {
  for (int i = 16 * threadIdx.x; i < io.bytes; i += 16 * 128) {
    *reinterpret_cast<uint4*>(smem.image + i) = *reinterpret_cast<const uint4*>(io.image + i);
  }
  ptx::fence_proxy_async();
  __syncthreads();
}

template <class T, int n>
__global__ void __launch_bounds__(128, 1) probe_wgmma(WgmmaIo io) {
  ImageSmem& smem = ptx::shared_memory<ImageSmem>();
  const int t = threadIdx.x;
  fill_image(smem, io);
  uint32_t a[4];
  float d[n];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = io.a[4 * t + i];
#pragma unroll
  for (int i = 0; i < n; ++i) d[i] = io.d[n * t + i];
  ptx::wgmma_pin(d);
  ptx::wgmma_pin(a);
  ptx::wgmma_fence();
  ptx::wgmma_k16<T>(d, a, descriptor_of(io, ptx::shared_address(smem.image)), io.accumulate != 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < n; ++i) io.d[n * t + i] = d[i];
}

// Four steps of k, each a group of its own: up to two are in flight. `a` is [4, 128, 4] here.
__global__ void __launch_bounds__(128, 1) probe_wgmma_groups(WgmmaIo io) {
  ImageSmem& smem = ptx::shared_memory<ImageSmem>();
  const int t = threadIdx.x;
  fill_image(smem, io);
  uint32_t a[4][4];
  float d[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) d[i] = 0.0f;
  const uint64_t b = descriptor_of(io, ptx::shared_address(smem.image));
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[step][i] = io.a[512 * step + 4 * t + i];
    ptx::wgmma_pin(d);
    ptx::wgmma_pin(a[step]);
    ptx::wgmma_fence();
    ptx::wgmma_k16<__nv_bfloat16>(d, a[step], b + 2 * step);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(d);
  }
  ptx::wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < 128; ++i) io.d[128 * t + i] = d[i];
}

struct StmatrixIo {
  const uint32_t* d;     // [32, 4]
  const uint32_t* rows;  // [32]: the byte offset that each lane gives
  uint16_t* elements;    // [2048]
};

__global__ void probe_stmatrix(StmatrixIo io) {
  ImageSmem& smem = ptx::shared_memory<ImageSmem>();
  uint16_t* const elements = reinterpret_cast<uint16_t*>(smem.image);
  const int lane = threadIdx.x;
  for (int i = lane; i < 2048; i += 32) elements[i] = 0;
  __syncwarp();
  uint32_t d[4];
  for (int i = 0; i < 4; ++i) d[i] = io.d[4 * lane + i];
  ptx::stmatrix_x4_trans(ptx::shared_address(elements) + io.rows[lane], d);
  __syncwarp();
  for (int i = lane; i < 2048; i += 32) io.elements[i] = elements[i];
}

struct TensorIo {
  unsigned char* image;  // of the box in shared memory: out for a load, in for a store
  int bytes, store, rank;
  int at[3];
};

__global__ void probe_tensor(const __grid_constant__ ptx::TensorMap map, TensorIo io) {
  ImageSmem& smem = ptx::shared_memory<ImageSmem>();
  const uint32_t image = ptx::shared_address(smem.image);
  const uint32_t full = ptx::shared_address(&smem.mbarrier);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(map);
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (io.store != 0) {
    for (int i = threadIdx.x; i < io.bytes; i += 32) smem.image[i] = io.image[i];
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (io.rank == 2) ptx::tensor_store(map, io.at[0], io.at[1], image);
    if (io.rank == 3) ptx::tensor_store(map, io.at[0], io.at[1], io.at[2], image);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    return;
  }
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(full, io.bytes);
    if (io.rank == 2) ptx::tensor_load(image, map, io.at[0], io.at[1], full);
    if (io.rank == 3) ptx::tensor_load(image, map, io.at[0], io.at[1], io.at[2], full);
  }
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < io.bytes; i += 32) io.image[i] = smem.image[i];
}

struct BulkIo {
  const unsigned char* in;  // [1024], 16-byte aligned
  unsigned char* out;       // [1024]
};

// Copies of cp.async that an mbarrier waits for, and a store in bulk.
__global__ void probe_bulk_store(BulkIo io) {
  ImageSmem& smem = ptx::shared_memory<ImageSmem>();
  const uint32_t image = ptx::shared_address(smem.image);
  const uint32_t full = ptx::shared_address(&smem.mbarrier);
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) ptx::cp_async_16(image + 32 * t + 16 * i, io.in + 32 * t + 16 * i);
  ptx::cp_async_mbarrier_arrive(full);
  ptx::mbarrier_wait(full, 0);
  ptx::fence_proxy_async();
  __syncwarp();
  if (t != 0) return;
  ptx::bulk_store(io.out, image, 1024);
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

}  // namespace qlora_ext
