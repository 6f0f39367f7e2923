"""merge_and_unload: exact sums, one rounding, and a plain model at the end."""

import copy
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import reference as R
import tiny_models as tiny
from cases import as_array
from qlora_ext import LoraConfig, QuantConfig, add_lora, merge_and_unload, quantize_model
from qlora_ext.nn import Embedding4bit, Linear4bit, LoraLinear, LoraLinear4bit

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model")
EVERYTHING = {"query": True, "key": True, "value": True, "projection": True, "mlp": True}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def trained(family="llama", config=None, quant=None, embeddings=False, **settings):
    """A quantized tiny model whose adapters change its output."""
    model = tiny.make(family, **settings)
    quantize_model(model, quant, quantize_embeddings=embeddings, progress_bar=False)
    add_lora(model, config or LoraConfig(r=4, **EVERYTHING))
    return tiny.randomize(model, scale=1 / 8)


def merge(model, dtype=torch.float16):
    return merge_and_unload(model, dtype, progress_bar=False)


def classes(model):
    """Name -> class of every module; Falcon's own nn.Linear counts as one."""
    return {
        name: nn.Linear if type(m).__name__ == "FalconLinear" else type(m)
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_merges_saves_and_loads_as_a_plain_model(family, tmp_path):
    model = trained(family)
    plain = classes(tiny.make(family))
    want = tiny.logits(model)
    assert merge(model, torch.float32) is model
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-3, atol=1e-4)
    assert classes(model) == plain
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    assert torch.equal(tiny.generate(other), tiny.generate(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_is_rounded_once(dtype):
    model = trained(quant=QuantConfig(blocksize=32, normalization="standard"))
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    A, B = layer.lora_A.detach().double().numpy(), layer.lora_B.detach().double().numpy()
    q = as_array(layer.quantized, layer.config)
    exact = R.dequantize_4bit(q).astype(np.float64) + layer.scaling * B @ A
    merge(model, dtype)
    got = model.get_submodule(name).weight
    assert got.dtype == dtype
    error = np.abs(got.detach().double().numpy() - exact)
    # Half a unit in the last place, and the fp32 sum's own error.
    assert (error <= torch.finfo(dtype).eps / 2 * np.abs(exact) + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_merges_to_a_model_of_one_dtype(dtype, adapter, tmp_path):
    model = tiny.make("llama", torch.bfloat16)
    quantize_model(model, progress_bar=False)
    add_lora(model, LoraConfig(**EVERYTHING), lora_dtype=adapter)
    want = tiny.logits(model)
    merge(model, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.dtype == dtype
    assert (tiny.logits(model) - want).norm() < 0.05 * want.norm()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).dtype == dtype


def test_conv1d_comes_back():
    from transformers.pytorch_utils import Conv1D

    model = merge(trained("gpt2"))
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is Conv1D and layer.weight.shape == (64, 256)


@pytest.mark.parametrize("tied", [False, True])
def test_head_is_merged_and_untied(tied, tmp_path):
    model = trained(config=LoraConfig(head=True), tie_word_embeddings=tied)
    table = model.model.embed_tokens.weight.detach().clone()
    want = tiny.logits(model)
    merge(model, torch.float32)
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(other), tiny.logits(model))


def test_untouched_tie_stays(tmp_path):
    model = merge(trained(tie_word_embeddings=True), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(
        tiny.logits(type(model).from_pretrained(tmp_path, dtype="auto")), tiny.logits(model)
    )


def test_packed_embeddings_become_dense():
    model = trained(embeddings=True)
    assert isinstance(model.model.embed_tokens, Embedding4bit)
    want = tiny.logits(model)
    merge(model, torch.float32)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.model.embed_tokens.padding_idx == 0
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-3, atol=1e-4)


def test_adapters_on_a_dense_model_merge_too():
    model = add_lora(tiny.make("llama"), LoraConfig(mlp=True))
    want = tiny.logits(model)
    merge(model, torch.float32)
    torch.testing.assert_close(tiny.logits(model), want)
    assert not [m for m in model.modules() if isinstance(m, LoraLinear)]


def test_packed_weights_are_released_one_by_one(monkeypatch):
    from qlora_ext.merging import dense

    model = trained()
    alive = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, Linear4bit)]
    counts = []
    original = dense.dense_layer

    def dense_layer(module, dtype):
        if isinstance(module, Linear4bit):  # the head is a dense PanelLinear
            counts.append(sum(ref() is not None for ref in alive))
        return original(module, dtype)

    monkeypatch.setattr(dense, "dense_layer", dense_layer)
    merge(model)
    assert counts == list(range(14, 0, -1))
    assert not any(ref() is not None for ref in alive)


# Refusals -----------------------------------------------------------------------------------------


def test_merging_twice_or_without_adapters_is_refused():
    model = tiny.make("llama")
    with pytest.raises(ValueError, match=r"no adapters .it was merged already, or never quantized"):
        merge(model)
    quantize_model(model, progress_bar=False)
    with pytest.raises(ValueError, match=r"no adapters .its layers are still packed"):
        merge(model)
    merge(add_lora(model))
    with pytest.raises(ValueError, match=r"no adapters .it was merged already"):
        merge(model)


def test_bad_arguments_are_refused():
    model = trained()
    with pytest.raises(TypeError, match=r"dtype is torch\.int8, want torch\.float16"):
        merge(model, torch.int8)
    with pytest.raises(TypeError, match="model is a str, want an nn"):
        merge("model")
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig())
    with pytest.raises(TypeError, match=r"PEFT's PeftModel.*model\.merge_and_unload\(\)"):
        merge(wrapped)


@pytest.mark.parametrize("where", ["adapter", "weight", "norm", "head"])
def test_float16_overflow_names_the_layer_and_changes_nothing(where):
    model = tiny.make("llama")
    if where == "weight":
        model.model.layers[1].mlp.up_proj.weight.data[5, 7] = 70000.0
    if where == "norm":
        model.model.norm.weight.data[3] = -1e5
    quantize_model(model, progress_bar=False)
    add_lora(model, LoraConfig(mlp=True, head=True))
    if where == "adapter":
        model.model.layers[1].mlp.up_proj.lora_B.data[:] = 1e6
    if where == "head":
        model.lm_head.lora_B.data[:] = 1e6
    name = {"norm": "model.norm.weight", "head": "lm_head.weight"}.get(
        where, "model.layers.1.mlp.up_proj.weight"
    )
    layers = [type(m) for m in model.modules()]
    with pytest.raises(OverflowError, match=rf"{re.escape(name)} holds .*want at most 65504"):
        merge(model)
    assert [type(m) for m in model.modules()] == layers
    merge(model, torch.bfloat16)


def test_large_values_within_float16_merge():
    model = tiny.make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[5, 7] = 60000.0  # beyond the cheap bound's half
    quantize_model(model, QuantConfig(double_quant=False), progress_bar=False)
    merge(add_lora(model))
    assert model.model.layers[1].mlp.up_proj.weight[5, 7] == 60000


def test_one_layer():
    layer = LoraLinear4bit(64, 16, r=2)
    model = merge(nn.Sequential(layer, nn.ReLU()), torch.float32)
    assert type(model[0]) is nn.Linear and model[0].bias is not None


def test_a_single_layer_is_no_model():
    layer = LoraLinear4bit(64, 64)
    with pytest.raises(TypeError, match="model is a single LoraLinear4bit, want a model that"):
        merge(layer)
    assert type(merge(nn.Sequential(layer))[0]) is nn.Linear


def test_a_saved_buffer_beyond_float16_is_refused():
    model = trained()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model.register_buffer("scratch", torch.tensor([1e9]), persistent=False)
    bad = copy.deepcopy(model)
    bad.register_buffer("bias_table", torch.tensor([1e9]))
    with pytest.raises(OverflowError, match=r": bias_table holds 1 value .* 1e\+09, want"):
        merge(bad)
    merge(model)
    assert model.mask[1] == -torch.inf and model.mask.dtype == torch.float16
    assert model.scratch == 1e9


def test_tensors_that_merging_leaves_alone():
    model = trained()
    shared = torch.ones(2)
    model.register_buffer("one", shared)
    model.register_buffer("other", shared)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("scaled", torch.ones(2).to(torch.float8_e4m3fn))
    model.register_buffer("absent", torch.ones(2, device="meta"))
    model.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
    merge(model)
    assert model.one is model.other and model.one.dtype == torch.float16
    assert model.sparse.is_sparse and model.sparse.dtype == torch.float16
    assert model.scaled.dtype == torch.float8_e4m3fn and model.count.dtype == torch.int64
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())


def test_models_made_from_one_config_object_stay_apart():
    one = tiny.make("llama")
    other = type(one)(one.config)
    quantize_model(one, progress_bar=False)
    assert not hasattr(other.config, "quantization_config")
    add_lora(one)
    merge(one)
    assert other.config.dtype != torch.float16
    one.config.use_cache = False
    assert one.model.config is one.config and other.config.use_cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("head", [False, True])
def test_merged_weights_that_are_not_finite_are_refused(dtype, value, head):
    model = trained(config=LoraConfig(query=not head, value=False, head=head, r=4))
    name = "lm_head" if head else "model.layers.1.self_attn.q_proj"
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.lora_B[3] = value
        layer.lora_A[:] = 5.0
    with pytest.raises(OverflowError, match=rf"{name}\.weight holds .*torch.* cannot hold"):
        merge(model, dtype)
    assert model.get_submodule(name) is layer
