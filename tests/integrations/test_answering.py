"""BitsAndBytesConfig answered with our layers (QLORA_EXT_ENABLE=layers), in this process.

test_enable.py starts processes with the variable itself.
"""

import copy
import importlib.metadata
import importlib.util
import io
import json
import pickle
import sys
import types
import warnings

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

import qlora_ext
import tiny_models
from integration_helpers import ids, logits, tiny_llama
from paths import REPOSITORY

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto

from qlora_ext.integrations import bitsandbytes as on_our_kernels
from qlora_ext.integrations.transformers.answering import AnsweringQuantizer
from qlora_ext.integrations.transformers.bitsandbytes_config import SETTINGS
from qlora_ext.integrations.transformers.quantizer import QLoraExtHfQuantizer
from qlora_ext.nn.linear import Linear4bit

NO_STATE = "has no QuantState of bitsandbytes. Call the layer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def layers(monkeypatch):
    """What QLORA_EXT_ENABLE=layers does to transformers."""
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", AnsweringQuantizer)


def load(folder, dtype=torch.float32, **settings):
    config = BitsAndBytesConfig(**{"load_in_4bit": True, **settings})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return model.eval()


def stored(folder):
    """(quant_method, the tensors) of a saved model."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config["quant_method"], load_file(folder / "model.safetensors")


def up(model):
    return model.model.layers[0].mlp.up_proj


# Saving and unpacking ---------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_saves_in_both_formats(layers, folder, tmp_path, double_quant):
    model = load(folder, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    want = logits(model)
    config = model.config.quantization_config
    qlora_ext.save_pretrained(model, tmp_path / "theirs", format="bitsandbytes")
    qlora_ext.save_pretrained(model, tmp_path / "ours", format="qlora_ext")
    assert model.config.quantization_config is config
    model.save_pretrained(tmp_path / "plain")
    methods, tensors = zip(*(stored(tmp_path / name) for name in ("theirs", "ours", "plain")))
    assert methods == ("bitsandbytes", "qlora_ext", "bitsandbytes")
    assert tensors[0].keys() == tensors[2].keys() != tensors[1].keys()
    texts = [(tmp_path / name / "config.json").read_text() for name in ("theirs", "plain")]
    assert texts[0] == texts[1]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(ours.hf_quantizer) is QLoraExtHfQuantizer
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    for again in (ours, theirs, qlora_ext.from_pretrained(tmp_path / "theirs")):
        torch.testing.assert_close(logits(again), want, rtol=0, atol=0)


def test_reads_their_format_in_other_blocks(layers, folder, tmp_path):
    """transformers' config has no block size, so it would be lost on the way."""
    config = qlora_ext.QLoraExtConfig(blocksize=32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    qlora_ext.save_pretrained(model, tmp_path / "first", format="bitsandbytes")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    again.save_pretrained(tmp_path / "second")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    for each in (again, last):
        assert type(each.hf_quantizer) is AnsweringQuantizer
        torch.testing.assert_close(logits(each), logits(model), rtol=0, atol=0)


def test_a_failed_save_changes_nothing(layers, folder, tmp_path, monkeypatch):
    model = load(folder)
    before = model.config.quantization_config, model.hf_quantizer.saves_as
    (tmp_path / "file").write_text("")
    for format in ("bitsandbytes", "qlora_ext"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(type(model.config), "save_pretrained", _disk_full)
            qlora_ext.save_pretrained(model, tmp_path / "out", format=format)
        assert (model.config.quantization_config, model.hf_quantizer.saves_as) == before


def _disk_full(self, *args, **kwargs):
    raise OSError("full")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dequantizes(layers, folder, tmp_path, dtype):
    model = load(folder)
    want = logits(model)
    kept = {name: p.clone() for name, p in model.named_parameters() if "norm" in name}
    model = model.dequantize() if dtype is None else model.dequantize(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    assert type(up(model)) is torch.nn.Linear
    marks = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit")
    assert not [mark for mark in marks if getattr(model, mark, None)]
    assert getattr(model.config, "quantization_config", None) is None
    for name, parameter in model.named_parameters():
        assert name not in kept or torch.equal(parameter, kept[name].to(parameter.dtype))
    tolerance = 1e-4 if dtype != torch.bfloat16 else 0.3
    torch.testing.assert_close(logits(model).float(), want, rtol=0, atol=tolerance)
    model.to(torch.float16).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_layers_that_they_leave_unpacked_stay_so(layers, tmp_path):
    """Falcon's layers are no nn.Linear to transformers, so its checkpoint for bitsandbytes has them
    dense."""
    model = tiny_models.make("falcon")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="BitsAndBytesConfig: found no linear layer to pack"):
        load(tmp_path / "dense")


def test_axolotl_plugin(monkeypatch):
    """examples/trainers/qlora_ext_axolotl.py, without axolotl."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    monkeypatch.setitem(sys.modules, "axolotl", types.ModuleType("axolotl"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations", types.ModuleType("integrations"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    path = REPOSITORY / "examples" / "trainers" / "qlora_ext_axolotl.py"
    spec = importlib.util.spec_from_file_location("qlora_ext_axolotl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(  # so that it is put back
        auto.AUTO_QUANTIZER_MAPPING,
        "bitsandbytes_4bit",
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"],
    )
    settings = {}
    plugin = module.QLoraExtPlugin()
    plugin.register(settings)
    assert settings["lora_mlp_kernel"] is False
    try:
        plugin.pre_model_load(settings)
        assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is AnsweringQuantizer
        assert on_our_kernels.is_enabled()
    finally:
        on_our_kernels.disable()


# The config --------------------------------------------------------------------------------------


def test_the_table_has_every_setting():
    """A new release of transformers with a new setting fails here, so that someone decides."""
    known = BitsAndBytesConfig().to_dict().keys() - {"quant_method"}
    assert {key.removeprefix("_") for key in known} == SETTINGS.keys() - {"bnb_4bit_blocksize"}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"bnb_4bit_quant_type": "linear"}, "bnb_4bit_quant_type got 'linear', want one of"),
        ({"bnb_4bit_quant_type": "custom"}, "bnb_4bit_quant_type got 'custom', want one of"),
        ({"bnb_4bit_quant_type": "NF4"}, "bnb_4bit_quant_type got 'NF4', want one of"),
        (
            {"llm_int8_enable_fp32_cpu_offload": True},
            r"llm_int8_enable_fp32_cpu_offload got True, want False \(layers on the CPU stay",
        ),
        ({"load_in_4bit": False}, r"load_in_4bit got False, want True \(8 bits need bits"),
        ({"bnb_4bit_compute_dtype": torch.float64}, "bnb_4bit_compute_dtype got 'float64', want"),
        (
            {"llm_int8_skip_modules": [3]},
            r"llm_int8_skip_modules got \[3\], want a list of layer names",
        ),
    ],
)
def test_what_we_dont_do_is_an_error(layers, folder, settings, error):
    config = BitsAndBytesConfig(**{"load_in_4bit": True, **settings})
    with pytest.raises(ValueError, match=f"^BitsAndBytesConfig: {error}"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(ValueError, match=f"^BitsAndBytesConfig: {error}"):
        qlora_ext.QLoraExtConfig.from_bnb(config)


def test_a_setting_of_another_release_is_an_error():
    config = BitsAndBytesConfig(load_in_4bit=True)
    config.bnb_4bit_rotate = True
    with pytest.raises(ValueError, match="BitsAndBytesConfig: bnb_4bit_rotate got True, want it"):
        qlora_ext.QLoraExtConfig.from_bnb(config)


def test_harmless_settings(layers, folder):
    want = logits(load(folder, bnb_4bit_quant_type="nf4"))
    model = load(
        folder,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.float16,
        llm_int8_threshold=1.0,
        llm_int8_has_fp16_weight=True,
    )
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)


def test_a_checkpoint_says_only_how_it_is_packed(layers, folder, tmp_path):
    """How someone loaded a checkpoint before saving it is no reason not to read it."""
    model = load(folder)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
    path.write_text(json.dumps(config))
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        qlora_ext.from_pretrained(tmp_path, dtype=torch.float32),
    ):
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("names", [["p_proj"], ["model.layers.1"], ["q_proj", "lm_head"]])
def test_skipped_names_mean_what_they_mean_there(folder, monkeypatch, names):
    packed = []
    for who in ("theirs", "ours"):
        if who == "ours":
            monkeypatch.setitem(
                auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", AnsweringQuantizer
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*matches no module")
            model = load(folder, llm_int8_skip_modules=names)
        assert isinstance(up(model), Linear4bit) == (who == "ours" and names != ["p_proj"])
        found = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
        packed.append(found - {"lm_head"})  # ours leaves heads dense
    assert packed[0] == packed[1] and 0 < len(packed[0]) < 14


def test_messages_name_the_config_that_the_user_wrote(layers, folder):
    with pytest.warns(UserWarning) as said:
        load(folder, llm_int8_skip_modules=["nope", "q_proj"])
    texts = [str(one.message) for one in said if "nope" in str(one.message)]
    assert texts == [
        "BitsAndBytesConfig: llm_int8_skip_modules has 'nope', which matches no module of "
        "LlamaForCausalLM and has no effect; model.named_modules() has the names"
    ]


# The guard ---------------------------------------------------------------------------------------


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _moved(model):
    return model.to("cpu")


def _torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _assigned(model):
    model.load_state_dict(model.state_dict(), assign=True)
    return model


def _offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(model, execution_device="cpu")
    logits(model)
    return model


def _merged(model):
    model = _randomized(model, r=2)
    return qlora_ext.merge_into_4bit(model, base=model.name_or_path, progress_bar=False)


def _merged_by_peft(model):
    model = _randomized(model, r=2)
    from qlora_ext.integrations.peft import merging_to_4bit

    with merging_to_4bit():
        return model.merge_and_unload()


def _initialised_from_the_weight(model):
    return _randomized(model, r=2, init_lora_weights="olora")


def _randomized(model, **settings):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        _pickled,
        _torch_saved,
        _assigned,
        _offloaded,
        _moved,
        qlora_ext.add_lora,
        _merged,
        _merged_by_peft,
        _initialised_from_the_weight,
    ],
    ids=lambda change: getattr(change, "__name__", "").strip("_"),
)
def test_no_kernel_takes_bytes_for_a_dense_weight(layers, folder, change):
    """Trainers' kernels ask getattr(layer.weight, "quant_state", None), and None means dense."""
    model = change(load(folder, bnb_4bit_compute_dtype=torch.bfloat16))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.adapter_dtype == torch.bfloat16
        state = getattr(layer.weight, "quant_state", None)
        with pytest.raises(RuntimeError, match=NO_STATE):
            state.absmax  # noqa: B018


def test_other_models_have_no_such_attribute(folder):
    config = qlora_ext.QLoraExtConfig()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert not hasattr(up(model).weight, "quant_state")


# Adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["theirs", "ours"])
def test_adapters_take_the_compute_dtype_if_they_keep_a_dtype(folder, request, who):
    """As on bitsandbytes' layers since PEFT 0.19: of the config, whatever the model's dtype is."""
    peft = pytest.importorskip("peft")
    if who == "ours":
        request.getfixturevalue("layers")
    model = load(folder, bnb_4bit_compute_dtype=torch.bfloat16)
    assert isinstance(up(model), Linear4bit) == (who == "ours")
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    found = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    new = Version(importlib.metadata.version("peft")) >= Version("0.19")
    assert found == {torch.bfloat16 if new else torch.float32}
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    assert out.logits.dtype == torch.float32
