"""The CPU backend against bitsandbytes, torchao's NF4 and torch's dense layers: `make bench`.

Every row times all contenders in turn, round after round in one process, into memory that was
touched before, and gives medians. `ratio` says how many times faster we are. Two parts, each in a
process of its own:

- `native`: every contender with what this CPU has;
- `avx2`: every contender limited to AVX2 (ours by QLORA_EXT_CPU, torch's by its libraries' own
  switches, bitsandbytes by its own cached answer to "is there AVX-512?"), the machine that the
  targets were written for. Left out if the CPU has nothing beyond AVX2.

The result is one JSON and one PNG, bench/results/cpu-<machine>-<date>. On a machine that others
use, `--cpu-time` counts one thread's CPU time instead of the clock's.

    python bench/cpu.py                       # all of it
    python bench/cpu.py --quick --no-model    # fewer shapes, no model
    python bench/cpu.py --part avx2           # one part, printed only
    python bench/cpu.py --table RESULTS.json  # its tables into docs/cpu.md
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))  # peers.py knows how to limit bitsandbytes
AVX2 = {
    "QLORA_EXT_CPU": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
# malloc keeps freed memory and uses it again, so all outputs are in pages touched before.
TOUCHED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
SLOW = 5.0  # seconds: a call that takes longer is timed once
BUDGET = 2.0  # seconds for a row: long calls get fewer rounds, but at least three
OURS, BNB, AO, DENSE = "ours", "bitsandbytes", "torchao", "dense"
TABLE_SHAPE = (4096, 4096)  # the shape that has targets


@dataclasses.dataclass
class Row:
    """One line of the table: milliseconds by contender, and the ratios that we want to reach."""

    case: str
    shape: str
    ms: dict[str, float]
    targets: dict[str, float]  # contender -> how many times faster we want to be
    note: str = ""

    def ratio(self, contender: str) -> float:
        """How many times faster we are than a contender."""
        return self.ms[contender] / self.ms[OURS]

    def held(self) -> dict[str, bool]:
        """Contender -> whether its target is met, for contenders that ran."""
        return {
            name: self.ratio(name) >= target
            for name, target in self.targets.items()
            if name in self.ms
        }

    def verdict(self) -> str:
        """'met', or the ratios that missed their targets; '' for a row without targets."""
        missed = [
            f"{name} {self.ratio(name):.2f}x of {self.targets[name]:.2f}x"
            for name, met in self.held().items()
            if not met
        ]
        return "" if not self.held() else "MISSED: " + ", ".join(missed) if missed else "met"


clock = time.perf_counter


def interleave(contenders: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each. They take turns, so that a busy moment affects all alike."""
    times = {name: [] for name in contenders}
    warm = {}
    for name, call in contenders.items():
        start = clock()
        call()
        warm[name] = clock() - start
    fast = [name for name in contenders if warm[name] < SLOW]
    turn = sum(warm[name] for name in fast) or 1.0
    for _ in range(min(rounds, max(3, int(BUDGET / turn)))):
        for name in fast:
            repeats = max(1, int(2e-3 / max(warm[name], 1e-6)))
            start = clock()
            for _ in range(repeats):
                contenders[name]()
            times[name].append((clock() - start) / repeats)
    return {name: 1e3 * statistics.median(times[name] or [warm[name]]) for name in contenders}


def cpu_name() -> str:
    """The processor's name if the system gives it, else the machine type."""
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Others:
    """Measures the share of the machine's CPU time that other processes took."""

    def __init__(self):
        self.busy, self.own, self.start = self._busy(), self._own(), time.perf_counter()

    @staticmethod
    def _busy() -> float:
        """Seconds that all CPUs together were busy since boot."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]
        return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        """Seconds of this process and of the children that it waited for."""
        return sum(os.times()[:4])

    def share(self) -> float:
        """The other processes' share of all CPUs' time since this was made."""
        spent = self._busy() - self.busy - (self._own() - self.own)
        return max(0.0, spent / ((time.perf_counter() - self.start) * os.cpu_count()))


def limit_bitsandbytes() -> str:
    """Makes bitsandbytes use its code for CPUs without AVX-512. Returns a text that says what it
    uses from then on."""
    from peers import hide_from_bitsandbytes

    try:
        hide_from_bitsandbytes("avx512f", "avx512bf16")
    except RuntimeError as error:
        return f"AVX-512 ({error})"
    return "no AVX-512"


def torchao_nf4():
    """torchao's module for NF4, or None. Its name differs between versions."""
    import importlib

    for name in ("quantization.quantize_.workflows.nf4.nf4_tensor", "dtypes.nf4tensor"):
        try:
            return importlib.import_module(f"torchao.{name}")
        except ImportError:
            continue
    return None


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
        self.fp32 = dtype == torch.float32
        self.weight = (torch.randn(N, K) * 0.02).to(dtype)
        self.w4 = qlora_ext.quantize_4bit(self.weight).op_args()
        self.packed, self.state = self.bnb_quantize()
        self.ops = torch.ops.qlora_ext
        # torchao is so slow that it only runs the table's shape in fp32.
        self.ao = torchao_nf4() if self.fp32 and (N, K) == TABLE_SHAPE else None
        self.nf4 = self.ao and self.ao.to_nf4(self.weight, 64, 256)

    def bnb_quantize(self):
        return self.bnb.quantize_4bit(
            self.weight, blocksize=64, quant_type="nf4", compress_statistics=True
        )

    def row(self, case: str, contenders: dict[str, Callable], targets: dict[str, float]) -> Row:
        """Times one case. `targets` only apply to the table's shape."""
        ms = interleave(contenders, self.rounds)
        targets = targets if (self.N, self.K) == TABLE_SHAPE else {}
        return Row(f"{case} {self.name}", f"{self.N}x{self.K}", ms, targets)

    def quantize(self) -> Row:
        """Packs, with double quantization."""

        def ours():
            _, absmax, _ = self.ops.quantize_4bit(
                self.weight, 64, "nf4", None, "absmax", 3.0, "none", 1.0
            )
            self.ops.quantize_absmax(absmax)

        contenders = {OURS: ours, BNB: self.bnb_quantize}
        if self.ao:
            contenders[AO] = lambda: self.ao.to_nf4(self.weight, 64, 256)
        return self.row("quantize", contenders, {BNB: 10})

    def dequantize(self) -> Row:
        """Dequantizes into touched memory. bitsandbytes takes no `out=` on a CPU, but the allocator
        gives it touched memory too."""
        out, other = self.torch.empty_like(self.weight), self.torch.empty_like(self.weight)
        contenders = {
            OURS: lambda: self.ops.dequantize_4bit.out(*self.w4, out=out),
            BNB: lambda: self.bnb.dequantize_4bit(self.packed, self.state),
            "write": lambda: other.fill_(1.0),
        }
        if self.ao:
            contenders[AO] = self.nf4.get_original_weight
        return self.row("dequantize", contenders, {BNB: 3})

    def linear(self, M: int) -> Row:
        """y = x W^T without gradients."""
        torch, F = self.torch, self.torch.nn.functional
        import bitsandbytes

        x = torch.randn(M, self.K).to(self.dtype)
        transposed = self.packed.t()
        contenders = {
            OURS: lambda: self.ops.gemm_4bit(x, *self.w4),
            BNB: lambda: bitsandbytes.matmul_4bit(x, transposed, quant_state=self.state),
            DENSE: lambda: F.linear(x, self.weight),
        }
        if self.ao and M in (1, 16, 256):
            contenders[AO] = lambda: self.ao.linear_nf4(x, self.nf4)
        if not self.fp32 and (self.N, self.K) == TABLE_SHAPE:
            x32, w32 = x.float(), self.weight.float()
            contenders["ours fp32"] = lambda: self.ops.gemm_4bit(x32, *self.w4)
            contenders["dense fp32"] = lambda: F.linear(x32, w32)
        if M == 1:
            targets = {BNB: 20, DENSE: 2} if self.fp32 else {BNB: 12, DENSE: 1}
        elif M == 16:
            targets = {BNB: 5, DENSE: 1} if self.fp32 else {BNB: 5, "dense fp32": 1}
        elif self.fp32:
            targets = {BNB: 1.15, DENSE: 1 / 1.1} if M in (256, 512) else {}
        else:
            targets = {}
        if not self.fp32 and M >= 16:
            targets["ours fp32"] = 1 / 1.15
        return self.row(f"linear M={M}", contenders, targets)

    def backward(self, M: int) -> Row:
        """dX = dY W. bitsandbytes decodes the whole weight for it."""
        torch = self.torch
        dY = torch.randn(M, self.N).to(self.dtype)
        contenders = {
            OURS: lambda: self.ops.gemm_4bit_backward(dY, *self.w4),
            DENSE: lambda: dY @ self.weight,
        }
        # If torch's product takes a minute, one contender that uses it is enough.
        if self.fp32 or not slow_bf16():
            contenders[BNB] = lambda: dY @ self.bnb.dequantize_4bit(self.packed, self.state)
        targets = {}
        if not self.fp32:
            dY32 = dY.float()
            contenders["ours fp32"] = lambda: self.ops.gemm_4bit_backward(dY32, *self.w4)
            targets = {"ours fp32": 1 / 1.15, **({DENSE: 20} if slow_bf16() else {})}
        return self.row(f"dX M={M}", contenders, targets)

    def lora(self, M: int, r: int = 8) -> Row:
        """y = x W^T + s (x A^T) B^T, compared with the three products of an unfused layer."""
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
            DENSE: lambda: F.linear(x, self.weight) + F.linear(F.linear(x, a), b) * 2.0,
        }
        return self.row(f"linear + LoRA r={r} M={M}", contenders, {})

    def lora_backward(self, M: int, r: int = 8) -> Row:
        """dX, dA and dB of the layer in lora()."""
        torch = self.torch
        x, dY = torch.randn(M, self.K).to(self.dtype), torch.randn(M, self.N).to(self.dtype)
        A, B = torch.randn(r, self.K), torch.randn(self.N, r)
        a, b = A.to(self.dtype), B.to(self.dtype)
        S = x.float() @ A.t() * 2.0
        s = S.to(self.dtype)

        def unfused(weight):
            dS = dY @ b * 2.0
            return dY @ weight() + dS @ a, dS.t() @ x, dY.t() @ s

        contenders = {
            OURS: lambda: self.ops.lora_gemm_4bit_backward(dY, x, S, *self.w4, A, B, 2.0, True),
            BNB: lambda: unfused(lambda: self.bnb.dequantize_4bit(self.packed, self.state)),
            DENSE: lambda: unfused(lambda: self.weight),
        }
        if not self.fp32 and slow_bf16():
            contenders = {OURS: contenders[OURS]}
        return self.row(f"dX, dA, dB of LoRA r={r} M={M}", contenders, {})

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
    """Whether torch has instructions for bf16 products on this CPU."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def slow_bf16() -> bool:
    """Whether torch's bf16 runs without instructions for it."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" or not has_bf16()


def op_rows(quick: bool, part: str, rounds: int):
    """All cases of the table's shape, then real layers' shapes with this CPU's instructions."""
    import torch

    Ms = (1, 16, 256) if quick else (1, 4, 16, 64, 256, 512, 2048)
    for dtype in (torch.float32, torch.bfloat16):
        square = Ops(*TABLE_SHAPE, dtype, rounds)
        yield square.quantize()
        yield square.dequantize()
        for M in Ms:
            # bf16 without its instructions takes seconds there, and says no more than M = 512.
            if M < 2048 or square.fp32 or not slow_bf16():
                yield square.linear(M)
        if not quick or square.fp32:
            yield square.backward(512)
        for M in (1, 512):
            yield square.lora(M)
        yield square.lora_backward(512)
        yield square.merge()
    if quick or part != "native":
        return
    for N, K in ((4096, 11008), (576, 576), (1536, 576), (576, 1536)):
        for dtype in (torch.float32, torch.bfloat16):
            layer = Ops(N, K, dtype, rounds)
            for M in Ms:
                yield layer.linear(M)
            yield layer.backward(512)


def overhead_rows(rounds: int):
    """The overhead of a call besides its arithmetic: a tiny layer at M = 1."""
    import torch

    import qlora_ext

    plain = torch.nn.Linear(64, 64)
    packed = qlora_ext.nn.Linear4bit.from_linear(plain)
    x = torch.randn(1, 64)
    x_grad = torch.randn(1, 64, requires_grad=True)

    def under_no_grad(layer):
        with torch.no_grad():
            layer(x)

    for case, target, call in (
        ("tiny layer, no_grad", 1 / 2, under_no_grad),
        ("tiny layer, with gradients", 1 / 2.5, lambda layer: layer(x_grad)),
    ):
        contenders = {OURS: lambda c=call: c(packed), "dense": lambda c=call: c(plain)}
        yield Row(case, "64x64", interleave(contenders, 5 * rounds), {"dense": target})


# A whole model -----------------------------------------------------------------------------------


def smollm2(dtype):
    """A model of SmolLM2-135M's shape. Its weights are random, which does not change the time."""
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
    """The saved model, loaded by a contender: 'ours', 'bitsandbytes', or 'dense'."""
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
    """PEFT's LoRA on every linear layer except the head, the same for all contenders."""
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
    names = (OURS, BNB, DENSE)
    shape = "SmolLM2-135M"
    our_fp32 = {}
    for label in dtypes:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[label]
        with tempfile.TemporaryDirectory() as folder:
            smollm2(dtype).save_pretrained(folder)
            models = {}

            def loading(name, folder=folder, models=models, dtype=dtype):
                models[name] = load_as(name, folder, dtype)

            loads = interleave({name: lambda n=name: loading(n) for name in names}, 3)
            yield Row(f"load {label}", shape, loads, {})
            quantizing = {name: max(1.0, loads[name] - loads[DENSE]) for name in (OURS, BNB)}
            yield Row(
                f"quantize on load {label}", shape, quantizing, {BNB: 10}, "load - dense load"
            )

            steps = {name: training_step(with_adapters(model)) for name, model in models.items()}
            targets = {BNB: 1.0, DENSE: 1.0} if label == "fp32" else {}
            if label == "bf16" and slow_bf16():
                targets = {BNB: 15.0}
                del steps[DENSE]  # as slow as bitsandbytes: a minute or two
            times = interleave(steps, max(3, rounds // 2))
            times.update(our_fp32)
            our_fp32 = {"ours fp32": times[OURS]}
            tokens = ", ".join(f"{name} {2 * 192e3 / ms:.0f}" for name, ms in times.items())
            yield Row(f"training step {label}", shape, times, targets, f"tokens/s: {tokens}")

            # Loaded again: for eval() bitsandbytes repacks its weights, and then cannot train.
            del steps
            models.clear()
            models = {name: load_as(name, folder, dtype) for name in names}
            prompt = torch.randint(0, 49152, (1, 16))
            generate = {name: generation(model, prompt) for name, model in models.items()}
            times = interleave(generate, max(3, rounds // 2))
            tokens = ", ".join(f"{name} {16e3 / ms:.1f}" for name, ms in times.items())
            yield Row(f"generate 16 tokens {label}", shape, times, {}, f"tokens/s: {tokens}")


def generation(model, prompt):
    """Greedy generation of 16 tokens after a prompt of 16."""
    length = {"max_new_tokens": 16, "min_new_tokens": 16}
    return lambda: model.generate(prompt, do_sample=False, **length)


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
    # Not getrusage: its maximum survives exec, so it would be the parent's.
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
    """Bandwidth and arithmetic of our ops, next to those of plain copies and products here."""
    import torch

    from qlora_ext import build_info, quantize_4bit

    N, K = TABLE_SHAPE
    weight = torch.randn(N, K)
    w4 = quantize_4bit(weight).op_args()
    target = torch.empty_like(weight)
    x, X = torch.randn(1, K), torch.randn(512, K)
    ops = torch.ops.qlora_ext
    ms = interleave(
        {
            "copy": lambda: target.copy_(weight),
            "read": lambda: torch.mv(weight, x[0]),
            "write": lambda: target.fill_(1.0),
            "decode": lambda: ops.dequantize_4bit.out(*w4, out=target),
            "M=1": lambda: ops.gemm_4bit(x, *w4),
            "M=512": lambda: ops.gemm_4bit(X, *w4),
            "dense M=512": lambda: torch.nn.functional.linear(X, weight),
        },
        rounds,
    )
    gb, gflop = 1e-6, 1e-6
    result = {
        "plain copy GB/s (read + write)": 2 * 4 * N * K * gb / ms["copy"],
        "plain read GB/s (dense fp32 at M=1)": 4 * N * K * gb / ms["read"],
        "plain write GB/s (fill)": 4 * N * K * gb / ms["write"],
        "dequantize fp32 GB/s (read + write)": (4 + 0.516) * N * K * gb / ms["decode"],
        "linear M=1 GB/s of packed bytes": 0.516 * N * K * gb / ms["M=1"],
        "linear M=1 weights per ns": N * K * 1e-6 / ms["M=1"],
        "linear M=512 GFLOP/s": 2 * 512 * N * K * gflop / ms["M=512"],
        "dense M=512 GFLOP/s": 2 * 512 * N * K * gflop / ms["dense M=512"],
    }
    for rows, count in instructions_per_weight(build_info()["cpu_path"]).items():
        result[f"linear M={rows} instructions per weight (inner loop)"] = count
    return result


def instructions_per_weight(path: str) -> dict[int, float]:
    """Instructions per weight in the dot product's loop with 1 and with 4 rows of x, counted in the
    disassembled library. Empty if there is no objdump or no such loop."""
    import qlora_ext

    if shutil.which("objdump") is None or not path.startswith("avx"):
        return {}
    library = next(Path(qlora_ext.__file__).parent.glob("_C.*.so"))
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    # A word that marks the path's table look-up, and the weights that one turn of its loop decodes.
    mark, weights = ("zmm", 128) if path.startswith("avx512") else ("vpshufb", 64)
    result = {}
    for rows in (1, 4):
        for body in re.findall(rf"dot_rows<{rows}>\([^\n]*>:\n(.*?)\n\n", text, re.DOTALL):
            lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", body, re.MULTILINE)
            at = {address: i for i, (address, _) in enumerate(lines)}
            jumps = [
                (at[target], i)
                for i, (_, code) in enumerate(lines)
                for target in re.findall(r"^j\w+\s+([0-9a-f]+)\b", code)
                if at.get(target, i) < i
            ]
            for first, last in jumps:
                loop = [code for _, code in lines[first : last + 1]]
                innermost = not any(first <= f and e < last for f, e in jumps)
                whole = all(any(w in code for code in loop) for w in (mark, "prefetch", "vfmadd"))
                groups = sum("prefetch" in code for code in loop)
                # dot_any decodes 32 weights per turn, and has fewer look-ups than a group.
                lookups = sum(bool(re.match("vpshufb|vpermps", code)) for code in loop)
                if innermost and whole and lookups == 8 * groups:
                    result[rows] = len(loop) / (weights * groups)
    return result


# Reports ------------------------------------------------------------------------------------------


def print_row(row: Row) -> None:
    """One line: our time, then each contender's and how many times faster we are."""
    others = "  ".join(
        f"{name} {ms:.2f} ({row.ratio(name):.2f}x)" for name, ms in row.ms.items() if name != OURS
    )
    line = f"{row.case:30s} {row.shape:13s} ours {row.ms[OURS]:9.3f} ms  {others}  "
    print(f"{line}{row.verdict()}  {row.note}".rstrip(), flush=True)


def plot(parts: dict[str, dict], title: str, path: Path) -> None:
    """Ratios as targets: how many times faster than bitsandbytes and than torch's dense layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest = max(len(part["rows"]) for part in parts.values())
    figure, axes = plt.subplots(
        1, len(parts), figsize=(8 * len(parts), 0.2 * tallest + 1.5), squeeze=False
    )
    colours = ((-0.2, BNB, "tab:blue"), (0.2, DENSE, "tab:orange"))
    for axis, (name, part) in zip(axes[0], parts.items(), strict=True):
        rows = as_rows(part)
        for offset, contender, colour in colours:
            points = [
                (i, row.ratio(contender)) for i, row in enumerate(rows) if contender in row.ms
            ]
            heights = [i + offset for i, _ in points]
            axis.barh(heights, [r for _, r in points], 0.38, color=colour, label=contender)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yticks(range(len(rows)), [f"{row.case}  {row.shape}" for row in rows], fontsize=6)
        axis.set_ylim(len(rows), -1)
        axis.set_xlabel("times faster than")
        axis.set_title(f"{name}: our path {part['machine']['path']}", fontsize=9)
        axis.legend(loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def as_rows(part: dict) -> list[Row]:
    """The rows of one part of a results file."""
    names = [field.name for field in dataclasses.fields(Row)]
    return [Row(**{name: row[name] for name in names}) for row in part["rows"]]


def verdicts(rows: list[Row]) -> str:
    """How many targets were met, and which were not."""
    held = [met for row in rows for met in row.held().values()]
    missed = [
        f"{row.case}: {row.verdict()[8:]}" for row in rows if row.verdict() not in ("", "met")
    ]
    return "\n".join([f"{sum(held)} of {len(held)} targets met", *missed])


BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def number(ms: float) -> str:
    """Three digits."""
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 0.1 else 4}f}"


def markdown(record: dict, source: str) -> str:
    """The tables of a results file: targets first, then all other rows, then the profile."""
    machine = record["parts"]["native"]["machine"]
    lines = [
        f"{machine['cpu']}, threads: {machine['threads']} ({machine['clock']} time), "
        f"{record['date']}, torch {machine['torch']}, bitsandbytes {machine['bitsandbytes']}, "
        f"torchao {machine['torchao']}. "
        f"Other processes took {100 * record['others']:.0f}% of the machine meanwhile.",
        f"From `{source}`; milliseconds, and in brackets how many times faster we are.",
    ]
    for name, part in record["parts"].items():
        rows, path = as_rows(part), part["machine"]["path"]
        limit = "what this CPU has" if name == "native" else "AVX2 at most, on every side"
        uses = part["machine"]["bitsandbytes uses"]
        lines += ["", f"### {name}: {limit} (our path: {path}; bitsandbytes: {uses})", ""]
        lines += [f"{verdicts(rows).splitlines()[0]}.", ""]
        lines += ["| case | shape | ours | bitsandbytes | dense | others | targets |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            cells = {
                other: f"{number(row.ms[other])} ({row.ratio(other):.2g}x)"
                for other in row.ms
                if other != OURS
            }
            rest = ", ".join(f"{k} {v}" for k, v in cells.items() if k not in (BNB, DENSE))
            targets = ", ".join(
                f"{'' if met else '**'}{other} {round(row.targets[other], 2):g}x"
                f"{' met' if met else f': {row.ratio(other):.2f}x**'}"
                for other, met in row.held().items()
            )
            columns = (cells.get(BNB, ""), cells.get(DENSE, ""), rest, targets)
            lines.append(
                f"| {row.case} | {row.shape} | {number(row.ms[OURS])} | "
                + " | ".join(columns)
                + " |"
            )
        if part["peak_memory_gb"]:
            peaks = ", ".join(f"{k} {v:.2f} GB" for k, v in part["peak_memory_gb"].items())
            lines += ["", f"Peak memory of loading the model and one fp32 training step: {peaks}."]
        if part["profile"]:
            lines += ["", f"| where the time goes ({name}) | |", "|---|---|"]
            lines += [f"| {key} | {value:.3g} |" for key, value in part["profile"].items()]
    return "\n".join(lines)


def write_table(results: Path, document: Path) -> None:
    """Puts a results file's tables between the marks of a document."""
    table = markdown(json.loads(results.read_text()), f"bench/results/{results.name}")
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    text = f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"
    document.write_text(text, encoding="utf-8")
    print(f"wrote the tables of {results} into {document}")


# Running ------------------------------------------------------------------------------------------


def run_part(args: argparse.Namespace) -> dict:
    """One part's rows, measured in this process, whose libraries have been limited already."""
    import bitsandbytes
    import torch

    import qlora_ext

    torch.set_num_threads(args.threads)
    ao = torchao_nf4()
    machine = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "clock": "one thread's CPU" if args.cpu_time else "wall",
        "path": qlora_ext.build_info()["cpu_path"],
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "bitsandbytes uses": limit_bitsandbytes()
        if args.part == "avx2"
        else "AVX-512"
        if torch.cpu._is_avx512_supported()
        else "no AVX-512",
        "torchao": version("torchao") if ao else "not installed",
        "load before": os.getloadavg()[0],
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    rows, memory, where = [], {}, {}

    def collect(source):
        for row in source:
            rows.append(row)
            print_row(row)

    if not args.no_ops:
        collect(op_rows(args.quick, args.part, args.rounds))
        collect(overhead_rows(args.rounds))
        where = profile(args.rounds)
        print("\n".join(f"{key}: {value:.3g}" for key, value in where.items()))
    if not args.no_model:
        collect(model_rows(args.rounds, tuple(args.model_dtypes.split(","))))
        if args.part == "native":
            memory = memory_table()
            peaks = "  ".join(f"{name} {gb:.2f} GB" for name, gb in memory.items())
            print("peak memory of a training step:", peaks)
    machine["load after"] = os.getloadavg()[0]
    return {
        "machine": machine,
        "rows": [{**dataclasses.asdict(row), "verdict": row.verdict()} for row in rows],
        "peak_memory_gb": memory,
        "profile": where,
    }


def version(package: str) -> str:
    """An installed package's version."""
    from importlib.metadata import version as installed

    return installed(package)


def run_all(args: argparse.Namespace) -> None:
    """Runs every part in its own process, and writes one JSON and one PNG of all."""
    import torch

    others, start = Others(), time.perf_counter()
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("native", "avx2") if torch.cpu._is_avx512_supported() else ("native",):
            print(f"== {part}", flush=True)
            result = Path(folder) / "part.json"
            again = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--json", str(result)]
            subprocess.run(again, check=True)
            parts[part] = json.loads(result.read_text())
    record = {
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - start),
        "others": others.share(),
        "parts": parts,
    }
    machine = parts["native"]["machine"]
    for name, part in parts.items():
        print(f"== {name} ({part['machine']['path']}): {verdicts(as_rows(part))}")
    busy = f"load {machine['load before']:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    print(f"other processes took {100 * record['others']:.0f}% of the machine ({busy})")
    args.out.mkdir(parents=True, exist_ok=True)
    cpu = re.sub(r"\W+", "-", machine["cpu"].replace("Processor", "")).strip("-").lower()
    stem = args.out / f"cpu-{cpu}-{os.cpu_count()}-cores-{record['date']}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"{machine['cpu']}, threads: {machine['threads']}, {record['date']}"
    plot(parts, title, stem.with_suffix(".png"))
    print(f"wrote {stem}.json and .png in {record['seconds']} s")


def restart_with(settings: dict[str, str]) -> None:
    """Starts this program again with these environment variables, unless it has them: malloc and
    the libraries read them when they load."""
    if any(os.environ.get(key) != value for key, value in settings.items()):
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("native", "avx2"), help="only this, and no files")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU time")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--no-ops", action="store_true", help="only the model's rows")
    parser.add_argument("--no-model", action="store_true", help="only the ops' rows")
    parser.add_argument("--model-dtypes", default="fp32,bf16", help="dtypes of the model's rows")
    parser.add_argument("--rounds", type=int, default=9, help="at most, for each row")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", type=Path, metavar="JSON", help="write its tables and end")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "cpu.md", help="for --table")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--measure-memory", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.table:
        return write_table(args.table, args.doc)
    if args.measure_memory:
        return measure_memory(*args.measure_memory)
    if args.cpu_time:
        global clock
        clock, args.threads = time.process_time, 1
    if args.part is None:
        return run_all(args)
    restart_with({**TOUCHED, **(AVX2 if args.part == "avx2" else {})})
    result = run_part(args)
    if args.json:
        args.json.write_text(json.dumps(result))
    else:
        print(verdicts(as_rows(result)))


if __name__ == "__main__":
    main()
