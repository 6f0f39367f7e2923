"""The numpy reference against the format's own figures: it judges everything else."""

import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

import reference as R
from paths import REPOSITORY

NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)


def random_weight(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_rmse(weight, q):
    return np.sqrt(np.mean((R.dequantize_4bit(q) - weight) ** 2) / np.mean(weight**2))


def test_nf4_derived_from_quantiles_has_the_checkpoints_bits():
    assert [f"{bits:08x}" for bits in R.nf4_levels().view(np.uint32)] == NF4_BITS.split(" ")


def test_fp4_and_linear_tables():
    positive = [0, 0.0052083335, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25]
    fp4 = R.fp4_levels()
    np.testing.assert_array_equal(fp4[:8], np.array(positive, np.float32))
    np.testing.assert_array_equal(fp4[8:], -fp4[:8])
    assert not np.signbit(fp4[8])
    half = np.array([0.07, 0.20, 0.33, 0.47, 0.60, 0.73, 0.87, 1.0], np.float32)
    linear = R.linear_levels().astype(np.float32)
    np.testing.assert_array_equal(linear, np.concatenate([-half[::-1], half]))


def test_dynamic_map_has_the_stated_shape_and_the_sources_bits():
    table = R.dynamic_map()
    assert table.dtype == np.float32 and table.shape == (256,)
    assert (np.diff(table) > 0).all()
    assert table[127] == 0 and table[255] == 1 and table[0] == np.float32(-0.99296874)
    header = REPOSITORY / "csrc" / "codebook.h"
    macro = re.search(r"#define QLORA_EXT_DYNAMIC_MAP(.*?)// clang", header.read_text(), re.S)
    literals = [float(v) for v in re.findall(r"([-+.\de]+)f\b", macro[1])]
    np.testing.assert_array_equal(table, np.array(literals, np.float32))


def test_worked_example():
    q = R.quantize_4bit(
        [[0.8, -0.6], [0.1, -0.9]],
        codebook=R.make_codebook("linear"),
        normalization="none",
        double_quant=False,
    )
    np.testing.assert_array_equal(q.codes, [[14, 3], [8, 1]])
    want = np.array([[0.87, -0.60], [0.07, -0.87]], np.float32)
    np.testing.assert_array_equal(R.dequantize_4bit(q), want)


@pytest.mark.parametrize("quant_type, rmse", [("nf4", 0.0920), ("fp4", 0.1219)])
def test_relative_rmse_on_normal_weights(quant_type, rmse):
    weight = random_weight(1 << 19)
    q = R.quantize_4bit(weight, 64, R.make_codebook(quant_type), double_quant=False)
    assert relative_rmse(weight, q) == pytest.approx(rmse, abs=2e-4)


def test_standard_normalization_errors_as_the_format_states():
    weight = random_weight(1 << 16)
    errors = [
        relative_rmse(weight, R.quantize_4bit(weight, 64, normalization="standard", std_factor=c))
        for c in (3.0, 1.0)
    ]
    assert errors[0] == pytest.approx(0.098, abs=1e-3)
    assert errors[1] == pytest.approx(0.382, abs=2e-3)


def test_bits_per_weight_at_block_64():
    q = R.quantize_4bit(random_weight(512, 512))
    bits = 8 * (q.packed.nbytes + q.absmax.nbytes + q.nested.nbytes) / (512 * 512)
    assert bits == pytest.approx(4.127, abs=2e-3)


def test_ties_take_the_lower_code():
    book = R.make_codebook("nf4")
    q = R.quantize_4bit(book.thresholds, 0, book, double_quant=False, normalization="none")
    np.testing.assert_array_equal(q.codes, np.arange(15))


def test_fp4_rule_is_sign_magnitude():
    book = R.make_codebook("fp4")
    weight = np.array([1e-5, -1e-5, 0.0, -1.0, 0.003, -0.003], np.float32)
    q = R.quantize_4bit(weight, 0, book, double_quant=False, normalization="none")
    np.testing.assert_array_equal(q.codes, [0, 8, 0, 11, 1, 9])


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 2e-39])
def test_zero_and_vanishing_blocks_take_the_code_of_zero(tiny):
    weight = np.full(64, tiny, np.float32)
    q = R.quantize_4bit(weight, 64, double_quant=False)
    assert (q.packed == 0x77).all()
    assert q.absmax[0] == np.float32(tiny)
    assert not R.dequantize_4bit(q).any()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 129])
def test_short_blocks_and_odd_counts(numel):
    weight = random_weight(numel)
    q = R.quantize_4bit(weight, 64, double_quant=False)
    assert q.packed.size == (numel + 1) // 2 and q.absmax.size == -(-numel // 64)
    assert q.absmax[-1] == np.abs(weight[(numel - 1) // 64 * 64 :]).max()
    if numel % 2:
        assert q.packed[-1] & 15 == 0
    assert R.dequantize_4bit(q).shape == (numel,)


def test_non_finite_weight_is_named():
    weight = random_weight(100)
    weight[[37, 80]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"weight\[37\] is nan"):
        R.quantize_4bit(weight)


@pytest.mark.parametrize("companding", ["logarithmic", "exponential"])
@pytest.mark.parametrize("k", [0.1, 1.0, 15.0])
def test_companding_picks_the_nearest_companded_level(companding, k):
    book = R.make_codebook("linear", companding=companding, companding_k=k)
    w = np.linspace(-1, 1, 4001).astype(np.float32)
    q = R.quantize_4bit(w, 0, book, double_quant=False, normalization="none")
    magnitude = np.abs(w).astype(np.float64)
    if companding == "logarithmic":
        companded = np.sign(w) * np.log(1 + k * magnitude) / np.log(1 + k)
    else:
        companded = np.sign(w) * (np.exp(k * magnitude) - 1) / (np.exp(k) - 1)
    distance = np.abs(companded[:, None] - R.linear_levels())
    nearest = np.argmin(distance, axis=1)
    clear = np.sort(distance, axis=1)
    clear = clear[:, 1] - clear[:, 0] > 1e-6  # away from ties
    np.testing.assert_array_equal(q.codes[clear], nearest[clear])
    assert book.values[0] == -1 and book.values[15] == 1


def test_custom_levels_keep_their_order():
    levels = np.array([3, -1, 0, 2, 1, -2, 5, 4, -3, 7, 6, -4, 8, 9, -5, 10], np.float32)
    q = R.quantize_4bit(
        levels, 0, R.make_codebook("custom", levels), double_quant=False, normalization="none"
    )
    np.testing.assert_array_equal(q.codes, np.arange(16))
    np.testing.assert_array_equal(R.dequantize_4bit(q), levels)


def test_double_quantization_takes_the_nearest_code():
    absmax = np.abs(random_weight(1000, seed=3)) + 1
    code, nested = R.quantize_absmax(absmax)
    assert nested.shape == (1 + 4,)
    assert nested[0] == np.float32(math.fsum(absmax) / 1000)
    table = R.dynamic_map().astype(np.float64)
    v = (absmax.astype(np.float64) - nested[0]) / nested[1:][np.arange(1000) // 256]
    best = np.abs(v[:, None] - table).min(axis=1)
    assert (np.abs(v - table[code]) <= best + 1e-6).all()
    assert np.abs(R.dequantize_absmax(code, nested) - absmax).max() < 0.02


def test_equal_scales_decode_exactly():
    code, nested = R.quantize_absmax(np.full(5, 0.1, np.float32))
    assert (code == 127).all() and nested[1] == 0
    np.testing.assert_array_equal(R.dequantize_absmax(code, nested), np.full(5, np.float32(0.1)))


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 70000])
def test_tree_sum(n):
    values = random_weight(n).astype(np.float64)
    assert R.tree_sum(values) == pytest.approx(math.fsum(values), abs=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_torchs(dtype):
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-80, 80, 20000)) * rng.choice([-1, 1], 20000)
    x = np.append(
        x.astype(np.float32), np.array([0, 1e-45, 6e-8, 65519, 65520, 3.39e38], np.float32)
    )
    want = torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(R.round_to(x, dtype), want)


def test_gradients_are_the_forwards():
    rng = np.random.default_rng(1)
    q = R.quantize_4bit(random_weight(6, 10), 32)
    x, A, B = (
        torch.tensor(rng.standard_normal(shape), requires_grad=True)
        for shape in ((2, 3, 10), (2, 10), (6, 2))
    )
    W = torch.from_numpy(R.dequantize_4bit(q)).double()
    dY = torch.tensor(rng.standard_normal((2, 3, 6)))
    y = x @ W.T + 0.5 * (x @ A.T) @ B.T
    y.backward(dY)
    x64, A64, B64 = (t.detach().numpy() for t in (x, A, B))
    got = R.linear_4bit(x64, q, None, A64, B64, 0.5)
    np.testing.assert_allclose(got, y.detach(), rtol=1e-12)
    gradients = R.lora_linear_4bit_backward(dY.numpy(), x64, q, A64, B64, 0.5)
    for got, want in zip(gradients, (x, A, B), strict=True):
        np.testing.assert_allclose(got, want.grad, rtol=1e-10, atol=1e-12)
    merged = R.merge_lora_4bit(q, A64, B64, 0.5, "float32")
    np.testing.assert_allclose(merged, (W + 0.5 * B @ A).detach(), rtol=1e-6)


def test_linear_thresholds_decide_as_the_decimal_midpoints_do():
    levels = [Fraction(round(100 * level), 100) for level in R.linear_levels()]
    midpoints = [(a + b) / 2 for a, b in pairwise(levels)]
    near = np.array([float(m) for m in midpoints], np.float32)
    weight = np.concatenate(
        [np.nextafter(near, np.float32(-9)), near, np.nextafter(near, np.float32(9))]
    )
    q = R.quantize_4bit(weight, 0, R.make_codebook("linear"), normalization="none")
    want = [sum(Fraction(float(w)) > m for m in midpoints) for w in weight]
    np.testing.assert_array_equal(q.codes, want)
