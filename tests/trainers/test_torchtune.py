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
import small_model
import trainer_results
from paths import REPOSITORY

pytest.importorskip("torchtune", reason="tests/trainers/torchtune.txt is not installed")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLES = REPOSITORY / "examples" / "trainers"
STEPS = 4
HEADS, WIDTH = dict(num_heads=9, num_kv_heads=3), 576
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The small model, the same with weights as 4 bits hold them, and data."""
    from torchtune.models.convert_weights import hf_to_tune, tune_to_hf

    root = tmp_path_factory.mktemp("torchtune")
    base = small_model.cut(root / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    (root / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (root / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    # In torchtune's order of rows, on which the nested scales of q and k depend.
    weights = hf_to_tune(load_file(base / "model.safetensors"), **HEADS, dim=WIDTH)
    for key, weight in weights.items():
        if weight.ndim == 2 and key.startswith("layers."):
            weights[key] = qlora_ext.dequantize_4bit(qlora_ext.quantize_4bit(weight))
    weights = tune_to_hf(weights, **HEADS, dim=WIDTH)
    (root / "rounded").mkdir()
    (root / "rounded" / "config.json").write_text((base / "config.json").read_text())
    save_file(weights, root / "rounded" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"input": f"What is {a} plus {b}?", "output": f"It is {a + b}."}
            for a in range(4) for b in range(4)]  # fmt: skip
    (root / "data.json").write_text(json.dumps(rows))
    return root


def finetune(root, base, out, *more):
    """Runs the recipe. Returns the losses, the merged weights and the adapters."""
    program = Path(sys.executable).with_name("tune")
    sizes = dict(HEADS, embed_dim=WIDTH, intermediate_dim=1536, vocab_size=49152, max_seq_len=128)
    sizes |= dict(num_layers=small_model.LAYERS, rope_base=100000)
    sizes |= dict(scale_factor=1)  # no scaling of positions, which Llama 3.2 has
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
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
    found = {"stock": want[0], "layers": ours[0]}
    found = {way: {"losses": losses, "seconds": None} for way, losses in found.items()}
    trainer_results.note("torchtune", "tune run lora_finetune_single_device", 2, found)
    base = load_file(folders / "base" / "model.safetensors")
    for got, expected in zip(ours[1:], want[1:], strict=True):
        assert got.keys() == expected.keys() and got
        for key, tensor in expected.items():
            assert (got[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
    assert len(ours[2]) == small_model.LINEAR * 2  # A and B
    changed = {key for key in base if not torch.equal(base[key], ours[1][key])}
    assert changed == {key for key in base if LINEAR.search(key)}
