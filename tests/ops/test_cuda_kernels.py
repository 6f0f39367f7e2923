"""What only the CUDA kernels have: variants by architecture and M, splits of the contraction,
misaligned operands, rows that must not touch each other, indices beyond 2^31. Run on the emulator
for several architectures and SM counts, and on a GPU where there is one."""

import contextlib

import pytest
import torch

import qlora_ext
import reference as R
from cases import (
    CALIBRATED,
    CONFIGS,
    Tolerance,
    assert_close,
    assert_same_bytes,
    make_weight,
    random_weight,
    to_tensor,
)
from conftest import _load
from qlora_ext import QuantConfig, QuantizedTensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (architecture, SMs): 4 SMs give no splits, 64 many; sm_86 has little shared memory; sm_75 no bf16.
DEVICES = [(90, 4), (80, 64), (86, 16), (75, 64)]


@pytest.fixture(scope="module", params=["simt", "cuda"])
def kernels(request):
    """The shared backend fixture without the CPU."""
    return _load(request.param)


def on(kernels, device):
    if kernels.name == "simt":
        return kernels.ops.device(*device)
    return contextlib.nullcontext()


def launched(kernels, name):
    """Launches of kernels of this name since the last reset, by instantiation; emulator only."""
    return {k: n for k, n in kernels.ops.kernels().items() if n and k.split("<")[0] == name}


def products(kernels, device, M, N, K, dtype, config, rank=5, bias=True):
    """Forward and backward of one shape against fp64, both calibrated against torch's own."""
    array, q = make_weight((N, K), config, kernels.device)
    W = torch.from_numpy(R.dequantize_4bit(array)).double()
    x, dY = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    b = torch.randn(N).to(dtype) if bias else None
    S, dS = torch.randn(M, rank) * 0.3, torch.randn(M, rank) * 0.3
    A, B = torch.randn(rank, K) * 0.1, torch.randn(N, rank) * 0.1
    to = lambda t: None if t is None else t.to(kernels.device)  # noqa: E731
    with on(kernels, device):
        y = kernels.ops.gemm_4bit(to(x), *q.op_args(), to(b), to(S), to(B))
        dX = kernels.ops.gemm_4bit_backward(to(dY), *q.op_args(), to(dS), to(A))
    W_low = W.to(dtype)
    torch_y = x @ W_low.T + S.to(dtype) @ B.to(dtype).T
    torch_dX = dY @ W_low + dS.to(dtype) @ A.to(dtype)
    want_y = x.double() @ W.T + S.double() @ B.double().T
    want_dX = dY.double() @ W + dS.double() @ A.double()
    if bias:
        torch_y, want_y = torch_y + b, want_y + b.double()
    # A result is off by up to half an ulp from rounding alone, which torch's own largest error
    # among a handful of results may by luck not show.
    tolerance = Tolerance(2.0, torch.finfo(dtype).eps / 4)
    assert_close(y, torch_y, want_y, "y", tolerance)
    assert_close(dX, torch_dX, want_dX, "dX", tolerance)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 32, 33, 64, 65])
def test_both_sides_of_every_boundary(kernels, device, dtype, M):
    products(kernels, device, M, 136, 320, dtype, CONFIGS["nf4"])


@pytest.mark.parametrize("N", [1, 8, 31, 33, 64, 65, 127, 200])
@pytest.mark.parametrize("K", [64, 192, 576])
def test_tails(kernels, N, K):
    products(kernels, (90, 64), 5, N, K, BF16, CONFIGS["nf4"], rank=3)


@pytest.mark.parametrize("config", ["nf4-plain-scales", "nf4-4096", "nf4-per-tensor", "fp4"])
@pytest.mark.parametrize("M", [3, 40])
def test_scales(kernels, config, M):
    products(kernels, (80, 16), M, 72, 640, FP16, CONFIGS[config])


@pytest.mark.parametrize("rank", [1, 16, 17, 130])
def test_ranks(kernels, rank):
    products(kernels, (90, 4), 20, 72, 256, BF16, CONFIGS["nf4"], rank)


@pytest.mark.parametrize("device", [(90, 4), (90, 132), (75, 16)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("lora_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 64, 128, 8), (130, 264, 520, 16), (17, 33, 65, 17), (70, 136, 192, 130)], ids=str
)
def test_lora_products_keep_fp32_adapters(kernels, device, dtype, lora_dtype, shape):
    """On tensor cores an fp32 adapter is split into two halves: the error stays near fp32's."""
    M, N, K, r = shape
    x, dY = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B = (torch.randn(r, K) * 0.05).to(lora_dtype), (torch.randn(N, r) * 0.05).to(lora_dtype)
    S, dS = torch.randn(M, r), torch.randn(M, r)
    to = lambda t: t.to(kernels.device)  # noqa: E731
    with on(kernels, device):
        got = [
            kernels.ops.lora_shrink(to(x), to(A), 2.0),
            kernels.ops.lora_shrink_backward(to(dS), to(x), to(A), 2.0, False)[1],
            *kernels.ops.lora_expand_backward(to(dY), to(S), to(B)),
        ]
    x, dY, A, B, S, dS = (t.double() for t in (x, dY, A, B, S, dS))
    want = [2 * x @ A.T, 2 * dS.T @ x, dY @ B, dY.T @ S]
    rounded = 2e-5 if lora_dtype == FP32 else 3e-3  # dA and dB have the adapter's dtype
    for name, g, w, limit in zip(
        ("S", "dA", "dS", "dB"), got, want, (2e-5, rounded, 2e-5, rounded), strict=True
    ):
        assert ((g.cpu().double() - w).norm() / w.norm()).item() <= limit, name


def test_a_large_codebook_fits_fp16(kernels):
    """Values far beyond fp16's range: the table is scaled by a power of two."""
    levels = [1e6 * (i - 7.5) for i in range(16)]
    config = QuantConfig("custom", codebook=levels, normalization="none")
    array = R.quantize_4bit(
        (torch.randn(32, 64) * 3e6).numpy(),
        0,
        R.make_codebook("custom", levels),
        False,
        "none",
    )
    q = to_tensor(array, config, kernels.device)
    x = torch.randn(4, 64) * 1e-5
    y = kernels.ops.gemm_4bit(x.half().to(kernels.device), *q.op_args())
    want = x.half().double() @ torch.from_numpy(R.dequantize_4bit(array)).double().T
    assert ((y.cpu().double() - want).norm() / want.norm()).item() < 1e-3


@pytest.mark.parametrize("power", [-140, -120, 105, 120, 127])
def test_a_codebook_at_the_ends_of_fp32_fits_fp16(kernels, power):
    """Levels up to 2^power, and scales that bring the weights to about 1 or as near as fp32 goes:
    no entry of the 16-bit table overflows, none vanishes."""
    levels = tuple((i - 7.5) / 7.5 * 2.0**power for i in range(16))
    packed = torch.randint(256, (32, 32), dtype=torch.uint8)
    scales = torch.full((32,), 2.0 ** min(-power, 127)).view(torch.uint8)
    q = QuantizedTensor(
        packed, scales, None, None, torch.Size((32, 64)), quant_type="custom", codebook=levels
    )
    w4 = [a.to(kernels.device) if isinstance(a, torch.Tensor) else a for a in q.op_args()]
    x = torch.randn(4, 64).half()
    y = kernels.ops.gemm_4bit(x.to(kernels.device), *w4).cpu().double()
    want = x.double() @ qlora_ext.dequantize_4bit(q, FP32).double().T
    assert ((y - want).norm() / want.norm()).item() < 1e-3


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("config", ["nf4", "nf4-4096", "fp4"])
def test_errors_do_not_add_up_over_positive_inputs(kernels, dtype, config):
    """Activations with a mean: a table rounded as it is would give eight times torch's error."""
    array, q = make_weight((64, 4096), CONFIGS[config], kernels.device)
    W = torch.from_numpy(R.dequantize_4bit(array)).double()
    x = torch.randn(4, 4096).abs().to(dtype)
    want = x.double() @ W.T
    low = (x.float() @ W.to(dtype).float().T).double()  # weights rounded one by one
    y = kernels.ops.gemm_4bit(x.to(kernels.device), *q.op_args()).cpu().double()
    assert (y - want).norm() <= 2 * (low - want).norm() + 2e-3 * want.norm() * (dtype == BF16)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_misaligned_operands_take_another_kernel(kernels, dtype):
    array, q = make_weight((40, 128), CONFIGS["nf4"], kernels.device)
    wide = torch.randn(6, 131, device=kernels.device).to(dtype)
    x = wide[:, 1:129]  # rows 131 apart, 2 or 4 bytes off
    y = kernels.ops.gemm_4bit(x, *q.op_args())
    want = x.double().cpu() @ torch.from_numpy(R.dequantize_4bit(array)).double().T
    torch_y = x.cpu() @ torch.from_numpy(R.dequantize_4bit(array)).to(dtype).T
    assert_close(y, torch_y, want, "y", CALIBRATED)


@pytest.mark.parametrize("M", [7, 20, 60])
def test_rows_do_not_touch_each_other(kernels, M):
    """A NaN in one row of x or dY reaches that row of the result and no other."""
    _, q = make_weight((72, 192), CONFIGS["nf4"], kernels.device)
    for op, width in ((kernels.ops.gemm_4bit, 192), (kernels.ops.gemm_4bit_backward, 72)):
        x = torch.randn(M, width, device=kernels.device).to(BF16)
        clean = op(x, *q.op_args())
        x[M // 2, 5] = float("nan")
        dirty = op(x, *q.op_args())
        assert dirty[M // 2].isnan().all()
        others = [m for m in range(M) if m != M // 2]
        assert_same_bytes(dirty[others], clean[others], "other rows")


@pytest.mark.parametrize("device", [(90, 64), (86, 64)], ids=str)
def test_splits_are_the_same_from_run_to_run(kernels, device):
    _, q = make_weight((64, 16384), CONFIGS["nf4"], kernels.device)
    x = torch.randn(3, 16384, device=kernels.device).to(BF16)
    dY = torch.randn(3, 64, device=kernels.device).to(BF16)
    with on(kernels, device):
        first = kernels.ops.gemm_4bit(x, *q.op_args())
        if kernels.name == "simt":
            assert kernels.ops.plan("gemm_4bit", 3, *q.shape)[0] > 1
            for byte in (0x11, 0xEE):
                with kernels.ops.poison(byte, reverse=True):
                    assert_same_bytes(kernels.ops.gemm_4bit(x, *q.op_args()), first, "y")
        again = kernels.ops.gemm_4bit(x, *q.op_args())
        dX = [kernels.ops.gemm_4bit_backward(dY, *q.op_args()) for _ in range(2)]
    assert_same_bytes(again, first, "y")
    assert_same_bytes(dX[0], dX[1], "dX")


def test_large_m_goes_through_chunks(kernels):
    """fp32 and 65 rows: more than one FFMA tile, so W is decoded in chunks for cuBLAS."""
    N, K = 2100, 2048
    weight = random_weight((N, K)).to(kernels.device)
    packed, absmax, _ = kernels.ops.quantize_4bit(
        weight, 64, "nf4", None, "absmax", 3.0, "none", 1.0
    )
    absmax, nested = kernels.ops.quantize_absmax(absmax)
    w4 = (packed, absmax, nested, None, [N, K], 64, "nf4", None)
    W = kernels.ops.dequantize_4bit(*w4, FP32)
    x = torch.randn(65, K, device=kernels.device)
    if kernels.name == "simt":
        kernels.ops.reset_launches()
    y = kernels.ops.gemm_4bit(x, *w4)
    if kernels.name == "simt":
        _, lines, _ = kernels.ops.plan("gemm_4bit", 65, N, K, dtype=0)
        decoded = sum(launched(kernels, "dequantize_4bit_vector").values())
        assert decoded == -(-N // lines) > 1
    assert_close(y, x @ W.T, x.double().cpu() @ W.double().cpu().T, "y", CALIBRATED)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(
    "dtype, lines, depth",
    [(FP32, 640, 4128), (FP32, 540, 4130), (BF16, 544, 8224)],
    ids=["fp32", "fp32-unaligned", "bf16"],
)
def test_three_chunks(kernels, dtype, lines, depth, lora, direction):
    """On one SM a chunk is one tile of cuBLAS wide, 256 lines: rows forward, columns backward, and
    the last chunk is short. The result is as good as one product's: no chunk rounds another's."""
    forward = direction == "forward"
    M, rank = 65, 5
    to = lambda t: None if t is None else t.to(kernels.device)  # noqa: E731
    q = qlora_ext.quantize_4bit(to(random_weight((lines, depth) if forward else (depth, lines))))
    W = qlora_ext.dequantize_4bit(q, FP32).cpu()
    W = W if forward else W.T  # [lines, depth]
    x = torch.randn(M, depth).to(dtype)
    low, want = x @ W.to(dtype).T, x.double() @ W.double().T
    arguments = [to(x), *q.op_args()]
    bias = torch.randn(lines).to(dtype) if lora and forward else None
    if forward:
        arguments.append(to(bias))
    if bias is not None:
        low, want = low + bias, want + bias.double()
    if lora:
        S, factor = torch.randn(M, rank) * 0.3, torch.randn(lines, rank)  # B, or A transposed
        low = low + S.to(dtype) @ factor.to(dtype).T
        want = want + S.double() @ factor.double().T
        arguments += [to(S), to(factor if forward else factor.T.contiguous())]
    op = kernels.ops.gemm_4bit if forward else kernels.ops.gemm_4bit_backward
    if kernels.name == "simt":
        kernels.ops.reset_launches()
    with on(kernels, (90, 1)):
        got = op(*arguments)
        if kernels.name == "simt":
            assert sum(n for k, n in kernels.ops.kernels().items() if "dequantize" in k) == 3
            with kernels.ops.poison(0x11, reverse=True):
                assert_same_bytes(op(*arguments), got, "another poison")
    tolerance = Tolerance(2.0, torch.finfo(dtype).eps / 4)
    assert_close(got, low, want, "y" if forward else "dX", tolerance)


@pytest.mark.parametrize("K", [64, 41])
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_an_index_out_of_range_stops_the_kernel(kernels, K, bad):
    """By a sentence and a trap, as torch's own embedding: nothing is read through the index, and
    nothing waits for the check."""
    if kernels.name != "simt":
        pytest.skip("a trap ends the process's CUDA context")
    q = qlora_ext.quantize_4bit(random_weight((9, K)))
    indices = torch.tensor([[0, 8], [bad, 3]])
    says = rf"embedding_4bit: .*: indices has {bad} at flat position 2, want values in \[0, 9\)"
    with pytest.raises(RuntimeError, match=says):
        kernels.ops.embedding_4bit(indices, *q.op_args(), FP32)


def test_lora_products_of_8_million_rows(kernels):
    """More tiles of 128 rows than a grid has along y."""
    if kernels.name != "simt":
        pytest.skip("needs the emulator's last_blocks: torch would check it in memory")
    M, tail = 65536 * 128 + 5, torch.randn(5, 8).to(BF16)
    x, A = torch.empty(M, 8, dtype=BF16), torch.randn(3, 8)
    x[-5:] = tail
    with kernels.ops.last_blocks(1):
        S = kernels.ops.lora_shrink(x, A, 1.0)
    torch.testing.assert_close(S[-5:].double(), tail.double() @ A.double().T, atol=1e-4, rtol=1e-4)


def test_lora_products_in_fp16_keep_fp32s_range(kernels):
    """x and dY in fp16, down to its subnormals, times values far outside fp16's range."""
    x, dY = (torch.randn(70, n).half() * scale for n, scale in ((128, 1e-6), (64, 1e4)))
    A, B = torch.randn(16, 128) * 1e8, torch.randn(64, 16) * 1e-9
    S, dS = torch.randn(70, 16) * 1e7, torch.randn(70, 16) * 1e-12
    to = lambda t: t.to(kernels.device)  # noqa: E731
    with on(kernels, (80, 4)):
        got = [
            kernels.ops.lora_shrink(to(x), to(A), 1.0),
            kernels.ops.lora_shrink_backward(to(dS), to(x), to(A), 1.0, False)[1],
            *kernels.ops.lora_expand_backward(to(dY), to(S), to(B)),
        ]
    x, dY, A, B, S, dS = (t.double() for t in (x, dY, A, B, S, dS))
    for name, g, w in zip(
        ("S", "dA", "dS", "dB"), got, (x @ A.T, dS.T @ x, dY @ B, dY.T @ S), strict=True
    ):
        assert ((g.cpu().double() - w).norm() / w.norm()).item() <= 2e-5, name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_lora_products_keep_inf(kernels, dtype):
    """An Inf in an fp32 adapter or dS meets no lo half that would make it NaN."""
    x, dY = torch.rand(9, 64) + 0.5, torch.rand(9, 40) + 0.5
    A, B, S = torch.rand(4, 64), torch.rand(40, 4), torch.rand(9, 4)
    A[1, 3] = B[7, 2] = S[5, 1] = float("inf")
    A[2, 3] = torch.finfo(FP32).max  # rounds to Inf in bf16
    to = lambda t: t.to(kernels.device)  # noqa: E731
    x, dY = to(x.to(dtype)), to(dY.to(dtype))
    got = kernels.ops.lora_shrink(x, to(A), 1.0)
    assert got[:, 1:3].isinf().all() and got[:, [0, 3]].isfinite().all()
    dA = kernels.ops.lora_shrink_backward(to(S), x, to(A), 1.0, False)[1]
    assert dA[1].isinf().all() and dA[[0, 2, 3]].isfinite().all()
    dS, dB = kernels.ops.lora_expand_backward(dY, to(S), to(B))
    assert dS[:, 2].isinf().all() and dS[:, [0, 1, 3]].isfinite().all()
    assert dB[:, 1].isinf().all() and dB[:, [0, 2, 3]].isfinite().all()


def test_more_than_2_31_elements(kernels):
    """The last blocks of a weight beyond 2^31 elements, over reserved, untouched memory."""
    if kernels.name != "simt":
        pytest.skip("needs the emulator's last_blocks: 7 GB of real memory otherwise")
    K = 4096
    N = 2**31 // K + 8
    array, small = make_weight((8, K), QuantConfig(double_quant=False))
    packed = torch.empty(N * K // 2, dtype=torch.uint8)
    absmax = torch.empty(N * K // 64 * 4, dtype=torch.uint8)
    packed[-small.packed.numel() :] = small.packed.reshape(-1)
    absmax[-small.absmax.numel() :] = small.absmax.reshape(-1)
    w4 = (packed, absmax, None, None, [N, K], 64, "nf4", None)
    want = torch.from_numpy(R.dequantize_4bit(array))
    out = torch.empty(N, K, dtype=BF16)
    with kernels.ops.last_blocks(2):
        kernels.ops.dequantize_4bit.out(*w4, out=out)
        assert_same_bytes(out[-2:], want[-2:].to(BF16), "dequantize_4bit")
        x = torch.randn(1, K).to(BF16)
        y = kernels.ops.gemm_4bit(x, *w4)
        assert_close(y[:, -8:], x @ want.to(BF16).T, x.double() @ want.double().T, "y", CALIBRATED)
        rows = torch.tensor([N - 1, N - 3])
        got = kernels.ops.embedding_4bit(rows, *w4, FP32)
        assert_same_bytes(got, want[[7, 5]], "embedding_4bit")
    del out
    weight = torch.empty(N, K, dtype=FP16)
    weight[-8:] = (random_weight((8, K)) * 4).to(FP16)
    with kernels.ops.last_blocks(2):
        got, scales, _ = kernels.ops.quantize_4bit(
            weight, 64, "nf4", None, "absmax", 3.0, "none", 1.0
        )
    again, again_scales, _ = kernels.ops.quantize_4bit(
        weight[-2:].clone(), 64, "nf4", None, "absmax", 3.0, "none", 1.0
    )
    assert_same_bytes(got[-K:], again, "quantize_4bit")
    assert_same_bytes(scales[-again_scales.numel() :], again_scales, "absmax")
