"""litgpt's `finetune lora` in 4 bits (examples/trainers/litgpt_lora.py), against its own on the
dequantized weights.

`make test-trainers TRAINERS=litgpt` runs it.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qlora_ext
import small_model
import trainer_results

for module in ("lightning", "litgpt", "jsonargparse"):
    pytest.importorskip(module, reason="tests/trainers/litgpt.txt is not installed")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OURS = [str(ROOT / "examples" / "trainers" / "litgpt_lora.py")]
STOCK = [
    "-c",
    "from litgpt.finetune import lora; from litgpt.utils import CLI; CLI(lora.setup)",
]
SWITCHES = ("query", "key", "value", "projection", "mlp", "head")


def tiny(folder):
    """A folder of litgpt with a tiny model, whose layers have biases. Returns its weights."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    config = Config(
        name="tiny", block_size=256, vocab_size=300, padded_vocab_size=320, n_layer=2, n_head=4,
        n_query_groups=2, n_embd=64, intermediate_size=96, mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm", bias=True, rotary_percentage=1.0, parallel_residual=False,
    )  # fmt: skip
    save_config(config, folder)
    torch.manual_seed(0)
    weights = GPT(config).state_dict()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**{c: i for i, c in enumerate(alphabet)}, "<eos>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>", "bos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return weights


def small(folder):
    """The same with the small model, converted by litgpt."""
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import save_config

    source = small_model.cut(folder) / "model.safetensors"
    config = Config.from_name("SmolLM2-135M-Instruct", n_layer=small_model.LAYERS)
    save_config(config, folder)
    weights = {}
    copy_weights_hf_llama(config, {}, weights, load_file(source))
    source.unlink()
    return weights


def folders_of(make, root):
    """(a checkpoint, one with its linear weights packed and dequantized, data)."""
    base, rounded, data = root / "base", root / "rounded", root / "data.json"
    weights = make(base)
    shutil.copytree(base, rounded)
    torch.save(weights, base / "lit_model.pth")
    for name, weight in weights.items():
        if weight.ndim == 2 and "wte" not in name:
            weights[name] = qlora_ext.dequantize_4bit(qlora_ext.quantize_4bit(weight))
    torch.save(weights, rounded / "lit_model.pth")
    pairs = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(20)]
    data.write_text(json.dumps(pairs))
    return base, rounded, data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_of(tiny, tmp_path_factory.mktemp("litgpt"))


@pytest.fixture(scope="module")
def small_folders(tmp_path_factory):
    return folders_of(small, tmp_path_factory.mktemp("litgpt_small"))


def finetune(program, folder, data, out, precision="32-true", *more, switches=(), steps=4):
    """Runs a fine-tune. Returns (what it prints, its process's exit code)."""
    switches = [f"--lora_{name}={str(name in switches).lower()}" for name in SWITCHES]
    command = [
        sys.executable, *program, str(folder), f"--out_dir={out}", f"--precision={precision}",
        "--data=JSON", f"--data.json_path={data}", "--data.val_split_fraction=0.2",
        f"--train.max_steps={steps}", "--train.global_batch_size=4", "--train.micro_batch_size=2",
        "--train.lr_warmup_steps=1", "--train.epochs=4", "--eval.max_new_tokens=2",
        "--eval.interval=3", "--lora_r=4", *switches, *more,
    ]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    return result.stdout + result.stderr, result.returncode


def metrics(out):
    return list(csv.DictReader((out / "logs/csv/version_0/metrics.csv").open()))


def seconds(out):
    return sum(float(row["iter_time"]) for row in metrics(out) if row["iter_time"])


def losses(out):
    rows = metrics(out)
    train = [float(row["loss"]) for row in rows if row["loss"]]
    return train, [float(row["val_loss"]) for row in rows if row["val_loss"]]


def adapters(out):
    return torch.load(out / "final" / "lit_model.pth.lora", weights_only=True)["model"]


@pytest.mark.parametrize("model", ["folders", "small_folders"])
@pytest.mark.parametrize(
    "precision, tolerance, apart",
    [("32-true", 1e-5, 1e-2), ("bf16-true", 1e-2, 0.3)],
    ids=["fp32", "bf16"],
)
def test_losses_are_those_of_the_dequantized_weights(
    request, model, precision, tolerance, apart, tmp_path
):
    base, rounded, data = request.getfixturevalue(model)
    printed = {}
    for name, program, folder in (("ours", OURS, base), ("stock", STOCK, rounded)):
        printed[name], code = finetune(
            program, folder, data, tmp_path / name, precision, switches=SWITCHES
        )
        assert code == 0, printed[name]
    ours, stock = losses(tmp_path / "ours"), losses(tmp_path / "stock")
    assert len(ours[0]) == 8 and len(ours[1]) == 2
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=0)
    if model == "small_folders" and precision == "32-true":
        found = {"stock": (stock, "stock"), "layers": (ours, "ours")}
        found = {
            way: {"losses": run[0], "seconds": seconds(tmp_path / name)}
            for way, (run, name) in found.items()
        }
        trainer_results.note("litgpt", "litgpt finetune_lora", 1, found)
    # Steps of Adam turn rounding into steps of another sign where a gradient is close to zero.
    got, want = adapters(tmp_path / "ours"), adapters(tmp_path / "stock")
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key] - want[key]).norm() <= apart * want[key].norm(), key
    # The base is in 4 bits: half as many elements for its linear layers, and statistics.
    counts = [
        int(re.search(r"non-trainable parameters: ([\d,]+)", text)[1].replace(",", ""))
        for text in (printed["ours"], printed["stock"])
    ]
    assert counts[0] < (0.7 if model == "folders" else 0.75) * counts[1]


EXPECTED = {
    ("query", "value"): {"attn.qkv": ((8, 64), (96, 4))},
    ("key",): {"attn.qkv": ((4, 64), (32, 4))},
    ("projection", "head"): {"attn.proj": ((4, 64), (64, 4)), "lm_head": ((4, 64), (320, 4))},
    ("mlp",): {
        "mlp.fc_1": ((4, 64), (96, 4)),
        "mlp.fc_2": ((4, 64), (96, 4)),
        "mlp.proj": ((4, 96), (64, 4)),
    },
}


@pytest.mark.parametrize("switches", EXPECTED, ids="+".join)
def test_switches_say_what_gets_adapters(folders, switches, tmp_path):
    base, _, data = folders
    printed, code = finetune(OURS, base, data, tmp_path, switches=switches, steps=2)
    assert code == 0, printed
    got = {key: tuple(value.shape) for key, value in adapters(tmp_path).items()}
    want = {}
    for name, (A, B) in EXPECTED[switches].items():
        for prefix in (
            [name] if name == "lm_head" else [f"transformer.h.{i}.{name}" for i in (0, 1)]
        ):
            want |= {f"{prefix}.lora_A": A, f"{prefix}.lora_B": B}
    assert got == want
    assert all(value.any() for key, value in adapters(tmp_path).items() if "lora_B" in key)
    # litgpt merges into the unquantized checkpoint: what has no adapter is as it was there.
    merged = torch.load(tmp_path / "final" / "lit_model.pth", weights_only=True)
    before = torch.load(base / "lit_model.pth", weights_only=True)
    assert merged.keys() == before.keys()
    changed = {key for key in before if not torch.equal(merged[key], before[key])}
    assert changed == {key.replace("lora_A", "weight") for key in want if "lora_A" in key}


@pytest.mark.parametrize(
    "precision, more", [("bf16-mixed", ()), ("32-true", ("--quantize=bnb.nf4",))], ids=str
)
def test_what_it_cannot_do_is_said(folders, precision, more, tmp_path):
    base, _, data = folders
    printed, code = finetune(OURS, base, data, tmp_path, precision, *more)
    assert code == 1 and "litgpt_lora: precision is" in printed, printed
