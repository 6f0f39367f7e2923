"""`qlora-ext bench`: this machine's speed in a few seconds. The whole table is bench/cpu.py's."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..quantized_tensor import linear_4bit, lora_linear_4bit, quantize_4bit


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians in milliseconds."""

    what: str
    ours: float
    dense: float | None  # torch's own on the unquantized weight; None where there is none


def medians(calls: list[Callable], rounds: int, device: str) -> list[float]:
    """Milliseconds of each call, all in turn, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def bench(N: int, K: int, dtype: torch.dtype, device: str, rounds: int) -> list[Row]:
    """One [N, K] layer: quantizing it, multiplying by it at several row counts, a LoRA step."""
    torch.manual_seed(0)
    weight = torch.randn(N, K, device=device, dtype=dtype)
    q = quantize_4bit(weight)
    A = torch.randn(8, K, device=device, requires_grad=True)
    B = torch.randn(N, 8, device=device, requires_grad=True)
    rows = []
    (taken,) = medians([lambda: quantize_4bit(weight)], rounds, device)
    rows.append(Row("quantize", taken, None))
    for M in (1, 16, 256):
        x = torch.randn(M, K, device=device, dtype=dtype)
        with torch.no_grad():
            ours, dense = medians(
                [lambda x=x: linear_4bit(x, q), lambda x=x: F.linear(x, weight)], rounds, device
            )
        rows.append(Row(f"x W^T, {M} row{'s' if M > 1 else ''}", ours, dense))
    x = torch.randn(256, K, device=device, dtype=dtype, requires_grad=True)

    def step():
        lora_linear_4bit(x, q, A, B, 2.0).sum().backward()

    def dense_step():
        bypass = (x.float() @ A.T @ B.T * 2.0).to(dtype)
        (F.linear(x, weight) + bypass).sum().backward()

    ours, dense = medians([step, dense_step], rounds, device)
    rows.append(Row("LoRA r=8, 256 rows, both ways", ours, dense))
    return rows
