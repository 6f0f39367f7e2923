// gemm_4bit on CUDA: which kernel, and how it is launched.
#include "cuda/gemm_4bit_any.cuh"

namespace qlora_ext::launch {

namespace {

int64_t workspace_any(const Gemm4bitParams& p) {
  return any_product_workspace(p.M, p.weight.N, p.weight.K);
}

const char* gemm_any(const Gemm4bitParams& p, void* stream) {
  AnyProduct product{};
  product.weight = p.weight;
  product.scales = make_scales(p.weight);
  product.x = {p.x, p.x_stride, 1, p.M, p.dtype};
  product.lora_a = {p.lora_S, p.S_stride, 1, p.M, DType::kFloat32};
  product.lora_b = {p.lora_B, p.R, 1, p.weight.N, p.lora_dtype};
  product.R = p.R;
  product.cols = p.weight.N;
  product.depth = p.weight.K;
  product.bias = p.bias;
  product.bias_dtype = p.bias_dtype;
  product.out = p.y;
  product.out_dtype = p.dtype;
  return launch_any_product<gemm_4bit_any>(product, p.workspace, stream);
}

}  // namespace

int64_t workspace_gemm_4bit(const Gemm4bitParams& p) {
  if (p.M <= 0 || p.weight.N <= 0) return 0;
  return workspace_any(p);
}

int64_t chunk_rows_gemm_4bit(const Gemm4bitParams&) { return 0; }

const char* gemm_4bit(const Gemm4bitParams& p, void* stream) {
  if (p.M <= 0 || p.weight.N <= 0) return nullptr;
  return gemm_any(p, stream);
}

}  // namespace qlora_ext::launch
