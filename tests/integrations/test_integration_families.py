"""Tiny models of many architectures, the whole way through transformers and PEFT."""

import warnings

import pytest
import torch

import tiny_models

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import qlora_ext
from qlora_ext.nn import Linear4bit

# One of each kind in the usual run: Llama's, Conv1D, fused qkv, a linear subclass, experts, T5.
USUAL = ("llama", "gpt2", "gpt_neox", "falcon", "mixtral", "t5")


def auto_class(name):
    import transformers

    return transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow)
        for name in tiny_models.FAMILIES
    ],
)
def test_quantize_train_merge_reload(name, tmp_path):
    auto = auto_class(name)
    tiny_models.make(name).save_pretrained(tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="qlora_ext: .* stay unpacked")  # experts
        model = auto.from_pretrained(
            tmp_path / "dense", quantization_config=qlora_ext.QLoraExtConfig()
        )
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    model.save_pretrained(tmp_path / "packed")
    packed_logits = tiny_models.logits(model)
    again = auto.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny_models.logits(again), packed_logits)

    if peft.__version__.startswith("0.19.") and name == "mixtral":
        # It takes the letters of "all-linear" for names, and calls what transformers 5.16 lacks.
        pytest.skip("PEFT 0.19 saves and loads no adapter of a dense mixture either")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    tuned = peft.get_peft_model(again, config)
    first, last = tiny_models.train(tuned, rate=2e-2)
    assert last < first
    tuned.save_pretrained(tmp_path / "adapter")
    tuned_logits = tiny_models.logits(tuned)
    assert not torch.equal(tuned_logits, packed_logits)
    base = auto.from_pretrained(tmp_path / "packed")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(tiny_models.logits(loaded), tuned_logits)

    merged = loaded.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    torch.testing.assert_close(tiny_models.logits(merged), tuned_logits, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain = auto.from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny_models.logits(plain), tiny_models.logits(merged))
    assert tiny_models.generate(plain).shape[0] == 1
