"""Classes whose files hold linear layers otherwise than the model does: q, k and v in one tensor,
rows in another order. transformers converts them on loading, and back when it saves."""

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny

transformers = pytest.importorskip("transformers")

from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

import qlora_ext

QKV = [f"self_attn.{side}_proj" for side in "qkv"]
UP = ["mlp.gate_proj", "mlp.up_proj"]
MAPPINGS = {
    "a module's name": lambda: [WeightConverter("attn.qkv", QKV, [Chunk(dim=0)])],
    "weight and bias": lambda: [
        WeightConverter(f"attn.qkv.{key}", [f"{name}.{key}" for name in QKV], [Chunk(dim=0)])
        for key in ("weight", "bias")
    ],
    "two tensors to one": lambda: [
        WeightConverter(
            ["o_proj_first.weight", "o_proj_second.weight"], "o_proj.weight", [Concatenate(dim=0)]
        )
    ],
    "a kept layer, too": lambda: [
        WeightConverter("mlp.w12.weight", [f"{name}.weight" for name in UP], [Chunk(dim=0)])
    ],
}


@pytest.fixture(params=MAPPINGS)
def dense(request, tmp_path, monkeypatch):
    """A folder of a dense Llama that is stored so, and the model."""
    of_class = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: MAPPINGS[request.param]() if kind == "llama" else of_class(kind),
    )
    model = tiny.make("llama", num_key_value_heads=4, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert stored.keys() != model.state_dict().keys()  # it is converted
    return tmp_path / "dense", model


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


KEPT = ["lm_head", "layers.1.mlp.up_proj"]


def packing():
    return qlora_ext.QLoraExtConfig(modules_to_not_convert=KEPT)


@pytest.mark.parametrize("way", ["from_pretrained", "quantize_model"])
def test_packed_layers_are_saved_as_they_are(way, dense, tmp_path):
    folder, model = dense
    if way == "from_pretrained":
        model = load(folder, quantization_config=packing())
    else:
        qlora_ext.quantize_model(model, modules_to_not_convert=KEPT, progress_bar=False)
    want = tiny.logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(tiny.logits(again), want)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(load(tmp_path / "again")), want)
    qlora_ext.save_pretrained(again, tmp_path / "theirs", format="bitsandbytes")
    assert torch.equal(tiny.logits(qlora_ext.from_pretrained(tmp_path / "theirs")), want)


@pytest.mark.parametrize("dense", ["a module's name"], indirect=True)
def test_a_part_of_a_model_is_saved_so_too(dense, tmp_path):
    """The part has no quantizer of its own."""
    model = load(dense[0], quantization_config=packing())
    model.model.save_pretrained(tmp_path / "part")
    part = transformers.LlamaModel.from_pretrained(tmp_path / "part", dtype=torch.float32)
    want, got = (m(**tiny.inputs(m)).last_hidden_state for m in (model.model, part))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dense", ["a module's name"], indirect=True)
def test_an_error_of_saving_leaves_the_conversions(dense, tmp_path):
    loaded = load(dense[0], quantization_config=packing())
    quantized = qlora_ext.quantize_model(dense[1], progress_bar=False)
    (tmp_path / "file").touch()
    for model in (loaded, quantized):
        before = vars(model).get("_weight_conversions")
        with pytest.raises((AssertionError, OSError)):
            model.save_pretrained(tmp_path / "file" / "folder")
        assert vars(model).get("_weight_conversions") is before


def test_once_dense_they_are_stored_as_the_class_does(dense, tmp_path):
    """The packed checkpoint needed no conversion to be read."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from qlora_ext.cli import app

    def run(*arguments):
        result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    folder, model = dense
    run("quantize", folder, tmp_path / "packed", "--keep", "layers.1.mlp.up_proj")
    model = load(tmp_path / "packed")
    direct = load(folder, quantization_config=packing())
    assert torch.equal(tiny.logits(model), tiny.logits(direct))
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=2))
    tiny.randomize(model)
    qlora_ext.save_adapter(model, tmp_path / "adapter")
    run("merge", tmp_path / "packed", tmp_path / "adapter", tmp_path / "four", "--four-bit")
    run("merge", tmp_path / "packed", tmp_path / "adapter", tmp_path / "command", "--dtype=float32")
    merged = qlora_ext.merge_and_unload(model, torch.float32, progress_bar=False)
    merged.save_pretrained(tmp_path / "merged")
    want = tiny.logits(merged)
    for name in ("merged", "command"):
        assert shapes(tmp_path / name) == shapes(folder)
        assert torch.equal(tiny.logits(load(tmp_path / name)), want)
    assert tiny.logits(load(tmp_path / "four")).sub(want).abs().max() < 0.1


def shapes(folder):
    stored = load_file(folder / "model.safetensors")
    return {key: tensor.shape for key, tensor in stored.items()}
