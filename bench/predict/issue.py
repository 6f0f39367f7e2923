"""Simulates how one quarter of an SM issues a loop: one warp instruction a cycle, the pipes' rates,
the shared-memory pipe that the four quarters share, and what the control bits make a warp wait for.

The quarters run the same code, so one is simulated, and the shared-memory pipe serves it every
fourth cycle. Branches inside the loop fall through: parts that are skipped count as run. HMMA's
latency is in the stall counts that ptxas wrote.
"""

from __future__ import annotations

import dataclasses
import re

from .sass import NO_BARRIER

QUARTERS = 4
PIPES = ("alu", "fma", "imad", "convert", "sfu", "uniform", "lsu")


@dataclasses.dataclass(frozen=True)
class Result:
    """Cycles of one turn of the loop by all warps of the quarter, and the bound of each pipe."""

    cycles: float
    bounds: dict

    @property
    def binds(self):
        """(pipe, its share of the cycles); "latency" if none takes 80% of them."""
        pipe = max(self.bounds, key=self.bounds.get)
        share = self.bounds[pipe] / self.cycles
        return (pipe if share > 0.8 else f"latency, {pipe}"), share


class Costs:
    """Each instruction's cycles, for one GPU and scenario."""

    def __init__(self, loop, waves, gpu, scenario):
        def value(name):
            return scenario.value(name, gpu)

        self.pipe = {name: value(name) for name in PIPES}
        self.pipe["control"] = 1
        self.shared_latency, self.queue = value("shared latency"), value("shared queue")
        self.load, self.other = value("load latency"), value("other latency")
        self.barrier = value("barrier")
        per_cycle = gpu.flops_per_cycle / QUARTERS * value("mma share")
        slow_rule = bool(value("wavefront rule"))
        self.instructions = []
        for instruction, fronts in zip(loop, waves, strict=True):
            cycles = instruction.flops / per_cycle or self.pipe.get(instruction.pipe, 0)
            served = fronts[slow_rule] * value("wavefront") * QUARTERS
            if instruction.opcode == "SHFL":
                served = value("shuffle") * QUARTERS
            self.instructions.append((instruction, cycles, served))

    def bounds(self, warps):
        """{pipe: cycles a turn}: what each alone would need."""
        total = {"issue": len(self.instructions) * warps, "shared memory": 0}
        for instruction, cycles, served in self.instructions:
            total[instruction.pipe] = total.get(instruction.pipe, 0) + cycles * warps
            total["shared memory"] += served * warps
        total.pop("control", None)
        return total


@dataclasses.dataclass(eq=False)
class Warp:
    block: int
    ready: float
    at: int = 0
    turn: int = 0
    waits_at_barrier: bool = False
    barriers: list = dataclasses.field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0  # when the copies of the open group have landed
    groups: list = dataclasses.field(default_factory=list)
    ended: list = dataclasses.field(default_factory=list)


class Quarter:
    """The state of one quarter of an SM."""

    def __init__(self, costs, warps, blocks, turns):
        self.costs, self.turns = costs, turns
        self.program = [
            (i, cycles, served, i.waits, i.opcode, i.pipe, i.stall, i.sets_written, i.sets_read)
            for i, cycles, served in costs.instructions
        ]
        half = len(self.program) / 2
        self.warps = [Warp(w % blocks, (w % blocks) * half) for w in range(warps)]
        self.free = dict.fromkeys([*costs.pipe, "tensor"], 0.0)
        self.shared = self.now = 0.0

    def earliest(self, warp):
        """When the warp could issue its next instruction."""
        instruction, _, served, waits, opcode, pipe, *_ = self.program[warp.at]
        time = warp.ready if warp.ready > self.free[pipe] else self.free[pipe]
        for barrier in waits:
            if warp.barriers[barrier] > time:
                time = warp.barriers[barrier]
        if served and self.shared - self.costs.queue > time:
            time = self.shared - self.costs.queue
        if opcode == "DEPBAR":
            time = max(time, landed(warp, instruction))
        return time

    def choose(self, last):
        """The next warp to issue, in turn, and when. None when all have run their turns."""
        best, when = None, 0.0
        for k in range(len(self.warps)):
            at = (last + 1 + k) % len(self.warps)
            warp = self.warps[at]
            if warp.waits_at_barrier or warp.turn >= self.turns:
                continue
            time = self.earliest(warp)
            if time <= self.now:
                return at, self.now
            if best is None or time < when:
                best, when = at, time
        return best, when

    def issue(self, warp):
        _, cycles, served, _, opcode, pipe, stall, written, read = self.program[warp.at]
        now, costs = self.now, self.costs
        self.free[pipe] = now + cycles
        done = now + costs.other
        if served:
            self.shared = max(self.shared, now) + served
            done = self.shared + costs.shared_latency
        if opcode in ("LDG", "LD"):
            done = now + costs.load
        elif opcode == "LDGSTS":
            warp.copies = max(warp.copies, now + costs.load)
        elif opcode == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        if written != NO_BARRIER:
            warp.barriers[written] = done
        if read != NO_BARRIER:
            warp.barriers[read] = self.shared if served else now + costs.other / 2
        warp.ready = now + max(1, stall)
        if opcode == "BAR":
            self.wait_for_block(warp)
        warp.at += 1
        if warp.at == len(self.program):
            warp.at, warp.turn = 0, warp.turn + 1
            warp.ended.append(now)

    def wait_for_block(self, warp):
        warp.waits_at_barrier = True
        mates = [w for w in self.warps if w.block == warp.block]
        if all(w.waits_at_barrier or w.turn >= self.turns for w in mates):
            for w in mates:
                w.waits_at_barrier = False
                w.ready = max(w.ready, self.now + self.costs.barrier)


def landed(warp, instruction):
    """When a DEPBAR.LE SB0, n may go on: at most n of the warp's groups are still under way."""
    allowed = re.search(r",\s*(0x[0-9a-f]+)", instruction.text)
    pending = int(allowed[1], 16) if allowed else 0
    return max(warp.groups[: len(warp.groups) - pending], default=0.0)


def simulate(loop, waves, gpu, scenario, warps, blocks=1, turns=16):
    """`warps` of a quarter, of `blocks` blocks; the second block starts half a turn later."""
    quarter = Quarter(Costs(loop, waves, gpu, scenario), warps, blocks, turns)
    at = -1
    while (chosen := quarter.choose(at))[0] is not None:
        at, quarter.now = chosen
        quarter.issue(quarter.warps[at])
        quarter.now += 1
    ends = [max(w.ended[turn] for w in quarter.warps) for turn in range(turns)]
    bounds = quarter.costs.bounds(warps)
    # The first turns and the last differ from the rest. The mean can lie a little below a bound.
    return Result(max((ends[-2] - ends[2]) / (turns - 4), *bounds.values()), bounds)
