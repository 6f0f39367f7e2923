// The CPU kernels against a naive reference, without torch: for sanitizers and for any compiler.
// Buffers have exactly the sizes that params.h promises, so ASan sees every access outside them.
// `make native` runs it once per path, QLORA_EXT_CPU=portable|avx2|avx512|avx512_bf16.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/codebook.h"
#include "../../csrc/cpu/half.h"
#include "../../csrc/cpu/simd/simd.h"
#include "threads.h"

using namespace qlora_ext;

namespace {

int failures = 0;

#define CHECK(condition, ...)                     \
  do {                                            \
    if (!(condition) && ++failures <= 20) {       \
      std::printf("%s:%d: ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
    }                                             \
  } while (0)

std::mt19937 random_bits(20240607);

float normal() { return std::normal_distribution<float>()(random_bits); }

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

const char* name_of(DType dtype) {
  const char* names[] = {"fp32", "fp16", "bf16"};
  return names[static_cast<int>(dtype)];
}

// ---- buffers of any dtype ----

struct Buffer {
  DType dtype;
  std::vector<char> bytes;

  Buffer(DType type, int64_t n) : dtype(type), bytes(n * dtype_size(type), '\x7f') {}

  int64_t size() const { return static_cast<int64_t>(bytes.size()) / dtype_size(dtype); }
  float get(int64_t i) const {
    const void* at = cpu::element(bytes.data(), dtype, i);
    if (dtype == DType::kFloat32) return *static_cast<const float*>(at);
    const uint16_t half = *static_cast<const uint16_t*>(at);
    return dtype == DType::kFloat16 ? cpu::fp16_to_float(half) : cpu::bf16_to_float(half);
  }
  void set(int64_t i, float value) {
    void* at = cpu::element(bytes.data(), dtype, i);
    if (dtype == DType::kFloat32) *static_cast<float*>(at) = value;
    if (dtype == DType::kFloat16) *static_cast<uint16_t*>(at) = cpu::fp16_from_float(value);
    if (dtype == DType::kBFloat16) *static_cast<uint16_t*>(at) = cpu::bf16_from_float(value);
  }
};

Buffer random_buffer(DType dtype, int64_t n) {
  Buffer buffer(dtype, n);
  for (int64_t i = 0; i < n; ++i) buffer.set(i, normal());
  return buffer;
}

double unit_roundoff(DType dtype) {
  if (dtype == DType::kFloat32) return 0x1p-24;
  return dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// ---- the naive reference ----

double tree_sum(std::vector<double> values) {
  do {
    values.resize((values.size() + 255) / 256 * 256, 0.0);
    std::vector<double> sums;
    for (size_t group = 0; group < values.size(); group += 256) {
      for (int half = 128; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) values[group + i] += values[group + half + i];
      }
      sums.push_back(values[group]);
    }
    values = sums;
  } while (values.size() > 1);
  return values[0];
}

float inverse_or_zero(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

struct Weight {
  int64_t N, K, blocksize, num_blocks;
  std::vector<uint8_t> packed;
  std::vector<float> absmax;  // decoded if the scales are nested
  std::vector<float> mean;
  std::vector<uint8_t> code;
  std::vector<float> nested;
  Codebook codebook;
  bool is_nested = false;

  PackedWeight params() const {
    PackedWeight w{};
    w.packed = packed.data();
    w.absmax_code = is_nested ? code.data() : nullptr;
    w.absmax = is_nested ? nullptr : absmax.data();
    w.nested = is_nested ? nested.data() : nullptr;
    w.mean = mean.empty() ? nullptr : mean.data();
    w.N = N;
    w.K = K;
    w.blocksize = blocksize;
    w.num_blocks = num_blocks;
    std::copy_n(codebook.values, 16, w.values);
    return w;
  }

  float value(int64_t n, int64_t k) const {
    const int64_t i = n * K + k;
    const int byte = packed[i / 2];
    float v = codebook.values[i % 2 ? byte & 15 : byte >> 4] * absmax[i / blocksize];
    if (!mean.empty()) v += mean[i / blocksize];
    return v;
  }
};

int reference_code(float v, const Codebook& book) {
  int rank = 0;
  for (float t : book.thresholds) rank += (book.sign_magnitude ? std::fabs(v) : v) > t;
  return book.order[rank] | (book.sign_magnitude && v < 0 ? 8 : 0);
}

// ---- quantize ----

struct Case {
  int64_t N, K, blocksize;  // 0 = per tensor
  const char* quant_type;
  Normalization normalization;
  bool nested;
};

std::string describe(const Case& c) {
  return std::to_string(c.N) + "x" + std::to_string(c.K) + " block " + std::to_string(c.blocksize) +
         " " + c.quant_type + " norm " + std::to_string(static_cast<int>(c.normalization)) +
         (c.nested ? " nested" : "");
}

void check_statistics(const Case& c, const Buffer& w, const Weight& q) {
  for (int64_t block = 0; block < q.num_blocks; ++block) {
    const int64_t first = block * q.blocksize;
    const int64_t n = std::min(q.blocksize, q.N * q.K - first);
    float scale = 1.0f;
    if (c.normalization == Normalization::kAbsmax) {
      scale = 0.0f;
      for (int64_t i = 0; i < n; ++i) scale = std::max(scale, std::fabs(w.get(first + i)));
    }
    if (c.normalization == Normalization::kStandard) {
      std::vector<double> values(n), squares(n);
      for (int64_t i = 0; i < n; ++i) values[i] = w.get(first + i);
      const float mean = static_cast<float>(tree_sum(values) / n);
      for (int64_t i = 0; i < n; ++i) squares[i] = (values[i] - mean) * (values[i] - mean);
      scale = static_cast<float>(3.0 * std::sqrt(tree_sum(squares) / n));
      CHECK(q.mean[block] == mean, "mean %g, want %g", q.mean[block], mean);
    }
    CHECK(q.absmax[block] == scale, "scale %g, want %g", q.absmax[block], scale);
  }
}

void check_codes(const Case& c, const Buffer& w, const Weight& q) {
  for (int64_t i = 0; i < q.N * q.K; ++i) {
    const int64_t block = i / q.blocksize;
    const float inverse = inverse_or_zero(q.absmax[block]);
    float v = (w.get(i) - (q.mean.empty() ? 0.0f : q.mean[block])) * inverse;
    if (c.normalization == Normalization::kStandard) v = std::min(1.0f, std::max(-1.0f, v));
    const int code = i % 2 ? q.packed[i / 2] & 15 : q.packed[i / 2] >> 4;
    CHECK(code == reference_code(v, q.codebook), "%s: code %d at %" PRId64 ", want %d",
          describe(c).c_str(), code, i, reference_code(v, q.codebook));
    if (failures > 20) return;
  }
  if (q.N * q.K % 2 == 1) CHECK((q.packed.back() & 15) == 0, "spare nibble is not zero");
}

void nest_scales(Weight& q) {
  const int64_t n = q.num_blocks;
  const int64_t groups = (n + 255) / 256;
  q.code.resize(n);
  q.nested.resize(1 + groups);
  QuantizeAbsmaxParams p{q.absmax.data(), q.code.data(), q.nested.data(), n, nullptr};
  std::vector<char> workspace(launch::workspace_quantize_absmax(p));
  p.workspace = workspace.data();
  CHECK(launch::quantize_absmax(p, nullptr) == nullptr, "quantize_absmax failed");

  const std::vector<double> values(q.absmax.begin(), q.absmax.end());
  const float offset = static_cast<float>(tree_sum(values) / n);
  CHECK(q.nested[0] == offset, "offset %g, want %g", q.nested[0], offset);
  std::vector<float> decoded(n);
  for (int64_t i = 0; i < n; ++i) {
    float absmax2 = 0.0f;
    const int64_t group = i / 256;
    for (int64_t j = group * 256; j < std::min(n, group * 256 + 256); ++j) {
      absmax2 = std::max(absmax2, std::fabs(q.absmax[j] - offset));
    }
    CHECK(q.nested[1 + group] == absmax2, "absmax2 %g, want %g", q.nested[1 + group], absmax2);
    const float v = (q.absmax[i] - offset) * inverse_or_zero(absmax2);
    int code = 0;
    for (int t = 0; t < 255; ++t) code += v > dynamic_map_threshold(t);
    CHECK(q.code[i] == code, "scale code %d, want %d", q.code[i], code);
    const float scaled = kDynamicMap[code] * absmax2;
    decoded[i] = scaled + offset;
  }
  DequantizeAbsmaxParams d{q.code.data(), q.nested.data(), q.absmax.data(), n};
  CHECK(launch::dequantize_absmax(d, nullptr) == nullptr, "dequantize_absmax failed");
  CHECK(q.absmax == decoded, "decoded scales differ");
  q.is_nested = true;
}

Weight quantize(const Case& c, const Buffer& w) {
  Weight q;
  q.N = c.N;
  q.K = c.K;
  const int64_t numel = c.N * c.K;
  q.blocksize = c.blocksize == 0 ? numel : c.blocksize;
  q.num_blocks = (numel + q.blocksize - 1) / q.blocksize;
  q.packed.assign((numel + 1) / 2, 0xa5);
  q.absmax.resize(q.num_blocks);
  if (c.normalization == Normalization::kStandard) q.mean.resize(q.num_blocks);
  const NamedCodebook* named = find_codebook(c.quant_type);
  q.codebook = make_codebook(named->levels, named->sign_magnitude);

  int64_t bad_index = numel;
  Quantize4bitParams p{
      w.bytes.data(), q.packed.data(), q.absmax.data(), q.mean.empty() ? nullptr : q.mean.data(),
      &bad_index,     numel,           q.blocksize,     q.num_blocks,
      3.0f,           c.normalization, w.dtype,         q.codebook,
      nullptr};
  std::vector<double> workspace((launch::workspace_quantize_4bit(p) + 7) / 8);
  p.workspace = workspace.data();
  CHECK(launch::quantize_4bit(p, nullptr) == nullptr, "quantize_4bit failed");
  CHECK(bad_index == numel, "bad_index %" PRId64, bad_index);
  check_statistics(c, w, q);
  check_codes(c, w, q);
  if (c.nested) nest_scales(q);
  return q;
}

void test_bad_weights() {
  for (DType dtype : kDTypes) {
    for (int64_t blocksize : {int64_t{64}, int64_t{4096}, int64_t{100001}}) {
      Buffer w = random_buffer(dtype, 100001);
      w.set(99999, std::numeric_limits<float>::quiet_NaN());
      w.set(54321, -std::numeric_limits<float>::infinity());
      w.set(100000, std::numeric_limits<float>::infinity());
      Weight q;
      int64_t bad_index = 100001;
      q.packed.resize(50001);
      q.absmax.resize(100001 / 32 + 1);
      Quantize4bitParams p{w.bytes.data(),
                           q.packed.data(),
                           q.absmax.data(),
                           nullptr,
                           &bad_index,
                           100001,
                           blocksize,
                           (100001 + blocksize - 1) / blocksize,
                           3.0f,
                           Normalization::kAbsmax,
                           dtype,
                           make_codebook(kNF4, false),
                           nullptr};
      launch::quantize_4bit(p, nullptr);
      CHECK(bad_index == 54321, "bad_index %" PRId64 ", want 54321", bad_index);
    }
  }
}

// ---- decode ----

void test_decode(const Weight& q) {
  for (DType dtype : kDTypes) {
    for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, q.N}, {q.N / 3, q.N / 2 + 1}}) {
      Buffer out(dtype, (end - begin) * q.K);
      Dequantize4bitParams p{q.params(), begin, end, out.bytes.data(), dtype};
      CHECK(launch::dequantize_4bit(p, nullptr) == nullptr, "dequantize_4bit failed");
      Buffer want(dtype, out.size());
      for (int64_t i = 0; i < out.size(); ++i) want.set(i, q.value(begin + i / q.K, i % q.K));
      CHECK(out.bytes == want.bytes, "dequantize_4bit: %s differs", name_of(dtype));
    }
    for (const auto& [begin, end] :
         {std::pair<int64_t, int64_t>{0, (q.K + 1) / 2}, {q.K / 3, q.K}}) {
      Buffer out(dtype, (q.N - q.N / 2) * (end - begin));
      Dequantize4bitParams p{q.params(), q.N / 2, q.N, out.bytes.data(), dtype, begin, end};
      CHECK(launch::dequantize_4bit(p, nullptr) == nullptr, "dequantize_4bit of columns failed");
      Buffer want(dtype, out.size());
      for (int64_t i = 0; i < out.size(); ++i) {
        want.set(i, q.value(q.N / 2 + i / (end - begin), begin + i % (end - begin)));
      }
      CHECK(out.bytes == want.bytes, "dequantize_4bit of columns: %s differs", name_of(dtype));
    }
    const std::vector<int64_t> indices = {q.N - 1, 0, q.N / 2, 0};
    Buffer out(dtype, static_cast<int64_t>(indices.size()) * q.K);
    int64_t bad_index = 4;
    Embedding4bitParams p{q.params(), indices.data(), out.bytes.data(), &bad_index, 4, dtype};
    CHECK(launch::embedding_4bit(p, nullptr) == nullptr, "embedding_4bit failed");
    CHECK(bad_index == 4, "embedding_4bit: bad_index");
    Buffer want(dtype, out.size());
    for (int64_t i = 0; i < out.size(); ++i) want.set(i, q.value(indices[i / q.K], i % q.K));
    CHECK(out.bytes == want.bytes, "embedding_4bit: %s differs", name_of(dtype));
  }
}

void test_embedding_index() {
  Weight q = quantize({4, 32, 32, "nf4", Normalization::kAbsmax, false},
                      random_buffer(DType::kFloat32, 128));
  const std::vector<int64_t> indices = {3, 0, -1, 4};
  Buffer out(DType::kFloat32, 4 * 32);
  int64_t bad_index = 4;
  Embedding4bitParams p{q.params(), indices.data(), out.bytes.data(), &bad_index,
                        4,          DType::kFloat32};
  launch::embedding_4bit(p, nullptr);
  CHECK(bad_index == 2, "embedding_4bit: bad_index %" PRId64 ", want 2", bad_index);
}

// ---- products ----

// One output element: its value, and the sum of the magnitudes of its terms.
struct Sum {
  double value = 0.0;
  double magnitude = 0.0;
  void add(double a, double b) {
    value += a * b;
    magnitude += std::fabs(a * b);
  }
};

void check_sum(const char* op, const Buffer& out, int64_t i, const Sum& want) {
  // fp32 sums lose a few ulp of the magnitudes; the output is rounded once.
  // If the CPU multiplies bf16 itself, W is rounded to bf16 first.
  const bool rounds_weight = out.dtype == DType::kBFloat16 && cpu::kernels().multiply_bf16;
  const double bound = want.magnitude * (rounds_weight ? 0x1p-8 : 0x1p-19) +
                       std::fabs(want.value) * unit_roundoff(out.dtype) * 1.001 + 1e-7;
  const double error = std::fabs(out.get(i) - want.value);
  CHECK(error <= bound, "%s: %g at %" PRId64 ", want %g (%s)", op, out.get(i), i, want.value,
        name_of(out.dtype));
}

// Runs f under 1, 2, 3 and 8 threads; `out` must hold the same bytes each time.
template <class F>
void check_threads(const char* op, std::vector<Buffer*> outs, const F& f) {
  std::vector<std::vector<char>> first;
  for (int threads : {1, 2, 3, 8}) {
    num_threads = threads;
    for (Buffer* out : outs) std::fill(out->bytes.begin(), out->bytes.end(), '\x7f');
    f();
    for (size_t i = 0; i < outs.size(); ++i) {
      if (threads == 1) first.push_back(outs[i]->bytes);
      CHECK(first[i] == outs[i]->bytes, "%s: result %zu differs with %d threads", op, i, threads);
    }
  }
  num_threads = 2;
}

struct Shape {
  int64_t M, R;
  DType dtype, lora_dtype;
  bool bias;
};

void test_gemm(const Weight& q, const Shape& s) {
  const int64_t x_stride = q.K + 3, S_stride = s.R + 1;
  const auto span = [&](int64_t stride, int64_t width) {
    return s.M == 0 || width == 0 ? 0 : (s.M - 1) * stride + width;
  };
  const Buffer x = random_buffer(s.dtype, span(x_stride, q.K));
  const Buffer lora_S = random_buffer(DType::kFloat32, span(S_stride, s.R));
  const Buffer lora_B = random_buffer(s.lora_dtype, q.N * s.R);
  const Buffer bias = random_buffer(s.dtype, q.N);
  Buffer y(s.dtype, s.M * q.N);
  Gemm4bitParams p{};
  p.weight = q.params();
  p.x = x.bytes.data();
  p.bias = s.bias ? bias.bytes.data() : nullptr;
  p.lora_S = s.R > 0 ? reinterpret_cast<const float*>(lora_S.bytes.data()) : nullptr;
  p.lora_B = s.R > 0 ? lora_B.bytes.data() : nullptr;
  p.y = y.bytes.data();
  p.M = s.M;
  p.R = s.R;
  p.x_stride = x_stride;
  p.S_stride = s.R > 0 ? S_stride : 0;
  p.dtype = s.dtype;
  p.bias_dtype = s.dtype;
  p.lora_dtype = s.lora_dtype;
  std::vector<float> workspace(launch::workspace_gemm_4bit(p) / 4);
  p.workspace = workspace.data();
  check_threads("gemm_4bit", {&y},
                [&] { CHECK(launch::gemm_4bit(p, nullptr) == nullptr, "gemm_4bit failed"); });
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < q.N; ++n) {
      Sum sum;
      for (int64_t k = 0; k < q.K; ++k) sum.add(x.get(m * x_stride + k), q.value(n, k));
      for (int64_t r = 0; r < s.R; ++r) {
        sum.add(lora_S.get(m * S_stride + r), lora_B.get(n * s.R + r));
      }
      if (s.bias) sum.add(1.0, bias.get(n));
      check_sum("gemm_4bit", y, m * q.N + n, sum);
    }
  }
}

void test_gemm_backward(const Weight& q, const Shape& s) {
  const int64_t stride = q.N + 5;
  const Buffer dY = random_buffer(s.dtype, s.M == 0 ? 0 : (s.M - 1) * stride + q.N);
  const Buffer lora_dS = random_buffer(DType::kFloat32, s.M * s.R);
  const Buffer lora_A = random_buffer(s.lora_dtype, s.R * q.K);
  Buffer dX(s.dtype, s.M * q.K);
  Gemm4bitBackwardParams p{};
  p.weight = q.params();
  p.dY = dY.bytes.data();
  p.lora_dS = s.R > 0 ? reinterpret_cast<const float*>(lora_dS.bytes.data()) : nullptr;
  p.lora_A = s.R > 0 ? lora_A.bytes.data() : nullptr;
  p.dX = dX.bytes.data();
  p.M = s.M;
  p.R = s.R;
  p.dY_stride = stride;
  p.dtype = s.dtype;
  p.lora_dtype = s.lora_dtype;
  std::vector<float> workspace(launch::workspace_gemm_4bit_backward(p) / 4);
  p.workspace = workspace.data();
  check_threads("gemm_4bit_backward", {&dX}, [&] {
    CHECK(launch::gemm_4bit_backward(p, nullptr) == nullptr, "gemm_4bit_backward failed");
  });
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t k = 0; k < q.K; ++k) {
      Sum sum;
      for (int64_t n = 0; n < q.N; ++n) sum.add(dY.get(m * stride + n), q.value(n, k));
      for (int64_t r = 0; r < s.R; ++r) sum.add(lora_dS.get(m * s.R + r), lora_A.get(r * q.K + k));
      check_sum("gemm_4bit_backward", dX, m * q.K + k, sum);
    }
  }
}

void test_merge(const Weight& q, const Shape& s) {
  const Buffer lora_A = random_buffer(s.lora_dtype, s.R * q.K);
  const Buffer lora_B = random_buffer(s.lora_dtype, q.N * s.R);
  Buffer out(s.dtype, q.N * q.K);
  MergeLora4bitParams p{
      q.params(), lora_A.bytes.data(), lora_B.bytes.data(), out.bytes.data(), s.R, 0.5f,
      s.dtype,    s.lora_dtype};
  check_threads("merge_lora_4bit", {&out}, [&] {
    CHECK(launch::merge_lora_4bit(p, nullptr) == nullptr, "merge_lora_4bit failed");
  });
  for (int64_t n = 0; n < q.N; ++n) {
    for (int64_t k = 0; k < q.K; ++k) {
      Sum sum;
      sum.add(1.0, q.value(n, k));
      for (int64_t r = 0; r < s.R; ++r)
        sum.add(0.5 * lora_B.get(n * s.R + r), lora_A.get(r * q.K + k));
      check_sum("merge_lora_4bit", out, n * q.K + k, sum);
    }
  }
}

void test_lora(int64_t K, int64_t N, const Shape& s) {
  const float scaling = 0.25f;
  const int64_t x_stride = K + 1, dY_stride = N + 2, S_stride = s.R + 3;
  const auto span = [&](int64_t stride, int64_t width) {
    return s.M == 0 ? 0 : (s.M - 1) * stride + width;
  };
  const Buffer x = random_buffer(s.dtype, span(x_stride, K));
  const Buffer dY = random_buffer(s.dtype, span(dY_stride, N));
  const Buffer A = random_buffer(s.lora_dtype, s.R * K);
  const Buffer B = random_buffer(s.lora_dtype, N * s.R);
  const Buffer S_in = random_buffer(DType::kFloat32, span(S_stride, s.R));
  const Buffer dS_in = random_buffer(DType::kFloat32, s.M * s.R);
  Buffer S(DType::kFloat32, s.M * s.R), dS(DType::kFloat32, s.M * s.R);
  Buffer dx(s.dtype, s.M * K), dA(s.lora_dtype, s.R * K), dB(s.lora_dtype, N * s.R);
  const auto fp32 = [](const Buffer& b) { return reinterpret_cast<const float*>(b.bytes.data()); };

  LoraShrinkParams shrink{x.bytes.data(),
                          A.bytes.data(),
                          reinterpret_cast<float*>(S.bytes.data()),
                          s.M,
                          s.R,
                          K,
                          x_stride,
                          scaling,
                          s.dtype,
                          s.lora_dtype,
                          nullptr};
  std::vector<float> workspace(launch::workspace_lora_shrink(shrink) / 4);
  shrink.workspace = workspace.data();
  check_threads("lora_shrink", {&S}, [&] { launch::lora_shrink(shrink, nullptr); });

  LoraShrinkBackwardParams shrink_back{
      fp32(dS_in), x.bytes.data(), A.bytes.data(), dx.bytes.data(), dA.bytes.data(), s.M,    s.R,
      K,           x_stride,       scaling,        s.dtype,         s.lora_dtype,    nullptr};
  std::vector<float> workspace2(launch::workspace_lora_shrink_backward(shrink_back) / 4);
  shrink_back.workspace = workspace2.data();
  check_threads("lora_shrink_backward", {&dx, &dA},
                [&] { launch::lora_shrink_backward(shrink_back, nullptr); });

  LoraExpandBackwardParams expand{dY.bytes.data(),
                                  fp32(S_in),
                                  B.bytes.data(),
                                  reinterpret_cast<float*>(dS.bytes.data()),
                                  dB.bytes.data(),
                                  s.M,
                                  s.R,
                                  N,
                                  dY_stride,
                                  S_stride,
                                  0.5f,
                                  s.dtype,
                                  s.lora_dtype,
                                  nullptr};
  std::vector<float> workspace3(launch::workspace_lora_expand_backward(expand) / 4);
  expand.workspace = workspace3.data();
  check_threads("lora_expand_backward", {&dS, &dB},
                [&] { launch::lora_expand_backward(expand, nullptr); });

  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t r = 0; r < s.R; ++r) {
      Sum shrunk, back;
      for (int64_t k = 0; k < K; ++k)
        shrunk.add(scaling * x.get(m * x_stride + k), A.get(r * K + k));
      for (int64_t n = 0; n < N; ++n) back.add(0.5 * dY.get(m * dY_stride + n), B.get(n * s.R + r));
      check_sum("lora_shrink", S, m * s.R + r, shrunk);
      check_sum("lora_expand_backward dS", dS, m * s.R + r, back);
    }
    for (int64_t k = 0; k < K; ++k) {
      Sum sum;
      for (int64_t r = 0; r < s.R; ++r) sum.add(scaling * dS_in.get(m * s.R + r), A.get(r * K + k));
      check_sum("lora_shrink_backward dx", dx, m * K + k, sum);
    }
  }
  for (int64_t r = 0; r < s.R; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      Sum sum;
      for (int64_t m = 0; m < s.M; ++m)
        sum.add(scaling * dS_in.get(m * s.R + r), x.get(m * x_stride + k));
      check_sum("lora_shrink_backward dA", dA, r * K + k, sum);
    }
    for (int64_t n = 0; n < N; ++n) {
      Sum sum;
      for (int64_t m = 0; m < s.M; ++m)
        sum.add(dY.get(m * dY_stride + n), S_in.get(m * S_stride + r));
      check_sum("lora_expand_backward dB", dB, n * s.R + r, sum);
    }
  }
}

void test_linear(int64_t K, int64_t N, const Shape& s) {
  const int64_t x_stride = K + 1, dY_stride = N + 2;
  const auto span = [&](int64_t stride, int64_t width) {
    return s.M == 0 ? 0 : (s.M - 1) * stride + width;
  };
  const Buffer x = random_buffer(s.dtype, span(x_stride, K));
  const Buffer dY = random_buffer(s.dtype, span(dY_stride, N));
  const Buffer W = random_buffer(s.lora_dtype, N * K);
  const Buffer bias = random_buffer(s.dtype, N);
  Buffer y(s.dtype, s.M * N), dX(s.dtype, s.M * K);
  LinearParams p{x.bytes.data(),
                 W.bytes.data(),
                 s.bias ? bias.bytes.data() : nullptr,
                 y.bytes.data(),
                 s.M,
                 N,
                 K,
                 x_stride,
                 s.dtype,
                 s.lora_dtype,
                 s.dtype,
                 nullptr};
  std::vector<float> workspace(launch::workspace_linear(p) / 4);
  p.workspace = workspace.data();
  check_threads("linear", {&y}, [&] { launch::linear(p, nullptr); });
  LinearBackwardParams b{dY.bytes.data(), W.bytes.data(), dX.bytes.data(), s.M,    N, K,
                         dY_stride,       s.dtype,        s.lora_dtype,    nullptr};
  std::vector<float> workspace2(launch::workspace_linear_backward(b) / 4);
  b.workspace = workspace2.data();
  check_threads("linear_backward", {&dX}, [&] { launch::linear_backward(b, nullptr); });
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      Sum sum;
      for (int64_t k = 0; k < K; ++k) sum.add(x.get(m * x_stride + k), W.get(n * K + k));
      if (s.bias) sum.add(1.0, bias.get(n));
      check_sum("linear", y, m * N + n, sum);
    }
    for (int64_t k = 0; k < K; ++k) {
      Sum sum;
      for (int64_t n = 0; n < N; ++n) sum.add(dY.get(m * dY_stride + n), W.get(n * K + k));
      check_sum("linear_backward", dX, m * K + k, sum);
    }
  }
}

// ---- half precision ----

void test_half() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = cpu::fp16_to_float(half);
    if (value == value) {
      CHECK(cpu::fp16_from_float(value) == half, "fp16 %04x does not survive", bits);
      CHECK(cpu::bf16_from_float(cpu::bf16_to_float(half)) == half ||
                cpu::bf16_to_float(half) != cpu::bf16_to_float(half),
            "bf16 %04x", bits);
    }
  }
  // Every path converts as the scalar code does: all fp16 and bf16, and a sweep of fp32.
  std::vector<uint16_t> all(65536), back(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> values(65536);
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    const bool fp16 = dtype == DType::kFloat16;
    cpu::kernels().to_float(all.data(), dtype, 65536, values.data());
    for (int i = 0; i < 65536; ++i) {
      const float want = fp16 ? cpu::fp16_to_float(all[i]) : cpu::bf16_to_float(all[i]);
      CHECK(cpu::float_bits(values[i]) == cpu::float_bits(want), "to_float %04x", i);
    }
    for (uint32_t low : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      for (uint32_t i = 0; i < 65536; ++i) values[i] = cpu::float_from_bits(i << 16 | low);
      cpu::kernels().from_float(values.data(), 65536, dtype, back.data());
      for (int i = 0; i < 65536; ++i) {
        const uint16_t want =
            fp16 ? cpu::fp16_from_float(values[i]) : cpu::bf16_from_float(values[i]);
        CHECK(back[i] == want, "from_float %08x: %04x, want %04x", cpu::float_bits(values[i]),
              back[i], want);
        if (failures > 20) return;
      }
    }
  }
}

// No shape takes more than 16 MB of workspace, whatever its bias adds.
// Two panels at once give the bits of one after the other.
void test_two_panels() {
  const cpu::Kernels& simd = cpu::kernels();
  if (simd.multiply_two == nullptr) return;
  constexpr int64_t kWidth = cpu::kPanelWidth;
  for (int64_t depth : {1, 7, 256}) {
    for (int64_t rows : {1, 5, 8, 9, 23}) {
      const Buffer x = random_buffer(DType::kFloat32, rows * depth);
      const Buffer panels = random_buffer(DType::kFloat32, 2 * depth * kWidth);
      const auto* left = reinterpret_cast<const float*>(x.bytes.data());
      const auto* right = reinterpret_cast<const float*>(panels.bytes.data());
      std::vector<float> one(2 * rows * kWidth, 0.5f), two(one);
      for (int64_t tile = 0; tile < 2; ++tile) {
        simd.multiply(left, depth, 1, rows, right + tile * depth * kWidth, depth,
                      one.data() + tile * rows * kWidth);
      }
      simd.multiply_two(left, depth, 1, rows, right, depth, two.data());
      CHECK(std::memcmp(one.data(), two.data(), one.size() * sizeof(float)) == 0,
            "multiply_two of %" PRId64 " rows differs from multiply", rows);
    }
  }
}

void test_workspace() {
  const int64_t most = int64_t{16} << 20;
  LinearParams p{};
  const float bias = 0.0f;
  p.bias = &bias;
  LinearBackwardParams backward{};
  Gemm4bitParams gemm{};
  for (int64_t M : {1, 384, 100000}) {
    for (int64_t K : {576, 4096, 300000}) {
      p.M = backward.M = gemm.M = M;
      p.K = backward.N = gemm.weight.K = K;
      p.N = backward.K = gemm.weight.N = 10000000;
      CHECK(launch::workspace_linear(p) <= most, "linear: workspace");
      CHECK(launch::workspace_linear_backward(backward) <= most, "linear_backward: workspace");
      CHECK(launch::workspace_gemm_4bit(gemm) <= most, "gemm_4bit: workspace");
    }
  }
}

// ---- the list ----

void test_weights() {
  const Normalization absmax = Normalization::kAbsmax;
  const Normalization standard = Normalization::kStandard;
  const Case cases[] = {
      {64, 128, 64, "nf4", absmax, true},
      {33, 576, 64, "nf4", absmax, true},
      {48, 320, 128, "nf4", absmax, false},
      {17, 65, 32, "nf4", absmax, true},
      {5, 77, 4096, "fp4", absmax, false},
      {40, 96, 64, "fp4", absmax, true},
      {19, 256, 32, "linear", absmax, false},
      {31, 129, 0, "nf4", absmax, false},
      {70, 130, 0, "nf4", standard, false},
      {24, 200, 64, "nf4", standard, true},
      {12, 64, 0, "linear", Normalization::kNone, false},
      {1, 1, 64, "nf4", absmax, false},
      {1, 31, 64, "nf4", absmax, true},
      {3, 4097, 256, "nf4", absmax, true},
      {200, 331, 0, "fp4", standard, false},
      {260, 300, 4096, "nf4", standard, true},
      {7, 2050, 2048, "nf4", absmax, true},
      {3, 4288, 64, "nf4", absmax, true},  // x in two pieces, the last an odd number of groups
      {35, 1280, 128, "fp4", absmax, false},
  };
  int turn = 0;
  for (const Case& c : cases) {
    for (DType dtype : kDTypes) {
      Buffer w = random_buffer(dtype, c.N * c.K);
      for (int64_t i = 0; i < std::min<int64_t>(64, w.size()); ++i) w.set(i, 0.0f);  // a zero block
      for (int64_t i = 64; i < std::min<int64_t>(128, w.size()); ++i) w.set(i, 1e-42f);
      if (w.size() > 200) w.set(200, -0.0f);
      const Weight q = quantize(c, w);
      test_decode(q);
      for (int64_t M : {0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 50}) {
        const DType lora = kDTypes[turn % 3];
        const int64_t R = turn % 4 == 0 ? 0 : turn % 4 == 1 ? 8 : turn % 4 == 2 ? 3 : 17;
        const Shape s{M, R, dtype, lora, turn % 2 == 0};
        test_gemm(q, s);
        test_gemm_backward(q, s);
        if (M == 1) test_merge(q, {M, std::max<int64_t>(1, R), dtype, lora, false});
        ++turn;
      }
    }
    std::printf("%s: %d failures\n", describe(c).c_str(), failures);
  }
  const Case large{96, 640, 64, "nf4", absmax, true};
  const Weight q = quantize(large, random_buffer(DType::kFloat32, 96 * 640));
  for (int64_t M : {513, 700}) {
    test_gemm(q, {M, 8, DType::kBFloat16, DType::kFloat32, true});
    test_gemm_backward(q, {M, 8, DType::kFloat32, DType::kFloat32, true});
  }
}

void test_adapters() {
  for (DType dtype : kDTypes) {
    for (int64_t M : {0, 1, 5, 49}) {
      test_linear(67, 33, {M, 0, dtype, kDTypes[M % 3], M != 1});
      test_linear(520, 258, {M, 0, dtype, dtype, M == 1});
    }
  }
  for (DType dtype : kDTypes) {
    for (int64_t M : {0, 1, 5, 47, 49, 300}) {
      for (int64_t R : {1, 8, 19, 65}) {
        test_lora(R == 8 ? 520 : 67, R == 8 ? 258 : 33,
                  {M, R, dtype, M % 2 ? DType::kFloat32 : dtype, false});
      }
    }
  }
  test_lora(100, 60, {5, 1100, DType::kFloat32, DType::kFloat32, false});
}

}  // namespace

int main() {
  if (const char* error = cpu::cpu_path_error()) {
    std::printf("%s\n", error);
    return 77;  // skipped: this CPU lacks the path
  }
  test_half();
  test_bad_weights();
  test_two_panels();
  test_workspace();
  test_embedding_index();
  test_weights();
  test_adapters();
  std::printf("cpu path %s: %d failures\n", cpu::cpu_path(), failures);
  return failures == 0 ? 0 : 1;
}
