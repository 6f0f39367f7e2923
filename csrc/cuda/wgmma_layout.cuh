// Where the operands of wgmma lie in shared memory: arithmetic alone, for device and host.
//
// A tile of B is [N, k] with k contiguous (K-major). With a swizzle of 128, 64 or 32 bytes a row of
// the tile has that many bytes (64, 32 or 16 elements of 16 bits), and the rows follow each other.
// Eight rows are a group; `stride` is from one group to the next. The swizzle permutes the 16-byte
// chunks of a row, by the address of the byte in shared memory. TMA does the same, so a tile that a
// tensor map with this swizzle brings needs nothing more. Tiles start at multiples of 8 rows (1024,
// 512 or 256 bytes). The next 16 elements of k are 32 bytes further on: add 2 to a descriptor.
//
// tests/simt/test_simt_cute.py holds this against CuTe's layouts.
#pragma once

#include "cuda/ptx.cuh"

namespace qlora_ext {

// Bytes of a row.
enum class Swizzle { kNone = 16, k32 = 32, k64 = 64, k128 = 128 };

// Where the byte at `offset` of a tile is that starts at a multiple of eight rows.
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  const auto chunks = static_cast<uint32_t>(swizzle) / 16;
  return offset ^ ((offset >> 7 & (chunks - 1)) << 4);
}

// The descriptor of B's 16 columns from the shared address on. `stride` is in bytes. Without a
// swizzle a row is one chunk, and the second chunk of k is `leading` bytes behind the first.
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t stride,
                                                        Swizzle swizzle = Swizzle::k128,
                                                        uint32_t leading = 16) {
  const uint64_t layout = swizzle == Swizzle::k128  ? 1
                          : swizzle == Swizzle::k64 ? 2
                          : swizzle == Swizzle::k32 ? 3
                                                    : 0;
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{(leading & 0x3ffff) >> 4} << 16 |
         uint64_t{(stride & 0x3ffff) >> 4} << 32 | layout << 62;
}

}  // namespace qlora_ext
