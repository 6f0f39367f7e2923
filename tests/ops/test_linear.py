"""The dense product of the CPU backend, for layers that stay unquantized in bf16 or fp16."""

import pytest
import torch
import torch.nn.functional as F

from qlora_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(M, N, K, dtype, leading=()):
    torch.manual_seed(M + N + K)
    x = torch.randn(*leading, M, K).to(dtype)
    return x, (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)


def within_rounding(got, want, sums, dtype):
    """`want` in fp64; `sums` is the same product of absolute values. The bound is one rounding to
    dtype, and what sums in fp32 lose, in any order: the machine and its random numbers differ."""
    error = (got.double() - want).abs()
    bound = want.abs() * torch.finfo(dtype).eps + 8 * sums * torch.finfo(torch.float32).eps
    assert bool((error <= bound).all()), f"off by {(error - bound).max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 67), (5, 48, 64), (70, 129, 300), (0, 8, 16)], ids=str)
def test_linear_and_gradients(shape, dtype):
    x, weight, bias = inputs(*shape, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    y = ops.linear(x, weight, bias)
    dY = torch.randn_like(y)
    results = [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dY)]

    def in_fp64(change=lambda t: t):
        exact = [change(t.detach().double()).requires_grad_() for t in (x, weight, bias)]
        y = F.linear(*exact)
        return [y.detach(), *torch.autograd.grad(y, exact, change(dY.double()))]

    for got, want, sums in zip(results, in_fp64(), in_fp64(torch.abs), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        within_rounding(got, want, sums, dtype)


def test_leading_dimensions_strides_and_mixed_dtypes():
    x, weight, bias = inputs(6, 20, 32, torch.float32, leading=(2, 3))
    strided = torch.empty(2, 3, 6, 40)[..., :32].copy_(x)
    torch.testing.assert_close(ops.linear(strided, weight, bias), F.linear(x, weight, bias))
    low = weight.bfloat16()
    torch.testing.assert_close(ops.linear(x, low), F.linear(x, low.float()))


def test_frozen_weight_needs_no_input_kept():
    x, weight, _ = inputs(4, 8, 16, torch.bfloat16)
    y = ops.linear(x.requires_grad_(), weight)
    assert [t is None for t in y.grad_fn.saved_tensors] == [False, True]


def test_same_bits_for_any_number_of_threads():
    x, weight, bias = inputs(100, 90, 520, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            results.append(
                (
                    ops.linear(x, weight, bias),
                    torch.ops.qlora_ext.linear_backward(x[:, :90], weight),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for y, dX in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dX, results[0][1])


def test_bad_input():
    x, weight, bias = inputs(4, 8, 16, torch.float32)
    with pytest.raises(RuntimeError, match=r"linear: x has 15 columns, want 16"):
        ops.linear(x[:, :15], weight)
    with pytest.raises(RuntimeError, match=r"linear: weight has shape \[16\], want \[N, K\]"):
        ops.linear(x, weight[0])
    with pytest.raises(RuntimeError, match=r"linear: bias"):
        ops.linear(x, weight, bias[:3])
    with pytest.raises(RuntimeError, match=r"linear: weight has dtype"):
        ops.linear(x, weight.to(torch.int8))
