"""Finds registers that a kernel's SASS reads although nothing wrote them, as some ptxas make it.

    python bench/sass_flow.py FILE...    # cubins, libraries with device code, or listings (*.sass)

The check walks the control flow of each function and computes which registers may have been written
on some path from its entry. It reports

- a uniform register (UR) or a predicate (P, UP) that is read although no path wrote it;
- a vector register (R) that no path wrote and that is part of an address, names a branch's target
  or becomes uniform (R2UR). Arithmetic may read such a register and drop the value (ptxas makes
  LOP3 and PRMT that do), so other reads of R are not reported. For the same reason ULOP3 and UPRMT
  may read the register that they write;
- code that no path reaches;
- an instruction that is not in OPCODES below, because it is not known what that writes.

A write under a predicate counts as a write. A subroutine starts with the registers that may be
written at its callers' calls. After a call, the registers that it and its callees write may also be
written (for a function elsewhere, such as vprintf, all of R). Indirect branches may go to every
block. Each of these can hide a finding, but none causes a false one. A function whose RET takes a
register that no path wrote is not a kernel, and starts with all of R.

This check found `LDGSTS [R90+UR0+0xc080], desc[UR1][...]`, where nothing writes UR0 and UR1. ptxas
12.9.86 to 13.3 makes it from `cp.async` with an L2 policy.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# ---------------------------------------------------------------- what an instruction writes


def _width(*, pair=(), quad=(), eight=(), otherwise=1):
    """A function that gives the number of result registers for an instruction's modifiers."""

    def width(modifiers):
        for names, count in ((eight, 8), (quad, 4), (pair, 2)):
            if any(m in names for m in modifiers):
                return count
        return otherwise

    return width


def _fixed(count):
    return lambda modifiers: count


def _converted(modifiers):
    """F2F: the first type is the result's."""
    types = [m for m in modifiers if re.fullmatch(r"B?F(16|32|64)(_V2)?", m)]
    return 2 if types[0] == "F64" else 1


def _mma(modifiers):
    if "16816" in modifiers or "1688" in modifiers or "1684" in modifiers:
        return 4 if "F32" in modifiers else 2
    raise KeyError


def _integer_mma(modifiers):
    return {"16816": 4, "16832": 4, "16864": 4, "8816": 2, "8832": 2}[modifiers[0]]


def _warpgroup_mma(modifiers):
    m, n, _ = map(int, modifiers[0].split("x"))
    return m * n // 128 // (1 if "F32" in modifiers else 2)


ONE = _fixed(1)
ALU = _width(pair=("64", "S64", "U64", "WIDE"))
LOAD = _width(pair=("64",), quad=("128",), eight=("256",))

# How many of the first operands are results. AUTO: any predicates, one register and any predicates
# (a carry, say). ALL_BUT_LAST: a vote. MASK: R2P, whose last operand says which predicates it
# writes.
AUTO, ALL_BUT_LAST, MASK = "auto", "all but last", "mask"
# name: (results, registers of a result by modifier)
OPCODES = {}
for _results, _registers, _names in (
    # Integers, bits, moves
    (AUTO, ALU, "IADD IADD3 VIADD IMAD UIADD3 UIMAD MOV UMOV SEL USEL IMNMX UIMNMX VIMNMX UVIMNMX"),
    (AUTO, ONE, "LEA ULEA LOP3 ULOP3 SHF USHF PRMT UPRMT BREV UBREV FLO UFLO POPC UPOPC IABS SGXT"),
    (AUTO, ONE, "USGXT BMSK UBMSK IDP IDP4A VIADDMNMX VIMNMX3 VABSDIFF VABSDIFF4 I2I I2IP P2R"),
    (AUTO, ONE, "LOP USHL USHR SHL SHR IMUL UVIADD UIABS"),
    (MASK, ONE, "R2P"),
    (2, ONE, "ISETP UISETP FSETP DSETP HSETP2 PLOP3 UPLOP3 UFSETP"),
    # Floating point
    (AUTO, ONE, "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSET MUFU FCHK FRND F2FP I2FP HADD2 HMUL2 HFMA2"),
    (AUTO, ONE, "HMNMX2 HSET2 UFADD UFMUL UFFMA UFMNMX UFSEL UMUFU FSWZADD UF2FP UI2FP"),
    (AUTO, _fixed(2), "DADD DMUL DFMA FADD2 FMUL2 FFMA2"),
    (AUTO, _width(pair=("S64", "U64")), "F2I UF2I"),
    (AUTO, _width(pair=("F64",)), "I2F UI2F"),
    (AUTO, _converted, "F2F"),
    # Tensor cores
    (AUTO, _mma, "HMMA"),
    (AUTO, _integer_mma, "IMMA"),
    (AUTO, _warpgroup_mma, "HGMMA"),
    (AUTO, _width(pair=("2",), quad=("4",)), "LDSM"),
    (AUTO, ONE, "MOVM"),
    # Memory
    (AUTO, LOAD, "LDG LDS LDL LD LDC LDCU ULDC ATOM ATOMG ATOMS"),
    (AUTO, _width(pair=("64", "TRANS64")), "SYNCS"),
    (0, ONE, "STG STS STL ST STSM RED REDG REDS LDGSTS LDGDEPBAR DEPBAR MEMBAR ERRBAR CCTL CCTLL"),
    (0, ONE, "CCTLT FENCE UBLKCP UBLKPF UBLKRED UTMALDG UTMASTG UTMAREDG UTMAPF UTMACCTL"),
    (0, ONE, "UTMACMDFLUSH ARRIVES"),
    # Lanes, special registers
    (AUTO, ONE, "SHFL MATCH REDUX CREDUX S2R S2UR R2UR BMOV B2R USETMAXREG"),
    (AUTO, _width(pair=("64",)), "UR2UR"),
    (ALL_BUT_LAST, ONE, "VOTE VOTEU"),
    (2, ONE, "ELECT"),
    (AUTO, lambda modifiers: 1 if "32" in modifiers else 2, "CS2R"),
    (AUTO, _fixed(2), "LEPC"),
    # Control, barriers
    (0, ONE, "BAR B2B NOP YIELD WARPSYNC ENDCOLLECTIVE NANOSLEEP WARPGROUP WARPGROUPSET"),
    (0, ONE, "BRA BRX BRXU JMP JMX JMXU CALL RET EXIT KILL BPT BSSY BSYNC BREAK PREEXIT ACQBULK"),
    (0, ONE, "UCGABAR_ARV UCGABAR_WAIT CGAERRBAR PMTRIG"),
):
    for _name in _names.split():
        assert _name not in OPCODES, _name
        OPCODES[_name] = (_results, _registers)

GLOBAL_MEMORY = {"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "CCTL"}
BULK = {"UBLKCP", "UBLKPF", "UBLKRED", "UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "UTMACCTL"}
INDIRECT = {"BRX", "BRXU", "JMX", "JMXU"}
MAY_READ_ITS_RESULT = {"ULOP3", "UPRMT"}
# Opcodes whose plain uniform sources are pairs if the modifier says 64 bits. With WIDE, only the
# addend is a pair.
WIDE_SOURCES = {"IADD", "UIADD3", "MOV", "UMOV", "SEL", "USEL", "IMNMX", "UIMNMX"}
WIDE_SOURCES |= {"ISETP", "UISETP", "I2F", "UI2F"}
DOUBLES = {"DADD", "DMUL", "DFMA", "DSETP"}

R, UR, P, UP = 0, 256, 512, 520  # each file's first bit in a set of registers
ALL_VECTOR = (1 << 255) - 1
FILES = {"R": R, "UR": UR, "P": P, "UP": UP}


class UnknownInstruction(ValueError):
    """SASS that OPCODES does not describe."""


def register_names(registers):
    """The names of the registers in a set."""
    found = []
    for name, first, count in (("R", R, 255), ("UR", UR, 255), ("P", P, 7), ("UP", UP, 7)):
        found += [f"{name}{i}" for i in range(count) if registers >> (first + i) & 1]
    return found


def _bits(name, count=1):
    """The set of `count` registers starting at `name` (R4, UR4, P0, ...); empty for RZ, URZ, PT,
    UPT."""
    file, number = re.fullmatch(r"(U?[RP])(\d+|Z|T)", name).groups()
    if number in "ZT":
        return 0
    return ((1 << count) - 1) << (FILES[file] + int(number))


REGISTER = re.compile(r"(?<![\w.])(U?[RP](?:\d+|Z|T))\b((?:\.\w+)*)")


@functools.cache
def split_instruction(text):
    """(guard, opcode, modifiers, operands) of one line of SASS; the guard is P0, !UP1 or ''."""
    guard = ""
    if text.startswith("@"):
        guard, _, text = text.partition(" ")
        text = text.lstrip()
    name, _, rest = text.partition(" ")
    opcode, *modifiers = name.split(".")
    operands, depth, start = [], 0, 0
    for i, c in enumerate(rest):
        depth += (c == "[") - (c == "]")
        if c == "," and depth == 0:
            operands.append(rest[start:i].strip())
            start = i + 1
    if rest[start:].strip():
        operands.append(rest[start:].strip())
    return guard[1:], opcode, modifiers, operands


def _is_predicate(operand):
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


def _is_register(operand):
    return re.match(r"U?R(\d+|Z)\b", operand) is not None


def _results(opcode, modifiers, operands):
    """How many of the operands are written."""
    rule = OPCODES[opcode][0]
    if rule == AUTO:
        count = 0
        while count < len(operands) and _is_predicate(operands[count]):
            count += 1
        if count < len(operands) and _is_register(operands[count]):
            count += 1
            if "ENL2" in modifiers:  # 256 bits into two quads
                count += 1
            while count < len(operands) and _is_predicate(operands[count]):
                count += 1
        return count
    if rule == ALL_BUT_LAST:
        return len(operands) - 1
    return 0 if rule == MASK else rule


@dataclasses.dataclass(frozen=True)
class Effects:
    """Two sets of registers: those that an instruction writes, and those that it reads and that
    must have been written before."""

    writes: int
    reads: int


@functools.cache
def effects(text):
    """The Effects of one instruction. Its text is as cuobjdump prints it, without the semicolon."""
    guard, opcode, modifiers, operands = split_instruction(text)
    if opcode not in OPCODES:
        raise UnknownInstruction(f"{opcode} is not in OPCODES")
    try:
        width = 4 if "ENL2" in modifiers else OPCODES[opcode][1](modifiers)
    except (KeyError, IndexError, ValueError) as error:
        raise UnknownInstruction(
            f"{'.'.join([opcode, *modifiers])}: OPCODES does not say how wide its result is"
        ) from error
    writes, reads = 0, 0
    if guard:
        reads |= _bits(guard.lstrip("!"))
    if OPCODES[opcode][0] == MASK:
        mask = int(operands[-1], 16) if operands[-1].startswith("0x") else 127
        writes |= (mask & 127) << P
    count = _results(opcode, modifiers, operands)
    for operand in operands[:count]:
        for name, _ in REGISTER.findall(operand):
            writes |= _bits(name, width if "R" in name else 1)
    wide = bool({"64", "S64", "U64"} & set(modifiers)) and opcode in WIDE_SOURCES
    for i, operand in enumerate(operands[count:], count):
        addend = "WIDE" in modifiers and i == count + 2
        reads |= _read(opcode, modifiers, i, operand, wide or addend or opcode in DOUBLES)
    if opcode in MAY_READ_ITS_RESULT:
        reads &= ~writes
    return Effects(writes, reads)


def _read(opcode, modifiers, position, operand, wide):
    """The registers of one source operand that must have been written before."""
    reads = 0
    if "[" not in operand:
        for name, _ in REGISTER.findall(operand):
            if name.startswith("R"):
                if opcode in INDIRECT or opcode in ("CALL", "RET"):
                    reads |= _bits(name, 2)
                elif opcode == "R2UR":
                    reads |= _bits(name)
            elif "R" in name:
                reads |= _bits(name, 2 if wide or opcode in INDIRECT else 1)
            else:
                reads |= _bits(name)
        return reads
    for kind, inside in re.findall(r"(\w*)\[([^\]]*)\]", operand):
        if not re.search(r"\bU?R\d", inside):
            continue
        is_global = not kind and opcode in GLOBAL_MEMORY and "E" in modifiers
        for name, suffixes in REGISTER.findall(inside):
            parts = suffixes.split(".")
            if "P" in name:
                count = 1
            elif kind == "gdesc":  # A's descriptor, then B's; A may also be in registers
                four = _bits(name, 4)
                reads |= four if position == 1 else four & ~_bits(name, 2)
                continue
            elif name.startswith("U"):
                count = 2 if kind == "desc" or is_global or "64" in parts or opcode in BULK else 1
            else:
                narrow = any(p.startswith(("U32", "X")) for p in parts)
                count = 2 if "64" in parts or (is_global and not narrow) else 1
            reads |= _bits(name, count)
    return reads


# ---------------------------------------------------------------- control flow


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault in one function."""

    function: str
    address: int
    instruction: str
    problem: str

    def __str__(self):
        return f"{self.function} /*{self.address:04x}*/ {self.instruction}: {self.problem}"


def _target(operands):
    """The address that a branch names, or None."""
    last = operands[-1] if operands else ""
    return int(last, 16) if re.fullmatch(r"0x[0-9a-f]+", last) else None


class Graph:
    """The instructions that may follow each instruction of a function."""

    def __init__(self, code):
        self.code = code
        index = {address: i for i, (address, _) in enumerate(code)}
        self.next = [set()] * len(code)  # successors by index
        self.calls = {}  # index of a call: index of the callee, None if that is elsewhere
        self.returns = set()
        self.problems = []  # (index, sentence)
        blocks, indirect = set(), []
        reconvergence = {}  # barrier register: indices
        parsed = [split_instruction(text) for _, text in code]
        for _, opcode, _, operands in parsed:
            if opcode == "BSSY" and _target(operands) in index:
                reconvergence.setdefault(operands[0], set()).add(index[_target(operands)])
        for i, (guard, opcode, modifiers, operands) in enumerate(parsed):
            follows = i + 1 < len(code)
            following = {i + 1} if follows else set()
            conditional = guard not in ("", "PT", "UPT")
            goes = set(following)
            target = _target(operands)
            if opcode in ("BRA", "JMP") or (opcode == "WARPSYNC" and "COLLECTIVE" in modifiers):
                if target not in index:
                    self.problems.append((i, "a branch to an address without an instruction"))
                else:
                    goes.add(index[target])
                    # DIV and CONV test whether the warp's lanes are together. On 7.5 they have no
                    # operand.
                    may_pass = conditional or len(operands) > 1 or {"DIV", "CONV"} & {*modifiers}
                    if opcode != "WARPSYNC" and not may_pass:
                        goes = {index[target]}
            elif opcode in INDIRECT:
                indirect.append(i)
                goes = set(following) if conditional else set()
            elif opcode == "CALL":
                known = "REL" in modifiers and target in index and len(operands) == 1
                known = known and not re.search(r"\bU?R\d", operands[0])
                self.calls[i] = index[target] if known else None
            elif opcode in ("RET", "EXIT", "KILL"):
                if opcode == "RET":
                    self.returns.add(i)
                goes = set(following) if conditional else set()
            elif opcode == "BSYNC":
                goes |= reconvergence.get(operands[0], set())
            self.next[i] = goes
            if goes != following or i in self.calls:
                blocks |= goes | following
        blocks |= {c for c in self.calls.values() if c is not None}
        for i in indirect:
            self.next[i] = self.next[i] | blocks

    def reached_from(self, entry):
        """Instructions that run before the function at `entry` returns, without its callees'."""
        seen, todo = {entry}, [entry]
        while todo:
            fresh = self.next[todo.pop()] - seen
            seen |= fresh
            todo += fresh
        return seen


def written_by_callees(graph, writes):
    """{index of a callee: registers that it and its callees write}; None means one elsewhere."""
    bodies = {c: graph.reached_from(c) for c in set(graph.calls.values()) if c is not None}
    written = {None: ALL_VECTOR}
    for callee, body in bodies.items():
        written[callee] = functools.reduce(int.__or__, (writes[i] for i in body))
    changed = True
    while changed:
        changed = False
        for callee, body in bodies.items():
            more = written[callee]
            for i in body & graph.calls.keys():
                more |= written[graph.calls[i]]
            changed |= more != written[callee]
            written[callee] = more
    return written


def may_be_written(graph, writes, start):
    """{index: registers that some path may have written before it}, for instructions that a path
    reaches. `start` is written at the entry."""
    written = written_by_callees(graph, writes)
    before = {0: start}
    todo = [0]
    while todo:
        i = todo.pop()
        state = before[i] | writes[i]
        goes = [(j, state) for j in graph.next[i]]
        if i in graph.calls:
            callee = graph.calls[i]
            goes = [(j, state | written[callee]) for j in graph.next[i]]
            if callee is not None:
                goes.append((callee, state))
        for j, after in goes:
            known = before.get(j)
            if known is None or known | after != known:
                before[j] = after if known is None else known | after
                todo.append(j)
    return before


def check_function(name, code):
    """The Findings in one function; `code` is its (address, instruction) pairs."""
    if not code:
        return [Finding(name, 0, "", "no code")]
    try:
        effect = [effects(text) for _, text in code]
    except UnknownInstruction as error:
        address, text = next((a, t) for a, t in code if not _is_known(t))
        return [Finding(name, address, text, str(error))]
    graph = Graph(code)
    writes = [e.writes for e in effect]
    before = may_be_written(graph, writes, 0)
    # A function that returns to an address from no path is called from elsewhere, with an ABI that
    # passes vector registers.
    if any(i in before and effect[i].reads & ~before[i] & ALL_VECTOR for i in graph.returns):
        before = may_be_written(graph, writes, ALL_VECTOR)

    findings = [Finding(name, *code[i], sentence) for i, sentence in graph.problems]
    lost = [i for i, (_, text) in enumerate(code) if i not in before and not _is_padding(text)]
    for i in lost[:1]:
        findings.append(Finding(name, *code[i], "no path from the entry reaches it"))
    for i, state in sorted(before.items()):
        if missing := effect[i].reads & ~state:
            names = ", ".join(register_names(missing))
            findings.append(Finding(name, *code[i], f"reads {names}, which no path wrote"))
    return findings


def _is_known(text):
    try:
        effects(text)
    except UnknownInstruction:
        return False
    return True


def _is_padding(text):
    return split_instruction(text)[1] in ("NOP", "BRA", "EXIT")


# ---------------------------------------------------------------- listings and files


def find_tool(name):
    """cuobjdump or nvdisasm: on the PATH, in the toolkit or the triton wheel; None if nowhere."""
    found = shutil.which(name) or shutil.which(
        name, path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin")
    )
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    for place in spec.submodule_search_locations if spec else ():
        tool = Path(place) / "backends" / "nvidia" / "bin" / name
        if tool.is_file():
            return str(tool)
    return None


def missing_tools():
    """A message if there is no disassembler here, else None."""
    if find_tool("cuobjdump") is None or find_tool("nvdisasm") is None:
        return (
            "cuobjdump and nvdisasm are not on the PATH, and triton, whose wheel has them, is not "
            "installed"
        )
    return None


def run(*command):
    """A program's output, of both streams. If it fails, the error contains the output."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join(
        [str(Path(find_tool("nvdisasm") or ".").parent), env.get("PATH", "")]
    )
    done = subprocess.run(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def parse_listing(text):
    """[(architecture, function, [(address, instruction)])] of what `cuobjdump -sass` printed."""
    functions, code, arch = [], None, ""
    for line in text.splitlines():
        if "/*" in line:
            m = INSTRUCTION.match(line)
            if m and code is not None:
                code.append((int(m[1], 16), m[2].replace(".reuse", "")))
        elif m := re.match(r"\s*code for (sm_\w+)", line):
            arch, code = m[1], None
        elif m := re.match(r"\s*Function : (\S+)", line):
            code = []
            functions.append((arch, m[1], code))
    return functions


INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


def check_listing(text):
    """Findings in all functions of a listing."""
    return [
        finding for _, name, code in parse_listing(text) for finding in check_function(name, code)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="cubins, libraries, listings (*.sass)")
    files = parser.parse_args().files
    if any(f.suffix != ".sass" for f in files) and (sentence := missing_tools()):
        sys.exit(f"sass_flow: {sentence}")
    wrong = 0
    for file in files:
        if file.suffix == ".sass":
            functions = parse_listing(file.read_text())
        else:
            functions = parse_listing(run(find_tool("cuobjdump"), "-sass", file))
        if not functions:
            sys.exit(f"sass_flow: {file} has no device code")
        by_arch = {}
        for arch, name, code in functions:
            by_arch.setdefault(arch, []).append(check_function(name, code))
        for arch, found in by_arch.items():
            findings = [f for of_function in found for f in of_function]
            wrong += len(findings)
            print(f"{file.name} {arch}: {len(found)} functions, {len(findings)} findings")
            for finding in findings:
                print(f"  {finding}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
