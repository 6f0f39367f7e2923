"""Every kernel instantiation, run by the sweep (sweep.py): launched at all, deterministic under
two poison patterns and both orders of lanes, equal to the CPU backend, missed when turned off, and
clean under AddressSanitizer, UBSan and ThreadSanitizer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_ext  # also registers the CPU backend's ops
from simt import build
from simt.sweep import CASES, run_case


@pytest.fixture(scope="module")
def simt():
    return build.load_simt()


def same_bytes(a, b):
    # A view of bytes of a view that is not aligned is refused: copy first.
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.clone().view(torch.uint8), y.clone().view(torch.uint8))
        for x, y in zip(a, b)
    )


def agrees_with_cpu(case, results):
    wanted = case.run(torch.ops.qlora_ext)
    if case.exact:
        return same_bytes(results, wanted)
    for got, want in zip(results, wanted):
        want = want.double()
        # Different orders of summation, and the fused kernels multiply in 16 bits.
        limit = (2e-2 if got.dtype != torch.float32 else 2e-3) * want.abs().max().item() + 1e-6
        if not (got.double() - want).abs().max().item() <= limit:  # NaN never passes
            return False
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(simt, case):
    with simt.poison(0xFF):
        first = [t.clone() for t in run_case(simt, case)]
    with simt.poison(0x11, reverse=True):
        second = run_case(simt, case)
    assert same_bytes(first, second), "reads what nothing wrote, or lanes are not ordered"
    assert agrees_with_cpu(case, first)


def test_every_reachable_kernel_is_launched(simt):
    simt.reset_launches()
    for case in CASES:
        run_case(simt, case)
    never = [name for name, launches in simt.kernels().items() if launches == 0]
    assert not never, "add cases to sweep.py that launch these, or remove them from dispatch"


def test_the_page_lists_these_kernels(simt):
    """docs/generated/kernel_coverage.md; `python tests/simt/coverage.py --write` renews it."""
    page = (build.ROOT / "docs" / "generated" / "kernel_coverage.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)` \|", page, re.M)) == set(simt.kernels())
    assert f"{len(CASES)} cases" in page and "NOT NOTICED" not in page


def test_a_kernel_turned_off_is_missed(simt):
    cases_of = {}
    for case in sorted(CASES, key=lambda case: case.large):  # the quick ones first
        simt.reset_launches()
        run_case(simt, case)
        for name, launches in simt.kernels().items():
            if launches:
                cases_of.setdefault(name, []).append(case)
    unmissed = []
    for name, cases in cases_of.items():
        with simt.skip(name), simt.poison(0x5A):
            if all(agrees_with_cpu(case, run_case(simt, case)) for case in cases[:3]):
                unmissed.append(name)
    assert not unmissed, "these kernels did nothing and no case of the sweep noticed"


def sweep(environment, prefix=()):
    """Runs the sweep's cases bare in a process with this environment: each must come to its end."""
    python_path = str(Path(qlora_ext.__file__).parent.parent)  # the one built
    result = subprocess.run(
        [*prefix, sys.executable, str(Path(__file__).with_name("sweep.py"))],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": python_path},
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-20000:]
    assert len(result.stdout.split()) == sum(not case.large for case in CASES)


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitized(sanitize):
    build.require(sanitize)
    sweep(build.sanitizer_environment(sanitize), build.fixed_addresses())
