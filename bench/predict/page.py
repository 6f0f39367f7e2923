"""The committed predictions, read back from docs/generated/kernel_model.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generated" / "kernel_model.md"


def committed():
    """{(GPU, op, shape, M): (low, high)} in us; shape and M as the page writes them."""
    found, gpu = {}, None
    for line in PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else ():
        if m := re.fullmatch(r"## (\w+)", line):
            gpu = m[1]
        elif m := re.match(r"\| `(\w+)` \| (\S+) \| (\S+) \| ([\d.]+) \| ([\d.]+) \|", line):
            found[gpu, m[1], m[2], m[3]] = float(m[4]), float(m[5])
    return found


def of_device(name):
    """{(op, shape, M): (low, high)} of the page's GPU that a device's name contains as a word, such
    as H200 in "NVIDIA H200"; empty if the page has none."""
    return {
        tuple(row): times
        for (gpu, *row), times in committed().items()
        if re.search(rf"\b{gpu}\b", name)
    }
