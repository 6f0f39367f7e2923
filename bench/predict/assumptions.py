"""What the model assumes, each with a source. Nothing here was measured on a GPU by this project.

Every assumption has a fast and a slow value. A predicted time's low end takes the fast ones, its
high end the slow ones. To compare two times, such as ours and cuBLAS's, the model takes all
combinations of fast and slow by group: `issue` (how an SM runs instructions), `machine` (memory,
clocks, launches) and `cublas`. So a GPU's bandwidth is the same on both sides.

Change an assumption in a commit of its own, with the table before and after.
"""

from __future__ import annotations

import dataclasses
import functools

MICROBENCH = "Hopper and Ada microbenchmarks, arXiv 2402.13499 (A100, H100, 4090)"
GUIDE = "CUDA C++ programming guide, throughput of native instructions"
SHEET = "data sheet"


@dataclasses.dataclass(frozen=True)
class Assumption:
    """`where`: the GPUs (by name, or by compute capability) that it holds for; empty: all."""

    name: str
    group: str
    fast: float
    slow: float
    unit: str
    source: str
    where: tuple = ()


A = Assumption
CYCLES = "cycles of its SM quarter's pipe, per warp instruction"
ASSUMPTIONS = (
    A("alu", "issue", 2, 2, CYCLES, f"{GUIDE}: 64 lanes an SM (integer, logic, PRMT)"),
    A("fma", "issue", 2, 2, CYCLES, f"{GUIDE}: 64 lanes an SM", (80,)),
    A("fma", "issue", 1, 1, CYCLES, f"{GUIDE}: 128 lanes an SM", (86, 89, 90)),
    A("imad", "issue", 2, 2, CYCLES, f"{GUIDE}: 64 lanes an SM"),
    A("convert", "issue", 2, 4, CYCLES, f"{GUIDE}: 64 lanes an SM; slow: half (F2FP, I2FP)"),
    A("sfu", "issue", 8, 8, CYCLES, f"{GUIDE}: 16 lanes an SM"),
    A("uniform", "issue", 1, 2, CYCLES, "one uniform datapath a quarter; rate not published"),
    A("lsu", "issue", 2, 2, CYCLES, f"{GUIDE}: 16 lanes a quarter for addresses"),
    A(
        "mma share",
        "issue",
        0.65,
        0.60,
        "of the data sheet's tensor rate that mma.sync reaches",
        f"{MICROBENCH}: 62% on H100",
        (90,),
    ),
    A(
        "mma share",
        "issue",
        1.0,
        0.97,
        "of the data sheet's tensor rate that mma.sync reaches",
        f"{MICROBENCH}: all of it on A100 and 4090",
        (80, 86, 89),
    ),
    A(
        "wavefront rule",
        "issue",
        0,
        1,
        "0: a warp's words in any order; 1: by half and quarter warps",
        "how NVIDIA's profilers count shared-memory wavefronts",
    ),
    A("wavefront", "issue", 1, 1, "cycles of an SM", f"{GUIDE}: 128 bytes a cycle from 32 banks"),
    A(
        "shuffle",
        "issue",
        1,
        1,
        "cycles of an SM",
        f"{GUIDE}: 32 lanes an SM",
    ),
    A("shared latency", "issue", 27, 33, "cycles", f"{MICROBENCH}: 29 to 30"),
    A(
        "shared queue",
        "issue",
        64,
        32,
        "cycles of waiting wavefronts before a warp stalls",
        "not published; judgement",
    ),
    A("other latency", "issue", 18, 26, "cycles of SFU, IMAD.WIDE, conversions", MICROBENCH),
    A("barrier", "issue", 12, 30, "cycles from the last arrival to the next issue", MICROBENCH),
    A("load latency", "issue", 480, 900, "cycles", f"{MICROBENCH}: 466 to 542 idle; slow: loaded"),
    A(
        "starts",
        "issue",
        2,
        3,
        "loads that wait for each other before the first step",
        "the source",
    ),
    A("outside", "issue", 0.5, 1.0, "of a kernel's code outside its loop that runs", "judgement"),
    A("overlap", "issue", 64, 4, "p: two limits a, b take (a^p + b^p)^(1/p)", "judgement"),
    A("clock", "machine", 1.41, 1.35, "GHz", f"{SHEET}: boost; slow: under load", ("A100",)),
    A(
        "clock",
        "machine",
        1.92,
        1.70,
        "GHz",
        "1.98 seen under light load; 1.755 and less when busy",
        ("H100", "H200"),
    ),
    A("clock", "machine", 2.70, 2.52, "GHz", f"{SHEET}: boost 2.52; cards run above it", ("4090",)),
    A("clock", "machine", 1.69, 1.40, "GHz", f"{SHEET}: boost 1.695, 150 W", ("A10",)),
    A("memory", "machine", 1.75, 1.65, "TB/s", "copies on A100 80 GB reach 1.7 of 2.04", ("A100",)),
    A("memory", "machine", 3.05, 2.90, "TB/s", "3.0 measured elsewhere (kernels.md)", ("H100",)),
    A("memory", "machine", 4.40, 4.20, "TB/s", "4.3 measured elsewhere (kernels.md)", ("H200",)),
    A("memory", "machine", 0.93, 0.88, "TB/s", "copies on a 4090 reach 0.91 of 1.008", ("4090",)),
    A("memory", "machine", 0.54, 0.48, "TB/s", "0.6 by the data sheet, ECC off", ("A10",)),
    A("l2", "machine", 4.5, 3.5, "TB/s", "judgement", ("A100",)),
    A("l2", "machine", 6.5, 5.0, "TB/s", "judgement, around 5.5", ("H100", "H200")),
    A("l2", "machine", 4.5, 3.0, "TB/s", "judgement", ("4090",)),
    A("l2", "machine", 2.0, 1.4, "TB/s", "judgement", ("A10",)),
    A(
        "launch",
        "machine",
        0.8,
        1.3,
        "us from one kernel of a graph to the next",
        "judgement, around 1",
    ),
    A("tail", "machine", 0.4, 0.9, "us from the last store to the end of the kernel", "judgement"),
    A(
        "cublas",
        "cublas",
        285,
        262,
        "TFLOP/s",
        "dense bf16 on A100: 0.84 to 0.91 of 312",
        ("A100",),
    ),
    A("cublas", "cublas", 800, 740, "TFLOP/s", "788 to 798 measured elsewhere", ("H100", "H200")),
    A("cublas", "cublas", 163, 150, "TFLOP/s", f"0.91 to 0.99 of the {SHEET}", ("4090",)),
    A("cublas", "cublas", 95, 75, "TFLOP/s", f"0.6 to 0.76 of the {SHEET}, 150 W", ("A10",)),
    A(
        "cublas waves",
        "cublas",
        0.5,
        1.0,
        "of the last wave's idle SMs that are lost",
        "fast: split or stream-K products; slow: whole tiles",
    ),
    A("cublas small tiles", "cublas", 0.9, 0.8, "of the rate, with 64-row tiles", "judgement"),
    A(
        "grouped mm",
        "cublas",
        400,
        300,
        "TFLOP/s of torch._grouped_mm, rows filled up to tiles included",
        "slow: 242 without them, measured elsewhere on an H100 at 4096 tokens; fast: judgement",
        ("H100", "H200"),
    ),
    A("cublas start", "cublas", 1.0, 2.0, "us to fill and drain its pipeline", "judgement"),
)
GROUPS = ("issue", "machine", "cublas")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Whether each group takes its slow values."""

    issue: bool = False
    machine: bool = False
    cublas: bool = False

    @functools.cache  # noqa: B019  (there are eight)
    def value(self, name, gpu):
        found = [
            a
            for a in ASSUMPTIONS
            if a.name == name and (not a.where or gpu.name in a.where or gpu.arch in a.where)
        ]
        if len(found) != 1:
            raise LookupError(f"assumptions: {len(found)} named {name!r} for {gpu.name}, want 1")
        return found[0].slow if getattr(self, found[0].group) else found[0].fast


FAST, SLOW = Scenario(), Scenario(True, True, True)
ALL = tuple(
    Scenario(issue, machine, cublas)
    for issue in (False, True)
    for machine in (False, True)
    for cublas in (False, True)
)
