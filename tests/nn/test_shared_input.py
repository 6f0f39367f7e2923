"""add_lora(..., share_inputs=True): q, k, v and gate, up compute scaling x A^T once. What is
shared, and that all numbers are those of layers that share nothing, which is the default."""

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_ext import LoraConfig, add_lora, ops, quantize_model
from qlora_ext.models import architectures
from qlora_ext.nn import Linear4bit, shared_input

QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three layers that read x."""

    def __init__(self):
        super().__init__()
        for name, N in zip(QKV, (64, 32, 32), strict=True):
            setattr(self, name, nn.Linear(64, N))

    @property
    def layers(self):
        return [getattr(self, name) for name in QKV]

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def pair(model=None, dropout=0.0):
    """Two models with the same packed weights and adapters in training; the first shares."""
    torch.manual_seed(0)
    model = quantize_model(Attention() if model is None else model, progress_bar=False)
    config = LoraConfig(lora_dropout=dropout, key=True, projection=True, mlp=True)
    if isinstance(model, Attention):
        config = LoraConfig(r=4, lora_dropout=dropout, target_modules=list(QKV))
    shares = add_lora(copy.deepcopy(model), config, share_inputs=True).train()
    alone = add_lora(model, config).train()
    for p, q in zip(trained(shares), trained(alone), strict=True):
        q.data.copy_(nn.init.normal_(p.data, std=0.1))
    return shares, alone


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


@contextlib.contextmanager
def shrinks():
    """The ranks of the A's that lora_shrink is called with, as a list that grows. A layer alone,
    without dropout, has the product in its own op."""
    ranks, op = [], ops.lora_shrink

    def listed(x, lora_A, scaling):
        ranks.append(lora_A.shape[0])
        return op(x, lora_A, scaling)

    with mock.patch.object(ops, "lora_shrink", listed):
        yield ranks


def run(function, x, module):
    """The output and every gradient, for the same draws each time."""
    module.zero_grad()
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y, x.grad, *(p.grad for p in trained(module))]


def assert_same(got, want):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w), f"result {i}"


# The choice ---------------------------------------------------------------------------------------


def test_each_layer_has_its_own_graph():
    """A backward through one layer frees nothing of another's, and gives it no gradient."""
    x = torch.randn(5, 64, requires_grad=True)
    gradients = []
    for model, want in zip(pair(), ([12], []), strict=True):
        with shrinks() as ranks:
            q, k, v = (layer(x) for layer in model.layers)
        assert ranks == want
        q.sum().backward()
        given = [p.grad is not None for p in trained(model)]
        assert given == [True, True, False, False, False, False]
        k.sum().backward()
        v.sum().backward()
        gradients.append([p.grad for p in trained(model)])
    assert_same(*gradients)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 8, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_layers_that_share_nothing(dtype, ranks):
    model, alone = pair(Attention().to(dtype))
    for layer, other, r in zip(model.layers, alone.layers, ranks, strict=True):
        layer.lora_A, layer.lora_B = (
            nn.Parameter(torch.randn(r, 64)),
            nn.Parameter(torch.randn(layer.out_features, r)),
        )
        other.lora_A, other.lora_B = map(copy.deepcopy, (layer.lora_A, layer.lora_B))
    for shape in ((70, 64), (2, 3, 64), (1, 64), (0, 64)):
        x = torch.randn(shape).to(dtype)
        with shrinks() as seen:
            got = run(model, x, model)
        assert seen == [sum(ranks)]
        assert_same(got, run(alone, x, alone))


# Two layers with q, k, v and gate, up. T5's cross-attention is a wrong group: its query reads
# another x than key and value, so it makes two products.
@pytest.mark.parametrize("name, want", [("llama", {24: 2, 16: 2}), ("t5", {24: 4 + 2 * 2})])
def test_models(name, want):
    pytest.importorskip("transformers")
    import tiny_models as tiny

    model, alone = pair(tiny.make(name))
    inputs = tiny.inputs(model)
    inputs["labels"] = inputs["input_ids"]
    with shrinks() as ranks:
        losses = [m.eval()(**inputs).loss for m in (model, alone)]
    assert Counter(ranks) == want
    sum(losses).backward()
    assert_same([losses[0], *(p.grad for p in trained(model))],
                [losses[1], *(p.grad for p in trained(alone))])  # fmt: skip
    assert torch.equal(tiny.generate(model), tiny.generate(alone))
    assert model.state_dict().keys() == alone.state_dict().keys()


def test_groups_of_every_family():
    """Every family that makes query, key and value apart, and gate and up, has them in groups."""
    named = {name for names in architectures.SAME_INPUT for name in names}
    for family in architectures.FAMILIES.values():
        assert {*family.query, *family.key, *family.value} <= named
        assert "gate_proj" not in family.mlp or {"gate_proj", "up_proj"} <= named


@pytest.mark.parametrize("packed, targets", [(True, ["q_proj"]), (False, list(QKV))])
def test_a_choice_in_vain_is_an_error_and_changes_nothing(packed, targets):
    model = quantize_model(Attention(), progress_bar=False) if packed else Attention()
    with pytest.raises(ValueError, match="share_inputs=True, but no two of the layers to adapt"):
        add_lora(model, LoraConfig(target_modules=targets), share_inputs=True)
    assert {type(m) for m in model.layers} == {Linear4bit if packed else nn.Linear}
    with pytest.raises(TypeError, match="add_lora: share_inputs is 1, want a bool"):
        add_lora(model, share_inputs=1)


def test_under_dropout_each_layer_draws_its_own_mask():
    model, alone = pair(dropout=0.5)
    x = torch.randn(7, 64)
    with shrinks() as ranks:
        assert_same(run(model, x, model), run(alone, x, alone))
        assert ranks == [4, 4, 4] * 2
        assert torch.equal(model.eval()(x), alone.eval()(x))
    assert ranks[6:] == [12]


def test_compiled_code_and_modes_without_counts_of_writes():
    model, alone = pair()
    x = torch.randn(2, 5, 64)
    model(x)  # leaves nothing that a compiled model is guarded on
    with torch.no_grad(), shrinks() as ranks:
        torch.testing.assert_close(torch.vmap(model)(x), alone(x))
        with torch.inference_mode():
            made = x * 2
            assert_same([model(x), model(made)], [alone(x), alone(made)])
        assert torch.equal(model(made), alone(made))
    assert ranks == []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (5, 9, 33):
        x = torch.randn(M, 64)
        for g, w in zip(run(compiled, x, model), run(alone, x, alone), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"lora_gemm_4bit: x has shape \[2, 63\], want"):
        model(torch.zeros(2, 63))


# Nothing stale or foreign is used -----------------------------------------------------------------


class Subclass(torch.Tensor):
    """Stands in for a DTensor, which cannot be stacked with plain tensors."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is not torch.cat
        return super().__torch_function__(function, types, args, kwargs)


def another_A(x, q, k):
    """With as many writes as the old one."""
    new = nn.Parameter(k.lora_A.data)
    new.numpy().fill(1)
    while new._version < k.lora_A._version:
        new.mul_(1)
    k.lora_A = new


CHANGES = {
    "another x": lambda x, q, k: torch.randn(5, 64),
    "another x in the same memory": lambda x, q, k: (x.numpy().fill(1), x.data)[1],
    "x changed in place": lambda x, q, k: x.mul_(2),
    "x's memory replaced": lambda x, q, k: setattr(x, "data", torch.randn(5, 64)),
    "x's strides": lambda x, q, k: setattr(x, "data", x.data.as_strided((5, 64), (1, 5))),
    "x's shape": lambda x, q, k: setattr(x, "data", x.data[:3]),
    "A changed in place": lambda x, q, k: k.lora_A.add_(1) is None,
    "A's memory replaced": lambda x, q, k: setattr(k.lora_A, "data", torch.randn(4, 64)),
    "another A": lambda x, q, k: setattr(k, "lora_A", nn.Parameter(torch.randn(4, 64))),
    "A in another dtype": lambda x, q, k: [setattr(p, "data", p.bfloat16()) for p in trained(k)],
    "A sharded": lambda x, q, k: k._parameters.update(lora_A=k.lora_A.data.as_subclass(Subclass)),
    "A offloaded": lambda x, q, k: q.to("meta"),
    "another A in the same memory": another_A,
    "another scaling": lambda x, q, k: k.set_scaling(7.0),
    "a layer cut in place": lambda x, q, k: setattr(k, "__class__", Linear4bit),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("between", [True, False])
@torch.no_grad()
def test_a_change_before_a_call_or_between_two(change, between):
    (model, _), x = pair(), torch.randn(5, 64)
    if between:
        model.q_proj(x)
    changed = change(x, model.q_proj, model.k_proj)
    given = changed if isinstance(changed, torch.Tensor) else x
    called = [layer for layer in model.layers[between:] if not layer.lora_A.is_meta]
    got = [layer(given) for layer in called]
    for layer in called:
        layer.shared_input = None
    assert_same(got, [layer(given) for layer in called])


def test_a_change_of_mode_between_two_siblings():
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    fp16 = functools.partial(torch.autocast, "cpu", torch.float16)
    modes = (contextlib.nullcontext, autocast, fp16, torch.no_grad, torch.inference_mode)
    x = torch.randn(5, 64, requires_grad=True)
    for first, then in itertools.product(modes, modes[:3]):
        results = []
        for model in pair():
            with first():
                model.q_proj(x)
            with then():
                y = model.k_proj(x)
            results.append([y, *torch.autograd.grad(y.float().sum(), (x, *trained(model.k_proj)))])
        assert_same(*results)


def test_another_stream_is_not_waited_for(monkeypatch):
    (model, _), streams = pair(), iter((1, 2, 2))
    monkeypatch.setattr(shared_input, "_stream", lambda x: next(streams))
    with shrinks() as ranks:
        model(torch.randn(5, 64))
    assert ranks == [12, 12]


REGIONS = {
    "a block": lambda m, x, region: region(m, torch.tanh(x)),
    "each layer": lambda m, x, region: torch.cat([region(k, x) for k in m.layers], dim=-1),
    "nested": lambda m, x, region: region(lambda x: region(m, torch.tanh(x)), x),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("block", REGIONS.values(), ids=REGIONS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing(block, use_reentrant, dropout):
    """Also where A is gathered anew before the recomputation, as under FSDP."""
    model, alone = pair(dropout=dropout)
    x = torch.randn(6, 64)

    def gathered(x):
        y = block(model, x, lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
        for layer in model.layers:
            layer.lora_A.data = layer.lora_A.data.clone()
        return y

    want = run(lambda x: block(alone, x, lambda f, x: f(x)), x, alone)
    for g, w in zip(run(gathered, x, model), want, strict=True):
        torch.testing.assert_close(g, w)  # x's gradient is summed in another order


# Lifetimes and copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("called", [QKV, QKV[:1]], ids=["all", "one of three"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_and_no_layer_is_kept(called, grad):
    model, _ = pair()
    x = torch.randn(5, 64, requires_grad=grad) * 2
    layers, given = [weakref.ref(layer) for layer in model.layers], weakref.ref(x)
    with torch.set_grad_enabled(grad):
        y = [getattr(model, name)(x) for name in called]
    columns = model.q_proj.shared_input._last[-1]
    assert len(columns) == 3 - len(called)
    gc.disable()
    try:
        del x, y
        assert given() is None and columns == {}
        del model
        assert [layer() for layer in layers] == [None] * 3
    finally:
        gc.enable()


def from_old_pickle(model):
    """As a model whose groups were pickled before there was a choice."""
    group = shared_input.SharedInput.__new__(shared_input.SharedInput)
    group.__setstate__({"size": 3})
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.shared_input = group
    return model


COPIES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), from_old_pickle]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "old pickle"])
@torch.no_grad()
def test_copies_share_among_themselves(duplicate):
    (model, alone), x = pair(), torch.randn(5, 64)
    model.q_proj(x)  # columns of k and v are pending while the copy is made
    other = duplicate(model)
    other(x)  # layers join a copied group as they are called
    with shrinks() as ranks:
        assert torch.equal(other(x), alone(x))
        other.k_proj.lora_A.mul_(2)
        for layer in (model.k_proj, duplicate(model).k_proj):  # one that is alone has its own op
            assert torch.equal(layer(x), alone.k_proj(x))
    assert ranks == [12]
