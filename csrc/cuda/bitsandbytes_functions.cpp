// bitsandbytes' C functions on our kernels: names and arguments as in its CUDA library (0.50). Some
// trainers call that library through ctypes, not torch's ops.
// qlora_ext/integrations/bitsandbytes_functions.py puts these in its place.
//
// Pointers are to memory of the current device; `stream` is a cudaStream_t. The functions return
// nothing. Each thread keeps its error for qlora_ext_take_error(). An error that was not taken is
// printed before the thread's next call, or when the thread ends.
#include <cstdio>

#include "../host/common.h"
#include "cuda/stream_workspace.h"

namespace qlora_ext::host {
namespace {

struct Waiting {
  std::string error;
  void print() {
    if (!error.empty()) std::fprintf(stderr, "qlora_ext: %s\n", error.c_str());
    error.clear();
  }
  ~Waiting() { print(); }
};
thread_local Waiting waiting;

template <class Body>
void keep_error(const Body& body) {
  waiting.print();
  try {
    body();
  } catch (const std::exception& error) {
    waiting.error = error.what();
  }
}

// A kernel that reads a null or unaligned address ends the CUDA context of its process.
void check_address(const char* op, const char* arg, const void* address, int64_t alignment) {
  QLORA_CHECK(address != nullptr, op, arg, " is null, want an address on the GPU");
  const auto past = reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment);
  QLORA_CHECK(past == 0, op, arg, " starts ", past, " bytes past a multiple of ", alignment,
              ", want an aligned address");
}

void check_blocksize(const char* op, int blocksize) {
  QLORA_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
              "blocksize is ", blocksize, ", want a power of two from 32 to 4096");
}

PackedWeight make_weight(const uint8_t* packed, const float* absmax, int64_t N, int64_t K,
                         int blocksize, const double* levels) {
  PackedWeight w{};
  w.packed = packed;
  w.absmax = absmax;
  w.N = N;
  w.K = K;
  w.blocksize = blocksize;
  w.num_blocks = ceil_div(N * K, blocksize);
  std::copy(levels, levels + 16, w.values);
  return w;
}

// out[i] = level of code i * absmax[i / blocksize], for i < n.
void dequantize(const char* op, const double* levels, DType dtype, const uint8_t* A,
                const float* absmax, void* out, int blocksize, int n, void* stream) {
  keep_error([&] {
    check_blocksize(op, blocksize);
    QLORA_CHECK(n >= 0, op, "n is ", n, ", want the number of weights, 0 or more");
    if (n == 0) return;
    check_address(op, "A", A, 1);
    check_address(op, "absmax", absmax, 4);
    check_address(op, "out", out, dtype_size(dtype));
    const Dequantize4bitParams p{.weight = make_weight(A, absmax, 1, n, blocksize, levels),
                                 .row_begin = 0,
                                 .row_end = 1,
                                 .out = out,
                                 .dtype = dtype};
    check_launch(op, launch::dequantize_4bit(p, stream));
  });
}

// out[m] = W [m, k] times the vector A [k], n = 1. W's codes are B, rows ldb bytes apart; `table`
// has the 16 levels. lda and ldc say nothing about one vector, and bitsandbytes reads neither.
void gemm(const char* op, DType dtype, int m, int n, int k, const void* A, const uint8_t* B,
          const float* absmax, const float* table, void* out, int ldb, int blocksize,
          void* stream) {
  keep_error([&] {
    check_blocksize(op, blocksize);
    QLORA_CHECK(m >= 0, op, "m is ", m, ", want the number of rows of the weight, 0 or more");
    QLORA_CHECK(n == 0 || n == 1, op, "n is ", n, ", want 1: it multiplies one vector");
    QLORA_CHECK(k >= 0 && k % 2 == 0, op, "k is ", k, ", want the length of a weight's row, even");
    QLORA_CHECK(m <= 1 || ldb == k / 2, op, "ldb is ", ldb, ", want ", k / 2,
                " bytes (k / 2): rows of B without gaps between them");
    if (m == 0 || n == 0) return;
    check_address(op, "out", out, dtype_size(dtype));
    if (k > 0) {
      check_address(op, "A", A, dtype_size(dtype));
      check_address(op, "B", B, 1);
      check_address(op, "absmax", absmax, 4);
      check_address(op, "the table", table, 4);
    }
    Gemm4bitParams p{};
    p.weight = make_weight(B, absmax, m, k, blocksize, kNF4);
    p.table = k > 0 ? table : nullptr;
    p.x = A;
    p.y = out;
    p.M = 1;
    p.x_stride = k;
    p.dtype = dtype;
    Tensor workspace;
    if (const int64_t bytes = launch::workspace_gemm_4bit(p); bytes > 0) {
      workspace = stream_workspace(op, bytes, stream);
      p.workspace = workspace.data_ptr();
    }
    check_launch(op, launch::gemm_4bit(p, stream));
  });
}

}  // namespace
}  // namespace qlora_ext::host

#define QLORA_EXT_EXPORT extern "C" __attribute__((visibility("default")))

// Takes the error of this thread's last call and returns it; null if there is none. The text lives
// until the next error is taken.
QLORA_EXT_EXPORT const char* qlora_ext_take_error() {
  static thread_local std::string taken;
  taken = std::move(qlora_ext::host::waiting.error);
  qlora_ext::host::waiting.error.clear();
  return taken.empty() ? nullptr : taken.c_str();
}

// bitsandbytes ignores `code` too: the codebook is in the name.
#define DEQUANTIZE(suffix, dtype, levels)                                                       \
  QLORA_EXT_EXPORT void cdequantize_blockwise_##suffix(                                         \
      float* code, uint8_t* A, float* absmax, void* out, int blocksize, int n, void* stream) {  \
    qlora_ext::host::dequantize("cdequantize_blockwise_" #suffix, qlora_ext::levels,            \
                                qlora_ext::DType::dtype, A, absmax, out, blocksize, n, stream); \
  }

DEQUANTIZE(fp32_nf4, kFloat32, kNF4)
DEQUANTIZE(fp16_nf4, kFloat16, kNF4)
DEQUANTIZE(bf16_nf4, kBFloat16, kNF4)
DEQUANTIZE(fp32_fp4, kFloat32, kFP4)
DEQUANTIZE(fp16_fp4, kFloat16, kFP4)
DEQUANTIZE(bf16_fp4, kBFloat16, kFP4)

#define GEMM(suffix, dtype)                                                                        \
  QLORA_EXT_EXPORT void cgemm_4bit_inference_naive_##suffix(                                       \
      int m, int n, int k, void* A, uint8_t* B, float* absmax, float* datatype, void* out,         \
      int lda, int ldb, int ldc, int blocksize, void* stream) {                                    \
    qlora_ext::host::gemm("cgemm_4bit_inference_naive_" #suffix, qlora_ext::DType::dtype, m, n, k, \
                          A, B, absmax, datatype, out, ldb, blocksize, stream);                    \
  }

GEMM(fp32, kFloat32)
GEMM(fp16, kFloat16)
GEMM(bf16, kBFloat16)
