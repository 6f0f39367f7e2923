#include "common.h"

#include <cmath>
#include <limits>
#include <sstream>

// Torch has it since 2.13; null with an older torch.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace qlora_ext::host {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return "unknown to this build";
  }
}

DType float_dtype(const char* op, const char* arg, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: fail(op, arg, " has dtype ", dtype_name(dtype), ", want float32, float16 or bfloat16");
  }
}

namespace {

// 1 for dtypes that no op takes.
int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Long: return 8;
    default: return 1;
  }
}

// Runs `make`, which asks torch for memory. On failure torch's stable ABI gives an error code and,
// since 2.13, the reason. Without the reason the message can only give the sizes.
template <class Make>
Tensor allocated(const char* op, const char* what, const Ints& sizes, ScalarType dtype,
                 const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    double bytes = static_cast<double>(element_bytes(dtype));
    for (const int64_t size : sizes) bytes *= static_cast<double>(size);
    std::ostringstream amount;
    amount.precision(0);
    amount << std::fixed << bytes;
    const char* said = torch_exception_get_what_without_backtrace != nullptr
                           ? torch_exception_get_what_without_backtrace()
                           : nullptr;
    fail(op, "torch could not allocate ", amount.str(), " bytes for ", what, ", ",
         list_string(sizes), " in ", dtype_name(dtype),
         said != nullptr && *said != '\0' ? std::string(": ") + said : ", want more free memory");
  }
}

Ints sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Ints(sizes.begin(), sizes.end());
}

bool is_aligned(const Tensor& tensor, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % static_cast<uintptr_t>(alignment) == 0;
}

// Whether x can be viewed as rows of unit stride, with its leading dimensions folded into one. A
// slice of columns can.
bool folds_into_rows(const Tensor& x) {
  const int64_t dim = x.dim();
  if (dim < 2 || x.stride(dim - 1) != 1 || x.stride(dim - 2) < x.size(dim - 1)) return false;
  for (int64_t d = 0; d + 2 < dim; ++d) {
    if (x.stride(d) != x.stride(d + 1) * x.size(d + 1)) return false;
  }
  return true;
}

}  // namespace

Tensor empty(const char* op, const char* what, const Ints& sizes, ScalarType dtype,
             const Tensor& like) {
  // Calls the shim, because torch::stable::empty looks up its op by name on every call.
  std::array<int64_t, 8> strides;
  const auto dim = static_cast<int64_t>(sizes.size());
  if (dim > static_cast<int64_t>(strides.size())) {
    return allocated(op, what, sizes, dtype, [&] {
      return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
    });
  }
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type, device_index;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  return allocated(op, what, sizes, dtype, [&] {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dim, sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
        device_index, &handle));
    return Tensor(handle);
  });
}

Tensor empty(const char* op, const char* what, std::initializer_list<int64_t> sizes,
             ScalarType dtype, const Tensor& like) {
  return empty(op, what, Ints(sizes), dtype, like);
}

Tensor contiguous(const char* op, const char* arg, const Tensor& tensor, int64_t alignment) {
  if (tensor.is_contiguous() && is_aligned(tensor, alignment)) return tensor;
  const std::string what = std::string("a copy of ") + arg;
  return allocated(op, what.c_str(), sizes_of(tensor), tensor.scalar_type(), [&] {
    return tensor.is_contiguous() ? torch::stable::clone(tensor)
                                  : torch::stable::contiguous(tensor);
  });
}

float as_scaling(const char* op, double scaling) {
  const float value = static_cast<float>(scaling);
  QLORA_CHECK(std::isfinite(value), op, "scaling is ", scaling, ", want a finite float32");
  return value;
}

void check_tensor(const char* op, const char* arg, const Tensor& tensor) {
  QLORA_CHECK(tensor.defined(), op, arg, " is None, want a tensor");
  int64_t last = tensor.storage_offset();  // the tensor's last element in the storage
  if (tensor.is_contiguous()) {
    last += tensor.numel() - 1;
    if (tensor.numel() == 0) return;
  } else {
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  QLORA_CHECK(last < bytes / element_bytes(tensor.scalar_type()), op, arg, " has shape ",
              list_string(tensor.sizes()), " and a storage of only ", bytes,
              " bytes, want one that was not freed or made smaller");
}

void check_same_device(const char* op, const char* arg, const Tensor& tensor, const Tensor& like) {
  int32_t got_type, got_index, want_type, want_index;
  aoti_torch_get_device_type(tensor.get(), &got_type);
  aoti_torch_get_device_type(like.get(), &want_type);
  aoti_torch_get_device_index(tensor.get(), &got_index);
  aoti_torch_get_device_index(like.get(), &want_index);
  if (got_type == want_type && got_index == want_index) return;
  auto name = [](int32_t type, int32_t index) {
    const bool cuda = type == aoti_torch_device_type_cuda();
    std::string text = cuda                                   ? "cuda"
                       : type == aoti_torch_device_type_cpu() ? "cpu"
                                                              : "another device";
    return cuda ? text + ":" + std::to_string(index) : text;
  };
  fail(op, arg, " is on ", name(got_type, got_index), ", want ", name(want_type, want_index),
       " (every tensor of a call on one device)");
}

int64_t check_rows(const char* op, const char* arg, const Tensor& x) {
  check_tensor(op, arg, x);
  const int64_t dim = x.dim();
  QLORA_CHECK(dim >= 1, op, arg, " is a scalar, want at least one dimension");
  float_dtype(op, arg, x.scalar_type());
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dim; ++d) rows *= x.size(d);
  return rows;
}

Rows as_rows(const char* op, const char* arg, const Tensor& x) {
  const int64_t num_rows = check_rows(op, arg, x), dim = x.dim();
  Rows r{.tensor = x,
         .data = nullptr,
         .rows = num_rows,
         .cols = x.size(dim - 1),
         .stride = 0,
         .dtype = float_dtype(op, arg, x.scalar_type())};
  const bool in_place =
      (x.is_contiguous() || folds_into_rows(x)) && is_aligned(x, dtype_size(r.dtype));
  if (!in_place) r.tensor = contiguous(op, arg, x, dtype_size(r.dtype));
  r.stride = r.tensor.is_contiguous() ? r.cols : r.tensor.stride(dim - 2);
  r.data = r.tensor.data_ptr();
  return r;
}

Dense as_dense(const char* op, const char* arg, const Tensor& tensor,
               std::initializer_list<int64_t> want, const Tensor& device_of) {
  check_tensor(op, arg, tensor);
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == want.size();
  for (size_t d = 0; same && d < want.size(); ++d)
    same = want.begin()[d] == kAnyRank || sizes[d] == want.begin()[d];
  if (!same) {
    std::string text = list_string(Ints(want));
    if (const size_t any = text.find("-1"); any != std::string::npos) text.replace(any, 2, "r");
    fail(op, arg, " has shape ", list_string(sizes), ", want ", text);
  }
  check_same_device(op, arg, tensor, device_of);
  Dense dense;
  dense.dtype = float_dtype(op, arg, tensor.scalar_type());
  dense.tensor = contiguous(op, arg, tensor, dtype_size(dense.dtype));
  dense.data = dense.tensor.data_ptr();
  return dense;
}

Rows as_rank_rows(const char* op, const char* arg, const Tensor& S, int64_t M, int64_t R,
                  const Tensor& device_of) {
  const Rows rows = as_rows(op, arg, S);
  QLORA_CHECK(rows.dtype == DType::kFloat32, op, arg, " has dtype ", dtype_name(S.scalar_type()),
              ", want float32");
  QLORA_CHECK(rows.rows == M && rows.cols == R, op, arg, " has shape ", list_string(S.sizes()),
              ", want ", M, " rows of ", R);
  check_same_device(op, arg, S, device_of);
  return rows;
}

int64_t checked_numel(const char* op, const Ints& shape) {
  int64_t numel = 1;
  for (int64_t size : shape) {
    QLORA_CHECK(size >= 0, op, "shape is ", list_string(shape), ", want sizes of 0 or more");
    QLORA_CHECK(size == 0 || numel <= std::numeric_limits<int64_t>::max() / 8 / size, op,
                "shape is ", list_string(shape), ", want fewer than 2^60 elements");
    numel *= size;
  }
  return numel;
}

int64_t checked_blocksize(const char* op, int64_t blocksize, int64_t numel) {
  if (blocksize == 0) return std::max<int64_t>(numel, 1);
  QLORA_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
              "blocksize is ", blocksize,
              ", want a power of two from 32 to 4096, or 0 for one scale per tensor");
  return blocksize;
}

Codebook as_codebook(const char* op, const std::string& quant_type, const OptionalFloats& codebook,
                     const std::string& companding, double companding_k) {
  Companding kind = Companding::kNone;
  if (companding == "logarithmic") {
    kind = Companding::kLogarithmic;
  } else if (companding == "exponential") {
    kind = Companding::kExponential;
  } else {
    QLORA_CHECK(companding == "none", op, "companding is '", companding,
                "', want 'none', 'logarithmic' or 'exponential'");
  }
  // Above k = ~80 every fp32 threshold of the exponential is 0 or 1.
  QLORA_CHECK(
      kind == Companding::kNone || (companding_k > 0 && companding_k <= 1e6 &&
                                    (kind != Companding::kExponential || companding_k <= 80)),
      op, "companding_k is ", companding_k, ", want a constant in (0, ",
      kind == Companding::kExponential ? 80 : 1000000, "]");
  if (const NamedCodebook* named = find_codebook(quant_type)) {
    QLORA_CHECK(!codebook, op, "codebook was given with quant_type '", quant_type,
                "', want quant_type 'custom' with it, or no codebook");
    return make_codebook(named->levels, named->sign_magnitude, kind, companding_k);
  }
  if (quant_type != "custom") {
    std::string names;
    for (const NamedCodebook& known : kNamedCodebooks)
      names += std::string("'") + known.name + "', ";
    QLORA_CHECK(false, op, "quant_type is '", quant_type, "', want one of ", names, "'custom'");
  }
  QLORA_CHECK(codebook && codebook->size() == 16, op, "codebook has ",
              codebook ? codebook->size() : 0, " values, want 16 for quant_type 'custom'");
  const double* levels = codebook->data();
  for (int code = 0; code < 16; ++code) {
    QLORA_CHECK(std::isfinite(static_cast<float>(levels[code])), op, "codebook value ", code,
                " is ", levels[code], ", want a finite float32");
    QLORA_CHECK(kind == Companding::kNone || std::fabs(levels[code]) <= 1, op, "codebook value ",
                code, " is ", levels[code], ", want one within [-1, 1] under companding");
  }
  return make_codebook(levels, false, kind, companding_k);
}

const uint8_t* as_bytes(const char* op, const char* arg, const Tensor& tensor, int64_t bytes,
                        const char* meaning, const Tensor& device_of, Tensor& keep) {
  check_tensor(op, arg, tensor);
  QLORA_CHECK(tensor.scalar_type() == ScalarType::Byte, op, arg, " has dtype ",
              dtype_name(tensor.scalar_type()), ", want uint8 (", meaning, ")");
  QLORA_CHECK(tensor.numel() == bytes, op, arg, " has ", tensor.numel(), " bytes, want ", bytes,
              " (", meaning, ")");
  check_same_device(op, arg, tensor, device_of);
  keep = contiguous(op, arg, tensor, 16);  // kernels read vectors of 16 bytes
  return static_cast<const uint8_t*>(keep.data_ptr());
}

namespace {

// Fills `v` with the parts of `count` weights of v.num_blocks blocks each, and the codebook.
void fill_weight(const char* op, PackedWeight& v, std::array<Tensor, 4>& keep, int64_t count,
                 int64_t packed_bytes, const Tensor& packed, const Tensor& absmax,
                 const OptionalTensor& nested, const OptionalTensor& mean,
                 const std::string& quant_type, const OptionalFloats& codebook,
                 const Tensor& device_of) {
  auto bytes = [&](const char* arg, const Tensor& t, int64_t want, const char* meaning, int slot) {
    return as_bytes(op, arg, t, count * want, meaning, device_of, keep[slot]);
  };
  v.packed = bytes("packed", packed, packed_bytes, "two codes a byte", 0);
  v.absmax = nullptr;
  v.absmax_code = nullptr;
  v.nested = nullptr;
  v.mean = nullptr;
  if (nested) {
    v.absmax_code = bytes("absmax", absmax, v.num_blocks, "one 8-bit code a block", 1);
    v.nested = reinterpret_cast<const float*>(
        bytes("nested", *nested, 4 * (1 + ceil_div(v.num_blocks, 256)),
              "fp32 offset, then one fp32 scale for 256 blocks", 2));
  } else {
    v.absmax = reinterpret_cast<const float*>(
        bytes("absmax", absmax, 4 * v.num_blocks, "one fp32 scale a block", 1));
  }
  if (mean) {
    v.mean = reinterpret_cast<const float*>(
        bytes("mean", *mean, 4 * v.num_blocks, "one fp32 mean a block", 3));
  }

  if (const NamedCodebook* named = find_codebook(quant_type); named && !codebook) {
    std::copy(named->levels, named->levels + 16, v.values);
  } else {
    const Codebook book = as_codebook(op, quant_type, codebook, "none", 1.0);
    std::memcpy(v.values, book.values, sizeof v.values);
  }
}

}  // namespace

Weight as_weight(const char* op, const Tensor& packed, const Tensor& absmax,
                 const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                 int64_t blocksize, const std::string& quant_type, const OptionalFloats& codebook,
                 const Tensor& device_of) {
  Weight w;
  PackedWeight& v = w.view;
  const int64_t numel = checked_numel(op, shape);
  v.K = shape.empty() ? 1 : shape.back();
  v.N = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) v.N *= shape[d];
  v.blocksize = checked_blocksize(op, blocksize, numel);
  v.num_blocks = ceil_div(numel, v.blocksize);
  fill_weight(op, v, w.keep, 1, (numel + 1) / 2, packed, absmax, nested, mean, quant_type, codebook,
              device_of);
  return w;
}

Stack as_stack(const char* op, const Tensor& packed, const Tensor& absmax,
               const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
               int64_t blocksize, const std::string& quant_type, const OptionalFloats& codebook,
               const Tensor& device_of) {
  QLORA_CHECK(shape.size() == 3, op, "shape is ", list_string(shape), ", want [E, N, K]");
  checked_numel(op, shape);
  Stack stack;
  stack.view.E = shape[0];
  PackedWeight& v = stack.view.first;
  v.N = shape[1];
  v.K = shape[2];
  QLORA_CHECK(v.K % 2 == 0, op, "shape is ", list_string(shape),
              ", want an even K: each expert's codes must start at a byte");
  v.blocksize = checked_blocksize(op, blocksize, v.N * v.K);
  v.num_blocks = ceil_div(v.N * v.K, v.blocksize);
  fill_weight(op, v, stack.keep, shape[0], v.N * v.K / 2, packed, absmax, nested, mean, quant_type,
              codebook, device_of);
  return stack;
}

void check_matrix(const char* op, const Ints& shape) {
  QLORA_CHECK(shape.size() == 2, op, "shape is ", list_string(shape), ", want [N, K]");
}

void check_both(const char* op, const char* first_arg, const OptionalTensor& first,
                const char* second_arg, const OptionalTensor& second) {
  QLORA_CHECK(first.has_value() == second.has_value(), op, first ? first_arg : second_arg,
              " is given without ", first ? second_arg : first_arg, ", want both or neither");
}

void fill_zeros(Tensor tensor) { torch::stable::fill_(tensor, 0); }

Ints replace_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  Ints result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

}  // namespace qlora_ext::host
