"""The CUDA backend against bitsandbytes, dequantize + cuBLAS, dense bf16, unfused LoRA chains (ours
and unsloth's) and torch._grouped_mm.

    python bench/gpu.py OUT_DIR [--seconds 240] [--quick]
    python bench/gpu.py --first-call [--in-a-graph]  # tiny M = 1 products, their results checked
    python bench/gpu.py --touch-every-op             # a few small calls, for compute-sanitizer

How a figure is made:

- Every contender calls its function on `copies` sets of tensors in turn: weights, x, dY, A, B and
  outputs. More than three times L2 passes between two uses of one address. What a contender keeps
  for itself, such as the buffer it dequantizes into, it may find in L2: it would in training too.
- Each function is called once for every set. Then the calls are captured as one CUDA graph, the
  results kept alive so that each has its own memory. A contender that refuses capture is timed as
  a plain loop and marked with *. One that fails is left out, and the row says why.
- Before each case the GPU works for 100 ms, so that its clocks are up. bench.json has the SM clock
  of each case, after that work and after the last round.
- Contenders take turns, round after round. A measurement is as many replays between two events as
  take 2 ms or more, and the GPU sleeps before the first event while the host queues them: so
  launches from an idle GPU are not counted. Figures are medians, in microseconds per call.

- If docs/generated/kernel_model.md predicts a row on this GPU, the line after it says how ours
  compares, and the last lines sum that up: correct the model where it is wrong.

`floor` is the bytes that must move over this run's own copy bandwidth, or the flops over this run's
own matmul rate, the larger of the two. Prints a table; writes OUT_DIR/bench.json, and plots if
matplotlib is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from predict import page

import qlora_ext

ops = torch.ops.qlora_ext
BF16 = torch.bfloat16
SCALING, RANK = 2.0, 16
PACKED = 0.516  # bytes per weight: 4.127 bits

# (out_features N, in_features K) of real layers.
LAYERS = {
    "Llama-7B mlp down": (4096, 11008),
    "Llama-8B q": (4096, 4096),
    "Llama-8B kv": (1024, 4096),
    "Llama-8B mlp up": (14336, 4096),
    "Llama-8B mlp down": (4096, 14336),
    "Llama-70B q": (8192, 8192),
    "Llama-70B mlp up": (28672, 8192),
    "Qwen2.5-7B mlp up": (18944, 3584),
}
FOCUS = ("Llama-8B mlp up", "Llama-70B q", "Llama-8B q")  # the targets' shapes, measured first
# (experts E, N, K, experts per token) of real mixtures.
EXPERTS = {
    "Mixtral-8x7B gate": (8, 14336, 4096, 2),
    "Qwen3-30B-A3B gate and up": (128, 1536, 2048, 8),
}
COPY_BYTES, MATMUL_SIZE = 1 << 30, 8192  # sizes for measuring this run's own ceilings

WINDOW_MS = 2.0  # the least time between two events
SPIN_UP_MS = 100.0  # milliseconds of work before each case
CYCLES_PER_S = 2.0e9  # for torch.cuda._sleep: near the highest clock, so it sleeps long enough
LONGEST_HEAD_START = 10e-3  # seconds

Function = Callable[[int], object]


# ---------------------------------------------------------------- timing


class Contender:
    """A function to time; `run` does `copies` calls."""

    def __init__(self, run: Callable[[], object]):
        self.run = run
        self.repeats = 1  # how many runs between two events
        self.head_start = 1e-3  # seconds that the device sleeps while the host queues them

    def once(self) -> float:
        """Milliseconds that `repeats` runs take on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(self.head_start * CYCLES_PER_S))
        start = time.perf_counter()
        begin.record()
        for _ in range(self.repeats):
            self.run()
        end.record()
        queued = time.perf_counter() - start
        end.synchronize()
        self.head_start = min(max(self.head_start, 1.5 * queued + 1e-4), LONGEST_HEAD_START)
        return begin.elapsed_time(end)

    def window(self) -> float:
        """As once(), but raises `repeats` until a measurement takes WINDOW_MS or more."""
        while (ms := self.once()) < WINDOW_MS:
            growth = 1.25 * WINDOW_MS / ms if ms > 0 else 100
            self.repeats = math.ceil(self.repeats * min(max(growth, 1.25), 100))
            if self.repeats > 1 << 20:
                raise RuntimeError("bench/gpu.py: no time passes between two events")
        return ms


def capture(function: Function, copies: int):
    """A replayable graph of `copies` calls, or None if something in it refuses capture.

    Every call is made once before, because it may compile, load a module or ask for a workspace,
    which a capture would record or refuse. Results stay alive, so that each has its own memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            function(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    try:
        with torch.cuda.graph(graph):
            for i in range(copies):
                kept.append(function(i))
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph


def loop(function: Function, copies: int) -> Callable[[], None]:
    """A function that makes `copies` calls. A result is freed when the next turn replaces it."""
    kept: list[object] = [None] * copies

    def run():
        for i in range(copies):
            kept[i] = function(i)

    return run


def sm_clock() -> int | None:
    """The SMs' clock now in MHz; None if neither NVML for Python nor nvidia-smi gives it."""
    try:
        return int(torch.cuda.clock_rate())
    except Exception:  # its errors depend on what is missing
        pass
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def spin_up(contenders: list[Contender]) -> int | None:
    """Keeps the GPU busy for SPIN_UP_MS with the case's own work. Returns the clock it then has."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    while True:
        for contender in contenders:
            contender.run()
        end.record()
        end.synchronize()
        if begin.elapsed_time(end) >= SPIN_UP_MS:
            break
    for contender in contenders:  # so that the clock is read while the device works
        contender.run()
    clock = sm_clock()
    torch.cuda.synchronize()
    return clock


@dataclasses.dataclass
class Times:
    """The results of compare(), by contender's name."""

    us: dict[str, float]  # per call
    window_ms: dict[str, float]  # of the shortest measurement
    not_graphed: list[str]
    failed: dict[str, str]  # name -> error
    sm_mhz: list[int | None]  # after the spin-up, after the last round


def compare(contenders: dict[str, Function], copies: int, rounds: int, graphs=True) -> Times:
    """Times each contender. The figures are medians over interleaved rounds."""
    runs: dict[str, Contender] = {}
    marked, failed = [], {}
    for name, function in contenders.items():
        try:
            graph = capture(function, copies) if graphs else None
            if graph is None:
                marked.append(name)
                run = loop(function, copies)
                run()
            else:
                run = graph.replay
        except Exception as error:
            if name == "ours":
                raise
            lines = str(error).splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[0]}"
            continue
        runs[name] = Contender(run)
    clocks = [spin_up(list(runs.values()))]
    for contender in runs.values():
        contender.window()  # finds repeats and head start
    times: dict[str, list[float]] = {name: [] for name in runs}
    shortest = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, contender in runs.items():
            ms = contender.window()
            shortest[name] = min(shortest[name], ms)
            times[name].append(ms * 1e3 / (contender.repeats * copies))
    clocks.append(sm_clock())
    marked = [name for name in marked if name in runs]
    us = {name: statistics.median(t) for name, t in times.items()}
    return Times(us, shortest, marked, failed, clocks)


def extra_bytes(function: Function) -> int:
    """The most memory that a call uses besides its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = function(0)  # noqa: F841 (alive until the difference is taken)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


# ---------------------------------------------------------------- targets


def missed(row: dict) -> list[str]:
    """One message for each target that a row misses. The targets are this project's own. Forward
    with M = 512 may take 1.65x of plain bf16 until there is a wgmma kernel."""
    us, op, M = row["us"], row["op"], row["M"]
    speed = {name: t / us["ours"] for name, t in us.items()}  # how many times faster ours is
    two_passes = [n for n in ("bitsandbytes", "dequantize+cuBLAS") if n in us]
    wanted: list[tuple[str, float]] = []  # (contender, least speed)
    if op == "dequantize":
        wanted = [("bitsandbytes", 1.3)]
    elif op == "quantize":
        wanted = [("bitsandbytes", 2.0)]
    elif op == "forward" and M <= 16:
        wanted = [("bitsandbytes", 1.2), ("dense bf16", 2.2)]
    elif op == "forward" and 32 <= M <= 256:
        wanted = [(name, 1.0) for name in two_passes]
    elif op == "forward+LoRA" and M in (512, 2048, 8192):
        peer, dense = {512: (1.5, 1.65), 2048: (1.25, 1.15), 8192: (1.1, 1.08)}[M]
        wanted = [("bitsandbytes+LoRA", peer), ("dense bf16", 1 / dense)]
    elif op == "backward+LoRA" and M in (512, 2048, 8192):
        wanted = [("bitsandbytes+LoRA", {512: 1.4, 2048: 1.2, 8192: 1.1}[M])]
    sentences = [
        f"{speed[name]:.2f}x {name}, want {least:.2f}x"
        for name, least in wanted
        if name in us and speed[name] < least
    ]
    if op == "dequantize" and row["floor_us"] / us["ours"] < 0.8:
        sentences.append(f"{row['floor_us'] / us['ours']:.0%} of the copy's bandwidth, want 80%")
    return sentences


def distance(us: float, predicted: tuple[float, float]) -> float:
    """Measured over the nearer end of the predicted range; 1 within it."""
    low, high = predicted
    return us / low if us < low else us / high if us > high else 1.0


def beside_prediction(us: float, predicted: tuple[float, float]) -> str:
    away = distance(us, predicted)
    where = "within" if away == 1 else f"{away:.2f} of {'its low' if away < 1 else 'its high'} end"
    return f"predicted {predicted[0]:.1f} to {predicted[1]:.1f} us: {where}"


class Bench:
    def __init__(self, out: Path | None, seconds: float, rounds: int):
        self.out, self.deadline, self.rounds = out, time.monotonic() + seconds, rounds
        self.rows: list[dict] = []
        self.clocks: list[int] = []
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.copy, self.matmul = self.ceilings()
        try:
            import bitsandbytes.functional as bnb
        except Exception:  # it is missing, or built for another CUDA
            bnb = None
        self.bnb = bnb
        self.predictions = page.of_device(torch.cuda.get_device_name())

    def ceilings(self):
        """Bytes per second of a device copy (read plus written), and flops of a bf16 matmul."""
        n = MATMUL_SIZE
        a = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        x, w = (torch.randn(n, n, device="cuda", dtype=BF16) for _ in range(2))
        found = compare({"copy": lambda i: b.copy_(a), "matmul": lambda i: x @ w}, 2, 9)
        self.clocks += [mhz for mhz in found.sm_mhz if mhz]
        return 2 * a.numel() / found.us["copy"] * 1e6, 2 * n**3 / found.us["matmul"] * 1e6

    def floor(self, moved: float, flops: float = 0.0) -> float:
        return 1e6 * max(moved / self.copy, flops / self.matmul)

    def copies(self, moved: float) -> int:
        """How many sets of tensors to use, if each call moves at least `moved` bytes: without one
        of them, the others still exceed three times L2."""
        return 1 + math.ceil(3 * self.l2 / moved)

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, op, layer, shape, M, floor, contenders, copies, graphs=True, predicted_as=None):
        """predicted_as: (op, shape, rows or "-") of the model's row for ours."""
        if self.is_over():
            return
        found = compare(contenders, copies, self.rounds, graphs)
        times, marked = found.us, found.not_graphed
        row = {"op": op, "layer": layer, "N": shape[0], "K": shape[1], "M": M}
        row["floor_us"] = round(floor, 2)
        row["us"] = {name: round(t, 2) for name, t in times.items()}
        row["not_graphed"], row["failed"] = marked, found.failed
        row["copies"] = copies
        row["window_ms"] = {name: round(ms, 3) for name, ms in found.window_ms.items()}
        row["sm_mhz"] = found.sm_mhz
        self.clocks += [mhz for mhz in found.sm_mhz if mhz]
        row["extra_bytes"] = extra_bytes(contenders["ours"])
        row["predicted_us"] = self.predictions.get(predicted_as)
        row["missed"] = missed(row)
        self.rows.append(row)
        ours = times["ours"]
        against = "  ".join(
            f"{n}{'*' if n in marked else ''} {t:.1f} ({t / ours:.2f}x)"
            for n, t in times.items()
            if n != "ours"
        )
        print(
            f"{op:16s} {layer:18s} M={M:<5d} ours{'*' if 'ours' in marked else ''} {ours:9.1f} us  "
            f"{floor / ours:4.0%} of floor  {against}  extra {row['extra_bytes'] / 2**20:.1f} MiB",
            flush=True,
        )
        for name, why in found.failed.items():
            print(f"    LEFT OUT {name}: {why}", flush=True)
        if row["predicted_us"]:
            print(f"    {beside_prediction(ours, row['predicted_us'])}", flush=True)
        for target in row["missed"]:
            print(f"    MISSED {target}", flush=True)
        if self.out:
            self.save()

    def predicted_range(self) -> str:
        rows = [r for r in self.rows if r["predicted_us"]]
        if not rows:
            return "the model has no row for this GPU"
        away = sorted(distance(r["us"]["ours"], r["predicted_us"]) for r in rows)
        within = sum(d == 1 for d in away)
        return (
            f"of {len(rows)} predicted rows {within} are within the model's range; measured over "
            f"its nearer end: {away[0]:.2f} to {away[-1]:.2f}, median {statistics.median(away):.2f}"
        )

    def clock_range(self) -> str:
        if not self.clocks:
            return "SM clock unknown: neither NVML for Python nor nvidia-smi reports it"
        return f"SM clock {min(self.clocks)} to {max(self.clocks)} MHz while measuring"

    def save(self):
        record = {
            "gpu": torch.cuda.get_device_name(),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "copy_bytes_per_s": self.copy,
            "matmul_flops": self.matmul,
            "sm_mhz": [min(self.clocks), max(self.clocks)] if self.clocks else None,
            "bitsandbytes": self.bnb is not None,
            "build": {k: str(v) for k, v in qlora_ext.build_info().items()},
            "rows": self.rows,
        }
        (self.out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")


# ---------------------------------------------------------------- cases


def several(count: int, *shape: int, dtype=BF16, factor: float = 1.0) -> list[torch.Tensor]:
    """`count` random tensors, one for each call, so that addresses repeat only after `count`."""
    return [torch.randn(*shape, device="cuda", dtype=dtype) * factor for _ in range(count)]


def packed(dense: torch.Tensor, count: int) -> list[tuple]:
    """`count` copies of the packed weight, as op arguments."""
    args = qlora_ext.quantize_4bit(dense).op_args()
    return [tuple(t.clone() if torch.is_tensor(t) else t for t in args) for _ in range(count)]


def stacked(weights: list[tuple]) -> tuple:
    """The op arguments of a stack of experts, from those of each."""
    parts = [None if t[0] is None else torch.stack(t) for t in zip(*(w[:4] for w in weights))]
    return (*parts, [len(weights), *weights[0][4]], *weights[0][5:])


class Weights:
    """Copies of one layer's weight, in each contender's form."""

    def __init__(self, bench: Bench, layer: str):
        N, K = self.shape = LAYERS[layer]
        self.N, self.K, self.count = N, K, bench.copies(N * K * PACKED)
        dense = torch.randn(N, K, device="cuda", dtype=BF16) * 0.02
        self.ours = packed(dense, self.count)
        self.dense = [dense.clone() for _ in range(self.count)]
        self.buffer = torch.empty_like(dense)  # unsloth's chain dequantizes every layer into it
        self.bnb, self.peer = bench.bnb, None
        if bench.bnb is not None:
            self.peer = [
                bench.bnb.quantize_4bit(
                    dense, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                for _ in range(self.count)
            ]

    def into_buffer(self, i: int) -> torch.Tensor:
        """The weight, dequantized into the buffer by bitsandbytes if installed, else by our op."""
        if self.peer:
            weight, state = self.peer[i]
            self.bnb.dequantize_4bit(weight, state, out=self.buffer)
        else:
            ops.dequantize_4bit.out(*self.ours[i], out=self.buffer)
        return self.buffer

    @property
    def unsloth(self) -> str:
        return "unsloth chain" if self.peer else "unsloth chain, our dequantize"


def quantizers(bench: Bench, layer: str, w: Weights):
    moved = w.N * w.K * (2 + PACKED)
    copies = bench.copies(moved)
    outs = [torch.empty(w.N, w.K, device="cuda", dtype=BF16) for _ in range(copies)]
    contenders = {"ours": lambda i: ops.dequantize_4bit.out(*w.ours[i], out=outs[i])}
    if w.peer:
        contenders["bitsandbytes"] = lambda i: bench.bnb.dequantize_4bit(*w.peer[i], out=outs[i])
    floor, key = bench.floor(moved), ("dequantize_4bit", f"{w.N}x{w.K}", "-")
    bench.add("dequantize", layer, w.shape, 0, floor, contenders, copies, predicted_as=key)

    def quantize(i):
        found = ops.quantize_4bit(w.dense[i], 64, "nf4", None, "absmax", 3.0, "none", 1.0)
        return found, ops.quantize_absmax(found[1])

    contenders = {"ours": quantize}
    if bench.bnb is not None:
        contenders["bitsandbytes"] = lambda i: bench.bnb.quantize_4bit(
            w.dense[i], blocksize=64, compress_statistics=True, quant_type="nf4"
        )
    # Not in a graph, because the quantizer reads its NaN flag back.
    floor = bench.floor(moved)
    bench.add("quantize", layer, w.shape, 0, floor, contenders, copies, graphs=False)


def forward(bench: Bench, w: Weights, layer: str, M: int):
    moved = w.N * w.K * PACKED + 2 * M * (w.K + w.N)
    copies = bench.copies(moved)
    x = several(copies, M, w.K)
    contenders = {
        "ours": lambda i: ops.gemm_4bit(x[i], *w.ours[i]),
        "dense bf16": lambda i: F.linear(x[i], w.dense[i]),
        "dequantize+cuBLAS": lambda i: F.linear(x[i], ops.dequantize_4bit(*w.ours[i], BF16)),
    }
    if w.peer:
        import bitsandbytes

        contenders["bitsandbytes"] = lambda i: bitsandbytes.matmul_4bit(
            x[i], w.peer[i][0].t(), quant_state=w.peer[i][1]
        )
    floor, key = bench.floor(moved, 2 * M * w.N * w.K), ("gemm_4bit", f"{w.N}x{w.K}", str(M))
    bench.add("forward", layer, w.shape, M, floor, contenders, copies, predicted_as=key)


def lora(bench: Bench, w: Weights, layer: str, M: int):
    """Forward with a bypass of rank 16, and the whole backward: dX, dA, dB.

    The peers get A and B in bf16, so they need not cast a trainer's fp32 adapters.
    """
    moved = w.N * w.K * PACKED + 2 * M * (w.K + w.N)
    copies = bench.copies(moved)
    x, dY = several(copies, M, w.K), several(copies, M, w.N)
    A = several(copies, RANK, w.K, dtype=torch.float32, factor=0.01)
    B = several(copies, w.N, RANK, dtype=torch.float32, factor=0.01)
    A16, B16 = ([t.to(BF16) for t in ts] for ts in (A, B))
    S = [
        ops.lora_gemm_4bit(x[i], *w.ours[i], A[i], B[i], SCALING)[1].clone() for i in range(copies)
    ]

    def unfused(i, base):
        return base + SCALING * ((x[i] @ A16[i].T) @ B16[i].T)

    def unsloth(i):
        """unsloth's matmul_lora: it dequantizes W into a buffer that all layers share, computes
        y = x W^T, and adds (x A^T)(s B^T) in place."""
        y = x[i] @ w.into_buffer(i).t()
        return y.addmm_(x[i] @ A16[i].t(), B16[i].t(), alpha=SCALING)

    contenders = {
        "ours": lambda i: ops.lora_gemm_4bit(x[i], *w.ours[i], A[i], B[i], SCALING),
        "dense bf16": lambda i: F.linear(x[i], w.dense[i]),
        "dense bf16+LoRA": lambda i: unfused(i, F.linear(x[i], w.dense[i])),
        "dequantize+cuBLAS+LoRA": lambda i: unfused(
            i, F.linear(x[i], ops.dequantize_4bit(*w.ours[i], BF16))
        ),
        w.unsloth: unsloth,
    }
    if w.peer:
        import bitsandbytes

        contenders["bitsandbytes+LoRA"] = lambda i: unfused(
            i, bitsandbytes.matmul_4bit(x[i], w.peer[i][0].t(), quant_state=w.peer[i][1])
        )
    flops = 2 * M * w.N * w.K + 2 * M * RANK * (w.N + w.K)
    floor = bench.floor(moved, flops)
    key = ("lora_gemm_4bit", f"{w.N}x{w.K}", str(M))
    bench.add("forward+LoRA", layer, w.shape, M, floor, contenders, copies, predicted_as=key)

    def unfused_backward(i, weight):
        dS = SCALING * (dY[i] @ B16[i])
        dB = dY[i].T @ (SCALING * (x[i] @ A16[i].T))
        return dY[i] @ weight + dS @ A16[i], dS.T @ x[i], dB

    def unsloth_backward(i):
        """The backward of the same chain: dA = s (dY B)^T x, dB = s dY^T (x A^T), and
        dX = dY W with s (dY B) A added in place. dY B is computed once."""
        dYB = dY[i] @ B16[i]
        dA, dB = torch.empty_like(A16[i]), torch.empty_like(B16[i])
        dA.addmm_(dYB.t(), x[i], alpha=SCALING, beta=0)
        dB.addmm_(dY[i].t(), x[i] @ A16[i].t(), alpha=SCALING, beta=0)
        dX = dY[i] @ w.into_buffer(i)
        return dX.addmm_(dYB, A16[i], alpha=SCALING), dA, dB

    contenders = {
        "ours": lambda i: ops.lora_gemm_4bit_backward(
            dY[i], x[i], S[i], *w.ours[i], A[i], B[i], SCALING, True
        ),
        "dense bf16+LoRA": lambda i: unfused_backward(i, w.dense[i]),
        "dequantize+cuBLAS+LoRA": lambda i: unfused_backward(
            i, ops.dequantize_4bit(*w.ours[i], BF16)
        ),
        w.unsloth: unsloth_backward,
    }
    if w.peer:
        contenders["bitsandbytes+LoRA"] = lambda i: unfused_backward(
            i, bench.bnb.dequantize_4bit(*w.peer[i])
        )
    floor = bench.floor(moved, 2 * flops)
    key = ("lora_backward", f"{w.N}x{w.K}", str(M))
    bench.add("backward+LoRA", layer, w.shape, M, floor, contenders, copies, predicted_as=key)


def experts(bench: Bench, layer: str, tokens: int):
    """A mixture's product with tokens sent to random experts. The others are one gemm_4bit for each
    expert, and torch._grouped_mm over the dequantized experts and over a bf16 stack."""
    E, N, K, top_k = EXPERTS[layer]
    M = tokens * top_k
    chosen = torch.randint(E, (M,), generator=torch.Generator().manual_seed(0))
    rows = torch.bincount(chosen, minlength=E)
    sizes, used = rows.tolist(), int((rows > 0).sum())
    moved = used * N * K * PACKED + 2 * M * (K + N)
    copies = bench.copies(moved)
    x = several(copies, M, K)
    ends = [rows.cumsum(0).to("cuda", torch.int32) for _ in range(copies)]
    dense = several(copies, E, N, K, factor=0.02)
    weights = [[packed(weight, 1)[0] for weight in stack] for stack in dense]
    stacks = [stacked(of_experts) for of_experts in weights]
    buffer = torch.empty_like(dense[0])
    slots = list(buffer)

    def one_by_one(i):
        parts = zip(x[i].split(sizes), weights[i], strict=True)
        return [ops.gemm_4bit(part, *weight) for part, weight in parts if len(part)]

    def dequantized(i):
        for out, weight in zip(slots, weights[i], strict=True):
            ops.dequantize_4bit.out(*weight, out=out)
        return torch._grouped_mm(x[i], buffer.mT, offs=ends[i])

    contenders = {
        "ours": lambda i: ops.grouped_gemm_4bit(x[i], *stacks[i], ends[i]),
        "a gemm_4bit each": one_by_one,
        "dequantize+_grouped_mm": dequantized,
        "bf16 _grouped_mm": lambda i: torch._grouped_mm(x[i], dense[i].mT, offs=ends[i]),
    }
    floor = bench.floor(moved, 2 * M * N * K)
    key = ("grouped_gemm_4bit", f"{E}x{N}x{K}", str(tokens))
    bench.add(f"experts {E}", layer, (N, K), M, floor, contenders, copies, predicted_as=key)


# ---------------------------------------------------------------- first call


def first_call(in_a_graph: bool) -> None:
    """Runs the smallest products that reach the fused kernels: M = 1, nested scales, forward and
    backward, bf16 and fp16. Exits with a message if the CUDA library is not loaded, a call fails or
    a result is wrong. It prints each call's name before it makes the call.

    in_a_graph: make the first call of each op in this process while a graph is captured.
    """
    info = qlora_ext.build_info()
    print(*(f"{key}: {value}" for key, value in info.items()), sep="\n", flush=True)
    if not info["cuda_live"]:
        sys.exit(f"first call: the CUDA library is not live: {info['cuda_why_not']}")
    N, K = 128, 512
    for dtype, bits in ((BF16, 8), (torch.float16, 11)):
        # Pack and dequantize on the CPU, so that the GPU only does the call.
        q = qlora_ext.quantize_4bit(torch.randn(N, K).to(dtype))
        w4 = [t.to("cuda") if torch.is_tensor(t) else t for t in q.op_args()]
        W = qlora_ext.dequantize_4bit(q, dtype).double()
        for op, size, weight in ((ops.gemm_4bit, K, W.T), (ops.gemm_4bit_backward, N, W)):
            name = f"first call: {op.__name__}, M = 1, {dtype}"
            name += ", in a graph" if in_a_graph else ""
            print(name, flush=True)
            x = torch.randn(1, size).to(dtype)
            arguments = (x.to("cuda"), *w4)
            torch.cuda.synchronize()
            try:
                if in_a_graph:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        result = op(*arguments)
                    graph.replay()
                else:
                    result = op(*arguments)
                torch.cuda.synchronize()
                got = result.cpu().double()
            except RuntimeError as error:
                sys.exit(f"{name}: died: {str(error).splitlines()[0]}")
            want = x.double() @ weight
            # Each output is rounded once, to `bits` bits, so by at most 2^-bits of its size. Four
            # times that leaves room for the order of sums, but for nothing else.
            off = ((got - want).norm() / want.norm()).item()
            if not off <= 4 * 2.0**-bits:
                sys.exit(
                    f"{name}: wrong: its distance from the dense product is {off:.3g} of the "
                    f"product's norm, want {4 * 2.0**-bits:.3g} or less"
                )
    print("first call: right")


# ---------------------------------------------------------------- sanitizer's set


def touch_experts(q, x, A, B):
    """The ops of a mixture, on three experts of q's bytes: one without rows, and rows without an
    expert."""
    E, M = 3, len(x)
    w4 = stacked([q.op_args()] * E)
    A, B = A.expand(E, -1, -1).contiguous(), B.expand(E, -1, -1).contiguous()
    order = torch.randint(M, (2 * M,), device="cuda", dtype=torch.int32)
    ends = torch.tensor([M, M, 2 * M - 1], device="cuda", dtype=torch.int32)
    y, S = ops.grouped_lora_gemm_4bit(x, *w4, A, B, SCALING, ends, order)
    ops.grouped_lora_gemm_4bit_backward(y, x, S, *w4, A, B, SCALING, ends, order, True)
    ops.grouped_lora_shrink_backward(S, x, A, SCALING, ends, order, True)
    ops.sum_rows(x, order, ends)


def touch_every_op():
    """Runs each op at small shapes, tails included, for compute-sanitizer.

    The cases launch every kernel. Together they cover the tiles of ranks and rows, split K, chunks
    and an unaligned weight, but not every instantiation; the tests launch those.
    """
    torch.manual_seed(0)
    cases = (
        (136, 320, {}, 5, (1, 9, 17, 40, 70, 300)),
        (72, 192, {"double_quant": False}, 12, (1, 12, 17, 70)),
        (40, 4096, {}, 40, (1, 33)),
        (33, 65, {"quant_type": "fp4"}, 5, (1, 9, 70)),
        (40, 96, {"normalization": "standard", "blocksize": 32}, 5, (1, 40)),
        (24, 64, {"blocksize": None}, 5, (1, 17)),
        # One scale for the whole tensor: sums and maxima over more than one block.
        (136, 128, {"blocksize": None, "normalization": "standard"}, 5, (1,)),
        (24, 64, {"quant_type": "linear", "normalization": "none"}, 5, (1,)),
    )
    for case, (N, K, config, rank, rows) in enumerate(cases):
        for dtype in (BF16, torch.float16, torch.float32):
            # If a sanitizer runs out of time, this shows how far it got: all calls before this line
            # have ended.
            torch.cuda.synchronize()
            print(f"case {case + 1} of {len(cases)}, {dtype}", flush=True)
            weight = torch.randn(N * K + 1, device="cuda", dtype=dtype)
            qlora_ext.quantize_4bit(weight[1:].view(N, K), **config)
            q = qlora_ext.quantize_4bit(weight[:-1].view(N, K), **config)
            w4 = q.op_args()
            if q.nested is not None:
                ops.dequantize_absmax(q.absmax, q.nested)
            ops.dequantize_4bit(*w4, dtype)
            unaligned = torch.empty(N * K + 1, device="cuda", dtype=dtype)[1:].view(N, K)
            ops.dequantize_4bit.out(*w4, out=unaligned)
            ops.embedding_4bit(torch.tensor([0, N - 1, 1], device="cuda"), *w4, dtype)
            A, B = torch.randn(rank, K, device="cuda"), torch.randn(N, rank, device="cuda")
            ops.merge_lora_4bit(*w4, A, B, SCALING, dtype)
            for M in rows:
                x = torch.randn(M, K, device="cuda", dtype=dtype)
                bias = torch.randn(N, device="cuda", dtype=dtype)
                y, S = ops.lora_gemm_4bit(x, *w4, A, B, SCALING, bias)
                ops.lora_gemm_4bit_backward(y, x, S, *w4, A, B, SCALING, True)
                if K % 2 == 0:
                    touch_experts(q, x, A, B)
    torch.cuda.synchronize()
    print("touched every op")


# ---------------------------------------------------------------- output


def plot(bench: Bench):
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for op in ("forward", "forward+LoRA", "backward+LoRA"):
        layers = [n for n in LAYERS if any(r["op"] == op and r["layer"] == n for r in bench.rows)]
        if not layers:
            continue
        figure, axes = plt.subplots(2, len(layers), figsize=(4.2 * len(layers), 7), squeeze=False)
        for column, layer in enumerate(layers):
            rows = [r for r in bench.rows if r["op"] == op and r["layer"] == layer]
            rows.sort(key=lambda r: r["M"])
            above, below = axes[0][column], axes[1][column]
            for name in sorted({n for r in rows for n in r["us"]}):
                points = [(r["M"], r["us"][name], r["floor_us"]) for r in rows if name in r["us"]]
                M, us, floor = zip(*points, strict=True)
                above.plot(M, us, marker="o", label=name)
                below.plot(M, [f / t for f, t in zip(floor, us, strict=True)], marker="o")
            above.plot([r["M"] for r in rows], [r["floor_us"] for r in rows], "k:", label="floor")
            above.set(title=f"{layer} [{rows[0]['N']}, {rows[0]['K']}]", ylabel="us per call")
            above.set(xscale="log", yscale="log")
            below.set(xlabel="M (rows of x)", ylabel="floor / time", ylim=(0, 1.05), xscale="log")
        axes[0][0].legend(fontsize=7)
        figure.suptitle(f"{op}, {torch.cuda.get_device_name()}")
        figure.tight_layout()
        figure.savefig(bench.out / f"{op.replace('+', '_')}.png", dpi=110)
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="no case starts after this")
    parser.add_argument("--quick", action="store_true", help="the targets' shapes only")
    parser.add_argument("--touch-every-op", action="store_true")
    parser.add_argument("--first-call", action="store_true")
    parser.add_argument("--in-a-graph", action="store_true", help="with --first-call")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch sees no GPU")
    if arguments.first_call:
        torch.manual_seed(0)
        first_call(arguments.in_a_graph)
        return
    if arguments.touch_every_op:
        touch_every_op()
        return
    if arguments.out is None:
        parser.error("OUT_DIR is missing")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bench = Bench(arguments.out, arguments.seconds, rounds=11)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy "
        f"{bench.copy / 1e12:.2f} TB/s, bf16 matmul {bench.matmul / 1e12:.0f} TFLOP/s, "
        f"bitsandbytes {'there' if bench.bnb else 'absent'}; * = not in a CUDA graph"
    )
    with torch.no_grad():
        for layer in FOCUS:
            layer_cases(bench, layer)
        for layer in EXPERTS:
            for tokens in (16, 512):
                if not bench.is_over():
                    experts(bench, layer, tokens)
            torch.cuda.empty_cache()
        for layer in LAYERS:
            if layer not in FOCUS and not arguments.quick:
                layer_cases(bench, layer)
    print(bench.predicted_range())
    print(bench.clock_range())
    bench.save()
    plot(bench)


def layer_cases(bench: Bench, layer: str) -> None:
    """Every case of one layer, unless the time is up."""
    if bench.is_over():
        return
    w = Weights(bench, layer)
    if layer in FOCUS:
        quantizers(bench, layer, w)
    for M in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        forward(bench, w, layer, M)
    for M in (512, 2048, 8192) if layer in FOCUS else (512, 2048):
        lora(bench, w, layer, M)
    del w
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
