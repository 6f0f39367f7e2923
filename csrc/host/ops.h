// The ops as host functions, one per schema in schemas.h. Each serves every device: it checks its
// arguments, allocates from torch, fills the params and calls the backend's launcher. Every backend
// library compiles these files and links them with its own launchers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace qlora_ext::host {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalFloats = std::optional<std::vector<double>>;
using Ints = std::vector<int64_t>;

std::tuple<Tensor, Tensor, Tensor> quantize_4bit(const Tensor& weight, int64_t blocksize,
                                                 const std::string& quant_type,
                                                 const OptionalFloats& codebook,
                                                 const std::string& normalization,
                                                 double std_factor, const std::string& companding,
                                                 double companding_k);

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax);
Tensor dequantize_absmax(const Tensor& code, const Tensor& nested);

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
                       const OptionalTensor& mean, const Ints& shape, int64_t blocksize,
                       const std::string& quant_type, const OptionalFloats& codebook,
                       ScalarType dtype);
void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
                         const OptionalTensor& mean, const Ints& shape, int64_t blocksize,
                         const std::string& quant_type, const OptionalFloats& codebook,
                         const Tensor& out);

Tensor gemm_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                 const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                 int64_t blocksize, const std::string& quant_type, const OptionalFloats& codebook,
                 const OptionalTensor& bias, const OptionalTensor& lora_S,
                 const OptionalTensor& lora_B);
Tensor gemm_4bit_backward(const Tensor& dY, const Tensor& packed, const Tensor& absmax,
                          const OptionalTensor& nested, const OptionalTensor& mean,
                          const Ints& shape, int64_t blocksize, const std::string& quant_type,
                          const OptionalFloats& codebook, const OptionalTensor& lora_dS,
                          const OptionalTensor& lora_A);

Tensor lora_shrink(const Tensor& x, const Tensor& lora_A, double scaling);
std::tuple<Tensor, Tensor> lora_shrink_backward(const Tensor& dS, const Tensor& x,
                                                const Tensor& lora_A, double scaling, bool need_dx);
std::tuple<Tensor, Tensor> lora_expand_backward(const Tensor& dY, const Tensor& lora_S,
                                                const Tensor& lora_B);

std::tuple<Tensor, Tensor> lora_gemm_4bit(const Tensor& x, const Tensor& packed,
                                          const Tensor& absmax, const OptionalTensor& nested,
                                          const OptionalTensor& mean, const Ints& shape,
                                          int64_t blocksize, const std::string& quant_type,
                                          const OptionalFloats& codebook, const Tensor& lora_A,
                                          const Tensor& lora_B, double scaling,
                                          const OptionalTensor& bias, const OptionalTensor& lora_S);
std::tuple<Tensor, Tensor, Tensor> lora_gemm_4bit_backward(
    const Tensor& dY, const Tensor& x, const Tensor& lora_S, const Tensor& packed,
    const Tensor& absmax, const OptionalTensor& nested, const OptionalTensor& mean,
    const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    bool need_dx);

Tensor merge_lora_4bit(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
                       const OptionalTensor& mean, const Ints& shape, int64_t blocksize,
                       const std::string& quant_type, const OptionalFloats& codebook,
                       const Tensor& lora_A, const Tensor& lora_B, double scaling,
                       ScalarType dtype);
Tensor embedding_4bit(const Tensor& indices, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                      int64_t blocksize, const std::string& quant_type,
                      const OptionalFloats& codebook, ScalarType dtype);

// Mixtures of experts.
Tensor grouped_gemm_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& nested, const OptionalTensor& mean,
                         const Ints& shape, int64_t blocksize, const std::string& quant_type,
                         const OptionalFloats& codebook, const Tensor& offsets,
                         const OptionalTensor& rows, const OptionalTensor& bias,
                         const OptionalTensor& lora_S, const OptionalTensor& lora_B);
Tensor grouped_gemm_4bit_backward(const Tensor& dY, const Tensor& packed, const Tensor& absmax,
                                  const OptionalTensor& nested, const OptionalTensor& mean,
                                  const Ints& shape, int64_t blocksize,
                                  const std::string& quant_type, const OptionalFloats& codebook,
                                  const Tensor& offsets, const OptionalTensor& lora_dS,
                                  const OptionalTensor& lora_A);
Tensor grouped_lora_shrink(const Tensor& x, const Tensor& lora_A, double scaling,
                           const Tensor& offsets, const OptionalTensor& rows);
std::tuple<Tensor, Tensor> grouped_lora_shrink_backward(const Tensor& dS, const Tensor& x,
                                                        const Tensor& lora_A, double scaling,
                                                        const Tensor& offsets,
                                                        const OptionalTensor& rows, bool need_dx);
std::tuple<Tensor, Tensor> grouped_lora_expand_backward(const Tensor& dY, const Tensor& lora_S,
                                                        const Tensor& lora_B,
                                                        const Tensor& offsets);
std::tuple<Tensor, Tensor> grouped_lora_gemm_4bit(
    const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested,
    const OptionalTensor& mean, const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const Tensor& offsets, const OptionalTensor& rows, const OptionalTensor& bias);
std::tuple<Tensor, Tensor, Tensor> grouped_lora_gemm_4bit_backward(
    const Tensor& dY, const Tensor& x, const Tensor& lora_S, const Tensor& packed,
    const Tensor& absmax, const OptionalTensor& nested, const OptionalTensor& mean,
    const Ints& shape, int64_t blocksize, const std::string& quant_type,
    const OptionalFloats& codebook, const Tensor& lora_A, const Tensor& lora_B, double scaling,
    const Tensor& offsets, const OptionalTensor& rows, bool need_dx);
Tensor sum_rows(const Tensor& values, const Tensor& order, const Tensor& ends);

// Binds every op to its host function; called once per backend library.
inline void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
  m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  m.impl("dequantize_4bit.out", TORCH_BOX(&dequantize_4bit_out));
  m.impl("gemm_4bit", TORCH_BOX(&gemm_4bit));
  m.impl("gemm_4bit_backward", TORCH_BOX(&gemm_4bit_backward));
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_shrink_backward", TORCH_BOX(&lora_shrink_backward));
  m.impl("lora_expand_backward", TORCH_BOX(&lora_expand_backward));
  m.impl("lora_gemm_4bit", TORCH_BOX(&lora_gemm_4bit));
  m.impl("lora_gemm_4bit_backward", TORCH_BOX(&lora_gemm_4bit_backward));
  m.impl("merge_lora_4bit", TORCH_BOX(&merge_lora_4bit));
  m.impl("embedding_4bit", TORCH_BOX(&embedding_4bit));
  m.impl("grouped_gemm_4bit", TORCH_BOX(&grouped_gemm_4bit));
  m.impl("grouped_gemm_4bit_backward", TORCH_BOX(&grouped_gemm_4bit_backward));
  m.impl("grouped_lora_shrink", TORCH_BOX(&grouped_lora_shrink));
  m.impl("grouped_lora_shrink_backward", TORCH_BOX(&grouped_lora_shrink_backward));
  m.impl("grouped_lora_expand_backward", TORCH_BOX(&grouped_lora_expand_backward));
  m.impl("grouped_lora_gemm_4bit", TORCH_BOX(&grouped_lora_gemm_4bit));
  m.impl("grouped_lora_gemm_4bit_backward", TORCH_BOX(&grouped_lora_gemm_4bit_backward));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}

}  // namespace qlora_ext::host
