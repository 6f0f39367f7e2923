"""The command line: streamed quantizing and merging against the library's own, interruptions, full
disks, damaged files, memory limits, and what each command prints."""

import errno
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from paths import REPOSITORY

pytest.importorskip("typer")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qlora_ext
import tiny_models
from integration_helpers import run_python, tiny_llama, tiny_tokenizer
from qlora_ext.cli import app, calibrated, estimate, output, quantize, screen
from qlora_ext.cli.errors import CliError
from qlora_ext.files import OPEN_FILES
from qlora_ext.integrations.transformers import building
from qlora_ext.nn.stack import Stack4bit
from qlora_ext.text import CheckpointError


def run(*arguments, ok=True):
    """The command's output; the error's sentence where it is to fail."""
    result = CliRunner().invoke(app.app, [str(a) for a in arguments])
    if ok:
        if result.exception is not None and result.exit_code:
            raise AssertionError(result.output) from result.exception
        return result.output
    sentence = (CliError, CheckpointError)
    assert isinstance(result.exception, (*sentence, SystemExit)), result.exception
    return str(result.exception) if isinstance(result.exception, sentence) else result.output


def command(*arguments, **settings):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_ext", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY / "tests",
        **settings,
    )


def tensors(folder):
    return {
        k: t for path in sorted(folder.glob("*.safetensors")) for k, t in load_file(path).items()
    }


def assert_same(folder, want):
    """Two checkpoints: the same tensors, dtypes and config, whatever files they lie in."""
    ours, theirs = tensors(folder), tensors(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (want / "config.json").read_text()
    )


def digest(folder):
    return {p.name: (p.stat().st_size, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def llama(tmp_path):
    """A random Llama in four shards, with a tokenizer."""
    path = tmp_path / "llama"
    model = tiny_models.make("llama", torch.bfloat16, vocab_size=256, num_hidden_layers=4)
    model.save_pretrained(path, max_shard_size="100KB")
    tiny_tokenizer(path)
    assert len(list(path.glob("*.safetensors"))) >= 4
    return path


def saved(name, path, dtype=torch.bfloat16, shard="40KB", **settings):
    model = tiny_models.make(name, dtype, **settings)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def load(path, name="llama", **settings):
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, **settings)


def make_adapter(model, path, head=False, seed=3):
    """An adapter with values on every linear layer of a model; the model is adapted."""
    out = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Stack4bit)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) and m is not out]
    if head:
        names += [n for n, m in model.named_modules() if m is out]
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=4, target_modules=names))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02, generator=generator)
    qlora_ext.save_adapter(model, path)
    return path


# quantize -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "falcon", "t5"])
def test_quantize_is_quantize_model_and_save_pretrained(name, tmp_path):
    """Renamed, fused, tied, transposed: tensor for tensor what the library writes, and it loads."""
    source = saved(name, tmp_path / "in")
    run("quantize", source, tmp_path / "out", "--max-shard-size", "40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    want = qlora_ext.quantize_model(load(source, name), progress_bar=False)
    want.save_pretrained(tmp_path / "want")
    assert_same(tmp_path / "out", tmp_path / "want")
    back = load(tmp_path / "out", name)
    assert torch.equal(tiny_models.logits(back), tiny_models.logits(want))
    # What stock safetensors makes of the files that are written here.
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert not (tmp_path / "out.partial").exists()


def test_quantize_with_other_settings(llama, tmp_path):
    out = tmp_path / "out"
    run("quantize", llama, out, "--quant-type", "fp4", "--blocksize", 32, "--no-double-quant",
        "--keep", "down_proj", "--embeddings")  # fmt: skip
    want = qlora_ext.quantize_model(
        load(llama),
        qlora_ext.QuantConfig("fp4", 32, double_quant=False),
        modules_to_not_convert=["down_proj"],
        quantize_embeddings=True,
        progress_bar=False,
    )
    want.save_pretrained(tmp_path / "want")
    assert_same(out, tmp_path / "want")
    assert torch.equal(tiny_models.logits(load(out)), tiny_models.logits(want))


def test_quantize_copies_what_is_not_weights(llama, tmp_path):
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    (llama / "LICENSE").write_text("a licence")
    (llama / "pytorch_model.bin").write_bytes(b"weights of another format")
    run("quantize", llama, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "model.safetensors.index.json"} & names
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids


def test_what_trainers_keep_next_to_a_model_is_not_copied(llama, tmp_path):
    """An adapter in the base's own folder: its settings alone would keep OUT from loading."""
    make_adapter(load(llama), tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        shutil.copy(path, llama)
    others = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "latest",
              "training_args.bin", "random_states_0.pkl", "all_results.json")  # fmt: skip
    for name in others:
        (llama / name).write_text("{}")
    run("merge", llama, llama, tmp_path / "merged")
    said = run("quantize", llama, tmp_path / "packed")
    assert "not the adapter in that folder" in said
    for out in (tmp_path / "merged", tmp_path / "packed"):
        names = {path.name for path in out.iterdir()}
        assert "tokenizer.json" in names
        assert not names & {"adapter_config.json", "adapter_model.safetensors", *others}
        load(out)
    run("merge", llama, tmp_path / "adapter", tmp_path / "want")
    assert_same(tmp_path / "merged", tmp_path / "want")


def test_tied_weights_that_differ_stay_apart(tmp_path):
    """transformers unties where both are stored and differ; where they are equal one is dropped."""
    source = saved("llama", tmp_path / "in", shard="1GB", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    for change in (0.0, 1.0):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        run("quantize", source, tmp_path / "out", "--force")
        want = qlora_ext.quantize_model(load(source), progress_bar=False)
        shutil.rmtree(tmp_path / "want", ignore_errors=True)
        want.save_pretrained(tmp_path / "want")
        assert_same(tmp_path / "out", tmp_path / "want")
        assert ("lm_head.weight" in tensors(tmp_path / "out")) == bool(change)


def test_nothing_but_the_output_is_replaced(llama, tmp_path):
    """Whatever names are given, and with --force, inputs and other folders stay as they are."""
    around = tmp_path / "around"
    base = shutil.copytree(llama, around / "base")
    adapter = make_adapter(load(llama), around / "adapters" / "one")
    text = around / "text" / "calibration.txt"
    text.parent.mkdir()
    text.write_text("some text " * 50)
    (around / "text" / "config.json").write_text("{}")
    (around / "config.json").write_text("{}")
    (around / "out.old").mkdir()
    (around / "out.old" / "mine").write_text("kept")

    def files():
        return {p: p.read_bytes() for p in around.rglob("*") if p.is_file()}

    before = files()
    assert "holds the input" in run("quantize", base, around, "--force", ok=False)
    assert "lies in the input" in run("merge", base, adapter, adapter, "--force", ok=False)
    assert "lies in the input" in run("merge", base, adapter, adapter / "in", ok=False)
    calibrate = ("--four-bit", "--calibration", text)
    inside = run("merge", base, adapter, text.parent, "--force", *calibrate, ok=False)
    assert "holds the input" in inside
    stray = run("quantize", base, around / "adapters", "--force", ok=False)
    assert "holds files and no config.json" in stray
    assert "exists: name another folder" in run("quantize", base, ".", ok=False)
    assert "cannot be made" in run("quantize", base, "/dev/null/out", ok=False)
    assert files() == before
    for _ in range(2):
        run("quantize", base, around / "out", "--force")
    shutil.rmtree(around / "out")
    assert files() == before and sorted(p.name for p in around.glob("out*")) == ["out.old"]


def test_checkpoints_that_cannot_be_quantized_are_one_sentence(llama, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "is missing" in run("quantize", tmp_path / "empty", out, ok=False)
    assert "is not a folder" in run("quantize", "./nowhere", out, ok=False)
    assert "--blocksize is 7" in run("quantize", llama, out, "--blocksize", 7, ok=False)
    assert "want a size" in run("quantize", llama, out, "--max-shard-size", "big", ok=False)
    assert "matches no module" in run("quantize", llama, out, "--keep", "nothing", ok=False)
    assert "lies in the input" in run("quantize", llama, llama / "out", ok=False)
    assert "lies in the input" in run("quantize", llama, llama, "--force", ok=False)
    run("quantize", llama, out)
    assert "quantized already" in run("quantize", out, tmp_path / "twice", ok=False)
    assert "--force" in run("quantize", llama, out, ok=False)

    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "m.M"}}))
    assert "auto_map" in run("quantize", llama, tmp_path / "o", ok=False)
    gptq = {"quant_method": "gptq", "bits": 4}
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": gptq}))
    assert "is quantized by gptq" in run("quantize", llama, tmp_path / "o", ok=False)
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    assert "unheard_of" in run("quantize", llama, tmp_path / "o", ok=False)
    (llama / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    assert "want [" in run("quantize", llama, tmp_path / "o", ok=False)
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert "lacks 9 tensors" in run("quantize", llama, tmp_path / "o", ok=False)
    (llama / "config.json").write_text("{")
    assert "config.json is not JSON" in run("quantize", llama, tmp_path / "o", ok=False)
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "o.partial").exists()


# damage, interruptions, full disks ----------------------------------------------------------------


def test_a_bad_shard_is_one_sentence_and_the_input_is_untouched(llama, tmp_path):
    shard = sorted(llama.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    before = digest(llama)
    assert f"{shard.name} is damaged" in run("quantize", llama, tmp_path / "out", ok=False)
    shard.write_bytes(b"\xff" * 64)
    assert f"{shard.name} is damaged" in run("quantize", llama, tmp_path / "out", ok=False)
    shard.unlink()
    said = run("quantize", llama, tmp_path / "out", ok=False)
    assert re.search(rf"lacks 1 shard of \d+: {re.escape(shard.name)}", said)
    shard.write_bytes(whole[:-100])
    assert digest(llama) == before
    assert not (tmp_path / "out").exists()

    shard.write_bytes(whole)
    weights = load_file(shard)
    name = next(key for key in weights if "proj" in key)
    weights[name][1, 2] = float("nan")
    save_file(weights, shard, metadata={"format": "pt"})
    said = run("quantize", llama, tmp_path / "out", "--max-shard-size", "20KB", ok=False)
    assert name.removesuffix(".weight") in said
    # The finished shards are kept, and used when the input is whole again: but not silently.
    kept = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert kept
    shard.write_bytes(whole)
    again = run("quantize", llama, tmp_path / "out", "--max-shard-size", "20KB", ok=False)
    assert "differs from this one in input" in again
    run("quantize", llama, tmp_path / "out", "--max-shard-size", "20KB", "--restart")


def test_a_killed_run_goes_on_where_it_stopped(llama, tmp_path):
    """SIGKILL in the middle: whole shards stay, nothing half-written is taken for one."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    slow = (
        "import sys, time\n"
        "from qlora_ext.cli import main, stream\n"
        "convert = stream.Job._convert\n"
        "def slowly(self, piece):\n"
        "    time.sleep(0.15)\n"
        "    return convert(self, piece)\n"
        "stream.Job._convert = slowly\n"
        "main()\n"
    )
    arguments = ["quantize", str(llama), str(out), "--max-shard-size", "20KB"]
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], cwd=REPOSITORY / "tests")
    deadline = time.time() + 60
    while len(list(partial.glob("model-*.safetensors"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    while not list(partial.glob(".*.draft")) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p.name: p.stat().st_mtime_ns for p in partial.glob("model-*.safetensors")}
    total = int(re.search(r"of-(\d+)", next(iter(finished)))[1])
    assert 2 <= len(finished) < total
    assert not out.exists()
    assert "differs from this one in settings" in run(*arguments, "--quant-type", "fp4", ok=False)

    said = run(*arguments)
    assert f"continuing: {len(finished)} of {total} shards are finished" in said
    for name, when in finished.items():
        assert (out / name).stat().st_mtime_ns == when, f"{name} was written again"
    qlora_ext.quantize_model(load(llama), progress_bar=False).save_pretrained(tmp_path / "want")
    assert_same(out, tmp_path / "want")
    assert not partial.exists()


def interrupt_at_the_twelfth(monkeypatch):
    """Ctrl-C at the twelfth piece that is converted from here on; returns the pieces asked for."""
    from qlora_ext.cli import stream

    calls = []
    convert = stream.Job._convert

    def interrupted(self, piece):
        calls.append(piece)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return convert(self, piece)

    monkeypatch.setattr(stream.Job, "_convert", interrupted)
    return calls


def test_ctrl_c_says_what_is_kept(llama, tmp_path, monkeypatch):
    calls = interrupt_at_the_twelfth(monkeypatch)
    said = run("quantize", llama, tmp_path / "out", "--max-shard-size", "20KB", ok=False)
    assert re.search(r"interrupted: [1-9]\d* of \d+ shards are finished and kept", said)
    run("quantize", llama, tmp_path / "out", "--max-shard-size", "20KB")
    assert len(calls) < 2 * 40


def test_a_full_disk_is_one_sentence_and_a_finished_shard_is_kept(llama, tmp_path, monkeypatch):
    before = digest(llama)
    written = []
    pwrite = os.pwrite

    def full(file, data, offset):
        written.append(len(data))
        if sum(written) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, offset)

    arguments = ["quantize", llama, tmp_path / "out", "--max-shard-size", "20KB"]
    monkeypatch.setattr(os, "pwrite", full)
    said = run(*arguments, ok=False)
    assert "cannot be written (No space left on device)" in said
    assert re.search(r"[1-9]\d* of \d+ shards are finished and kept", said)
    assert not list((tmp_path / "out.partial").glob(".*.draft"))
    assert digest(llama) == before
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    run(*arguments)
    qlora_ext.quantize_model(load(llama), progress_bar=False).save_pretrained(tmp_path / "want")
    assert_same(tmp_path / "out", tmp_path / "want")

    class Free:
        free = 1000

    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: Free)
    said = run("quantize", llama, tmp_path / "other", ok=False)
    assert re.search(r"needs [\d.]+ KiB more, but its disk has 1000 B free", said)
    assert not (tmp_path / "other.partial").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 128 KiB, where mounting is allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(path)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_really_full(llama, tiny_disk, monkeypatch):
    said = run("quantize", llama, tiny_disk / "out", ok=False)
    assert "more, but its disk has" in said
    # Somebody else fills it up meanwhile.
    usage = shutil.disk_usage
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage("/"))
    said = run("quantize", llama, tiny_disk / "out", "--max-shard-size", "20KB", ok=False)
    assert "cannot be written (No space left on device)" in said
    assert re.search(r"[1-9]\d* of \d+ shards are finished and kept", said)


# memory -------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, torch
# The interpreter and the libraries, which are not what is limited.
from qlora_ext.integrations.transformers import building
from qlora_ext.cli import app, merge, quantize
from transformers import GptOssForCausalLM, LlamaForCausalLM, MixtralForCausalLM

sys.argv = ["qlora-ext", *{arguments}]
torch.set_num_threads(1)
big = torch.ones(1024, 1024)
big @ big  # the math library's own buffers
del big
used = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmData")) * 1024
limit = used + {allowed}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
{code}
"""


def run_limited(allowed, code, *arguments):
    text = LIMITED.format(arguments=list(map(str, arguments)), allowed=allowed, code=code)
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=REPOSITORY / "tests"
    )


ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_DATA covers mapped memory on Linux"
)


@ON_LINUX
@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_allowed(tmp_path):
    """A checkpoint of several shards, its largest weight 4 MB, with two fifths of its size allowed
    beyond what the libraries take by themselves. Loading it whole fails under the same limit.
    (Merging took up to 48 of these 58 MB on a Xeon, whose math library has larger buffers.)"""
    source, out = tmp_path / "in", tmp_path / "out"
    tiny_llama(
        source,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
    )
    model = load(source).to(torch.bfloat16)
    shutil.rmtree(source)
    model.save_pretrained(source, max_shard_size="20MB")
    del model
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert nbytes > 140e6
    assert len(list(source.glob("*.safetensors"))) >= 7
    allowed = nbytes * 2 // 5

    def limited(code, *arguments):
        return run_limited(allowed, code, *arguments)

    result = limited("app.run()", "quantize", source, out, "--max-shard-size", "20MB")
    assert result.returncode == 0, result.stderr[-2000:]
    qlora_ext.quantize_model(load(source), progress_bar=False).save_pretrained(tmp_path / "want")
    assert_same(out, tmp_path / "want")

    adapter = make_adapter(load(out), tmp_path / "adapter")
    result = limited("app.run()", "merge", source, adapter, tmp_path / "merged")
    assert result.returncode == 0, result.stderr[-2000:]

    whole = (
        "import transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(source)!r}).float()\n"
    )
    result = limited(whole)
    assert result.returncode != 0
    assert re.search("memory|alloc", result.stderr), result.stderr[-500:]


@ON_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_larger_than_the_memory_allowed(name, tmp_path):
    """One layer whose experts take 192 MB, in 80: stored an expert a tensor, and as stacks. The
    mappings of open files count as memory here, too."""
    source, out = tmp_path / "in", tmp_path / "out"
    settings = {
        **tiny_models.LLAMA, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 16,
        "num_hidden_layers": 1, "num_local_experts": 64, "num_experts_per_tok": 2,
    }  # fmt: skip
    kind = {"mixtral": "MixtralConfig", "gpt_oss": "GptOssConfig"}[name]
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="60MB")
    experts = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    assert experts > 192e6
    del model
    sizes = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    allowed = 80 * 10**6 + sum(sizes[-OPEN_FILES:])
    result = run_limited(allowed, "app.run()", "quantize", source, out)
    assert result.returncode == 0, result.stderr[-2000:]
    packed = qlora_ext.quantize_model(load(source), progress_bar=False)
    packed.save_pretrained(tmp_path / "want")
    assert_same(out, tmp_path / "want")

    config = qlora_ext.LoraConfig(r=2, target_modules=(), target_parameters=["down_proj"])
    qlora_ext.add_lora(packed, config)
    stack = packed.model.layers[0].mlp.experts.down
    torch.nn.init.normal_(stack.lora_B, std=0.02)
    qlora_ext.save_adapter(packed, tmp_path / "adapter")
    # Into 4 bits, into 16, and from the packed base into 16.
    for base, folder, *more in (
        (source, "merged", "--four-bit"), (source, "dense"), (out, "of packed"),
    ):  # fmt: skip
        arguments = ["merge", base, tmp_path / "adapter", tmp_path / folder, *more]
        result = run_limited(allowed, "app.run()", *arguments)
        assert result.returncode == 0, result.stderr[-2000:]
    change = stack.scaling * stack.lora_B[63] @ stack.lora_A[63]
    change = change.T if name == "gpt_oss" else change
    dense = load(source).model.layers[0].mlp.experts.down_proj[63].detach()
    want = dense.float() + change
    got = load(tmp_path / "dense").model.layers[0].mlp.experts.down_proj[63]
    assert torch.equal(got, want.to(got.dtype))
    merged = qlora_ext.merge_and_unload(packed, torch.bfloat16, progress_bar=False)
    of_packed = load(tmp_path / "of packed").state_dict()
    assert all(torch.equal(t, of_packed[key]) for key, t in merged.state_dict().items())
    want = want.T if name == "gpt_oss" else want
    got = load(tmp_path / "merged").model.layers[0].mlp.experts.down.quantized[63]
    assert (got.packed == qlora_ext.quantize_4bit(want.detach()).packed).float().mean() > 0.999


# merge --------------------------------------------------------------------------------------------


def test_an_interrupted_merge_goes_on_and_leaves_its_inputs(llama, tmp_path, monkeypatch):
    base = tmp_path / "base"
    run("quantize", llama, base)
    adapter = make_adapter(load(base), tmp_path / "adapter")
    inputs = digest(base), digest(adapter)
    arguments = ["merge", base, adapter, tmp_path / "out", "--max-shard-size", "40KB"]
    interrupt_at_the_twelfth(monkeypatch)
    said = run(*arguments, ok=False)
    assert re.search(r"interrupted: [1-9]\d* of \d+ shards are finished and kept", said)
    assert not (tmp_path / "out").exists()
    assert re.search("continuing: [1-9]", run(*arguments))
    assert (digest(base), digest(adapter)) == inputs
    run("merge", base, adapter, tmp_path / "at-once", "--max-shard-size", "40KB")
    assert digest(tmp_path / "out") == digest(tmp_path / "at-once")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_merge_is_merge_and_unload(name, head, tmp_path):
    """From the 4-bit base: tensor for tensor the library's; a tied head is untied."""
    source = saved(name, tmp_path / "in")
    run("quantize", source, tmp_path / "base")
    model = load(tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", head)
    run("merge", tmp_path / "base", adapter, tmp_path / "out", "--dtype", "float16",
        "--max-shard-size", "40KB")  # fmt: skip
    qlora_ext.merge_and_unload(model, torch.float16, progress_bar=False)
    model.save_pretrained(tmp_path / "want")
    assert_same(tmp_path / "out", tmp_path / "want")
    back = load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(tiny_models.logits(back), tiny_models.logits(model.float()))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_merge_into_an_unquantized_base(name, head, tmp_path):
    source = saved(name, tmp_path / "in")
    model = load(source)
    adapter = make_adapter(model, tmp_path / "adapter", head)
    said = run("merge", source, adapter, tmp_path / "out")
    assert "weights in bfloat16" in said
    qlora_ext.merge_and_unload(model, torch.bfloat16, progress_bar=False)
    model.save_pretrained(tmp_path / "want")
    assert_same(tmp_path / "out", tmp_path / "want")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_merge_into_transposed_and_fused_weights(name, tmp_path):
    """What load_adapter has no dense layer for: Conv1D and stacked experts, against plain sums."""
    source = saved(name, tmp_path / "in", dtype=torch.float32)
    packed = qlora_ext.quantize_model(load(source), progress_bar=False)
    adapter = make_adapter(packed, tmp_path / "adapter")
    run("merge", source, adapter, tmp_path / "out", "--dtype", "float32")
    before, after = load(source), load(tmp_path / "out")
    layers = dict(packed.named_modules())
    changed = 0
    for layer, module in layers.items():
        if not hasattr(module, "lora_A"):
            continue
        delta = module.scaling * module.lora_B.detach() @ module.lora_A.detach()
        if isinstance(module, Stack4bit):
            stem, _, side = layer.rpartition(".")
            key = f"{stem}.{'gate_up_proj' if side == 'up' else 'down_proj'}"
            old, new = (m.get_parameter(key) for m in (before, after))
        else:
            old, new = (m.get_parameter(f"{layer}.weight") for m in (before, after))
            delta = delta.T
            if isinstance(before.get_submodule(layer), torch.nn.Linear):
                delta = delta.T
        torch.testing.assert_close(new - old, delta, atol=1e-6, rtol=1e-4)
        changed += 1
    assert changed == sum(hasattr(module, "lora_A") for module in layers.values()) > 4
    stacks = sum(isinstance(module, Stack4bit) for module in layers.values())
    assert stacks == (4 if name == "mixtral" else 0)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_four_bit_merge_quantizes_the_fp32_sum(name, tmp_path):
    """Route (a): quantize(W16 + s B A), the sum not rounded to 16 bits on the way."""
    source = saved(name, tmp_path / "in")
    packed = qlora_ext.quantize_model(load(source), progress_bar=False)
    adapter = make_adapter(packed, tmp_path / "adapter")
    run("merge", source, adapter, tmp_path / "sum", "--dtype", "float32")
    run("merge", source, adapter, tmp_path / "out", "--four-bit")
    want = qlora_ext.quantize_model(load(tmp_path / "sum", dtype=torch.float32), progress_bar=False)
    want.save_pretrained(tmp_path / "want")
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "want")
    assert ours.keys() == theirs.keys()
    for key in ours:
        if ours[key].dtype == torch.uint8:
            assert torch.equal(ours[key], theirs[key]), key
        else:  # what is not packed keeps the base's dtype
            assert ours[key].dtype == torch.bfloat16
    assert load(tmp_path / "out").config.quantization_config.quant_type == "nf4"


def test_four_bit_merge_of_a_packed_base_writes_16_bits_and_says_why(llama, tmp_path):
    run("quantize", llama, tmp_path / "base")
    adapter = make_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    said = run("merge", tmp_path / "base", adapter, tmp_path / "out", "--four-bit")
    assert "would keep only 5 to 10%" in said and "(--calibration)" in said
    assert "let the model write some (--own-text)" in said
    assert "weights in bfloat16" in said
    assert not hasattr(load(tmp_path / "out").config, "quantization_config")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("named pipe", "is a named pipe, want a file"),
        ("device", "is a device, want a file"),
        ("folder", "is a folder, want a file"),
        ("nothing", "is missing"),
        ("empty file", "is empty, want a few pages of"),
        ("other encoding", "cannot be read as text"),
    ],
)
def test_calibration_text_that_is_none_is_one_sentence(llama, tmp_path, kind, message):
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    path = tmp_path / "text"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind != "nothing":
        path.write_bytes(b"" if kind == "empty file" else "schön ".encode("latin-1") * 400)
    said = run("merge", llama, adapter, tmp_path / "out", "--four-bit", "--calibration", path,
               ok=False)  # fmt: skip
    assert f"{path} {message}" in said
    assert not list(tmp_path.glob("out*"))


def test_of_a_long_text_only_the_start_is_read(llama, tmp_path, monkeypatch):
    """Sparse and of 1 TiB; the start ends within a character."""
    path = tmp_path / "text"
    path.write_bytes("aé".encode() * 10)
    os.truncate(path, 2**40)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    monkeypatch.setattr(calibrated, "CALIBRATION_BYTES", 3 * 5 + 2)
    taken = torch.cat(calibrated._samples(tokenizer, path, 512), dim=1)
    assert torch.equal(taken, tokenizer("aé" * 5 + "a", return_tensors="pt").input_ids)


def test_merge_with_calibration_text_stays_in_4_bits(llama, tmp_path, monkeypatch):
    """Route (b): the result is the base's format, and nearer to the adapted model than the base."""
    run("quantize", llama, tmp_path / "base")
    model = load(tmp_path / "base", dtype=torch.float32)
    before = tiny_models.logits(model)
    adapter = make_adapter(model, tmp_path / "adapter")
    want = tiny_models.logits(model)
    (tmp_path / "text.txt").write_text("".join(chr(33 + i * i % 90) for i in range(3000)))
    said = run("merge", tmp_path / "base", adapter, tmp_path / "out",
               "--calibration", tmp_path / "text.txt")  # fmt: skip
    assert "merged into 4 bits by 3,000 tokens" in said
    merged = load(tmp_path / "out", dtype=torch.float32)
    assert merged.config.quantization_config.quant_type == "nf4"
    got = tiny_models.logits(merged)
    assert (got - want).norm() < (before - want).norm()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    # An unquantized base is packed first.
    command = ["merge", llama, adapter, tmp_path / "o", "--calibration", tmp_path / "text.txt"]
    assert "give --four-bit too" in run(*command, ok=False)
    assert "--embeddings have no effect" in run(*command, "--four-bit", "--embeddings", ok=False)
    run(*command, "--four-bit")
    same, theirs = tensors(tmp_path / "o"), tensors(tmp_path / "out")
    assert same.keys() == theirs.keys()
    assert all(torch.equal(same[key], theirs[key]) for key in same)
    monkeypatch.setattr("qlora_ext.cli.calibrated._samples", lambda *_: [torch.tensor([[999]])])
    command[3] = tmp_path / "other"
    assert "gives token 999" in run(*command, "--four-bit", ok=False)


def test_merge_with_text_of_its_own_is_nearer_than_rounding(llama, tmp_path):
    """From an unquantized base: what is packed first is what counts, as from 4 bits."""
    run("quantize", llama, tmp_path / "base")
    model = load(tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter")
    run("merge", tmp_path / "base", adapter, tmp_path / "sum", "--dtype", "float32")
    want = tiny_models.logits(load(tmp_path / "sum", dtype=torch.float32))
    command = ["merge", llama, adapter, tmp_path / "own", "--own-text"]
    assert "--own-text makes a 4-bit result: give --four-bit too" in run(*command, ok=False)
    assert "have no effect with --own-text" in run(*command, "--embeddings", ok=False)
    (tmp_path / "text.txt").write_text("some")
    both = run(*command, "--calibration", tmp_path / "text.txt", ok=False)
    assert "want one of them" in both
    said = run(*command, "--four-bit")
    tokens = re.search(r"4 bits by ([\d,]+) tokens that the model wrote", said)[1]
    assert 5000 <= int(tokens.replace(",", "")) < 10_000
    run("merge", llama, adapter, tmp_path / "rounded", "--four-bit")
    errors = {}
    for name in ("own", "rounded"):
        got = load(tmp_path / name, dtype=torch.float32)
        assert got.config.quantization_config.quant_type == "nf4"
        errors[name] = (tiny_models.logits(got) - want).norm()
    assert errors["own"] < 0.9 * errors["rounded"]
    run("merge", tmp_path / "base", adapter, tmp_path / "packed", "--own-text")
    assert_same(tmp_path / "own", tmp_path / "packed")


def test_merge_by_text_checks_before_it_works(llama, tmp_path, monkeypatch):
    """No model is loaded for an output that cannot be written, or is another run's."""
    run("quantize", llama, tmp_path / "base")
    adapter = make_adapter(load(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
    monkeypatch.setattr("qlora_ext.cli.chat.load_model", lambda *_: pytest.fail("loaded a model"))
    command = ["merge", tmp_path / "base", adapter]
    assert "cannot be made" in run(*command, "/proc/nope", "--own-text", ok=False)
    interrupted = tmp_path / "out.partial"
    interrupted.mkdir()
    (interrupted / output.STATE).write_text('{"command": "merge"}')
    (interrupted / "model.safetensors").write_text("a finished shard")
    said = run(*command, tmp_path / "out", "--own-text", ok=False)
    assert "differs from this one" in said and (interrupted / "model.safetensors").exists()
    said = run(*command, tmp_path / "o", "--own-text", "--keep", "q_proj", ok=False)
    assert "is in 4 bits already" in said


def test_merge_by_text_leaves_nothing_of_another_run(llama, tmp_path):
    """A stopped run's files are not taken over; a failed one leaves none; an adapter's chat
    template goes with the text that was written in it; shards are as large as asked."""
    run("quantize", llama, tmp_path / "base")
    adapter = make_adapter(load(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
    command = ["merge", tmp_path / "base", adapter, tmp_path / "out"]
    (tmp_path / "damaged").mkdir()
    for path in [*adapter.iterdir(), *(tmp_path / "base").glob("tokenizer*")]:
        shutil.copy(path, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    broken = ["merge", tmp_path / "base", tmp_path / "damaged", tmp_path / "out", "--own-text"]
    assert "has a tokenizer that does not load" in run(*broken, ok=False)
    assert not (tmp_path / "out.partial").exists()

    run(*command, "--own-text")
    plain = (tmp_path / "out" / "chat_template.jinja").exists()
    shutil.rmtree(tmp_path / "out")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    layout = hashlib.sha256(b"").hexdigest()
    (partial / output.STATE).write_text(
        json.dumps({"command": "merge with calibration", "layout": layout})
    )
    (partial / "model.safetensors.index.json").write_text("{}")
    (partial / "junk.txt").write_text("another model's")
    for path in (tmp_path / "base").glob("tokenizer*"):
        shutil.copy(path, adapter)
    template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    run(*command, "--own-text", "--max-shard-size", "20KB")
    assert not plain and (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert not (tmp_path / "out" / "junk.txt").exists()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_four_bit_merge_of_what_fp16_cannot_hold_is_an_error(llama, tmp_path):
    model = load(llama, dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    for path in llama.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "half")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lm_head" in name and "lora_" in name:
                parameter.fill_(60000.0)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    command = ["merge", tmp_path / "half", tmp_path / "adapter", tmp_path / "out", "--four-bit"]
    assert re.search(
        r"lm_head.weight holds [\d,]+ values of [\d,]+ that torch.float16 cannot hold",
        run(*command, ok=False),
    )
    (tmp_path / "text.txt").write_text("some words " * 200)
    command[3] = tmp_path / "other"
    said = run(*command, "--calibration", tmp_path / "text.txt", ok=False)
    assert "lm_head.weight holds" in said and "float16 cannot" in said


def test_merge_from_a_bitsandbytes_checkpoint(llama, tmp_path):
    """bitsandbytes' bytes without bitsandbytes."""
    model = load(llama, quantization_config=qlora_ext.QLoraExtConfig())
    qlora_ext.save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    adapter = make_adapter(model, tmp_path / "adapter")
    run("merge", tmp_path / "bnb", adapter, tmp_path / "out", "--dtype", "float16")
    qlora_ext.merge_and_unload(model, torch.float16, progress_bar=False)
    model.save_pretrained(tmp_path / "want")
    assert_same(tmp_path / "out", tmp_path / "want")
    text = run("inspect", tmp_path / "bnb")
    assert "bitsandbytes, 4 bits" in text
    assert re.search(r"mlp\.up_proj  x4 +nf4, block 64, nested +96 x 64", text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 8}, "has lora_A [4, 96] and the config says r = 8, want the same"),
        ({"rank_pattern": {"q_proj": 7}}, "has lora_A [4, 64] and the config says r = 7"),
        ({"fan_in_fan_out": "x"}, "fan_in_fan_out is 'x', want True or False"),
        ({"target_modules": 3}, "target_modules is 3, want names of layers"),
    ],
)
def test_merge_refuses_the_adapters_that_load_adapter_refuses(llama, tmp_path, changes, message):
    model = load(llama)
    adapter = make_adapter(model, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    assert message in run("merge", llama, adapter, tmp_path / "out", ok=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=re.escape(message)):
        qlora_ext.load_adapter(load(llama), adapter)


@pytest.mark.parametrize("packed", [False, True])
def test_merge_advises_a_wider_dtype_only_where_it_helps(llama, tmp_path, packed):
    base = llama
    if packed:
        base = tmp_path / "packed"
        load(llama, quantization_config=qlora_ext.QLoraExtConfig()).save_pretrained(base)
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    command = ("merge", base, adapter, tmp_path / "out", "--dtype", "float16", "--restart")
    for value, wider in ((300.0, True), (1e30, False)):
        big = {key: torch.full_like(tensor, value) for key, tensor in weights.items()}
        save_file(big, adapter / "adapter_model.safetensors")
        said = run(*command, ok=False)
        assert "that torch.float16 cannot hold" in said
        assert ("; merge with --dtype bfloat16 or float32" in said) == wider, said


def test_adapters_that_do_not_fit_are_one_sentence(llama, tmp_path):
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "is missing" in run("merge", llama, tmp_path / "empty", out, ok=False)
    other = saved("llama", tmp_path / "other", intermediate_size=128, num_hidden_layers=4)
    assert "the adapter belongs to another model" in run("merge", other, adapter, out, ok=False)
    shallow = saved("llama", tmp_path / "shallow", num_hidden_layers=1)
    assert "which the model does not have" in run("merge", shallow, adapter, out, ok=False)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    assert "use_dora" in run("merge", llama, adapter, out, ok=False)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(adapter / "adapter_model.safetensors")
    big = {key: tensor * (3e4 if "lora_B" in key else 1) * 1e3 for key, tensor in weights.items()}
    save_file(big, adapter / "adapter_model.safetensors")
    assert "float16 cannot" in run("merge", llama, adapter, out, "--dtype", "float16", ok=False)
    (adapter / "adapter_model.safetensors").write_bytes(b"\x01" * 40)
    assert "damaged" in run("merge", llama, adapter, out, ok=False)
    assert "want one of them" in run("merge", llama, adapter, out, "--four-bit", "--dtype",
                                     "float16", ok=False)  # fmt: skip
    assert not out.exists()


# values that a dtype cannot hold ------------------------------------------------------------------


def overflowing(path, **changes):
    """An adapter's weights set to values that are finite, each; by the end of their names."""
    file = path / "adapter_model.safetensors"
    weights = load_file(file)
    for key in weights:
        for end, value in changes.items():
            if end.replace("__", ".") in key:
                weights[key] = torch.full_like(weights[key], value)
    save_file(weights, file)
    return path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("packed", [False, True])
def test_merge_refuses_sums_that_the_dtype_cannot_hold(llama, tmp_path, dtype, packed):
    """Finite A and B, whose product is not: never an infinity in OUT."""
    base = llama
    if packed:
        run("quantize", llama, tmp_path / "packed")
        base = tmp_path / "packed"
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    overflowing(adapter, layers__2__mlp__up_proj=1e20)
    said = run("merge", base, adapter, tmp_path / "out", "--dtype", dtype, ok=False)
    want = (
        rf"layers\.2\.mlp\.up_proj\.weight holds 6,144 values of 6,144 that torch\.{dtype} cannot"
    )
    assert re.search(want, said) and "the largest magnitude is" in said
    assert "merge with --dtype" not in said  # beyond float32, too
    assert not (tmp_path / "out").exists()


def test_merge_refuses_what_is_between_bf16_and_fp32(llama, tmp_path):
    """3.4e38 is finite in fp32 and an infinity in bf16."""
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    overflowing(adapter, lora_B=0.0)
    overflowing(adapter, layers__1__self_attn__o_proj__lora_A=3.4e38 / 4 / 4,
                layers__1__self_attn__o_proj__lora_B=1.0)  # fmt: skip
    command = ["merge", llama, adapter, tmp_path / "out", "--dtype"]
    assert "largest magnitude is 3.4e+38" in run(*command, "bfloat16", ok=False)
    run(*command, "float32", "--restart")
    assert all(t.isfinite().all() for t in tensors(tmp_path / "out").values())


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "opt"])
def test_merge_refuses_in_experts_transposed_layers_and_biases(name, tmp_path):
    """In the sums of experts, and in tensors that no adapter changes: norms, biases."""
    source = saved(name, tmp_path / "in", torch.float32)
    model = qlora_ext.quantize_model(load(source, name), progress_bar=False)
    adapter = make_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    bad = {"mixtral": "experts", "gpt2": "h__1__attn__c_attn", "opt": "layers__0__fc1"}[name]
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    for settings in (["--dtype", "float32"], ["--dtype", "float16"], ["--four-bit"]):
        overflowing(adapter, **{bad: 1e20})
        said = run("merge", source, adapter, out, *settings, "--restart", ok=False)
        assert "cannot hold" in said and not out.exists(), settings
        assert "mlp.experts.gate_up_proj[0]" in said or name != "mixtral"
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    for path in source.glob("*.safetensors"):
        weights = load_file(path)
        for key in weights:
            if key.endswith(("norm.weight", "ln_f.bias", "fc1.bias")):
                weights[key][0] = 3.4e38
        save_file(weights, path, metadata={"format": "pt"})
    for dtype in ("bfloat16", "float16"):
        said = run("merge", source, adapter, out, "--dtype", dtype, "--restart", ok=False)
        assert f"torch.{dtype} cannot hold; the largest magnitude is 3.4e+38" in said
        assert not out.exists()


def test_merge_into_packed_experts_names_the_one_that_overflows(tmp_path):
    source = saved("mixtral", tmp_path / "in")
    run("quantize", source, tmp_path / "base")
    adapter = make_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"  # [N, r E], experts fastest
    weights[key][:, 2::4] = 1e7
    save_file(weights, file)
    said = run("merge", tmp_path / "base", adapter, tmp_path / "out", "--dtype", "float16",
               ok=False)  # fmt: skip
    assert "model.layers.1.mlp.experts.down_proj[2] holds" in said
    assert "cannot hold" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_damaged_expert_is_named_with_its_file(name, tmp_path):
    """Whether its stack is packed, or stays dense and is written as it is read."""
    source = saved(name, tmp_path / "in")
    attention = qlora_ext.LoraConfig(r=2, target_modules=["q_proj"])
    model = qlora_ext.add_lora(load(source), attention)
    qlora_ext.save_adapter(model, tmp_path / "adapter")
    end = {"mixtral": "1.block_sparse_moe.experts.2.w2", "qwen3_moe": "1.mlp.experts.2.down_proj"}
    key = f"model.layers.{end[name]}.weight"
    (path,) = [p for p in source.glob("*.safetensors") if key in load_file(p)]
    weights = load_file(path)
    whole = path.read_bytes()
    weights[key][3, 5] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    where = f"{path}: model.layers.1.mlp.experts.down_proj[2] of {key}"
    merging = ["merge", source, tmp_path / "adapter", tmp_path / "merged"]
    packing = ["quantize", source, tmp_path / "packed"]
    assert f"{where} holds 1 value" in run(*merging, ok=False)
    assert f"{where}: quantize_4bit: weight has a NaN" in run(*packing, ok=False)
    packing += ["--restart", "--keep", "experts"]
    assert f"{where} holds 1 value" in run(*packing, ok=False)
    path.write_bytes(whole)
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    said = run(*packing, ok=False)
    assert f"{source} has 3 tensors " in said and "experts.down_proj, want 4" in said


def test_quantize_refuses_a_dtype_that_its_values_do_not_fit(tmp_path):
    """config.json says float16 of a checkpoint in fp32: what is not packed would become Inf."""
    source = saved("llama", tmp_path / "in", torch.float32, vocab_size=256)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    for path in source.glob("*.safetensors"):
        weights = load_file(path)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"][5] = -1e5
            save_file(weights, path, metadata={"format": "pt"})
    said = run("quantize", source, tmp_path / "out", ok=False)
    assert "config.json has dtype torch.float16, but model.norm.weight holds 1 value of 64" in said
    assert "the largest magnitude is 100000" in said and not (tmp_path / "out").exists()
    tiny_tokenizer(source)
    adapter = make_adapter(load(source, dtype=torch.float32), tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("some words " * 200)
    said = run("merge", source, adapter, tmp_path / "merged", "--four-bit", "--calibration",
               tmp_path / "text.txt", ok=False)  # fmt: skip
    assert "model.norm.weight holds" in said and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_what_stays_dense_is_checked_before_it_is_written(llama, tmp_path, key, value):
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    for path in llama.glob("*.safetensors"):
        weights = load_file(path)
        if key in weights:
            weights[key].view(-1)[3] = value
            save_file(weights, path, metadata={"format": "pt"})
            file = path.name
    for words in (["quantize", llama], ["merge", llama, adapter, "--four-bit"],
                  ["merge", llama, adapter]):  # fmt: skip
        said = run(*words, tmp_path / "out", "--restart", ok=False)
        assert re.search(rf"{key} holds 1 value of [\d,]+ that torch.bfloat16 cannot hold", said)
        assert file in said or ("--four-bit" not in words and words[0] == "merge")
        assert ("1 NaN among them" in said) == (value != value)
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_another_dtype_is_named(llama, tmp_path):
    config_with(llama, dtype="float64")
    said = run("quantize", llama, tmp_path / "out", ok=False)
    assert f"{llama}: quantize_model: " in said and "float64" in said


def test_a_weight_that_cannot_be_packed_is_named_with_its_file(llama, tmp_path):
    key = "model.layers.0.mlp.down_proj.weight"
    for path in llama.glob("*.safetensors"):
        weights = load_file(path)
        if key in weights:
            weights[key][0, 5] = float("nan")
            save_file(weights, path, metadata={"format": "pt"})
            file = path
    said = run("quantize", llama, tmp_path / "out", ok=False)
    assert f"{file}: {key}: quantize_4bit: weight has a NaN" in said


def test_biases_and_buffers_are_checked_and_masks_are_not(tmp_path):
    """Of a packed layer the bias stays dense; a mask's infinities are what they should be."""
    source = saved("opt", tmp_path / "in", shard="1GB")
    weights = load_file(source / "model.safetensors")
    key = next(key for key in weights if key.endswith("layers.0.fc1.bias"))
    weights[key][1] = float("inf")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert f"{key} holds 1 value of" in run("quantize", source, tmp_path / "out", ok=False)
    job = quantize.plan(source, qlora_ext.QuantConfig(), [], False, 10**9)
    mask = torch.tensor([0.0, -float("inf")])
    job._check_finite("mask", mask, is_buffer=True)
    with pytest.raises(CliError, match=r"in: mask holds 1 value of 2"):
        job._check_finite("mask", mask, is_buffer=False)
    with pytest.raises(CliError, match=r"mask holds 1 value of 1 .* 1 NaN among them"):
        job._check_finite("mask", torch.tensor([float("nan"), float("inf")]), is_buffer=True)


def test_a_class_that_serves_two_architectures_is_found():
    if not hasattr(transformers, "SarvamMoEConfig"):
        pytest.skip("this transformers lacks Sarvam")
    name = "Glm4MoeForCausalLM"  # which transformers makes and saves for a Sarvam
    config = transformers.SarvamMoEConfig(architectures=[name])
    assert building.model_class(config) is getattr(transformers, name)
    config = transformers.LlamaConfig(architectures=[name])
    with pytest.raises(CheckpointError, match=f"{name}, want a class for model_type 'llama'"):
        building.model_class(config)


# hostile folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("vocab_size", "x"),
        ("tie_word_embeddings", "x"),
        ("vocab_size", -1),
        ("vocab_size", 2**62),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("intermediate_size", 2**62),
        ("rope_parameters", {"rope_type": "zzz"}),
        ("rope_parameters", 5),
        ("hidden_act", "zzz"),
        ("architectures", 5),
        ("architectures", [5]),
        ("architectures", ["T5Model"]),
        ("dtype", "zzz"),
        ("quantization_config", 5),
        ("quantization_config", {"quant_method": "qlora_ext", "blocksize": "x"}),
        ("attn_implementation", "someone/kernel"),
        ("layer_types", ["full_attention"]),
    ],
)
def test_values_in_config_json_end_in_one_sentence_with_their_key(llama, tmp_path, key, value):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, key: value}))
    before = digest(llama)
    for words in (["quantize", llama, tmp_path / "out"], ["estimate", llama, "--seq", 4],
                  ["chat", llama, "--prompt", "a", "--device", "cpu"]):  # fmt: skip
        if key == "quantization_config" and isinstance(value, dict) and words[0] == "estimate":
            continue  # it estimates the unquantized model
        if value == ["T5Model"] and words[0] == "chat":
            continue  # it takes the causal model of a "llama"
        said = run(*words, ok=False)
        assert "config.json" in said and str(llama) in said, said
        name = value[0] if value == ["T5Model"] else key
        # Before transformers 5.23 its own message names this one, with a space.
        assert name in said or name.replace("_", " ") in said, said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists() and digest(llama) == before


def config_with(folder, **values):
    """Keys added at the end of a folder's config.json."""
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in values}
    path.write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("key", ["validate", "to_json_file", "save_pretrained", "_auto_class"])
def test_a_key_with_the_name_of_transformers_own_code_is_named(llama, tmp_path, key):
    """transformers keeps it in the place of the config's method, which is called in the end."""
    config_with(llama, **{key: "x"})
    said = run("quantize", llama, tmp_path / "out", ok=False)
    assert f"{llama}/config.json: {key} is 'x', which transformers does not accept" in said
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_a_value_that_transformers_refuses_to_save_is_of_the_input(llama, tmp_path):
    config_with(llama, output_attentions=5)
    said = run("quantize", llama, tmp_path / "out", ok=False)
    assert f"{llama}/config.json cannot be saved again" in said and "output_attentions" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("key", ["text_config", "decoder", "generator", "text_encoder"])
@pytest.mark.parametrize("value", [{}, {"model_type": "llama"}])
def test_a_part_that_is_no_config_is_named(llama, tmp_path, key, value):
    config_with(llama, **{key: value})
    config_only = tmp_path / "config only"
    config_only.mkdir()
    shutil.copy(llama / "config.json", config_only)
    said = f"config.json: {key} is {value}, which transformers does not accept"
    chat, quantize = ["chat", llama, "--prompt", "a"], ["quantize", llama, tmp_path / "out"]
    for words in (["estimate", config_only], ["estimate", llama, "--dense"], chat, quantize):
        assert said in run(*words, ok=False), words
    with pytest.raises(CheckpointError, match=re.escape(said)):
        qlora_ext.from_pretrained(llama)


@pytest.mark.parametrize("key, value", [("hidden_act", "zzz"), ("text_config", {})])
def test_the_key_at_fault_is_found_among_thousands(llama, monkeypatch, key, value):
    made = []

    def counted(name):
        original = getattr(building, name)
        monkeypatch.setattr(building, name, lambda *a: made.append(name) or original(*a))

    counted("build")
    counted("_config_of")
    monkeypatch.setattr(building, "CULPRIT_SECONDS", 600.0)
    config_with(llama, **{f"junk{i}": i for i in range(3000)}, **{key: value})
    assert f"config.json: {key} is {value!r}, which" in run("estimate", llama, ok=False)
    assert 0 < len(made) < 200
    # One that no key explains, or not in time, is an error all the same.
    monkeypatch.setattr(building, "CULPRIT_SECONDS", -1.0)
    assert "config.json cannot be read (" in run("estimate", llama, ok=False)


@pytest.mark.parametrize("how", ["a tensor", "a shard not named", "a tensor not named"])
def test_no_command_makes_a_missing_tensor_at_random(llama, tmp_path, how):
    make_adapter(load(llama), tmp_path / "adapter")
    index = llama / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    files = value["weight_map"]
    if how == "a tensor":
        path = llama / files["lm_head.weight"]
        save_file({k: t for k, t in load_file(path).items() if k != "lm_head.weight"}, path,
                  metadata={"format": "pt"})  # fmt: skip
    else:
        lacks = files["lm_head.weight"]
        value["weight_map"] = {k: f for k, f in files.items() if f != lacks}
        if how == "a tensor not named":
            # Alone in its file: what lies in a file that is named is read.
            tensors = load_file(llama / lacks)
            head = {"lm_head.weight": tensors.pop("lm_head.weight")}
            save_file(head, llama / "head.safetensors", metadata={"format": "pt"})
            if tensors:
                save_file(tensors, llama / lacks, metadata={"format": "pt"})
                value["weight_map"].update(dict.fromkeys(tensors, lacks))
        index.write_text(json.dumps(value))
    text = tmp_path / "text"
    text.write_text("the cat sat on the mat " * 20)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    for words in (["chat", llama, "--prompt", "a"], ["chat", llama, "--prompt", "a", "--four-bit"],
                  ["chat", adapter, "--base", llama, "--prompt", "a"],
                  ["merge", llama, adapter, out, "--four-bit", "--own-text"],
                  ["merge", llama, adapter, out, "--four-bit", "--calibration", text],
                  ["merge", llama, adapter, out], ["quantize", llama, out]):  # fmt: skip
        said = run(*words, ok=False)
        assert re.search(r"lacks \d+ tensors? of LlamaForCausalLM: .*lm_head.weight", said), words
        assert not out.exists()


def test_a_method_that_nobody_knows_is_refused(llama, tmp_path):
    run("quantize", llama, tmp_path / "packed")
    tiny_tokenizer(tmp_path / "packed")
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    settings["quant_method"] = "QLORA_EXT"
    config_with(tmp_path / "packed", quantization_config=settings)
    folder, out = tmp_path / "packed", tmp_path / "out"
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    for words in (["chat", folder, "--prompt", "a"], ["inspect", folder], ["estimate", folder],
                  ["quantize", folder, out], ["merge", folder, adapter, out]):  # fmt: skip
        said = run(*words, ok=False)
        assert "config.json: quant_method is 'QLORA_EXT', want qlora_ext" in said, words


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu", "inf"),
        ("--gpu", "nan"),
        ("--gpu", "1e308"),
        ("--seq", 10**20),
        ("--batch", 10**20),
    ],
)
def test_numbers_that_estimate_cannot_take_are_refused_by_name(llama, words):
    assert words[0] in run("estimate", llama, *words, ok=False)


@pytest.mark.parametrize("command", ["chat", "inspect", "estimate"])
def test_every_command_judges_the_settings_of_a_packed_folder(llama, tmp_path, command):
    run("quantize", llama, tmp_path / "packed")
    tiny_tokenizer(tmp_path / "packed")
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    more = ["--prompt", "a"] if command == "chat" else []
    for change in ({"blocksize": 63}, {"quant_type": 5}, {"nonsense": 1}):
        config_with(tmp_path / "packed", quantization_config={**settings, **change})
        said = run(command, tmp_path / "packed", *more, ok=False)
        assert (
            "config.json: quantization_config cannot be read (" in said
            and next(iter(change)) in said
        )


@pytest.mark.parametrize("kind", ["dense", "four bits", "packed", "adapter of PEFT"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_chat_refuses_values_that_are_not_finite(llama, tmp_path, kind, value):
    make_adapter(load(llama), tmp_path / "adapter")
    folder, key, more = llama, "model.norm.weight", ["--no-four-bit"] if kind == "dense" else []
    if kind == "packed":
        run("quantize", llama, tmp_path / "packed")
        folder = tmp_path / "packed"
    if kind == "adapter of PEFT":
        more = ["--base", llama]
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
        folder, key = (
            tmp_path / "adapter",
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        )
        weights = load_file(folder / "adapter_model.safetensors")
        for name, tensor in [*weights.items()]:
            if name.endswith("lora_B.weight"):
                vector = name.replace("lora_B.weight", "lora_magnitude_vector")
                weights[vector] = torch.ones(len(tensor))
        save_file(weights, folder / "adapter_model.safetensors")
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if key in weights:
            weights[key].view(-1)[0] = value
            save_file(weights, path, metadata={"format": "pt"})
            file = path.name
    tiny_tokenizer(folder)
    said = run("chat", folder, "--prompt", "a", *more, ok=False)
    assert file in said and "holds 1 value of" in said
    assert key.removeprefix("base_model.model.").removesuffix(".weight") in said


@pytest.mark.parametrize(
    "state, message",
    [
        (b"[" * 50_000, "RecursionError"),
        (b'{"shape": [Infinity, 4], "blocksize": 64, "quant_type": "nf4"}', "OverflowError"),
        (b'{"shape": [4, 4], "blocksize": 1e400, "quant_type": "nf4"}', "OverflowError"),
        (b'{"shape": [140737488355328, 140737488355328], "blocksize": 64, "quant_type": "nf4"}',
         r"ValueError: shape is \(140737488355328, "),
        (b"\0" * 40, "JSONDecodeError"),
        (b"{}", "KeyError"),
    ],
)  # fmt: skip
def test_a_bad_quant_state_of_bitsandbytes_is_one_sentence(llama, tmp_path, state, message):
    make_adapter(load(llama), tmp_path / "adapter")
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    model = qlora_ext.quantize_model(load(llama), progress_bar=False)
    qlora_ext.save_pretrained(model, theirs, format="bitsandbytes")
    tiny_tokenizer(theirs)
    stored, weight = load_file(theirs / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    key = f"{weight}.quant_state.bitsandbytes__nf4"
    stored[key] = torch.tensor(list(state), dtype=torch.uint8)
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    path = re.escape(str(theirs / "model.safetensors"))
    assert re.match(rf"{path}: {key} is damaged \({message}", run("inspect", theirs, ok=False))
    for words in (["chat", theirs, "--prompt", "a"], ["merge", theirs, tmp_path / "adapter", out]):
        said = run(*words, ok=False)
        assert re.match(rf"{path}: {weight} cannot be loaded \(QuantizedTensor\.", said), said
        assert "Traceback" not in said and "report" not in said and "\n" not in said
        assert not out.exists()
    with pytest.raises(CheckpointError, match=rf"^{path}: {weight} cannot be loaded \(Quant"):
        qlora_ext.from_pretrained(theirs)


def test_pickles_are_refused_by_every_command(llama, tmp_path):
    model = load(llama)
    adapter = make_adapter(model, tmp_path / "adapter")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in llama.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    out = tmp_path / "o"
    for words in (["quantize", pickled, out], ["merge", pickled, adapter, out],
                  ["inspect", pickled], ["chat", pickled, "--prompt", "a"]):  # fmt: skip
        assert "has neither model.safetensors nor" in run(*words, ok=False)
    assert "may be a pickle" in run("inspect", pickled / "pytorch_model.bin", ok=False)
    said = run("chat", pickled / "pytorch_model.bin", "--prompt", "a", ok=False)
    assert "is not a folder" in said
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for words in (["merge", llama, adapter, tmp_path / "o"], ["inspect", adapter],
                  ["chat", adapter, "--base", llama, "--prompt", "a"]):  # fmt: skip
        said = run(*words, ok=False)
        assert "adapter_model.safetensors" in said and len(said.splitlines()) == 1


def test_adapters_that_peft_must_not_be_given(llama, tmp_path):
    """What is more than plain LoRA goes to PEFT, but for what would keep it busy or run code."""
    adapter = make_adapter(load(llama), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, said in (
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config is"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is"),
        ({"use_dora": True, "r": 10**9}, "r is 1000000000, want the rank of its tensors"),
        ({"use_dora": True, "target_modules": "(a+)+$"}, "among its layer names"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is ['x']"),
        ({"base_model_name_or_path": str(adapter)}, "is an adapter (adapter_config.json)"),
        ({"base_model_name_or_path": "./" + "x" * 5000}, "is not a folder"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        base = [] if "base_model_name_or_path" in change else ["--base", llama]
        got = run("chat", adapter, *base, "--prompt", "a", "--device", "cpu", ok=False)
        assert said in got and len(got) < 600, got
    assert "antigravity" not in sys.modules


def test_a_fault_of_the_program_stays_a_traceback(llama, monkeypatch, capsys):
    """The net is around the reading of files, not around everything."""

    def run_app(*words):
        monkeypatch.setattr(sys, "argv", ["qlora-ext", *map(str, words)])
        app.run()

    def broken(*_, **__):
        raise AttributeError("a fault")

    monkeypatch.setattr("qlora_ext.cli.inspect.rows", broken)
    with pytest.raises(AttributeError, match="a fault"):
        run_app("inspect", llama)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", broken)
    with pytest.raises(SystemExit):
        run_app("estimate", llama)
    assert "config.json cannot be read (AttributeError: a fault)" in capsys.readouterr().err
    monkeypatch.setenv("QLORA_EXT_TRACEBACK", "1")
    with pytest.raises(CheckpointError) as caught:
        run_app("estimate", llama)
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=oct)
def test_who_may_read_the_files_is_said_by_the_umask(llama, tmp_path, umask):
    before = os.umask(umask)
    try:
        run("quantize", llama, tmp_path / "base", "--max-shard-size", "60KB")
        adapter = make_adapter(load(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
        run("merge", tmp_path / "base", adapter, tmp_path / "merged")
        (tmp_path / "text.txt").write_text("some words " * 50)
        calibration = ("--calibration", tmp_path / "text.txt")
        run("merge", tmp_path / "base", adapter, tmp_path / "packed", *calibration)
    finally:
        os.umask(before)
    for folder in ("base", "adapter", "merged", "packed"):
        # What is copied as it is has its source's, which was made under another umask.
        made = [p for p in (tmp_path / folder).iterdir() if "token" not in p.name]
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in made}
        assert modes == dict.fromkeys(modes, oct(0o666 & ~umask)), folder


# the other commands -------------------------------------------------------------------------------


def test_info_and_module_without_the_packages():
    found = json.loads(run("info", "--json"))
    assert found["cpu_path"] == qlora_ext.build_info()["cpu_path"]
    assert "cpu_path" in run("info")
    text = run_python(
        """
        import runpy
        sys.argv = ["qlora_ext"]
        runpy.run_module("qlora_ext", run_name="__main__")
        """,
        without=("typer", "rich"),
    )
    assert "torch_target" in text
    assert "pip install 'qlora_ext[cli]'" in text


def test_help_and_failures_of_the_process(tmp_path):
    process = command("--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    for name in ("info", "quantize", "merge", "inspect", "estimate", "chat"):
        assert name in out
    process = command("inspect", tmp_path / "nothing")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("qlora-ext inspect: ")
    assert len(err.strip().splitlines()) == 1


def test_letters_that_the_terminal_lacks_are_escaped(llama, tmp_path):
    """A locale of Latin-1, with a name that needs more."""
    model = load(llama)
    model.name_or_path = "Zo\u00eb/\u4e2d"
    adapter = make_adapter(model, tmp_path / "adapter")
    latin = dict(env={**os.environ, "PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    out, err = command("inspect", adapter, **latin).communicate(timeout=60)
    assert "LORA for Zo\u00eb/\\u4e2d" in out, err


def test_inspect_counts_what_memory_report_counts(llama, tmp_path):
    run("quantize", llama, tmp_path / "q")
    text = run("inspect", tmp_path / "q")
    model = load(tmp_path / "q")
    report = qlora_ext.memory_report(model)
    assert f"{report.bits_per_weight:.3f} bits per packed weight" in text
    assert re.search(r"mlp\.down_proj  x4 +nf4, block 64, nested +64 x 96 ", text)
    contents = json.loads(run("inspect", tmp_path / "q", "--json"))
    assert sum(layer["numel"] for layer in contents["layers"]) == report.num_parameters
    packed = [layer for layer in contents["layers"] if layer["packed"]]
    assert sum(layer["numel"] for layer in packed) == report.quantized_numel
    adapter = make_adapter(model, tmp_path / "adapter")
    text = run("inspect", adapter, "--layers")
    assert "LoRA r=4, F32" in text
    assert "model.layers.3.mlp.up_proj" in text
    one = next((tmp_path / "q").glob("*.safetensors"))
    assert "nf4, block 64, nested" in run("inspect", one)
    one.write_bytes(one.read_bytes()[:-9])
    assert "damaged" in run("inspect", tmp_path / "q", ok=False)


def test_inspect_shows_experts_as_a_stack(tmp_path):
    source = saved("mixtral", tmp_path / "in")
    run("quantize", source, tmp_path / "q", "--blocksize", 32)
    model = load(tmp_path / "q")
    text = run("inspect", tmp_path / "q")
    assert re.search(r"experts\.up  x2 +nf4, block 32, nested +4 x 192 x 64 ", text)
    assert re.search(r"experts\.down  x2 +nf4, block 32, nested +4 x 64 x 96 ", text)
    report = qlora_ext.memory_report(model)
    assert f"{report.bits_per_weight:.3f} bits per packed weight" in text
    contents = json.loads(run("inspect", tmp_path / "q", "--json"))
    assert sum(layer["numel"] for layer in contents["layers"]) == report.num_parameters
    text = run("inspect", make_adapter(model, tmp_path / "adapter"))
    assert re.search(r"experts  x2 +LoRA r=4, F32 +4 x 64 x 96 ", text)
    assert re.search(r"experts\.base_layer  x2 +LoRA r=4, F32 +4 x 192 x 64 ", text)
    assert re.search(r"q_proj  x2 +LoRA r=4, F32 +64 x 64 ", text)


def test_rows_into_a_pipe_are_whole_where_colours_are_forced(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen.table("", ["name"], [["model.layers.0." + "w" * 120, "end of row"]])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "model" in line]
    assert "w" * 120 in row and "end of row" in row


def test_estimate_counts_weights_exactly_and_activations_by_the_sample(llama):
    text = run("estimate", llama, "--seq", 32, "--batch", 4, "--gpu", 8)
    assert "An estimate" in text
    assert re.search(r"8 GiB +yes +\d", text)
    config = transformers.AutoConfig.from_pretrained(llama)
    lora = qlora_ext.LoraConfig(r=8, target_modules="all-linear")
    settings = dict(quant=qlora_ext.QuantConfig(), lora=lora)
    found = estimate.estimate(config, seq=32, batch=4, checkpointing=False, **settings)
    report = qlora_ext.memory_report(qlora_ext.quantize_model(load(llama), progress_bar=False))
    weights = found.parts["4-bit weights and scales"] + found.parts["weights that stay dense"]
    # Rotary frequencies and the like are buffers, which meta has too.
    assert abs(weights - report.total) <= report.parts["buffers"]
    one = estimate.estimate(config, seq=32, batch=1, checkpointing=False, **settings)
    saved = "saved for the backward pass"
    assert found.parts[saved] == 4 * one.parts[saved]
    less = estimate.estimate(config, seq=32, batch=4, checkpointing=True, **settings)
    assert less.parts[saved] < found.parts[saved] / 2
    assert found.largest_batch(found.total + 1000) == 4
    assert found.largest_batch(0.1) == 0


def test_estimate_with_experts_in_host_memory(llama):
    """The device holds two layers' experts, whatever the number of layers."""
    config = tiny_models.make("qwen3_moe", num_hidden_layers=5).config
    lora = qlora_ext.LoraConfig(r=4)
    settings = dict(seq=16, batch=1, quant=qlora_ext.QuantConfig(), lora=lora, checkpointing=True)
    found = estimate.estimate(config, **settings, offload=True)
    plain = estimate.estimate(config, **settings)
    assert plain.host == 0 and found.total < plain.total
    packed = "4-bit weights and scales"
    assert found.parts[packed] + found.host * 3 // 5 == plain.parts[packed]
    assert {**found.parts, packed: 0} == {**plain.parts, packed: 0}
    with pytest.raises(CliError, match="--offload-experts: LlamaForCausalLM has no packed experts"):
        estimate.estimate(transformers.AutoConfig.from_pretrained(llama), **settings, offload=True)


def test_estimate_counts_on_meta_what_a_real_step_saves(llama):
    """The same hooks around a real forward pass on the CPU see the same bytes."""
    config = transformers.AutoConfig.from_pretrained(llama)
    lora = qlora_ext.LoraConfig(r=8, target_modules="all-linear")
    found = estimate.estimate(
        config, seq=32, batch=1, quant=qlora_ext.QuantConfig(), lora=lora, checkpointing=False
    )
    model = qlora_ext.quantize_model(load(llama), progress_bar=False)
    qlora_ext.add_lora(model, lora)
    model.set_attn_implementation("qlora_ext_counting")
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    ids = torch.randint(3, 200, (1, 32))
    with estimate._counting(model) as real:
        model.train()(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    nbytes = sum(nbytes for nbytes, _, _ in real.values())
    assert nbytes == pytest.approx(found.parts["saved for the backward pass"], rel=0.05)


def peak_of(step) -> int:
    """The most bytes that torch's CPU allocator holds at once in step(), beyond those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name, vocabulary", [("llama", 8000), ("gemma3", 500), ("mixtral", 500)])
def test_estimate_is_near_what_a_step_allocates(name, vocabulary, checkpointing):
    """Forward and backward in bfloat16 on the CPU, against the estimate: docs/cli.md's factors."""
    config = tiny_models.make(
        name, vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        max_position_embeddings=128,
    ).config  # fmt: skip
    lora = qlora_ext.LoraConfig(r=8, target_modules="all-linear")
    found = estimate.estimate(
        config, seq=128, batch=2, quant=qlora_ext.QuantConfig(), lora=lora,
        checkpointing=checkpointing,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model.config.use_cache = False
    qlora_ext.add_lora(qlora_ext.quantize_model(model, progress_bar=False), lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    ids = torch.randint(3, vocabulary, (2, 128))
    peak = peak_of(lambda: model(input_ids=ids, labels=ids).loss.backward())
    parts = ("saved for the backward pass", "logits and their gradients", "their gradients (fp32)")
    assert 0.85 < peak / sum(found.parts[part] for part in parts) < 1.2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.parts["their gradients (fp32)"] == sum(p.nbytes for p in trained)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert moments == found.parts["optimizer"]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "gemma3", "bloom"])
def test_estimate_of_other_architectures(name, tmp_path):
    source = saved(name, tmp_path / "in")
    run("estimate", source / "config.json", "--seq", 16)
    (source / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "unheard_of" in run("estimate", source, ok=False)


def test_chat_with_base_adapter_and_merged(llama, tmp_path):
    run("quantize", llama, tmp_path / "base")
    adapter = make_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    run("merge", tmp_path / "base", adapter, tmp_path / "merged")
    for model in (llama, tmp_path / "base", adapter, tmp_path / "merged"):
        run("chat", model, "--prompt", "Hello", "--max-tokens", 3, "--device", "cpu")
    run("chat", adapter, "--base", llama, "--no-four-bit", "--prompt", "Hello", "--max-tokens", 2)
    assert "no tokenizer" in run("chat", saved("llama", tmp_path / "t"), "--prompt", "a", ok=False)
    talk = CliRunner().invoke(
        app.app, ["chat", str(llama), "--max-tokens", "2"], input="hi\n/reset\n/quit\n"
    )
    assert talk.exit_code == 0, talk.output


def test_the_commands_in_the_docs_run(tmp_path, monkeypatch):
    """docs/cli.md, in its order, on a tiny model of the same name."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "SmolLM2-135M-Instruct"
    tiny_llama(source)
    tiny_tokenizer(source)
    make_adapter(load(source), tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("some text, like that which the model is for\n" * 20)
    text = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:\$ )?qlora-ext (.+)$", text, re.MULTILINE)
    assert {line.split()[0] for line in commands} == {
        "quantize", "merge", "inspect", "estimate", "chat", "info"
    }  # fmt: skip
    for line in commands:
        run(*shlex.split(line))
