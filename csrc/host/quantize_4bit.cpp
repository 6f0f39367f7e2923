#include "common.h"

namespace qlora_ext::host {

namespace {

Normalization as_normalization(const char* op, const std::string& name) {
  if (name == "absmax") return Normalization::kAbsmax;
  if (name == "standard") return Normalization::kStandard;
  QLORA_CHECK(name == "none", op, "normalization is '", name,
              "', want 'absmax', 'standard' or 'none'");
  return Normalization::kNone;
}

// A one-element int64 tensor. It holds `none` until a kernel lowers it to the index of the first
// bad value.
struct BadIndex {
  Tensor flag;
  int64_t none;

  BadIndex(const char* op, int64_t none, const Tensor& like)
      : flag(empty(op, "a flag", {1}, ScalarType::Long, like)), none(none) {
    torch::stable::fill_(flag, static_cast<double>(none));
  }
  int64_t* data() const { return static_cast<int64_t*>(flag.data_ptr()); }
};

Ints unravel(int64_t flat, const Tensor& tensor) {
  Ints index(tensor.dim());
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    index[d] = flat % tensor.size(d);
    flat /= tensor.size(d);
  }
  return index;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_4bit(const Tensor& weight, int64_t blocksize,
                                                 const std::string& quant_type,
                                                 const OptionalFloats& codebook,
                                                 const std::string& normalization,
                                                 double std_factor, const std::string& companding,
                                                 double companding_k) {
  constexpr const char* op = "quantize_4bit";
  Quantize4bitParams p{};
  check_tensor(op, "weight", weight);
  p.dtype = float_dtype(op, "weight", weight.scalar_type());
  p.normalization = as_normalization(op, normalization);
  QLORA_CHECK(p.normalization != Normalization::kNone || blocksize == 0, op, "blocksize is ",
              blocksize, " with normalization 'none', want 0 (no scales to store)");
  QLORA_CHECK(std_factor > 0 && std_factor <= 1e6, op, "std_factor is ", std_factor,
              ", want a factor in (0, 1e6]");
  p.numel = weight.numel();
  p.blocksize = checked_blocksize(op, blocksize, p.numel);
  p.num_blocks = ceil_div(p.numel, p.blocksize);
  p.std_factor = static_cast<float>(std_factor);
  p.codebook = as_codebook(op, quant_type, codebook, companding, companding_k);

  const DeviceScope scope(weight);
  QLORA_CHECK(!scope.is_capturing(), op,
              "the current stream is being captured into a CUDA graph, want the weight quantized "
              "before the capture, because the check for NaN waits for the GPU");
  const Tensor source = contiguous(op, "weight", weight, dtype_size(p.dtype));
  const Tensor packed = empty(op, "packed", {(p.numel + 1) / 2}, ScalarType::Byte, weight);
  const Tensor absmax = empty(op, "absmax", {4 * p.num_blocks}, ScalarType::Byte, weight);
  const bool has_mean = p.normalization == Normalization::kStandard;
  const Tensor mean =
      empty(op, "mean", {has_mean ? 4 * p.num_blocks : 0}, ScalarType::Byte, weight);
  if (p.numel == 0) return {packed, absmax, mean};

  p.weight = source.data_ptr();
  p.packed = static_cast<uint8_t*>(packed.data_ptr());
  p.absmax = static_cast<float*>(absmax.data_ptr());
  p.mean = has_mean ? static_cast<float*>(mean.data_ptr()) : nullptr;
  const BadIndex bad(op, p.numel, weight);
  p.bad_index = bad.data();
  launch_with_workspace(op, launch::quantize_4bit, launch::workspace_quantize_4bit, p, weight,
                        scope);
  const int64_t first_bad = scope.read(bad.flag);
  QLORA_CHECK(first_bad >= p.numel, op, "weight has a NaN or an infinity at index ",
              list_string(unravel(first_bad, weight)), ", want finite values");
  return {packed, absmax, mean};
}

}  // namespace qlora_ext::host
