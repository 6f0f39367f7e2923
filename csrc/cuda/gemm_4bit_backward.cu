// gemm_4bit_backward on CUDA: which kernel, and how it is launched.
#include "cuda/gemm_4bit_any.cuh"

namespace qlora_ext::launch {

namespace {

int64_t workspace_any(const Gemm4bitBackwardParams& p) {
  return any_product_workspace(p.M, p.weight.K, p.weight.N);
}

const char* backward_any(const Gemm4bitBackwardParams& p, void* stream) {
  AnyProduct product{};
  product.weight = p.weight;
  product.scales = make_scales(p.weight);
  product.x = {p.dY, p.dY_stride, 1, p.M, p.dtype};
  product.lora_a = {p.lora_dS, p.R, 1, p.M, DType::kFloat32};
  product.lora_b = {p.lora_A, 1, p.weight.K, p.weight.K, p.lora_dtype};  // row k, depth r
  product.R = p.R;
  product.cols = p.weight.K;
  product.depth = p.weight.N;
  product.out = p.dX;
  product.out_dtype = p.dtype;
  return launch_any_product<gemm_4bit_backward_any<>>(product, p.workspace, stream);
}

}  // namespace

int64_t workspace_gemm_4bit_backward(const Gemm4bitBackwardParams& p) {
  if (p.M <= 0 || p.weight.K <= 0) return 0;
  return workspace_any(p);
}

int64_t chunk_rows_gemm_4bit_backward(const Gemm4bitBackwardParams&) { return 0; }

const char* gemm_4bit_backward(const Gemm4bitBackwardParams& p, void* stream) {
  if (p.M <= 0 || p.weight.K <= 0) return nullptr;
  return backward_any(p, stream);
}

}  // namespace qlora_ext::launch
