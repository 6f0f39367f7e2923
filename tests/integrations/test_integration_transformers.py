"""Quantizing while loading, saving and reloading through transformers' own code."""

import copy
import json
import shutil
import warnings

import pytest
import torch

import tiny_models
from integration_helpers import ids, logits, run_python, tiny_llama

pytest.importorskip("transformers")

import qlora_ext
from qlora_ext.integrations.transformers.checkpoint import Checkpoint
from qlora_ext.nn import Linear4bit, PanelLinear
from qlora_ext.text import CheckpointError


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def packed(llama, tmp_path_factory):
    """The folder of a saved 4-bit model, and the model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=qlora_ext.QLoraExtConfig()
    )
    path = tmp_path_factory.mktemp("packed")
    model.save_pretrained(path)
    return path, model


def load(path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def packed_layers(model) -> dict[str, Linear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def packed_bytes(model) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8
    }


def assert_same_bytes(got, want):
    got, want = packed_bytes(got), packed_bytes(want)
    assert got.keys() == want.keys() and got
    for name in want:
        assert torch.equal(got[name], want[name]), name


# Hooks ---------------------------------------------------------------------------------------


ATTACHED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from peft.tuners.lora import LoraModel
assert "qlora_ext" in AUTO_QUANTIZER_MAPPING
assert LoraModel._qlora_ext_attached
assert len([f for f in sys.meta_path if type(f).__name__ == "_HookFinder"]) == 1
"""


def test_import_loads_no_trainer_and_hooks_attach_later():
    run_python(
        """
import qlora_ext
heavy = {"transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import transformers.modeling_utils, peft
from qlora_ext.integrations import bitsandbytes
assert not bitsandbytes.is_enabled()
"""
        + ATTACHED
    )


def test_hooks_attach_to_what_is_loaded():
    run_python("import transformers.modeling_utils, peft, qlora_ext" + ATTACHED)


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("transformers", "4.57.6", r"want 5\.6 or newer; .*fail to merge"),
        ("transformers", "5.5.4", r"want 5\.6 or newer"),
        ("peft", "0.17.1", r"want 0\.18 or newer; older ones cannot be .* with transformers 5"),
        ("trl", "0.23.1", r"want 0\.24 or newer; no failure is known"),
        ("accelerate", "1.3.0", r"want 1\.4 or newer"),
        ("transformers", "6.0.0rc1", r"the newest release tested is 5\.24"),
    ],
)
def test_version_outside_the_window_is_named(monkeypatch, name, version, said):
    from qlora_ext.integrations import import_hook as integrations

    monkeypatch.setattr(integrations.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(integrations, "_older", set())
    with pytest.warns(UserWarning, match=rf"found {name} {version}, {said}") as caught:
        integrations.check_version(name)
    assert len(caught) == 1


def test_an_old_release_is_named_once(monkeypatch):
    """Also where its plug-in, and that of PEFT above it, cannot be imported."""
    from qlora_ext.integrations import import_hook as integrations

    versions = {"transformers": "4.57.6", "peft": "0.21.2"}
    monkeypatch.setattr(integrations.importlib.metadata, "version", versions.get)
    monkeypatch.setattr(integrations, "_attached", set())
    monkeypatch.setattr(integrations, "_older", set())

    def import_module(name):
        raise ImportError("cannot import name 'x'")

    monkeypatch.setattr(integrations.importlib, "import_module", import_module)
    with pytest.warns(UserWarning, match=r"found transformers 4\.57\.6, want 5\.6") as caught:
        integrations._run_hook("transformers.modeling_utils")
        integrations._run_hook("peft")
    assert len(caught) == 1
    error = ImportError("cannot import name 'x'")
    with pytest.raises(ImportError, match=r"found transformers 4.* want 5\.6 or newer \(cannot im"):
        raise integrations.named_by_version(error, "transformers")
    assert integrations.named_by_version(error, "peft") is error


@pytest.mark.parametrize(
    "versions",
    [None, {"transformers": "5.6.0", "peft": "0.18.0", "trl": "0.24.0", "accelerate": "1.4.0"},
     {"transformers": "5.99.0.dev0", "peft": "0.99", "trl": "1.99", "accelerate": "1.99"}],
    ids=["installed", "oldest", "newer"],
)  # fmt: skip
def test_version_inside_the_window_is_silent(monkeypatch, versions):
    from qlora_ext.integrations import import_hook as integrations

    if versions:
        monkeypatch.setattr(integrations.importlib.metadata, "version", versions.get)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in integrations.WINDOWS:
            integrations.check_version(name)


# Quantizing while loading --------------------------------------------------------------------


def test_loading_packs_what_quantize_4bit_packs(llama, packed):
    dense = load(llama)
    _, model = packed
    layers = packed_layers(model)
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        want = qlora_ext.quantize_4bit(dense.get_submodule(name).weight)
        got = layer.quantized
        assert torch.equal(got.packed, want.packed), name
        assert torch.equal(got.absmax, want.absmax), name
        assert torch.equal(got.nested, want.nested), name
    assert type(model.lm_head) is PanelLinear


def test_logits_are_those_of_the_dequantized_model(llama, packed):
    _, model = packed
    dense = load(llama)
    for name, layer in packed_layers(model).items():
        dense.get_submodule(name).weight.data = qlora_ext.dequantize_4bit(layer.quantized)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_type": "fp4", "double_quant": False},
        {"quant_type": "linear", "blocksize": 128},
        {"blocksize": None, "double_quant": False},
        {"normalization": "standard", "quant_type": "linear"},
        {"quant_type": "custom", "codebook": [i / 8 - 1 for i in range(16)]},
        {"companding": "logarithmic", "companding_k": 8.0, "quant_type": "linear"},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items())[:40],
)
def test_every_setting_survives_saving(llama, tmp_path, settings):
    model = load(llama, quantization_config=qlora_ext.QLoraExtConfig(**settings))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_bytes(again, model)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.to_quant_config() == (qlora_ext.QuantConfig(**settings))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_dry_run_on_the_meta_device(architecture, tmp_path):
    tiny_models.make(architecture).save_pretrained(tmp_path)
    config = qlora_ext.QLoraExtConfig()
    real = load(tmp_path, quantization_config=config)
    dry = load(tmp_path, quantization_config=config, device_map="meta")
    assert all(p.is_meta for p in dry.parameters())
    sizes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (real, dry)]
    assert sizes[0] == sizes[1]
    assert dry.quantization_report == real.quantization_report


def test_a_dtype_that_is_not_packed(llama):
    config = qlora_ext.QLoraExtConfig()
    sentence = "The weights of linear layers are torch.float64, want float32, float16 or bfloat16"
    with pytest.raises(ValueError, match=f"no linear layer to pack in Llama.*. {sentence}"):
        load(llama, quantization_config=config, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"has no layer to pack.* {sentence}"):
        qlora_ext.quantize_model(tiny_models.make("llama").double(), progress_bar=False)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True, "return_dict": True, "trust_remote_code": True},
        {"torch_dtype": torch.float32},
    ],
    ids=str,
)
def test_usual_arguments_are_accepted(llama, packed, kwargs):
    config = qlora_ext.QLoraExtConfig()
    model = load(llama, quantization_config=config, **kwargs)
    assert_same_bytes(model, packed[1])
    assert config.modules_to_not_convert is None  # the caller's object is as it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(llama, dtype):
    model = load(llama, quantization_config=qlora_ext.QLoraExtConfig(), dtype=dtype)
    assert logits(model).dtype == dtype
    assert logits(model).isfinite().all()
    dense = load(llama, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    want = qlora_ext.quantize_4bit(dense.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(layer.weight, want.packed)


def test_modules_to_not_convert(llama):
    config = qlora_ext.QLoraExtConfig(modules_to_not_convert=["q_proj", "model.layers.1"])
    model = load(llama, quantization_config=config)
    names = set(packed_layers(model))
    assert names == {
        f"model.layers.0.{name}"
        for name in ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    }


def test_tied_head_stays_tied(tmp_path):
    tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    model = load(tmp_path / "tied", quantization_config=qlora_ext.QLoraExtConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_fp32_modules_of_the_class_are_kept(tmp_path):
    # T5 casts activations to wo.weight.dtype; its class keeps wo out of low precision.
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "t5", quantization_config=qlora_ext.QLoraExtConfig(), dtype=torch.bfloat16
    )
    names = set(packed_layers(model))
    assert names and not any(name.endswith("wo") for name in names)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.is_floating_point()
    tokens = torch.arange(1, 9)[None]
    assert model(input_ids=tokens, decoder_input_ids=tokens).logits.isfinite().all()


def test_conv1d_is_packed_and_comes_back(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2", quantization_config=qlora_ext.QLoraExtConfig())
    assert len(packed_layers(model)) == 2 * 4
    model.save_pretrained(tmp_path / "packed")
    packed_logits = logits(load(tmp_path / "packed"))
    assert torch.equal(packed_logits, logits(model))
    model.dequantize()
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(logits(model), packed_logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(model))


def test_fused_experts_are_packed_and_the_router_is_reported(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"stay unquantized .*mlp\.gate \(not an nn"):
        model = load(tmp_path, quantization_config=qlora_ext.QLoraExtConfig())
    assert type(model.model.layers[0].mlp.experts).__name__ == "Experts4bit"


# Saving and reloading ------------------------------------------------------------------------


def test_reload_and_resave(packed, tmp_path):
    path, model = packed
    again = load(path)
    assert_same_bytes(again, model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path)
    third = load(tmp_path)
    assert torch.equal(logits(third), logits(model))
    assert (tmp_path / "model.safetensors").read_bytes() == (
        path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reload_in_another_dtype(packed, dtype):
    path, model = packed
    again = load(path, dtype=dtype)
    assert_same_bytes(again, model)
    cast = copy.deepcopy(model).to(dtype)
    # .to() also rounds the rotary frequencies, which loading keeps in float32.
    cast.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    assert_same_bytes(cast, model)
    assert torch.equal(logits(again), logits(cast))
    # A layer that was packed, saved and read in another dtype is the same function.
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(again.model.layers[0].mlp.up_proj(x), layer(x))


def test_bfloat16_model_reloaded_as_float32_keeps_its_bytes(llama, tmp_path):
    config = qlora_ext.QLoraExtConfig()
    model = load(llama, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    again = load(tmp_path, dtype=torch.float32)
    assert_same_bytes(again, model)
    rotary = copy.deepcopy(again.model.rotary_emb)
    cast = model.to(torch.float32)
    cast.model.rotary_emb = rotary
    assert torch.equal(logits(again), logits(cast))


def test_packed_embeddings_are_read_back(llama, tmp_path):
    from transformers import AutoModel

    model = qlora_ext.quantize_model(load(llama), quantize_embeddings=True, progress_bar=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.embed_tokens).__name__ == "Embedding4bit"
    assert_same_bytes(again, model)
    assert torch.equal(logits(again), logits(model))
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base.embed_tokens).__name__ == "Embedding4bit"


@pytest.mark.parametrize("way", ["half()", "dtype", "NaN"])
def test_what_the_dtype_cannot_hold_is_not_saved(llama, tmp_path, way):
    """An embedding that fp16 cannot hold became Inf in the file without a word."""
    model = load(llama, dtype=torch.float32)
    model.get_input_embeddings().weight.data[3, 5] = 1e30
    model.save_pretrained(tmp_path / "wide")
    if way == "dtype":
        settings = {"quantization_config": qlora_ext.QLoraExtConfig()}
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight holds 1 value of"):
            load(tmp_path / "wide", dtype=torch.float16, **settings)
        return
    model = qlora_ext.quantize_model(model, progress_bar=False)
    model.save_pretrained(tmp_path / "packed")
    if way == "half()":
        model = model.half()
    else:
        model.get_input_embeddings().weight.data[3, 5] = float("nan")
    name = r"save_pretrained: model\.embed_tokens\.weight"
    with pytest.raises(OverflowError, match=rf"{name} holds 1 value of .* cannot hold"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_diverged_adapter_does_not_stop_a_run_that_saves(packed, tmp_path):
    model = qlora_ext.add_lora(load(packed[0]), qlora_ext.LoraConfig(r=2))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="the adapters of add_lora"):
        model.save_pretrained(tmp_path / "out")
    assert_same_bytes(load(tmp_path / "out"), packed[1])


def test_sharded_save(packed, tmp_path):
    _, model = packed
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_disk_offload_of_a_packed_model(packed, tmp_path):
    path, model = packed
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    again = load(path, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_cpu_offload(packed):
    """accelerate keeps weights elsewhere and brings each layer's in for its forward pass."""
    from accelerate import cpu_offload

    model = copy.deepcopy(packed[1])
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    want = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), want)


def test_disk_offload_while_packing_is_refused(llama):
    with pytest.raises(ValueError, match="device_map sends layers to disk"):
        load(
            llama,
            quantization_config=qlora_ext.QLoraExtConfig(),
            device_map={"model": "cpu", "lm_head": "disk"},
        )


def test_another_head_on_a_packed_base(packed):
    from transformers import AutoModel, AutoModelForSequenceClassification

    path, model = packed
    base = AutoModel.from_pretrained(path)
    assert_same_bytes(base.layers, model.model.layers)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    assert type(classifier.score) is PanelLinear
    assert_same_bytes(classifier.model.layers, model.model.layers)


def test_parameters_are_counted_as_weights(llama, packed):
    dense, (_, model) = load(llama), packed
    assert model.num_parameters() == dense.num_parameters()
    without_embeddings = dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == without_embeddings


def test_dequantize(packed, tmp_path):
    path, model = packed
    again = load(path)
    again.dequantize()
    assert not packed_layers(again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_generate(packed):
    _, model = packed
    out = model.generate(ids(1, 4), max_new_tokens=6, do_sample=False, pad_token_id=2)
    assert out.shape[1] > 4


# What is wrong is said -----------------------------------------------------------------------


def test_unknown_setting():
    with pytest.raises(ValueError, match=r"unknown settings \['blcksize'\]"):
        qlora_ext.QLoraExtConfig(blcksize=64)
    with pytest.raises(ValueError, match="blocksize is 63"):
        qlora_ext.QLoraExtConfig(blocksize=63)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("std_factor", "x"),
        ("companding_k", None),
        ("companding_k", True),
        ("modules_to_not_convert", 5),
        ("modules_to_not_convert", ["q_proj", None]),
    ],
)
def test_setting_of_another_type(copy_of_packed, setting, value):
    with pytest.raises(ValueError, match=f"{setting} (got|is) .* want a"):
        qlora_ext.QLoraExtConfig(**{setting: value})
    config = json.loads((copy_of_packed / "config.json").read_text())
    config["quantization_config"][setting] = value
    (copy_of_packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{setting} (got|is) .* want a"):
        load(copy_of_packed)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("modules_to_not_convert", ["("], r"modules_to_not_convert has '\(', want a regular expr"),
        ("modules_to_not_convert", ["(.+)+!"], r"modules_to_not_convert has .* that is quick to m"),
        ("companding_k", 10**400, "companding_k is 1000.* want a number that fits a float"),
    ],
    ids=range(3),
)
def test_hostile_settings(copy_of_packed, setting, value, message):
    with pytest.raises(ValueError, match=message):
        qlora_ext.QLoraExtConfig(**{setting: value})
    config = json.loads((copy_of_packed / "config.json").read_text())
    config["quantization_config"][setting] = value
    (copy_of_packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(copy_of_packed)


def test_one_name_to_leave_alone(llama):
    config = qlora_ext.QLoraExtConfig(modules_to_not_convert="q_proj")
    assert config.modules_to_not_convert == ["q_proj"]
    model = load(llama, quantization_config=config)
    assert len(packed_layers(model)) == 2 * 6
    config.modules_to_not_convert = "k_proj"  # set afterwards
    assert "model.layers.0.self_attn.q_proj" in packed_layers(
        load(llama, quantization_config=config)
    )


def test_a_name_that_matches_nothing_is_named(llama, packed):
    config = qlora_ext.QLoraExtConfig(modules_to_not_convert=["down_prj", "up_proj", "lm_head"])
    with pytest.warns(UserWarning, match="modules_to_not_convert has 'down_prj', which") as caught:
        load(llama, quantization_config=config)
    assert not any("up_proj" in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QLoraExtConfig")
        load(llama, quantization_config=qlora_ext.QLoraExtConfig())
        load(packed[0])


def test_two_configs(packed):
    path, _ = packed
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        load(path, quantization_config=qlora_ext.QLoraExtConfig(blocksize=128))


def test_nan_weight_is_named(llama, tmp_path):
    model = load(llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    said = r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds 1 value .* 1 NaN"
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path, quantization_config=qlora_ext.QLoraExtConfig())


def edit_checkpoint(path, edit):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copy_of_packed(packed, tmp_path):
    packed[1].save_pretrained(tmp_path)
    return tmp_path


def test_missing_weight(copy_of_packed):
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    edit_checkpoint(copy_of_packed, edit)
    with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.0\.mlp\.up_proj"):
        load(copy_of_packed)


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_dense_tensor_is_not_made_at_random(copy_of_packed, key):
    edit_checkpoint(copy_of_packed, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor of LlamaForCausalLM: {key}:"):
        qlora_ext.from_pretrained(copy_of_packed)


def test_a_head_of_another_class_is_made_anew(packed):
    from transformers import AutoModelForSequenceClassification as Classifier

    model, info = qlora_ext.from_pretrained(
        packed[0], model_class=Classifier, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"} and model.score.weight.isfinite().all()


def test_the_quant_method_has_one_spelling(copy_of_packed):
    config = json.loads((copy_of_packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "QLORA_EXT"
    (copy_of_packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quant_method is 'QLORA_EXT', want qlora_ext"):
        qlora_ext.from_pretrained(copy_of_packed)
    with pytest.raises(CheckpointError, match="quant_method is 'QLORA_EXT', want qlora_ext"):
        Checkpoint(copy_of_packed)


def test_missing_statistics(copy_of_packed):
    edit_checkpoint(copy_of_packed, lambda t: t.pop("model.layers.0.mlp.up_proj.weight_absmax"))
    with pytest.raises((ValueError, RuntimeError), match="weight_absmax"):
        load(copy_of_packed)


def test_foreign_codebook(copy_of_packed):
    def edit(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_codebook"] += 1

    edit_checkpoint(copy_of_packed, edit)
    with pytest.raises((ValueError, RuntimeError), match="weight_codebook"):
        load(copy_of_packed)


def test_truncated_weight(copy_of_packed):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_checkpoint(copy_of_packed, lambda t: t.update({name: t[name][:10].clone()}))
    # From transformers 5.23 on its loader refuses it, before that our check after loading.
    with pytest.raises((RuntimeError, CheckpointError)):
        load(copy_of_packed)


@pytest.mark.parametrize("how", ["transformers", "ours", "command"])
@pytest.mark.parametrize(
    ("version", "said"),
    [
        (3, r"format_version is 3, want at most 2: a newer qlora_ext wrote .*; upgrade qlora_ext"),
        ("1", r"format_version is '1', want an integer from 1 to 2"),
        (True, r"format_version is True, want an integer"),
        (0, r"format_version is 0, want an integer"),
        (1, None),
        (None, None),
    ],
)
def test_format_version(packed, copy_of_packed, how, version, said):
    from qlora_ext.models.config_file import read_raw_config

    read = {
        "transformers": load,
        "ours": qlora_ext.from_pretrained,
        "command": read_raw_config,
    }[how]
    path = copy_of_packed / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"].pop("format_version") == 1
    if version is not None:
        config["quantization_config"]["format_version"] = version
    if version == 3:  # what a newer format may have
        config["quantization_config"]["swizzle"] = 7
    path.write_text(json.dumps(config))
    if said is None:
        model = read(copy_of_packed)
        if how != "command":
            assert torch.equal(logits(model), logits(packed[1]))
    else:
        with pytest.raises(ValueError, match=said):
            read(copy_of_packed)


@pytest.mark.parametrize("key", ["weight", "weight_absmax", "weight_codebook"])
def test_floats_under_a_packed_key(copy_of_packed, key):
    name = f"model.layers.0.mlp.up_proj.{key}"
    edit_checkpoint(copy_of_packed, lambda t: t.update({name: torch.randn(t[name].shape)}))
    with pytest.raises(ValueError, match=rf"up_proj\.{key}: dtype got F32, want U8"):
        load(copy_of_packed)


def test_edited_config(copy_of_packed):
    config = json.loads((copy_of_packed / "config.json").read_text())
    config["quantization_config"]["blocksize"] = -64
    (copy_of_packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="blocksize"):
        load(copy_of_packed)


def changed(packed, folder, **tensors):
    """A copy of the packed folder with other tensors under some keys; None leaves one out."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(packed[0], folder)
    state = {**load_file(folder / "model.safetensors"), **tensors}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("through", ["AutoModel", "AutoModelForCausalLM", "ours"])
def test_loading_refuses_values_that_are_not_finite(packed, tmp_path, key, value, through):
    tensor = packed[1].state_dict()[key].clone()
    tensor.view(-1)[3] = value
    folder = changed(packed, tmp_path / "bad", **{key: tensor})
    transformers = pytest.importorskip("transformers")
    load = qlora_ext if through == "ours" else getattr(transformers, through)
    with pytest.raises(CheckpointError, match=r"bad/model.safetensors: .*holds 1 value") as error:
        load.from_pretrained(folder)
    assert f": {key} holds" in str(error.value)


def test_loading_refuses_values_beyond_the_dtype_that_is_asked_for(llama, packed, tmp_path):
    norm = packed[1].model.norm.weight.detach().clone()
    norm[0] = 1e20
    folder = changed(packed, tmp_path / "big", **{"model.norm.weight": norm})
    assert load(folder, dtype=torch.bfloat16).model.norm.weight[0] > 9e19
    with pytest.raises(CheckpointError, match=r"stored in torch.float32: load it with that dtype"):
        load(folder, dtype=torch.float16)
    # While packing, too.
    dense = tmp_path / "dense"
    model = load(llama)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(dense)
    with pytest.raises(CheckpointError, match=r"dense/model.*: model.norm.weight holds 1 value"):
        load(dense, quantization_config=qlora_ext.QLoraExtConfig())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_that_is_damaged_is_not_to_be_loaded_with_another_dtype(
    packed, tmp_path, value, dtype
):
    norm = packed[1].model.norm.weight.detach().clone()
    norm[0] = value
    folder = changed(packed, tmp_path / "bad", **{"model.norm.weight": norm})
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds .* it is damaged") as error:
        load(folder, dtype=dtype)
    assert "load it with that dtype" not in str(error.value)


@pytest.mark.parametrize(
    "family, key",
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"),  # a Conv1D
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),  # one of a stack
    ],
)
def test_a_weight_that_cannot_be_packed_is_named_with_its_file(family, key, tmp_path, capfd):
    from safetensors.torch import load_file, save_file

    import tiny_models

    tiny_models.make(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    where = rf"model.safetensors: {key} holds 1 value of [\d,]+ that "
    config = qlora_ext.QLoraExtConfig()
    for value, dtype, said in (
        (7e4, torch.float16, "largest magnitude is 70000, .* stored in torch.float32: load it wit"),
        (float("inf"), torch.float16, "the file itself holds that: it is damaged"),
        (float("nan"), torch.float32, "1 NaN among them; .* it is damaged"),
    ):
        state[key].view(-1)[5] = value
        save_file(state, file, metadata={"format": "pt"})
        capfd.readouterr()
        with pytest.raises(CheckpointError, match=where + f".*{said}"):
            load(tmp_path, quantization_config=config, dtype=dtype)
        assert "CONVERSION" not in "".join(capfd.readouterr())
        if value == 7e4:
            load(tmp_path, quantization_config=config, dtype=torch.bfloat16)


def test_the_state_dict_that_is_given_is_checked_and_written(packed, tmp_path):
    model = load(packed[0])
    norm = torch.full_like(model.model.norm.weight, 3.0)
    state = {**model.state_dict(), "model.norm.weight": norm}
    model.save_pretrained(tmp_path / "good", state_dict=state)
    assert torch.equal(load(tmp_path / "good").model.norm.weight, norm)
    norm[1] = float("inf")
    with pytest.raises(OverflowError, match=r"save_pretrained: model.norm.weight holds 1 value"):
        model.save_pretrained(tmp_path / "bad", state_dict=state)
    assert not list((tmp_path / "bad").glob("*.safetensors"))
    model.save_pretrained(tmp_path / "own")  # what was given is forgotten
    assert torch.equal(load(tmp_path / "own").model.norm.weight, model.model.norm.weight)
    with pytest.raises(ValueError, match="got a state_dict with format='bitsandbytes'"):
        qlora_ext.save_pretrained(model, tmp_path / "b", format="bitsandbytes", state_dict=state)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"hidden_act": "nothing"}, r"hidden_act is 'nothing', which transformers does not accept"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan, want a finite number"),
        ({"dtype": "auto"}, r"dtype is 'auto', want the name of a float dtype"),
    ],
)
def test_ours_names_the_key_of_config_json(copy_of_packed, values, said):
    path = copy_of_packed / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {said}"):
        qlora_ext.from_pretrained(copy_of_packed)


@pytest.mark.parametrize("lacks", ["weight", "weight_absmax", "weight_codebook"])
@pytest.mark.parametrize("layer", ["embed_tokens", "layers.0.mlp.up_proj"])
@pytest.mark.parametrize("through", ["AutoModel", "AutoModelForCausalLM"])
def test_a_packed_layer_without_one_of_its_tensors_is_refused(
    llama, tmp_path, lacks, layer, through
):
    """Of a packed embedding transformers made the weight anew, at random, with a warning."""
    transformers = pytest.importorskip("transformers")
    model = load(llama)
    qlora_ext.quantize_model(model, quantize_embeddings=True, progress_bar=False)
    model.save_pretrained(tmp_path / "packed")
    key = f"model.{layer}.{lacks}"
    folder = changed((tmp_path / "packed", model), tmp_path / "bad", **{key: None})
    with pytest.raises(
        CheckpointError, match=r"bad/model.safetensors: .* the checkpoint lacks"
    ) as e:
        getattr(transformers, through).from_pretrained(folder)
    assert key in str(e.value)


def test_dequantize_refuses_a_narrower_dtype_and_changes_nothing(packed):
    model = load(packed[0])
    layer = model.model.layers[1].mlp.up_proj
    big = torch.full((layer.out_features, layer.in_features), 1e20)
    model.model.layers[1].mlp.up_proj = Linear4bit.from_linear(dense_of(big))
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(OverflowError, match=r"dequantize: model.layers.1.mlp.up_proj.weight holds"):
        model.dequantize(torch.float16)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert model.model.norm.weight.dtype == torch.float32
    assert model.dequantize(torch.bfloat16).model.layers[1].mlp.up_proj.weight.isfinite().all()


def dense_of(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear
