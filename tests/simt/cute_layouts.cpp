// What CuTe's layout algebra says of wgmma's operands, for test_simt_hopper.py: NVIDIA's headers on
// the host, and nothing of ours. Each line is a name and numbers.
#include <cute/tensor.hpp>

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include <cstdio>

using namespace cute;
using Element = cutlass::bfloat16_t;

// The byte offset of each 16-byte chunk, row by row, and the descriptor's stride in bytes.
template <int n, class Atom>
void tile(int span) {
  const auto swizzled = tile_to_shape(Atom{}, Shape<Int<n>, Int<size<1>(Atom{})>>{});
  const auto bytes = as_position_independent_swizzle_layout(swizzled);
  std::printf("tile%dx%d", span, n);
  for (int row = 0; row < n; ++row) {
    for (int k = 0; k < span / 2; k += 8) std::printf(" %d", int(bytes(row, k)) * 2);
  }
  const auto chunks = recast_layout<Element, uint128_t>(swizzled.layout_b());
  const auto canonical = logical_divide(chunks, Tile<Layout<_8, _1>, Layout<_2, _1>>{});
  std::printf("\nstride%dx%d %d\n", span, n, int(stride<0, 1>(canonical)) * 16);
}

template <class Layout>
void registers(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int thread = 0; thread < 128; ++thread) {
    for (int value = 0; value < size<1>(layout); ++value)
      std::printf(" %d", int(layout(thread, value)));
  }
  std::printf("\n");
}

// The fields as CuTe names them: start 0x1400, an ignored leading offset of 16 bytes.
void descriptor(int span, GMMA::LayoutType type) {
  GmmaDescriptor d;
  d.desc_ = 0;
  d.bitfield.start_address_ = 0x1400 >> 4;
  d.bitfield.leading_byte_offset_ = 1;
  d.bitfield.stride_byte_offset_ = 8 * span >> 4;
  d.bitfield.base_offset_ = 0;
  d.bitfield.layout_type_ = static_cast<uint8_t>(type);
  std::printf("descriptor%d %u %u\n", span, d.reg32_[0], d.reg32_[1]);
}

int main() {
  tile<256, GMMA::Layout_K_SW128_Atom<Element>>(128);
  tile<128, GMMA::Layout_K_SW128_Atom<Element>>(128);
  tile<256, GMMA::Layout_K_SW64_Atom<Element>>(64);
  tile<128, GMMA::Layout_K_SW64_Atom<Element>>(64);
  tile<256, GMMA::Layout_K_SW32_Atom<Element>>(32);
  tile<128, GMMA::Layout_K_SW32_Atom<Element>>(32);
  registers("A", GMMA::ALayout_64x16{});
  registers("D256", GMMA::CLayout_64xN<256>{});
  registers("D128", GMMA::CLayout_64xN<128>{});
  registers("D64", GMMA::CLayout_64xN<64>{});
  descriptor(128, GMMA::LayoutType::B128);
  descriptor(64, GMMA::LayoutType::B64);
  descriptor(32, GMMA::LayoutType::B32);
}
