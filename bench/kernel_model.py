"""Predicts how long each CUDA kernel takes on an A100, H100, H200 and 4090, and whether it meets
its goal. No GPU is used, and none has run these kernels yet.

    python bench/kernel_model.py                 # the rows that have a goal
    python bench/kernel_model.py --all           # the whole page
    python bench/kernel_model.py --write         # renews docs/generated/kernel_model.md
    python bench/kernel_model.py --peers FOLDER  # the model on kernels of known speed

It simulates the main loop of each kernel's SASS, and adds blocks in waves, bytes over bandwidth,
and launches (docs/kernels.md, "Predicted"). --write refuses a table in which a row got more than
5% slower; --slower allows it. --peers needs a folder that pip filled:

    pip install --no-deps --only-binary=:all: --python-version 3.11 --target FOLDER \\
        bitsandbytes==0.50.2 auto-gptq==0.7.1
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import kernel_report
from predict import cases, goals, ops, page, peers
from predict.assumptions import ASSUMPTIONS, FAST, SLOW

PAGE = page.PAGE
PEERS = PAGE.with_name("kernel_model_peers.md")
TOLERANCE = 1.05
HEADER = ["op", "N x K", "M", "us, low", "high", "what binds", "its share", "goal", "model", ""]


@dataclasses.dataclass(frozen=True)
class Row:
    gpu: str
    op: str
    shape: str
    M: int | None
    low: float
    high: float
    binds: str
    share: float
    goal: str = ""
    model: str = ""
    verdict: str = ""

    def cells(self):
        times = [f"{self.low:.1f}", f"{self.high:.1f}"]
        share = f"{self.share:.0%}"
        found = [self.goal or None, self.model or None, self.verdict or None]
        return [f"`{self.op}`", self.shape, self.M, *times, self.binds, share, *found]


def columns_of(op):
    """The lengths that an op of one dimension depends on."""
    side = 0 if op == "lora_expand_backward" else 1
    return sorted({layer[side] for layer in cases.LAYERS})


def rows_of(gpu):
    for op, run in (("dequantize_4bit", ops.dequantize), ("quantize_4bit", ops.quantize)):
        for N, K in cases.LAYERS:
            yield row(gpu, op, None, N, K, run, N, K)
    for N, K in cases.LAYERS:
        for M in cases.ROWS:
            for op in cases.PRODUCTS:
                yield row(gpu, op, M, N, K, ops.product, op, M, N, K)
            yield row(gpu, "lora_gemm_4bit", M, N, K, ops.lora_forward, M, N, K)
            yield row(gpu, "lora_backward", M, N, K, ops.lora_backward, M, N, K)
    for op in cases.GROUPED:
        for N, K in cases.EXPERT_LAYERS:
            for tokens in cases.TOKENS:
                yield row(gpu, op, tokens, N, K, ops.grouped, op, tokens, N, K)
    for op in cases.LORA:
        for columns in columns_of(op):
            for M in cases.ROWS:
                yield row(gpu, op, M, None, columns, getattr(ops, op), M, columns)


def row(gpu, op, M, N, K, parts, *arguments):
    fast, slow = (parts(gpu, scenario, *arguments) for scenario in (FAST, SLOW))
    low, high = ops.total(fast), ops.total(slow)
    limits = ops.limits(slow)
    binds = max(limits, key=limits.get)
    goal = goals.goal_of(gpu, op, M, N, K) if N else None
    judged = ()
    if goal:
        worst, best, verdict = goal.judge(gpu)
        figures = f"{worst:.0%} to {best:.0%}" if "%" in goal.text else f"{worst:.2f} to {best:.2f}"
        judged = goal.text, figures, verdict
    experts = f"{cases.EXPERTS}x" if op in cases.GROUPED else ""
    shape = f"{experts}{N}x{K}" if N else str(K)
    return Row(gpu.name, op, shape, M, low, high, binds, limits[binds] / high, *judged)


def all_rows():
    """Of each GPU in turn, by op."""
    order = ("dequantize_4bit", "quantize_4bit", *cases.PRODUCTS, "lora_gemm_4bit", "lora_backward")
    order += cases.GROUPED + cases.LORA
    return [r for gpu in cases.GPUS for r in sorted(rows_of(gpu), key=lambda r: order.index(r.op))]


# ---------------------------------------------------------------- the page

TITLE = """\
# How long the kernels take, by the model

Made by `python bench/kernel_model.py --write`. **No GPU has run these kernels**: every figure is
predicted ([kernels.md](../kernels.md), "Predicted", says how, and how wrong the model was on
kernels whose speed is known). Rank {rank}, bf16, NF4 with block size 64 and nested scales. What
binds takes "its share" of the high end's time. `latency, X` means that no pipe is busy for 80% of
the time, and that X is the busiest. A goal is met only if every combination of the assumptions
below meets it, and missed if none does. Grouped products are those of a mixture of experts: M
counts tokens, and each takes {top} of {experts} experts at random.

"""


def markdown(rows):
    text = TITLE.format(rank=cases.RANK, top=cases.TOP, experts=cases.EXPERTS) + "## Goals\n\n"
    text += kernel_report.table(
        ["GPU", "met", "undecided", "missed"],
        [
            [gpu.name, *(count(rows, gpu.name, v) for v in ("met", "undecided", "missed"))]
            for gpu in cases.GPUS
        ],
    )
    for gpu in cases.GPUS:
        text += f"\n\n## {gpu.name}\n\n"
        text += kernel_report.table(HEADER, [r.cells() for r in rows if r.gpu == gpu.name])
    text += (
        "\n\n## Assumptions\n\nThe low end takes the fast values, the high end the slow ones.\n\n"
    )
    text += kernel_report.table(
        ["assumption", "for", "fast", "slow", "unit", "source"],
        [
            [a.name, ", ".join(map(str, a.where)) or "all", a.fast, a.slow, a.unit, a.source]
            for a in ASSUMPTIONS
        ],
    )
    return text + "\n"


def count(rows, gpu, verdict):
    return sum(r.gpu == gpu and r.verdict == verdict for r in rows)


def slower(rows):
    """Messages about the rows that got more than 5% slower than the page says."""
    before, found = page.committed(), []
    for r in rows:
        key = r.gpu, r.op, r.shape, "-" if r.M is None else str(r.M)
        for end, now, then in zip(("low", "high"), (r.low, r.high), before.get(key, ())):
            if now > TOLERANCE * then + 0.05:  # the page has one decimal
                found.append(f"{' '.join(key)}: {end} end {then:.1f} -> {now:.1f} us")
    return found


def goal_table(rows):
    """The rows that have a goal, as text."""
    header = ["GPU", *HEADER]
    return kernel_report.table(header, [[r.gpu, *r.cells()] for r in rows if r.goal])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="print the whole page")
    parser.add_argument("--write", action="store_true", help="renew docs/generated/kernel_model.md")
    parser.add_argument("--slower", action="store_true", help="write it though rows got slower")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="check it on others' kernels")
    arguments = parser.parse_args()
    if sentence := kernel_report.missing_tools():
        sys.exit(sentence.replace("kernel_report", "kernel_model"))
    if arguments.peers is not None:
        text = peers.report(arguments.peers)
        if arguments.write:
            PEERS.write_text(text, encoding="utf-8")
        print(text, end="")
        return
    rows = all_rows()
    if arguments.write:
        if (worse := slower(rows)) and not arguments.slower:
            sys.exit(
                "\n".join(["kernel_model: slower than the page (--slower allows it):", *worse])
            )
        PAGE.write_text(markdown(rows), encoding="utf-8")
        return
    print(markdown(rows) if arguments.all else goal_table(rows))


if __name__ == "__main__":
    main()
