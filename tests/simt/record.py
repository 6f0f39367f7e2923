"""Writes what the performance model takes from the emulated machine: which kernels dispatch
chooses, how it cuts each product, and the wavefronts of each access to shared memory.

    python tests/simt/record.py            # says whether bench/predict/emulated.json is current
    python tests/simt/record.py --write    # renews it

The kernels run as nvcc compiled them (needs nvcc). The addresses of the first block's lanes are
grouped into accesses of a warp: the n-th time that each lane of a warp runs an instruction is one
access. Lanes whose predicate is false are not in it.
"""

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests / "support"), str(tests.parent / "bench")]

import torch
from kernel_report import clean_name
from predict import cases, shared

import qlora_ext  # noqa: F401  (the CPU ops, which make the weights)
from simt import build
from simt.sweep import _randn, _seeded, _stack, _weight

PTX_ARCHS = {80: "80", 90: "90a"}
SOURCES = {"gemm_4bit_fused": "gemm_4bit", "gemm_4bit_backward_fused": "gemm_4bit_backward"}
SOURCES |= {f"grouped_{name}": f"grouped_{source}" for name, source in SOURCES.items()}
SOURCES |= {"lora_rows_mma": "lora", "lora_columns_mma": "lora"}
SOURCES |= {"dequantize_4bit_vector": "dequantize_4bit", "quantize_4bit_blocks": "quantize_4bit"}


def calls():
    """{name: function(simt, rows)}: small calls whose first block has full tiles and some turns of
    its main loop."""
    g = _seeded("record")
    bf16 = torch.bfloat16
    wide, tall = _weight(g, (128, 2048), nested=True), _weight(g, (512, 256), nested=True)
    wides, talls = (_stack(g, (1, *shape), nested=True) for shape in ((128, 2048), (512, 256)))

    def all_of_one(M):
        return torch.tensor([M], dtype=torch.int32), torch.arange(M, dtype=torch.int32)

    A, B = _randn(g, cases.RANK, 512), _randn(g, 512, cases.RANK)
    dense = _randn(g, 64, 512, dtype=bf16)
    quantize = (64, "nf4", None, "absmax", 3.0, "none", 1.0)
    return {
        "gemm_4bit": lambda simt, M: simt.gemm_4bit(_randn(g, M, 2048, dtype=bf16), *wide, None),
        "gemm_4bit_backward": lambda simt, M: simt.gemm_4bit_backward(
            _randn(g, M, 512, dtype=bf16), *tall
        ),
        "grouped_gemm_4bit": lambda simt, M: simt.grouped_gemm_4bit(
            _randn(g, M, 2048, dtype=bf16), *wides, *all_of_one(M), None, None, None
        ),
        "grouped_gemm_4bit_backward": lambda simt, M: simt.grouped_gemm_4bit_backward(
            _randn(g, M, 512, dtype=bf16), *talls, all_of_one(M)[0], None, None
        ),
        "lora_shrink": lambda simt, M: simt.lora_shrink(_randn(g, M, 512, dtype=bf16), A, 1.0),
        "lora_expand_backward": lambda simt, M: simt.lora_expand_backward(
            _randn(g, M, 512, dtype=bf16), _randn(g, M, cases.RANK), B
        ),
        "dequantize_4bit": lambda simt, M: simt.dequantize_4bit(*wide, bf16),
        "quantize_4bit": lambda simt, M: simt.quantize_4bit(dense, *quantize),
    }


# (call, architecture that dispatch sees, rows)
RUNS = [(op, arch, rows) for op in cases.PRODUCTS for arch in (80, 89, 90) for rows in (1, 16, 64)]
RUNS += [
    (op, arch, rows) for op in cases.GROUPED for arch in (80, 89, 90) for rows in (1, 16, 32, 64)
]
RUNS += [
    (op, arch, 256)
    for op in ("lora_shrink", "lora_expand_backward", "dequantize_4bit", "quantize_4bit")
    for arch in (80, 89, 90)
]


def launched(simt, run, rows):
    """The kernels of this call that the model knows."""
    simt.reset_launches()
    run(simt, rows)
    return [name for name, launches in simt.kernels().items() if launches and base(name) in SOURCES]


def base(kernel):
    return kernel.split("<")[0]


def by_warp(accesses, numbers):
    """[[n-th access of the function, bytes, warp-wide executions, least, most wavefronts]]"""
    occurrences = collections.Counter()
    warps = collections.defaultdict(dict)
    for line, thread, address, size in accesses:
        nth = occurrences[line, thread]
        occurrences[line, thread] += 1
        warps[line, size, thread // 32, nth][thread % 32] = address
    total = {}
    for (line, size, _, _), lanes in warps.items():
        entry = total.setdefault(numbers[line], [size, 0, 0, 0])
        least, most = shared.wavefronts(lanes, size)
        entry[1:] = entry[1] + 1, entry[2] + least, entry[3] + most
    return [[number, *entry] for number, entry in sorted(total.items())]


@functools.cache
def numbers_of(source, arch):
    """{kernel: accesses() of it} in the PTX of one source."""
    with build._locked():
        ptx = build._ptx(build.ROOT / "csrc" / "cuda" / f"{source}.cu", PTX_ARCHS[arch])
    found = shared.accesses(ptx.with_suffix(".ptx"))
    plain = subprocess.run(
        ["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(map(clean_name, plain.splitlines()), found.values(), strict=True))


def as_nvcc_names_it(kernel):
    """An enumerator is a number in a mangled name."""
    for number, name in enumerate(("kAbsmax", "kStandard", "kNone")):
        kernel = kernel.replace(f"Normalization::{name}", str(number))
    return kernel


def plans(simt):
    """{arch x SMs: {op: {N x K: {rows: [parts, lines of a chunk]}}}}"""
    result = {}
    for gpu in cases.GPUS:
        with simt.device(gpu.arch, gpu.sms):
            result[f"{gpu.arch}x{gpu.sms}"] = {
                op: {
                    f"{N}x{K}": {
                        str(M): list(simt.plan(op, M, N, K, cases.RANK)) for M in cases.ROWS
                    }
                    for N, K in layers
                }
                for op, layers in (
                    *((op, cases.LAYERS) for op in cases.PRODUCTS),
                    # The long operand's columns are K: x has K, dY has N.
                    *((op, LENGTHS) for op in ("lora_shrink", "lora_shrink_backward")),
                )
            }
    return result


def experts(simt):
    """{arch: {op: {tokens: the kernel that dispatch takes for a mixture}}}. It goes by the numbers
    of rows and experts, so the experts are small here."""
    g, size = _seeded("experts"), (cases.EXPERTS, 64, 64)
    w4 = _stack(g, size, nested=True)

    def run(simt, op, tokens):
        rows = tokens * cases.TOP
        ends = torch.arange(1, cases.EXPERTS + 1) * rows // cases.EXPERTS
        x = _randn(g, rows, 64, dtype=torch.bfloat16)
        last = (None,) * (4 if op == cases.GROUPED[0] else 2)  # rows, bias, adapters
        getattr(simt, op)(x, *w4, ends.int(), *last)

    result = {}
    for gpu in cases.GPUS:
        with simt.device(gpu.arch, gpu.sms):
            result[str(gpu.arch)] = {
                op: {
                    str(tokens): launched(simt, lambda simt, n, op=op: run(simt, op, n), tokens)[0]
                    for tokens in cases.TOKENS
                }
                for op in cases.GROUPED
            }
    return result


LENGTHS = [(n, n) for n in sorted({n for layer in cases.LAYERS for n in layer})]


def everything(simt):
    run_of = calls()
    chosen, wavefronts = {}, {"8.0": {}, "9.0a": {}}
    for op, arch, rows in RUNS:
        binary = 90 if arch == 90 else 80
        with simt.device(arch, 1), simt.ptx():
            for kernel in launched(simt, run_of[op], rows):
                name = as_nvcc_names_it(kernel)
                chosen.setdefault(str(arch), {}).setdefault(op, {}).setdefault(str(rows), [])
                chosen[str(arch)][op][str(rows)].append(name)
                kept = wavefronts["9.0a" if binary == 90 else "8.0"].setdefault(name, {})
                if str(rows) in kept:
                    continue
                with simt.trace(kernel) as read:
                    run_of[op](simt, rows)
                    numbers = numbers_of(SOURCES[base(kernel)], binary)[name]
                    kept[str(rows)] = by_warp(read(), numbers)
    return {
        "plans": plans(simt),
        "experts": experts(simt),
        "kernels": chosen,
        "shared": wavefronts,
    }


def text(recorded):
    """JSON with a line per kernel, so that a change is readable."""

    def lines(value, depth):
        if depth == 0:
            return json.dumps(value, separators=(",", ":"))
        inside = ",\n".join(f"{json.dumps(k)}: {lines(v, depth - 1)}" for k, v in value.items())
        return "{\n" + inside + "\n}"

    return lines(recorded, 3) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    library = os.environ.get("SIMT_LIBRARY") or build.library(ptx=build.PTX_ARCHS)
    torch.ops.load_library(str(library))
    made = text(everything(build.Simt(library)))
    if arguments.write:
        shared.RECORD.write_text(made)
    elif not shared.RECORD.exists() or made != shared.RECORD.read_text():
        sys.exit("record: emulated.json is stale; python tests/simt/record.py --write renews it")


if __name__ == "__main__":
    main()
