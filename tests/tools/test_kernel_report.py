"""What must not regress in the compiled kernels: read from SASS, so no GPU is needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_ext
from paths import REPOSITORY
from qlora_ext.integrations.bitsandbytes_functions import ARGTYPES
from runtime_calls import RUNTIME_CALLS

ROOT = REPOSITORY
CUDA = ROOT / "csrc" / "cuda"


sys.path.insert(0, str(ROOT / "bench"))

import kernel_report as report
import ptxas_report
import sass_flow


@pytest.fixture(scope="module")
def kernels():
    if sentence := report.missing_tools():
        pytest.skip(sentence)
    return report.report()


def of(kernels, base, archs=report.ARCHS):
    found = [k for k in kernels if k.base == base and k.arch in archs]
    assert {k.arch for k in found} == set(archs), base
    return found


AMPERE = ("8.0", "9.0a")  # cp.async, m16n8k16


def products(kernels, base, archs=report.ARCHS):
    """The kernels of one weight and of a mixture of experts."""
    return of(kernels, base, archs) + of(kernels, f"grouped_{base}", archs)


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    assert {k.base for k in kernels} == set(report.KERNELS)
    for base in report.KERNELS:
        # In bf16 on tensor cores, which 7.5 has not: there dispatch takes lora_tile.
        mma = re.fullmatch(r"(grouped_)?lora_(rows|columns)_mma", base)
        of(kernels, base, AMPERE if mma else report.ARCHS)


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
        if path.name not in ("ptx.cuh", "wgmma.cuh", "launch.cuh"):
            assert "asm" not in re.findall(r"\w+", text), path.name
            for word in ("__shared__", "<<<", "__CUDA_ARCH__", "#ifdef", "#if "):
                assert word not in text, f"{path.name} has {word}"


def test_the_page_lists_these_kernels(kernels):
    """docs/generated/kernel_report.md; `python bench/kernel_report.py --write` renews it."""
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) \|", report.PAGE.read_text(), re.M)
    assert set(rows) == {(k.name, k.arch) for k in kernels} and len(rows) == len(set(rows))


def test_no_spills(kernels):
    """The embedding's kernels have a stack for the sentence that they trap with, and never read
    it."""
    assert [(k.name, k.arch) for k in kernels if k.spills] == []
    with_stack = {k.base for k in kernels if k.stack}
    assert with_stack == {"embedding_4bit_rows", "embedding_4bit_any"}


def test_fused_kernels_use_tensor_cores_and_wide_loads(kernels):
    for k in products(kernels, "gemm_4bit_fused") + products(kernels, "gemm_4bit_backward_fused"):
        loop = k.main_loop()
        tiles = int(k.arguments[2])
        # One m16n8k16 for 16x16 weights and 8 rows of x: a warp decodes 32 of each thread's. 7.5
        # has m16n8k8, and loads where the others copy.
        mma = k.weights // 8 * tiles * (2 if k.arch == "7.5" else 1)
        assert report.count(loop, "HMMA") == mma, k.name
        if k.arch == "7.5":
            assert k.widths("LDG")[128] >= 2, k.name
        else:
            copies = [i for i in loop if report.opcode(i) == "LDGSTS"]
            assert copies and all("128" in report.modifiers(i) for i in copies), k.name


def test_lora_products_use_tensor_cores_and_wide_loads(kernels):
    for base in ("lora_rows_mma", "lora_columns_mma"):
        for k in products(kernels, base, AMPERE):
            loop = k.main_loop()
            # Of 64 deep, for each of the small operand's two halves: four steps of m16n8k16.
            assert report.count(loop, "HMMA") >= 4 * int(k.arguments[2]), k.name
            copies = [i for i in loop if report.opcode(i) == "LDGSTS"]
            assert copies and all("128" in report.modifiers(i) for i in copies), k.name


def test_quantize_reads_sixteen_bytes_at_a_time(kernels):
    for k in of(kernels, "quantize_4bit_blocks") + of(kernels, "quantize_4bit_tensor"):
        if k.arguments[2] == "true":  # 16-byte aligned
            assert k.widths("LDG")[128] >= 1, k.name


def test_dispatch_assumes_the_blocks_that_an_sm_holds(kernels):
    """fused_cost in gemm_4bit.cu, kFusedCost in gemm_4bit_backward.cu and row_tile in
    grouped_gemm_4bit.cu count waves by them."""
    for k in products(kernels, "gemm_4bit_fused", AMPERE):
        two = k.arch == "9.0a" and k.arguments[2] in ("1", "2")
        assert k.blocks_per_sm == (2 if two else 1), k.name
    for k in products(kernels, "gemm_4bit_backward_fused", AMPERE):
        assert k.blocks_per_sm == 1, k.name


def test_small_m_takes_at_most_three_instructions_per_weight(kernels):
    for k in products(kernels, "gemm_4bit_fused"):
        tiles = k.arguments[2]
        # At 9 to 16 rows of x 7.5 takes two m16n8k8 for each m16n8k16. Its copies are loads, and
        # through an index they choose between x and zeros.
        limit = {"1": 3.0, "2": 3.5 if k.arch == "7.5" else 3.0}.get(tiles, 6.0)
        if k.base.startswith("grouped") and k.arch == "7.5":
            limit += 0.6
        assert k.sass_per_weight <= limit, k.name


def test_scales_are_decoded_without_fma(kernels):
    # Scaling the accumulators takes 8 FFMA for 64 weights and 8 rows of x; there are no others.
    for k in products(kernels, "gemm_4bit_fused"):
        assert report.count(k.main_loop(), "FFMA") == k.weights // 8 * int(k.arguments[2]), k.name
    for k in products(kernels, "gemm_4bit_backward_fused"):
        assert report.count(k.main_loop(), "FFMA") == 0, k.name
    for base in (
        "dequantize_4bit_vector",
        "dequantize_4bit_any",
        "dequantize_absmax_codes",
        "embedding_4bit_rows",
        "embedding_4bit_any",
    ):
        for k in of(kernels, base):
            assert report.count([i for _, i in k.code], "FFMA") == 0, k.name


def test_dequantize_moves_sixteen_bytes_at_a_time(kernels):
    for k in of(kernels, "dequantize_4bit_vector") + of(kernels, "embedding_4bit_rows"):
        tail = k.base == "dequantize_4bit_vector"  # of one element
        stores = k.widths("STG")
        assert stores.pop(128) == (8 if k.arguments[0] == "float" else 4), k.name
        assert stores.total() == tail, k.name
        assert k.widths("LDG")[128] == 1, k.name
        assert k.occupancy == 1.0, k.name


# ---------------------------------------------------------------- what ptxas did


def test_no_copy_has_an_l2_policy():
    """`cp.async ... L2::cache_hint` is what ptxas miscompiles for 9.0 and newer."""
    for path in [*CUDA.glob("*.cuh"), *CUDA.glob("*.cu")]:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        assert "cache_hint" not in code and "createpolicy" not in code, path.name


@pytest.mark.parametrize("arch", report.FLOW_ARCHS)
def test_no_register_is_read_that_nothing_wrote(arch, capsys):
    """Uniform registers, predicates and registers in addresses; bench/sass_flow.py. Nor is any
    wgmma serialized."""
    if sentence := report.missing_tools():
        pytest.skip(sentence)
    ((functions, sentences),) = report.flow((arch,)).values()
    with capsys.disabled():  # `make cuda` shows it
        print(f"\ndata flow, {arch}: {functions} functions, {len(sentences)} findings", end=" ")
    assert sentences == ()
    assert functions >= len(report.KERNELS)


def test_the_flow_check_sees_every_kernel_of_the_binaries(kernels):
    """A listing that is cut short or read wrongly would have nothing to find."""
    cubin = report.compile_cubin("gemm_4bit", "9.0a")
    listing = report.run(report.find_tool("cuobjdump"), "-sass", cubin)
    functions = {name: code for _, name, code in sass_flow.parse_listing(listing)}
    assert len(functions) == listing.count("Function :") > 0
    assert sum(map(len, functions.values())) == len(
        re.findall(r"^ +/\*[0-9a-f]{4,}\*/", listing, re.M)
    )
    # The planted fault: a copy's descriptor becomes a register that nothing writes.
    name, code, at = next(
        (name, code, i)
        for name, code in functions.items()
        for i, (_, text) in enumerate(code)
        if "LDGSTS" in text
    )
    code[at] = code[at][0], re.sub(r"desc\[UR\d+\]", "desc[UR61]", code[at][1])
    (finding,) = sass_flow.check_function(name, code)
    assert finding.problem == "reads UR61, UR62, which no path wrote"


# Reads its accumulators between two wgmma, without a wait.
SERIALIZED = """
__global__ void planted(float* out, unsigned long long b, unsigned a) {
  float d[4] = {1, 2, 3, 4};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < 4; ++i) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a), "r"(a + 1), "r"(a + 2), "r"(a + 3), "l"(b));
    d[0] += 1.0f;
  }
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
"""


def test_serialized_wgmma_is_reported(tmp_path):
    """ptxas calls it information, and succeeds."""
    if sentence := report.missing_tools():
        pytest.skip(sentence)
    source, ptx, cubin = (tmp_path / f"planted.{suffix}" for suffix in ("cu", "ptx", "cubin"))
    source.write_text(SERIALIZED)
    report.run("nvcc", "-arch=compute_90a", "-ptx", source, "-o", ptx)
    said = report.nvcc_ptxas().assemble(ptx, "9.0a", cubin)
    Path(f"{cubin}.txt").write_text(said)
    (message,) = report.messages(cubin)
    assert "wgmma.mma_async instructions are serialized" in message and "planted" in message


def test_ptx_for_an_older_ptxas_says_so(tmp_path, monkeypatch):
    """12.9 refuses the header of 13.0's PTX. The file that it gets is gone afterwards."""
    ptx, cubin = tmp_path / "k.ptx", tmp_path / "k.cubin"
    ptx.write_text("// .version 9.0\n.version 9.0\n.target sm_90a\n")
    given = []
    monkeypatch.setattr(report, "run", lambda *command: given.append(command[-3].read_text()) or "")
    for version in ("12.9.86", "13.5.37"):
        report.Ptxas(version, Path("ptxas")).assemble(ptx, "9.0a", cubin)
    assert given == [ptx.read_text().replace("\n.version 9.0", "\n.version 8.8"), ptx.read_text()]
    assert list(tmp_path.iterdir()) == [ptx]


def test_each_version_of_ptxas_is_taken_once(tmp_path, monkeypatch):
    """nvcc's first, the others by version."""
    releases = {
        "a/ptxas": "13.10.2",
        "b/ptxas": "13.0.88",
        "c/bin/ptxas": "13.4.59",
        "nvcc": "13.0.88",
    }
    for name in list(releases)[:3]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    versions = {str(tmp_path / name): version for name, version in releases.items()}
    monkeypatch.setattr(report, "nvcc_ptxas", lambda: report.Ptxas("13.0.88"))
    monkeypatch.setattr(report, "version_of", lambda path: versions.get(str(path), "12.9.86"))
    found = [p.version for p in ptxas_report.find_ptxas(tmp_path)]
    assert [v for v in found if v != "12.9.86"] == ["13.0.88", "13.4.59", "13.10.2"]


def test_main_loops_that_differ_are_rows():
    lengths = {"same": [100, 100], "near": [100, 110], "far": [100, 111], "gone": [100, None]}
    assert set(ptxas_report.differing(lengths)) == {"far", "gone"}
    table = ptxas_report.markdown([report.Ptxas("13.0.88"), report.Ptxas("13.5.37")], lengths)
    assert table.splitlines() == [
        "| kernel | 13.0.88 | 13.5.37 |",
        "| --- | --- | --- |",
        "| `far` | 100 | 111 |",
        "| `gone` | 100 | - |",
    ]


# ---------------------------------------------------------------- the library that was built


@pytest.fixture(scope="module")
def library():
    found = list(Path(qlora_ext.__file__).parent.glob("_C_cuda*.so"))
    if not found:
        pytest.skip("the CUDA library was not built here")
    return found[0]


def test_fatbin_fits_64_mb(library):
    """The device code of all architectures, and the PTX."""
    headers = subprocess.run(
        ["objdump", "-h", library], capture_output=True, text=True, check=True
    ).stdout
    (size,) = re.findall(r"\.nv_fatbin\s+([0-9a-f]+)", headers)
    assert 0 < int(size, 16) <= 64 << 20, int(size, 16)


def test_library_imports_no_call_that_allocates_or_copies(library):
    """Of CUDA's runtime. cudaStreamSynchronize and cudaMemsetAsync are QLORA_EXT_DEBUG's
    (test_simt_launching.py)."""
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    imported = set(re.findall(r"\bU (cuda\w+|cu[A-Z]\w+)", names))
    assert "cudaLaunchKernel" in imported
    assert imported <= RUNTIME_CALLS, imported


def test_library_exports_the_c_functions(library):
    names = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    exported = set(re.findall(r" T (\S+)$", names, re.M))
    assert {*ARGTYPES, "qlora_ext_take_error"} <= exported
