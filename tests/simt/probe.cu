// Single instructions on values that a test supplies (test_simt_instructions.py, by ctypes).
#include "cuda/last_block.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "probe_hopper.cuh"

namespace qlora_ext {

struct MmaIo {
  const uint32_t* a;  // [32, 4], registers by lane; m16n8k8 uses [32, :2]
  const uint32_t* b;  // [32, 2]; m16n8k8 uses [32, :1]
  float* d;           // [32, 4], in and out
};

enum class Shape { kM16N8K16F16, kM16N8K16Bf16, kM16N8K8F16, kSm75K16 };

template <Shape shape>
__global__ void probe_mma(MmaIo io) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = io.a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = io.b[2 * lane + i];
  for (int i = 0; i < 4; ++i) d[i] = io.d[4 * lane + i];
  if constexpr (shape == Shape::kM16N8K16F16) ptx::mma_m16n8k16<__half>(d, a, b);
  if constexpr (shape == Shape::kM16N8K16Bf16) ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
  if constexpr (shape == Shape::kM16N8K8F16) ptx::mma_m16n8k8_f16(d, a[0], a[1], b[0]);
  if constexpr (shape == Shape::kSm75K16) ptx::mma_k16<Sm75, __half>(d, a, b);
  for (int i = 0; i < 4; ++i) io.d[4 * lane + i] = d[i];
}

struct LdmatrixIo {
  const uint16_t* elements;  // [2048]
  const uint32_t* rows;      // [32]: the byte offset that each lane gives
  uint32_t* d;               // [32, 4]
};
struct LdmatrixSmem {
  alignas(16) uint16_t elements[2048];
};

__global__ void probe_ldmatrix(LdmatrixIo io) {
  LdmatrixSmem& smem = ptx::shared_memory<LdmatrixSmem>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 2048; i += 32) smem.elements[i] = io.elements[i];
  __syncwarp();
  uint32_t d[4];
  ptx::ldmatrix_x4_trans(d, ptx::shared_address(smem.elements) + io.rows[lane]);
  for (int i = 0; i < 4; ++i) io.d[4 * lane + i] = d[i];
}

struct ShuffleIo {
  const uint32_t* in;  // [32]
  uint32_t* out;       // [32]
  int kind;            // 0 idx, 1 up, 2 down, 3 xor
  int argument;
  int width;
};
__global__ void probe_shuffle(ShuffleIo io) {
  const uint32_t v = io.in[threadIdx.x];
  uint32_t r = 0;
  if (io.kind == 0) r = __shfl_sync(0xffffffffu, v, io.argument, io.width);
  if (io.kind == 1) r = __shfl_up_sync(0xffffffffu, v, io.argument, io.width);
  if (io.kind == 2) r = __shfl_down_sync(0xffffffffu, v, io.argument, io.width);
  if (io.kind == 3) r = __shfl_xor_sync(0xffffffffu, v, io.argument, io.width);
  io.out[threadIdx.x] = r;
}

struct VoteIo {
  const uint32_t* in;  // [32]
  uint32_t* out;       // [8, 32]
};
__global__ void probe_vote(VoteIo io) {
  const unsigned lane = threadIdx.x;
  const uint32_t v = io.in[lane];
  const uint32_t mask = lane < 8 ? 0x000000ffu : 0xffffff00u;
  io.out[lane] = __ballot_sync(mask, v & 1);
  io.out[32 + lane] = __any_sync(mask, v & 2);
  io.out[64 + lane] = __all_sync(mask, v & 4);
  io.out[96 + lane] = __reduce_add_sync(mask, v);
  io.out[128 + lane] = __reduce_max_sync(mask, static_cast<int>(v));
  io.out[160 + lane] = __reduce_min_sync(mask, v);
  io.out[192 + lane] = __reduce_xor_sync(mask, v);
  io.out[224 + lane] = __reduce_or_sync(mask, v);
}

struct BitsIo {
  const uint32_t* in;  // [n, 3]
  uint32_t* out;       // [n, 9]
  int n;
};
__global__ void probe_bits(BitsIo io) {
  for (int i = threadIdx.x; i < io.n; i += 32) {
    const uint32_t a = io.in[3 * i], b = io.in[3 * i + 1], c = io.in[3 * i + 2];
    uint32_t* out = io.out + 9 * i;
    out[0] = ptx::prmt(a, b, c);
    out[1] = __byte_perm(a, b, c);
    out[2] = __funnelshift_l(a, b, c);
    out[3] = __funnelshift_r(a, b, c);
    out[4] = __brev(a);
    out[5] = static_cast<uint32_t>(__clz(static_cast<int>(a)));
    out[6] = static_cast<uint32_t>(__popc(a));
    out[7] = static_cast<uint32_t>(
        __dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c)));
    out[8] = __umulhi(a, b);
  }
}

struct HalfIo {
  const uint16_t* in;  // [n, 3]
  uint16_t* f16;       // [n]: fma
  uint16_t* bf16;      // [n]
  int n;
};
__global__ void probe_half_fma(HalfIo io) {
  for (int i = threadIdx.x; i < io.n; i += 32) {
    const uint16_t* v = io.in + 3 * i;
    io.f16[i] = __half_as_ushort(
        __hfma(__ushort_as_half(v[0]), __ushort_as_half(v[1]), __ushort_as_half(v[2])));
    io.bf16[i] = __bfloat16_as_ushort(
        __hfma(__ushort_as_bfloat16(v[0]), __ushort_as_bfloat16(v[1]), __ushort_as_bfloat16(v[2])));
  }
}

struct CopiesIo {
  const unsigned char* in;  // [1024], 16-byte aligned
  unsigned char* out;       // [8, 1024]
  int valid;                // bytes of each copy that may be short
};
struct CopiesSmem {
  unsigned char bytes[3][1024];
  alignas(8) uint64_t mbarrier;
};

// Every way from global to shared memory and to registers, by 64 threads: each copies 16 bytes.
__global__ void probe_copies(CopiesIo io) {
  CopiesSmem& smem = ptx::shared_memory<CopiesSmem>();
  const unsigned t = threadIdx.x;
  const uint32_t shared = ptx::shared_address(smem.bytes) + 16 * t;
  const unsigned char* in = io.in + 16 * t;
  ptx::cp_async_16_zfill(shared, in, io.valid);
  ptx::cp_async_commit();
  ptx::cp_async_16(shared + 1024, in);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 16; ++i) io.out[16 * t + i] = smem.bytes[0][16 * t + i];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) io.out[1024 + 16 * t + i] = smem.bytes[1][16 * t + i];
  const uint32_t full = ptx::shared_address(&smem.mbarrier);
  if (t == 0) {
    ptx::mbarrier_init(full, 2);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (t < 32 && ptx::elect_one()) {  // one thread brings the bytes, another only arrives
    ptx::mbarrier_arrive_expect(full, 1024);
    ptx::bulk_copy(ptx::shared_address(smem.bytes[2]), io.in, 1024, full);
  }
  if (t == 63) ptx::mbarrier_arrive(full);
  ptx::mbarrier_wait(full, 0);
  for (int i = 0; i < 16; ++i) io.out[2048 + 16 * t + i] = smem.bytes[2][16 * t + i];

  uint4* out = reinterpret_cast<uint4*>(io.out);
  out[192 + t] = ptx::load_streaming(reinterpret_cast<const uint4*>(in));
  uint2* pairs = reinterpret_cast<uint2*>(out + 256);
  for (int i = 0; i < 2; ++i)
    pairs[2 * t + i] = ptx::load_streaming(reinterpret_cast<const uint2*>(in) + i);
  uint32_t* words = reinterpret_cast<uint32_t*>(out + 320);
  for (int i = 0; i < 4; ++i)
    words[4 * t + i] = ptx::load_streaming(reinterpret_cast<const uint32_t*>(in) + i);

  uint4 loaded = make_uint4(t, 0, 0, 0);
  ptx::load_shared_if(loaded, shared + 1024, t % 3 == 0);
  out[448 + t] = loaded;

  // The first warp writes and goes on, the second waits for it.
  __syncthreads();
  if (t < 32) {
    for (int i = 0; i < 32; ++i) smem.bytes[0][32 * t + i] = static_cast<unsigned char>(t + i);
    ptx::barrier_arrive(1, 64);
  } else {
    ptx::barrier_sync(1, 64);
    for (int i = 0; i < 32; ++i)
      io.out[6144 + 32 * (t - 32) + i] = smem.bytes[0][32 * (t - 32) + i];
  }
}

struct LastBlockIo {
  unsigned long long* words;  // [tiles]
  const float* in;            // [parts, tiles * count]
  float* parts;               // the same; the kernel writes it
  float* out;                 // [tiles * count]
  unsigned long long* id;     // [1], of the launch
  int count;                  // elements of a tile
  int blocks;                 // of a tile, that the launch is to have
};
struct LastBlockSmem {
  float sums[64];
};
__global__ void probe_last_block(LastBlockIo io) {
  const Arrival arrival({.words = io.words, .id = *io.id});
  arrival.expect();
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * io.count;
  const int64_t numel = static_cast<int64_t>(gridDim.x) * io.count;
  for (int i = threadIdx.x; i < io.count; i += 64) {
    io.parts[blockIdx.z * numel + tile + i] = io.in[blockIdx.z * numel + tile + i];
  }
  if (!arrival.is_last(io.blocks)) return;
  add_parts<64>(
      io.parts, io.blocks, numel, io.count, ptx::shared_memory<LastBlockSmem>().sums,
      [&](int i) { return tile + i; }, [&](int, int64_t at, float sum) { io.out[at] = sum; });
}

struct BoundsIo {
  uint32_t* out;  // [64]
};
__global__ void __launch_bounds__(32) probe_bounds(BoundsIo io) { io.out[threadIdx.x] = 1; }

}  // namespace qlora_ext

using namespace qlora_ext;
#define PROBE extern "C" __attribute__((visibility("default"))) const char*

PROBE probe_mma_run(int shape, MmaIo* io) {
  if (shape == 0) return launch_kernel<probe_mma<Shape::kM16N8K16F16>>(1, 32, 0, nullptr, *io);
  if (shape == 1) return launch_kernel<probe_mma<Shape::kM16N8K16Bf16>>(1, 32, 0, nullptr, *io);
  if (shape == 2) return launch_kernel<probe_mma<Shape::kM16N8K8F16>>(1, 32, 0, nullptr, *io);
  return launch_kernel<probe_mma<Shape::kSm75K16>>(1, 32, 0, nullptr, *io);
}
PROBE probe_ldmatrix_run(LdmatrixIo* io) {
  return launch_kernel<probe_ldmatrix>(1, 32, sizeof(LdmatrixSmem), nullptr, *io);
}
PROBE probe_last_block_run(int tiles, int blocks, LastBlockIo* io) {
  return launch_kernel<probe_last_block>(dim3(tiles, 1, blocks), 64, sizeof(LastBlockSmem), nullptr,
                                         *io);
}
extern "C" __attribute__((visibility("default"))) unsigned long long probe_launch_id() {
  return launch_id();
}
PROBE probe_shuffle_run(ShuffleIo* io) {
  return launch_kernel<probe_shuffle>(1, 32, 0, nullptr, *io);
}
PROBE probe_vote_run(VoteIo* io) { return launch_kernel<probe_vote>(1, 32, 0, nullptr, *io); }
PROBE probe_bits_run(BitsIo* io) { return launch_kernel<probe_bits>(1, 32, 0, nullptr, *io); }
PROBE probe_half_fma_run(HalfIo* io) {
  return launch_kernel<probe_half_fma>(1, 32, 0, nullptr, *io);
}
PROBE probe_bounds_run(int threads, BoundsIo* io) {
  return launch_kernel<probe_bounds>(1, threads, 0, nullptr, *io);
}
PROBE probe_copies_run(CopiesIo* io) {
  return launch_kernel<probe_copies>(1, 64, sizeof(CopiesSmem), nullptr, *io);
}

template <int n>
const char* run_wgmma(int bf16, const WgmmaIo& io) {
  if (bf16) {
    return launch_kernel<probe_wgmma<__nv_bfloat16, n>>(1, 128, sizeof(ImageSmem), nullptr, io);
  }
  return launch_kernel<probe_wgmma<__half, n>>(1, 128, sizeof(ImageSmem), nullptr, io);
}
PROBE probe_wgmma_run(int n, int bf16, WgmmaIo* io) {
  if (n == 64) return run_wgmma<32>(bf16, *io);
  if (n == 128) return run_wgmma<64>(bf16, *io);
  return run_wgmma<128>(bf16, *io);
}
PROBE probe_wgmma_groups_run(WgmmaIo* io) {
  return launch_kernel<probe_wgmma_groups>(1, 128, sizeof(ImageSmem), nullptr, *io);
}
PROBE probe_stmatrix_run(StmatrixIo* io) {
  return launch_kernel<probe_stmatrix>(1, 32, sizeof(ImageSmem), nullptr, *io);
}
// `sizes`: size[3], stride[2], box[3] and the bytes of the swizzle; elements are of 16 bits.
// `coordinates` are as many as the kernel gives.
PROBE probe_tensor_run(TensorIo* io, void* base, const int64_t* sizes, int coordinates) {
  TensorSpec spec{base, TensorElement::kF16, io->rank, {}, {}, {}, Swizzle{}};
  for (int i = 0; i < 3; ++i) spec.size[i] = static_cast<uint64_t>(sizes[i]);
  for (int i = 0; i < 2; ++i) spec.stride[i] = static_cast<uint64_t>(sizes[3 + i]);
  for (int i = 0; i < 3; ++i) spec.box[i] = static_cast<uint32_t>(sizes[5 + i]);
  spec.swizzle = static_cast<Swizzle>(sizes[8]);
  ptx::TensorMap map;
  if (const char* error = encode_tensor_map(map, spec)) return error;
  io->rank = coordinates;
  return launch_kernel<probe_tensor>(1, 32, sizeof(ImageSmem), nullptr, map, *io);
}
PROBE probe_bulk_store_run(BulkIo* io) {
  return launch_kernel<probe_bulk_store>(1, 32, sizeof(ImageSmem), nullptr, *io);
}
