"""A kernel's main loop with what its instructions need: the control bits, the pipe, the PTX line.

kernel_report.py finds the loop. The 128-bit encodings that nvdisasm prints have the control bits
from bit 105 on: stall (4 bits), yield (1), the barriers that a variable-latency instruction sets
when it has written (3) and read (3), and a mask of barriers that an instruction waits for (6). See
Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826;
sm_80 to sm_90 have the same.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

import kernel_report
from kernel_report import modifiers, opcode
from sass_flow import find_tool, run

NO_BARRIER = 7
SHARED = {"LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS"}
PIPES = {
    "tensor": "HMMA HGMMA IMMA",
    "imad": "IMAD",
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 FSWZADD",
    "convert": "F2FP I2FP",
    "sfu": "MUFU F2F I2F F2I FRND DADD DMUL DFMA DSETP POPC FLO BREV",
    "lsu": "LDS STS LDSM STSM SHFL ATOMS LDG STG LDGSTS RED ATOMG ATOM LD ST LDL STL CCTL LDC",
    "control": "BRA BSSY BSYNC BAR NOP WARPSYNC EXIT RET CALL DEPBAR LDGDEPBAR WARPGROUP SYNCS "
    "BREAK YIELD ERRBAR MEMBAR PREEXIT ACQBULK",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    control: int = 0
    line: int | None = None  # of the PTX

    @functools.cached_property
    def opcode(self):
        return opcode(self.text)

    @property
    def stall(self):
        return self.control & 15

    @property
    def sets_written(self):
        return self.control >> 5 & 7

    @property
    def sets_read(self):
        return self.control >> 8 & 7

    @property
    def waits(self):
        mask = self.control >> 11 & 63
        return tuple(i for i in range(6) if mask >> i & 1)

    @property
    def never_runs(self):
        return self.text.startswith("@!PT")

    @functools.cached_property
    def pipe(self):
        if self.opcode in PIPE_OF:
            return PIPE_OF[self.opcode]
        # Uniform registers have a datapath of their own. Everything else is integer and logic.
        uniform = self.opcode.startswith("U") or self.opcode in ("R2UR", "S2UR", "VOTEU")
        return "uniform" if uniform else "alu"

    @property
    def touches_shared(self):
        return self.opcode in SHARED

    @functools.cached_property
    def bytes(self):
        """Of each lane's access."""
        if self.opcode in ("LDSM", "STSM"):
            return 16
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[m] for m in modifiers(self.text) if m in sizes), 4)

    @functools.cached_property
    def flops(self):
        """Of one tensor-core instruction: HMMA.16816 is 16x8 results of depth 16."""
        if self.pipe != "tensor":
            return 0
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[modifiers(self.text)[0]]
        return 2 * m * n * k


LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
FIRST_HALF = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s.*?;\s+/\* 0x[0-9a-f]{16} \*/")
SECOND_HALF = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/")


@functools.cache
def annotations(cubin):
    """{function: {address: (control bits, PTX line)}}"""
    found, function, line, pending = {}, None, None, None
    for text in run(find_tool("nvdisasm"), "-gp", "-hex", "-c", cubin).splitlines():
        if text.startswith(".text."):
            function, line = found.setdefault(text[6:].rstrip(":"), {}), None
        elif "//##" in text:
            if m := LINE.search(text):
                line = int(m[1])
        elif pending is None:
            if "/*" in text and function is not None and (m := FIRST_HALF.match(text)):
                pending = int(m[1], 16)
        elif m := SECOND_HALF.match(text):
            function[pending] = int(m[1], 16) >> 41 & 0x1FFFF, line
            pending = None
    return found


@dataclasses.dataclass
class Loop:
    """A kernel's main loop, and how many instructions stand before and after it."""

    kernel: kernel_report.Kernel
    code: list
    before: int
    after: int

    def counts(self):
        """Instructions per pipe."""
        return collections.Counter(i.pipe for i in self.code)

    def without(self, never_ran):
        """This loop without the basic blocks with an instruction for which never_ran is true."""
        kept = [block for block in basic_blocks(self.code) if not any(map(never_ran, block))]
        return dataclasses.replace(self, code=[i for block in kept for i in block])


def basic_blocks(code):
    targets = set()
    for i in code:
        if m := re.search(r"\b(?:BRA|BSSY|CALL)\b.*?(0x[0-9a-f]+)\s*$", i.text):
            targets.add(int(m[1], 16))
    blocks, block = [], []
    for i in code:
        if block and i.address in targets:
            blocks.append(block)
            block = []
        block.append(i)
        if i.opcode in ("BRA", "EXIT", "CALL", "RET"):
            blocks.append(block)
            block = []
    return [*blocks, block] if block else blocks


def main_loop(kernel, cubin, bounds=None):
    """The Loop of one of kernel_report.disassemble's kernels; without a loop, all of its code.
    `bounds`: the addresses of another loop than loop_bounds() finds."""
    notes = annotations(cubin)[kernel.mangled]
    code = [
        Instruction(address, text, *notes.get(address, (0, None)))
        for address, text in kernel.code
        if opcode(text) != "NOP"
    ]
    end = max(i.address for i in code if i.opcode == "EXIT")  # subroutines stand behind it
    first, last = bounds or kernel.loop_bounds() or (code[0].address, end)
    # Behind a barrier that reduces stands what only the last block of a tile does (last_block.cuh).
    reducing = [i.address for i in code if i.address > last and i.text.startswith("BAR.RED")]
    end = min([end, *reducing])
    return Loop(
        kernel,
        [i for i in code if first <= i.address <= last and not i.never_runs],
        sum(i.address < first for i in code),
        sum(last < i.address <= end for i in code),
    )
