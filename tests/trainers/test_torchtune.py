"""torchtune's own recipe in 4 bits (examples/trainers/torchtune.yaml), against the recipe with
torchtune's own layers on the dequantized weights. `make test-trainers TRAINERS=torchtune`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_ext
from paths import REPOSITORY

pytest.importorskip("torchtune", reason="tests/trainers/torchtune.txt is not installed")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLES = REPOSITORY / "examples" / "trainers"
STEPS = 4
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer, the same with weights as 4 bits hold them, data."""
    import transformers
    from tokenizers import pre_tokenizers

    root = tmp_path_factory.mktemp("torchtune")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (root / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(alphabet)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    weights = load_file(root / "base" / "model.safetensors")
    for key, weight in weights.items():
        if LINEAR.search(key):
            weights[key] = qlora_ext.dequantize_4bit(qlora_ext.quantize_4bit(weight))
    (root / "rounded").mkdir()
    (root / "rounded" / "config.json").write_text((root / "base" / "config.json").read_text())
    save_file(weights, root / "rounded" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"input": f"What is {a} plus {b}?", "output": f"It is {a + b}."}
            for a in range(4) for b in range(4)]  # fmt: skip
    (root / "data.json").write_text(json.dumps(rows))
    return root


def finetune(root, base, out, *more):
    """Runs the recipe. Returns the losses, the merged weights and the adapters."""
    program = Path(sys.executable).with_name("tune")
    sizes = dict(vocab_size=260, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64)
    sizes |= dict(intermediate_dim=96, max_seq_len=128, rope_base=10000, scale_factor=1)
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    command = [
        str(program), "run", "lora_finetune_single_device",
        "--config", str(EXAMPLES / "torchtune.yaml"),
        *(f"model.{key}={value}" for key, value in sizes.items()),
        "tokenizer._component_=torchtune.models.qwen2.Qwen2Tokenizer",
        f"tokenizer.path={root / 'vocab.json'}", f"tokenizer.merges_file={root / 'merges.txt'}",
        *(f"tokenizer.special_tokens.{key}={value}" for key, value in special.items()),
        f"checkpointer.checkpoint_dir={root / base}",
        "dataset._component_=torchtune.datasets.instruct_dataset", "dataset.source=json",
        f"dataset.data_files={root / 'data.json'}", "dataset.split=train",
        f"max_steps_per_epoch={STEPS}", f"output_dir={out}", *more,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(out.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (log,) = (out / "logs").glob("*.txt")
    losses = [float(x) for x in re.findall(r"loss:([0-9.]+)", log.read_text())]
    merged = {}
    for path in (out / "epoch_0").glob("*model*.safetensors"):
        merged |= load_file(path) if "adapter" not in path.name else {}
    return losses, merged, load_file(out / "epoch_0" / "adapter_model.safetensors")


def test_losses_and_merged_weights_are_those_of_the_dequantized_weights(folders, tmp_path):
    builder = "torchtune.models.llama3_2.lora_llama3_2"
    ours = finetune(folders, "base", tmp_path / "ours", f"model.builder={builder}")
    stock = f"model._component_={builder}", "~model.builder"
    want = finetune(folders, "rounded", tmp_path / "stock", *stock)
    assert len(ours[0]) == STEPS and ours[0][-1] < ours[0][0]
    assert ours[0] == pytest.approx(want[0], rel=1e-5)
    base = load_file(folders / "base" / "model.safetensors")
    for got, expected in zip(ours[1:], want[1:], strict=True):
        assert got.keys() == expected.keys() and got
        for key, tensor in expected.items():
            assert (got[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
    assert len(ours[2]) == 2 * 7 * 2  # layers, projections, A and B
    changed = {key for key in base if not torch.equal(base[key], ours[1][key])}
    assert changed == {key for key in base if LINEAR.search(key)}
