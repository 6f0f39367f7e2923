"""Every op on every backend, against the numpy reference: bytes exactly, sums within a calibrated
tolerance. The simt backend runs the CUDA kernels on the host."""

import numpy as np
import pytest
import torch

import reference as R
from cases import (
    CONFIGS,
    DTYPES,
    GEMM_SHAPES,
    WEIGHT_SHAPES,
    Tolerance,
    assert_close,
    assert_same_bytes,
    make_weight,
    quantize,
    random_weight,
    reference_quantize,
)

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# fp32 adapters meet bf16/fp16 activations in tensor cores: the CUDA kernels round S and B to x's
# dtype there, which torch's own fp32 bypass does not.
LORA_TOLERANCE = {"cpu": Tolerance(), "simt": Tolerance(factor=4.0), "cuda": Tolerance(factor=4.0)}


def as_input(t, dtype, backend):
    return t.to(dtype).to(backend.device)


# Bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_quantize_bytes(backend, name, dtype):
    config = CONFIGS[name]
    for shape in WEIGHT_SHAPES:
        weight = random_weight(shape, dtype)
        want = reference_quantize(weight, config)
        packed, absmax, nested, mean = quantize(backend, weight, config)
        assert_same_bytes(packed, want.packed, f"{shape} packed")
        assert_same_bytes(absmax, want.absmax, f"{shape} absmax")
        assert (nested is None) == (want.nested is None) and (mean is None) == (want.mean is None)
        if nested is not None:
            assert_same_bytes(nested, want.nested, f"{shape} nested")
        if mean is not None:
            assert_same_bytes(mean, want.mean, f"{shape} mean")


def test_quantize_extremes(backend):
    """Zeros, subnormals (1 / absmax overflows), huge values, ties and signed zeros."""
    rows = torch.zeros(6, 64)
    rows[1] = 1e-40
    rows[2] = torch.linspace(-1, 1, 64) * 3e37
    rows[3] = torch.linspace(-1, 1, 64)
    rows[4, ::2] = -0.0
    rows[5, :16] = torch.from_numpy(R.make_codebook("nf4").thresholds[[*range(15), 14]])
    rows[5, 63] = 1.0
    for name in ("nf4", "fp4", "linear-32", "standard"):
        config = CONFIGS[name]
        want = reference_quantize(rows, config)
        packed, absmax, nested, _ = quantize(backend, rows, config)
        assert_same_bytes(packed, want.packed, f"{name} packed")
        assert_same_bytes(absmax, want.absmax, f"{name} absmax")
        assert_same_bytes(nested, want.nested, f"{name} nested")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_names_the_first_bad_weight(backend, dtype, bad):
    weight = random_weight((40, 100), dtype)
    weight[30, 7] = bad
    weight[39, 99] = float("nan")
    for name in ("nf4", "nf4-per-tensor", "standard", "none"):
        with pytest.raises(
            RuntimeError, match=r"quantize_4bit: weight has a NaN or an infinity at index \[30, 7\]"
        ):
            quantize(backend, weight, CONFIGS[name])


@pytest.mark.parametrize("num_blocks", [1, 2, 255, 256, 257, 1000, 70000])
def test_quantize_absmax_is_exact_nearest(backend, num_blocks):
    absmax = np.abs(np.random.default_rng(num_blocks).normal(size=num_blocks)).astype(np.float32)
    code, nested = backend.ops.quantize_absmax(
        torch.from_numpy(absmax).view(torch.uint8).to(backend.device)
    )
    want_code, want_nested = R.quantize_absmax(absmax)
    assert_same_bytes(nested, want_nested, "nested")
    assert_same_bytes(code, want_code, "code")
    scales = backend.ops.dequantize_absmax(code, nested)
    assert_same_bytes(scales, R.dequantize_absmax(want_code, want_nested), "scales")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_dequantize_bits(backend, name, dtype):
    for shape in WEIGHT_SHAPES:
        array, q = make_weight(shape, CONFIGS[name], backend.device)
        want = torch.from_numpy(R.dequantize_4bit(array, DTYPE_NAMES[dtype])).to(dtype)
        got = backend.ops.dequantize_4bit(*q.op_args(), dtype)
        assert got.shape == want.shape and got.dtype == dtype
        assert_same_bytes(got, want, f"{shape}")
        out = torch.full(shape, 7.0, dtype=dtype, device=backend.device)
        backend.ops.dequantize_4bit.out(*q.op_args(), out=out)
        assert_same_bytes(out, got, f"{shape} out=")


# Products -----------------------------------------------------------------------------------


def gemm_inputs(shape, dtype, backend, r=8, name="nf4", lora_dtype=torch.float32):
    M, N, K = shape
    array, q = make_weight((N, K), CONFIGS[name], backend.device)
    x = as_input(torch.randn(M, K), dtype, backend)
    A = as_input(torch.randn(r, K) / max(K, 1) ** 0.5, lora_dtype, backend)
    B = as_input(torch.randn(N, r) * 0.05, lora_dtype, backend)
    bias = as_input(torch.randn(N), dtype, backend)
    W = torch.from_numpy(R.dequantize_4bit(array)).to(backend.device, dtype)
    return array, q, x, A, B, bias, W


def np64(t):
    return t.detach().double().cpu().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GEMM_SHAPES, ids=str)
def test_gemm(backend, shape, dtype):
    array, q, x, _, _, bias, W = gemm_inputs(shape, dtype, backend)
    got = backend.ops.gemm_4bit(x, *q.op_args())
    assert got.dtype == dtype
    assert_close(got, x @ W.T, R.linear_4bit(np64(x), array), "y")
    got = backend.ops.gemm_4bit(x, *q.op_args(), bias)
    assert_close(got, x @ W.T + bias, R.linear_4bit(np64(x), array, np64(bias)), "y with bias")


@pytest.mark.parametrize("name", CONFIGS)
def test_gemm_codebooks(backend, name):
    for shape in [(3, 64, 128), (20, 33, 65), (3, 5, 13)]:
        for dtype in (torch.float32, torch.bfloat16):
            array, q, x, _, _, _, W = gemm_inputs(shape, dtype, backend, name=name)
            got = backend.ops.gemm_4bit(x, *q.op_args())
            assert_close(got, x @ W.T, R.linear_4bit(np64(x), array), f"{shape} y")
            dY = as_input(torch.randn(shape[0], shape[1]), dtype, backend)
            got = backend.ops.gemm_4bit_backward(dY, *q.op_args())
            assert_close(got, dY @ W, R.linear_4bit_backward(np64(dY), array)[0], f"{shape} dX")


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GEMM_SHAPES, ids=str)
def test_lora_gemm(backend, shape, dtype, lora_dtype):
    r, scaling = 4, 2.0
    array, q, x, A, B, bias, W = gemm_inputs(shape, dtype, backend, r, lora_dtype=lora_dtype)
    tolerance = LORA_TOLERANCE[backend.name]
    y, S = backend.ops.lora_gemm_4bit(x, *q.op_args(), A, B, scaling, bias)
    want = R.linear_4bit(np64(x), array, np64(bias), np64(A), np64(B), scaling)
    unfused = x @ W.T + bias + (scaling * (x.float() @ A.float().T) @ B.float().T).to(dtype)
    assert_close(y, unfused, want, "y", tolerance)
    assert S.dtype == torch.float32
    assert_close(
        S,
        scaling * (x.float() @ A.float().T),
        scaling * np64(x) @ np64(A).T,
        "S",
        Tolerance(atol=1e-5),
    )
    # The same through precomputed S, as layers that share an input do; S a column slice.
    wide = torch.cat([torch.full_like(S, torch.nan), S], dim=1)[:, r:]
    assert_same_bytes(backend.ops.gemm_4bit(x, *q.op_args(), bias, wide, B), y, "y from S")
    given = backend.ops.lora_gemm_4bit(x, *q.op_args(), A, B, scaling, bias, wide)
    assert_same_bytes(given[0], y, "y with S given")
    assert given[1].shape == (0,) and given[1].dtype == torch.float32

    dY = as_input(torch.randn(shape[0], shape[1]), dtype, backend)
    dX, dA, dB = backend.ops.lora_gemm_4bit_backward(dY, x, S, *q.op_args(), A, B, scaling, True)
    want_dX, want_dA, want_dB = R.lora_linear_4bit_backward(
        np64(dY), np64(x), array, np64(A), np64(B), scaling
    )
    sliced = backend.ops.lora_gemm_4bit_backward(dY, x, wide, *q.op_args(), A, B, scaling, True)
    for got, want_bytes, name in zip(sliced, (dX, dA, dB), ("dX", "dA", "dB"), strict=True):
        assert_same_bytes(got, want_bytes, f"{name} from columns of S")
    dS = scaling * dY.float() @ B.float()
    assert dA.dtype == dB.dtype == lora_dtype
    assert_close(dX, dY @ W + (dS @ A.float()).to(dtype), want_dX, "dX", tolerance)
    assert_close(dA, (dS.T @ x.float()).to(lora_dtype), want_dA, "dA", Tolerance(4.0, 1e-5))
    assert_close(dB, (dY.float().T @ S).to(lora_dtype), want_dB, "dB", Tolerance(4.0, 1e-5))


@pytest.mark.parametrize("r", [1, 3, 8, 16, 33, 64, 130])
def test_lora_ranks(backend, r):
    for dtype in (torch.float32, torch.bfloat16):
        array, q, x, A, B, _, W = gemm_inputs((19, 72, 192), dtype, backend, r)
        y, S = backend.ops.lora_gemm_4bit(x, *q.op_args(), A, B, 0.5)
        want = R.linear_4bit(np64(x), array, None, np64(A), np64(B), 0.5)
        unfused = x @ W.T + (0.5 * (x.float() @ A.T) @ B.T).to(dtype)
        assert_close(y, unfused, want, "y", LORA_TOLERANCE[backend.name])
        dY = as_input(torch.randn(19, 72), dtype, backend)
        dX, dA, dB = backend.ops.lora_gemm_4bit_backward(dY, x, S, *q.op_args(), A, B, 0.5, True)
        want_dX, want_dA, want_dB = R.lora_linear_4bit_backward(
            np64(dY), np64(x), array, np64(A), np64(B), 0.5
        )
        dS = 0.5 * dY.float() @ B
        assert_close(dX, dY @ W + (dS @ A).to(dtype), want_dX, "dX", LORA_TOLERANCE[backend.name])
        assert_close(dA, dS.T @ x.float(), want_dA, "dA", Tolerance(4.0, 1e-5))
        assert_close(dB, dY.float().T @ S, want_dB, "dB", Tolerance(4.0, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_shrink_backward(backend, dtype):
    for M, K, r in [(1, 64, 8), (9, 65, 3), (70, 200, 16), (0, 32, 4)]:
        x, A = (
            as_input(torch.randn(M, K), dtype, backend),
            as_input(torch.randn(r, K), torch.float32, backend),
        )
        dS = as_input(torch.randn(M, r), torch.float32, backend)
        dx, dA = backend.ops.lora_shrink_backward(dS, x, A, 0.5, True)
        assert_close(dx, (0.5 * dS @ A).to(dtype), 0.5 * np64(dS) @ np64(A), "dx")
        assert_close(
            dA, 0.5 * dS.T @ x.float(), 0.5 * np64(dS).T @ np64(x), "dA", Tolerance(4.0, 1e-5)
        )
        none, dA2 = backend.ops.lora_shrink_backward(dS, x, A, 0.5, False)
        assert none.numel() == 0
        assert_same_bytes(dA2, dA, "dA without dx")


def test_strided_inputs(backend):
    """Rows apart, transposes and leading dimensions give what a contiguous copy gives."""
    _, q, _, A, B, _, _ = gemm_inputs((1, 48, 64), torch.float32, backend)
    wide = torch.randn(10, 200, device=backend.device)
    for x in (
        wide[:, 3:67],
        wide.T[:64, :5].T,
        wide[:, :128:2],
        torch.randn(2, 3, 4, 64, device=backend.device),
    ):
        assert_same_bytes(
            backend.ops.gemm_4bit(x, *q.op_args()),
            backend.ops.gemm_4bit(x.contiguous(), *q.op_args()),
            "y",
        )
        y, S = backend.ops.lora_gemm_4bit(x, *q.op_args(), A, B, 1.0)
        assert y.shape == (*x.shape[:-1], 48) and S.shape == (*x.shape[:-1], 8)
        dY = (
            torch.randn(2, *y.shape, device=backend.device)[0]
            .transpose(0, -2)
            .contiguous()
            .transpose(0, -2)
        )
        assert_same_bytes(
            backend.ops.gemm_4bit_backward(dY, *q.op_args()),
            backend.ops.gemm_4bit_backward(dY.contiguous(), *q.op_args()),
            "dX",
        )
    weight = torch.randn(96, 64, device=backend.device)
    for view in (weight.T, weight[::2], weight[:, 1::3]):
        a, b = (
            quantize(backend, view, CONFIGS["nf4"]),
            quantize(backend, view.contiguous(), CONFIGS["nf4"]),
        )
        for got, want in zip(a[:3], b[:3], strict=True):
            assert_same_bytes(got, want, "quantized view")


def test_unaligned_statistics(backend):
    """Packed bytes and statistics may be views that start anywhere in a larger buffer."""
    _, q, x, _, _, _, _ = gemm_inputs((3, 48, 64), torch.bfloat16, backend)

    def shift(t):
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:]

    args = q.op_args()
    shifted = (*(shift(t) for t in args[:3]), *args[3:])
    assert_same_bytes(backend.ops.gemm_4bit(x, *shifted), backend.ops.gemm_4bit(x, *args), "y")
    assert_same_bytes(
        backend.ops.dequantize_4bit(*shifted, torch.float16),
        backend.ops.dequantize_4bit(*args, torch.float16),
        "W",
    )


# Merge, embedding ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "standard", "nf4-per-tensor"])
def test_merge(backend, name, dtype):
    for N, K, r in [(64, 128, 8), (33, 65, 3), (5, 13, 1)]:
        array, q, _, A, B, _, W = gemm_inputs((1, N, K), torch.float32, backend, r, name)
        got = backend.ops.merge_lora_4bit(*q.op_args(), A, B, 2.0, dtype)
        want = R.dequantize_4bit(array).astype(np.float64) + 2.0 * np64(B) @ np64(A)
        assert_close(got, (W + 2.0 * B @ A).to(dtype), want, f"{(N, K, r)} merged")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_bits(backend, dtype):
    for shape in [(50, 64), (33, 65), (7, 40)]:
        array, q = make_weight(shape, CONFIGS["nf4"], backend.device)
        table = torch.from_numpy(R.dequantize_4bit(array, DTYPE_NAMES[dtype])).to(dtype)
        for indices in (
            torch.randint(0, shape[0], (3, 5)),
            torch.tensor(2),
            torch.zeros(0, dtype=torch.int32),
        ):
            got = backend.ops.embedding_4bit(indices.to(backend.device), *q.op_args(), dtype)
            assert got.shape == (*indices.shape, shape[1])
            assert_same_bytes(got, table[indices.long()], "rows")


# Repeatability ------------------------------------------------------------------------------


def test_same_bits_from_run_to_run(backend):
    for shape in [(1, 96, 576), (40, 96, 576), (130, 72, 320)]:
        _, q, x, A, B, bias, _ = gemm_inputs(shape, torch.bfloat16, backend)
        dY = as_input(torch.randn(shape[0], shape[1]), torch.bfloat16, backend)

        def run(x=x, q=q, A=A, B=B, bias=bias, dY=dY):
            y, S = backend.ops.lora_gemm_4bit(x, *q.op_args(), A, B, 2.0, bias)
            return (
                y,
                S,
                *backend.ops.lora_gemm_4bit_backward(dY, x, S, *q.op_args(), A, B, 2.0, True),
            )

        for got, want in zip(run(), run(), strict=True):
            assert_same_bytes(got, want, f"{shape}")
