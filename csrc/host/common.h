// What the ops' host functions share: reading arguments into params, allocating, and the few
// things about a device that a backend supplies.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "../checks.h"
#include "../codebook.h"
#include "../dispatch.h"
#include "../params.h"
#include "ops.h"

namespace qlora_ext::host {

// Makes the tensor's device current while it lives, and knows its current stream. Each backend's
// register.cpp defines it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }

  // Whether the stream is being captured into a CUDA graph: what waits for the device cannot be.
  bool is_capturing() const;

  // The one element of an int64 tensor that the stream's work has written. Waits for the device,
  // and is the only thing in the library that does.
  int64_t read(const Tensor& flag) const;

 private:
  void* stream_ = nullptr;  // the caller's current cudaStream_t; null on the CPU
  [[maybe_unused]] void* guard_ = nullptr;
};

// out = beta * self + a * b by torch's matmul (cuBLAS on a GPU); defined next to DeviceScope.
void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
               double beta);

// Turns a launcher's error message into an exception.
inline void check_launch(const char* op, const char* error) {
  QLORA_CHECK(error == nullptr, op, error);
}

const char* dtype_name(ScalarType dtype);

// fp32, fp16 or bf16; anything else is an error that names the argument.
DType float_dtype(const char* op, const char* arg, ScalarType dtype);

// New memory on like's device. If torch has none, the error names the op, `what` the memory is for
// and its size, and says what torch said.
Tensor empty(const char* op, const char* what, std::initializer_list<int64_t> sizes,
             ScalarType dtype, const Tensor& like);
Tensor empty(const char* op, const char* what, const Ints& sizes, ScalarType dtype,
             const Tensor& like);

// How an op ends: runs `launcher` with the workspace that it asks for, if any, from torch's
// allocator. The workspace's memory may be reused as soon as the call returns: the next use of it
// comes later on the same stream.
template <class Params>
void launch_with_workspace(const char* op, const char* (*launcher)(const Params&, void* stream),
                           int64_t (*workspace_bytes)(const Params&), Params& p, const Tensor& like,
                           const DeviceScope& scope) {
  Tensor workspace;
  if (const int64_t bytes = workspace_bytes(p); bytes > 0) {
    workspace = empty(op, "its workspace", {bytes}, ScalarType::Byte, like);
    p.workspace = workspace.data_ptr();
  }
  check_launch(op, launcher(p, scope.stream()));
}

// `tensor`, or a copy of it if it is not contiguous or does not start at a multiple of `alignment`
// bytes: a view into a larger buffer (a shard, a memory-mapped file) may start anywhere.
Tensor contiguous(const char* op, const char* arg, const Tensor& tensor, int64_t alignment);

// The scaling as kernels take it: refused if it is not a finite float32.
float as_scaling(const char* op, double scaling);

// Whether there is a tensor, and memory under all of it: torch takes None for a required tensor and
// passes one that is undefined, and a storage can be freed or cut under its tensors (`resize_`).
void check_tensor(const char* op, const char* arg, const Tensor& tensor);

void check_same_device(const char* op, const char* arg, const Tensor& tensor, const Tensor& like);

// A [rows, cols] view of x that kernels can read: unit stride along cols, rows `stride` apart.
struct Rows {
  Tensor tensor;  // x, or the copy of it that kernels read
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;  // elements
  DType dtype;
};
Rows as_rows(const char* op, const char* arg, const Tensor& x);

// What as_rows checks of x, without the copy that it may make; returns the number of rows.
int64_t check_rows(const char* op, const char* arg, const Tensor& x);

// An optional, contiguous tensor of a fixed shape: data is null where absent.
struct Dense {
  Tensor tensor;
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};
constexpr int64_t kAnyRank = -1;  // a size of `want` that the tensor may choose, "r" in errors
Dense as_dense(const char* op, const char* arg, const Tensor& tensor,
               std::initializer_list<int64_t> want, const Tensor& device_of);

// A uint8 tensor of exactly `bytes` bytes, contiguous and 16-byte aligned; `keep` owns the copy
// that alignment or strides made necessary.
const uint8_t* as_bytes(const char* op, const char* arg, const Tensor& tensor, int64_t bytes,
                        const char* meaning, const Tensor& device_of, Tensor& keep);

// The W4 arguments, checked; `keep` owns the copies that alignment or strides made necessary.
struct Weight {
  PackedWeight view;
  std::array<Tensor, 4> keep;
};
Weight as_weight(const char* op, const Tensor& packed, const Tensor& absmax,
                 const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                 int64_t blocksize, const std::string& quant_type, const OptionalFloats& codebook,
                 const Tensor& device_of);

// lora_A [r, K] and lora_B [N, r] of one dtype.
struct LoraPair {
  Dense A;
  Dense B;
  int64_t R;
};
LoraPair as_lora_pair(const char* op, const Tensor& lora_A, const Tensor& lora_B, int64_t N,
                      int64_t K, const Tensor& device_of);

// S or dS: fp32, M rows of R in x's leading dimensions; a column slice is read in place.
Rows as_rank_rows(const char* op, const char* arg, const Tensor& S, int64_t M, int64_t R,
                  const Tensor& device_of);

void check_matrix(const char* op, const Ints& shape);

// Product of sizes, refusing negative sizes and overflow of int64.
int64_t checked_numel(const char* op, const Ints& shape);

// 0 -> numel; else a power of two from 32 to 4096.
int64_t checked_blocksize(const char* op, int64_t blocksize, int64_t numel);

// The levels that quant_type names, or the 16 given ones.
Codebook as_codebook(const char* op, const std::string& quant_type, const OptionalFloats& codebook,
                     const std::string& companding, double companding_k);

// x's leading dimensions, then `last`.
Ints replace_last(const Tensor& x, int64_t last);

}  // namespace qlora_ext::host
