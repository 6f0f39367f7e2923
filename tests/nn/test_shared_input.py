"""Layers that read the same x (q, k, v; gate, up) compute scaling x A^T once: what is shared, what
is never shared, and that the numbers are those of layers that share nothing."""

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_ext import LoraConfig, add_lora, lora, quantize_model
from qlora_ext.nn import Linear4bit, LoraLinear4bit, shared_input
from qlora_ext.nn.shared_input import SharedInput, share_input

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def _small_inputs_share_too(monkeypatch):
    monkeypatch.setattr(shared_input, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(shared_input, "MIN_ELEMENTS_DROPOUT", 1)


def unshared():
    return mock.patch.object(SharedInput, "pays", lambda self, x, dropout: False)


class Counted(TorchDispatchMode):
    """Counts ops by name, lora_gemm_4bit with S given by its caller apart; `ranks` of shrinks."""

    def __init__(self):
        super().__init__()
        self.calls, self.ranks = Counter(), []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op).split(".")[1]
        names = [a.name for a in op._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if name == "lora_gemm_4bit" and given.get("lora_S") is not None:
            name = "lora_gemm_4bit with S"
        if name == "lora_shrink":
            self.ranks.append(given["lora_A"].shape[0])
        self.calls[name] += 1
        return op(*args, **(kwargs or {}))


class Parent(nn.Module):
    """Three adapted layers that read x, and one that reads their sum."""

    def __init__(self, K=64, sizes=(64, 32, 32), ranks=(4, 4, 4), dropout=0.0, **settings):
        super().__init__()
        for name, N, r in zip(QKV, sizes, ranks, strict=True):
            layer = LoraLinear4bit(K, N, r=r, lora_alpha=2 * r, lora_dropout=dropout, **settings)
            layer.requires_grad_(False)
            nn.init.normal_(layer.lora_B, std=0.1)
            layer.lora_A.requires_grad_()
            layer.lora_B.requires_grad_()
            setattr(self, name, layer)
            share_input(self, name)

    @property
    def layers(self):
        return [getattr(self, name) for name in QKV]

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def run(function, x, parameters, seed=3):
    """The output and every gradient, for the same draws each time."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = function(x)
    dY = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, *parameters), dY, allow_unused=True)]


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def assert_same(got, want):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w), f"result {i}"


def adapted_llama(dropout=0.0, dtype=torch.float32, name="llama", **settings):
    tiny = pytest.importorskip("tiny_models")
    pytest.importorskip("transformers")
    model = quantize_model(tiny.make(name, dtype=dtype), progress_bar=False)
    switches = {"key": True, "projection": True, "mlp": True, **settings}
    add_lora(model, LoraConfig(lora_dropout=dropout, **switches))
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.1)
    return model.train()


# What is shared -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_product_for_q_k_v_and_one_for_gate_up(dropout):
    model = adapted_llama(dropout)
    ids = torch.randint(3, 90, (2, 9))
    for _ in range(2):
        with Counted() as counted:
            model(input_ids=ids)
        if dropout:  # o_proj and down_proj have a mask and a product of their own
            assert counted.calls["lora_shrink"] == counted.calls["bernoulli_"] == 2 * 4
            assert Counter(counted.ranks) == {24: 2, 16: 2, 8: 4}
            assert counted.calls["gemm_4bit"] == 2 * 7
        else:
            assert Counter(counted.ranks) == {24: 2, 16: 2}
            assert counted.calls["lora_gemm_4bit with S"] == 2 * 5
            assert counted.calls["lora_gemm_4bit"] == 2 * 2


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 8, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_unshared(dtype, ranks):
    parent = Parent(ranks=ranks, dtype=dtype)
    for shape in ((70, 64), (2, 3, 64), (1, 64)):
        x = torch.randn(shape).to(dtype)
        with Counted() as counted:
            got = run(parent, x, trained(parent))
        assert counted.ranks == [sum(ranks)]
        with unshared():
            want = run(parent, x, trained(parent))
        assert_same(got, want)


def test_the_same_bits_as_unshared_in_a_model():
    model = adapted_llama()
    ids = torch.randint(3, 90, (2, 9))

    def gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss, *(p.grad for p in trained(model))]

    got = gradients()
    with unshared():
        assert_same(got, gradients())


def test_autocast_casts_x_once():
    parent = Parent()
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Counted() as counted:
            parent(x)
        assert counted.calls["_to_copy"] == 1 and counted.ranks == [12]
        got = run(parent, x, trained(parent))
        with unshared():
            want = run(parent, x, trained(parent))
    assert got[0].dtype == torch.bfloat16
    assert_same([got[0], *got[2:]], [want[0], *want[2:]])
    # x's gradient is summed in bf16 before the one cast, not in fp32 after three.
    torch.testing.assert_close(got[1], want[1], rtol=2e-2, atol=2e-2)


def test_small_inputs_are_left_alone(monkeypatch):
    monkeypatch.undo()
    parent, dropping = Parent(), Parent(dropout=0.1)
    for module, rows in ((parent, 16384), (dropping, 128)):
        for M, shared in ((rows - 1, False), (rows, True)):
            with Counted() as counted:
                module(torch.randn(M, 64))
            assert (12 in counted.ranks) == shared


def test_groups_of_every_family():
    """Every family that makes query, key and value apart, and gate and up, has them in groups."""
    named = {name for names in shared_input.SAME_INPUT for name in names}
    for family in lora.FAMILIES.values():
        assert {*family.query, *family.key, *family.value} <= named
        assert "gate_proj" not in family.mlp or {"gate_proj", "up_proj"} <= named
    sizes = Counter(m.shared_input.size for m in adapted_llama(name="t5").modules() if is_lora(m))
    # Encoder 2 x (q, k, v), decoder 2 x 2 x (q, k, v); o, wi and wo in none.
    assert sizes == {3: 2 * 3 + 4 * 3}
    default = adapted_llama(key=False, projection=False, mlp=False)
    assert [m.shared_input.size for m in default.modules() if is_lora(m)] == [2] * 4


def is_lora(module):
    return isinstance(module, LoraLinear4bit) and module.shared_input is not None


# Dropout ------------------------------------------------------------------------------------------


def test_layers_that_share_x_share_the_dropout_mask():
    parent = Parent(dropout=0.5)
    x = torch.randn(7, 64)
    got = run(parent, x, trained(parent))

    def by_hand(x):
        dropped = nn.functional.dropout(x, 0.5)
        parts = []
        for layer in parent.layers:
            bypass = dropped @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
            parts.append(Linear4bit.forward(layer, x) + bypass)
        return torch.cat(parts, dim=-1)

    for g, w in zip(got, run(by_hand, x, trained(parent)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    draws = [run(parent, x, (), seed=seed)[0] for seed in (3, 4)]
    assert torch.equal(draws[0], got[0]) and not torch.equal(draws[1], got[0])


def test_each_call_of_one_layer_draws_its_own_mask():
    parent = Parent(dropout=0.5)
    x = torch.randn(7, 64)
    torch.manual_seed(0)
    got = [parent.q_proj(x) for _ in range(2)]
    torch.manual_seed(0)
    with unshared():
        assert_same(got, [parent.q_proj(x) for _ in range(2)])
    assert not torch.equal(*got)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_block(use_reentrant, dropout):
    """The recomputation draws what the first run drew: a mask in each layer, both times."""
    parent = Parent(dropout=dropout)
    x = torch.randn(6, 64)

    def block(x):
        return checkpoint(parent, torch.tanh(x), use_reentrant=use_reentrant)

    for _step in range(2):
        with Counted() as counted:
            got = run_backward(block, x, parent)
        if dropout:
            assert counted.calls["bernoulli_"] == 2 * 3
        with unshared():
            want = run_backward(lambda x: parent(torch.tanh(x)), x, parent)
        assert_same(got, want)
        with torch.no_grad():
            for parameter in trained(parent):
                parameter.add_(0.1)


BEFORE_THE_RECOMPUTATION = {
    "gathered": lambda A: setattr(A, "data", A.data.clone()),  # as FSDP gathers A once more
    "written": lambda A: A.detach().mul_(1),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("change", BEFORE_THE_RECOMPUTATION.values(), ids=BEFORE_THE_RECOMPUTATION)
def test_checkpointing_while_the_group_learns(change, dropout):
    """T5's cross-attention: q reads another x than k and v, which the first run finds out. The
    recomputation must save tensors of the first run's shapes all the same."""
    tiny = pytest.importorskip("tiny_models")
    model = adapted_llama(dropout=dropout, name="t5")
    model.config.use_cache = False
    inputs = tiny.inputs(model)
    inputs["labels"] = inputs["input_ids"]

    def gradients(change):
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**inputs).loss
        for layer in (m for m in model.modules() if is_lora(m)):
            change(layer.lora_A)
        loss.backward()
        return [loss, *(p.grad.clone() for p in trained(model))]

    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(change)
    model.gradient_checkpointing_disable()
    with unshared():
        want = gradients(lambda A: None)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def by_function(function, x):
    """A checkpoint of another library: without gradients first, then again in the backward."""

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.x, ctx.state = x.detach(), torch.get_rng_state()
            return function(x)

        @staticmethod
        def backward(ctx, dY):
            torch.set_rng_state(ctx.state)
            x = ctx.x.requires_grad_()
            with torch.enable_grad():
                y = function(x)
            torch.autograd.backward(y, dY)
            return x.grad

    return Recomputed.apply(x)


def by_hooks(function, x):
    """A checkpoint of another library: saved tensors are dropped, and made in the backward."""
    state, saved = torch.get_rng_state(), []
    made: list[torch.Tensor] = []

    def unpack(i):
        if not made:
            torch.set_rng_state(state)
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t: made.append(t.detach()), lambda t: t
            )
            with hooks, torch.enable_grad():
                function(x.detach().requires_grad_())
        return made[i]

    def pack(t):
        saved.append(None)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(x)


def on_cpu(function, x):
    with torch.autograd.graph.save_on_cpu():
        return function(x)


CHECKPOINTS = {
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "a function": by_function,
    "hooks": by_hooks,
    "saved on CPU": on_cpu,
    "none": lambda f, x: f(x),
}
NESTINGS = [
    *((outer, inner) for outer in list(CHECKPOINTS)[:3] for inner in CHECKPOINTS),
    *(("hooks", inner) for inner in ("saved on CPU", "none")),  # it knows of no hooks but its own
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("outer, inner", NESTINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_nested(outer, inner, dropout):
    """One checkpoint around another, and layers between the two: every recomputation draws the
    masks that were drawn when the output was made."""
    first, second = Parent(sizes=(64, 64, 64), dropout=dropout), Parent(dropout=dropout)
    both = nn.ModuleList([first, second])
    x = torch.randn(6, 64)

    def block(x, outer, inner):
        def whole(x):
            # q, k and v of `first` read the x of the outer region, those of `second` the inner's.
            h = sum(layer(x) for layer in first.layers)
            return inner(lambda h: second(torch.tanh(h)), h)

        return outer(whole, torch.tanh(x))

    for _step in range(2):
        got = run_backward(lambda x: block(x, CHECKPOINTS[outer], CHECKPOINTS[inner]), x, both)
        with unshared():
            want = run_backward(lambda x: block(x, *[CHECKPOINTS["none"]] * 2), x, both)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        with torch.no_grad():
            for parameter in trained(both):
                parameter.add_(0.01)


def test_hooks_that_only_count_see_what_is_saved_without_hooks():
    parent, x = Parent(dropout=0.3), torch.randn(5, 64, requires_grad=True)
    draws = []
    for pack in (None, lambda t: t):
        kept = shared_input.hook_that_only_counts(pack)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack or (lambda t: t), lambda t: t)
        with kept, hooks, Counted() as counted:
            parent(x)
        draws.append(counted.calls["bernoulli_"])
    assert draws == [3, 1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_each_layer(use_reentrant, dropout):
    """A region's recomputation sees no other's mask, so regions share none."""
    parent = Parent(dropout=dropout)
    x = torch.randn(6, 64)

    def block(x):
        x = torch.tanh(x)
        parts = [checkpoint(layer, x, use_reentrant=use_reentrant) for layer in parent.layers]
        return torch.cat(parts, dim=-1)

    got = run_backward(block, x, parent)
    with unshared():
        want = run_backward(lambda x: parent(torch.tanh(x)), x, parent)
    for g, w in zip(got, want, strict=True):  # x's gradient is summed in another order
        torch.testing.assert_close(g, w)


def run_backward(function, x, module, seed=3):
    """As `run`, through .backward(), which reentrant checkpoints want."""
    module.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y, x.grad, *(p.grad.clone() for p in trained(module))]


def test_siblings_have_a_part_of_their_graphs_in_common():
    """Under dropout, as layers have it that read an x with a graph of its own."""
    parent = Parent(dropout=0.5)
    x = torch.randn(5, 64, requires_grad=True)

    def outputs(*names):
        parent.zero_grad()
        torch.manual_seed(3)
        return [getattr(parent, name)(x).sum() for name in names]

    def gradients():
        return [p.grad.clone() for p in (x, *trained(parent))]

    sum(outputs(*QKV)).backward()
    want = gradients()
    x.grad = None
    q, k, v = outputs(*QKV)
    q.backward(retain_graph=True)
    k.backward(retain_graph=True)
    v.backward()
    for g, w in zip(gradients(), want, strict=True):
        torch.testing.assert_close(g, w)
    q, k = outputs("q_proj", "k_proj")
    q.backward()
    assert not parent.v_proj.lora_A.grad.any()  # computed for, not called
    assert parent.v_proj.lora_B.grad is None
    with pytest.raises(RuntimeError, match="a second time"):
        k.backward()
    parent = Parent()  # S has no gradient
    for y in outputs(*QKV):
        y.backward()


# What is not shared -------------------------------------------------------------------------------

CHANGES = {
    "another x": lambda p, x: torch.randn(5, 64),
    "an equal copy of x": lambda p, x: x.clone(),
    "x changed in place": lambda p, x: x.mul_(2),
    "x's memory replaced": lambda p, x: setattr(x, "data", torch.randn(5, 64)),
    "x's strides": lambda p, x: setattr(x, "data", x.data.as_strided((5, 64), (1, 5))),
    "x's shape": lambda p, x: setattr(x, "data", x.data[:3]),
    "A changed in place": lambda p, x: p.k_proj.lora_A.mul_(2),
    "A's memory replaced": lambda p, x: setattr(p.k_proj.lora_A, "data", torch.randn(4, 64)),
    "A's strides": lambda p, x: setattr(
        p.k_proj.lora_A, "data", p.k_proj.lora_A.data.as_strided((4, 64), (1, 4))
    ),
    "another A": lambda p, x: setattr(p.k_proj, "lora_A", nn.Parameter(torch.randn(4, 64))),
    "another rank": lambda p, x: [
        setattr(p.k_proj, "lora_A", nn.Parameter(torch.randn(2, 64))),
        setattr(p.k_proj, "lora_B", nn.Parameter(torch.randn(32, 2))),
    ],
    "another scaling": lambda p, x: p.k_proj.set_scaling(7.0),
    "another dtype": lambda p, x: p.k_proj.to(torch.bfloat16),
    "the layer replaced": lambda p, x: setattr(p, "k_proj", LoraLinear4bit(64, 32, r=4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_stale_is_used(change):
    parent = Parent()
    x = torch.randn(5, 64)
    with torch.no_grad():
        parent.q_proj(x)
        changed = change(parent, x)
        given = changed if isinstance(changed, torch.Tensor) and changed.shape == x.shape else x
        got = [parent.k_proj(given), parent.v_proj(given)]
        with unshared():
            assert_same(got, [parent.k_proj(given), parent.v_proj(given)])


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


MODES = {  # of the first layer's call, of the second's; a cast of x is what would lack a gradient
    "autocast on": ([], [autocast]),
    "autocast off": ([autocast], []),
    "autocast to another dtype": ([autocast], [lambda: autocast(torch.float16)]),
    "gradients on": ([autocast, torch.no_grad], [autocast]),
    "inference mode off": ([autocast, torch.inference_mode], [autocast]),
}


@pytest.mark.parametrize("first, then", MODES.values(), ids=MODES)
def test_a_change_of_mode_starts_anew(first, then):
    parent = Parent()
    x = torch.randn(5, 64, requires_grad=True)

    def gradients():
        for name, modes in (("q_proj", first), ("k_proj", then)):
            with contextlib.ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                y = getattr(parent, name)(x)
        return [y, *torch.autograd.grad(y.float().sum(), (x, *trained(parent.k_proj)))]

    got = gradients()
    with unshared():
        assert_same(got, gradients())


def test_x_that_comes_to_need_a_gradient_starts_anew():
    parent = Parent()
    x = torch.randn(5, 64)
    with autocast():
        parent.q_proj(x)
        (gradient,) = torch.autograd.grad(parent.k_proj(x.requires_grad_()).float().sum(), x)
        with unshared():
            (want,) = torch.autograd.grad(parent.k_proj(x).float().sum(), x)
    assert torch.equal(gradient, want)


def test_training_and_evaluation_between_layers():
    parent = Parent(dropout=0.5)
    x = torch.randn(5, 64)
    parent.q_proj(x)
    parent.eval()
    got = parent.k_proj(x)
    with unshared():
        assert torch.equal(got, parent.k_proj(x))


def test_the_gradient_goes_to_the_parameter_that_the_layer_has_now():
    """Under dropout S has a gradient: another Parameter over the same memory is another A."""
    parent = Parent(dropout=0.5)
    x = torch.randn(5, 64)
    parent.q_proj(x)
    parent.k_proj.lora_A = nn.Parameter(parent.k_proj.lora_A.detach())
    parent.k_proj(x).sum().backward()
    assert parent.k_proj.lora_A.grad is not None


def test_inference_tensors_share_nothing():
    parent = Parent()
    with torch.inference_mode(), Counted() as counted:
        parent(torch.randn(5, 64))
    assert counted.ranks == []


def test_another_stream_is_not_waited_for(monkeypatch):
    parent = Parent()
    x = torch.randn(5, 64)
    streams = iter((1, 2, 2))
    monkeypatch.setattr(shared_input, "_stream", lambda x: next(streams))
    with Counted() as counted:
        parent(x)
    assert counted.ranks == [12, 12]


class Subclass(torch.Tensor):
    """Stands in for a DTensor."""


def test_a_sibling_elsewhere_is_left_out():
    """On meta (as offloaded layers are between calls), a DTensor, with another scaling or dtype, or
    made another layer in place (as tensor parallelism does)."""
    for change in (
        lambda layer: layer.to("meta"),
        lambda layer: layer._parameters.update(lora_A=torch.randn(4, 64).as_subclass(Subclass)),
        lambda layer: layer.set_scaling(5.0),
        lambda layer: setattr(layer, "__class__", Linear4bit),
        lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A.detach().bfloat16())),
    ):
        parent = Parent()
        change(parent.k_proj)
        x = torch.randn(5, 64)
        with torch.no_grad(), Counted() as counted:
            parent.q_proj(x)
            got = parent.v_proj(x)
        assert counted.ranks == [8]
        with unshared(), torch.no_grad():
            assert torch.equal(got, parent.v_proj(x))


def test_errors_are_the_layers_own():
    parent = Parent()
    with pytest.raises(RuntimeError, match=r"lora_gemm_4bit: x has shape \[2, 63\], want"):
        parent(torch.zeros(2, 63))
    with pytest.raises(RuntimeError, match="x has dtype int64"):
        parent(torch.zeros(2, 64, dtype=torch.int64))


def test_a_layer_that_reads_something_else_is_computed_for_once():
    parent = Parent()
    seen = []
    for _ in range(3):
        x, z = torch.randn(5, 64), torch.randn(5, 64)
        with torch.no_grad(), Counted() as counted:
            got = [parent.q_proj(x), parent.k_proj(z), parent.v_proj(z)]
        seen.append(counted.ranks)
        with torch.no_grad(), unshared():
            assert_same(got, [parent.q_proj(x), parent.k_proj(z), parent.v_proj(z)])
    # First for all three each time, then q alone (within its op) and k with v.
    assert seen == [[12, 12], [8], [8]]
    x = torch.randn(5, 64)
    with torch.no_grad():
        parent(x)
        with Counted() as counted:
            parent(x)
    assert counted.ranks == [12]  # and a layer that comes back is learned too


def test_t5_attends_to_two_inputs():
    tiny = pytest.importorskip("tiny_models")
    model = adapted_llama(name="t5").eval()
    inputs = tiny.inputs(model)
    with torch.no_grad():
        model(**inputs)
        with Counted() as counted:
            got = model(**inputs).logits
        # Self-attention of both halves: one product for three. Cross-attention: one for k and v.
        assert Counter(counted.ranks) == {24: 4, 16: 2}
        with unshared():
            assert torch.equal(got, model(**inputs).logits)


# Lifetimes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("called", [QKV, QKV[:1]], ids=["all", "one of three"])
def test_no_tensor_outlives_the_call(called, dropout):
    parent = Parent(dropout=dropout)
    for grad in (True, False):
        x = torch.randn(5, 64, requires_grad=grad)
        h = x * 2
        alive = weakref.ref(h)
        with torch.set_grad_enabled(grad):
            y = sum(getattr(parent, name)(h).sum() for name in called)
        if called == QKV:
            assert parent.q_proj.shared_input._entry is None
        del h
        if grad:
            y.backward()
        del y, x
        assert alive() is None  # without a collection
        entry = parent.q_proj.shared_input._entry
        assert entry is None or (entry.input, entry.dropped, entry.columns) == (None, None, {})


def test_layers_are_freed_without_a_collection():
    parent = Parent()
    parent(torch.randn(5, 64))
    alive = [weakref.ref(layer) for layer in parent.layers]
    gc.disable()
    try:
        del parent
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


# Copies, state dicts ------------------------------------------------------------------------------


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_copies_share_among_themselves(duplicate):
    parent = Parent()
    x = torch.randn(5, 64)
    held = parent.q_proj(x)  # an entry is pending while the copy is made
    other = duplicate(parent)
    group = other.q_proj.shared_input
    assert group is other.v_proj.shared_input is not parent.q_proj.shared_input
    with torch.no_grad():
        other.k_proj.lora_A.mul_(2)
        other(x)  # layers join a copied group as they are called
        with Counted() as counted:
            got = other(x)
        assert counted.ranks == [12]
        assert torch.equal(parent(x)[:, :64], held)
        with unshared():
            assert torch.equal(got, other(x))
    alone = copy.deepcopy(parent.k_proj)
    assert torch.equal(alone(x), parent.k_proj(x))


def test_state_dict_is_as_without_groups():
    model = adapted_llama()
    assert not [key for key in model.state_dict() if "shared" in key]
    assert not [name for name, _ in model.named_modules() if "shared" in name]
    again = adapted_llama()
    again.load_state_dict(model.state_dict())
    ids = torch.randint(3, 90, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


# Compiling, exporting, generating, threads --------------------------------------------------------


def test_compile_a_block_without_a_break_for_any_number_of_rows():
    model = adapted_llama()
    layer = model.model.layers[0]

    def block(x):
        positions = torch.arange(x.shape[1])[None]
        out = layer(x, position_embeddings=model.model.rotary_emb(x, positions))
        return out[0] if isinstance(out, tuple) else out

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = trained(layer)
    block(torch.randn(1, 4, 64))  # an eager call before leaves nothing that is guarded on
    graphs = []
    for M in (5, 9, 33):
        x = torch.randn(2, M, 64)
        got, want = run(compiled, x, parameters), run(block, x, parameters)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def test_export():
    parent = Parent().eval()
    x = torch.randn(5, 64)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    for strict in (True, False):
        program = torch.export.export(parent, (x,), dynamic_shapes=(rows,), strict=strict)
        y = torch.randn(9, 64)
        torch.testing.assert_close(program.module()(y), parent(y))


def test_generate():
    tiny = pytest.importorskip("tiny_models")
    model = adapted_llama().eval()
    with Counted() as counted:
        got = tiny.generate(model)
    assert counted.calls["lora_gemm_4bit with S"] >= 5 * 10
    with unshared():
        assert torch.equal(got, tiny.generate(model))


def test_vmap_is_left_alone():
    parent = Parent()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(parent)(x), parent(x))


def test_threads_do_not_see_each_others_inputs():
    parent = Parent()
    inputs = [torch.randn(5, 64) for _ in range(4)]
    with torch.no_grad(), unshared():
        want = [parent(x) for x in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(parent(inputs[i]), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
