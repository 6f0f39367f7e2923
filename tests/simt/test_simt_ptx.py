"""The kernels as nvcc compiled them: its PTX for 7.5, 8.0 and 9.0a, translated to C++
(ptx_to_cpp.py) and run on the emulated machine by the same test bodies as the source."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_ext
from simt import build, ptx_to_cpp
from simt.sweep import CASES
from simt.test_simt_kernels import sweep

TESTS = Path(__file__).resolve().parent.parent
SWEEP = ["simt/test_simt_kernels.py", "simt/test_simt_huge.py", "simt/ptx_checks.py"]
SWEEP += ["simt/test_simt_properties.py"]
# The sweep has cases on 7.5 of its own (8.0's run takes them), and runs the others on the
# architecture asked for. 8.0 and 9.0a are compiled from the same lines, so 9.0a runs the shared
# bodies too. g++ takes minutes for each: 7.5, whose source `make test` runs, and 8.0 are left to
# `make test-all`.
BODIES = {75: ["ops/test_ops.py"], 80: SWEEP, 90: [*SWEEP, "ops/test_ops.py"]}


@pytest.mark.parametrize(
    "arch", [*(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 80)), 90]
)
def test_ptx(arch):
    build.require_nvcc()
    archs = ("90a",) if arch == 90 else build.PTX_ARCHS
    environment = {
        **os.environ,
        "SIMT_LIBRARY": str(build.library(ptx=archs)),
        "SIMT_PTX": "1",
        "SIMT_ARCH": str(arch),
        "PYTHONPATH": str(Path(qlora_ext.__file__).parent.parent),  # the one built
    }
    # The sweep's own cases of the kernels' tests: what is launched, and the sanitizers, are the
    # source's.
    chosen = "simt and not cpu and not cuda and not launched and not page and not turned_off"
    chosen += " and not sanitized" + " and not sm75" * (arch == 90)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen]
    result = subprocess.run(
        [*command, *BODIES[arch]], capture_output=True, text=True, env=environment, cwd=TESTS
    )
    assert result.returncode == 0, result.stdout[-20000:]
    passed = re.search(r"(\d+) passed(.*)", result.stdout)
    cases = [case for case in CASES if arch == 80 or "sm75" not in case.name]
    least = 100 if arch == 75 else len(cases)
    assert int(passed[1]) > least and "skipped" not in passed[2], passed[0]


@pytest.mark.slow
def test_ptx_under_address_sanitizer():
    """Reads and writes out of bounds that only the compiled kernels make; 7.5's cases run too."""
    build.require_nvcc()
    build.require("address")
    library = build.library("address", ptx=("75", "90a"))
    ptx = {"SIMT_LIBRARY": str(library), "SIMT_PTX": "1", "SIMT_ARCH": "90"}
    sweep({**build.sanitizer_environment("address"), **ptx})


def test_variants_for_other_architectures_trap():
    """Launched on a GPU that a binary was not made for, they stop it instead of doing nothing."""
    build.require_nvcc()
    with build._locked():
        code = build._ptx(build.ROOT / "csrc" / "cuda" / "lora.cu", "75").read_text()
    bodies = re.findall(r"^void (_Z\w*Sm80\w*)\([^)]*\) \{\n(.*?)^\}$", code, re.M | re.S)
    assert len(bodies) == 12
    for name, body in bodies:
        assert "isa::trap();" in body and body.count("\n") < 10, name


def translated(body, head="", params=""):
    return ptx_to_cpp.translate(
        f".version 9.0\n.target sm_80\n.address_size 64\n{head}\n"
        f".visible .entry kernel({params})\n.maxntid 32, 1, 1\n{{\n.reg .b32 %r<4>;\n"
        f".reg .b64 %rd<4>;\n.reg .pred %p<2>;\n{body}\nret;\n}}\n"
    )


@pytest.mark.parametrize(
    "body, says",
    [
        ("tex.2d.v4.f32.f32 {%r1}, [%rd1];", "instruction tex.2d"),
        ("add.sat.s32 %r1, %r2, %r3;", "add.sat"),
        ("fma.rz.f32 %r1, %r2, %r3, %r1;", "fma.rz"),
        ("mul.hi.sat.u32 %r1, %r2, %r3;", "mul.hi.sat"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "mma.sync"),
        ("ld.global.unheard.u32 %r1, [%rd1];", "memory access .unheard"),
        ("ld.global.v2.u32 %r1, [%rd1];", "into %r1"),
        ("cvt.rzi.s32.f32 %r1, %r2;", "cvt.rzi"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8;", "of ['8']"),
        (
            "cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd1], 16, %rd2;",
            "cache_hint [%r1], [%rd1], 16, %rd2: this form of it",
        ),
        ("bar.sync 1;", "bar.sync"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r1}, "
            "{%r1, %r2, %r3, %r1}, %rd1, %p1, 1, 1, 1;",
            "this form of it",
        ),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1}, {%r1}, %rd1, %p1;", "m64n8k8"),
        (
            "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
            "[%rd1, {%r1, %r1, %r1, %r1}], [%r2];",
            "this form of it",
        ),
        ("call.uni elsewhere, ();", "call elsewhere"),
        ("@%p1 bra.div LABEL;", "bra.div"),
        (".surface %r9;", "directive .surface"),
        ("add.s32 %r1, %r2, 1.5;", "operand 1.5"),
        ("mov.u32 %r1, %clock;", "register %clock"),
    ],
)
def test_what_is_not_known_is_an_error_with_its_line(body, says):
    with pytest.raises(ptx_to_cpp.Unknown) as error:
        translated(f"add.s32 %r1, %r2, %r3;\n{body}")
    assert "line 12" in str(error.value) and says in str(error.value), error.value


def test_a_statement_an_instruction():
    code = translated(
        "ld.param.u64 %rd1, [p0+8];\n@!%p1 bra $L__BB0_2;\n"
        "ld.global.nc.v2.u32 {%r1, %r2}, [%rd1+-8];\n$L__BB0_2:\nst.shared.u32 [%r3+4], %r1;",
        params=".param .align 8 .b8 p0[24]",
    )
    assert "isa::load<uint64_t>(isa::pointer(isa::address(arguments[0]) + " in code
    assert "if (!p1) goto SL__BB0_2;" in code.replace("S_L", "SL")
    assert "isa::load<uint32_t>(isa::pointer(rd1 + static_cast<int64_t>(-8), 8), r1, r2);" in code
    assert (
        "isa::store<uint32_t>(isa::shared_pointer(r3 + static_cast<int64_t>(4), 4, 15), r1);"
        in code
    )
    assert 'register_translation(80, "kernel", &kernel, {24}, 32)' in code


def test_each_access_to_a_register_that_wgmma_takes_is_noted():
    code = translated(
        "mov.u32 %r1, 0;\nwgmma.fence.sync.aligned;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r0, %r0, %r0}, "
        "{%r1, %r1, %r1, %r1}, %rd1, %p1, 1, 1, 0;\nwgmma.commit_group.sync.aligned;\n"
        "add.s32 %r2, %r0, 1;\nst.shared.u32 [%r3], %r1;\nwgmma.wait_group.sync.aligned 0;"
    )
    lines = code.split("\n")
    notes = [" ".join(re.findall(r"watch\.\w+\([\w, ]*\);", line)) for line in lines]
    assert [n for n in notes if n] == [
        "watch.write(1, 11);",
        "watch.fence();",
        "watch.product(numbers, 4, 13);",
        "watch.commit();",
        "watch.read(0, 15);",
        "watch.read(1, 16);",
        "watch.wait(0);",
    ]
