"""examples/: what the demonstration learns from, how it survives interruptions, and a small run."""

import errno
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from integration_helpers import tiny_llama, tiny_tokenizer
from paths import REPOSITORY

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def example():
    """The modules of examples/, by name."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield lambda name: importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A saved two-layer Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer(folder)
    return tiny_llama(folder, initializer_range=0.02)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"instruction": f"Count from {i} to {i + 3}.", "output": f"{i}, {i + 1}, {i + 2}, {i + 3}."}
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(tiny_model, pairs_file, output, *more) -> list[str]:
    return list(map(str, [
        "--model", tiny_model, "--data", pairs_file, "--output", output, "--batch-size", 4,
        "--micro-batch-size", 2, "--eval-pairs", 8, "--warmup", 2, "--checkpoint-every", 2,
        "--precision", "fp32", *more,
    ]))  # fmt: skip


def finetune(*settings, ends=0, by=(EXAMPLES / "finetune.py",)) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, by), *arguments(*settings)],
        capture_output=True,
        text=True,
        timeout=300,
        # Torch names the interface by the host's name, which need not resolve.
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == ends, done.stdout + done.stderr
    return done


def test_docstring_pairs(example):
    """Thousands of pairs, none twice, and no module on both sides."""
    train, held_out = example("instructions").stdlib_pairs()
    assert len(train) > 1000 and len(held_out) > 100
    answers = [p.answer for p in train + held_out]
    assert len(set(answers)) == len(answers)
    modules = [
        {p.instruction.split("`")[1].split(".")[0] for p in side} for side in (train, held_out)
    ]
    assert not modules[0] & modules[1]


def test_data_file_problems_are_sentences(example, tmp_path):
    read = example("instructions").file_pairs
    bad = tmp_path / "bad.jsonl"
    for line, words in (
        ("not json", "bad.jsonl:1: want a JSON object"),
        ('{"instruction": "no answer"}', "bad.jsonl:1: want a JSON object"),
        ("[1]", "bad.jsonl:1: want a JSON object"),
        ('{"prompt": "a", "completion": "b"}', "want at least one of each"),
    ):
        bad.write_text(line + "\n")
        with pytest.raises(SystemExit, match=words):
            read(bad)


def test_batches_of_a_resumed_run_are_the_same(example):
    instructions = example("instructions")
    examples = [([i] * (i + 1), [i] * (i + 1)) for i in range(10)]
    one, other = (instructions.Batches(examples, 4, seed=3, pad_id=0) for _ in range(2))
    first = [one.at(i)["input_ids"].tolist() for i in range(6)]
    assert [other.at(i)["input_ids"].tolist() for i in (5, 2)] == [first[5], first[2]]
    assert first[0] != first[2]  # two batches an epoch: a new order each


def test_labels_are_the_answers(example, tiny_model):
    from transformers import AutoTokenizer

    instructions = example("instructions")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids, labels = instructions.encode(tokenizer, instructions.Pair("Question?", "An answer."), 512)
    kept = [i for i, label in zip(ids, labels) if label != instructions.IGNORED_LABEL]
    assert tokenizer.decode(kept) == "An answer.</s>"
    assert instructions.encode(tokenizer, instructions.Pair("Question?" * 99, "x" * 20), 64) is None


def test_a_failed_write_loses_no_checkpoint(example, tmp_path, monkeypatch):
    checkpoints = example("checkpoints")
    folder = tmp_path / "checkpoints"
    state = {"weights": torch.arange(4.0)}
    for step in (1, 2, 3):
        checkpoints.save_checkpoint(folder, {**state, "step": step})
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002.pt", "step-000003.pt"]

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_checkpoint(folder, {**state, "step": 4})
    monkeypatch.undo()
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002.pt", "step-000003.pt"]
    assert checkpoints.load_newest(folder)[0]["step"] == 3

    (folder / "step-000003.pt").write_bytes(b"damaged")
    assert checkpoints.load_newest(folder)[0]["step"] == 2
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert checkpoints.load_newest(folder) is None
    checkpoints.save_checkpoint(folder, {**state, "step": 5})  # the folder is made again
    assert torch.equal(checkpoints.load_newest(folder)[0]["weights"], state["weights"])


def test_a_folder_is_replaced_whole(example, tmp_path):
    write_folder = example("checkpoints").write_folder
    target = tmp_path / "adapter"
    write_folder(target, lambda folder: (folder / "a").write_text("old"))

    def half(folder):
        (folder / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, half)
    assert (target / "a").read_text() == "old" and os.listdir(tmp_path) == ["adapter"]
    write_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()], ids=repr)
def test_a_failed_rename_loses_no_folder(example, tmp_path, monkeypatch, error):
    write_folder = example("checkpoints").write_folder
    target = tmp_path / "adapter"
    write_folder(target, lambda folder: (folder / "a").write_text("old"))
    real = Path.rename

    def rename(self, to):
        if self.name == ".adapter.partial":
            raise error
        return real(self, to)

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(Path, "rename", rename)
        write_folder(target, lambda folder: (folder / "a").write_text("new"))
    assert (target / "a").read_text() == "old" and os.listdir(tmp_path) == ["adapter"]

    # As a kill between the renames leaves it, and then a disk that is full.
    target.rename(tmp_path / ".adapter.old")
    with pytest.raises(ZeroDivisionError):
        write_folder(target, lambda folder: 1 / 0)
    assert (target / "a").read_text() == "old" and os.listdir(tmp_path) == ["adapter"]


def test_letters_that_the_terminal_lacks_are_escaped(example, monkeypatch):
    module, raw = example("finetune"), io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
        patched.setattr(sys, "argv", ["finetune.py", "--help"])
        with pytest.raises(SystemExit):
            module.main()
        module.say("Zo\u00eb, \u4e2d")
        sys.stdout.flush()
        assert raw.getvalue().endswith(b"Zo\xeb, \\u4e2d\n")


def test_steps_fit_the_time(example, capsys):
    module = example("finetune")
    args = module.parse_arguments(["--minutes", "5"])

    def fitting(steps, step, used, pace, first=False):
        return module.fitting_steps(steps, step, used, pace, args, first)

    assert fitting(60, 4, 4 * 3.0, 3.0, first=True) == 60
    assert fitting(60, 4, 4 * 10.0, 10.0, first=True) == 30
    assert fitting(60, 4, 4 * 100.0, 100.0, first=True) == module.MIN_STEPS
    said = capsys.readouterr().out
    assert "taking them all" in said and "taking 30" in said
    # The machine slows down later.
    assert fitting(60, 30, 150.0, 5.9) == 60  # 27 s too long, a tenth of the time is 30 s
    assert capsys.readouterr().out == ""
    assert fitting(60, 30, 150.0, 10.0) == 45
    assert (
        "60 steps end after 7.5 minutes, at 10.0 s each now: taking 45" in capsys.readouterr().out
    )
    assert fitting(60, 30, 400.0, 60.0) == 32  # the time is over: two steps to end with
    assert fitting(32, 31, 460.0, 60.0) == 32
    assert fitting(60, 10, 400.0, 60.0) == module.MIN_STEPS
    assert fitting(8, 4, 400.0, 60.0) == 8


def test_a_machine_that_slows_down_takes_fewer_steps(example, tmp_path, monkeypatch):
    """Steps take 5 s at first, and 60 s from the 25th on. Training ends soon after the time that
    is allowed, with the lowest learning rate."""
    module, instructions = example("finetune"), example("instructions")
    clock, rates = [0.0], []

    class Slow(Table):
        def forward(self, input_ids, attention_mask):
            clock[0] += 5.0 if len(rates) < 24 else 60.0
            return super().forward(input_ids, attention_mask)

    def rate(step, steps, args):
        rates.append(real(step, steps, args))
        return rates[-1]

    real = module.rate
    monkeypatch.setattr(module, "rate", rate)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    args = module.parse_arguments(["--output", str(tmp_path), "--batch-size", "2"])
    assert args.minutes == 6 and args.steps == 60
    report = module.Report(args)
    report.precision = {"chosen": "fp32"}
    batches = instructions.Batches([([1, 2, 3], [1, 2, 3])] * 4, 2, seed=0, pad_id=0)
    module.train(Slow(), batches, args, report, None)
    taken = len(report.history)
    assert 25 < taken <= 30 and clock[0] <= 6 * 60 + 4 * 60
    assert rates[-1] < 0.2 and rates[20] > 0.8
    state, _ = module.checkpoints.load_newest(tmp_path / "checkpoints")
    assert state["step"] == state["steps"] == taken


def test_a_second_interrupt_is_a_sentence(example, monkeypatch, capsys):
    module = example("finetune")

    def main():
        with module.stop_signals() as stopped:
            signal.raise_signal(signal.SIGINT)  # in this thread: os.kill may choose another
            assert stopped == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "main", main)
    # A shell lets what it starts in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit, match=r"Interrupted at once.*goes on from the last one"):
            module.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Stopping after this step (again: at once)" in capsys.readouterr().out


def test_a_run_and_what_it_leaves(tiny_model, pairs_file, tmp_path):
    """Report, picture, adapter and merged model; the merged model loads without us."""
    done = finetune(tiny_model, pairs_file, tmp_path, "--steps", 8, "--learning-rate", "1e-2")
    report = json.loads((tmp_path / "report.json").read_text())
    losses = report["held_out_loss"]
    assert set(losses) == {
        "base_unquantized", "base_4bit", "trained", "merged_fp32", "merged_bf16", "merged_fp16"
    }  # fmt: skip
    assert losses["trained"] < losses["base_4bit"] - 0.3
    assert abs(losses["merged_fp32"] - losses["trained"]) < 0.005
    assert abs(losses["merged_fp16"] - losses["trained"]) < 0.005
    assert abs(losses["merged_bf16"] - losses["trained"]) < 0.02
    assert report["training"]["steps"] == 8 and report["memory"]["bits_per_packed_weight"] < 4.2
    assert report["answers"]["prompt"] in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    code = (
        "import sys, transformers; "
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r}); "
        "print(m.dtype, 'qlora_ext' in sys.modules)"
    )
    plain = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert plain.stdout.split() == ["torch.float16", "False"], plain.stderr


def test_an_interrupted_run_goes_on(tiny_model, pairs_file, tmp_path, example, monkeypatch):
    """Stopped by SIGTERM after a step, then started again: the same losses as without."""
    after = 3  # between two checkpoints
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(tiny_model, pairs_file, whole, "--steps", 6)

    module = example("finetune")
    real = module.Report.step_done

    def step_done(self, *measured):
        real(self, *measured)
        if len(self.history) == after:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match=f"after step {after}"):
        patched.setattr(module.Report, "step_done", step_done)
        command = ["finetune.py", *arguments(tiny_model, pairs_file, parts, "--steps", 6)]
        patched.setattr(sys, "argv", command)
        module.main()
    assert list((parts / "checkpoints").glob(f"step-{after:06d}.pt"))

    other = finetune(tiny_model, pairs_file, parts, "--steps", 6, "--learning-rate", "5e-4", ends=1)
    assert "learning_rate was" in other.stderr and "--fresh" in other.stderr
    said = finetune(tiny_model, pairs_file, parts, "--steps", 6).stdout
    assert f"Going on from step {after} of 6" in said
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, parts)]
    histories = [[step["loss"] for step in r["training"]["history"]] for r in reports]
    assert histories[0] == histories[1]
    assert reports[0]["held_out_loss"] == reports[1]["held_out_loss"]
    assert reports[1]["training"]["resumed_at"] == [after]


def test_torchrun_trains_as_one_process(tiny_model, pairs_file, tmp_path, example):
    """Two processes share each batch; one of them is told to stop, and both go on from there."""
    settings = ("--steps", 3, "--dropout", 0, "--learning-rate", "1e-2")
    one, two = tmp_path / "one", tmp_path / "two"
    finetune(tiny_model, pairs_file, one, *settings)

    stops = tmp_path / "stops.py"  # the example, stopped in its second process after a step
    stops.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import finetune\n"
        "real = finetune.Report.step_done\n"
        "def step_done(self, *measured):\n"
        "    real(self, *measured)\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "finetune.Report.step_done = step_done\n"
        "finetune.main()\n"
    )
    # By address: the host's name need not resolve.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                "--nproc-per-node", 2)  # fmt: skip
    said = finetune(tiny_model, pairs_file, two, *settings, by=(*torchrun, stops), ends=1)
    assert "Interrupted after step 1 of 3" in said.stderr
    state = torch.load(two / "checkpoints" / "step-000001.pt")
    first, second = (states["rng"] for states in state["random"])
    assert not torch.equal(first, second)
    # One process has other random numbers to go on with: refused.
    module = example("finetune")
    args = module.parse_arguments(arguments(tiny_model, pairs_file, two, *settings))
    with pytest.raises(SystemExit, match="processes was 2, is 1"):
        module.find_checkpoint(args, module.Report(args))

    by = (*torchrun, EXAMPLES / "finetune.py")
    said = finetune(tiny_model, pairs_file, two, *settings, by=by).stdout
    assert said.count("Going on from step 1 of 3") == 1  # one process speaks
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert reports[1]["training"]["resumed_at"] == [1]
    for name, loss in reports[0]["held_out_loss"].items():
        assert reports[1]["held_out_loss"][name] == pytest.approx(loss, rel=1e-5), name
    histories = [[step["loss"] for step in r["training"]["history"]] for r in reports]
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))


def test_a_batch_is_shared_evenly(example, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        example("finetune").parse_arguments(["--batch-size", "6", "--micro-batch-size", "2"])
    said = capsys.readouterr().err
    assert "--batch-size 6 is not a multiple of --micro-batch-size 2 x 2 processes" in said


class Table(torch.nn.Module):
    """Stands in for a language model of 8 tokens."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 8)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table(input_ids))


def test_a_resumed_run_has_the_scale_and_the_generators_that_it_had(example, tmp_path, monkeypatch):
    """fp16's loss scale and, on CUDA, that device's generator, which a stand-in plays here."""
    module, instructions = example("finetune"), example("instructions")
    scalers, cuda = [], {"state": torch.arange(16, dtype=torch.uint8)}

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, **settings):
            super().__init__("cpu", init_scale=8.0, growth_interval=1, **settings)
            scalers.append(self)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: cuda["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: cuda.update(state=s))
    monkeypatch.setattr(module, "on_device", lambda batch, args: batch)
    monkeypatch.setattr(
        module, "lower_precision", lambda device, dtype: torch.autocast("cpu", dtype)
    )
    args = module.parse_arguments(
        ["--steps", "3", "--output", str(tmp_path), "--batch-size", "2", "--device", "cuda"]
    )
    report = module.Report(args)
    report.precision = {"chosen": "fp16"}
    batches = instructions.Batches([([1, 2, 3], [1, 2, 3])] * 4, 2, seed=0, pad_id=0)
    module.train(Table(), batches, args, report, None)
    assert scalers[0].get_scale() == 8.0 * 2**3

    state, _ = module.checkpoints.load_newest(tmp_path / "checkpoints")
    cuda["state"] = torch.zeros(16, dtype=torch.uint8)
    torch.manual_seed(99)
    module.train(Table(), batches, args, report, state)  # no step is left to take
    assert scalers[1].get_scale() == 8.0 * 2**3
    assert torch.equal(cuda["state"], torch.arange(16, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), state["random"][0]["rng"])


def test_training_goes_on_without_a_place_for_checkpoints(example, tmp_path, monkeypatch, capsys):
    """A full disk costs a checkpoint and says so; it does not end the training."""
    module, instructions = example("finetune"), example("instructions")
    args = module.parse_arguments(
        ["--steps", "2", "--checkpoint-every", "1", "--output", str(tmp_path), "--batch-size", "2"]
    )
    report = module.Report(args)
    report.precision = {"chosen": "fp32"}

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.checkpoints, "write_file", full_disk)
    batches = instructions.Batches([([1, 2, 3], [1, 2, 3])] * 4, 2, seed=0, pad_id=0)
    module.train(Table(), batches, args, report, None)
    assert len(report.history) == 2
    assert "checkpoint of step 1 could not be written" in capsys.readouterr().out


def test_png_without_a_display(example, tmp_path):
    pytest.importorskip("matplotlib")
    module = example("finetune")
    names = ("base_unquantized", "base_4bit", "trained", "merged_fp16")
    module.plot(
        tmp_path / "x" / "loss.png", [{"loss": 3.0}, {"loss": 2.0}], dict.fromkeys(names, 2.5)
    )
    image = importlib.import_module("matplotlib.image").imread(
        io.BytesIO((tmp_path / "x" / "loss.png").read_bytes())
    )
    assert image.ndim == 3
