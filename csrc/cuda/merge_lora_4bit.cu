// merge_lora_4bit on CUDA.
#include "cuda/merge_lora_4bit_tile.cuh"

namespace qlora_ext::launch {

const char* merge_lora_4bit(const MergeLora4bitParams& p, void* stream) {
  if (p.weight.N <= 0 || p.weight.K <= 0) return nullptr;
  return launch_kernel<merge_lora_4bit_tile>(tile_grid(p.weight.N, p.weight.K), kTileThreads,
                                             sizeof(TileSmem), stream, p, make_scales(p.weight));
}

}  // namespace qlora_ext::launch
