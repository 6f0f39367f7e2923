"""LoraConfig, add_lora, and PEFT's file format both ways with the real PEFT."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_models as tiny
from qlora_ext import (
    LoraConfig,
    add_lora,
    load_adapter,
    merge_and_unload,
    print_trainable_parameters,
    quantize_model,
    save_adapter,
)
from qlora_ext.nn import Linear4bit, LoraLinear, LoraLinear4bit, PanelLinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model")
EVERYTHING = {"query": True, "key": True, "value": True, "projection": True, "mlp": True}


def skip_what_peft_cannot_wrap(family):
    """PEFT before 0.21 asks a T5 for a method that newer releases of transformers lack."""
    method = "_prepare_encoder_decoder_kwargs_for_generation"
    has = hasattr(transformers.T5ForConditionalGeneration, method)
    if family == "t5" and not has and tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21):
        pytest.skip("this PEFT takes no T5 of this transformers")


def quantized(family="llama", **settings):
    return quantize_model(tiny.make(family, **settings), progress_bar=False)


def adapted_names(model):
    """Adapted layers as patterns: layers.*.q_proj."""
    names = [n for n, m in model.named_modules() if isinstance(m, (LoraLinear, LoraLinear4bit))]
    return sorted({re.sub(r"\b\d+\b", "*", name).split(".*.", 1)[-1] for name in names})


# Which layers -------------------------------------------------------------------------------------

SPLIT = ["self_attn.q_proj", "self_attn.v_proj"]
TABLE = {
    "llama": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "mistral": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "qwen2": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "qwen3": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "gemma": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "gemma2": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "gemma3": (["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj"),
    "phi": (["mlp.fc1", "mlp.fc2"], "self_attn.dense"),
    "opt": (["fc1", "fc2"], "self_attn.out_proj"),
    "starcoder2": (["mlp.c_fc", "mlp.c_proj"], "self_attn.o_proj"),
}
FUSED = {
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", ["mlp.down_proj", "mlp.gate_up_proj"]),
    "gpt2": ("attn.c_attn", "attn.c_proj", ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        "attention.query_key_value",
        "attention.dense",
        ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
    ),
    "bloom": (
        "self_attention.query_key_value",
        "self_attention.dense",
        ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
    ),
    "falcon": (
        "self_attention.query_key_value",
        "self_attention.dense",
        ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
    ),
}


@pytest.mark.parametrize("family", TABLE)
def test_switches_select_layers(family):
    mlp, projection = TABLE[family]
    model = quantized(family)
    assert adapted_names(add_lora(copy.deepcopy(model))) == SPLIT
    only = LoraConfig(query=False, value=False, mlp=True)
    assert adapted_names(add_lora(copy.deepcopy(model), only)) == mlp
    full = add_lora(model, LoraConfig(**EVERYTHING))
    assert adapted_names(full) == sorted([*SPLIT, "self_attn.k_proj", projection, *mlp])


@pytest.mark.parametrize("family", FUSED)
def test_fused_attention_is_adapted_whole_or_refused_by_name(family):
    fused, projection, mlp = FUSED[family]
    model = quantized(family)
    with pytest.raises(ValueError, match=rf"query=True, value=True selects a part of .*{fused}"):
        add_lora(model)
    assert adapted_names(model) == []
    whole = LoraConfig(query=True, key=True, value=True)
    assert adapted_names(add_lora(copy.deepcopy(model), whole)) == [fused]
    assert adapted_names(add_lora(model, LoraConfig(**EVERYTHING))) == sorted(
        [fused, projection, *mlp]
    )


@pytest.mark.parametrize("family", [*TABLE, *FUSED, "t5", "mixtral", "qwen3_moe"])
def test_family_trains(family):
    model = quantized(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    add_lora(model, LoraConfig(query=True, key=True, value=True, lora_dropout=0.1))
    first, last = tiny.train(model)
    assert last < first
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" not in name:
            assert torch.equal(parameter, before[name])
    assert tiny.generate(model).shape[1] > 5


def test_head_is_adapted_alone_where_tied():
    model = quantized(tie_word_embeddings=True)
    table = model.model.embed_tokens.weight
    add_lora(model, LoraConfig(query=False, value=False, head=True))
    assert isinstance(model.lm_head, LoraLinear) and adapted_names(model) == ["lm_head"]
    assert model.lm_head.weight is table
    before = table.clone()
    first, last = tiny.train(model)
    assert last < first and torch.equal(model.model.embed_tokens.weight, before)


def test_gpt_neox_head():
    model = add_lora(quantized("gpt_neox"), LoraConfig(query=False, value=False, head=True))
    assert adapted_names(model) == [n for n in ("embed_out", "lm_head") if hasattr(model, n)]


def test_explicit_targets():
    model = quantized()
    chosen = add_lora(copy.deepcopy(model), LoraConfig(target_modules=["layers.1.mlp.up_proj"]))
    assert [n for n, m in chosen.named_modules() if isinstance(m, LoraLinear4bit)] == [
        "model.layers.1.mlp.up_proj"
    ]
    pattern = LoraConfig(target_modules=r".*\.layers\.0\..*_proj")
    assert len(adapted_names(add_lora(copy.deepcopy(model), pattern))) == 7
    everywhere = add_lora(model, LoraConfig(target_modules="all-linear"))
    assert len(adapted_names(everywhere)) == 7 and type(everywhere.lm_head) is PanelLinear


def test_adapter_dtype():
    model = add_lora(quantized(dtype=torch.bfloat16))
    assert model.model.layers[0].self_attn.q_proj.lora_A.dtype == torch.float32
    low = add_lora(quantized(dtype=torch.bfloat16), lora_dtype=torch.bfloat16)
    assert low.model.layers[0].self_attn.q_proj.lora_A.dtype == torch.bfloat16
    for each in (model, low):
        first, last = tiny.train(each)
        assert last < first


def test_unknown_architecture_and_unmatched_switch_list_the_layers():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"wq": nn.Linear(64, 64)})] * 2)

    layers = r"the linear layers of Custom are \['layers\.\*\.wq'\]"
    with pytest.raises(ValueError, match=rf"has the architecture None, want one of .*{layers}"):
        add_lora(Custom())
    with pytest.raises(
        ValueError, match=rf"target_modules has 'q_proj', which matches no layer; {layers}"
    ):
        add_lora(Custom(), LoraConfig(target_modules=["wq", "q_proj"]))
    with pytest.raises(ValueError, match=rf"head=True, but Custom has no output.*{layers}"):
        add_lora(Custom(), LoraConfig(query=False, value=False, head=True))
    add_lora(Custom(), LoraConfig(target_modules=["wq"]))
    model = tiny.make("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"mlp=True matches no layer .*self_attn\.o_proj"):
        add_lora(model, LoraConfig(mlp=True))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "r is 0, want an integer of 1 or more"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True, want an integer of 1 or more"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1, want a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', want a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, want a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, want a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": 10**5000}, "lora_alpha is an integer of 16610 bits"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1', want a probability in [0, 1)"),
        ({"lora_dropout": None}, "lora_dropout is None"),
        ({"use_rslora": 1}, "use_rslora is 1, want True or False"),
        ({"target_modules": "("}, "target_modules is '(', want a regular expression"),
        ({"target_modules": 5}, "target_modules holds 5, want names"),
        ({"target_modules": ["q_proj", 1]}, "target_modules holds 1, want names"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "all"}, "bias is 'all', want \"none\""),
        ({"query": "no"}, "query is 'no', want True or False"),
        ({"head": 1}, "head is 1, want True or False"),
        ({"mlp": None}, "mlp is None, want True or False"),
        ({"query": False, "value": False}, "every switch is off"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_bad_configs_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraConfig(**settings)


def test_bad_models_are_refused_and_left_alone():
    model = quantized()
    with pytest.raises(TypeError, match="config is a LoraConfig, want qlora_ext"):
        add_lora(model, peft.LoraConfig())
    add_lora(model)
    with pytest.raises(ValueError, match="q_proj has an adapter already"):
        add_lora(model)
    with pytest.raises(TypeError, match="model is PEFT's PeftModel"):
        add_lora(peft.get_peft_model(tiny.make("llama"), peft.LoraConfig()))
    with pytest.raises(TypeError, match="c_attn is an unquantized Conv1D"):
        add_lora(tiny.make("gpt2"), LoraConfig(target_modules=["c_attn"]))


def test_models_of_inference_mode_are_refused_before_they_train(tmp_path):
    with torch.inference_mode():
        model = quantized()
    with pytest.raises(ValueError, match=r"add_lora: model\.embed_tokens\.weight was made under"):
        add_lora(model)
    assert not adapted_names(model)
    adapter = save_adapter(tiny.randomize(add_lora(quantized())), tmp_path)
    with pytest.raises(ValueError, match=r"load_adapter: .* was made under torch\.inference_mode"):
        load_adapter(model, adapter, trainable=True)
    want = tiny.logits(load_adapter(quantized(), adapter))
    torch.testing.assert_close(tiny.logits(load_adapter(model, adapter)), want)  # not to train


def test_a_single_layer_is_no_model(tmp_path):
    layer = Linear4bit(64, 64)
    with pytest.raises(TypeError, match="add_lora: model is a single Linear4bit, want a model"):
        add_lora(layer, LoraConfig(target_modules="all-linear"))
    with pytest.raises(TypeError, match="load_adapter: model is a single Linear, want a model"):
        load_adapter(nn.Linear(64, 64), tmp_path)
    with pytest.raises(TypeError, match="save_adapter: model is a single LoraLinear4bit, want"):
        save_adapter(LoraLinear4bit(64, 64), tmp_path)


def test_bad_settings_of_one_layer():
    with pytest.raises(ValueError, match="LoraLinear4bit: r is True, want an integer of 1"):
        LoraLinear4bit(64, 64, r=True)
    with pytest.raises(ValueError, match="LoraLinear: lora_dropout is '0', want a probability"):
        LoraLinear.from_linear(nn.Linear(64, 64), lora_dropout="0")


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), Doubling(64, 64))
    x = torch.randn(3, 64)
    want = model(x)
    for targets in (["0", "1"], "0|1"):
        with pytest.raises(TypeError, match="add_lora: 1: LoraLinear: linear is a Doubling, want"):
            add_lora(model, LoraConfig(target_modules=targets))
    assert type(model[1]) is Doubling and type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out 1 \(Doubling\)'):
        add_lora(model, LoraConfig(target_modules="all-linear"))
    assert type(model[0]) is LoraLinear and type(model[1]) is Doubling
    assert torch.equal(model(x), want)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="finds no layer to adapt"):
        add_lora(nn.Sequential(Doubling(64, 64)), LoraConfig(target_modules="all-linear"))


def test_print_trainable_parameters_counts_logical_weights(capsys):
    model = tiny.make("llama")
    total = sum(p.numel() for p in model.parameters())
    add_lora(quantize_model(model, progress_bar=False), LoraConfig(r=4))
    print_trainable_parameters(model)
    trainable = 2 * 4 * (64 + 64 + 64 + 32)
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total + trainable:,} || "
        f"trainable%: {100 * trainable / (total + trainable):.4f}\n"
    )


# PEFT's configuration and files -------------------------------------------------------------------


def dequantized(model):
    """A dense twin of a quantized model without adapters, for stock PEFT."""
    from qlora_ext import dequantize_4bit
    from qlora_ext.nn.linear import is_conv1d

    family = {m: f for f, (c, _) in tiny.FAMILIES.items() for m in [c]}[type(model.config).__name__]
    twin = tiny.make(family, tie_word_embeddings=model.config.tie_word_embeddings)
    state = twin.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.quantized, torch.float32)
            flip = is_conv1d(twin.get_submodule(name))
            state[f"{name}.weight"] = weight.T.contiguous() if flip else weight
    twin.load_state_dict(state)
    return twin


def peft_logits(model):
    return tiny.logits(model.base_model.model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "t5"])
def test_stock_peft_loads_ours_onto_a_dense_base(family, tmp_path):
    skip_what_peft_cannot_wrap(family)
    model = quantized(family)
    twin = dequantized(model)
    add_lora(model, LoraConfig(r=4, lora_alpha=12, **EVERYTHING))
    tiny.randomize(model)
    want = tiny.logits(model)
    save_adapter(model, tmp_path / "new" / "adapter")
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / "new" / "adapter")
    assert loaded.peft_config["default"].lora_alpha == 12
    torch.testing.assert_close(peft_logits(loaded), want, rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "t5"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_stock_pefts_adapters(family, use_rslora, tmp_path):
    skip_what_peft_cannot_wrap(family)
    model = quantized(family)
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=use_rslora, **EVERYTHING).to_peft(model)
    wrapped = tiny.randomize(peft.get_peft_model(dequantized(model), config)).eval()
    wrapped.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(tiny.logits(model), peft_logits(wrapped), rtol=1e-4, atol=2e-4)
    assert not any(p.requires_grad for p in model.parameters())
    again = load_adapter(dequantized(quantized(family)), tmp_path) if family != "gpt2" else model
    torch.testing.assert_close(tiny.logits(again), peft_logits(wrapped), rtol=1e-4, atol=2e-4)


def test_patterns_of_rank_and_alpha(tmp_path):
    model = quantized()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 32},
    )
    wrapped = tiny.randomize(peft.get_peft_model(dequantized(model), config)).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    assert model.model.layers[1].self_attn.q_proj.scaling == 8
    torch.testing.assert_close(tiny.logits(model), peft_logits(wrapped), rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(dequantized(quantized()), tmp_path / "ours").eval()
    torch.testing.assert_close(peft_logits(again), peft_logits(wrapped), rtol=1e-4, atol=1e-4)


class Nested(nn.Module):
    """A layer `a`, and a layer `b.a` whose name ends alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.b = nn.ModuleDict({"a": nn.Linear(64, 64)})
        self.a = nn.Linear(64, 64)

    def forward(self, x):
        return self.a(self.b["a"](x))


def test_names_that_end_alike_keep_their_own_settings(tmp_path):
    x = torch.randn(3, 64)
    model = Nested()
    model.b["a"] = LoraLinear.from_linear(model.b["a"], r=4, lora_alpha=8)
    model.a = LoraLinear.from_linear(model.a, r=2, lora_alpha=64)
    want = tiny.randomize(model)(x)
    save_adapter(model, tmp_path)
    loaded = load_adapter(Nested(), tmp_path)
    assert (loaded.a.r, loaded.a.lora_alpha) == (2, 64)
    assert (loaded.b["a"].r, loaded.b["a"].lora_alpha) == (4, 8)
    torch.testing.assert_close(loaded(x), want)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), want)
    # An adapter on `a` alone.
    model = Nested()
    model.a = LoraLinear.from_linear(model.a, r=4, lora_alpha=8)
    want = tiny.randomize(model)(x)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path).eval()
    assert theirs.targeted_module_names == ["a"]
    torch.testing.assert_close(theirs(x), want)
    torch.testing.assert_close(load_adapter(Nested(), tmp_path)(x), want)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word")
def test_head_adapter_both_ways(tied, tmp_path):
    model = quantized(tie_word_embeddings=tied)
    twin = dequantized(model)
    add_lora(model, LoraConfig(head=True))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "ours").eval()
    torch.testing.assert_close(peft_logits(theirs), tiny.logits(model), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")  # with the head's own weight beside the adapter
    again = load_adapter(quantized(tie_word_embeddings=tied), tmp_path / "theirs")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model))


def test_peft_on_the_quantized_base_reads_ours(tmp_path):
    model = add_lora(quantized(), LoraConfig(**EVERYTHING))
    tiny.randomize(model)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path).eval()
    torch.testing.assert_close(peft_logits(loaded), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_saved_config_is_pefts(tmp_path):
    save_adapter(add_lora(quantized(), LoraConfig(r=4)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"q_proj", "v_proj"} and config.task_type == "CAUSAL_LM"
    some = LoraConfig(target_modules=["layers.0.self_attn.q_proj"])
    save_adapter(add_lora(quantized(), some), tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"model.layers.0.self_attn.q_proj"}
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2


def test_shares_of_zero_3_are_refused(tmp_path):
    """Where DeepSpeed splits parameters, a process holds an empty one that knows its whole size."""
    model = add_lora(quantized(), LoraConfig(r=4))
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    words = r"[\w.]+lora_B is a tensor of DeepSpeed's ZeRO-3, .*GatheredParameters"
    with pytest.raises(ValueError, match=f"save_adapter: {words}"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"merge_and_unload: {words}"):
        merge_and_unload(model)
    assert not (tmp_path / "adapter").exists()


def test_to_peft():
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2).to_peft()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.2)
    assert {"q_proj", "v_proj"} <= set(config.target_modules)
    assert "query_key_value" not in config.target_modules
    wrapped = peft.get_peft_model(tiny.make("llama"), config)
    assert {n.split(".")[-1] for n in wrapped.targeted_module_names} == {"q_proj", "v_proj"}
    whole = LoraConfig(**EVERYTHING, head=True)
    assert "c_attn" in whole.to_peft().target_modules
    assert set(whole.to_peft(tiny.make("gpt_neox")).target_modules) >= {"query_key_value"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_to_peft_without_a_model_adapts_what_add_lora_does(family):
    if family in ("mixtral", "qwen3_moe"):
        pytest.skip("packed experts have no name in PEFT")
    skip_what_peft_cannot_wrap(family)
    model = quantized(family)
    off = {"query": False, "value": False}
    attention = {"query": True, "key": True, "value": True}
    for switches in ({**off, "mlp": True}, {**off, "projection": True}, attention):
        config = LoraConfig(**switches)
        ours = add_lora(copy.deepcopy(model), config)
        want = [n for n, m in ours.named_modules() if isinstance(m, (LoraLinear, LoraLinear4bit))]
        for theirs in (config.to_peft(), config.to_peft(model)):
            wrapped = peft.get_peft_model(copy.deepcopy(model), theirs)
            assert wrapped.targeted_module_names == want


def test_no_family_gives_a_name_another_switch():
    from qlora_ext.adapters.targets import _ends_with
    from qlora_ext.models.architectures import FAMILIES

    switches = ("query", "key", "value", "projection", "mlp")
    names = {(s, name) for f in FAMILIES.values() for s in switches for name in getattr(f, s)}
    names |= {("fused", f.fused) for f in FAMILIES.values() if f.fused}
    for switch, name in names:
        for other, its_name in names:
            assert switch == other or not _ends_with(its_name, name), (switch, name, other)


def test_to_peft_with_a_model_names_its_fused_layer():
    with pytest.raises(ValueError, match=r"selects a part of .*qkv_proj, which computes query"):
        LoraConfig().to_peft(tiny.make("phi3"))


def test_resuming_overwrites_the_adapter(tmp_path):
    model = tiny.randomize(add_lora(quantized(), LoraConfig(r=4)))
    save_adapter(model, tmp_path)
    other = add_lora(quantized(), LoraConfig(r=4))
    load_adapter(other, tmp_path, trainable=True)
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    assert sum(p.requires_grad for p in other.parameters()) == 8
    with pytest.raises(ValueError, match=r"of rank 8 and .* of rank 4, want the same"):
        load_adapter(add_lora(quantized()), tmp_path)
    with pytest.raises(ValueError, match="adapters on other layers"):
        load_adapter(add_lora(quantized(), LoraConfig(r=4, mlp=True)), tmp_path)


# Damaged and foreign files ------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    save_adapter(add_lora(quantized(), LoraConfig(r=4)), tmp_path)
    return tmp_path


def edit_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3', want 'LORA'"),
        ({"use_dora": True}, "has use_dora=True, want False; peft.PeftModel"),
        ({"bias": "all"}, "has bias='all', want 'none'"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], want None"),
        ({"lora_alpha": None}, "lora_alpha is None, want a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, want a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": -8}, "lora_alpha is -8, want a positive number"),
        ({"lora_alpha": 0}, "lora_alpha is 0, want a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', want a positive number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] is 'x', want a positive"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj'], want an object of names"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern holds '(', want a regular expression"),
        ({"rank_pattern": {"q_proj": 2}}, "has lora_A [4, 64] and the config says r = 2"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj'] is 1.5, want an integer"),
        ({"rank_pattern": {"([a-z_]+)+!": 4}}, "rank_pattern holds '([a-z_]+)+!', want a name, or"),
        ({"alpha_pattern": {".*.*.*.*.*.*!": 4}}, "alpha_pattern holds '.*.*.*.*.*.*!', want a na"),
        ({"r": True}, "r is True, want an integer"),
        ({"r": "4"}, "r is '4', want an integer"),
        ({"r": 8}, "has lora_A [4, 64] and the config says r = 8"),
        ({"lora_dropout": "0"}, "lora_dropout is '0', want a probability"),
        ({"lora_dropout": None}, "lora_dropout is None, want a probability"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, want a probability"),
        ({"use_rslora": "no"}, "use_rslora is 'no', want True or False"),
        ({"target_modules": "("}, "target_modules is '(', want a regular expression"),
        ({"target_modules": 3}, "target_modules is 3, want names of layers, or a regular"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is ['q_proj', 3], want names"),
        ({"fan_in_fan_out": "x"}, "fan_in_fan_out is 'x', want True or False"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "has init_lora_weights='corda'"),
        ({"init_lora_weights": "lora_ga"}, "has init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "loftq"}, "has init_lora_weights='loftq'"),
        ({"init_lora_weights": ["x"]}, "has init_lora_weights=['x']"),
        ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens=[1, 2], want None"),
        ({"use_qalora": True}, "has use_qalora=True, want False"),
        ({"use_bdlora": {"nblocks": 2}}, "has use_bdlora={'nblocks': 2}, want None"),
        ({"arrow_config": {"top_k": 3}}, "has arrow_config={'top_k': 3}, want None"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication=[[0, 2], [1, 2]]"),
        ({"velora_config": {"x": 1}}, "has velora_config={'x': 1}, want None"),
        ({"kasa_config": {"x": 1}}, "has kasa_config={'x': 1}, want None"),
        ({"monteclora_config": {"x": 1}}, "has monteclora_config={'x': 1}, want None"),
        ({"lora_bias": True}, "has lora_bias=True, want False"),
        (
            {"target_parameters": ["w"]},
            "adapts the parameter w, want packed experts of the model (it has none); peft",
        ),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices=[3], want None"),
        ({"use_next_years_idea": 2}, "has use_next_years_idea=2, want None; peft"),
    ],
)
def test_foreign_configs_are_refused(adapter, changes, message):
    edit_config(adapter, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(quantized(), adapter)


def test_fused_layers_of_every_family_are_known_as_such():
    """Tensor parallelism refuses to cut those in FUSED. GPT-NeoX's are split head by head."""
    from qlora_ext.models.architectures import FAMILIES, FUSED

    fused = {family.fused for family in FAMILIES.values() if family.fused}
    assert fused - FUSED == {"query_key_value"}


def test_a_path_with_nul_is_refused():
    with pytest.raises(ValueError, match=r"save_adapter: path is 'a.x00b', want one without NUL"):
        save_adapter(quantized(), "a\0b")


def test_every_field_of_pefts_config_is_judged():
    # A PEFT with a new field fails here: it is harmless, or a value of it must be refused.
    from qlora_ext.adapters import peft_config

    plain = peft.LoraConfig().to_dict()
    peft_config.check_plain("file", plain)
    refused = {
        *("bias", "modules_to_save", "init_lora_weights", "megatron_config", "lora_bias"),
        *("trainable_token_indices", "corda_config", "lora_ga_config", "use_dora"),
        *("velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config"),
        *("layer_replication", "use_bdlora", "arrow_config", "kasa_config"),
        "ensure_weight_tying",
    }
    assert set(plain) <= refused | peft_config.HARMLESS
    for key in refused & set(plain):
        with pytest.raises(ValueError, match=f"has {key}='x'"):
            peft_config.check_plain("file", {**plain, key: "x"})


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_starts_that_keep_the_base_load(start, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    model = quantized()
    wrapped = peft.get_peft_model(dequantized(model), config).eval()
    wrapped.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(tiny.logits(model), peft_logits(wrapped), rtol=1e-4, atol=1e-4)


def test_values_beyond_the_adapters_dtype_are_refused(adapter):
    def big(value, dtype):
        return lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 64), value, dtype=dtype)})

    edit_weights(adapter, big(1e5, torch.float32))
    with pytest.raises(
        ValueError, match=r"has 100000 in .*lora_A, want values that torch\.float16"
    ):
        load_adapter(quantized(), adapter, lora_dtype=torch.float16)
    edit_weights(adapter, big(1e300, torch.float64))
    with pytest.raises(ValueError, match=r"has 1e\+300 in .*want values that torch\.float32"):
        load_adapter(quantized(), adapter)
    edit_weights(adapter, big(1, torch.int32))
    with pytest.raises(ValueError, match=r"has torch\.int32 in .*lora_A, want a float dtype"):
        load_adapter(quantized(), adapter)
    with pytest.raises(TypeError, match=r"load_adapter: lora_dtype is torch\.int32"):
        load_adapter(quantized(), adapter, lora_dtype=torch.int32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
def test_adapters_that_are_not_finite_are_not_written(key, value, tmp_path):
    model = add_lora(quantized())
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn.v_proj, key)[0, 0] = value
    layer = "model.layers.1.self_attn.v_proj"
    with pytest.raises(OverflowError, match=rf"save_adapter: {layer}.{key} holds 1 value of"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edit_weights(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop(f"{Q}.lora_B.weight"),
            "has no lora_B for model.layers.0.self_attn.q_proj",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)}),
            "q_proj has lora_A [4, 63] and lora_B [64, 4], want [r, 64] and [64, r]",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 64)}),
            "has lora_A [0, 64] and lora_B [64, 4]",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan)}),
            "has a NaN or Inf in model.layers.0.self_attn.q_proj.lora_A",
        ),
        (
            lambda t: t.update({f"{Q[:-6]}x_proj.lora_A.weight": torch.zeros(4, 64)}),
            "self_attn.x_proj, which the model does not have; the linear layers of Llama",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(96, 64)}),
            "holds base_model.model.lm_head.weight [96, 64], want lora_A and lora_B",
        ),
        (lambda t: t.clear(), "holds no LoRA weights"),
    ],
)
def test_damaged_weights_are_refused(adapter, change, message):
    edit_weights(adapter, change)
    model = quantized()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(model, adapter)
    assert adapted_names(model) == []


def test_missing_and_unreadable_files(adapter):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(quantized(), adapter)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(quantized(), adapter)
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(quantized(), adapter)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(quantized(), adapter / "nowhere")


def test_saving_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_adapter: model has no adapters"):
        save_adapter(quantized(), tmp_path)


def test_failed_save_keeps_the_old_file(adapter, monkeypatch):
    import safetensors.torch

    before = (adapter / "adapter_model.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tiny.randomize(add_lora(quantized())), adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert len(list(adapter.iterdir())) == 2
