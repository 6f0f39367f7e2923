"""quantize_model, its report, memory_report and num_parameters, on many architectures."""

import shutil
import weakref

import pytest
import torch
from torch import nn

import tiny_models as tiny
from qlora_ext import (
    LoraConfig,
    QuantConfig,
    add_lora,
    memory_report,
    merge_and_unload,
    num_parameters,
    quantize_model,
)
from qlora_ext.nn import Embedding4bit, Linear4bit, PanelLinear

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["norm.weight", "norm.bias", "up.bias", "table.weight", "kept.weight"]
)
def test_what_stays_dense_must_be_finite(name, value):
    model = toy(table=nn.Embedding(9, 64), kept=nn.Linear(64, 64))
    model.get_parameter(name).data.view(-1)[2] = value
    with pytest.raises(RuntimeError, match=rf"quantize_model: {name} holds 1 value of"):
        quantize(model, modules_to_not_convert=["kept"])
    assert not packed_names(model)


def test_biases_of_packed_experts_must_be_finite():
    model = toy(experts=tiny.experts("gpt_oss"))
    model.experts.down_proj_bias.data[1, 2] = float("nan")
    with pytest.raises(
        RuntimeError, match=r"quantize_model: experts\.down_proj_bias holds 1 value"
    ):
        quantize(model)
    assert not packed_names(model)


def packed_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]


def dense_names(model):
    from qlora_ext.nn.linear import is_conv1d

    return [
        name
        for name, m in model.named_modules()
        if (isinstance(m, nn.Linear) or is_conv1d(m)) and not isinstance(m, Linear4bit)
    ]


def quantize(model, *args, **settings):
    return quantize_model(model, *args, progress_bar=False, **settings)


def toy(**extra):
    layers = {"up": nn.Linear(64, 96), "down": nn.Linear(96, 64), "norm": nn.LayerNorm(64)}
    return nn.ModuleDict({**layers, **extra})


# Families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.filterwarnings("ignore:quantize_model")
def test_family_quantizes_saves_reloads_and_generates(family, tmp_path):
    model = tiny.make(family)
    before, weights = tiny.logits(model), model.num_parameters()
    assert quantize(model) is model
    after = tiny.logits(model)
    assert (after - before).norm() < 0.5 * before.norm()
    assert not torch.equal(after, before)
    assert dense_names(model) in (["lm_head"], ["embed_out"]) or family == "t5"
    assert model.num_parameters() == num_parameters(model) == weights
    assert model.quantization_report.numel == weights
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert packed_names(other) == packed_names(model)
    assert torch.equal(tiny.logits(other), after)
    assert torch.equal(tiny.generate(other), tiny.generate(model))


@pytest.mark.filterwarnings("ignore:quantize_model")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_low_precision_families(family, dtype):
    model = quantize(tiny.make(family, dtype))
    with torch.no_grad():
        out = model(**tiny.inputs(model)).logits
    assert out.dtype == dtype and out.isfinite().all()


def test_quantized_bytes_are_the_layers_own():
    model = tiny.make("llama")
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    quantize(model, QuantConfig(blocksize=32, double_quant=False))
    layer = model.model.layers[1].mlp.down_proj
    dense = nn.Linear(96, 64, bias=False)
    dense.weight.data = weight
    want = Linear4bit.from_linear(dense, QuantConfig(blocksize=32, double_quant=False))
    for key, tensor in want.state_dict().items():
        assert torch.equal(layer.state_dict()[key], tensor)


def test_conv1d_multiplies_by_the_transpose():
    model = tiny.make("gpt2")
    conv = model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 64)
    want = conv(x)
    quantize(model)
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == (64, 256) and layer.from_conv1d
    assert (layer(x) - want).norm() < 0.15 * want.norm()


# What stays dense, and the report -----------------------------------------------------------------


def reasons(model):
    return {layer.name: layer.reason for layer in model.quantization_report.unquantized}


def test_tied_head_and_embedding_stay():
    model = tiny.make("llama", tie_word_embeddings=True)
    quantize(model, quantize_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    left = reasons(model)
    assert left["model.embed_tokens"] == "tied to lm_head"
    assert left["model.norm"] == "norms and biases"
    assert model.quantization_report.numel == model.num_parameters()


def test_protected_layers_stay_and_are_reported():
    model = tiny.make("t5")
    with pytest.warns(
        UserWarning, match=r"block\.\{0,1\}\.layer\.1\.DenseReluDense\.wo \(kept in fp32"
    ):
        quantize(model)
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is PanelLinear
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wi, Linear4bit)


def test_stacked_weights_of_an_unknown_layout_are_reported_with_their_share():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 64, 64))

    model = toy(stack=Stack())
    with pytest.warns(UserWarning, match=r"5\d\.\d% .*stack \(stacked weights"):
        quantize(model)
    assert "stack (Stack, 16,384)" in str(model.quantization_report)


def test_routers_are_in_the_report():
    model = quantize(tiny.make("mixtral"))
    text = str(model.quantization_report)
    assert "mlp.gate x2" in text and "lm_head" in text and "experts" not in text


def test_experts_with_an_odd_number_of_columns_stay_dense_and_that_is_said(tmp_path):
    """down_proj [4, 64, 95]: two codes of a row would share a byte with the next row's."""
    import transformers

    import qlora_ext

    want = r"experts.* \(its down_proj \[4, 64, 95\] has an odd number of columns"
    dense = tiny.make("mixtral", intermediate_size=95)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=want):
        model = quantize(dense)
    with pytest.warns(UserWarning, match=want):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=qlora_ext.QLoraExtConfig()
        )
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    for other in (model, loaded, again):  # torch's grouped product takes no such rows
        other.set_experts_implementation("eager")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_modules_to_not_convert():
    model = quantize(tiny.make("llama"), modules_to_not_convert=["layers.0", "down_proj"])
    assert not [n for n in packed_names(model) if "layers.0." in n or "down_proj" in n]
    assert len(packed_names(model)) == 6
    assert reasons(model)["model.layers.1.mlp.down_proj"] == "modules_to_not_convert='down_proj'"


def test_subclasses_with_a_forward_of_their_own_stay():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    model = toy(router=Router(64, 4))
    with pytest.warns(UserWarning, match="router .a subclass of nn.Linear"):
        quantize(model)
    assert type(model["router"]) is Router and len(packed_names(model)) == 2


def test_layers_that_torch_reads_past_their_forward_stay():
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(encoder, 2), "up": nn.Linear(64, 64)})
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        want = model["encoder"](x)
        with pytest.warns(UserWarning, match="read by TransformerEncoderLayer"):
            quantize(model)
        assert torch.equal(model["encoder"](x), want)
    assert packed_names(model) == ["up"]
    with pytest.raises(ValueError, match=r"forward reads the weight of encoder\."):
        add_lora(model, LoraConfig(target_modules=["up", "linear1"]))
    assert add_lora(model, LoraConfig(target_modules=["up"])) is model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`", "ignore:quantize_model")
def test_a_weight_that_a_hook_computes_stays():
    model = quantize(toy(normed=nn.utils.weight_norm(nn.Linear(64, 64))))
    assert reasons(model)["normed"] == "its weight is not a parameter, but computed by a hook"
    assert len(packed_names(model)) == 2


def hooked(layer):
    """What hooks of every kind on layer noted, and their handles."""
    seen = []
    return seen, [
        layer.register_forward_hook(lambda m, x, y: (seen.append("forward"), y + 100)[1]),
        layer.register_forward_hook(
            lambda m, x, k, y: seen.append("kwargs"), with_kwargs=True, always_call=True
        ),
        layer.register_forward_pre_hook(lambda m, x: seen.append("pre")),
        layer.register_forward_pre_hook(lambda m, x, k: seen.append("pre kw"), with_kwargs=True),
        layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward")),
        layer.register_full_backward_pre_hook(lambda m, go: seen.append("pre backward")),
    ]


def test_hooks_follow_through_quantizing_adapters_and_merging():
    model = toy()
    seen, handles = hooked(model["up"])
    want = ["pre", "pre kw", "forward", "kwargs", "pre backward", "backward"]
    steps = [
        lambda: quantize(model),
        lambda: add_lora(model, LoraConfig(target_modules=["up", "down"])),
        lambda: merge_and_unload(model, torch.float32, progress_bar=False),
    ]
    for step in steps:
        step()
        seen.clear()
        y = model["up"](torch.randn(4, 64, requires_grad=True))
        y.sum().backward()
        assert seen == want and y.min() > 50
    assert type(model["up"]) is nn.Linear
    for handle in handles:
        handle.remove()
    seen.clear()
    assert model["up"](torch.randn(4, 64)).max() < 50 and not seen


def test_hooks_on_experts_follow():
    model = tiny.make("mixtral")
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda m, x, y: seen.append(type(m).__name__))
    quantize(model)
    tiny.logits(model)
    assert seen == ["Experts4bit"]


def test_task_head_stays():
    config = transformers.LlamaConfig(**tiny.LLAMA, num_labels=3)
    model = quantize(transformers.LlamaForSequenceClassification(config))
    assert type(model.score) is PanelLinear and len(packed_names(model)) == 14


def test_shared_module_is_replaced_everywhere():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    quantize(model)
    assert isinstance(model["a"], Linear4bit) and model["b"][0] is model["a"]


def test_attention_that_reads_its_weight_stays():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "up": nn.Linear(64, 64)})
    with pytest.warns(UserWarning, match="attention"):
        quantize(model)
    x = torch.randn(3, 1, 64)
    assert model["attention"](x, x, x)[0].shape == x.shape


def test_embeddings_on_request():
    model = quantize(tiny.make("llama"), quantize_embeddings=True)
    assert isinstance(model.model.embed_tokens, Embedding4bit)
    assert tiny.logits(model).isfinite().all()


def test_report_accounts_for_every_weight():
    model = quantize(toy(embedding=nn.Embedding(10, 64)))
    report = model.quantization_report
    assert report.numel == num_parameters(model)
    assert report.quantized_share == pytest.approx(2 * 64 * 96 / report.numel)
    assert report.bits_per_weight == pytest.approx(4 + 8 / 64 + 2 * 8 * 8 / (2 * 64 * 96))
    assert {layer.name for layer in report.quantized} == {"up", "down"}
    assert "embedding" in str(report)


@pytest.mark.parametrize("tied", [False, True])
def test_dense_layers_through_panels(tied, tmp_path):
    model = tiny.make("llama", torch.bfloat16, tie_word_embeddings=tied)
    quantize(model, dense_panels=True)
    assert type(model.lm_head) is PanelLinear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    want = tiny.logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(tiny.logits(again), want, rtol=2e-2, atol=2e-2)
    before = model.lm_head.weight.clone()
    first, last = tiny.train(add_lora(model), rate=3e-2)
    assert last < first and torch.equal(model.lm_head.weight, before)
    merge_and_unload(model, torch.bfloat16, progress_bar=False)
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    plain = quantize(tiny.make("llama", torch.bfloat16), dense_panels=False)
    assert type(plain.lm_head) is nn.Linear


# Memory -------------------------------------------------------------------------------------------


def test_dense_weights_are_released_one_by_one(monkeypatch):
    model = tiny.make("llama")
    alive = [
        weakref.ref(m.weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    counts = []
    original = Linear4bit.from_linear.__func__

    def from_linear(cls, linear, config=None):
        counts.append(sum(ref() is not None for ref in alive))
        return original(cls, linear, config)

    monkeypatch.setattr(Linear4bit, "from_linear", classmethod(from_linear))
    quantize(model)
    assert counts == list(range(14, 0, -1))
    assert not any(ref() is not None for ref in alive)


def test_memory_report():
    model = tiny.make("llama")
    dense = memory_report(model)
    assert dense.bits_per_weight == 0
    assert dense.total == sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )
    add_lora(quantize(model), LoraConfig(r=4, query=True, value=False))
    report = memory_report(model)
    packed = sum(4 * m.in_features * m.out_features // 8 for m in model.modules() if is_packed(m))
    assert report.parts["4-bit weights"] == packed
    assert 4.125 < report.bits_per_weight < 4.2
    assert report.parts["LoRA adapters"] == 2 * 4 * (4 * 64 + 64 * 4)
    assert report.parts["embeddings"] == report.parts["unquantized layers"] == 96 * 64 * 4
    assert report.num_parameters == num_parameters(model)
    assert "4-bit weights" in str(report)


def is_packed(module):
    return isinstance(module, Linear4bit)


def test_num_parameters():
    model = tiny.make("llama")
    total, tables = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    quantize(model)
    assert num_parameters(model) == total
    assert num_parameters(model, exclude_embeddings=True) == tables
    packed = sum(m.in_features * m.out_features for m in model.modules() if is_packed(m))
    assert num_parameters(model, only_trainable=True) == total - packed


def test_whole_model_on_meta():
    with torch.device("meta"):
        model = tiny.make("llama")
    quantize(model)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert memory_report(model).bits_per_weight > 4.1


# Bad arguments ------------------------------------------------------------------------------------


def test_quantizing_twice_is_refused():
    model = quantize(toy())
    with pytest.raises(ValueError, match="up is a Linear4bit, want an unquantized model"):
        quantize(model)


def test_adapters_first_is_refused():
    model = add_lora(toy(), LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="up is a LoraLinear, want a model without adapters"):
        quantize(model)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig())
    with pytest.raises(ValueError, match="is a PeftModel, want a model without adapters"):
        quantize(model)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="model is a str, want an nn"):
        quantize("llama")
    with pytest.raises(TypeError, match=r"a single Linear, .*Linear4bit\.from_linear"):
        quantize(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="config is a str, want a QuantConfig"):
        quantize(toy(), "nf4")
    with pytest.raises(ValueError, match=r"'gate', which matches no module, want .*'up', 'down'"):
        quantize(toy(), modules_to_not_convert=["gate"])
    with pytest.raises(ValueError, match="no layer to pack"):
        quantize(nn.ModuleDict({"norm": nn.LayerNorm(4)}))
    with pytest.raises(ValueError, match=r"extra\.weight is on the meta device"):
        quantize(toy(extra=nn.Linear(4, 4, device="meta")))


def test_non_finite_weight_names_its_layer():
    model = toy()
    model["down"].weight.data[1, 2] = torch.inf
    with pytest.raises(RuntimeError, match=r"quantize_model: down: .*\[1, 2\]"):
        quantize(model)


def test_loading_takes_dense_panels(tmp_path):
    import qlora_ext

    tiny.make("llama", torch.float16).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float16, quantization_config=qlora_ext.QLoraExtConfig()
    )
    assert type(model.lm_head) is PanelLinear
    assert type(model.dequantize().lm_head) is nn.Linear


def test_saving_a_model_with_adapters_loses_nothing_and_says_so(tmp_path):
    model = quantize(tiny.make("llama"))
    want = tiny.logits(model)
    add_lora(model)
    with pytest.warns(UserWarning, match="holds the quantized base and the adapters of add_lora"):
        model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    adapters = {name for name in model.state_dict() if "lora_" in name}
    assert len(adapters) == 8 and not info["missing_keys"]
    assert set(info["unexpected_keys"]) == adapters
    assert torch.equal(tiny.logits(again), want)


@pytest.mark.parametrize("loaded", [False, True])
def test_transformers_trainer_trains_and_resumes_our_adapters(loaded, tmp_path):
    import qlora_ext

    tiny.make("llama").save_pretrained(tmp_path / "base")

    def train(steps, **resume):
        torch.manual_seed(0)
        if loaded:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=qlora_ext.QLoraExtConfig()
            )
        else:
            model = quantize(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        add_lora(model, LoraConfig(lora_dropout=0.0))
        rows = tiny.inputs(model)["input_ids"]
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=steps,
                per_device_train_batch_size=1,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                save_steps=2,
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
        trainer.train(**resume)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    half = train(2)
    resumed = train(4, resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "run")
    whole = train(4)
    for name, value in whole.items():
        assert not torch.equal(value, half[name])
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable", [False, True])
def test_trainer_is_told_of_adapters_that_train(trainable, tmp_path):
    import qlora_ext

    tiny.make("llama").save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = qlora_ext.QLoraExtConfig()
    model = add_lora(load(tmp_path / "base", quantization_config=config))
    qlora_ext.save_adapter(model, tmp_path / "adapter")
    again = load(tmp_path / "base", quantization_config=config)
    qlora_ext.load_adapter(again, tmp_path / "adapter", trainable=trainable)
    assert again.hf_quantizer.is_qat_trainable == trainable
