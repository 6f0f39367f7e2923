"""The goals, and what the model says of each: met only if the pessimistic end meets the goal."""

from __future__ import annotations

import dataclasses

from . import ops
from .assumptions import ALL
from .cases import GROUPED, PACKED, PRODUCTS, RANK


@dataclasses.dataclass(frozen=True)
class Goal:
    """metric(gpu, scenario) compared with `want`; `at_most`: it should be no more than that."""

    text: str
    want: float
    at_most: bool
    metric: object

    def judge(self, gpu):
        """(low, high, verdict) over all scenarios, of two decimals."""
        values = [round(self.metric(gpu, scenario), 2) for scenario in ALL]
        low, high = min(values), max(values)
        worst, best = (high, low) if self.at_most else (low, high)

        def meets(value):
            return value <= self.want if self.at_most else value >= self.want

        return low, high, "met" if meets(worst) else "undecided" if meets(best) else "missed"


def at_most(text, want, metric):
    return Goal(text, want, True, metric)


def at_least(text, want, metric):
    return Goal(text, want, False, metric)


def share_of_copy(moved, parts):
    """The time to move these bytes once, as a share of what `parts` take."""

    def metric(gpu, scenario):
        floor = moved / scenario.value("memory", gpu) / 1e6
        return floor / ops.total(parts(gpu, scenario))

    return metric


def over(ours, other):
    def metric(gpu, scenario):
        return ops.total(ours(gpu, scenario)) / ops.total(other(gpu, scenario))

    return metric


# Set when the model was made. The goals for M = 1 and dequantize's small weight are for the next
# change to the decode kernels.
LORA_OVER_DENSE = {512: 1.06, 2048: 1.04, 8192: 1.03}
BACKWARD_OVER_PEFT = {512: 1.50, 2048: 1.18, 8192: 1.06}
DECODE_SHARE = {"H100": 0.90, "H200": 0.84}


def goal_of(gpu, op, M, N, K):
    """The Goal of one row, or None."""
    weight = N * K * PACKED + 2 * (M or 0) * (N + K)
    if op == "dequantize_4bit":
        share = 0.88 if N * K <= 4096 * 4096 else 0.92
        return at_least(
            f">= {share:.0%} of a copy",
            share,
            share_of_copy(N * K * (PACKED + 2), lambda g, s: ops.dequantize(g, s, N, K)),
        )
    if op == "gemm_4bit" and M <= 16:
        share = DECODE_SHARE.get(gpu.name, 0.80) if M == 1 else 0.75
        if (N, K) == (8192, 8192):
            return at_least(
                f">= {share:.0%} of memory",
                share,
                share_of_copy(weight, lambda g, s: ops.product(g, s, op, M, N, K)),
            )
    if op in PRODUCTS or (op in GROUPED and gpu.arch == 90):
        text, ours, theirs = "<= dequantize + cuBLAS", ops.product, ops.two_passes
        if op in GROUPED:
            text, ours, theirs = "<= torch._grouped_mm in bf16", ops.grouped, ops.grouped_mm
        shape = (K, N) if op.endswith("_backward") else (N, K)
        return at_most(
            text,
            1.0,
            over(lambda g, s: ours(g, s, op, M, N, K), lambda g, s: theirs(g, s, M, *shape)),
        )
    if op == "lora_gemm_4bit" and M in LORA_OVER_DENSE:
        return at_most(
            f"<= {LORA_OVER_DENSE[M]} x dense bf16",
            LORA_OVER_DENSE[M],
            over(
                lambda g, s: ops.lora_forward(g, s, M, N, K),
                lambda g, s: [ops.cublas(g, s, M, N, K)],
            ),
        )
    if op == "lora_backward" and M in BACKWARD_OVER_PEFT and (N, K) == (14336, 4096):
        faster = over(
            lambda g, s: ops.peft_backward(g, s, M, N, K),
            lambda g, s: ops.lora_backward(g, s, M, N, K),
        )
        want = BACKWARD_OVER_PEFT[M]
        return at_least(f">= {want} x faster than bitsandbytes + PEFT", want, faster)
    return None


assert RANK == 16  # the goals with adapters are stated for it
