"""Experts4bit: transformers' fused experts, packed one by one, against the class they came from."""

import copy

import pytest
import torch

import tiny_models as tiny
from qlora_ext import (
    LoraConfig,
    QuantConfig,
    add_lora,
    load_adapter,
    merge_and_unload,
    num_parameters,
    quantize_model,
    save_adapter,
)
from qlora_ext.nn import Experts4bit, Linear4bit, LoraLinear4bit
from qlora_ext.nn.dense import dense_layer
from qlora_ext.nn.experts import is_fused_experts

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
    assert all(
        isinstance(e.up, Linear4bit) and isinstance(e.down, Linear4bit) for e in packed.packed
    )
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


def test_slots_without_an_expert_are_skipped():
    packed = Experts4bit.from_experts(tiny.experts("mixtral"))
    x, index, weights = routed(tiny.experts("mixtral"))
    index[:, 1] = 4
    weights[:, 1] = torch.nan
    assert packed(x, index, weights).isfinite().all()
    assert not packed(x, torch.full_like(index, 4), weights).any()
    assert packed(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_bad_experts_are_refused():
    with pytest.raises(TypeError, match="experts is a Linear, want a module with"):
        Experts4bit.from_experts(torch.nn.Linear(4, 4))
    experts = tiny.experts("mixtral")
    experts.down_proj.data[2, 3, 5] = torch.inf
    with pytest.raises(RuntimeError, match=r"down_proj\[2\]: .*\[3, 5\]"):
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
    adapted = [n for n, m in model.named_modules() if isinstance(m, LoraLinear4bit)]
    assert len([n for n in adapted if ".experts.packed." in n]) == 2 * 4 * 2
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
