"""Mixtures of experts through transformers: packed while they load, saved, offloaded."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models as tiny
from qlora_ext import QLoraExtConfig, quantize_model
from qlora_ext.nn import Experts4bit
from qlora_ext.nn.experts import is_fused_experts

pytest.importorskip("transformers")
from qlora_ext.integrations.transformers.quantizer import QLoraExtHfQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:.*stay unquantized")
# The files of these hold an expert a tensor, and fused stacks.
FAMILIES = ["mixtral", "qwen3_moe"]


def load(folder, **settings):
    from transformers import AutoModelForCausalLM

    config = QLoraExtConfig()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **settings)


def spied(monkeypatch, look):
    """Calls look(model) when everything was read and the experts are to be put in."""
    original = QLoraExtHfQuantizer._place_experts

    def put(self, model):
        look(model)
        return original(self, model)

    monkeypatch.setattr(QLoraExtHfQuantizer, "_place_experts", put)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_are_packed_when_they_are_read(family, tmp_path, monkeypatch):
    """No dense stack waits for the end of loading."""
    held = []

    def look(model):
        for module in model.modules():
            if is_fused_experts(module):
                held.extend(p.untyped_storage().nbytes() for p in module.parameters())

    spied(monkeypatch, look)
    dense = tiny.make(family)
    dense.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert held == [0] * 4
    want = quantize_model(copy.deepcopy(dense), progress_bar=False)
    assert tiny.logits(model).equal(tiny.logits(want))
    assert all(map(torch.equal, model.state_dict().values(), want.state_dict().values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_experts_are_packed_too(family, tmp_path, monkeypatch):
    """As with a device map that has "cpu": accelerate offloads before the experts are put in."""
    accelerate = pytest.importorskip("accelerate")

    def look(model):
        for layer in model.model.layers:
            accelerate.cpu_offload(layer.mlp.experts, execution_device="cpu")

    tiny.make(family).save_pretrained(tmp_path)
    want = tiny.logits(load(tmp_path))
    spied(monkeypatch, look)
    model = load(tmp_path)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, Experts4bit) and experts.up.weight.is_meta
    assert tiny.logits(model).equal(want)
    assert experts.down.weight.is_meta


def test_a_nan_names_the_expert_and_the_file(tmp_path):
    tiny.make("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "layers.1" in key and "experts.2.w3" in key)
    tensors[key][1, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert "model.safetensors" in str(error.value) and key in str(error.value)


def test_a_missing_expert_is_refused(tmp_path):
    tiny.make("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "layers.1" in key and "experts" in key]:
        del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts"):
        load(tmp_path)
