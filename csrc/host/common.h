// Shared by the ops' host functions: checking arguments, filling params and allocating. Each
// backend supplies the few functions that depend on the device.
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

// Makes the tensor's device current as long as the scope lives, and holds the device's current
// stream. Each backend's register.cpp defines it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }

  // Whether the stream is being captured into a CUDA graph. A capture cannot wait for the device.
  bool is_capturing() const;

  // Waits for the stream's work and reads the one element of an int64 tensor. Nothing else in the
  // library waits for the device, except under QLORA_EXT_DEBUG.
  int64_t read(const Tensor& flag) const;

 private:
  void* stream_ = nullptr;  // the caller's current cudaStream_t; null on the CPU
  [[maybe_unused]] void* guard_ = nullptr;
};

// out = beta * self + a * b by torch's matmul (cuBLAS on a GPU); defined next to DeviceScope.
void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
               double beta);

// The values of an int32 tensor if the host can read them without waiting for a device, else null;
// defined next to DeviceScope.
const int32_t* host_values(const Tensor& tensor);

// Turns a launcher's error message into an exception.
inline void check_launch(const char* op, const char* error) {
  QLORA_CHECK(error == nullptr, op, error);
}

const char* dtype_name(ScalarType dtype);

// fp32, fp16 or bf16; anything else is an error that names the argument.
DType float_dtype(const char* op, const char* arg, ScalarType dtype);

// Allocates on like's device. If that fails, the error gives the op, what the memory was for
// (`what`), its size and torch's reason.
Tensor empty(const char* op, const char* what, std::initializer_list<int64_t> sizes,
             ScalarType dtype, const Tensor& like);
Tensor empty(const char* op, const char* what, const Ints& sizes, ScalarType dtype,
             const Tensor& like);

// The last step of an op: runs `launcher` with the workspace that it needs, if any, from torch's
// allocator. torch may reuse that memory as soon as this returns, because the next use of it comes
// later on the same stream.
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

// The scaling as a float. An error if it is not a finite float32.
float as_scaling(const char* op, double scaling);

// Checks that the tensor exists and that its storage holds all of it. torch turns a None for a
// required tensor into an undefined one, and `resize_` can free or shrink a storage in use.
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

// Checks x as as_rows does, but never copies it. Returns the number of rows.
int64_t check_rows(const char* op, const char* arg, const Tensor& x);

// An optional, contiguous tensor of a fixed shape; data is null if it is absent.
struct Dense {
  Tensor tensor;
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};
constexpr int64_t kAnyRank = -1;  // in `want`: any size; errors print it as "r"
Dense as_dense(const char* op, const char* arg, const Tensor& tensor,
               std::initializer_list<int64_t> want, const Tensor& device_of);

// A uint8 tensor of exactly `bytes` bytes, contiguous and 16-byte aligned. If alignment or strides
// need a copy, `keep` owns it.
const uint8_t* as_bytes(const char* op, const char* arg, const Tensor& tensor, int64_t bytes,
                        const char* meaning, const Tensor& device_of, Tensor& keep);

// The W4 arguments, checked. If alignment or strides need copies, `keep` owns them.
struct Weight {
  PackedWeight view;
  std::array<Tensor, 4> keep;
};
Weight as_weight(const char* op, const Tensor& packed, const Tensor& absmax,
                 const OptionalTensor& nested, const OptionalTensor& mean, const Ints& shape,
                 int64_t blocksize, const std::string& quant_type, const OptionalFloats& codebook,
                 const Tensor& device_of);

// The W4 arguments of a stack of experts, checked. If alignment or strides need copies, `keep` owns
// them.
struct Stack {
  PackedStack view;
  std::array<Tensor, 4> keep;
};
Stack as_stack(const char* op, const Tensor& packed, const Tensor& absmax,
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

// S or dS: fp32, [..., R] with x's leading dimensions, which make M rows. A slice of columns is read
// in place.
Rows as_rank_rows(const char* op, const char* arg, const Tensor& S, int64_t M, int64_t R,
                  const Tensor& device_of);

void check_matrix(const char* op, const Ints& shape);

// S and B, or dS and A: an error unless both are given or neither is.
void check_both(const char* op, const char* first_arg, const OptionalTensor& first,
                const char* second_arg, const OptionalTensor& second);

void fill_zeros(Tensor tensor);  // by value: torch's fill_ needs a mutable tensor

// Product of the sizes. An error if a size is negative or int64 overflows.
int64_t checked_numel(const char* op, const Ints& shape);

// 0 -> numel; else a power of two from 32 to 4096.
int64_t checked_blocksize(const char* op, int64_t blocksize, int64_t numel);

// The levels that quant_type names, or the 16 given ones.
Codebook as_codebook(const char* op, const std::string& quant_type, const OptionalFloats& codebook,
                     const std::string& companding, double companding_k);

// x's leading dimensions, then `last`.
Ints replace_last(const Tensor& x, int64_t last);

}  // namespace qlora_ext::host
