"""Lists every kernel instantiation that dispatch can reach, the sweep's cases that launch it, and
the case that fails when it is turned into a no-op. `--write` renews the page of it,
docs/generated/kernel_coverage.md.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests / "support")]

import qlora_ext  # noqa: F401  (the CPU backend's ops)
from simt import build
from simt.sweep import CASES, run_case
from simt.test_simt_kernels import agrees_with_cpu

HEAD = """\
# Every kernel, and what executes it

Made by `python tests/simt/coverage.py --write`. For each instantiation that a launcher names, it
lists the calls of `tests/simt/sweep.py` that launch it, and the first call whose result is wrong if
the kernel does nothing (`SIMT_SKIP`). The tests in `tests/simt` run all of them on the emulated
machine ([kernels.md](../kernels.md)). None has run on a GPU yet.

"""


def rows(simt):
    cases_of = {name: [] for name in simt.kernels()}
    for case in sorted(CASES, key=lambda case: case.large):
        simt.reset_launches()
        run_case(simt, case)
        for name, launches in simt.kernels().items():
            if launches:
                cases_of[name].append(case)
    for name, cases in sorted(cases_of.items()):
        noticed = None
        with simt.skip(name), simt.poison(0x5A):
            for case in cases[:5]:
                if not agrees_with_cpu(case, run_case(simt, case)):
                    noticed = case
                    break
        yield name, cases, noticed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the generated page")
    write = parser.parse_args().write
    table = list(rows(build.load_simt()))
    never = sum(not cases for _, cases, _ in table)
    unnoticed = sum(noticed is None for _, _, noticed in table)
    lines = [
        f"{len(table)} instantiations; {never} never launched; {unnoticed} whose absence is not "
        f"noticed; {len(CASES)} cases.\n",
        "| kernel | cases that launch it | as a no-op, noticed by |",
        "| --- | --- | --- |",
    ]
    for name, cases, noticed in table:
        first = f"{len(cases)}: {cases[0]}" + (", ..." if len(cases) > 1 else "") if cases else "0"
        lines.append(f"| `{name}` | {first} | {noticed or 'NOT NOTICED'} |")
    text = "\n".join(lines) + "\n"
    if write:
        (build.ROOT / "docs" / "generated" / "kernel_coverage.md").write_text(HEAD + text)
    print(text)
    return 1 if never or unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
