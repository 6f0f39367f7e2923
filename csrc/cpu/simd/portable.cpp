// The inner kernels in plain C++: the path of every CPU without a file of its own, and the
// reference for those that have one. Bytes and decoded values are the same on every path.
#include <algorithm>
#include <cstring>

#include "../half.h"
#include "../scales.h"
#include "simd.h"

namespace qlora_ext::cpu {
namespace {

void to_float(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* half = static_cast<const uint16_t*>(src);
  switch (dtype) {
    case DType::kFloat32:
      if (n > 0) std::memcpy(dst, src, n * sizeof(float));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i) dst[i] = fp16_to_float(half[i]);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_float(half[i]);
      return;
  }
}

void from_float(const float* src, int64_t n, DType dtype, void* dst) {
  uint16_t* half = static_cast<uint16_t*>(dst);
  switch (dtype) {
    case DType::kFloat32:
      if (n > 0) std::memcpy(dst, src, n * sizeof(float));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = fp16_from_float(src[i]);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = bf16_from_float(src[i]);
      return;
  }
}

// Magnitudes compare as integers, with Inf and NaN the largest, so one pass finds all three.
void max_abs(const float* x, int64_t n, int64_t blocksize, float* largest) {
  for (int64_t first = 0; first < n; first += blocksize) {
    const int64_t end = std::min(n, first + blocksize);
    uint32_t bits = 0;
    for (int64_t i = first; i < end; ++i) bits = std::max(bits, float_bits(x[i]) & 0x7fffffffu);
    *largest++ = float_from_bits(bits);
  }
}

float normalize(float w, const Normalizer& normalizer) {
  const float v = (w - normalizer.mean) * normalizer.inverse_scale;
  return normalizer.clip ? std::min(1.0f, std::max(-1.0f, v)) : v;
}

int nearest_code(float v, const Codebook& codebook) {
  const float compared = codebook.sign_magnitude ? std::fabs(v) : v;
  int rank = 0;
  for (float threshold : codebook.thresholds) rank += compared > threshold;
  const int sign = codebook.sign_magnitude && v < 0.0f ? 8 : 0;
  return codebook.order[rank] | sign;
}

void encode(const float* x, int64_t n, int64_t blocksize, const Normalizer* normalizers,
            const Codebook& codebook, uint8_t* packed) {
  for (int64_t first = 0; first < n; first += blocksize, ++normalizers) {
    const int64_t end = std::min(n, first + blocksize);
    const auto code = [&](int64_t i) {
      return nearest_code(normalize(x[i], *normalizers), codebook);
    };
    for (int64_t i = first; i + 1 < end; i += 2) {
      packed[i / 2] = static_cast<uint8_t>(code(i) << 4 | code(i + 1));
    }
    if (end & 1) packed[end / 2] = static_cast<uint8_t>(code(end - 1) << 4);
  }
}

// Number of dynamic-map thresholds below v, by bisection: 8 steps for 255 thresholds.
uint8_t nearest_scale_code(float v) {
  int code = 0;
  for (int step = 128; step > 0; step /= 2) {
    if (v > kDynamicMapThresholds.values[code + step - 1]) code += step;
  }
  return static_cast<uint8_t>(code);
}

void encode_scales(const float* absmax, int64_t n, float offset, float inverse_scale,
                   uint8_t* code) {
  for (int64_t i = 0; i < n; ++i) {
    code[i] = nearest_scale_code((absmax[i] - offset) * inverse_scale);
  }
}

// Calls run(at, count, table) for the stretches of [first, first + n) that share a block:
// elements first + at ... first + at + count - 1 decode through `table`.
template <class Run>
void for_each_block(const PackedWeight& weight, int64_t first, int64_t n, const Run& run) {
  int64_t block = n > 0 ? first / weight.blocksize : 0;
  for (int64_t at = 0; at < n; ++block) {
    const int64_t block_end = std::min(n, (block + 1) * weight.blocksize - first);
    float table[16];
    scaled_codebook(weight, block, table);
    run(at, block_end - at, table);
    at = block_end;
  }
}

template <class T, class Round>
void decode_as(const PackedWeight& weight, int64_t first, int64_t n, T* out, const Round& round) {
  for_each_block(weight, first, n, [&](int64_t at, int64_t count, const float* table) {
    T rounded[16];
    for (int code = 0; code < 16; ++code) rounded[code] = round(table[code]);
    for (int64_t i = at; i < at + count; ++i) {
      out[i] = rounded[code_at(weight.packed, first + i)];
    }
  });
}

void decode(const PackedWeight& weight, int64_t first, int64_t n, DType dtype, void* out) {
  switch (dtype) {
    case DType::kFloat32:
      return decode_as(weight, first, n, static_cast<float*>(out), [](float v) { return v; });
    case DType::kFloat16:
      return decode_as(weight, first, n, static_cast<uint16_t*>(out), fp16_from_float);
    case DType::kBFloat16:
      return decode_as(weight, first, n, static_cast<uint16_t*>(out), bf16_from_float);
  }
}

void decode_columns(const PackedWeight& weight, int64_t row, int64_t k, int64_t width,
                    int64_t depth, float* panel) {
  std::fill_n(panel, depth * kPanelWidth, 0.0f);
  for (int64_t c = 0; c < width; ++c) {
    const int64_t first = (row + c) * weight.K + k;
    for_each_block(weight, first, depth, [&](int64_t at, int64_t count, const float* table) {
      for (int64_t d = at; d < at + count; ++d) {
        panel[d * kPanelWidth + c] = table[code_at(weight.packed, first + d)];
      }
    });
  }
}

void decode_rows(const PackedWeight& weight, int64_t row, int64_t k, int64_t width, int64_t depth,
                 float* panel) {
  for (int64_t d = 0; d < depth; ++d, panel += kPanelWidth) {
    decode(weight, (row + d) * weight.K + k, width, DType::kFloat32, panel);
    std::fill(panel + width, panel + kPanelWidth, 0.0f);
  }
}

void dot(const PackedWeight& weight, int64_t row, int64_t rows, int64_t k, int64_t depth,
         const float* x, int64_t x_stride, int64_t M, float (*sums)[kMaxDotRows]) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t first = (row + n) * weight.K + k;
    for_each_block(weight, first, depth, [&](int64_t at, int64_t count, const float* table) {
      for (int64_t m = 0; m < M; ++m) {
        float sum = 0.0f;
        for (int64_t i = at; i < at + count; ++i) {
          sum += x[m * x_stride + i] * table[code_at(weight.packed, first + i)];
        }
        sums[n][m] += sum;
      }
    });
  }
}

void pack_rows(const void* src, DType dtype, int64_t stride, int64_t width, int64_t depth,
               float* panel) {
  for (int64_t d = 0; d < depth; ++d, panel += kPanelWidth) {
    to_float(element(src, dtype, d * stride), dtype, width, panel);
    std::fill(panel + width, panel + kPanelWidth, 0.0f);
  }
}

void pack_columns(const void* src, DType dtype, int64_t stride, int64_t width, int64_t depth,
                  float* panel) {
  std::fill_n(panel, depth * kPanelWidth, 0.0f);
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t d = 0; d < depth; ++d) {
      to_float(element(src, dtype, c * stride + d), dtype, 1, panel + d * kPanelWidth + c);
    }
  }
}

void multiply(const float* x, int64_t row_stride, int64_t depth_stride, int64_t rows,
              const float* panel, int64_t depth, float* acc) {
  for (int64_t m = 0; m < rows; ++m, acc += kPanelWidth) {
    float sum[kPanelWidth];
    std::copy_n(acc, kPanelWidth, sum);
    for (int64_t d = 0; d < depth; ++d) {
      const float left = x[m * row_stride + d * depth_stride];
      const float* right = panel + d * kPanelWidth;
      for (int64_t c = 0; c < kPanelWidth; ++c) sum[c] += left * right[c];
    }
    std::copy_n(sum, kPanelWidth, acc);
  }
}

}  // namespace

const Kernels kPortableKernels = {
    .name = "portable",
    .to_float = to_float,
    .from_float = from_float,
    .max_abs = max_abs,
    .encode = encode,
    .encode_scales = encode_scales,
    .decode = decode,
    .decode_columns = decode_columns,
    .decode_rows = decode_rows,
    .dot = dot,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .multiply = multiply,
    .multiply_two = nullptr,
    .pair_bf16 = nullptr,
    .multiply_bf16 = nullptr,
};

}  // namespace qlora_ext::cpu
