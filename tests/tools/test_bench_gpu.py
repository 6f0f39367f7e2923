"""bench/gpu.py, bench/parity.py and bench/gpu.sh without a GPU: the Python runs on the CPU ops with
torch.cuda replaced by a machine that has clocks and counts launches, gpu.sh with stand-ins for the
tools. What a real GPU would measure is not looked at."""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_ext
from cases import quantize
from conftest import _load
from paths import REPOSITORY, TESTS

BENCH = REPOSITORY / "bench"
sys.path.insert(0, str(BENCH))
L2 = 16384


class OnTheCpu(TorchFunctionMode):
    """What asks for the GPU gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def on_the_cpu(value):
            is_gpu = value == "cuda" if isinstance(value, str) else False
            is_gpu |= isinstance(value, torch.device) and value.type == "cuda"
            return "cpu" if is_gpu else value

        if function is not torch.device:
            args = tuple(map(on_the_cpu, args))
            kwargs = {key: on_the_cpu(value) for key, value in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


class Machine:
    """A host and a GPU, each with a clock in microseconds.

    The GPU runs what it is sent in order, and takes five times as long until it has been busy for
    90 ms. A launch reaches it 8 us after the host began it.
    """

    COST, LATENCY = 20.0, 8.0

    def __init__(self):
        self.host = self.device = self.busy = 0.0
        self.graph = None  # being captured
        self.spans = []  # (GPU's time at the first event, at the second)

    def rest(self):
        """The GPU is idle for long enough to lower its clocks."""
        self.host = self.device = max(self.host, self.device) + 1e6
        self.busy = 0.0

    def launch(self, us):
        self.host += self.LATENCY
        us *= 1 if self.busy >= 90e3 else 5
        self.device = max(self.device, self.host) + us
        self.busy += us

    def op(self):
        if self.graph is None:
            self.launch(self.COST)
        else:
            self.graph.cost += self.COST

    def sleep(self, cycles):
        self.host += self.LATENCY
        self.device = max(self.device, self.host) + cycles / 2000

    def clock_rate(self):
        return 1980 if self.busy >= 90e3 else 345

    @contextlib.contextmanager
    def capturing(self, graph):
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None

    def fakes(machine):
        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                machine.host += 1
                self.at = machine.device = max(machine.device, machine.host)

            def synchronize(self):
                machine.host = max(machine.host, self.at)

            def elapsed_time(self, end):
                machine.spans.append((self.at, end.at))
                return (end.at - self.at) / 1e3

        class Graph:
            cost = 0.0

            def replay(self):
                machine.launch(self.cost)

        stream = types.SimpleNamespace(wait_stream=lambda stream: None)
        properties = types.SimpleNamespace(L2_cache_size=L2)
        return {
            "is_available": lambda: True,
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": machine.capturing,
            "_sleep": machine.sleep,
            "clock_rate": machine.clock_rate,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "get_device_properties": lambda device: properties,
            "get_device_name": lambda: "a CPU",
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 0,
            "max_memory_allocated": lambda: 3 << 20,
        }


class Call:
    """One call of a contender: bytes by address of what it was given and of what it returned."""

    def __init__(self, captured):
        self.captured, self.touched, self.made = captured, {}, set()

    def saw(self, tensors, made=False):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0:  # no mean: all of them have address 0
                continue
            if made:
                self.made.add(storage.data_ptr())
            elif storage.data_ptr() not in self.made:
                self.touched[storage.data_ptr()] = storage.nbytes()

    def returned(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self.touched[storage.data_ptr()] = storage.nbytes()


def tensors_of(*trees):
    return [leaf for leaf in pytree.tree_leaves(trees) if torch.is_tensor(leaf)]


class Launches(TorchDispatchMode):
    """Each op is a launch on the machine; the call that made it learns its operands."""

    def __init__(self, machine):
        super().__init__()
        self.machine, self.call, self.scratch = machine, None, True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.machine.op()
        if self.call is not None:
            # A contender's own buffer, but where the dense weight is the result.
            own = [kwargs["out"]] if self.scratch and "out" in kwargs else []
            self.call.saw(own, made=True)
            self.call.saw(tensors_of(args, kwargs))
            self.call.saw(tensors_of(result), made=True)
        return result


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def faked(monkeypatch, module, machine):
    """The bench with small shapes, on the machine."""
    monkeypatch.setattr(module, "LAYERS", {"small": (64, 128)})
    monkeypatch.setattr(module, "FOCUS", ("small",))
    monkeypatch.setattr(module, "EXPERTS", {"few": (3, 64, 128, 2)}, raising=False)
    monkeypatch.setattr(module, "COPY_BYTES", 4096)
    monkeypatch.setattr(module, "MATMUL_SIZE", 32)
    clocks = types.SimpleNamespace(
        perf_counter=lambda: machine.host / 1e6, monotonic=time.monotonic
    )
    monkeypatch.setattr(module, "time", clocks)
    for name, fake in machine.fakes().items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # Its 4-bit calls have no CPU twin of these signatures here: contenders without it.
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def gpu(monkeypatch, machine):
    module = load("gpu")
    faked(monkeypatch, module, machine)
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    with OnTheCpu():
        module.main()


def bitsandbytes_of_ours():
    """bitsandbytes' functions as far as the bench calls them, by our CPU ops."""
    functional = types.ModuleType("bitsandbytes.functional")

    def quantize_4bit(A, blocksize, compress_statistics, quant_type):
        q = qlora_ext.quantize_4bit(A)
        return q.packed, q

    def dequantize_4bit(A, quant_state, out=None):
        if out is None:
            return qlora_ext.dequantize_4bit(quant_state, torch.bfloat16)
        torch.ops.qlora_ext.dequantize_4bit.out(*quant_state.op_args(), out=out)
        return out

    functional.quantize_4bit, functional.dequantize_4bit = quantize_4bit, dequantize_4bit
    package = types.ModuleType("bitsandbytes")
    package.functional = functional
    package.matmul_4bit = lambda x, packed_t, quant_state: x @ dequantize_4bit(None, quant_state).T
    return package


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """All of main() on the machine: what it wrote and printed, every contender's calls and costs.
    The GPU has rested before each case."""
    module, machine, out = load("gpu"), Machine(), tmp_path_factory.mktemp("bench")
    launches = Launches(machine)
    found = types.SimpleNamespace(out=out, calls={}, results={}, costs={}, module=module)
    real_compare, real_add = module.compare, module.Bench.add
    case = None

    def compare(contenders, copies, rounds, graphs=True):
        def followed(name, function):
            calls = found.calls.setdefault((*case, name), [])

            def call(i):
                launches.call = Call(machine.graph is not None)
                launches.scratch = case[0] != "dequantize"
                try:
                    result = function(i)
                finally:
                    made, launches.call = launches.call, None
                made.returned(tensors_of(result))
                if len(calls) < 3 * copies:
                    calls.append(made)
                return result

            return call

        machine.rest()
        if case is None:
            return real_compare(contenders, copies, rounds, graphs)
        found.results[case] = {n: pytree.tree_leaves(f(0)) for n, f in contenders.items()}
        for name, function in contenders.items():  # a call's true cost
            with machine.capturing(types.SimpleNamespace(cost=0.0)):
                function(0)
                found.costs[(*case, name)] = machine.graph.cost
        machine.rest()
        followed = {name: followed(name, function) for name, function in contenders.items()}
        return real_compare(followed, copies, rounds, graphs)

    def add(self, op, layer, *arguments, **settings):
        nonlocal case
        case = (op, arguments[1])
        real_add(self, op, layer, *arguments, **settings)

    with pytest.MonkeyPatch.context() as monkeypatch:
        faked(monkeypatch, module, machine)
        package = bitsandbytes_of_ours()
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", package.functional)
        monkeypatch.setattr(module, "compare", compare)
        monkeypatch.setattr(module.Bench, "add", add)
        printed = types.SimpleNamespace(text="")
        monkeypatch.setattr(
            module,
            "print",
            lambda *a, **k: setattr(printed, "text", printed.text + " ".join(map(str, a)) + "\n"),
            raising=False,
        )
        with launches:
            run(module, monkeypatch, out)
    found.printed = printed.text
    found.record = json.loads((out / "bench.json").read_text())
    found.rows = {(row["op"], row["M"]): row for row in found.record["rows"]}
    return found


def test_every_case_runs_is_printed_saved_and_plotted(dry_run):
    pytest.importorskip("matplotlib")
    rows = dry_run.rows
    assert {op for op, _ in rows} == {
        "dequantize",
        "quantize",
        "forward",
        "forward+LoRA",
        "backward+LoRA",
        "experts 3",
    }
    assert {M for op, M in rows if op == "forward"} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert {M for op, M in rows if op == "backward+LoRA"} == {512, 2048, 8192}
    for row in rows.values():
        assert row["us"]["ours"] > 0 and row["floor_us"] > 0 and row["failed"] == {}
        assert row["not_graphed"] == (list(row["us"]) if row["op"] == "quantize" else [])
        assert row["extra_bytes"] == 3 << 20 and row["missed"] == dry_run.module.missed(row)
    assert "TB/s" in dry_run.printed and dry_run.printed.count("of floor") == len(rows)
    names = ("forward", "forward_LoRA", "backward_LoRA")
    for name in names:
        assert (dry_run.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(dry_run.out.iterdir())) == 1 + len(names)


def test_rows_of_the_peers(dry_run):
    for M in (512, 2048, 8192):
        for op in ("forward+LoRA", "backward+LoRA"):
            assert {"unsloth chain", "bitsandbytes+LoRA"} <= dry_run.rows[op, M]["us"].keys()
    for M in (32, 1024):
        us = dry_run.rows["experts 3", M]["us"]
        others = {"a gemm_4bit each", "dequantize+_grouped_mm", "bf16 _grouped_mm"}
        assert us.keys() == {"ours", *others}


def test_contenders_compute_the_same(dry_run):
    """All but the bf16 weights, which are not quantized, and `dense bf16` without an adapter."""
    compared = 0
    for (op, _), results in dry_run.results.items():
        if op == "quantize":
            continue

        def tensors(name, results=results, op=op):
            found = [t.detach().double() for t in results[name] if t is not None]
            return [torch.cat(found)] if op.startswith("experts") else found

        want = tensors("ours")
        for name in results:
            if name == "ours" or (name == "dense bf16" and "LoRA" in op):
                continue
            for got, w in zip(tensors(name), want, strict=False):  # ours returns S as well
                tolerance = 0.25 if "bf16" in name else 0.02
                assert (got - w).norm() < tolerance * w.norm(), (op, name)
                compared += 1
    assert compared > 60


def test_what_is_timed_is_the_devices_time_at_full_clocks(dry_run):
    """Exactly the cost of a call: no launch latency, no call before the clocks were up."""
    for (op, M), row in dry_run.rows.items():
        for name, us in row["us"].items():
            if name in row["not_graphed"]:
                continue
            assert us == pytest.approx(dry_run.costs[op, M, name], abs=0.1 * us * 1e-3 + 0.01)
        assert row["sm_mhz"] == [1980, 1980]
    assert dry_run.record["sm_mhz"] == [1980, 1980]
    assert "SM clock 1980 to 1980 MHz" in dry_run.printed


def test_each_measurement_takes_two_milliseconds(dry_run):
    for row in dry_run.rows.values():
        assert row["window_ms"].keys() == row["us"].keys()
        assert min(row["window_ms"].values()) >= 2


def test_a_window_that_gets_too_short_is_measured_again(gpu, machine):
    machine.busy = 1e6
    cost = 300.0
    contender = gpu.Contender(lambda: machine.launch(cost))
    assert contender.window() >= 2
    cost = 3.0  # as if the clocks had risen
    assert contender.window() >= 2
    assert all(end - begin >= 2000 for begin, end in machine.spans[-1:])
    cost = 0.0
    machine.LATENCY = 0.0
    with pytest.raises(RuntimeError, match="no time passes"):
        while True:
            cost = 0.0
            contender.run = lambda: None
            contender.window()


def test_every_call_of_a_case_is_made_before_the_capture(dry_run):
    for (op, M, name), calls in dry_run.calls.items():
        if op != "quantize":
            copies = dry_run.rows[op, M]["copies"]
            assert [call.captured for call in calls] == [False] * copies + [True] * copies, name


def test_no_address_comes_round_before_three_times_l2(dry_run):
    """Bytes of other calls' tensors between two uses of any operand's or result's address."""
    for (op, M, name), calls in dry_run.calls.items():
        copies = dry_run.rows[op, M]["copies"]
        captured = [call for call in calls if call.captured]
        cycle = captured * 2 if captured else calls[copies:]
        assert len(cycle) == 2 * copies
        bytes_before = [0, *itertools.accumulate(sum(c.touched.values()) for c in cycle)]
        last, reused = {}, set()
        for k, call in enumerate(cycle):
            for address in call.touched:
                if address in last:
                    between = bytes_before[k] - bytes_before[last[address] + 1]
                    assert between >= 3 * L2, (op, M, name, between)
                    reused.add(address)
                last[address] = k
        weights = 0 if op == "quantize" or "bf16" in name else 3  # packed, scales, nested
        assert len(captured[0].touched if captured else cycle[0].touched) > weights, name
        assert reused or not captured


def test_what_cannot_be_captured_is_timed_as_a_loop(gpu, monkeypatch, machine):
    def refuse(graph):
        raise RuntimeError("quantize_4bit: the current stream is being captured")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    called = []

    def call(i):
        called.append(i)
        machine.launch(100.0)

    found = gpu.compare({"ours": call}, copies=3, rounds=2)
    assert found.not_graphed == ["ours"] and found.us["ours"] == pytest.approx(100, rel=0.01)
    assert called[:3] == [0, 1, 2] and called == [0, 1, 2] * (len(called) // 3)


def test_a_peer_that_fails_is_left_out_and_named(gpu, machine):
    def fails(i):
        raise NotImplementedError("no kernel\nfor this GPU")

    found = gpu.compare({"ours": lambda i: machine.op(), "peer": fails}, copies=2, rounds=2)
    assert found.us.keys() == {"ours"}
    assert found.failed == {"peer": "NotImplementedError: no kernel"}
    with pytest.raises(NotImplementedError):
        gpu.compare({"ours": fails}, copies=2, rounds=2)


def test_clocks_come_from_nvidia_smi_without_nvml(gpu, monkeypatch, tmp_path):
    def missing():
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "clock_rate", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.sm_clock() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/bash\necho 1755\necho 345\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu.sm_clock() == 1755


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


def test_predictions_of_this_gpu(gpu):
    """By the page that is committed."""
    of_device = gpu.page.of_device
    assert of_device("NVIDIA H200").keys() == of_device("NVIDIA A100-SXM4-80GB").keys()
    low, high = of_device("NVIDIA GeForce RTX 4090")["gemm_4bit", "8192x8192", "1"]
    assert 30 < low < high < 60
    low, high = of_device("NVIDIA H200")["dequantize_4bit", "4096x4096", "-"]
    assert 7 < low < high < 25
    assert of_device("NVIDIA H20") == of_device("NVIDIA GeForce RTX 3090") == {}


def test_measured_beside_predicted(gpu, monkeypatch, tmp_path, capsys):
    keys = {
        ("gemm_4bit", "64x128", "1"): (1.0, 1000.0),
        ("dequantize_4bit", "64x128", "-"): (0.5, 1.0),
        ("lora_backward", "64x128", "512"): (16.0, 32.0),
        ("grouped_gemm_4bit", "3x64x128", "16"): (1.0, 1000.0),
        ("gemm_4bit", "64x128", "3"): (1.0, 1000.0),  # not measured
    }
    monkeypatch.setattr(gpu.page, "of_device", lambda name: keys)
    monkeypatch.setattr(
        gpu,
        "compare",
        lambda contenders, *a, **k: gpu.Times(dict.fromkeys(contenders, 8.0), {}, [], {}, []),
    )
    run(gpu, monkeypatch, tmp_path)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    found = {(r["op"], r["M"]): r["predicted_us"] for r in rows if r["predicted_us"]}
    assert found == {
        ("forward", 1): [1.0, 1000.0],
        ("dequantize", 0): [0.5, 1.0],
        ("backward+LoRA", 512): [16.0, 32.0],
        ("experts 3", 32): [1.0, 1000.0],
    }
    printed = capsys.readouterr().out
    assert printed.count("predicted 1.0 to 1000.0 us: within\n") == 2
    assert printed.count("predicted 0.5 to 1.0 us: 8.00 of its high end\n") == 1
    assert printed.count("predicted 16.0 to 32.0 us: 0.50 of its low end\n") == 1
    assert (
        "of 4 predicted rows 2 are within the model's range; measured over its nearer end: "
        "0.50 to 8.00, median 1.00\n"
    ) in printed


def test_no_case_starts_after_the_time_is_up(gpu, monkeypatch, tmp_path):
    run(gpu, monkeypatch, tmp_path, "--seconds", "-1", "--quick")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == []


def test_without_a_gpu_it_is_one_sentence(tmp_path):
    command = [sys.executable, BENCH / "gpu.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    if not torch.cuda.is_available():
        assert done.returncode == 1 and done.stderr == "bench/gpu.py: torch sees no GPU\n"


# ---------------------------------------------------------------- first call


def live(monkeypatch, module, ops=None, why_not=None):
    info = {"cuda_live": why_not is None, "cuda_why_not": why_not}
    monkeypatch.setattr(qlora_ext, "build_info", lambda: info)
    if ops is not None:
        monkeypatch.setattr(module, "ops", ops)


@pytest.mark.parametrize("graph", [(), ("--in-a-graph",)], ids=["eager", "graph"])
def test_first_call(gpu, monkeypatch, capsys, graph):
    live(monkeypatch, gpu)
    run(gpu, monkeypatch, "--first-call", *graph)
    printed = capsys.readouterr().out
    assert printed.endswith("first call: right\n")
    for op in ("gemm_4bit", "gemm_4bit_backward"):
        for dtype in ("bfloat16", "float16"):
            assert f"{op}, M = 1, torch.{dtype}{', in a graph' if graph else ''}\n" in printed


@pytest.mark.parametrize("wrong", ["a bit", "nan", "dies"])
@pytest.mark.parametrize("op", ["gemm_4bit", "gemm_4bit_backward"])
def test_first_call_that_is_wrong_or_dies_ends_the_process(gpu, monkeypatch, op, wrong):
    real = torch.ops.qlora_ext

    def broken(*arguments):
        y = getattr(real, op)(*arguments).clone()
        if wrong == "dies":
            raise RuntimeError("CUDA error: an illegal instruction was encountered\nmore")
        y[0, 3] = float("nan") if wrong == "nan" else y[0, 3] + 0.1 * y.norm()
        return y

    broken.__name__ = op
    ops = {name: getattr(real, name) for name in ("gemm_4bit", "gemm_4bit_backward")}
    live(monkeypatch, gpu, types.SimpleNamespace(**{**ops, op: broken}))
    with pytest.raises(SystemExit) as ended:
        run(gpu, monkeypatch, "--first-call")
    says = "died: CUDA error: an illegal" if wrong == "dies" else "wrong: its distance from"
    assert f"first call: {op}, M = 1, torch.bfloat16: {says}" in ended.value.code


def test_first_call_without_the_cuda_library(gpu, monkeypatch):
    live(monkeypatch, gpu, why_not="torch is a CPU build")
    with pytest.raises(SystemExit, match="the CUDA library is not live: torch is a CPU build"):
        run(gpu, monkeypatch, "--first-call")


def test_first_call_launches_the_fused_kernels_with_nested_scales(gpu, monkeypatch):
    simt = _load("simt")
    live(monkeypatch, gpu, simt.ops)
    with simt.ops.device(90, 64):
        simt.ops.reset_launches()
        run(gpu, monkeypatch, "--first-call")
        launched = [name for name, n in simt.ops.kernels().items() if n]
    for kernel in ("gemm_4bit_fused", "gemm_4bit_backward_fused"):
        for dtype in ("bfloat16", "half"):
            assert any(
                name.startswith(f"{kernel}<") and dtype in name and name.endswith("true>")
                for name in launched
            ), (kernel, dtype, launched)


# ---------------------------------------------------------------- parity.py


@pytest.fixture
def parity(monkeypatch, machine):
    pytest.importorskip("transformers.generation.utils")  # takes torch.cuda.Stream for a type
    module = load("parity")
    for name, fake in machine.fakes().items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # A torch with CUDA asks the driver there whether it captures.
    name = "_accelerator_graph_capture_health_check"
    monkeypatch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
    monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(module, "LARGE", module.TINY)
    monkeypatch.setattr(module, "LARGE_SEQ", 128)
    monkeypatch.setattr(sys, "argv", ["parity.py"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def parity_run(module, capsys):
    with OnTheCpu(), pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code, capsys.readouterr().out


def on_the_gpu_side(monkeypatch, parity, change):
    """The GPU's model, after change(model)."""
    real = parity.build

    def build(dtype, device):
        model = real(dtype, device)
        if device == "cuda":
            change(model, dtype)
        return model

    monkeypatch.setattr(parity, "build", build)


def test_parity_of_two_equal_sides_and_memory_beside_the_estimate(parity, capsys):
    status, printed = parity_run(parity, capsys)
    assert status == 0 and "parity: within the bounds" in printed and "DIFFERS" not in printed
    for dtype in ("float32", "bfloat16"):
        assert len(re.findall(rf"^\| torch.{dtype} +\| +\d+ \| +(?:8|288) \|", printed, re.M)) == 4
        assert len(re.findall(rf"^\| torch.{dtype} +\| gradients", printed, re.M)) == 2
    rows = re.findall(r"^\| with(?:out)? checkpointing +\| +([\d.]+) \| +([\d.]+)", printed, re.M)
    assert [float(peak) for peak, _ in rows] == [3.0, 3.0] and all(float(e) > 0.1 for _, e in rows)
    assert float(rows[1][1]) < float(rows[0][1])


def test_parity_learns(parity, monkeypatch):
    monkeypatch.setattr(parity, "STEPS", 6)
    losses, _ = parity.train(parity.build(torch.float32, "cpu"), "cpu")
    assert losses[4] < losses[0] - 0.1 and losses[5] < losses[1] - 0.05


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1.001), (torch.bfloat16, 1.2)], ids=str)
def test_a_gradient_wrong_by_a_factor_breaks_parity(parity, monkeypatch, capsys, dtype, factor):
    def change(model, of):
        if of == dtype:
            named = dict(model.named_parameters())
            parameter = next(p for name, p in named.items() if "down_proj.lora_A" in name)
            parameter.register_hook(lambda gradient: gradient * factor)

    on_the_gpu_side(monkeypatch, parity, change)
    status, printed = parity_run(parity, capsys)
    assert status == 1 and "the two sides differ" in printed
    parted = re.findall(r"^\| (\S+) .*?(\S*) DIFFERS$", printed, re.M)
    assert {where for where, _ in parted} == {str(dtype)}
    assert any("down_proj.lora_A" in name for _, name in parted)


@pytest.mark.parametrize("what", ["nan", "a sign", "no step"])
def test_what_else_breaks_parity(parity, monkeypatch, capsys, what):
    def change(model, dtype):
        for name, parameter in model.named_parameters():
            if "o_proj.lora_B" in name and what == "nan":
                parameter.register_hook(lambda g: g * float("nan"))
            if "o_proj.lora_B" in name and what == "a sign":
                parameter.register_hook(lambda g: -g)
            if "lora_" in name and what == "no step":

                def undo(p):
                    p.data += parity.RATE * p.grad

                parameter.register_post_accumulate_grad_hook(undo)

    on_the_gpu_side(monkeypatch, parity, change)
    status, printed = parity_run(parity, capsys)
    assert status == 1
    if what == "no step":  # each gradient of the first step is right: the losses tell
        assert not re.search("gradients of the first step, 8 .*DIFFERS", printed)
        assert re.search(r"^\| torch.bfloat16 +\| +\d .*DIFFERS", printed, re.M)


# ---------------------------------------------------------------- gpu.sh


STEPS = ("build", "first_call", "capture", "parity", "tests", "bench")
CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")


def gpu_sh(folder, *, says="exit 0", sanitizer="", before=lambda out: None, edit=str):
    """Runs gpu.sh in a folder of its own with stand-ins for the tools: status, summary, calls.

    Args:
        says: what the stand-in for Python does after its own answers.
        sanitizer: what compute-sanitizer does; None: it is not there.
        before: is given OUT_DIR.
        edit: of the script's text.
    """
    (folder / "bench").mkdir(parents=True)
    (folder / "bin").mkdir()
    out = folder / "results" / "out"
    out.mkdir(parents=True)
    before(out)
    script = folder / "bench" / "gpu.sh"
    script.write_text(edit((BENCH / "gpu.sh").read_text()))

    def tool(name, text):
        path = folder / "bin" / name
        path.write_text("#!/bin/bash\n" + text + "\n")
        path.chmod(0o755)

    calls = folder / "calls"
    note_call = f"head -n 1 >> {shlex.quote(str(calls))}"
    python = f"""echo "$*" | {note_call}
folder={shlex.quote(str(folder))} out={shlex.quote(str(out))}
ls "$out" | wc -l >> "$folder/counts"
case "$*" in
  *get_device_capability*) echo 9.0a ;;
  *get_device_name*) echo nvidia-test ;;
  *sysconfig*) echo /usr/include/python3; [ -e "$folder/no_headers" ] && exit 1 ;;
  *parity.py*) echo "| step | loss |"; echo "a warning" ;;
  *"bench/gpu.py $out"*) echo '{{}}' > "$out/bench.json"
    touch "$out"/{{forward,forward_LoRA,backward_LoRA}}.png
    echo "5% of floor"; echo "SM clock 1755 to 1980 MHz" ;;
esac
{says}"""
    tool("python", python)
    tool("nvidia-smi", "echo a GPU")
    tool("nvcc", "echo release 13.0")
    if sanitizer is not None:
        note = f'echo "sanitizer $*" | {note_call}'
        help_text = '[ "$1" = --help ] && { echo "  --kernel-name arg"; exit; }'
        tool("compute-sanitizer", f"{help_text}\n{note}\n{sanitizer}")
    done = subprocess.run(
        ["bash", script, out],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{folder}/bin:/usr/bin:/bin", "PYTHON": "python"},
    )
    assert "Permission" not in done.stderr, done.stderr
    own = {folder / name for name in ("calls", "counts", "no_headers", "bench/gpu.sh")}
    outside = {p for p in folder.rglob("*") if p.is_file() and folder / "bin" not in p.parents}
    outside = {p for p in outside - own if out not in p.parents}
    assert not outside, outside
    assert max(map(int, (folder / "counts").read_text().split())) <= 8
    assert len(list(out.iterdir())) <= 8
    return done.returncode, (out / "summary.txt").read_text(), calls.read_text().splitlines()


def logs(folder):
    """The archive's files by name."""
    with tarfile.open(folder / "results" / "out" / "logs.tar.gz") as archive:
        return {name: archive.extractfile(name).read().decode() for name in archive.getnames()}


def test_gpu_sh_does_every_step(tmp_path):
    status, summary, calls = gpu_sh(tmp_path)
    assert status == 0, summary
    for name in (*STEPS, *CHECKS):
        assert re.search(rf"^ok +{name}\b", summary, re.M), summary
    assert "5% of floor" in summary and "SM clock 1755 to 1980 MHz" in summary
    assert "cp OUT_DIR/bench.json bench/results/nvidia-test-" in summary
    order = [
        next(i for i, call in enumerate(calls) if wanted in call)
        for wanted in (
            "setup.py build_ext --inplace",
            "bench/gpu.py --first-call",
            "bench/gpu.py --first-call --in-a-graph",
            "bench/parity.py",
            "pytest",
            "sanitizer --tool",
            "bench/gpu.py /",
        )
    ]
    assert order == sorted(order)
    checks = [call for call in calls if call.startswith("sanitizer --tool")]
    assert len(checks) == 4
    # initcheck has to see what torch's kernels write.
    assert [c.split()[2] for c in checks if "kns=qlora_ext" not in c] == ["initcheck"]


def test_gpu_sh_leaves_an_archive_the_summary_the_figures_and_the_plots(tmp_path):
    def before(out):  # an earlier run's
        (out / "bench.json").write_text("old")
        (out / "logs.tar").write_text("old")
        (out / "parity.log").write_text("old")

    gpu_sh(tmp_path, before=before)
    plots = {"forward.png", "forward_LoRA.png", "backward_LoRA.png"}
    files = {"summary.txt", "bench.json", "logs.tar.gz", *plots}
    assert {p.name for p in (tmp_path / "results" / "out").iterdir()} == files
    found = logs(tmp_path)
    assert found.keys() == {f"{name}.log" for name in (*STEPS, *CHECKS)}
    assert "a warning" in found["parity.log"] and "old" not in found["parity.log"]


def test_the_first_table_is_parity(tmp_path):
    _, summary, _ = gpu_sh(tmp_path)
    tables = [line.strip() for line in summary.splitlines() if re.match(r" +(\||.*of floor)", line)]
    assert tables == ["| step | loss |", "5% of floor"] and "a warning" not in summary


@pytest.mark.parametrize(
    "death, line",
    [
        ("kill -ILL $$", "ended by signal ILL"),
        ("kill -SEGV $$", "ended by signal SEGV"),
        ('echo "gemm_4bit, M = 1: wrong: its distance"; exit 1', "status 1"),
    ],
    ids=["illegal", "segv", "wrong"],
)
def test_gpu_sh_stops_when_the_first_call_dies(tmp_path, death, line):
    says = f'[[ "$*" == *--first-call* ]] && {{ echo "first call: gemm_4bit"; {death}; }}; exit 0'
    status, summary, calls = gpu_sh(tmp_path, says=says)
    assert status == 1
    assert re.search(rf"^FAILED  first_call, {line} ", summary, re.M), summary
    assert re.search(r"^STOPPED the first tiny call .* nothing else is run", summary, re.M)
    assert "first call: gemm_4bit" in summary
    after = [call for call in calls if "first-call" in call or "setup.py" in call]
    assert calls[-1] == after[-1] == "bench/gpu.py --first-call" and len(after) == 2
    assert logs(tmp_path).keys() == {"build.log", "first_call.log"}


def test_gpu_sh_goes_on_when_a_first_call_inside_a_capture_fails(tmp_path):
    status, summary, calls = gpu_sh(tmp_path, says='[[ "$*" == *in-a-graph* ]] && exit 1; exit 0')
    assert status == 1 and "FAILED  capture, status 1" in summary
    assert any("pytest" in call for call in calls)


def test_gpu_sh_without_python_h_says_so_and_builds_nothing(tmp_path):
    status, summary, calls = gpu_sh(
        tmp_path, before=lambda out: tmp_path.joinpath("no_headers").touch()
    )
    assert status == 1 and "no Python.h in /usr/include/python3" in summary
    assert "install the headers" in summary and not any("setup.py" in call for call in calls)


TIMED_OUT = """echo "========= COMPUTE-SANITIZER"; echo "case 3 of 8, torch.float16"
{finding}
echo "========= Error: process didn't terminate successfully"
echo "========= Target application returned an error"
echo "========= ERROR SUMMARY: 0 errors"
{end}"""


def short_limit(text):
    assert "check_limit=75" in text and "--kill-after=10" in text
    return text.replace("check_limit=75", "check_limit=1").replace("after=10", "after=1")


@pytest.mark.parametrize("end", ["sleep 30", "trap '' TERM; while :; do sleep 0.1; done"])
def test_a_sanitizer_that_runs_out_of_time_is_neither_a_finding_nor_ok(tmp_path, end):
    """The second ignores the first signal: `timeout` kills it and reports another status."""
    says = TIMED_OUT.format(finding="", end=end)
    status, summary, _ = gpu_sh(tmp_path, sanitizer=says, edit=short_limit)
    for tool in CHECKS:
        line = rf"^TIME    {tool} ran out of its 1 s, nothing found so far \(in case 3 of 8, "
        assert re.search(line, summary, re.M), summary
        assert not re.search(rf"^(FAILED|ok) +{tool}", summary, re.M)
    assert status == 0


def test_a_sanitizer_killed_before_its_time_is_up_has_failed(tmp_path):
    says = TIMED_OUT.format(finding="", end="kill -KILL $$")
    status, summary, _ = gpu_sh(tmp_path, sanitizer=says)
    assert status == 1 and summary.count("check, ended by signal KILL") == 4


def test_a_finding_before_the_time_is_up_is_a_finding(tmp_path):
    finding = 'echo "========= Invalid __global__ read of size 16 bytes"'
    says = TIMED_OUT.format(finding=finding, end="sleep 30")
    status, summary, _ = gpu_sh(tmp_path, sanitizer=says, edit=short_limit)
    assert status == 1 and len(re.findall(r"^FAILED  \w+check, ran past", summary, re.M)) == 4
    assert summary.count("Invalid __global__ read") == 4 and "TIME" not in summary


def test_a_sanitizer_that_cannot_run_shows_why(tmp_path):
    status, summary, _ = gpu_sh(tmp_path, sanitizer='echo "no such device"; exit 3')
    assert status == 1 and "FAILED  memcheck, status 3:" in summary and "no such device" in summary


def test_gpu_sh_shows_what_ptxas_serialized(tmp_path):
    says = (
        '[[ "$*" == *setup.py* ]] && echo "info (C7510): wgmma is serialized in function f"; exit 0'
    )
    status, summary, _ = gpu_sh(tmp_path, says=says)
    assert status == 0 and summary.count("C7510") == 1


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
        cwd=TESTS,
    ).stdout
    for name in ("test_a_graph_replays_a_step[cuda-1]", "test_the_current_stream_is_used[cuda]"):
        assert name in listed
    assert "test_ops.py" in listed and "[simt" not in listed and "[cpu" not in listed


def test_gpu_sh_goes_on_after_a_failed_step_but_not_after_a_failed_build(tmp_path):
    failing_tests = '[[ "$*" == *pytest* ]] && { echo "1 failed"; exit 1; }; exit 0'
    first, second = tmp_path / "a", tmp_path / "b"
    status, summary, calls = gpu_sh(first, says=failing_tests, sanitizer=None)
    assert status == 1 and "FAILED  tests, status 1" in summary and "1 failed" in summary
    assert any(call.startswith("bench/gpu.py /") for call in calls)
    status, summary, calls = gpu_sh(second, says='[[ "$*" == *setup.py* ]] && exit 1; exit 0')
    assert status == 1 and not any(call.startswith("bench/gpu.py") for call in calls)


def test_gpu_sh_ends_well_within_nine_minutes():
    text = (BENCH / "gpu.sh").read_text()
    limits = [int(n) for n in re.findall(r"^step \w+ (\d+) ", text, re.M)]
    (sanitizers,) = re.findall(r"^ *check_limit=(\d+)$", text, re.M)
    assert len(limits) == len(STEPS) and sum(limits) + int(sanitizers) <= 490
    assert f"{sum(limits) + int(sanitizers)} seconds in all" in text
    (seconds,) = re.findall(r"^step bench (\d+) .* --seconds (\d+)", text, re.M)
    assert int(seconds[1]) < int(seconds[0]) - 20  # for the last case and the plots
