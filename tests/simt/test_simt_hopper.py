"""Hopper's instructions against independent statements of what they do: the PTX ISA's tables as
formulas, and CuTe's layout algebra, compiled from NVIDIA's headers (cute_layouts.cpp)."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simt import build
from simt.test_simt_instructions import caller, load_probe, pack, to_bits

RNG = np.random.default_rng(0)
LAYOUTS = {"none": 0, "128": 1, "64": 2, "32": 3}  # PTX ISA, "Matrix Descriptor Format", bits 62-63


@pytest.fixture(scope="module", params=["twin", "late", "ptx"])
def probe(request):
    """Calls of probe.cu: on the host twins, with products as late as can be, on nvcc's PTX."""
    library = load_probe(request.param == "ptx")
    library.simt_set_reverse(request.param == "late")
    yield caller(library)
    library.simt_set_reverse(0)


def aligned(count, dtype=np.uint8):
    """An array of zeros at a multiple of 64 bytes."""
    size = count * np.dtype(dtype).itemsize
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype)


def swizzle(offset, bits):
    """cute::Swizzle<bits, 4, 3> of byte offsets: bits 4 and up are XORed with bits 7 and up."""
    mask = ((1 << bits) - 1) << 7
    return offset ^ ((offset & mask) >> 3)


def isa_b(row, k, layout, stride, leading):
    """PTX ISA, "Canonical Layouts", K-major: the byte of element (row, k) of a tile of 16 bits. In
    units of 16 bytes: ((8, n), (1, 2)) of strides ((1, SBO), (-, LBO)) without a swizzle, else
    ((8, n), 2) of strides ((span, SBO), 1), swizzled."""
    chunk, rest = k // 8, 2 * (k % 8)
    if layout == "none":
        return row % 8 * 16 + row // 8 * stride + chunk * leading + rest
    offset = row % 8 * int(layout) + row // 8 * stride + chunk * 16 + rest
    return swizzle(offset, {"128": 3, "64": 2, "32": 1}[layout])


def isa_a(thread, e):
    """PTX ISA, wgmma .m64nNk16, "Register Fragments" of A: element e of a thread."""
    lane, warp = thread % 32, thread // 32
    row = 16 * warp + lane // 4 + (8 if e // 2 % 2 else 0)
    return row, lane % 4 * 2 + (e & 1) + (8 if e >= 4 else 0)


def isa_d(thread, e):
    """And of D."""
    lane, warp = thread % 32, thread // 32
    row = 16 * warp + lane // 4 + (8 if e // 2 % 2 else 0)
    return row, 8 * (e // 4) + lane % 4 * 2 + (e & 1)


def registers_of_a(A, bf16):
    bits, a = to_bits(A, bf16), np.zeros((128, 4), np.uint32)
    for thread, e in np.ndindex(128, 8):
        a[thread, e // 2] |= np.uint32(bits[isa_a(thread, e)]) << (16 * (e % 2))
    return a


def matrix_of_d(d):
    matrix = np.zeros((64, 2 * d.shape[1]), np.float32)
    for thread, e in np.ndindex(d.shape):
        matrix[isa_d(thread, e)] = d[thread, e]
    return matrix


@pytest.mark.parametrize(
    "n, layout, bf16, k0, accumulate",
    [
        (256, "128", True, 0, True),
        (256, "128", False, 48, True),
        (128, "128", True, 32, False),
        (64, "64", True, 16, True),
        (128, "32", False, 0, False),
        (128, "none", True, 0, True),
    ],
)
def test_wgmma(probe, n, layout, bf16, k0, accumulate):
    """Small integers: every sum is exact, so a swapped element cannot hide in a tolerance."""
    A, B = RNG.integers(-9, 10, (64, 16)), RNG.integers(-9, 10, (n, 16))
    C = RNG.integers(-99, 100, (64, n)).astype(np.float32)
    width = 16 if layout == "none" else int(layout)
    stride, leading = (256, 128) if layout == "none" else (8 * width, 16)
    image = aligned(n // 8 * stride)
    image[:] = RNG.integers(0, 64, image.size)  # what the other columns hold
    bits = to_bits(B, bf16)
    for row, k in np.ndindex(B.shape):
        at = isa_b(row, k0 + k, layout, stride, leading)
        image[at : at + 2] = bits[row, k : k + 1].view(np.uint8)
    a = registers_of_a(A, bf16)
    d = np.zeros((128, n // 2), np.float32)
    for thread in range(128):
        d[thread] = [C[isa_d(thread, e)] for e in range(n // 2)]
    # 16 columns of k are 32 bytes further on, in the same line.
    io = pack(image, a, d, image.size, 2 * k0, stride, leading, LAYOUTS[layout], int(accumulate))
    probe("probe_wgmma_run", n, int(bf16), io)
    np.testing.assert_array_equal(matrix_of_d(d), A @ B.T + (C if accumulate else 0))


def test_two_groups_of_products_in_flight(probe):
    A, B = RNG.integers(-9, 10, (64, 64)), RNG.integers(-9, 10, (256, 64))
    image, bits = aligned(256 * 128), to_bits(B, True)
    for row, k in np.ndindex(B.shape):
        at = isa_b(row, k, "128", 1024, 16)
        image[at : at + 2] = bits[row, k : k + 1].view(np.uint8)
    a = np.stack([registers_of_a(A[:, k : k + 16], True) for k in range(0, 64, 16)])
    d = np.zeros((128, 128), np.float32)
    io = pack(image, a, d, image.size, 0, 1024, 16, LAYOUTS["128"], 1)
    probe("probe_wgmma_groups_run", io)
    np.testing.assert_array_equal(matrix_of_d(d), A @ B.T)


def test_stmatrix(probe):
    """PTX ISA, stmatrix.x4.trans: threads 8i..8i+7 give the rows of matrix i; thread t holds of row
    t / 4 of the transposed matrix the elements 2 * (t % 4) and the next."""
    d = RNG.integers(0, 2**32, (32, 4), dtype=np.uint32)
    rows = (RNG.permutation(256)[:32] * 16).astype(np.uint32)
    got = np.zeros(2048, np.uint16)
    probe("probe_stmatrix_run", pack(d, rows, got))
    want = np.zeros(2048, np.uint16)
    for i in range(4):
        matrix = np.zeros((8, 8), np.uint16)
        for lane in range(32):
            pair = d[lane, i : i + 1].view(np.uint16)
            matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2] = pair
        for r in range(8):
            want[rows[8 * i + r] // 2 :][:8] = matrix.T[r]
    np.testing.assert_array_equal(got, want)


def test_copies_that_an_mbarrier_waits_for_and_a_bulk_store(probe):
    data, out = aligned(1024), aligned(1024)
    data[:] = RNG.integers(0, 256, 1024)
    probe("probe_bulk_store_run", pack(data, out))
    np.testing.assert_array_equal(out, data)


BOXES = [  # size, box, at, swizzle
    ((64, 100), (64, 64), (0, 0), 128),
    ((200, 70), (64, 64), (128, 32), 128),  # both ends lie outside
    ((50, 9), (32, 16), (24, -3), 64),
    ((21, 30), (16, 8), (-5, 27), 32),  # a chunk lies partly outside, on either side
    ((40, 12), (24, 8), (16, 2), 16),  # not swizzled
    ((72, 5, 4), (64, 4, 3), (8, 3, 2), 128),
]


@pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
@pytest.mark.parametrize(
    "size, box, at, span", BOXES, ids=lambda v: "x".join(map(str, np.ravel(v)))
)
def test_tensor_maps(probe, size, box, at, span, store):
    """The CUDA driver API on tiled maps: what a box holds, with zeros outside the tensor; bytes in
    shared memory are packed, then swizzled."""
    rank, pitch = len(size), -(-size[0] * 2 // 16) * 16 + 16
    size3, box3, at3 = ((*v, 1)[:3] if rank == 2 else v for v in (size, box, (*at, 0)[:3]))
    tensor = aligned(pitch // 2 * size3[1] * size3[2], np.uint16)
    tensor[:] = RNG.integers(1, 2**16, tensor.size)
    before = tensor.reshape(size3[2], size3[1], pitch // 2).copy()
    image = aligned(2 * int(np.prod(box3)))
    image[:] = RNG.integers(0, 256, image.size)
    given = image.copy()
    want_image, want = np.zeros(image.size, np.uint8), before.copy()
    bits = {128: 3, 64: 2, 32: 1, 16: 0}[span]
    for z, y, x in np.ndindex(box3[::-1]):
        byte = swizzle(2 * ((z * box3[1] + y) * box3[0] + x), bits)
        place = [c + o for c, o in zip(at3[::-1], (z, y, x), strict=True)]
        if all(0 <= p < s for p, s in zip(place, size3[::-1], strict=True)):
            want_image[byte : byte + 2] = before[tuple(place)][None].view(np.uint8)
            want[tuple(place)] = given[byte : byte + 2].view(np.uint16)[0]
    sizes = (ctypes.c_int64 * 9)(*size3, pitch, pitch * size3[1], *box3, span)
    io = pack(image, image.size, int(store), rank, *at3)
    probe("probe_tensor_run", io, ctypes.c_void_p(tensor.ctypes.data), sizes, rank)
    if store:
        np.testing.assert_array_equal(tensor.reshape(want.shape), want)
    else:
        np.testing.assert_array_equal(image, want_image)
        np.testing.assert_array_equal(tensor.reshape(want.shape), before)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({3: 136}, "want strides that 16 bytes divide"),
        ({5: 257}, "want boxes of 1 to 256"),
        ({5: 32}, "want boxes as wide as the swizzle"),
        ({5: 4, 8: 16}, "want rows of a box that 16 bytes divide"),
        ({1: 0}, "want sizes of 1 to 2^32"),
        ({"base": 8}, "want an address that 16 divides"),
        ({"coordinates": 3}, "3 coordinates for a tensor map of 2 dimensions"),
    ],
)
def test_what_a_tensor_map_refuses(changed, says):
    run = load_probe(ptx=False).probe_tensor_run
    run.restype = ctypes.c_char_p
    tensor, image = aligned(64 * 256), aligned(64 * 128)
    sizes = [64, 64, 1, 128, 0, 64, 64, 1, 128]
    rank = changed.get("coordinates", 2)
    for field, value in changed.items():
        if isinstance(field, int):
            sizes[field] = value
    io = pack(image, image.size, 0, 2, 0, 0, 0)
    base = ctypes.c_void_p(tensor.ctypes.data + changed.get("base", 0))
    error = run(io, base, (ctypes.c_int64 * 9)(*sizes), rank)
    assert says in error.decode(), error


# ---------------------------------------------------------------- CuTe


def cutlass_include():
    """NVIDIA's CUTLASS headers: where the wheel is installed, or put by `make test`."""
    for place in [*sys.path, build.ROOT / "build" / "cutlass"]:
        folder = Path(place) / "cutlass_library" / "source" / "include"
        if (folder / "cute" / "tensor.hpp").is_file():
            return folder
    return None


@pytest.fixture(scope="module")
def cute():
    """The lines of cute_layouts.cpp: {name: [numbers]}."""
    include = cutlass_include()
    if include is None:
        pytest.skip(
            "no CuTe headers: `make build/cutlass/ready` brings them, from the wheel nvidia-cutlass"
        )
    cccl = [folder / "cccl" for folder in build.cuda_include()]  # a toolkit's; a wheel's is known
    program = build.program("cute_layouts", suffix=".cpp", include=[include, *cccl])
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    return {line.split()[0]: [int(v) for v in line.split()[1:]] for line in lines if line}


@pytest.fixture(scope="module")
def machine():
    library = load_probe(ptx=False)
    library.simt_wgmma_address.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
    library.simt_wgmma_descriptor.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int]
    library.simt_wgmma_descriptor.restype = ctypes.c_uint64
    return library


def test_registers_are_where_cute_has_them(cute, machine):
    for name, count in (("A", 8), ("D256", 128), ("D128", 64), ("D64", 32)):
        places = [
            machine.simt_wgmma_row(t, e) + 64 * machine.simt_wgmma_column(t, e)
            for t in range(128)
            for e in range(count)
        ]
        assert places == cute[name], name


@pytest.mark.parametrize("span", [128, 64, 32])
@pytest.mark.parametrize("n", [256, 128])
def test_descriptors_find_what_cute_swizzled(cute, machine, span, n):
    """Each 16-byte chunk of a tile: the machine's way through the descriptor of each k16 step, and
    wgmma_layout.cuh's offsets. CuTe gives the stride of the descriptor as well."""
    offsets = iter(cute[f"tile{span}x{n}"])
    (stride,) = cute[f"stride{span}x{n}"]
    assert stride == 8 * span
    base = 4096
    for row in range(n):
        for chunk in range(span // 16):
            want = next(offsets)
            descriptor = machine.simt_wgmma_descriptor(base + chunk // 2 * 32, stride, span)
            assert machine.simt_wgmma_address(descriptor, row, chunk % 2) - base == want
            assert machine.simt_swizzled(row * span + chunk * 16, span) == want
    assert next(offsets, None) is None


def test_fields_of_descriptors_are_cutes(cute, machine):
    for span in (128, 64, 32):
        descriptor = machine.simt_wgmma_descriptor(0x1400, 8 * span, span)
        assert [descriptor & 0xFFFFFFFF, descriptor >> 32] == cute[f"descriptor{span}"]


# ---------------------------------------------------------------- ptxas


def test_ptxas_neither_spills_nor_serializes_the_probe(tmp_path):
    """It prints a serialized wgmma (C7510 and its like) as information."""
    build.require_nvcc()
    source = tmp_path / "probe.cu"
    lines = ['#include "probe_hopper.cuh"', "namespace qlora_ext {"]
    for T, n in (("__half", 128), ("__nv_bfloat16", 128), ("__nv_bfloat16", 64)):
        lines.append(f"template __global__ void probe_wgmma<{T}, {n}>(WgmmaIo);")
    # probe_wgmma_groups is no template: it's compiled anyway.
    source.write_text("\n".join([*lines, "}\n"]))
    command = [shutil.which("nvcc"), "-std=c++20", "-O3", "-I", "csrc", "-I", "tests/simt"]
    command += ["-arch=sm_90a", "-Xptxas=-v", "-cubin", "-o", tmp_path / "probe.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=build.ROOT)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search(r"C75\d\d|Performance Loss|serialized", said), said
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}, said
