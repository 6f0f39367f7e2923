"""What keeps one kernel source fit for nvcc and the emulator, checked by reading the files."""

import json
import re

import pytest

from runtime_calls import RUNTIME_CALLS
from simt import build

CUDA = build.ROOT / "csrc" / "cuda"
TWINS = build.SIMT / "include" / "cuda"
DEVICE_FILES = sorted(p for p in CUDA.rglob("*") if p.suffix in (".cu", ".cuh"))
TWINNED = ("ptx.cuh", "wgmma.cuh", "launch.cuh", "tensor_map.cuh")
KERNEL_FILES = [p for p in DEVICE_FILES if p.name not in TWINNED]


def code(path):
    """A file without its comments and strings."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r'(?<!include )"(\\.|[^"\\\n])*"', '""', text)


def declared(path, pattern):
    return set(re.findall(pattern, code(path)))


@pytest.mark.parametrize("name, least", [("ptx.cuh", 20), ("wgmma.cuh", 5)])
def test_every_ptx_function_has_a_twin(name, least):
    device = declared(CUDA / name, r"__device__ __forceinline__ [\w& ]+?\b(\w+)\(")
    twins = declared(TWINS / name, r"\b(\w+)\(")
    assert device - {"copy_now"} <= twins  # copy_now is what cp.async is on sm_75
    assert len(device) >= least


def test_the_two_launch_headers_offer_the_same():
    for name in ("launch_kernel", "device_info", "DeviceInfo", "Launcher"):
        assert name in code(CUDA / "launch.cuh") and name in code(TWINS / "launch.cuh")
    struct = r"struct DeviceInfo \{(.*?)\};"
    bodies = [
        re.search(struct, code(path / "launch.cuh"), re.S).group(1).split()
        for path in (CUDA, TWINS)
    ]
    assert bodies[0] == bodies[1]


FORBIDDEN = {
    r"\basm\b": "inline PTX belongs in ptx.cuh and wgmma.cuh",
    r"__CUDA_ARCH__|__CUDACC__|__NVCC__": "architecture guards belong in ptx.cuh",
    r"\b__shared__\b": "shared memory comes from ptx::shared_memory<Smem>()",
    r"<<<": "kernels are launched by launch_kernel<kernel>(...)",
    r"#include\s*<cuda": "CUDA's headers are included by ptx.cuh and launch.cuh",
    r'#include\s*"(ptx|launch)\.cuh"': 'write "cuda/ptx.cuh": the emulator shadows that path',
    r"\bcuda[A-Z]\w*\s*\(": "CUDA's runtime is called by launch.cuh and tensor_map.cuh alone",
    r"\batomicAdd\s*\(\s*(float|double)": "sums by float atomics depend on the order of blocks",
}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_keep_the_rules(path):
    for pattern, rule in FORBIDDEN.items():
        assert not re.search(pattern, code(path)), f"{path.name}: {rule}"


def test_no_call_allocates_copies_or_synchronizes():
    """All calls of CUDA's runtime. Those of cudaStreamSynchronize and cudaMemsetAsync are only for
    QLORA_EXT_DEBUG, as test_simt_launching.py shows. Host code reads memory back in one function of
    register.cpp."""
    calls = declared(CUDA / "launch.cuh", r"\b(cuda[A-Z]\w*)\s*\(")
    assert calls == RUNTIME_CALLS
    maps = declared(CUDA / "tensor_map.cuh", r"\b(cuda[A-Z]\w*)\s*\(")
    assert maps == {"cudaGetDriverEntryPointByVersion"}
    to_host = r"DeviceType::CPU|\bcuda[A-Z]\w*\s*\(|aoti_torch_item|copy_\("
    hosts = [*(build.ROOT / "csrc" / "host").iterdir(), *CUDA.glob("*.cpp")]
    assert [path.name for path in hosts if re.search(to_host, code(path))] == ["register.cpp"]
    assert len(re.findall(to_host, code(CUDA / "register.cpp"))) == 1


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_no_torch_in_device_files(path):
    assert not re.search(r"#include[^\n]*(torch|ATen|c10|pybind11|host/)", path.read_text())


def test_a_source_is_compiled_again_when_a_header_in_a_folder_with_spaces_changes(
    tmp_path, monkeypatch
):
    """The compiler lists a checkout's absolute paths with their spaces, # and $ escaped."""
    folder, source = tmp_path / "CUDA's headers, #2 for $5", tmp_path / "one.cpp"
    folder.mkdir()
    header = folder / "value.h"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "value.h"\nextern const int value = VALUE;\n')
    monkeypatch.setattr(build, "BUILD", tmp_path)
    made = build._compile(source, ["-I", str(folder)])
    listed = json.loads(made.with_suffix(".json").read_text())
    assert {(build.ROOT / path).resolve() for path in listed} == {header, source}
    first = made.read_bytes()
    header.write_text("#define VALUE 2\n")
    build._hash.cache_clear()
    assert build._compile(source, ["-I", str(folder)]) == made and made.read_bytes() != first
