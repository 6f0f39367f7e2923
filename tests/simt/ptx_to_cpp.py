"""Translates the PTX that nvcc makes of csrc/cuda/*.cu into C++ that runs on the emulated machine.

    python tests/simt/ptx_to_cpp.py KERNELS.ptx > KERNELS.cpp

The emulator runs the kernels' source as g++ reads it. This runs them as nvcc reads it: the device
half of ptx.cuh, its `#if __CUDA_ARCH__`, the layout of the parameters, what was fused into an FMA
and what the optimizer made of it. Each PTX instruction becomes one statement: a register is an
unsigned integer of its width, a branch a goto, and the instruction a function of
include/simt/ptx_instructions.h. Each kernel becomes a function of the parameters' addresses, which
registers itself by its mangled name.

An instruction, directive or operand that is not known here is an error that names it and its line:
nothing is left out. The reference is NVIDIA's "Parallel Thread Execution ISA".
"""

import math
import re
import sys
from pathlib import Path

# PTX type -> C++ type.
TYPES = {
    "pred": "bool",
    **{f"b{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"u{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)},
    "f16": "isa::half",
    "bf16": "isa::bfloat16",
    "f32": "float",
    "f64": "double",
}
# The register that holds a value of a type, as C++ declares it.
REGISTERS = {
    "pred": "bool",
    **{t: f"uint{t.strip('bfus')}_t" for t in TYPES if t not in ("pred", "bf16")},
    "bf16": "uint16_t",
}
SPECIAL = {
    **{f"%tid.{d}": f"simt::current->thread_index.{d}" for d in "xyz"},
    **{f"%ctaid.{d}": f"simt::current->block_index.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"simt::current->block_dim.{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"simt::current->grid_dim.{d}" for d in "xyz"},
    "%laneid": "simt::current->lane",
}
# What may stand behind a load's or store's space without changing what it does here: caches.
CACHES = {"nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "L1::no_allocate", "volatile", "weak"}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"}
# vote.sync and redux.sync, less their first word -> the meeting of lanes that answers.
VOTES = {"sync.all.pred": "kAll", "sync.any.pred": "kAny", "sync.ballot.b32": "kBallot"}
VOTES |= {f"sync.add.{kind}": "kReduceAdd" for kind in ("u32", "s32")}
VOTES |= {f"sync.{op}.s32": f"kReduce{op.title()}Signed" for op in ("min", "max")}
VOTES |= {f"sync.{op}.u32": f"kReduce{op.title()}Unsigned" for op in ("min", "max")}
VOTES |= {f"sync.{op}.b32": f"kReduce{op.title()}" for op in ("and", "or", "xor")}


class Unknown(ValueError):
    """PTX that this translator does not know."""


def known(condition):
    """Unknown unless condition; `translate` names the instruction and its line."""
    if not condition:
        raise Unknown("this form of it")


def _name(text):
    """A PTX name as a C++ one."""
    return text.replace("%", "").replace("$", "S_")


def _split(operands):
    """At the commas outside braces, brackets and parentheses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(operands):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*parts, last] if last else parts


class Function:
    """One .entry or .func: its statements as C++."""

    def __init__(self, module, name, params):
        self.module = module
        self.name = name
        self.params = params  # [(name, bytes)]
        self.param_index = {p: i for i, (p, _) in enumerate(params)}
        self.locals = set()  # arrays of bytes: .local and .param inside the body
        self.registers = set()
        self.watched = {}  # registers that wgmma takes -> their number
        self.lines = []

    # ---------------------------------------------------------------- operands

    def value(self, text, kind):
        """An operand as C++, as the bits of a register that holds PTX type `kind`."""
        text = text.strip()
        bits = REGISTERS[kind]
        if text in SPECIAL:
            return SPECIAL[text]
        if re.fullmatch(r"%?[A-Za-z_$][\w$]*", text):
            if text in self.module.shared:
                return f"static_cast<{bits}>(isa::shared_begin())"
            if text in self.param_index:
                return f"isa::address(arguments[{self.param_index[text]}])"
            if text in self.module.globals or text in self.locals:
                return f"isa::address({_name(text)})"
            return self.target(text)
        if match := re.fullmatch(r"0f([0-9A-Fa-f]{8})", text):
            return f"0x{match[1]}u"
        if match := re.fullmatch(r"0d([0-9A-Fa-f]{16})", text):
            return f"0x{match[1]}ull"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return f"static_cast<{bits}>({text.rstrip('U')}ll)"
        raise Unknown(f"operand {text}")

    def target(self, text):
        """A register."""
        if _name(text) not in self.registers:
            raise Unknown(f"register {text}")
        return _name(text)

    def vector(self, text):
        return [part.strip() for part in text.strip().strip("{}").split(",")]

    def address(self, text, space):
        """[base+offset] as a C++ expression: a host address, in shared memory a 32-bit one."""
        match = re.fullmatch(r"\[\s*(%?[\w$.]+?)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise Unknown(f"address {text}")
        base = self.value(match[1], "b32" if space == "shared" else "b64")
        return f"{base} + static_cast<int64_t>({match[2]})" if match[2] else base

    # ---------------------------------------------------------------- instructions

    def instruction(self, text, line):
        """C++ of one instruction, without its predicate."""
        opcode, _, rest = text.partition(" ")
        parts = opcode.split(".")
        operation = getattr(self, f"_{parts[0]}", None)
        if operation is None:
            raise Unknown(f"instruction {opcode}")
        return operation(parts[1:], _split(rest), line)

    def _call_cpp(self, name, kind, modifiers, operands, allowed=()):
        """`name<type>(operands)`, the first operand the destination."""
        known(set(modifiers) <= set(allowed))
        values = ", ".join(self.value(o, kind) for o in operands[1:])
        return f"{self.target(operands[0])} = isa::{name}<{TYPES[kind]}>({values});"

    def _arithmetic(name, allowed=()):
        """A method for an instruction whose operands all have its type."""

        def translate(self, parts, operands, line):
            return self._call_cpp(name, parts[-1], parts[:-1], operands, allowed)

        return translate

    _add = _arithmetic("add", ("rn",))
    _sub = _arithmetic("sub", ("rn",))
    _fma = _arithmetic("fma", ("rn",))
    _div = _arithmetic("div", ("rn",))
    _rem = _arithmetic("rem")
    _rcp = _arithmetic("rcp", ("rn",))
    _sqrt = _arithmetic("sqrt", ("rn",))
    _min = _arithmetic("min")
    _max = _arithmetic("max")
    _abs = _arithmetic("abs")
    _neg = _arithmetic("neg")
    _not = _arithmetic("bit_not")
    _and = _arithmetic("bit_and")
    _or = _arithmetic("bit_or")
    _xor = _arithmetic("bit_xor")

    def _mul(self, parts, operands, line):
        kind = parts[-1]
        if parts[0] == "wide":
            values = ", ".join(self.value(o, kind) for o in operands[1:])
            return f"{self.target(operands[0])} = isa::mul_wide<{TYPES[kind]}>({values});"
        name = "mul_hi" if parts[0] == "hi" else "mul"
        return self._call_cpp(name, kind, parts[:-1], operands, ("lo", "hi", "rn"))

    def _mad(self, parts, operands, line):
        if parts[0] == "wide":
            a, b = (self.value(o, parts[-1]) for o in operands[1:3])
            wide = parts[-1][0] + str(2 * int(parts[-1][1:]))
            c = self.value(operands[3], wide)
            return (
                f"{self.target(operands[0])} = isa::mul_wide<{TYPES[parts[-1]]}>({a}, {b}) + {c};"
            )
        return self._call_cpp("mad", parts[-1], parts[:-1], operands, ("lo",))

    def _shift(name):
        def translate(self, parts, operands, line):
            (kind,) = parts
            value, amount = self.value(operands[1], kind), self.value(operands[2], "b32")
            return f"{self.target(operands[0])} = isa::{name}<{TYPES[kind]}>({value}, {amount});"

        return translate

    _shl = _shift("shl")
    _shr = _shift("shr")

    def _bfi(self, parts, operands, line):
        (kind,) = parts
        values = [self.value(o, k) for o, k in zip(operands[1:], (kind, kind, "b32", "b32"))]
        return f"{self.target(operands[0])} = isa::bfi<{TYPES[kind]}>({', '.join(values)});"

    def _prmt(self, parts, operands, line):
        known(parts == ["b32"])
        values = ", ".join(self.value(o, "b32") for o in operands[1:])
        return f"{self.target(operands[0])} = ptx::prmt({values});"

    def _builtin(name):
        """An instruction on one 32-bit word that is a CUDA builtin."""

        def translate(self, parts, operands, line):
            known(parts == ["b32"])
            value = self.value(operands[1], "b32")
            return f"{self.target(operands[0])} = static_cast<uint32_t>({name}({value}));"

        return translate

    _popc = _builtin("__popc")
    _clz = _builtin("__clz")
    _brev = _builtin("__brev")

    def _dp4a(self, parts, operands, line):
        known(parts == ["s32", "s32"])
        values = ", ".join(f"static_cast<int>({self.value(o, 's32')})" for o in operands[1:])
        return f"{self.target(operands[0])} = static_cast<uint32_t>(__dp4a({values}));"

    def _shf(self, parts, operands, line):
        side, mode, kind = parts
        known(side in "lr" and mode in ("wrap", "clamp") and kind == "b32")
        values = ", ".join(self.value(o, "b32") for o in operands[1:])
        name = f"__funnelshift_{side}{'c' * (mode == 'clamp')}"
        return f"{self.target(operands[0])} = {name}({values});"

    def _setp(self, parts, operands, line):
        comparison, kind = parts
        known(comparison in COMPARISONS)
        a, b = (self.value(o, kind) for o in operands[1:])
        return f"{self.target(operands[0])} = isa::setp_{comparison}<{TYPES[kind]}>({a}, {b});"

    def _selp(self, parts, operands, line):
        (kind,) = parts
        a, b = (self.value(o, kind) for o in operands[1:3])
        return f"{self.target(operands[0])} = {self.target(operands[3])} ? {a} : {b};"

    def _mov(self, parts, operands, line):
        (kind,) = parts
        to, source = operands
        if to.startswith("{"):
            halves = self.vector(to)
            low, high = (self.target(h) if h != "_" else "std::ignore" for h in halves)
            return f"isa::unpack({self.value(source, kind)}, {low}, {high});"
        if source.startswith("{"):
            half = f"b{int(kind[1:]) // 2}"
            low, high = (self.value(h, half) for h in self.vector(source))
            return f"{self.target(to)} = isa::pack<{REGISTERS[half]}>({low}, {high});"
        return f"{self.target(to)} = {self.value(source, kind)};"

    def _cvt(self, parts, operands, line):
        rounding = [p for p in parts if p in ("rn", "rz", "rzi", "rni", "rmi", "rpi", "sat", "ftz")]
        kinds = [p for p in parts if p not in rounding]
        to, source = kinds
        if to in ("bf16x2", "f16x2"):  # the first source is the upper half
            high, low = (self.value(o, "f32") for o in operands[1:])
            known(rounding == ["rn"] and source == "f32")
            half = TYPES[to[:-2]]
            return f"{self.target(operands[0])} = isa::cvt_pair<{half}>({low}, {high});"
        floats = {"f16", "bf16", "f32", "f64"}
        exact = (source in floats) == (to in floats) and not rounding
        known(exact or rounding == ["rn"])
        narrows = to[0] == "s" and int(to[1:]) < 32 and source not in floats
        known(not narrows and (source not in floats or to in floats))
        value = self.value(operands[1], source)
        return f"{self.target(operands[0])} = isa::cvt<{TYPES[to]}, {TYPES[source]}>({value});"

    def _cvta(self, parts, operands, line):
        # Generic addresses are the host's; a shared one is an offset until it is made generic.
        source = self.value(operands[1], "b64")
        to = self.target(operands[0])
        if parts[0] == "to" and parts[1] == "shared":
            return f"{to} = isa::generic_to_shared({source});"
        if parts[0] == "shared":
            return f"{to} = isa::shared_to_generic({source});"
        if parts[-2] in ("global", "local", "param", "const"):
            return f"{to} = {source};"
        raise Unknown(f"cvta.{'.'.join(parts)}")

    def _space(self, parts):
        """(space, vector width, type) of a load's or store's modifiers."""
        spaces = ("global", "shared", "param", "local", "const", "shared::cta")
        space = next((p for p in parts if p in spaces), "generic")
        width = next((int(p[1:]) for p in parts if re.fullmatch(r"v[248]", p)), 1)
        for p in parts[:-1]:
            if p not in CACHES and p not in spaces and not re.fullmatch(r"v[248]", p):
                raise Unknown(f"memory access .{p}")
        return space.removesuffix("::cta"), width, parts[-1]

    def _memory(self, space, address, kind, width, line):
        size = {"pred": 1}.get(kind) or int(re.sub(r"\D", "", kind)) // 8
        if space == "shared":
            return f"isa::shared_pointer({address}, {size * width}, {line})"
        return f"isa::pointer({address}, {size * width})"

    def _ld(self, parts, operands, line):
        if parts[:2] == ["relaxed", "gpu"]:
            known(parts[2:] == ["global", "u64"])
            where = self._memory("global", self.address(operands[1], "global"), "u64", 1, line)
            return f"{self.target(operands[0])} = isa::load_relaxed({where});"
        space, width, kind = self._space(parts)
        where = self._memory(space, self.address(operands[1], space), kind, width, line)
        to = self.vector(operands[0]) if operands[0].startswith("{") else [operands[0]]
        if len(to) != width:
            raise Unknown(f"ld.{'.'.join(parts)} into {operands[0]}")
        targets = ", ".join(self.target(t) for t in to)
        return f"isa::load<{TYPES[kind]}>({where}, {targets});"

    def _st(self, parts, operands, line):
        space, width, kind = self._space(parts)
        where = self._memory(space, self.address(operands[0], space), kind, width, line)
        values = self.vector(operands[1]) if operands[1].startswith("{") else [operands[1]]
        if len(values) != width:
            raise Unknown(f"st.{'.'.join(parts)} of {operands[1]}")
        stored = ", ".join(self.value(v, kind) for v in values)
        return f"isa::store<{TYPES[kind]}>({where}, {stored});"

    def _atom(self, parts, operands, line):
        space, operation, kind = parts
        known(space in ("global", "shared") and operation in ("add", "min", "max", "exch", "cas"))
        where = self._memory(space, self.address(operands[1], space), kind, 1, line)
        values = ", ".join(self.value(o, kind) for o in operands[2:])
        return (
            f"{self.target(operands[0])} = isa::atom_{operation}<{TYPES[kind]}>({where}, {values});"
        )

    # ---------------------------------------------------------------- warps and blocks

    def _site(self, line):
        return f"simt::Site{{kFile, {line}}}"

    def _bar(self, parts, operands, line):
        if parts == ["sync"] and operands == ["0"]:
            return f"isa::bar_sync({self._site(line)});"
        if parts == ["red", "or", "pred"] and operands[1] == "0":
            value = self.value(operands[2], "pred")
            return f"{self.target(operands[0])} = isa::bar_red_or({value}, {self._site(line)});"
        if parts == ["warp", "sync"]:
            mask = self.value(operands[0], "b32")
            return f"simt::meet(simt::kSyncWarp, {mask}, nullptr, {self._site(line)});"
        raise Unknown(f"bar.{'.'.join(parts)} {operands}")

    def _barrier(self, parts, operands, line):
        known(parts in (["cta", "sync"], ["cta", "arrive"]) and len(operands) == 2)
        values = ", ".join(f"static_cast<int>({self.value(o, 'b32')})" for o in operands)
        return f"isa::barrier_{parts[1]}({values}, {self._site(line)});"

    def _vote(self, parts, operands, line):
        meeting = VOTES.get(".".join(parts))
        known(meeting)
        value, mask = (self.value(o, "b32") for o in operands[1:])
        return (
            f"{self.target(operands[0])} = "
            f"simt::vote(simt::{meeting}, {mask}, {value}, {self._site(line)});"
        )

    _redux = _vote

    def _elect(self, parts, operands, line):
        known(parts == ["sync"] and operands[1] in ("-1", "0xffffffff"))
        to, _, elected = operands[0].partition("|")
        chosen = f"{self.target(elected)} = simt::current->lane == 0;"
        return chosen if to == "_" else f"{self.target(to)} = 0; {chosen}"

    def _shfl(self, parts, operands, line):
        sync, mode, kind = parts
        known(sync == "sync" and kind == "b32")
        to, _, valid = operands[0].partition("|")
        values = ", ".join(self.value(o, "b32") for o in operands[1:])
        valid = self.target(valid) if valid else "std::ignore"
        return f"isa::shfl_{mode}({self.target(to)}, {valid}, {values}, {self._site(line)});"

    def _mma(self, parts, operands, line):
        shape = ".".join(parts)
        shapes = {
            "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": ("kMma16816F16", 4, 2),
            "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("kMma16816Bf16", 4, 2),
            "sync.aligned.m16n8k8.row.col.f32.f16.f16.f32": ("kMma1688F16", 2, 1),
        }
        known(shape in shapes)
        meeting, num_a, num_b = shapes[shape]
        d, a, b, c = ([self.target(r) for r in self.vector(o)] for o in operands)
        known((len(d), len(a), len(b), len(c)) == (4, num_a, num_b, 4))
        return (
            f"{{ uint32_t d[4] = {{{', '.join(c)}}}, a[] = {{{', '.join(a)}}}, "
            f"b[] = {{{', '.join(b)}}}; isa::mma(simt::{meeting}, d, a, b, {self._site(line)}); "
            + " ".join(f"{r} = d[{i}];" for i, r in enumerate(d))
            + " }"
        )

    def _ldmatrix(self, parts, operands, line):
        to = self.vector(operands[0])
        known(".".join(parts) == "sync.aligned.m8n8.x4.trans.shared.b16" and len(to) == 4)
        address = self.address(operands[1], "shared")
        return (
            f"{{ uint32_t d[4]; isa::ldmatrix_x4_trans(d, {address}, {self._site(line)}); "
            + " ".join(f"{self.target(r)} = d[{i}];" for i, r in enumerate(to))
            + " }"
        )

    def _stmatrix(self, parts, operands, line):
        values = [self.value(r, "b32") for r in self.vector(operands[1])]
        known(".".join(parts) == "sync.aligned.m8n8.x4.trans.shared.b16" and len(values) == 4)
        address = self.address(operands[0], "shared")
        return (
            f"{{ const uint32_t d[4] = {{{', '.join(values)}}}; "
            f"isa::stmatrix_x4_trans({address}, d, {self._site(line)}); }}"
        )

    def _wgmma(self, parts, operands, line):
        operation = ".".join(parts)
        if operation == "fence.sync.aligned":
            return "watch.fence(); simt::wgmma_fence();"
        if operation == "commit_group.sync.aligned":
            return f"watch.commit(); simt::wgmma_commit({self._site(line)});"
        if operation == "wait_group.sync.aligned":
            pending = int(operands[0])
            wait = f"simt::wgmma_wait({pending}, {self._site(line)});"
            return f"{wait} watch.wait({pending});"
        form = r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2"
        shape = re.fullmatch(form, operation)
        known(shape and operands[4:] == ["1", "1", "0"])  # B is K-major
        d, a = (self.vector(o) for o in operands[:2])
        known(2 * len(d) == int(shape[1]) and len(a) == 4)
        places = [", ".join(f"&{self.target(r)}" for r in registers) for registers in (d, a)]
        numbers = ", ".join(str(self.watched[r]) for r in (*d, *a))
        descriptor, add = self.value(operands[2], "b64"), self.target(operands[3])
        product = f"{{d, a, {descriptor}, {shape[1]}, {str(shape[2] == 'bf16').lower()}, {add}}}"
        return (
            f"{{ uint32_t *const d[] = {{{places[0]}}}, *const a[] = {{{places[1]}}}; "
            f"static const int numbers[] = {{{numbers}}}; "
            f"watch.product(numbers, {len(d)}, {line}); "
            f"simt::wgmma({product}, {self._site(line)}); }}"
        )

    def _setmaxnreg(self, parts, operands, line):
        known(parts[0] in ("inc", "dec") and parts[1:] == ["sync", "aligned", "u32"])
        increase = str(parts[0] == "inc").lower()
        return f"simt::setmaxnreg({int(operands[0])}, {increase}, {self._site(line)});"

    def _prefetch(self, parts, operands, line):
        known(parts == ["tensormap"])
        return f"isa::tensor_map({self.address(operands[0], 'generic')});"

    def _mbarrier(self, parts, operands, line):
        operation = ".".join(parts)
        if operation == "init.shared::cta.b64":
            address, arrivals = self.address(operands[0], "shared"), self.value(operands[1], "b32")
            return f"simt::mbarrier_init({address}, static_cast<int>({arrivals}));"
        if operation in ("arrive.shared::cta.b64", "arrive.expect_tx.shared::cta.b64"):
            known(operands[0] == "_")  # a state is not kept
            count = self.value(operands[2], "b32") if len(operands) > 2 else "0"
            return f"simt::mbarrier_arrive({self.address(operands[1], 'shared')}, {count});"
        if operation == "try_wait.parity.shared::cta.b64":  # tries until it has succeeded
            address, parity = self.address(operands[1], "shared"), self.value(operands[2], "b32")
            wait = f"simt::mbarrier_wait({address}, {parity}, {self._site(line)});"
            return f"{wait} {self.target(operands[0])} = true;"
        raise Unknown(f"mbarrier.{operation}")

    def _cp(self, parts, operands, line):
        if parts == ["async", "commit_group"]:
            return "simt::copy_async_commit();"
        if parts == ["async", "wait_group"]:
            return f"simt::copy_async_wait({int(operands[0])});"
        if parts == ["async", "wait_all"]:
            return "simt::copy_async_commit(); simt::copy_async_wait(0);"
        if parts == ["async", "mbarrier", "arrive", "noinc", "shared::cta", "b64"]:
            return f"simt::copy_async_arrive({self.address(operands[0], 'shared')});"
        if parts[:2] == ["async", "bulk"]:
            if bulk := self._bulk(parts[2:], operands, line):
                return bulk
            form = ["shared::cluster", "global", "mbarrier::complete_tx::bytes"]
            known(parts[2:] == form)
            shared, barrier = (self.address(operands[i], "shared") for i in (0, 3))
            source, size = self.address(operands[1], "global"), self.value(operands[2], "b32")
            return f"ptx::bulk_copy({shared}, isa::pointer({source}, 16), {size}, {barrier});"
        known(parts == ["async", "cg", "shared", "global"])
        if int(operands[2]) != 16 or len(operands) > 4:
            raise Unknown(f"cp.{'.'.join(parts)} of {operands[2:]}")
        shared = self.address(operands[0], "shared")
        source = self.address(operands[1], "global")
        valid = self.value(operands[3], "b32") if len(operands) == 4 else "16"
        return f"isa::cp_async_16({shared}, {source}, {valid}, {line});"

    def _bulk(self, parts, operands, line):
        """Stores, their groups, and tensor maps; None for a copy from global to shared memory."""
        form = ".".join(parts)
        if form == "commit_group":
            return "simt::bulk_commit();"
        if form in ("wait_group", "wait_group.read"):
            only_read = str(form.endswith("read")).lower()
            return f"simt::bulk_wait({int(operands[0])}, {only_read}, {self._site(line)});"
        if form == "global.shared::cta.bulk_group":
            to, shared = self.address(operands[0], "global"), self.address(operands[1], "shared")
            size = self.value(operands[2], "b32")
            return f"simt::bulk_store(isa::pointer({to}, 16), {shared}, {size});"
        if not (tensor := re.fullmatch(r"tensor\.([23])d\.(.+)", form)):
            return None
        into = "shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        known(tensor[2] in (into, "global.shared::cta.tile.bulk_group"))
        load = tensor[2] == into
        at = re.fullmatch(r"\[([^,]+), \{(.+)\}\]", operands[1 if load else 0])
        map_at = f"isa::tensor_map({self.value(at[1], 'b64')})"
        places = [f"static_cast<int32_t>({self.value(c, 'b32')})" for c in self.vector(at[2])]
        rank = int(tensor[1])
        known(len(places) == rank)
        coordinates = f"const int32_t at[] = {{{', '.join(places)}}};"
        if load:
            shared, barrier = (self.address(operands[i], "shared") for i in (0, 2))
            call = f"simt::tensor_load({shared}, {map_at}, at, {rank}, {barrier});"
        else:
            shared = self.address(operands[1], "shared")
            call = f"simt::tensor_store({map_at}, at, {rank}, {shared});"
        return f"{{ {coordinates} {call} }}"

    def _membar(self, parts, operands, line):
        known(parts in (["gl"], ["cta"], ["sys"]))
        return "simt::thread_fence();"

    def _fence(self, parts, operands, line):
        fences = {
            "proxy.async.shared::cta": "fence_proxy_async",
            "mbarrier_init.release.cluster": "fence_mbarrier_init",
        }
        known(".".join(parts) in fences)
        return f"simt::{fences['.'.join(parts)]}();"

    # ---------------------------------------------------------------- control

    def _bra(self, parts, operands, line):
        known(parts in ([], ["uni"]))
        return f"goto {_name(operands[0])};"

    def _ret(self, parts, operands, line):
        return "return;"

    _exit = _ret

    def _trap(self, parts, operands, line):
        return "isa::trap();"

    def _call(self, parts, operands, line):
        returned = operands.pop(0).strip("()") if operands[0].startswith("(") else None
        function, *rest = operands
        arguments = _split(rest[0].strip()[1:-1]) if rest else []
        if function == "vprintf":
            return f"isa::vprintf({returned}, {', '.join(arguments)});"
        if returned or function not in self.module.functions:
            raise Unknown(f"call {function}")
        return (
            f"{{ void* arguments[] = {{{', '.join(arguments)}}}; {_name(function)}(arguments); }}"
        )

    # ---------------------------------------------------------------- bodies

    def declaration(self, text):
        """.reg, .param and .local inside a body."""
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", text):
            register = REGISTERS[match[1]]
            names = []
            for name in match[2].split(","):
                many = re.fullmatch(r"\s*(%?\w+)<(\d+)>\s*", name)
                if many:
                    names += [f"{_name(many[1])}{i}" for i in range(int(many[2]))]
                else:
                    names.append(_name(name.strip()))
            self.registers.update(names)
            first = "simt::register_poison"
            first = f"{first} & 2" if register == "bool" else f"static_cast<{register}>({first})"
            return f"{register} " + ", ".join(f"{name} = {first}" for name in names) + ";"
        if match := re.fullmatch(r"\.param\s+\.(\w+)\s+(\w+)", text):
            self.locals.add(match[2])
            return f"alignas(8) unsigned char {match[2]}[8];"
        if match := re.fullmatch(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", text):
            self.locals.add(match[2])
            return f"alignas({match[1]}) unsigned char {_name(match[2])}[{match[3]}];"
        if text.startswith(".pragma"):
            return ""
        raise Unknown(f"directive {text}")

    def statement(self, text, line):
        if text.startswith("."):
            return self.declaration(text)
        condition = ""
        if match := re.match(r"@(!?)(%\w+)\s+", text):
            condition = f"if ({match[1]}{self.target(match[2])}) "
            text = text[match.end() :]
        statement = self.instruction(text, line)
        if touched := self._touched(text, line):
            return f"{condition}{{ {touched} {statement} }}"
        return condition + statement

    def _touched(self, text, line):
        """Notes the accesses of another instruction to registers that wgmma takes."""
        opcode, _, rest = text.partition(" ")
        if not self.watched or opcode.startswith("wgmma."):
            return ""
        writes = 0 if opcode.startswith(("st.", "stmatrix.", "red.", "cp.", "bar")) else 1
        calls = []
        for i, operand in enumerate(_split(rest)):
            access = "write" if i < writes else "read"
            for register in re.findall(r"%\w+", operand):
                if register in self.watched:
                    calls.append(f"watch.{access}({self.watched[register]}, {line});")
        return " ".join(calls)

    def translate(self, body, first_line):
        """`body`: what stands between the function's braces."""
        at, line = 0, first_line
        for product in re.findall(r"wgmma\.mma_async[^;]*;", body):
            for register in re.findall(r"%\w+", "".join(re.findall(r"\{([^}]*)\}", product))):
                self.watched.setdefault(register, len(self.watched))
        while at < len(body):
            if body[at] in " \t\n":
                line += body[at] == "\n"
                at += 1
            elif body[at] in "{}":
                self.lines.append(body[at])
                at += 1
            elif match := re.compile(r"([$\w]+):(?!:)").match(body, at):
                self.lines.append(f"{_name(match[1])}:;")
                at = match.end()
            else:
                end = body.index(";", at)
                text = re.sub(r"\s+", " ", body[at:end]).strip()
                try:
                    self.lines.append(self.statement(text, line) if text else "")
                except (Unknown, ValueError, KeyError, IndexError, TypeError) as error:
                    raise Unknown(f"line {line}: {text}: {error}") from error
                line += body.count("\n", at, end)
                at = end + 1

    def cpp(self):
        lines = "\n".join(line for line in self.lines if line)
        if self.watched:
            lines = f"isa::Watch<{len(self.watched)}> watch;\n{lines}"
        return f"static void {_name(self.name)}(void* const* arguments) {{\n{lines}\n}}\n"


class Module:
    """One PTX file."""

    def __init__(self, text, path="kernels.ptx"):
        self.path = path
        self.shared, self.globals, self.functions = set(), {}, {}
        self.entries = []
        text = re.sub(r"//[^\n]*", "", text)
        self.arch = re.search(r"^\.target\s+sm_(\w+)", text, re.M)[1]
        at = 0
        while match := re.compile(r"\s*(\.[^;{]*)([;{])", re.S).match(text, at):
            head, at = match[1], match.end()
            head = re.sub(r"^(\.version|\.target|\.address_size)[^\n]*\n\s*", "", head)
            while re.match(r"\.(version|target|address_size)\b", head):
                head = re.sub(r"^\.[^\n]*\n?\s*", "", head)
            if match[2] == "{" and re.search(r"=\s*$", head):  # an initialized array
                end = text.index(";", at)
                self._global(head, text[at : text.rindex("}", at, end)])
                at = end + 1
            elif match[2] == "{":
                end = self._closing(text, at)
                self._function(head, text[at:end], text.count("\n", 0, at) + 1)
                at = end + 1
            else:
                self._declaration(head)
        if text[at:].strip():
            raise Unknown(f"after the last function: {text[at:].strip()[:80]}")

    @staticmethod
    def _closing(text, at):
        depth = 1
        for brace in re.compile(r"[{}]").finditer(text, at):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.start()
        raise Unknown("a body without an end")

    def _declaration(self, head):
        if match := re.search(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", head):
            self.shared.add(match[1])
        elif match := re.search(r"\.func\s+(?:\([^)]*\)\s*)?([\w$]+)", head):
            self.functions[match[1]] = None
        else:
            raise Unknown(f"declaration {head.strip()}")

    def _global(self, head, values):
        match = re.search(r"\.(?:global|const)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", head)
        if match is None:
            raise Unknown(f"global {head.strip()}")
        self.globals[match[2]] = (
            f"alignas({match[1]}) static const unsigned char {_name(match[2])}[{match[3]}] = "
            f"{{{values}}};"
        )

    def _function(self, head, body, line):
        match = re.search(r"\.(entry|func)\s+([\w$]+)\s*(?:\((.*?)\))?", head, re.S)
        if match is None:
            raise Unknown(f"function {head.strip()}")
        params = []
        for param in _split(match[3] or ""):
            one = re.fullmatch(
                r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", param
            )
            if one is None:
                raise Unknown(f"parameter {param}")
            size = int(re.sub(r"\D", "", one[1])) // 8 * int(one[3] or 1)
            params.append((one[2], size))
        self.functions.setdefault(match[2], None)
        function = Function(self, match[2], params)
        bounds = re.search(r"\.maxntid\s+(\d+),\s*(\d+),\s*(\d+)", head)
        function.max_threads = math.prod(map(int, bounds.groups())) if bounds else 1024
        function.translate(body, line)
        self.functions[match[2]] = function
        if match[1] == "entry":
            self.entries.append(function)

    def cpp(self):
        functions = [f for f in self.functions.values() if f is not None]
        lines = [
            f"// {self.path}, translated by ptx_to_cpp.py.",
            '#include "simt/ptx_instructions.h"',
            "using namespace qlora_ext;",
            "namespace {",
            f'constexpr const char* kFile = "{Path(self.path).name}";',
            *self.globals.values(),
            *(f"void {_name(f.name)}(void* const*);" for f in functions),
            *(f.cpp().removeprefix("static ") for f in functions),
        ]
        for i, entry in enumerate(self.entries):
            sizes = ", ".join(str(size) for _, size in entry.params)
            lines.append(
                f"const bool registered{i} = simt::register_translation({int(self.arch[:2])}, "
                f'"{entry.name}", &{_name(entry.name)}, {{{sizes}}}, {entry.max_threads});'
            )
        return "\n".join([*lines, "}  // namespace", ""])


def translate(text, path="kernels.ptx"):
    """C++ of a PTX file's text."""
    return Module(text, path).cpp()


if __name__ == "__main__":
    print(translate(Path(sys.argv[1]).read_text(), sys.argv[1]), end="")
