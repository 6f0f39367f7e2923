"""Where classes were before the package became layers: pickles and torch.save keep those names."""

import importlib

import pytest

OLD = {
    "qlora_ext.quantized_tensor": ["QuantConfig", "QuantizedTensor"],
    "qlora_ext.lora": ["LoraConfig"],
    "qlora_ext.experts": ["Experts4bit", "_Expert"],
    "qlora_ext.shared_input": ["SharedInput"],
    "qlora_ext.nn": ["Embedding4bit", "Linear4bit", "LoraLinear", "LoraLinear4bit", "PanelLinear"],
    "qlora_ext.models.report": ["LayerReport", "MemoryReport", "QuantizationReport"],
}
OF_HOSTS = {
    "qlora_ext.integrations.transformers": ["QLoraExtConfig", "QLoraExtHfQuantizer"],
    "qlora_ext.integrations.peft": [
        "AdaLoraLinear4bit",
        "LoraEmbedding4bit",
        "LoraLinear4bit",
        "_DoraEmbedding",
    ],
}


@pytest.mark.parametrize("module, names", OLD.items())
def test_old_names_are_there(module, names):
    for name in names:
        assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize("module, names", OF_HOSTS.items())
def test_old_names_of_plug_ins_are_there(module, names):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    test_old_names_are_there(module, names)
