"""What each CUDA kernel became: registers, spills, shared memory, occupancy, and the SASS of its
main loop. Needs nvcc and NVIDIA's disassembler, no GPU.

    python bench/kernel_report.py                     # compiles csrc/cuda/*.cu, prints the table
    python bench/kernel_report.py --write             # and replaces it in its page
    python bench/kernel_report.py --arch 8.0 --only gemm_4bit

A loop is the SASS from a branch's target to that branch. The main loop is the one with the most
tensor-core instructions, and of those the shortest (in a kernel without such instructions, the
longest; in one without a loop, all of its code). "SASS per weight" divides all its instructions
(also loads of x, scales, addressing and barriers) by the weights that one thread decodes in one
turn. Skipped parts of the loop count as run, so the figure is an upper bound.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import sass_flow
from sass_flow import find_tool, run

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "kernel_report"
PAGE = ROOT / "docs" / "generated" / "kernel_report.md"
ARCHS = ("7.5", "8.0", "9.0a")  # in the table
FLOW_ARCHS = (*ARCHS, "10.0", "12.0")  # in the data-flow check
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
# Line information (which PTX line an instruction comes from) changes no instruction.
PTXAS_FLAGS = ["--warn-on-spills", "--warning-as-error", "--generate-line-info"]

# Facts that SASS does not contain: threads per block, bytes of shared memory, and the weights that
# a thread decodes in one turn of the main loop. {0}, {1}, ... are the kernel's template arguments.
# Each may be a C++ expression with csrc/cuda's own constants.
FUSED, BACKWARD = "FusedTraits<{0}, {2}>", "BackwardTraits<{0}, {2}>"
KERNELS = {
    "dequantize_4bit_vector": ("kDequantizeThreads", "sizeof(DequantizeSmem)", "kChunk"),
    "dequantize_4bit_any": ("256", "0", None),
    "embedding_4bit_rows": ("kDequantizeThreads", "sizeof(DequantizeSmem)", "kChunk"),
    "embedding_4bit_any": ("256", "0", None),
    "quantize_4bit_blocks": ("kQuantizeThreads", "sizeof(QuantizeSmem)", None),
    "quantize_4bit_tensor": ("kQuantizeThreads", "sizeof(QuantizeSmem)", None),
    "quantize_4bit_partial_max": ("kMaxThreads", "sizeof(MaxSmem)", None),
    "quantize_4bit_finish_max": ("kMaxThreads", "sizeof(MaxSmem)", None),
    "quantize_4bit_finish_mean": ("32", "0", None),
    "quantize_4bit_finish_scale": ("32", "0", None),
    "quantize_4bit_unit_scale": ("32", "0", None),
    "tree_sum_level": ("kTreeThreads", "0", None),
    "tree_sum_finish": ("kTreeThreads", "0", None),
    "quantize_absmax_groups": ("kAbsmaxThreads", "sizeof(QuantizeAbsmaxSmem)", None),
    "dequantize_absmax_codes": ("kAbsmaxThreads", "0", None),
    "gemm_4bit_fused": (
        f"{FUSED}::kThreads",
        "sizeof(FusedSmem<{0}, {2}>)",
        f"64 * {FUSED}::kStages",
    ),
    "gemm_4bit_any": ("kTileThreads", "sizeof(AnySmem)", None),
    "gemm_4bit_backward_fused": (f"{BACKWARD}::kThreads", "sizeof(BackwardSmem<{0}, {2}>)", "64"),
    "gemm_4bit_backward_any": ("kTileThreads", "sizeof(AnySmem)", None),
    "grouped_gemm_4bit_fused": (
        f"{FUSED}::kThreads",
        "sizeof(FusedSmem<{0}, {2}>)",
        f"64 * {FUSED}::kStages",
    ),
    "grouped_gemm_4bit_any": ("kTileThreads", "sizeof(AnySmem)", None),
    "grouped_gemm_4bit_backward_fused": (
        f"{BACKWARD}::kThreads",
        "sizeof(BackwardSmem<{0}, {2}>)",
        "64",
    ),
    "grouped_gemm_4bit_backward_any": ("kTileThreads", "sizeof(AnySmem)", None),
    "reduce_parts": ("256", "0", None),
    "lora_rows_mma": ("kLoraThreads", "sizeof(LoraRowsSmem<{2}>)", None),
    "lora_columns_mma": ("kLoraThreads", "sizeof(LoraColumnsSmem<{2}>)", None),
    "lora_tile": ("kTileThreads", "sizeof(TileSmem)", None),
    "grouped_lora_rows_mma": ("kLoraThreads", "sizeof(LoraRowsSmem<{2}>)", None),
    "grouped_lora_columns_mma": ("kLoraThreads", "sizeof(LoraColumnsSmem<{2}>)", None),
    "grouped_lora_rows_tile": ("kTileThreads", "sizeof(TileSmem)", None),
    "grouped_lora_columns_tile": ("kTileThreads", "sizeof(TileSmem)", None),
    "sum_rows_tokens": ("kSumRowsThreads", "0", None),
    "merge_lora_4bit_tile": ("kTileThreads", "sizeof(TileSmem)", None),
}

# Limits of one SM: registers, threads, shared bytes, blocks; and the shared bytes that each block
# takes besides its own.
SM_LIMITS = {
    "7.5": (65536, 1024, 65536, 16, 0),
    "8.0": (65536, 2048, 167936, 32, 1024),
    "9.0a": (65536, 2048, 233472, 32, 1024),
}


# ---------------------------------------------------------------- tools


def missing_tools():
    """A message that says which tools are missing, or None."""
    if shutil.which("nvcc") is None:
        return "kernel_report: nvcc is not on the PATH"
    sentence = sass_flow.missing_tools()
    return f"kernel_report: {sentence}" if sentence else None


@dataclasses.dataclass(frozen=True)
class Ptxas:
    """One ptxas. Without a path it is the one that nvcc calls."""

    version: str
    path: Path | None = None

    def assemble(self, ptx, arch, cubin):
        """Writes the cubin and returns ptxas' messages."""
        target = f"-arch=sm_{arch.replace('.', '')}"
        if self.path is None:
            options = ",".join(PTXAS_FLAGS)
            return run("nvcc", target, "-O3", f"-Xptxas={options}", "-cubin", ptx, "-o", cubin)
        if int(self.version.split(".")[0]) >= 13:
            return run(self.path, target, "-O3", *PTXAS_FLAGS, ptx, "-o", cubin)
        # 12.9 and older only know PTX up to 8.8, in which our PTX means the same.
        lowered = cubin.with_suffix(".lowered.ptx")
        text = ptx.read_text()
        lowered.write_text(re.sub(r"^\.version 9\.\d+$", ".version 8.8", text, flags=re.M))
        try:
            return run(self.path, target, "-O3", *PTXAS_FLAGS, lowered, "-o", cubin)
        finally:
            lowered.unlink()


def version_of(program):
    """The release of nvcc or of a ptxas, such as 13.0.88."""
    return re.search(r"release [\d.]+, V([\d.]+)", run(program, "--version"))[1]


@functools.cache
def nvcc_ptxas():
    return Ptxas(version_of("nvcc"))


def made(name, digest, suffix, make):
    """build/kernel_report/<name>-<digest><suffix>. make(partial) writes it if it is missing."""
    path = BUILD / f"{name}-{digest}{suffix}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{name}-{'?' * len(digest)}{suffix}"):
            old.unlink()
            Path(f"{old}.txt").unlink(missing_ok=True)
        partial = path.with_suffix(f".{os.getpid()}{suffix}")
        make(partial)
        partial.rename(path)
    return path


def digest_of(*texts, files=()):
    digest = hashlib.sha256(" ".join(texts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compile_ptx(source, arch):
    """csrc/cuda/<source>.cu as PTX for one architecture, cached by the contents of csrc."""
    files = [
        path
        for path in sorted([*CUDA.iterdir(), *(ROOT / "csrc").glob("*.h")])
        if path.suffix in (".cuh", ".h") or path.name == f"{source}.cu"
    ]

    def make(partial):
        target = f"-arch=compute_{arch.replace('.', '')}"
        run(
            "nvcc",
            *FLAGS,
            "-I",
            ROOT / "csrc",
            target,
            "-ptx",
            CUDA / f"{source}.cu",
            "-o",
            partial,
        )

    digest = digest_of(*FLAGS, nvcc_ptxas().version, files=files)
    return made(f"{source}-{arch}", digest, ".ptx", make)


def compile_cubin(source, arch, ptxas=None):
    """The cubin of csrc/cuda/<source>.cu from one ptxas (default: nvcc's). NAME.cubin.txt, next to
    it, has ptxas' messages."""
    ptxas = ptxas or nvcc_ptxas()
    ptx = compile_ptx(source, arch)

    def make(partial):
        said = ptxas.assemble(ptx, arch, partial)
        Path(f"{BUILD / name}-{digest}.cubin.txt").write_text(said)

    name = f"{source}-{arch}-ptxas-{ptxas.version}"
    digest = digest_of(*PTXAS_FLAGS, files=[ptx])
    return made(name, digest, ".cubin", make)


def messages(cubin):
    """ptxas' important messages about this cubin: that it serialized wgmma (C7510, C7511). ptxas
    marks them as information only."""
    said = Path(f"{cubin}.txt").read_text()
    return tuple(line for line in said.splitlines() if re.search(r"\bC751[01]\b", line))


# ---------------------------------------------------------------- one kernel


@dataclasses.dataclass
class Kernel:
    """One kernel instantiation in one binary. code: (address, instruction) pairs of its SASS."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes per thread: spills, indexed arrays, arguments of printf
    code: list
    mangled: str = ""
    threads: int = 0
    shared: int = 0
    weights: int | None = None

    @property
    def base(self):
        return self.name.split("<")[0]

    @property
    def arguments(self):
        inside = self.name.partition("<")[2].rpartition(">")[0]
        return [a.strip() for a in inside.split(",")] if inside else []

    @property
    def is_empty(self):
        """Whether it is a variant for another architecture, whose body is only a trap."""
        return len([i for _, i in self.code if opcode(i) not in ("NOP", "BRA")]) <= 3

    @property
    def spills(self):
        """Whether anything is read back from the stack. The arguments of the message about an index
        out of range are only written there."""
        return self.stack > 0 and count([i for _, i in self.code], "LDL") > 0

    @property
    def blocks_per_sm(self):
        registers, threads, shared, blocks, cost = SM_LIMITS[self.arch]
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = registers // per_warp // warps
        by_shared = shared // max(self.shared + cost, 1)
        return min(by_registers, threads // self.threads, by_shared, blocks)

    @property
    def occupancy(self):
        return self.blocks_per_sm * self.threads / SM_LIMITS[self.arch][1]

    def loop_bounds(self):
        """(first, last) address of the loop with the most MMA (of those, the shortest). Without
        MMA: of the longest loop if the kernel's weights are known. None if there is none."""
        loops = {}
        for address, text in self.code:
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)\s*$", text)
            if target and int(target[1], 16) < address:
                bounds = int(target[1], 16), address
                loops[bounds] = [i for a, i in self.code if bounds[0] <= a <= address]
        mma = {bounds: count(loop, "HMMA", "HGMMA") for bounds, loop in loops.items()}
        if any(mma.values()):
            return max(loops, key=lambda bounds: (mma[bounds], -len(loops[bounds])))
        return max(loops, key=lambda b: len(loops[b]), default=None) if self.weights else None

    def main_loop(self):
        """The instructions within loop_bounds(). Without a loop, all of them if the kernel's
        weights are known."""
        if (bounds := self.loop_bounds()) is None:
            return [text for _, text in self.code if self.weights and not text.startswith("NOP")]
        return [text for address, text in self.code if bounds[0] <= address <= bounds[1]]

    @property
    def sass_per_weight(self):
        loop = self.main_loop()
        return len(loop) / self.weights if loop and self.weights else None

    def widths(self, *opcodes):
        """Bits of each access by these opcodes: Counter, e.g. {128: 4}."""
        found = Counter()
        for _, text in self.code:
            if opcode(text) in opcodes:
                parts = modifiers(text)
                wide = [int(m) for m in parts if m in ("64", "128")]
                small = [
                    {"U8": 8, "S8": 8, "U16": 16, "S16": 16}[m]
                    for m in parts
                    if m in ("U8", "S8", "U16", "S16")
                ]
                found[(wide or small or [32])[0]] += 1
        return found


def opcode(text):
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def modifiers(text):
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[1:]


def count(code, *opcodes):
    return sum(opcode(i) in opcodes for i in code)


def clean_name(demangled):
    """`void qlora_ext::k<(qlora_ext::Normalization)0, true>(Params)` -> `k<0, true>`."""
    name = re.sub(r"^void ", "", demangled).replace("qlora_ext::", "")
    name = re.sub(r"\((?:Normalization|bool|int)\)", "", name)
    return name.partition("(")[0].replace("<void>", "")


def disassemble(cubin, arch):
    usage, name = {}, None
    for line in run(find_tool("cuobjdump"), "-res-usage", cubin).splitlines():
        if m := re.search(r"Function (\S+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usage[name] = int(m[1]), int(m[2])
    listing = run(find_tool("cuobjdump"), "-sass", cubin)
    code = {name: code for _, name, code in sass_flow.parse_listing(listing)}
    mangled = [n for n in code if n in usage]
    plain = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    names = [clean_name(n) for n in plain.splitlines()]
    return [Kernel(n, arch, *usage[m], code[m], m) for m, n in zip(mangled, names, strict=True)]


def evaluate(expressions, name="sizes"):
    """The values of constant C++ expressions. A host program of this name, which includes the
    kernels' headers, prints them."""
    lines = [f'  std::printf("%ld\\n", long({expression}));' for expression in expressions]
    text = "\n".join(
        [
            "#include <cstdio>",
            *(f'#include "cuda/{p.name}"' for p in sorted(CUDA.glob("*.cuh"))),
            "using namespace qlora_ext;",
            "int main() {",
            *lines,
            "}",
        ]
    )

    def make(partial):
        source = BUILD / f"{name}.cu"
        source.write_text(text)
        target = "arch=compute_80,code=sm_80"
        run("nvcc", *FLAGS, "-I", ROOT / "csrc", "-gencode", target, "-o", partial, source)

    files = sorted([*CUDA.glob("*.cuh"), *(ROOT / "csrc").glob("*.h")])
    program = made(name, digest_of(text, files=files), "", make)
    return [int(line) for line in run(program).splitlines()]


def cpp_expressions(kernels):
    """Sets threads, shared and weights."""
    values = iter(
        evaluate(e.format(*k.arguments) if e else "-1" for k in kernels for e in KERNELS[k.base])
    )
    for k in kernels:
        k.threads, k.shared, weights = next(values), next(values), next(values)
        k.weights = weights if weights > 0 else None


def all_sources():
    return sorted(p.stem for p in CUDA.glob("*.cu"))


def in_parallel(function, jobs):
    """[function(*job) for each job], MAX_JOBS (2) at a time, for jobs that wait for programs."""
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return list(pool.map(lambda job: function(*job), jobs))


def report(archs=ARCHS, sources=None):
    """All kernels of the given files (default: csrc/cuda/*.cu), without empty variants."""
    jobs = [(source, arch) for source in sources or all_sources() for arch in archs]
    cubins = in_parallel(compile_cubin, jobs)
    seen, kernels = set(), []
    for (_, arch), cubin in zip(jobs, cubins, strict=True):
        for k in disassemble(cubin, arch):
            if not k.is_empty and (k.name, arch) not in seen:
                seen.add((k.name, arch))
                kernels.append(k)
    unknown = sorted({k.base for k in kernels} - set(KERNELS))
    if unknown:
        raise RuntimeError(f"kernel_report: no entry in KERNELS for {', '.join(unknown)}")
    cpp_expressions(kernels)
    return kernels


def flow(archs=FLOW_ARCHS, sources=None, ptxas=None):
    """{architecture: (number of functions, findings of sass_flow and messages())}."""
    jobs = [(source, arch, ptxas) for source in sources or all_sources() for arch in archs]
    cubins = in_parallel(compile_cubin, jobs)
    kernels = in_parallel(disassemble, [(c, a) for c, (_, a, _) in zip(cubins, jobs, strict=True)])
    result = {arch: [0, []] for arch in archs}
    for (_, arch, _), cubin, functions in zip(jobs, cubins, kernels, strict=True):
        result[arch][0] += len(functions)
        result[arch][1] += messages(cubin)
        for k in functions:
            result[arch][1] += map(str, sass_flow.check_function(k.name, k.code))
    return {arch: (functions, tuple(found)) for arch, (functions, found) in result.items()}


# ---------------------------------------------------------------- the table


def row(k):
    def widths(*opcodes):
        return (
            " ".join(f"{n}x{bits}" for bits, n in sorted(k.widths(*opcodes).items(), reverse=True))
            or "-"
        )

    loop = k.main_loop()
    per_weight = f"{k.sass_per_weight:.2f}" if k.sass_per_weight else "-"
    mma = count([i for _, i in k.code], "HMMA", "HGMMA")
    return [
        f"`{k.name}`",
        k.arch,
        k.registers,
        k.stack,
        k.shared,
        f"{k.blocks_per_sm} ({k.occupancy:.0%})",
        len(loop) or "-",
        per_weight,
        mma or "-",
        widths("LDG", "LDGSTS"),
        widths("STG"),
    ]


HEADER = [
    "kernel",
    "arch",
    "registers",
    "stack B",
    "shared B",
    "blocks/SM (occupancy)",
    "SASS in main loop",
    "per weight",
    "MMA",
    "global loads, bits",
    "global stores, bits",
]


def markdown(kernels):
    order = {name: i for i, name in enumerate(KERNELS)}
    rows = [row(k) for k in sorted(kernels, key=lambda k: (order[k.base], k.name, k.arch))]
    return table(HEADER, rows)


def table(header, rows):
    """A table in Markdown. A cell that is None becomes a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


BEGIN, END = "<!-- table: bench/kernel_report.py --write -->", "<!-- end of table -->"


def write_table(begin, end, table):
    """Writes a table into docs/generated/kernel_report.md, between two of its lines."""
    before, opened, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise RuntimeError(f"kernel_report: {PAGE} lacks the line {begin if not opened else end}")
    PAGE.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all of them")
    parser.add_argument("--only", action="append", help="stems of csrc/cuda/*.cu; default: all")
    parser.add_argument(
        "--write", action="store_true", help="replace the table in docs/generated/kernel_report.md"
    )
    parser.add_argument(
        "--flow", action="store_true", help="check the data flow instead, of newer ones too"
    )
    arguments = parser.parse_args()
    if sentence := missing_tools():
        sys.exit(sentence)
    if arguments.flow:
        wrong = 0
        for arch, (functions, sentences) in flow(sources=arguments.only).items():
            print(
                f"{arch}: {functions} functions, {len(sentences)} findings", *sentences, sep="\n  "
            )
            wrong += len(sentences)
        sys.exit(1 if wrong else 0)
    table = markdown(report(tuple(arguments.arch or ARCHS), arguments.only))
    if arguments.write:
        write_table(BEGIN, END, table)
    else:
        print(table)


if __name__ == "__main__":
    main()
