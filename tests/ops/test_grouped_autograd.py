"""The experts' ops under autograd and torch.compile, against torch's own dense products; CPU ops.
The bits of their forward and backward kernels are in test_grouped.py."""

import pytest
import torch

import reference as R
from cases import DTYPES, assert_same_bytes, make_stack
from qlora_ext import dequantize_4bit, grouped_ops, ops

E, N, K, T, TOP_K, RANK = 5, 48, 64, 11, 3, 4


def routing(seed=0):
    """(offsets, rows): each token's three experts out of five. One expert has no token; the last
    token's last slot has no expert and is sorted to the end."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator)
    scores[:, 2] = -1.0
    chosen = scores.topk(TOP_K).indices.reshape(-1)
    chosen[-1] = E
    expert, order = chosen.sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(E), right=True, out_int32=True)
    return offsets, (order // TOP_K).to(torch.int32)


def inputs(dtype):
    _, q = make_stack((E, N, K))
    x = torch.randn(T, K).to(dtype).requires_grad_()
    A = (torch.randn(E, RANK, K) / 8).requires_grad_()
    B = (torch.randn(E, N, RANK) / 8).requires_grad_()
    bias = torch.randn(E, N).to(dtype).requires_grad_()
    return q, x, A, B, bias


def dense(q, x, A, B, bias, offsets, rows):
    """The same by torch: fp32 products of the sorted rows, one expert after another."""
    y, begin = [], 0
    for e, end in enumerate(offsets.tolist()):
        mine = x[rows[begin:end].long()].float()
        W = dequantize_4bit(q[e], torch.float32)
        y.append(mine @ W.T + bias[e].float() + 2.0 * (mine @ A[e].T) @ B[e].T)
        begin = end
    y.append(torch.zeros(len(rows) - begin, N))
    return torch.cat(y)


ROUTES = {
    "eager": lambda x, w4, A, B, bias, offsets, rows: grouped_ops.grouped_lora_gemm_4bit(
        x, w4, A, B, 2.0, offsets, rows, bias
    ),
    "op": lambda x, w4, A, B, bias, offsets, rows: torch.ops.qlora_ext.grouped_lora_gemm_4bit(
        x, *w4, A, B, 2.0, offsets, rows, bias
    )[0],
    "two products": lambda x, w4, A, B, bias, offsets, rows: grouped_ops.grouped_gemm_4bit(
        x, w4, offsets, rows, bias, grouped_ops.grouped_lora_shrink(x, A, 2.0, offsets, rows), B
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_dense_experts(dtype, route):
    q, *leaves = inputs(dtype)
    offsets, rows = routing()
    y = ROUTES[route](leaves[0], q.op_args(), *leaves[1:], offsets, rows)
    want = dense(q, *leaves, offsets, rows)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=tolerance)
    dY = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dY)
    want = torch.autograd.grad(want, leaves, dY.float())
    for name, g, w in zip(("x", "A", "B", "bias"), got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=tolerance, atol=4 * tolerance, msg=name)
    assert not got[1][2].any() and not got[2][2].any()  # the expert without tokens


def test_sorted_rows_need_no_index():
    q, x, A, B, bias = inputs(torch.float32)
    offsets, rows = routing()
    taken = x.detach()[rows.long()].requires_grad_()
    y = grouped_ops.grouped_lora_gemm_4bit(taken, q.op_args(), A, B, 2.0, offsets, None, bias)
    again = ROUTES["eager"](x, q.op_args(), A, B, bias, offsets, rows)
    assert_same_bytes(y, again, "y")
    (dx,) = torch.autograd.grad(y.sum(), taken)
    (want,) = torch.autograd.grad(again.sum(), x)
    summed = torch.zeros_like(x).index_add_(0, rows, dx)
    torch.testing.assert_close(want, summed)


def test_the_last_rows_without_an_expert_are_zero():
    q, x, A, B, bias = inputs(torch.bfloat16)
    offsets, rows = routing()
    end = int(offsets[-1])
    assert end == len(rows) - 1
    y = ROUTES["eager"](x, q.op_args(), A, B, bias, offsets, rows)
    assert not y[end:].any()
    dY = torch.ones_like(y)
    dY[end:] = float("nan")  # must not be read
    for grad in torch.autograd.grad(y, (x, A, B, bias), dY):
        assert grad.isfinite().all()


def test_compile_traces_the_whole_product():
    q, *leaves = inputs(torch.float32)
    offsets, rows = routing()
    w4 = q.op_args()

    def f(x, A, B, bias, offsets, rows):
        y = grouped_ops.grouped_lora_gemm_4bit(x, w4, A, B, 2.0, offsets, rows, bias)
        return y.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        offsets, rows = routing(seed)
        got, want = compiled(*leaves, offsets, rows), f(*leaves, offsets, rows)
        assert_same_bytes(got, want, "loss")
        grads = [torch.autograd.grad(loss, leaves) for loss in (got, want)]
        for g, w in zip(*grads, strict=True):
            assert_same_bytes(g, w, "gradient")


def test_a_frozen_adapter_passes_gradients_on():
    q, x, A, B, bias = inputs(torch.float32)
    offsets, rows = routing()
    y = ROUTES["eager"](x, q.op_args(), A, B, bias, offsets, rows)
    (want,) = torch.autograd.grad(y.sum(), x)
    y = ROUTES["eager"](x, q.op_args(), A.detach(), B.detach(), bias.detach(), offsets, rows)
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, want)


def test_one_expert_is_the_plain_op():
    arrays, q = make_stack((1, N, K))
    x = torch.randn(9, K)
    y = grouped_ops.grouped_gemm_4bit(x, q.op_args(), torch.tensor([9], dtype=torch.int32))
    assert_same_bytes(y, ops.gemm_4bit(x, q[0].op_args()), "y")
    want = torch.from_numpy(R.linear_4bit(x.double().numpy(), arrays[0]))
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    """Experts with 1 to 600 rows: threads share the work of one, and of several."""
    sizes = torch.tensor([1, 600, 0, 9, 30])
    offsets = sizes.cumsum(0).to(torch.int32)
    rows = torch.randint(0, T, (int(sizes.sum()) + 2,), dtype=torch.int32)
    q, x, A, B, bias = inputs(dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            y = grouped_ops.grouped_lora_gemm_4bit(x, q.op_args(), A, B, 2.0, offsets, rows, bias)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, A, B, bias))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bytes(got, want, "result")


def test_sum_rows():
    values = torch.randn(4, 3).bfloat16()
    order = torch.tensor([3, 0, 0, 2], dtype=torch.int32)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    got = torch.ops.qlora_ext.sum_rows(values, order, ends)
    v = values.float()
    want = torch.stack([v[3] + v[0], torch.zeros(3), v[0] + v[2]]).bfloat16()
    assert_same_bytes(got, want, "sums")
