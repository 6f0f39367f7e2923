"""What must not regress in the compiled kernels: read from SASS, so no GPU is needed."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = ("dequantize_4bit", "gemm_4bit", "gemm_4bit_backward", "quantize_absmax")


def load_report():
    spec = importlib.util.spec_from_file_location(
        "kernel_report", ROOT / "bench" / "kernel_report.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_report"] = module
    spec.loader.exec_module(module)
    return module


report = load_report()


@pytest.fixture(scope="module")
def kernels():
    if sentence := report.missing_tools():
        pytest.skip(sentence)
    return report.report(sources=SOURCES)


def of(kernels, base):
    found = [k for k in kernels if k.base == base]
    assert {k.arch for k in found} == set(report.ARCHS), base
    return found


def opcodes(code):
    return [report.opcode(i) for i in code]


def test_every_kernel_is_in_the_report():
    written = "".join(p.read_text() for p in CUDA.glob("*.cuh"))
    names = set(
        re.findall(r"__global__ void\s*(?:__launch_bounds__\([^\n]*\)\s*)?(\w+)\s*\(", written)
    )
    assert names == set(report.KERNELS)


def test_device_files_include_no_torch_and_keep_the_rules():
    for path in [*CUDA.glob("*.cuh"), *CUDA.glob("*.cu")]:
        text = re.sub(r"//[^\n]*", "", path.read_text())
        assert "torch/" not in text and "ATen" not in text, path.name
        if path.name not in ("ptx.cuh", "launch.cuh"):
            assert "asm" not in re.findall(r"\w+", text), path.name
            for word in ("__shared__", "<<<", "__CUDA_ARCH__", "#ifdef", "#if "):
                assert word not in text, f"{path.name} has {word}"


def test_no_spills(kernels):
    assert [k.name for k in kernels if k.stack] == []


def test_fused_kernels_use_tensor_cores_and_wide_loads(kernels):
    for k in of(kernels, "gemm_4bit_fused") + of(kernels, "gemm_4bit_backward_fused"):
        loop = k.main_loop()
        tiles = int(k.arguments[2])
        # One m16n8k16 for 16x16 weights and 8 rows of x: a warp decodes 32 of each thread's.
        assert report.count(loop, "HMMA") == k.weights // 8 * tiles, k.name
        copies = [i for i in loop if report.opcode(i) == "LDGSTS"]
        assert copies and all("128" in report.modifiers(i) for i in copies), k.name


def test_small_m_takes_at_most_three_instructions_per_weight(kernels):
    small = [k for k in of(kernels, "gemm_4bit_fused") if k.arguments[2] in ("1", "2")]
    assert small and max(k.sass_per_weight for k in small) <= 3.0


def test_scales_are_decoded_without_fma(kernels):
    # Scaling the accumulators takes 8 FFMA for 64 weights and 8 rows of x; there are no others.
    for k in of(kernels, "gemm_4bit_fused"):
        assert report.count(k.main_loop(), "FFMA") == k.weights // 8 * int(k.arguments[2]), k.name
    for k in of(kernels, "gemm_4bit_backward_fused"):
        assert report.count(k.main_loop(), "FFMA") == 0, k.name
    for base in ("dequantize_4bit_vector", "dequantize_4bit_any", "dequantize_absmax_codes"):
        for k in of(kernels, base):
            assert report.count([i for _, i in k.code], "FFMA") == 0, k.name


def test_dequantize_moves_sixteen_bytes_at_a_time(kernels):
    for k in of(kernels, "dequantize_4bit_vector"):
        loop = k.main_loop()
        stores = [i for i in loop if report.opcode(i) == "STG"]
        assert len(stores) == (8 if k.arguments[0] == "float" else 4), k.name
        assert all("128" in report.modifiers(i) for i in stores), k.name
        assert any("128" in report.modifiers(i) for i in loop if report.opcode(i) == "LDG"), k.name
        assert k.occupancy == 1.0, k.name
