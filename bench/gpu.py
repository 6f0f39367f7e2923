"""The CUDA backend against bitsandbytes, dequantize + cuBLAS, dense bf16 and an unfused LoRA chain.

    python bench/gpu.py OUT_DIR [--seconds 240] [--quick]
    python bench/gpu.py --touch-every-op      # a few small calls, for compute-sanitizer

Every case captures one CUDA graph per contender, over enough copies of the weight that their packed
bytes exceed three times L2, and replays the graphs in turn, round after round, between CUDA events;
figures are medians of microseconds per call, so launch gaps and one lucky order stay out of them.
A contender that cannot be captured is timed as a plain loop and marked with *. `floor` is the bytes
that must move over this run's own copy bandwidth, or the flops over this run's own matmul rate, the
larger of the two. Writes OUT_DIR/bench.json, .png plots if matplotlib is there, and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import qlora_ext

ops = torch.ops.qlora_ext
BF16 = torch.bfloat16
SCALING, RANK = 2.0, 16

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
FOCUS = ("Llama-8B mlp up", "Llama-70B q", "Llama-8B q")  # the bars' shapes, measured first
COPY_BYTES, MATMUL_SIZE = 1 << 30, 8192  # what this run's own ceilings are measured with


# ---------------------------------------------------------------- timing


def capture(function: Callable[[int], object], copies: int):
    """A replayable graph of `copies` calls, or None if something in it refuses capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            function(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(copies):
                function(i)
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph


def compare(contenders: dict[str, Callable[[int], object]], copies: int, rounds: int, graphs=True):
    """Microseconds per call of each contender: medians over interleaved rounds."""
    replay, marked = {}, []
    for name, function in contenders.items():
        graph = capture(function, copies) if graphs else None
        if graph is None:
            marked.append(name)

            def run(function=function):
                for i in range(copies):
                    function(i)

            replay[name] = run
        else:
            replay[name] = graph.replay
    times = {name: [] for name in contenders}
    for turn in range(rounds + 2):  # two to warm up
        for name, run in replay.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3 / copies)
    return {n: statistics.median(t) for n, t in times.items()}, marked


def extra_bytes(function: Callable[[int], object]) -> int:
    """Most memory that a call has beside its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = function(0)  # noqa: F841 (alive until the difference is taken)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


# ---------------------------------------------------------------- bars


def missed(row: dict) -> list[str]:
    """The bars that a row's times miss, as sentences: the floors of the GPU table that this project
    set itself. M = 512 forward may take 1.65x of plain bf16 until there is a wgmma kernel."""
    us, op, M = row["us"], row["op"], row["M"]
    speed = {name: t / us["ours"] for name, t in us.items()}  # how many times as fast ours is
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


class Bench:
    def __init__(self, out: Path | None, seconds: float, rounds: int):
        self.out, self.deadline, self.rounds = out, time.monotonic() + seconds, rounds
        self.rows: list[dict] = []
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.copy, self.matmul = self.ceilings()
        try:
            import bitsandbytes.functional as bnb
        except Exception:  # absent, or built for another CUDA
            bnb = None
        self.bnb = bnb

    def ceilings(self):
        """Bytes per second of a device copy (read plus written), flops of a bf16 matmul."""
        n = MATMUL_SIZE
        a = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        x, w = (torch.randn(n, n, device="cuda", dtype=BF16) for _ in range(2))
        times, _ = compare({"copy": lambda i: b.copy_(a), "matmul": lambda i: x @ w}, 2, 9)
        return 2 * a.numel() / times["copy"] * 1e6, 2 * n**3 / times["matmul"] * 1e6

    def floor(self, moved: float, flops: float = 0.0) -> float:
        return 1e6 * max(moved / self.copy, flops / self.matmul)

    def copies(self, numel: int) -> int:
        return max(2, math.ceil(3 * self.l2 / (numel * 0.516)))

    def add(self, op, layer, M, floor, contenders, copies, graphs=True):
        if time.monotonic() > self.deadline:
            return
        N, K = LAYERS[layer]
        times, marked = compare(contenders, copies, self.rounds, graphs)
        row = {"op": op, "layer": layer, "N": N, "K": K, "M": M, "floor_us": round(floor, 2)}
        row["us"] = {name: round(t, 2) for name, t in times.items()}
        row["not_graphed"] = marked
        row["extra_bytes"] = extra_bytes(contenders["ours"])
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
        for bar in row["missed"]:
            print(f"    MISSED {bar}", flush=True)
        if self.out:
            self.save()

    def save(self):
        record = {
            "gpu": torch.cuda.get_device_name(),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "copy_bytes_per_s": self.copy,
            "matmul_flops": self.matmul,
            "bitsandbytes": self.bnb is not None,
            "build": {k: str(v) for k, v in qlora_ext.build_info().items()},
            "rows": self.rows,
        }
        (self.out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")


# ---------------------------------------------------------------- weights


class Weights:
    """Copies of one layer's weight, in each contender's form."""

    def __init__(self, bench: Bench, layer: str):
        N, K = LAYERS[layer]
        self.N, self.K, self.count = N, K, bench.copies(N * K)
        dense = torch.randn(N, K, device="cuda", dtype=BF16) * 0.02
        q = qlora_ext.quantize_4bit(dense)
        args = q.op_args()
        clones = [[t.clone() if torch.is_tensor(t) else t for t in args] for _ in range(self.count)]
        self.ours = [tuple(c) for c in clones]
        # bf16 is 3.9 times as large: fewer copies leave L2 behind just as well.
        self.dense = [dense.clone() for _ in range(max(2, self.count // 3))]
        self.peer = None
        if bench.bnb is not None:
            self.peer = [
                bench.bnb.quantize_4bit(
                    dense, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                for _ in range(self.count)
            ]
        self.source = dense

    def bf16(self, i):
        return self.dense[i % len(self.dense)]


PACKED = 0.516  # bytes per weight: 4.127 bits


def quantizers(bench: Bench, layer: str):
    w = Weights(bench, layer)
    numel = w.N * w.K
    out = torch.empty(w.N, w.K, device="cuda", dtype=BF16)
    contenders = {"ours": lambda i: ops.dequantize_4bit.out(*w.ours[i], out=out)}
    if w.peer:
        contenders["bitsandbytes"] = lambda i: bench.bnb.dequantize_4bit(*w.peer[i])
    bench.add("dequantize", layer, 0, bench.floor(numel * (2 + PACKED)), contenders, w.count)

    def quantize(i):
        _, absmax, _ = ops.quantize_4bit(w.source, 64, "nf4", None, "absmax", 3.0, "none", 1.0)
        return ops.quantize_absmax(absmax)

    contenders = {"ours": quantize}
    if bench.bnb is not None:
        contenders["bitsandbytes"] = lambda i: bench.bnb.quantize_4bit(
            w.source, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
    # Not in a graph: the quantizer reads its NaN flag back.
    bench.add("quantize", layer, 0, bench.floor(numel * (2 + PACKED)), contenders, 2, graphs=False)


def forward(bench: Bench, w: Weights, layer: str, M: int):
    x = torch.randn(M, w.K, device="cuda", dtype=BF16)
    contenders = {
        "ours": lambda i: ops.gemm_4bit(x, *w.ours[i]),
        "dense bf16": lambda i: F.linear(x, w.bf16(i)),
        "dequantize+cuBLAS": lambda i: F.linear(x, ops.dequantize_4bit(*w.ours[i], BF16)),
    }
    if w.peer:
        import bitsandbytes

        contenders["bitsandbytes"] = lambda i: bitsandbytes.matmul_4bit(
            x, w.peer[i][0].t(), quant_state=w.peer[i][1]
        )
    moved = w.N * w.K * PACKED + 2 * M * (w.K + w.N)
    bench.add("forward", layer, M, bench.floor(moved, 2 * M * w.N * w.K), contenders, w.count)


def lora(bench: Bench, w: Weights, layer: str, M: int):
    """Forward with a bypass of rank 16, and the whole backward: dX, dA, dB."""
    x = torch.randn(M, w.K, device="cuda", dtype=BF16)
    A = torch.randn(RANK, w.K, device="cuda") * 0.01
    B = torch.randn(w.N, RANK, device="cuda") * 0.01
    A16, B16 = A.to(BF16), B.to(BF16)
    dY = torch.randn(M, w.N, device="cuda", dtype=BF16)
    _, S = ops.lora_gemm_4bit(x, *w.ours[0], A, B, SCALING)

    def unfused(base):
        return base + SCALING * ((x @ A16.T) @ B16.T)

    contenders = {
        "ours": lambda i: ops.lora_gemm_4bit(x, *w.ours[i], A, B, SCALING),
        "dense bf16": lambda i: F.linear(x, w.bf16(i)),
        "dense bf16+LoRA": lambda i: unfused(F.linear(x, w.bf16(i))),
        "dequantize+cuBLAS+LoRA": lambda i: unfused(
            F.linear(x, ops.dequantize_4bit(*w.ours[i], BF16))
        ),
    }
    if w.peer:
        import bitsandbytes

        contenders["bitsandbytes+LoRA"] = lambda i: unfused(
            bitsandbytes.matmul_4bit(x, w.peer[i][0].t(), quant_state=w.peer[i][1])
        )
    flops = 2 * M * w.N * w.K + 2 * M * RANK * (w.N + w.K)
    moved = w.N * w.K * PACKED + 2 * M * (w.K + w.N)
    bench.add("forward+LoRA", layer, M, bench.floor(moved, flops), contenders, w.count)

    def unfused_backward(weight):
        dS = SCALING * (dY @ B16)
        dB = dY.T @ (SCALING * (x @ A16.T))
        return dY @ weight + dS @ A16, dS.T @ x, dB

    contenders = {
        "ours": lambda i: ops.lora_gemm_4bit_backward(dY, x, S, *w.ours[i], A, B, SCALING, True),
        "dense bf16+LoRA": lambda i: unfused_backward(w.bf16(i)),
        "dequantize+cuBLAS+LoRA": lambda i: unfused_backward(ops.dequantize_4bit(*w.ours[i], BF16)),
    }
    if w.peer:
        contenders["bitsandbytes+LoRA"] = lambda i: unfused_backward(
            bench.bnb.dequantize_4bit(*w.peer[i])
        )
    bench.add("backward+LoRA", layer, M, bench.floor(moved, 2 * flops), contenders, w.count)


# ---------------------------------------------------------------- sanitizer's set


def touch_every_op():
    """Each op at small shapes, tails included: what compute-sanitizer runs.

    Every kernel and, between them, the ranks' and rows' tiles, split K, chunks and an unaligned
    weight; not every instantiation, which the tests launch.
    """
    torch.manual_seed(0)
    for N, K, config, rank, rows in (
        (136, 320, {}, 5, (1, 9, 17, 40, 70, 300)),
        (72, 192, {"double_quant": False}, 12, (1, 12, 17, 70)),
        (40, 4096, {}, 40, (1, 33)),
        (33, 65, {"quant_type": "fp4"}, 5, (1, 9, 70)),
        (40, 96, {"normalization": "standard", "blocksize": 32}, 5, (1, 40)),
        (24, 64, {"blocksize": None}, 5, (1, 17)),
        # One scale: sums and maxima of more than one block.
        (136, 128, {"blocksize": None, "normalization": "standard"}, 5, (1,)),
        (24, 64, {"quant_type": "linear", "normalization": "none"}, 5, (1,)),
    ):
        for dtype in (BF16, torch.float16, torch.float32):
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="no case starts after this")
    parser.add_argument("--quick", action="store_true", help="the bars' shapes only")
    parser.add_argument("--touch-every-op", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch sees no GPU")
    if arguments.touch_every_op:
        touch_every_op()
        return
    if arguments.out is None:
        parser.error("OUT_DIR is missing")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bench = Bench(arguments.out, arguments.seconds, rounds=15)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy "
        f"{bench.copy / 1e12:.2f} TB/s, bf16 matmul {bench.matmul / 1e12:.0f} TFLOP/s, "
        f"bitsandbytes {'there' if bench.bnb else 'absent'}; * = not in a CUDA graph"
    )
    with torch.no_grad():
        for layer in [*FOCUS, *([] if arguments.quick else [n for n in LAYERS if n not in FOCUS])]:
            if time.monotonic() > bench.deadline:
                break
            if layer in FOCUS:
                quantizers(bench, layer)
            w = Weights(bench, layer)
            for M in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                forward(bench, w, layer, M)
            for M in (512, 2048, 8192) if layer in FOCUS else (512, 2048):
                lora(bench, w, layer, M)
            del w
            torch.cuda.empty_cache()
    bench.save()
    plot(bench)


if __name__ == "__main__":
    main()
