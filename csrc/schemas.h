// Every op's schema on one screen. Schemas are a contract: the only allowed change is a new last
// argument with a default.
//
// W4 is a 4-bit weight of `shape` (N = product of all but the last dimension, K = the last):
//   packed    uint8, ceil(N * K / 2) bytes, flat row-major, high nibble = even element
//   absmax    uint8: 8-bit scale codes [num_blocks] if `nested` is given, else fp32 bytes [4 * num_blocks]
//   nested    uint8: fp32 bytes [4 * (1 + ceil(num_blocks / 256))]: offset, then absmax2
//   mean      uint8: fp32 bytes [4 * num_blocks], normalization "standard" only
//   blocksize elements per scale, a power of two from 32 to 4096; 0 = one scale for the tensor
//   codebook  16 values, for quant_type "custom" only
// Statistics are bytes, so that .to(bfloat16) and mixed-precision sharding leave them alone.
// S and dS are fp32 [M, R] and carry the scaling; x, dY, y, dX share one of fp32, bf16, fp16.
#pragma once

#define QLORA_EXT_W4                                                                         \
  "Tensor packed, Tensor absmax, Tensor? nested, Tensor? mean, int[] shape, int blocksize, " \
  "str quant_type, float[]? codebook"

namespace qlora_ext {

constexpr const char* kSchemas[] = {
    "quantize_4bit(Tensor weight, int blocksize, str quant_type, float[]? codebook, str normalization, "
    "float std_factor, str companding, float companding_k) -> (Tensor packed, Tensor absmax, Tensor mean)",
    "quantize_absmax(Tensor absmax) -> (Tensor code, Tensor nested)",
    "dequantize_absmax(Tensor code, Tensor nested) -> Tensor",
    "dequantize_4bit(" QLORA_EXT_W4 ", ScalarType dtype) -> Tensor",
    "dequantize_4bit.out(" QLORA_EXT_W4 ", *, Tensor(a!) out) -> ()",
    // y = x W^T + bias + S B^T. Layers that share an input (q, k, v) can share one lora_shrink over
    // their stacked A's; each then takes its columns of S.
    "gemm_4bit(Tensor x, " QLORA_EXT_W4
    ", Tensor? bias=None, Tensor? lora_S=None, Tensor? lora_B=None) -> Tensor",
    // dX = dY W + dS A.
    "gemm_4bit_backward(Tensor dY, " QLORA_EXT_W4
    ", Tensor? lora_dS=None, Tensor? lora_A=None) -> Tensor",
    // S = scaling x A^T.
    "lora_shrink(Tensor x, Tensor lora_A, float scaling) -> Tensor",
    // dx = scaling dS A (empty unless need_dx), dA = scaling dS^T x.
    "lora_shrink_backward(Tensor dS, Tensor x, Tensor lora_A, float scaling, bool need_dx) -> (Tensor dx, Tensor dA)",
    // dS = dY B, dB = dY^T S: two products.
    "lora_expand_backward(Tensor dY, Tensor lora_S, Tensor lora_B) -> (Tensor dS, Tensor dB)",
    // y = x W^T + bias + scaling (x A^T) B^T. Also returns S for the backward. A caller that has S
    // already (columns of one lora_shrink for q, k and v) passes it as lora_S; S comes back as [0].
    "lora_gemm_4bit(Tensor x, " QLORA_EXT_W4
    ", Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias=None, Tensor? lora_S=None) "
    "-> (Tensor y, Tensor S)",
    "lora_gemm_4bit_backward(Tensor dY, Tensor x, Tensor lora_S, " QLORA_EXT_W4
    ", Tensor lora_A, Tensor lora_B, "
    "float scaling, bool need_dx) -> (Tensor dX, Tensor dA, Tensor dB)",
    // dequantize(W) + scaling B A in fp32, rounded once.
    "merge_lora_4bit(" QLORA_EXT_W4
    ", Tensor lora_A, Tensor lora_B, float scaling, ScalarType dtype) -> Tensor",
    "embedding_4bit(Tensor indices, " QLORA_EXT_W4 ", ScalarType dtype) -> Tensor",
    // Mixtures of experts. W4 is a stack of shape [E, N, K], K even: each expert has the bytes that
    // packing it alone gives, so packed is [E, N, K / 2] and each statistic [E, ...], and these may
    // be slices of dimension 0. The M rows of y are sorted by expert, and offsets int32 [E] is where
    // each expert's rows end. Rows past the last end are zero in every result. x is [T, K]; rows
    // int32 [M] says which row of x each takes, and without it M = T.
    //
    // y = x[rows] W_e^T + bias_e + S B_e^T; bias [E, N], S [M, R], lora_B [E, N, R].
    "grouped_gemm_4bit(Tensor x, " QLORA_EXT_W4
    ", Tensor offsets, Tensor? rows=None, Tensor? bias=None, Tensor? lora_S=None, "
    "Tensor? lora_B=None) -> Tensor",
    // dX [M, K] = dY W_e + dS A_e; lora_A [E, R, K].
    "grouped_gemm_4bit_backward(Tensor dY, " QLORA_EXT_W4
    ", Tensor offsets, Tensor? lora_dS=None, Tensor? lora_A=None) -> Tensor",
    // S = scaling x[rows] A_e^T.
    "grouped_lora_shrink(Tensor x, Tensor lora_A, float scaling, Tensor offsets, Tensor? rows=None) -> Tensor",
    // dx [M, K] = scaling dS A_e (empty unless need_dx), dA = scaling dS^T x[rows].
    "grouped_lora_shrink_backward(Tensor dS, Tensor x, Tensor lora_A, float scaling, Tensor offsets, "
    "Tensor? rows, bool need_dx) -> (Tensor dx, Tensor dA)",
    // dS = dY B_e, dB = dY^T S.
    "grouped_lora_expand_backward(Tensor dY, Tensor lora_S, Tensor lora_B, Tensor offsets) "
    "-> (Tensor dS, Tensor dB)",
    // y = x[rows] W_e^T + bias_e + scaling (x[rows] A_e^T) B_e^T, and S for the backward.
    "grouped_lora_gemm_4bit(Tensor x, " QLORA_EXT_W4
    ", Tensor lora_A, Tensor lora_B, float scaling, Tensor offsets, Tensor? rows=None, "
    "Tensor? bias=None) -> (Tensor y, Tensor S)",
    "grouped_lora_gemm_4bit_backward(Tensor dY, Tensor x, Tensor lora_S, " QLORA_EXT_W4
    ", Tensor lora_A, Tensor lora_B, float scaling, Tensor offsets, Tensor? rows, bool need_dx) "
    "-> (Tensor dX, Tensor dA, Tensor dB)",
    // out[t] = sum of values[order[i]] for ends[t - 1] <= i < ends[t]; order int32 [L], ends int32
    // [T]. With order the stable argsort of rows it gives the gradient of x.
    "sum_rows(Tensor values, Tensor order, Tensor ends) -> Tensor",
    // CPU only: y = x W^T + bias and dX = dY W with a dense W [N, K], for layers left unquantized.
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_backward(Tensor dY, Tensor weight) -> Tensor",
};

}  // namespace qlora_ext
