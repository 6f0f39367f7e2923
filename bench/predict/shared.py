"""Shared-memory wavefronts from the addresses that the lanes of a warp access.

`wavefronts` counts them. emulated.json has what it counted over the addresses of the emulated
machine, which runs the PTX (tests/simt/record.py makes the file). `of_loop` gives them to the SASS
instructions that ptxas made of that PTX.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

RECORD = Path(__file__).with_name("emulated.json")
BANKS = 32  # of four bytes


def _conflicts(words):
    """How many different words the fullest bank has to deliver."""
    banks = [0] * BANKS
    for word in set(words):
        banks[word % BANKS] += 1
    return max(banks, default=0)


def wavefronts(addresses, size):
    """(least, most) wavefronts of one access of `size` bytes by each of the given lanes, a dict
    {lane: address}. Least: the warp's words are served in any order. Most: 8-byte accesses go by
    half warps and 16-byte ones by quarters, as NVIDIA's profilers count them."""
    words = {
        lane: range(address // 4, (address + size + 3) // 4) for lane, address in addresses.items()
    }
    least = _conflicts([word for of_lane in words.values() for word in of_lane])
    group = {8: 16, 16: 8}.get(size, 32)
    most = sum(
        _conflicts([w for lane, of_lane in words.items() if lane // group == part for w in of_lane])
        for part in range(32 // group)
    )
    return least, most


# ---------------------------------------------------------------- which PTX instruction it was

ACCESS = re.compile(
    r"^\s*(?:@!?%\w+\s+)?(?:(?:ld|st|atom)(?:\.\w+)*\.shared|ldmatrix|cp\.async\.c[ga]\.shared)"
)


@functools.cache
def accesses(ptx):
    """{kernel: {line: n}}: the n-th instruction of each PTX function that touches shared memory."""
    found, lines = {}, None
    for number, text in enumerate(Path(ptx).read_text().splitlines(), 1):
        if m := re.search(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*\(", text):
            lines = found.setdefault(m[1], {})
        elif lines is not None and ACCESS.match(text):
            lines[number] = len(lines)
    return found


@functools.cache
def record():
    return json.loads(RECORD.read_text())


class NotRecorded(LookupError):
    """emulated.json is older than the kernel."""


def counted(arch, kernel, rows):
    """{n: (bytes, warp-wide executions, least, most wavefronts)} of the traced block."""
    recorded = record()["shared"][arch].get(kernel, {})
    if str(rows) not in recorded:
        raise NotRecorded(f"{kernel} for {arch} with {rows} rows")
    return {entry[0]: entry[1:] for entry in recorded[str(rows)]}


def of_loop(loop, numbers, ran):
    """(least, most) wavefronts of each instruction of a SASS loop, in order; (0, 0) for those that
    do not touch shared memory. `numbers`: accesses() of the kernel's PTX; `ran`: counted(). An
    instruction that some warps skip counts as the mean."""
    turns = max((ran[numbers[i.line]][1] for i in loop if number_of(i, numbers) in ran), default=1)
    result = []
    for instruction in loop:
        number = number_of(instruction, numbers)
        if number not in ran:  # no lane of the traced block accessed anything
            result.append((0.0, 0.0))
            continue
        size, _, least, most = ran[number]
        if size != instruction.bytes:
            raise NotRecorded(f"{instruction.text} accesses {size} bytes in the recorded PTX")
        result.append((least / turns, most / turns))
    return result


def number_of(instruction, numbers):
    """Which access of the PTX a SASS instruction is; None if it does not touch shared memory."""
    if not instruction.touches_shared:
        return None
    if instruction.line not in numbers:
        raise NotRecorded(
            f"{instruction.text} matches no recorded access at PTX line {instruction.line}"
        )
    return numbers[instruction.line]
