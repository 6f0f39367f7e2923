"""Our kernels as compiled, and what a launch of one costs: its blocks in waves, each block's turns
of the main loop, and the bytes that memory and L2 move."""

from __future__ import annotations

import dataclasses
import functools

import kernel_report

from . import issue, sass, shared
from .assumptions import Scenario
from .cases import GROUPED, Gpu

SOURCES = ("gemm_4bit", "gemm_4bit_backward", "lora", "dequantize_4bit", "quantize_4bit")
SOURCES += GROUPED
# Instructions of code that the modelled calls never run: adapters of 16 bits (they are fp32 here),
# ragged ends, atomics that report a NaN, 64-bit divisions for chunks with a gap.
NEVER_RUN = {
    "lora_rows_mma": ("LDG.E.U16",),
    "lora_columns_mma": ("LDG.E.U16",),
    "quantize_4bit_blocks": ("LDG.E.U16", "ATOM", "RED", "STG.E.U8", "CALL"),
    "dequantize_4bit_vector": ("CALL",),
}
FUSED, BACKWARD = "FusedTraits<{0}, {2}>", "BackwardTraits<{0}, {2}>"
# rows of x, columns of y and steps of the contraction of a block, and the steps of one turn
TILES = {
    "gemm_4bit_fused": (
        f"{FUSED}::kTileM",
        f"{FUSED}::kTileN",
        f"{FUSED}::kTileK",
        f"{FUSED}::kStages",
    ),
    "gemm_4bit_backward_fused": (
        f"{BACKWARD}::kTileM",
        f"{BACKWARD}::kTileK",
        f"{BACKWARD}::kStageN",
        "1",
    ),
    "lora_rows_mma": ("kLoraTile", "8 * {2}", "kLoraStep", "1"),
    "lora_columns_mma": ("kLoraTile", "8 * {2}", "kLoraStep", "1"),
    "dequantize_4bit_vector": ("kDequantizeThreads * kChunk", "1", "1", "1"),
    "quantize_4bit_blocks": ("kQuantizeTile", "1", "1", "1"),
}
for _name in ("gemm_4bit_fused", "gemm_4bit_backward_fused"):
    TILES[f"grouped_{_name}"] = TILES[_name]


@dataclasses.dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    step: int
    steps: int  # of one turn


@dataclasses.dataclass(frozen=True)
class Sm:
    """What a block takes of an SM."""

    threads: int
    registers: int
    shared: int

    def at_once(self, gpu):
        """Blocks that an SM of this GPU holds."""
        warps = -(-self.threads // 32)
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // warps
        by_shared = gpu.shared // (self.shared + 1024)
        return min(by_registers, gpu.threads // self.threads, by_shared, gpu.blocks)


@dataclasses.dataclass(eq=False)
class Compiled:
    kernel: kernel_report.Kernel
    loop: sass.Loop
    numbers: dict  # shared.accesses
    tile: Tile

    @property
    def sm(self):
        return Sm(self.kernel.threads, self.kernel.registers, self.kernel.shared)

    @functools.cache  # noqa: B019  (one per kernel, for the whole run)
    def code(self, rows):
        """(loop, wavefronts) with `rows` rows of x: without the blocks that the traced run and
        NEVER_RUN leave out."""
        ran = shared.counted(self.kernel.arch, self.kernel.name, rows)
        words = NEVER_RUN.get(self.kernel.base, ())

        def never_ran(i):
            if any(word in i.text for word in words):
                return True
            return i.touches_shared and shared.number_of(i, self.numbers) not in ran

        loop = self.loop.without(never_ran) if words else self.loop
        return loop.code, shared.of_loop(loop.code, self.numbers, ran)


@functools.cache
def sizes():
    """{kernel: threads, shared bytes, weights (kernel_report.KERNELS), and those of its Tile}"""
    names = sorted({name for kernels in shared.record()["shared"].values() for name in kernels})
    expressions = []
    for name in names:
        base, _, inside = name.rstrip(">").partition("<")
        arguments = [argument.strip() for argument in inside.split(",")]
        facts = (*kernel_report.KERNELS[base], *TILES[base])
        expressions += [e.format(*arguments) if e else "-1" for e in facts]
    values = iter(kernel_report.evaluate(expressions, "predicted_sizes"))
    return {name: tuple(next(values) for _ in range(7)) for name in names}


class Library:
    """All kernels that emulated.json names, for one binary."""

    def __init__(self, binary):
        self.binary = binary
        names = set(shared.record()["shared"][binary])
        found = []
        for source in SOURCES:
            cubin = kernel_report.compile_cubin(source, binary)
            numbers = shared.accesses(kernel_report.compile_ptx(source, binary))
            found += [
                (k, cubin, numbers[k.mangled])
                for k in kernel_report.disassemble(cubin, binary)
                if k.name in names
            ]
        if missing := names - {k.name for k, _, _ in found}:
            raise shared.NotRecorded(f"emulated.json names kernels that are gone: {missing}")
        self.kernels = {}
        for k, cubin, numbers in found:
            facts = sizes()[k.name]
            k.threads, k.shared, weights = facts[:3]
            k.weights = weights if weights > 0 else None
            self.kernels[k.name] = Compiled(k, sass.main_loop(k, cubin), numbers, Tile(*facts[3:]))

    def __getitem__(self, name):
        return self.kernels[name]


@functools.cache
def library(binary):
    return Library(binary)


@functools.cache
def turn(gpu: Gpu, name, rows, slow, blocks):
    """issue.Result of one turn with `blocks` blocks on an SM. GPUs of one architecture share it."""
    compiled = library(gpu.binary)[name]
    loop, waves = compiled.code(rows)
    warps = -(-compiled.kernel.threads // 32 // issue.QUARTERS) * blocks
    return issue.simulate(loop, waves, gpu, Scenario(issue=slow), warps, blocks)


_FIRST_OF = {}


def same_sm(gpu):
    """The first GPU with the same SM: what turn() is computed for."""
    key = gpu.arch, round(gpu.flops_per_cycle)
    return _FIRST_OF.setdefault(key, gpu)


# ---------------------------------------------------------------- one launch


@dataclasses.dataclass(frozen=True)
class Launch:
    name: str
    rows: int  # those of the traced run
    blocks: int
    turns: float  # of a block
    memory: float  # bytes
    l2: float  # bytes
    short: bool = False  # blocks of one turn, which replace each other as they end


@dataclasses.dataclass(frozen=True)
class Part:
    """Microseconds of one step of an op, and what each limit alone would take."""

    time: float
    limits: dict


def together(a, b, p):
    return max(a, b) if p >= 64 else (a**p + b**p) ** (1 / p)


def launch_time(gpu, scenario, launch):
    def value(name):
        return scenario.value(name, gpu)

    compiled = library(gpu.binary)[launch.name]
    resident, clock = compiled.sm.at_once(gpu), value("clock") * 1e3  # cycles per us
    warps = -(-compiled.kernel.threads // 32 // issue.QUARTERS)

    def cycles(blocks):
        return turn(same_sm(gpu), launch.name, launch.rows, scenario.issue, blocks)

    def edges(blocks):
        """Cycles of a block besides its turns: loads that wait for each other, and the code before
        and after the loop."""
        outside = value("outside") * (compiled.loop.before + compiled.loop.after)
        return value("starts") * value("load latency") + outside * warps * blocks

    slots = gpu.sms * resident
    full, rest = divmod(launch.blocks, slots)
    waves = [(full, resident)] * (full > 0) + [(1, -(-rest // gpu.sms))] * (rest > 0)
    first = waves[0][1]
    start = edges(1 if launch.short else first) / clock
    if launch.short:  # the code outside the loop fills the gaps of other blocks
        each = cycles(resident).cycles + edges(resident) - edges(0)
        loop = max(launch.blocks / slots, 1) * each / clock
    else:
        loop = sum(n * launch.turns * cycles(blocks).cycles for n, blocks in waves) / clock
        loop += sum(n * edges(blocks) for n, blocks in waves) / clock - start
    memory, l2 = launch.memory / value("memory") / 1e6, launch.l2 / value("l2") / 1e6
    busiest = cycles(first)
    pipe = max(busiest.bounds, key=busiest.bounds.get)
    share = busiest.bounds[pipe] / busiest.cycles
    fixed = value("launch") + value("tail") + start
    p = value("overlap")
    busy = together(together(loop, memory, p), l2, p)
    limits = {"memory": memory, "L2": l2, "launch, start, tail": fixed}
    limits[pipe if share > 0.8 else f"latency, {pipe}"] = loop
    return Part(fixed + busy, limits)
