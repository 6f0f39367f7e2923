"""Compares what every ptxas found here makes of the same PTX. A driver that compiles PTX has one of
these versions inside.

    python bench/ptxas_report.py FOLDER    # nvcc's ptxas, triton's two, and those under FOLDER
    python bench/ptxas_report.py FOLDER --write   # also into docs/generated/kernel_report.md

It compiles csrc/cuda for 9.0a with each version once. bench/sass_flow.py then checks the data flow
of every kernel. The table has a row for each kernel whose main loop one ptxas makes more than 10%
longer than another. ptxas' messages about serialized wgmma (C7510, C7511) are printed. The exit
status is 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import kernel_report
import sass_flow
from kernel_report import Ptxas

ARCH = "9.0a"
TOLERANCE = 1.1  # longest over shortest main loop
BEGIN, END = "<!-- table: bench/ptxas_report.py --write -->", "<!-- end of ptxas table -->"


def find_ptxas(folder=None):
    """nvcc's ptxas, then one of each other version found in triton's wheel and under `folder`."""
    places = []
    spec = importlib.util.find_spec("triton")
    for place in spec.submodule_search_locations if spec else ():
        places += sorted((Path(place) / "backends" / "nvidia" / "bin").glob("ptxas*"))
    if folder is not None:
        places += sorted(p for p in Path(folder).rglob("ptxas*") if p.is_file())
    found = {None: kernel_report.nvcc_ptxas()}
    for path in places:
        version = kernel_report.version_of(path)
        if version not in [p.version for p in found.values()]:
            found[version] = Ptxas(version, path)
    first, *others = found.values()
    return [first, *sorted(others, key=lambda p: [int(n) for n in p.version.split(".")])]


def differing(lengths):
    """The kernels that differ by more than TOLERANCE or are missing from some ptxas. lengths is
    {kernel: [its main loop's instructions, for each ptxas]}."""
    return {
        name: row
        for name, row in lengths.items()
        if len(set(row)) > 1 and (None in row or max(row) > TOLERANCE * min(row))
    }


def compare(versions, sources=None):
    """(messages about faults, other messages, {kernel: main loop for each version})."""
    sources = sources or kernel_report.all_sources()
    weights, lengths, findings, notices = {}, {}, [], []
    for column, ptxas in enumerate(versions):
        cubins = kernel_report.in_parallel(
            kernel_report.compile_cubin, [(source, ARCH, ptxas) for source in sources]
        )
        functions = kernel_report.in_parallel(
            kernel_report.disassemble, [(cubin, ARCH) for cubin in cubins]
        )
        kernels = {k.name: k for of_cubin in functions for k in of_cubin}
        for cubin in cubins:
            notices += [f"ptxas {ptxas.version}: {said}" for said in kernel_report.messages(cubin)]
        for k in (k for of_cubin in functions for k in of_cubin):
            for finding in sass_flow.check_function(k.name, k.code):
                findings.append(f"ptxas {ptxas.version}: {finding}")
        filled = [k for k in kernels.values() if not k.is_empty]
        if column == 0:
            kernel_report.cpp_expressions(filled)
            weights = {k.name: k.weights for k in filled}
        for k in filled:
            k.weights = weights.get(k.name)
            if loop := k.main_loop():
                lengths.setdefault(k.name, [None] * len(versions))[column] = len(loop)
    return findings, notices, lengths


def markdown(versions, lengths):
    header = ["kernel", *(p.version for p in versions)]
    rows = [[f"`{name}`", *row] for name, row in sorted(differing(lengths).items())]
    return kernel_report.table(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="with more of them, at any depth")
    parser.add_argument("--only", action="append", help="stems of csrc/cuda/*.cu; default: all")
    parser.add_argument(
        "--write", action="store_true", help="replace the table in docs/generated/kernel_report.md"
    )
    arguments = parser.parse_args()
    if sentence := kernel_report.missing_tools():
        sys.exit(sentence)
    if arguments.folder is not None and not arguments.folder.is_dir():
        sys.exit(
            f"ptxas_report: {arguments.folder} is not a folder; `make ptxas` makes and fills one"
        )
    versions = find_ptxas(arguments.folder)
    findings, notices, lengths = compare(versions, arguments.only)
    print(f"{ARCH} through ptxas {', '.join(p.version for p in versions)}")
    print(f"Data flow: {len(findings)} findings", *findings, sep="\n  ")
    print(f"Serialized wgmma: {len(notices)} messages", *notices, sep="\n  ")
    more = f"{len(differing(lengths))} of {len(lengths)} main loops differ by more than 10%"
    print(f"{more}; instructions of each:")
    print(markdown(versions, lengths))
    if arguments.write:
        kernel_report.write_table(BEGIN, END, markdown(versions, lengths))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
