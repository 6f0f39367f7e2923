"""bench/gpu.py and bench/gpu.sh as far as they run without a GPU: all of gpu.py on the CPU ops,
with torch.cuda replaced by a clock, and gpu.sh with a Python that only notes what it is asked.
What they would measure is not looked at."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from cases import quantize
from conftest import _load
from torch.overrides import TorchFunctionMode

import qlora_ext

BENCH = Path(__file__).parent.parent / "bench"


class OnTheCpu(TorchFunctionMode):
    """device="cuda" makes CPU tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Graph:
    def replay(self):
        pass


class Stream:
    def wait_stream(self, stream):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """bench/gpu.py with one small layer."""
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LAYERS", {"small": (64, 128)})
    monkeypatch.setattr(module, "FOCUS", ("small",))
    monkeypatch.setattr(module, "COPY_BYTES", 4096)
    monkeypatch.setattr(module, "MATMUL_SIZE", 32)
    properties = types.SimpleNamespace(L2_cache_size=4096)
    fakes = {
        "is_available": lambda: True,
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda: "a CPU",
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3 << 20,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # Its 4-bit calls have no CPU twin of these signatures here: contenders without it.
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    with OnTheCpu():
        module.main()


def test_every_case_runs_is_printed_saved_and_plotted(gpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run(gpu, monkeypatch, tmp_path)
    record = json.loads((tmp_path / "bench.json").read_text())
    cases = {(row["op"], row["M"]) for row in record["rows"]}
    assert {op for op, _ in cases} == {
        "dequantize",
        "quantize",
        "forward",
        "forward+LoRA",
        "backward+LoRA",
    }
    assert {M for op, M in cases if op == "forward"} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert {M for op, M in cases if op == "backward+LoRA"} == {512, 2048, 8192}
    for row in record["rows"]:
        assert row["us"]["ours"] >= 0 and row["floor_us"] > 0
        assert row["not_graphed"] == (["ours"] if row["op"] == "quantize" else [])
        assert row["extra_bytes"] == 3 << 20 and row["missed"] == gpu.missed(row)
    printed = capsys.readouterr().out
    assert "TB/s" in printed and printed.count("of floor") == len(record["rows"])
    for name in ("forward", "forward_LoRA", "backward_LoRA"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_captured_is_timed_as_a_loop(gpu, monkeypatch):
    def refuse(graph):
        raise RuntimeError("quantize_4bit: the current stream is being captured")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    called = []
    times, marked = gpu.compare({"ours": called.append}, copies=3, rounds=2)
    assert marked == ["ours"] and set(times) == {"ours"}
    assert called == [0, 1, 2] * 5  # before the capture, two to warm up, two rounds


def test_touch_every_op(gpu, monkeypatch, capsys):
    run(gpu, monkeypatch, "--touch-every-op")
    assert "touched every op" in capsys.readouterr().out


def test_touch_every_op_launches_every_kernel(gpu, monkeypatch):
    """On the emulated machine, on the architectures that choose differently."""
    simt = _load("simt")

    def quantized(weight, **config):
        quantize(simt, weight, qlora_ext.QuantConfig(**config))
        return qlora_ext.quantize_4bit(weight, **config)

    monkeypatch.setattr(gpu, "ops", simt.ops)
    monkeypatch.setattr(gpu, "qlora_ext", types.SimpleNamespace(quantize_4bit=quantized))
    simt.ops.reset_launches()
    with OnTheCpu(), simt.ops.device(90, 64):
        gpu.touch_every_op()
    launches = simt.ops.kernels()
    base = {name.split("<")[0] for name in launches}
    assert base == {name.split("<")[0] for name, n in launches.items() if n}


def test_bars(gpu):
    def row(op, M, floor=1.0, **us):
        return {"op": op, "M": M, "floor_us": floor, "us": {"ours": 10.0, **us}}

    assert gpu.missed(row("dequantize", 0, 8.5, bitsandbytes=13.1)) == []
    assert gpu.missed(row("dequantize", 0, 7.0, bitsandbytes=12.0)) == [
        "1.20x bitsandbytes, want 1.30x",
        "70% of the copy's bandwidth, want 80%",
    ]
    assert gpu.missed(row("forward", 1, **{"dense bf16": 21.0, "bitsandbytes": 12.1})) == [
        "2.10x dense bf16, want 2.20x"
    ]
    assert gpu.missed(row("forward", 64, **{"dense bf16": 5.0, "bitsandbytes": 9.0})) == [
        "0.90x bitsandbytes, want 1.00x"
    ]
    fast = {"bitsandbytes+LoRA": 15.1, "dense bf16": 6.1}
    assert gpu.missed(row("forward+LoRA", 512, **fast)) == []
    assert len(gpu.missed(row("forward+LoRA", 2048, **fast))) == 1
    assert gpu.missed(row("backward+LoRA", 8192, **{"bitsandbytes+LoRA": 10.9})) == [
        "1.09x bitsandbytes+LoRA, want 1.10x"
    ]


def test_no_case_starts_after_the_time_is_up(gpu, monkeypatch, tmp_path):
    run(gpu, monkeypatch, tmp_path, "--seconds", "-1", "--quick")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == []


def test_without_a_gpu_it_is_one_sentence(tmp_path):
    command = [sys.executable, BENCH / "gpu.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if not torch.cuda.is_available():
        assert done.returncode == 1 and done.stderr == "bench/gpu.py: torch sees no GPU\n"


# ---------------------------------------------------------------- gpu.sh


def gpu_sh(folder, *, says="exit 0", sanitizer=True):
    """Runs gpu.sh in a folder of its own with stand-ins for the tools: status, summary, calls."""
    (folder / "bench").mkdir()
    (folder / "bin").mkdir()
    script = folder / "bench" / "gpu.sh"
    script.write_text((BENCH / "gpu.sh").read_text())

    def tool(name, text):
        path = folder / "bin" / name
        path.write_text("#!/bin/bash\n" + text + "\n")
        path.chmod(0o755)

    calls = folder / "calls"
    python = f"""echo "$*" | head -n 1 >> {calls}
case "$*" in
  *get_device_capability*) echo 9.0a ;;
  *get_device_name*) echo nvidia-test ;;
  *"bench/gpu.py {folder}"*) echo '{{}}' > {folder}/out/bench.json; echo "5% of floor" ;;
esac
{says}"""
    tool("python", python)
    tool("nvidia-smi", "echo a GPU")
    tool("nvcc", "echo release 13.0")
    if sanitizer:
        note = f'echo "sanitizer $*" | head -n 1 >> {calls}'
        tool("compute-sanitizer", f'[ "$1" = --help ] && echo "  --kernel-name arg" || {note}')
    done = subprocess.run(
        ["bash", script, folder / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{folder}/bin:/usr/bin:/bin", "PYTHON": "python"},
    )
    summary = (folder / "out" / "summary.txt").read_text()
    return done.returncode, summary, calls.read_text().splitlines()


def test_gpu_sh_does_every_step(tmp_path):
    status, summary, calls = gpu_sh(tmp_path)
    assert status == 0, summary
    for name in ("build", "info", "tests", "memcheck", "racecheck", "initcheck", "synccheck"):
        assert re.search(rf"^ok +{name}\b", summary, re.M), summary
    assert "5% of floor" in summary
    assert len(list((tmp_path / "bench" / "results").glob("nvidia-test-*.json"))) == 1
    assert "setup.py build_ext --inplace" in calls
    checks = [call for call in calls if call.startswith("sanitizer --tool")]
    assert len(checks) == 4
    # initcheck has to see what torch's kernels write.
    assert [c.split()[2] for c in checks if "kns=qlora_ext" not in c] == ["initcheck"]


def test_gpu_sh_runs_the_tests_that_only_a_gpu_can_run():
    step = re.search(
        r"^step tests .*?((?:[^\n]*\\\n)*[^\n]*)", (BENCH / "gpu.sh").read_text(), re.M
    )
    (chosen,) = re.findall(r"-k '([^']*)'", step[0])
    files = re.findall(r"tests/(test_\w+\.py)", step[0])
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", chosen, *files],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout
    for name in ("test_a_graph_replays_a_step[cuda-1]", "test_the_current_stream_is_used[cuda]"):
        assert name in listed
    assert "test_ops.py" in listed and "[simt" not in listed and "[cpu" not in listed


def test_gpu_sh_goes_on_after_a_failed_step_but_not_after_a_failed_build(tmp_path):
    failing_tests = '[[ "$*" == *pytest* ]] && { echo "1 failed"; exit 1; }; exit 0'
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    status, summary, calls = gpu_sh(first, says=failing_tests, sanitizer=False)
    assert status == 1 and "FAILED  tests, status 1" in summary and "1 failed" in summary
    assert any(call.startswith("bench/gpu.py") for call in calls)
    status, summary, calls = gpu_sh(second, says='[[ "$*" == *setup.py* ]] && exit 1; exit 0')
    assert status == 1 and not any(call.startswith("bench/gpu.py") for call in calls)


def test_gpu_sh_ends_well_within_nine_minutes():
    text = (BENCH / "gpu.sh").read_text()
    limits = [int(n) for n in re.findall(r"^step \w+ (\d+) ", text, re.M)]
    (sanitizers,) = re.findall(r"timeout --kill-after=10 (\d+) \"\$sanitizer\"", text)
    assert len(limits) == 4 and sum(limits) + int(sanitizers) <= 490
    assert f"{sum(limits) + int(sanitizers)} seconds together" in text
