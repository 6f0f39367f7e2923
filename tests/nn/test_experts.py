"""Experts4bit: transformers' fused experts, packed as stacks, against the class they came from."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils.checkpoint import checkpoint

import tiny_models as tiny
from qlora_ext import (
    LoraConfig,
    QuantConfig,
    add_lora,
    grouped_ops,
    linear_4bit,
    load_adapter,
    merge_and_unload,
    num_parameters,
    quantize_model,
    save_adapter,
)
from qlora_ext.nn import Experts4bit, Linear4bit, LoraLinear4bit
from qlora_ext.nn.dense import dense_experts, dense_layer
from qlora_ext.nn.experts import is_fused_experts
from qlora_ext.nn.stack import LoraStack4bit, Stack4bit

pytest.importorskip("transformers")


def routed(experts, tokens=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 64, generator=generator)
    E = experts.down_proj.shape[0]
    index = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    return x, index, weights


@pytest.mark.parametrize("layout", tiny.EXPERT_LAYOUTS)
def test_every_layout_computes_what_its_class_does(layout):
    experts = tiny.experts(layout)
    assert is_fused_experts(experts)
    packed = Experts4bit.from_experts(experts, QuantConfig(blocksize=32))
    x, index, weights = routed(experts)
    got = packed(x.requires_grad_(), index, weights)
    got.sum().backward()
    dx, x.grad = x.grad, None
    assert isinstance(packed.up, Stack4bit) and isinstance(packed.down, Stack4bit)
    assert packed.up.bias is None or packed.up.bias.shape == (4, packed.up.out_features)
    # The same weights, dense again in the class they came from.
    dense = dense_layer(packed, torch.float32)
    assert type(dense) is type(experts)
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in experts.named_parameters()
    }
    want = dense(x, index, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    want.sum().backward()
    torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-5)
    assert (got - experts(x, index, weights)).norm() < 0.3 * want.norm()


def test_low_precision_and_meta_and_copies():
    experts = tiny.experts("mixtral", torch.bfloat16)
    packed = Experts4bit.from_experts(experts)
    x, index, weights = routed(experts)
    y = packed(x.bfloat16(), index, weights)
    assert y.dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(packed)(x.bfloat16(), index, weights), y)
    empty = Experts4bit.from_experts(tiny.experts("mixtral").to("meta"))
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty(x.bfloat16(), index, weights), y)


def test_a_dense_bias_goes_where_its_weight_is():
    """offload_experts keeps a stack's weight in host memory, and its bias on the device."""
    packed = Experts4bit.from_experts(tiny.experts("gpt_oss"))
    weight = torch.empty(packed.down._shape, device="meta")
    dense = dense_experts(packed, torch.float32, {"down_proj": weight})
    assert dense.down_proj_bias.is_meta and not dense.gate_up_proj_bias.is_meta


@pytest.mark.parametrize("none", [4, 7, -1])
def test_slots_without_an_expert_are_skipped(none):
    packed = Experts4bit.from_experts(tiny.experts("mixtral"))
    x, index, weights = routed(tiny.experts("mixtral"))
    want = packed(x, index[:, :1], weights[:, :1])
    index[:, 1] = none
    weights[:, 1] = torch.nan
    x.requires_grad_(), weights.requires_grad_()
    y = packed(x, index, weights)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert x.grad.isfinite().all() and not weights.grad[:, 1].any()
    assert not packed(x, torch.full_like(index, none), weights).any()
    assert packed(x[:0], index[:0], weights[:0]).shape == (0, 64)


def adapted(layout, r=3):
    """Packed experts with adapters that change the output."""
    packed = Experts4bit.from_experts(tiny.experts(layout), QuantConfig(blocksize=32))
    for side in ("up", "down"):
        stack = LoraStack4bit.from_stack(getattr(packed, side), r=r)
        nn.init.normal_(stack.lora_B, std=0.2)
        setattr(packed, side, stack)
    return packed


@pytest.mark.parametrize("layout", tiny.EXPERT_LAYOUTS)
def test_adapters_compute_what_the_merged_class_does(layout):
    packed = adapted(layout)
    x, index, weights = routed(tiny.experts(layout))
    got = packed(x, index, weights)
    dense = dense_layer(copy.deepcopy(packed), torch.float32)
    torch.testing.assert_close(got, dense(x, index, weights), rtol=1e-3, atol=1e-4)
    # The factors' gradients are those of the dense sum W + s B A.
    got.square().sum().backward()
    dense.requires_grad_()
    dense(x, index, weights).square().sum().backward()
    for name, stack in packed.stacks().items():
        dW = getattr(dense, name).grad
        dW = dW.mT if dense.is_transposed else dW
        dB, dA = stack.scaling * dW @ stack.lora_A.mT, stack.scaling * stack.lora_B.mT @ dW
        torch.testing.assert_close(stack.lora_B.grad, dB, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stack.lora_A.grad, dA, rtol=1e-3, atol=1e-3)


def test_an_expert_computes_what_its_layer_alone_does():
    """Bit for bit, whatever the other experts are given."""
    source = tiny.experts("gpt_oss")
    packed = Experts4bit.from_experts(source)
    x, index, weights = routed(source, tokens=40)
    calls = []
    packed.up.register_forward_hook(lambda module, args, y: calls.append((*args, y)))
    packed(x, index, weights)
    ((_, offsets, rows, _, h),) = calls
    start = 0
    for e, end in enumerate(offsets.tolist()):
        alone = linear_4bit(x[rows[start:end].long()], packed.up.quantized[e], packed.up.bias[e])
        assert torch.equal(h[start:end], alone)
        assert (index[rows[start:end].long()] == e).any(1).all()
        start = end
    assert start == index.numel()


def test_compiled_in_one_graph():
    packed = adapted("mixtral")
    x, index, weights = routed(tiny.experts("mixtral"))
    x.requires_grad_(), weights.requires_grad_()
    results = []
    for forward in (packed, torch.compile(packed, fullgraph=True, backend="aot_eager")):
        y = forward(x, index, weights)
        gradients = torch.autograd.grad(y.square().sum(), (x, weights, packed.up.lora_A))
        results.append((y, *gradients))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def step_of(packed, x, index, weights):
    """A forward and a backward pass: y and the gradients of all that can have one."""
    inputs = [x.requires_grad_(), weights.requires_grad_()]
    inputs += [p for p in packed.parameters() if p.requires_grad]
    y = packed(x, index, weights)
    return y, *torch.autograd.grad(y.square().sum(), inputs)


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_the_host_reads_no_values(is_adapted, layout):
    """Nor depends a shape on them: fake tensors have none. So a CUDA graph can hold the layer."""
    packed = adapted(layout) if is_adapted else Experts4bit.from_experts(tiny.experts(layout))
    given = routed(tiny.experts(layout))
    want = step_of(packed, *given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, index, weights = (mode.from_tensor(t.detach()) for t in given)
        got = step_of(packed, x, index, weights)
        assert [t.shape for t in got] == [t.shape for t in want]
        for read in (index.tolist, index.unique, lambda: x[index[:, 0] > 1], index.sum().item):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                read()


@pytest.mark.parametrize("is_adapted", [False, True])
def test_no_op_of_the_layer_waits_for_the_device(is_adapted):
    """On the emulated CUDA machine, as under a graph's capture, where waiting is an error."""
    from simt.build import load_simt

    packed = adapted("mixtral") if is_adapted else Experts4bit.from_experts(tiny.experts("mixtral"))
    x, index, weights = routed(tiny.experts("mixtral"))
    index[0, 0] = 4  # a slot without an expert
    want = step_of(packed, x, index, weights)
    simt = load_simt()
    simt.reset_launches()
    with mock.patch.object(grouped_ops, "_ops", torch.ops.qlora_ext_simt), simt.capture():
        got = step_of(packed, x, index, weights)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert any(count and "grouped" in name for name, count in simt.kernels().items())


def test_checkpointing_and_autocast():
    packed = adapted("mixtral")
    x, index, weights = routed(tiny.experts("mixtral"))
    x.requires_grad_()
    grads = []
    for run in (packed, lambda *args: checkpoint(packed, *args, use_reentrant=False)):
        grads.append(torch.autograd.grad(run(x, index, weights).sum(), (x, packed.down.lora_B)))
    assert all(map(torch.equal, *grads))
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x, index, weights)
    assert y.dtype == torch.float32  # the dtype that the layer was given
    low = packed(x.bfloat16(), index, weights).float()
    torch.testing.assert_close(y, low, rtol=0.05, atol=0.05)


def test_meta_needs_no_values():
    packed = adapted("gpt_oss").to("meta")
    y = packed(
        torch.empty(7, 64, device="meta", requires_grad=True),
        torch.empty(7, 2, dtype=torch.long, device="meta"),
        torch.empty(7, 2, device="meta"),
    )
    assert y.is_meta and y.shape == (7, 64)
    y.sum().backward()
    assert packed.up.lora_A.grad.is_meta


# How experts were packed before: packed.3.up.weight, ...


def as_before(packed):
    """The state dict of a version that packed expert by expert."""
    state = {}
    for side in ("up", "down"):
        for key, value in getattr(packed, side).state_dict().items():
            for e in range(4):
                shared = key == "weight_codebook"
                state[f"packed.{e}.{side}.{key}"] = value if shared else value[e].clone()
    return state


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_state_dicts_of_single_experts_load(layout):
    source = tiny.experts(layout, seed=3)
    packed = Experts4bit.from_experts(source)
    other = nn.ModuleDict({"moe": Experts4bit.from_experts(tiny.experts(layout))})
    state = {f"moe.{key}": value for key, value in as_before(packed).items()}
    other.load_state_dict(state)
    args = routed(source)
    assert torch.equal(other["moe"](*args), packed(*args))
    del state["moe.packed.2.up.weight"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*packed.0.up.weight"):
        other.load_state_dict(state)


def test_pickles_of_single_experts_load(tmp_path):
    """As a version before made them: a ModuleList of experts with two layers each."""
    from qlora_ext.experts import _Expert

    packed = Experts4bit.from_experts(tiny.experts("gpt_oss"))
    old = Experts4bit.__new__(Experts4bit)
    nn.Module.__init__(old)
    old.template, old.packed = packed.template, nn.ModuleList()
    for e in range(4):
        expert = _Expert()
        for side in ("up", "down"):
            stack = getattr(packed, side)
            q = stack.quantized[e]
            linear = nn.Linear(stack.in_features, stack.out_features)
            layer = Linear4bit.empty_like(linear, stack.config)
            layer._set_quantized(q)
            layer.bias = nn.Parameter(stack.bias[e].clone(), requires_grad=False)
            setattr(expert, side, layer)
        old.packed.append(expert)
    torch.save(old, tmp_path / "old.pt")
    again = torch.load(tmp_path / "old.pt", weights_only=False)
    args = routed(tiny.experts("gpt_oss"))
    assert torch.equal(again(*args), packed(*args))
    assert list(again.state_dict()) == list(packed.state_dict())


def test_bad_experts_are_refused():
    stack = Stack4bit.from_dense(torch.ones(2, 4, 6), is_transposed=True)
    before = stack.weight.clone()
    for weight in (torch.ones(6, 4), torch.ones(3, 8), torch.ones(4)):
        with pytest.raises(ValueError, match=r"expert 1 has shape \[.*\], want \[4, 6\]"):
            stack.set_expert(1, weight)
    assert torch.equal(stack.weight, before)
    with pytest.raises(TypeError, match="experts is a Linear, want a module with"):
        Experts4bit.from_experts(torch.nn.Linear(4, 4))
    experts = tiny.experts("mixtral")
    experts.down_proj.data[2, 3, 5] = torch.inf
    with pytest.raises(RuntimeError, match=r"down_proj: expert 2: .*\[3, 5\]"):
        Experts4bit.from_experts(experts)
    experts._is_expert_parallel = True
    with pytest.raises(TypeError, match="sharded over devices"):
        Experts4bit.from_experts(experts)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixture_model_the_whole_way(family, tmp_path):
    import qlora_ext

    dense = tiny.make(family)
    dense.save_pretrained(tmp_path / "dense")
    weights = num_parameters(dense)
    plain = {name: type(m) for name, m in dense.named_modules()}
    model = quantize_model(dense, progress_bar=False)
    assert num_parameters(model) == model.num_parameters() == weights
    assert model.quantization_report.quantized_share > 0.84
    want = tiny.logits(model)

    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(again), want)
    config = qlora_ext.QLoraExtConfig()
    loaded = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(tiny.logits(loaded), want)

    add_lora(model, LoraConfig(r=4, mlp=True))
    adapted = [
        n for n, m in model.named_modules() if isinstance(m, (LoraLinear4bit, LoraStack4bit))
    ]
    assert [n for n in adapted if ".experts." in n] == [
        f"model.layers.{i}.mlp.experts.{side}" for i in range(2) for side in ("up", "down")
    ]
    first, last = tiny.train(model, steps=12)
    assert last < first
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(
        tiny.logits(load_adapter(again, tmp_path / "adapter")), tiny.logits(model)
    )
    want = tiny.logits(model)
    merge_and_unload(model, torch.float32, progress_bar=False)
    assert {name: type(m) for name, m in model.named_modules()} == plain
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(merged), tiny.logits(model))
