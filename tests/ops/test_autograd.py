"""Schemas, fakes, autograd and torch.compile: what trainers build on. CPU ops; the formulas are
Python and the same for CUDA."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qlora_ext
import reference as R
from cases import (
    CONFIGS,
    DTYPES,
    Tolerance,
    assert_close,
    assert_same_bytes,
    make_stack,
    make_weight,
    random_weight,
)
from qlora_ext import ops

OPS = torch.ops.qlora_ext


def lora_inputs(M=5, N=48, K=64, r=4, dtype=torch.float32, name="nf4"):
    array, q = make_weight((N, K), CONFIGS[name])
    x = torch.randn(M, K).to(dtype).requires_grad_()
    A = (torch.randn(r, K) / 8).requires_grad_()
    B = (torch.randn(N, r) / 8).requires_grad_()
    bias = torch.randn(N).to(dtype).requires_grad_()
    return array, q, x, A, B, bias


def sample_calls():
    """(op, args) for every op: without and with what is optional."""
    _, q, x, A, B, bias = lora_inputs()
    w4 = q.op_args()
    _, plain = make_weight((48, 64), CONFIGS["standard-plain-scales"])
    _, custom = make_weight((48, 64), CONFIGS["custom-unsorted"])
    _, odd = make_weight((3, 5), CONFIGS["nf4"])
    weight = random_weight((48, 64))
    S = torch.randn(5, 4, requires_grad=True)
    dY, dS = torch.randn(5, 48), torch.randn(5, 4)
    a, b, x0 = A.detach(), B.detach(), x.detach()
    absmax = weight.abs().amax(1).view(torch.uint8)
    code, nested = OPS.quantize_absmax(absmax)
    _, stack = make_stack((3, 48, 64))
    e4 = stack.op_args()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    rows = torch.tensor([4, 0, 1, 1, 3, 2, 0, 2], dtype=torch.int32)
    eA, eB = (torch.randn(3, 4, 64) / 8).requires_grad_(), torch.randn(3, 48, 4).requires_grad_()
    ebias, eS = torch.randn(3, 48, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    eA0, eB0, eS0, edY, edS = (
        *(t.detach() for t in (eA, eB, eS)),
        torch.randn(8, 48),
        torch.randn(8, 4),
    )
    return [
        (OPS.quantize_4bit.default, (weight, 64, "nf4", None, "absmax", 3.0, "none", 1.0)),
        (
            OPS.quantize_4bit.default,
            (weight.half(), 0, "fp4", None, "standard", 3.0, "logarithmic", 2.0),
        ),
        (OPS.quantize_absmax.default, (absmax,)),
        (OPS.dequantize_absmax.default, (code, nested)),
        (OPS.dequantize_4bit.default, (*w4, torch.bfloat16)),
        (OPS.dequantize_4bit.default, (*plain.op_args(), torch.float32)),
        (OPS.dequantize_4bit.default, (*odd.op_args(), torch.float32)),
        (OPS.gemm_4bit.default, (x, *w4)),
        (OPS.gemm_4bit.default, (x, *w4, bias, S, B)),
        (OPS.gemm_4bit.default, (x0.bfloat16(), *custom.op_args(), None)),
        (OPS.gemm_4bit_backward.default, (dY, *w4)),
        (OPS.gemm_4bit_backward.default, (dY, *w4, dS, a)),
        (OPS.lora_shrink.default, (x, A, 0.5)),
        (OPS.lora_shrink_backward.default, (dS, x0, a, 0.5, True)),
        (OPS.lora_shrink_backward.default, (dS, x0, a, 0.5, False)),
        (OPS.lora_expand_backward.default, (dY, S.detach(), b)),
        (OPS.lora_gemm_4bit.default, (x, *w4, A, B, 2.0)),
        (OPS.lora_gemm_4bit.default, (x, *w4, A, B, 2.0, bias)),
        (OPS.lora_gemm_4bit.default, (x, *w4, A, B, 2.0, bias, dS)),
        (OPS.lora_gemm_4bit_backward.default, (dY, x0, S.detach(), *w4, a, b, 2.0, True)),
        (OPS.lora_gemm_4bit_backward.default, (dY, x0, S.detach(), *w4, a, b, 2.0, False)),
        (OPS.merge_lora_4bit.default, (*w4, a, b, 2.0, torch.float16)),
        (OPS.embedding_4bit.default, (torch.tensor([[0, 47], [3, 3]]), *w4, torch.float32)),
        (OPS.grouped_gemm_4bit.default, (x, *e4, ends.clamp(max=5))),
        (OPS.grouped_gemm_4bit.default, (x, *e4, ends, rows, ebias, eS, eB)),
        (OPS.grouped_gemm_4bit_backward.default, (edY, *e4, ends)),
        (OPS.grouped_gemm_4bit_backward.default, (edY, *e4, ends, edS, eA0)),
        (OPS.grouped_lora_shrink.default, (x, eA, 0.5, ends, rows)),
        (OPS.grouped_lora_shrink_backward.default, (edS, x0, eA0, 0.5, ends, rows, True)),
        (OPS.grouped_lora_shrink_backward.default, (edS, x0, eA0, 0.5, ends, rows, False)),
        (OPS.grouped_lora_expand_backward.default, (edY, eS0, eB0, ends)),
        (OPS.grouped_lora_gemm_4bit.default, (x, *e4, eA, eB, 2.0, ends, rows)),
        (OPS.grouped_lora_gemm_4bit.default, (x, *e4, eA, eB, 2.0, ends.clamp(max=5), None, ebias)),
        (
            OPS.grouped_lora_gemm_4bit_backward.default,
            (edY, x0, eS0, *e4, eA0, eB0, 2.0, ends, rows, True),
        ),
        (
            OPS.grouped_lora_gemm_4bit_backward.default,
            (edY, x0, eS0, *e4, eA0, eB0, 2.0, ends, rows, False),
        ),
        (OPS.sum_rows.default, (edY, rows[:7], ends)),
        (OPS.linear.default, (x, weight, bias)),
        (OPS.linear.default, (x0.bfloat16(), weight.bfloat16())),
        (OPS.linear_backward.default, (dY, weight)),
    ]


@pytest.mark.parametrize("index", range(39))
def test_opcheck(index):
    calls = sample_calls()
    assert len(calls) == 39
    op, args = calls[index]
    torch.library.opcheck(op, args)


def test_opcheck_out():
    _, q, *_ = lora_inputs()
    torch.library.opcheck(OPS.dequantize_4bit.out, q.op_args(), {"out": torch.empty(48, 64)})


def test_every_op_is_opchecked():
    covered = {op.name() for op, _ in sample_calls()} | {"qlora_ext::dequantize_4bit.out"}
    from torch._C import _dispatch_get_all_op_names

    defined = {name for name in _dispatch_get_all_op_names() if name.startswith("qlora_ext::")}
    assert {name.removesuffix(".default") for name in covered} == defined


# Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["eager", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_gradients(dtype, route):
    array, q, x, A, B, bias = lora_inputs(dtype=dtype)
    if route == "eager":
        y = ops.lora_gemm_4bit(x, q.op_args(), A, B, 2.0, bias)
    else:
        y, _ = OPS.lora_gemm_4bit(x, *q.op_args(), A, B, 2.0, bias)
    dY = torch.randn_like(y)
    y.backward(dY)
    n = [t.detach().double().numpy() for t in (dY, x, A, B)]
    want = R.lora_linear_4bit_backward(n[0], n[1], array, n[2], n[3], 2.0)
    W = torch.from_numpy(R.dequantize_4bit(array)).to(dtype)
    dS = 2.0 * dY.float() @ B.detach()
    assert_close(x.grad, dY @ W + (dS @ A.detach()).to(dtype), want[0], "dX")
    assert_close(A.grad, dS.T @ x.detach().float(), want[1], "dA", Tolerance(4.0, 1e-5))
    assert_close(
        B.grad,
        dY.float().T @ (2.0 * x.detach().float() @ A.detach().T),
        want[2],
        "dB",
        Tolerance(4.0, 1e-5),
    )
    assert_close(bias.grad, dY.sum(0), n[0].sum(0), "dbias")


def test_composed_ops_have_the_fused_ops_gradients():
    """lora_shrink + gemm_4bit, the route of dropout and shared inputs, agrees with the one node."""
    _, q, x, A, B, bias = lora_inputs()
    fused = ops.lora_gemm_4bit(x, q.op_args(), A, B, 2.0, bias)
    composed = ops.gemm_4bit(x, q.op_args(), bias, ops.lora_shrink(x, A, 2.0), B)
    assert_same_bytes(composed, fused, "y")
    dY = torch.randn_like(fused)
    for got, want in zip(
        torch.autograd.grad(composed, (x, A, B, bias), dY),
        torch.autograd.grad(fused, (x, A, B, bias), dY),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["eager", "op"])
def test_given_S_is_the_function_of_x_and_A_that_it_stands_for(route, dtype):
    """Three layers on columns of one lora_shrink: outputs and gradients of x, A, B and bias are bit
    for bit those of three layers that compute their own; S needs no gradient."""
    layers = [
        lora_inputs(M=70, N=N, K=96, r=r, dtype=dtype) for N, r in ((48, 4), (16, 8), (33, 3))
    ]
    x = layers[0][2]

    def call(q, A, B, bias, S=None):
        if route == "eager":
            return ops.lora_gemm_4bit(x, q.op_args(), A, B, 2.0, bias, S)
        return OPS.lora_gemm_4bit(x, *q.op_args(), A, B, 2.0, bias, S)[0]

    with torch.no_grad():
        columns = ops.lora_shrink(x, torch.cat([A for _, _, _, A, _, _ in layers]), 2.0)
    columns = columns.split([4, 8, 3], dim=1)
    for (_, q, _, A, B, bias), S in zip(layers, columns, strict=True):
        want, got = call(q, A, B, bias), call(q, A, B, bias, S)
        assert_same_bytes(got, want, "y")
        dY = torch.randn_like(want)
        gradients = [torch.autograd.grad(y, (x, A, B, bias), dY) for y in (got, want)]
        for name, g, w in zip(("x", "A", "B", "bias"), *gradients, strict=True):
            assert_same_bytes(g, w, f"gradient of {name}")
    _, q, _, A, B, bias = layers[0]
    with torch.no_grad():
        assert_same_bytes(call(q, A, B, bias, columns[0]), call(q, A, B, bias), "y, no gradients")


@pytest.mark.parametrize("frozen", ["x", "AB", "xA", "all"])
def test_only_the_gradients_asked_for(frozen):
    _, q, x, A, B, bias = lora_inputs()
    for name, t in (("x", x), ("A", A), ("B", B)):
        t.requires_grad_(not (name in frozen or frozen == "all"))
    bias.requires_grad_(False)
    y = ops.lora_gemm_4bit(x, q.op_args(), A, B, 2.0, bias)
    assert y.requires_grad == (frozen != "all")
    if y.requires_grad:
        y.sum().backward()
    for t in (x, A, B):
        assert (t.grad is not None) == t.requires_grad


def test_dropout_is_on_the_bypass_alone():
    _, q, x, A, B, _ = lora_inputs(M=200)
    plain = qlora_ext.linear_4bit(x, q)
    torch.manual_seed(1)
    got = qlora_ext.lora_linear_4bit(x, q, A, B, 2.0, dropout=0.3)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.3)
    torch.testing.assert_close(got, plain + 2.0 * (dropped @ A.T) @ B.T)
    dY = torch.randn_like(got)
    reference = plain + 2.0 * (dropped @ A.T) @ B.T
    for a, b in zip(
        torch.autograd.grad(got, (x, A, B), dY),
        torch.autograd.grad(reference, (x, A, B), dY),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_saved_tensors_are_packed_and_survive_offload():
    """Nothing dense is saved, and replacing every saved tensor by a copy (as CPU offload does) and
    poisoning the originals leaves the gradients right."""
    _, q, x, A, B, _ = lora_inputs(N=512, K=512, M=3)
    want = torch.autograd.grad(ops.lora_gemm_4bit(x, q.op_args(), A, B, 2.0).sum(), (x, A, B))
    saved = []

    def pack(t):
        saved.append(t)
        return t.clone()

    clone = [None if t is None else t.clone() for t in (q.packed, q.absmax, q.nested)]
    victim = qlora_ext.QuantizedTensor(*clone, None, q.shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.lora_gemm_4bit(x, victim.op_args(), A, B, 2.0)
    for t in clone:
        t.fill_(255)
    for got, w in zip(torch.autograd.grad(y.sum(), (x, A, B)), want, strict=True):
        assert_same_bytes(got, w, "gradient")
    assert sum(t.nbytes for t in saved) < 512 * 512  # bytes: far below a dense copy in any dtype
    assert any(t.data_ptr() == victim.packed.data_ptr() for t in saved)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    _, q, x, A, B, _ = lora_inputs()

    def layer(x):
        return torch.tanh(ops.lora_gemm_4bit(x, q.op_args(), A, B, 2.0))

    want = torch.autograd.grad(layer(x).sum(), (x, A, B))
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    for t, w in zip((x, A, B), want, strict=True):
        assert_same_bytes(t.grad, w, "gradient")


def test_functorch_is_refused():
    """It has no rule for the ops' backward, and must not find one that it makes up."""
    _, q, x, A, B, _ = lora_inputs()

    def loss(x):
        return qlora_ext.lora_linear_4bit(x, q, A, B, 2.0).sum()

    for transformed in (torch.func.grad(loss), torch.vmap(loss)):
        with pytest.raises(RuntimeError, match="must override the setup_context"):
            transformed(x)


# Autocast, threads --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    _, q, x, A, B, _ = lora_inputs()
    with torch.autocast("cpu", dtype):
        y = qlora_ext.lora_linear_4bit(x, q, A, B, 2.0)
        assert y.dtype == qlora_ext.linear_4bit(x, q).dtype == dtype
    assert_same_bytes(y, qlora_ext.lora_linear_4bit(x.to(dtype), q, A, B, 2.0), "y")
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and A.grad.dtype == torch.float32


def test_any_number_of_threads_gives_the_same_bits():
    weight = random_weight((515, 640))
    _, q, x, A, B, bias = lora_inputs(M=70, N=515, K=640, r=8, dtype=torch.bfloat16)
    x1 = x[:1].detach()
    dY = torch.randn(70, 515).bfloat16()

    def run():
        made = qlora_ext.quantize_4bit(weight)
        y, S = OPS.lora_gemm_4bit(
            x.detach(), *q.op_args(), A.detach(), B.detach(), 2.0, bias.detach()
        )
        grads = OPS.lora_gemm_4bit_backward(
            dY, x.detach(), S, *q.op_args(), A.detach(), B.detach(), 2.0, True
        )
        dense = [qlora_ext.dequantize_4bit(q), qlora_ext.merge_lora_4bit(q, A, B, 2.0)]
        return [
            made.packed,
            made.absmax,
            made.nested,
            y,
            S,
            *grads,
            *dense,
            qlora_ext.linear_4bit(x1, q),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run()
        for n in (2, 3, 5, 8):
            torch.set_num_threads(n)
            for i, (got, w) in enumerate(zip(run(), want, strict=True)):
                assert_same_bytes(got, w, f"result {i} on {n} threads")
    finally:
        torch.set_num_threads(threads)


# torch.compile, export ----------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q = make_weight((48, 64), CONFIGS["nf4"])[1]
        self.A = torch.nn.Parameter(torch.randn(4, 64) / 8)
        self.B = torch.nn.Parameter(torch.randn(48, 4) / 8)
        self.bias = torch.nn.Parameter(torch.randn(48).to(dtype))

    def forward(self, x):
        y = qlora_ext.lora_linear_4bit(
            torch.nn.functional.gelu(x), self.q, self.A, self.B, 2.0, self.bias
        )
        return torch.tanh(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph(dtype):
    block = Block(dtype)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    frames = torch._dynamo.utils.counters["stats"]
    before = None
    for M in (5, 9, 33):  # one graph for every M
        x = torch.randn(M, 64, dtype=dtype, requires_grad=True)
        dY = torch.randn(M, 48, dtype=dtype)
        want = torch.autograd.grad(block(x), (x, *block.parameters()), dY)
        got = torch.autograd.grad(compiled(x), (x, *block.parameters()), dY)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(
                g,
                w,
                rtol=2e-2 if dtype is torch.bfloat16 else 1e-5,
                atol=2e-2 if dtype is torch.bfloat16 else 1e-5,
            )
        if before is not None:
            assert frames["unique_graphs"] == before
        before = frames["unique_graphs"]


def test_compiled_backward_is_the_fused_one():
    block = Block()
    graphs = []

    def backend(graph, inputs):
        from torch._functorch.aot_autograd import make_boxed_func

        graphs.append(graph)
        return make_boxed_func(graph.forward)

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        block, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend)
    )
    compiled(torch.randn(5, 64, requires_grad=True)).sum().backward()
    targets = [str(n.target) for g in graphs for n in g.graph.nodes]
    assert targets.count("qlora_ext.lora_gemm_4bit.default") == 1
    assert targets.count("qlora_ext.lora_gemm_4bit_backward.default") == 1


def test_export():
    block = Block().eval()
    x = torch.randn(5, 64)
    exported = torch.export.export(
        block, (x,), dynamic_shapes=({0: torch.export.Dim("M", min=2, max=512)},)
    )
    y = torch.randn(17, 64)
    torch.testing.assert_close(exported.module()(y), block(y))


def test_pytree():
    import torch.utils._pytree as pytree

    q = make_weight((8, 64), CONFIGS["nf4"])[1]
    leaves, spec = pytree.tree_flatten(q)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, qlora_ext.QuantizedTensor) and again.op_args()[4:] == q.op_args()[4:]
    half = pytree.tree_map(lambda t: t.clone(), q)
    assert_same_bytes(qlora_ext.dequantize_4bit(half), qlora_ext.dequantize_4bit(q), "W")


# Inference mode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["gemm_4bit", "lora_gemm_4bit", "lora_shrink", "linear"])
@pytest.mark.parametrize("through", ["wrapper", "raw op"])
def test_tensors_of_inference_mode_are_named_when_a_backward_is_to_come(op, through):
    _, q, x, A, B, _ = lora_inputs()
    with torch.inference_mode():
        w4 = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in q.op_args())
        frozen_A, dense = A.clone(), torch.randn(48, 64)
    arguments = {
        "gemm_4bit": (x, w4),
        "lora_gemm_4bit": (x, w4, A, B, 2.0),
        "lora_shrink": (x, frozen_A, 2.0),
        "linear": (x, dense),
    }[op]
    call = getattr(ops, op)
    if through == "raw op":
        arguments = [v for part in arguments for v in (part if part is w4 else [part])]
        call = getattr(OPS, op)
    with pytest.raises(RuntimeError, match=rf"^{op}: one of its tensors was made under torch.infe"):
        call(*arguments)
    with torch.no_grad():
        call(*arguments)
