"""More than 2^31 elements: the last blocks of every grid, over memory that is reserved and, but for
its end, never touched."""

import pytest
import torch

import qlora_ext  # noqa: F401  (the CPU backend's ops)
from simt import build

K = 4096
N = 2**31 // K + 40  # 2^31 elements, and a bit
TAIL = 40  # rows that hold something
BLOCKS = K // 64  # scales per row


@pytest.fixture(scope="module")
def simt():
    return build.load_simt()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "nested"])
def weights(request):
    """(W4 of N rows, W4 of its last TAIL rows); the scales are fp32, or 8-bit codes."""
    w = torch.randn(TAIL, K, generator=torch.Generator().manual_seed(0)) * 0.05
    args = (64, "nf4", None, "absmax", 3.0, "none", 1.0)
    packed_tail, absmax_tail, _ = torch.ops.qlora_ext.quantize_4bit(w, *args)
    packed = torch.empty(N * K // 2, dtype=torch.uint8)
    packed[-packed_tail.numel() :] = packed_tail.flatten()
    nested = nested_tail = None
    if request.param:  # groups of 256 scales: the tail's are whole ones
        absmax_tail, nested_tail = torch.ops.qlora_ext.quantize_absmax(absmax_tail)
        nested = torch.empty(4 * (1 + N * BLOCKS // 256), dtype=torch.uint8)
        nested[:4] = nested_tail[:4]
        nested[-(nested_tail.numel() - 4) :] = nested_tail[4:]
    absmax = torch.empty((1 if request.param else 4) * N * BLOCKS, dtype=torch.uint8)
    absmax[-absmax_tail.numel() :] = absmax_tail
    rest = (64, "nf4", None)
    tail = (packed_tail, absmax_tail, nested_tail, None, [TAIL, K], *rest)
    return (packed, absmax, nested, None, [N, K], *rest), tail


def last(ops, weights, rows, dtype=torch.float32):
    return ops.dequantize_4bit(*weights[1], dtype)[-rows:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dequantize(simt, weights, dtype):
    out = torch.empty(N, K, dtype=dtype)
    with simt.last_blocks(4):
        simt.dequantize_4bit.out(*weights[0], out=out)
    assert torch.equal(out[-2:], last(torch.ops.qlora_ext, weights, 2, dtype))


def test_quantize(simt):
    w = torch.empty(N, K, dtype=torch.bfloat16)
    w[-2:] = torch.randn(2, K, generator=torch.Generator().manual_seed(1))
    args = (64, "nf4", None, "absmax", 3.0, "none", 1.0)
    with simt.last_blocks(2):
        packed, absmax, _ = simt.quantize_4bit(w, *args)
    want_packed, want_absmax, _ = torch.ops.qlora_ext.quantize_4bit(w[-2:].clone(), *args)
    assert torch.equal(packed.flatten()[-K // 2 :], want_packed.flatten()[-K // 2 :])
    assert torch.equal(absmax[-4 * BLOCKS :], want_absmax[-4 * BLOCKS :])


def test_embedding(simt, weights):
    got = simt.embedding_4bit(torch.tensor([N - 1, N - 7]), *weights[0], torch.float32)
    want = last(torch.ops.qlora_ext, weights, TAIL)
    assert torch.equal(got, want[[-1, -7]])


def test_merge(simt, weights):
    g = torch.Generator().manual_seed(2)
    A, B = torch.randn(2, K, generator=g), torch.zeros(N, 2)
    B[-TAIL:] = torch.randn(TAIL, 2, generator=g)
    with simt.last_blocks(1):
        got = simt.merge_lora_4bit(*weights[0], A, B, 0.5, torch.float32)[-4:, -16:]
    want = torch.ops.qlora_ext.merge_lora_4bit(*weights[1], A, B[-TAIL:], 0.5, torch.float32)
    torch.testing.assert_close(got, want[-4:, -16:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemm(simt, weights, dtype):
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(3)).to(dtype)
    with simt.last_blocks(1):
        got = simt.gemm_4bit(x, *weights[0])[:, -8:]
    want = x.double() @ last(torch.ops.qlora_ext, weights, 8).double().T
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (got.double() - want).abs().max() <= limit * want.abs().max()


def test_gemm_backward_columns(simt):
    # dX of a weight with few rows and more than 2^31 elements: the last columns.
    rows, columns = 8, 2**28 + 512
    g = torch.Generator().manual_seed(4)
    w = torch.randn(rows, 512, generator=g) * 0.05
    args = (64, "nf4", None, "absmax", 3.0, "none", 1.0)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    absmax = torch.empty(rows, columns // 64, dtype=torch.float32)
    packed_end, absmax_end, _ = torch.ops.qlora_ext.quantize_4bit(w, *args)
    packed[:, -256:] = packed_end.view(rows, 256)
    absmax[:, -8:] = absmax_end.view(torch.float32).view(rows, 8)
    w4 = (packed.flatten(), absmax.flatten().view(torch.uint8), None, None, [rows, columns])
    dY = torch.randn(1, rows, generator=g).bfloat16()
    with simt.last_blocks(1):
        got = simt.gemm_4bit_backward(dY, *w4, 64, "nf4", None)[:, -64:]
    small = (packed_end, absmax_end, None, None, [rows, 512], 64, "nf4", None)
    dense = torch.ops.qlora_ext.dequantize_4bit(*small, torch.float32)
    want = dY.double() @ dense.double()[:, -64:]
    assert (got.double() - want).abs().max() <= 1e-2 * want.abs().max()
