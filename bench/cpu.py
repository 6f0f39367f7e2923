"""The CPU backend against bitsandbytes and torch's dense layers: `make bench`.

Every row times all contenders in turn, round after round in one process, into memory that was
touched before, and gives medians; the table is printed and left as JSON and PNG in bench/results/.
`ratio` columns say how many times faster we are. `--avx2` limits every contender to AVX2 (ours by
QLORA_EXT_CPU, torch's by its libraries' own switches), the machine that the bars were written for.
On a machine that others use, `--cpu-time` counts one thread's CPU time instead of the clock's.

    python bench/cpu.py [--avx2] [--cpu-time] [--quick] [--no-model] [--rounds 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

AVX2 = {
    "QLORA_EXT_CPU": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
# Freed memory is kept and used again: all outputs lie in pages that were touched before.
TOUCHED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
SLOW = 5.0  # seconds: a call that takes longer is timed once
OURS, BNB = "ours", "bitsandbytes"


@dataclasses.dataclass
class Row:
    """One line of the table: milliseconds by contender, and the ratios that are asked of us."""

    case: str
    shape: str
    ms: dict[str, float]
    bars: dict[str, float]  # contender -> how many times faster than it we are to be

    def ratio(self, contender: str) -> float:
        """How many times faster we are than a contender."""
        return self.ms[contender] / self.ms[OURS]

    def verdict(self) -> str:
        """Which bars are met: 'yes', or what was reached where one is not."""
        missed = [
            f"{name} {self.ratio(name):.2f}x of {bar:.2f}x"
            for name, bar in self.bars.items()
            if name in self.ms and self.ratio(name) < bar
        ]
        held = [name for name in self.bars if name in self.ms]
        return "" if not held else "no: " + ", ".join(missed) if missed else "yes"


clock = time.perf_counter


def interleave(contenders: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; they take turns, so that a busy spell hits them alike."""
    times = {name: [] for name in contenders}
    warm = {}
    for name, call in contenders.items():
        start = clock()
        call()
        warm[name] = clock() - start
    fast = [name for name in contenders if warm[name] < SLOW]
    for _ in range(rounds):
        for name in fast:
            repeats = max(1, int(2e-3 / max(warm[name], 1e-6)))
            start = clock()
            for _ in range(repeats):
                contenders[name]()
            times[name].append((clock() - start) / repeats)
    return {name: 1e3 * statistics.median(times[name] or [warm[name]]) for name in contenders}


def load() -> float:
    """Runnable processes, averaged over the last minute."""
    return os.getloadavg()[0]


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# Ops ----------------------------------------------------------------------------------------------


class Ops:
    """Rows for one [N, K] weight in one dtype."""

    def __init__(self, N: int, K: int, dtype, rounds: int):
        import bitsandbytes.functional as bnb
        import torch

        import qlora_ext

        torch.manual_seed(0)
        self.torch, self.bnb, self.rounds, self.dtype = torch, bnb, rounds, dtype
        self.N, self.K = N, K
        self.name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        self.weight = (torch.randn(N, K) * 0.02).to(dtype)
        self.w4 = qlora_ext.quantize_4bit(self.weight).op_args()
        self.packed, self.state = self.bnb_quantize()
        self.ops = torch.ops.qlora_ext

    def bnb_quantize(self):
        return self.bnb.quantize_4bit(
            self.weight, blocksize=64, quant_type="nf4", compress_statistics=True
        )

    def row(self, case: str, contenders: dict[str, Callable], bars: dict[str, float]) -> Row:
        """Times one case; `bars` apply to the table's own shape."""
        ms = interleave(contenders, self.rounds)
        bars = bars if (self.N, self.K) == (4096, 4096) else {}
        return Row(f"{case} {self.name}", f"{self.N}x{self.K}", ms, bars)

    def quantize(self) -> Row:
        """Packing and double quantization."""

        def ours():
            _, absmax, _ = self.ops.quantize_4bit(
                self.weight, 64, "nf4", None, "absmax", 3.0, "none", 1.0
            )
            self.ops.quantize_absmax(absmax)

        return self.row("quantize", {OURS: ours, BNB: self.bnb_quantize}, {BNB: 10})

    def dequantize(self) -> Row:
        """Into touched memory; bitsandbytes takes no `out=` on a CPU, the allocator keeps its."""
        out, other = self.torch.empty_like(self.weight), self.torch.empty_like(self.weight)
        contenders = {
            OURS: lambda: self.ops.dequantize_4bit.out(*self.w4, out=out),
            BNB: lambda: self.bnb.dequantize_4bit(self.packed, self.state),
            "write": lambda: other.fill_(1.0),
        }
        return self.row("dequantize", contenders, {BNB: 3, "write": 1 / 1.3})

    def linear(self, M: int) -> Row:
        """y = x W^T, no gradient."""
        torch, F = self.torch, self.torch.nn.functional
        import bitsandbytes

        x = torch.randn(M, self.K).to(self.dtype)
        transposed = self.packed.t()
        contenders = {
            OURS: lambda: self.ops.gemm_4bit(x, *self.w4),
            BNB: lambda: bitsandbytes.matmul_4bit(x, transposed, quant_state=self.state),
            "dense": lambda: F.linear(x, self.weight),
        }
        fp32 = self.dtype == torch.float32
        if not fp32:
            x32, w32 = x.float(), self.weight.float()
            contenders["ours fp32"] = lambda: self.ops.gemm_4bit(x32, *self.w4)
            contenders["dense fp32"] = lambda: F.linear(x32, w32)
        if M == 1:
            bars = {BNB: 20, "dense": 2} if fp32 else {BNB: 12, "dense": 1}
        elif M == 16:
            bars = (
                {BNB: 5, "dense": 1} if fp32 else {BNB: 5, "dense fp32": 1, "ours fp32": 1 / 1.15}
            )
        elif M > 16:
            bars = {BNB: 1.15, "dense": 1 / 1.1} if fp32 and M >= 256 else {"ours fp32": 1 / 1.15}
        else:
            bars = {}
        return self.row(f"linear M={M}", contenders, bars)

    def backward(self, M: int) -> Row:
        """dX = dY W; bitsandbytes decodes the whole weight for it."""
        torch = self.torch
        dY = torch.randn(M, self.N).to(self.dtype)
        contenders = {
            OURS: lambda: self.ops.gemm_4bit_backward(dY, *self.w4),
            BNB: lambda: dY @ self.bnb.dequantize_4bit(self.packed, self.state),
            "dense": lambda: dY @ self.weight,
        }
        bars = {}
        if self.dtype != torch.float32:
            dY32 = dY.float()
            contenders["ours fp32"] = lambda: self.ops.gemm_4bit_backward(dY32, *self.w4)
            slow_dense = os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" or not has_bf16()
            bars = {"ours fp32": 1 / 1.15, **({"dense": 20} if slow_dense else {})}
        return self.row(f"backward dX M={M}", contenders, bars)

    def lora(self, M: int, r: int = 8) -> Row:
        """y = x W^T + s (x A^T) B^T against the three products of an unfused layer."""
        torch, F = self.torch, self.torch.nn.functional
        import bitsandbytes

        x = torch.randn(M, self.K).to(self.dtype)
        A, B = torch.randn(r, self.K), torch.randn(self.N, r)
        a, b = A.to(self.dtype), B.to(self.dtype)
        transposed = self.packed.t()

        def bnb():
            y = bitsandbytes.matmul_4bit(x, transposed, quant_state=self.state)
            return y + F.linear(F.linear(x, a), b) * 2.0

        contenders = {
            OURS: lambda: self.ops.lora_gemm_4bit(x, *self.w4, A, B, 2.0),
            BNB: bnb,
            "dense": lambda: F.linear(x, self.weight) + F.linear(F.linear(x, a), b) * 2.0,
        }
        return self.row(f"linear + LoRA r={r} M={M}", contenders, {})

    def merge(self, r: int = 8) -> Row:
        """dequantize(W) + s B A into fp16."""
        torch = self.torch
        A, B = torch.randn(r, self.K), torch.randn(self.N, r)

        def bnb():
            dense = self.bnb.dequantize_4bit(self.packed, self.state).float()
            return torch.addmm(dense, B, A, alpha=2.0).half()

        contenders = {
            OURS: lambda: self.ops.merge_lora_4bit(*self.w4, A, B, 2.0, torch.float16),
            BNB: bnb,
        }
        return self.row(f"merge r={r} to fp16 from", contenders, {})


def has_bf16() -> bool:
    """Whether torch multiplies bf16 with instructions for it here."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def op_rows(quick: bool, rounds: int):
    """The table's shape in full, then real layers' shapes."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        square = Ops(4096, 4096, dtype, rounds)
        yield square.quantize()
        yield square.dequantize()
        for M in (1, 16, 256) if quick else (1, 4, 16, 64, 256, 512, 2048):
            yield square.linear(M)
        if not quick or dtype == torch.float32:
            yield square.backward(512)
        yield square.lora(512)
        yield square.merge()
    for N, K in () if quick else ((11008, 4096), (576, 576), (1536, 576), (576, 1536)):
        layer = Ops(N, K, torch.float32, rounds)
        for M in (1, 16, 384):
            yield layer.linear(M)
        yield layer.backward(384)


def overhead_rows(rounds: int):
    """What a call costs beside its arithmetic: a tiny layer at M = 1."""
    import torch

    import qlora_ext

    plain = torch.nn.Linear(64, 64)
    packed = qlora_ext.nn.Linear4bit.from_linear(plain)
    x = torch.randn(1, 64)
    x_grad = torch.randn(1, 64, requires_grad=True)

    def under_no_grad(layer):
        with torch.no_grad():
            layer(x)

    for case, bar, call in (
        ("tiny layer, no_grad", 1 / 2, under_no_grad),
        ("tiny layer, with gradients", 1 / 2.5, lambda layer: layer(x_grad)),
    ):
        contenders = {OURS: lambda c=call: c(packed), "dense": lambda c=call: c(plain)}
        yield Row(case, "64x64", interleave(contenders, 5 * rounds), {"dense": bar})


# A whole model -----------------------------------------------------------------------------------


def smollm2(dtype):
    """A model of SmolLM2-135M's shape; its weights are random, which time does not depend on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).to(dtype)


def load_as(name: str, folder: str, dtype):
    """The saved model as a contender loads it: 'ours', 'bitsandbytes', or 'dense'."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import qlora_ext

    quantization = {
        OURS: lambda: qlora_ext.QLoraExtConfig(),
        BNB: lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }
    options = {"quantization_config": quantization[name]()} if name in quantization else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def with_adapters(model):
    """PEFT's LoRA on every linear layer but the head, for all contenders alike."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model.train(), config)


def training_step(model):
    """One step of AdamW on 2 x 192 tokens."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, 49152, (2, 192))

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def model_rows(rounds: int, dtypes: tuple[str, ...]):
    """Load, train and generate with SmolLM2-135M's shape."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for label in dtypes:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[label]
        shape = "SmolLM2-135M"
        with tempfile.TemporaryDirectory() as folder:
            smollm2(dtype).save_pretrained(folder)
            models, loads = {}, {}
            for name in (OURS, BNB, "dense"):
                start = clock()
                models[name] = load_as(name, folder, dtype)
                loads[name] = 1e3 * (clock() - start)
            quantizing = {name: loads[name] - loads["dense"] for name in (OURS, BNB)}
            yield Row(f"load {label}", shape, loads, {})
            yield Row(f"load {label}, less the dense load", shape, quantizing, {BNB: 10})

            steps = {name: training_step(with_adapters(model)) for name, model in models.items()}
            if label == "fp32":
                bars = {BNB: 1.0, "dense": 1.0}
            else:
                bars = {BNB: 15.0} if slow_bf16() else {}
            times = interleave(steps, max(1, rounds // 2))
            yield Row(f"training step {label}", shape, times, bars)

            # Loaded again: for eval() bitsandbytes repacks its weights, and then cannot train.
            del models, steps
            models = {name: load_as(name, folder, dtype) for name in (OURS, BNB, "dense")}
            prompt = torch.randint(0, 49152, (1, 16))
            generate = {name: generation(model, prompt) for name, model in models.items()}
            times = interleave(generate, max(1, rounds // 2))
            yield Row(f"generate 16 tokens {label}", shape, times, {})


def generation(model, prompt):
    """Greedy generation of 16 tokens after a prompt of 16."""
    length = {"max_new_tokens": 16, "min_new_tokens": 16}
    return lambda: model.generate(prompt, do_sample=False, **length)


def slow_bf16() -> bool:
    """Whether torch's bf16 runs without instructions for it: then its step is compared."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" or not has_bf16()


def peak_memory(name: str, folder: str) -> float:
    """Peak resident GB of loading the model and one training step, in a process of its own."""
    command = [sys.executable, __file__, "--measure-memory", name, folder]
    plain = {key: value for key, value in os.environ.items() if key not in TOUCHED}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    return float(result.stdout.split()[-1])


def measure_memory(name: str, folder: str) -> None:
    """Prints the peak resident GB of this process after loading and one training step."""
    import torch

    training_step(with_adapters(load_as(name, folder, torch.float32)))()
    # Not getrusage, whose maximum survives exec: it would be the parent's.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)


def memory_table() -> dict[str, float]:
    """Peak GB by contender."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        smollm2(torch.float32).save_pretrained(folder)
        return {name: peak_memory(name, folder) for name in (OURS, BNB, "dense")}


# Where the time goes ------------------------------------------------------------------------------


def profile(rounds: int) -> dict[str, float]:
    """Bandwidth and arithmetic reached, beside what plain copies and products reach here."""
    import torch

    from qlora_ext import quantize_4bit

    N = K = 4096
    weight = torch.randn(N, K)
    w4 = quantize_4bit(weight).op_args()
    target = torch.empty_like(weight)
    x, X = torch.randn(1, K), torch.randn(512, K)
    ops = torch.ops.qlora_ext
    ms = interleave(
        {
            "copy": lambda: target.copy_(weight),
            "decode": lambda: ops.dequantize_4bit.out(*w4, out=target),
            "M=1": lambda: ops.gemm_4bit(x, *w4),
            "M=512": lambda: ops.gemm_4bit(X, *w4),
            "dense M=512": lambda: torch.nn.functional.linear(X, weight),
        },
        rounds,
    )
    gb, gflop = 1e-6, 1e-6
    return {
        "copy GB/s": 2 * 4 * N * K * gb / ms["copy"],
        "dequantize fp32 GB/s": (4 + 0.516) * N * K * gb / ms["decode"],
        "linear M=1 GB/s of packed bytes": 0.516 * N * K * gb / ms["M=1"],
        "linear M=1 weights per ns": N * K * 1e-6 / ms["M=1"],
        "linear M=512 GFLOP/s": 2 * 512 * N * K * gflop / ms["M=512"],
        "dense M=512 GFLOP/s": 2 * 512 * N * K * gflop / ms["dense M=512"],
    }


# Reports ------------------------------------------------------------------------------------------


def print_row(row: Row) -> None:
    """One line: our time, then each contender's and how many times faster we are."""
    others = "  ".join(
        f"{name} {ms:.2f} ({row.ratio(name):.2f}x)" for name, ms in row.ms.items() if name != OURS
    )
    print(
        f"{row.case:32s} {row.shape:13s} ours {row.ms[OURS]:9.3f} ms  {others}  {row.verdict()}",
        flush=True,
    )


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Ratios as bars: how many times faster than bitsandbytes and than torch's dense layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 0.28 * len(rows) + 1.5))
    for offset, name, colour in ((-0.2, BNB, "tab:blue"), (0.2, "dense", "tab:orange")):
        points = [(i, row.ratio(name)) for i, row in enumerate(rows) if name in row.ms]
        axes.barh(
            [i + offset for i, _ in points], [r for _, r in points], 0.38, color=colour, label=name
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row.case}  {row.shape}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the table that the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--avx2", action="store_true", help="limit every contender to AVX2")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU time")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--no-ops", action="store_true", help="only the model's rows")
    parser.add_argument("--no-model", action="store_true", help="only the ops' rows")
    parser.add_argument("--model-dtypes", default="fp32,bf16", help="dtypes of the model's rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--measure-memory", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.measure_memory:
        return measure_memory(*args.measure_memory)
    settings = {**TOUCHED, **(AVX2 if args.avx2 else {})}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        os.environ.update(settings)  # read when the libraries load: start again with them set
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if args.cpu_time:
        global clock
        clock, args.threads = time.process_time, 1

    import bitsandbytes
    import torch

    import qlora_ext

    torch.set_num_threads(args.threads)
    machine = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "clock": "CPU time" if args.cpu_time else "wall",
        "path": qlora_ext.build_info()["cpu_path"],
        "limited to AVX2": args.avx2,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "load before": load(),
        # bitsandbytes picks AVX-512 by itself and cannot be told not to; the bars were set against
        # its scalar code, which is what a CPU without AVX-512 gets.
        "bitsandbytes uses AVX-512": torch.cpu._is_avx512_supported(),
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    rows, memory, where = [], {}, {}

    def collect(source):
        for row in source:
            rows.append(row)
            print_row(row)

    if not args.no_ops:
        collect(op_rows(args.quick, args.rounds))
        collect(overhead_rows(args.rounds))
        where = profile(args.rounds)
        print("  ".join(f"{key} {value:.1f}" for key, value in where.items()))
    if not args.no_model:
        collect(model_rows(args.rounds, tuple(args.model_dtypes.split(","))))
        memory = memory_table()
        print(
            "peak memory of a training step:",
            "  ".join(f"{k} {v:.2f} GB" for k, v in memory.items()),
        )
    machine["load after"] = load()

    missed = [row for row in rows if row.verdict().startswith("no")]
    busy = f"{machine['load before']:.1f} before, {machine['load after']:.1f} after"
    print(f"load average {busy}; {args.threads} threads")
    print(f"{len(missed)} of {sum(bool(r.verdict()) for r in rows)} bars missed")
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = {"avx2": args.avx2, "cpu_time": args.cpu_time, "model": args.no_ops}
    stem = args.out / "_".join(["cpu", *(kind for kind, on in kinds.items() if on)])
    record = {
        "machine": machine,
        "rows": [{**dataclasses.asdict(row), "verdict": row.verdict()} for row in rows],
        "peak_memory_gb": memory,
        "profile": where,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(
        rows,
        f"{machine['cpu']}, {args.threads} threads, {machine['path']}",
        stem.with_suffix(".png"),
    )
    print(f"wrote {stem}.json and .png")


if __name__ == "__main__":
    main()
