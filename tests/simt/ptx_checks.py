"""What test_simt_ptx.py runs in a process of its own, beside the shared test bodies: the library
there holds the kernels as nvcc compiled them, and SIMT_PTX=1 makes the machine run those."""

import os

import pytest
import torch

import qlora_ext  # noqa: F401  (the CPU backend's ops)
from simt import build
from simt.sweep import CASES, run_case


@pytest.fixture(scope="module")
def simt():
    return build.load_simt()


def test_every_kernel_is_there_for_its_architectures(simt):
    there = simt.translations()
    compiled = {arch for arch, name in there}  # 8.0 is in `make test-all`'s library alone
    assert int(os.environ["SIMT_ARCH"]) in compiled
    want = set()
    for name in simt.kernels():
        archs = {75} if "<Sm75" in name else {80, 90} if "<Sm80" in name else {75, 80, 90}
        want |= {(arch, name) for arch in archs & compiled}
    # Variants for other architectures are there too, as empty kernels.
    assert want <= there


def test_the_kernels_that_run_are_nvccs(simt):
    """It fuses multiplications and additions of plain `a * b + c`, which g++ is told not to."""
    case = next(c for c in CASES if c.name == "gemm-fp32-odd")
    fused = [t.clone() for t in run_case(simt, case)]
    with simt.ptx(False):
        separate = run_case(simt, case)
    assert not all(torch.equal(a, b) for a, b in zip(fused, separate))


def test_an_index_out_of_range_is_printed_and_trapped(simt):
    w = torch.randn(9, 64)
    packed, absmax, _ = torch.ops.qlora_ext.quantize_4bit(
        w, 64, "nf4", None, "absmax", 3.0, "none", 1.0
    )
    w4 = packed, absmax, None, None, [9, 64], 64, "nf4", None
    with pytest.raises(
        RuntimeError, match=r"embedding_4bit: indices has 9 at flat position 1, want"
    ):
        simt.embedding_4bit(torch.tensor([3, 9]), *w4, torch.float32)
