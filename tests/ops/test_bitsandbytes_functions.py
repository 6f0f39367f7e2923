"""bitsandbytes' C functions as our CUDA library exports them, against our ops: on the emulated
machine, and on a GPU if there is one."""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch

from c_functions import CFunctions
from cases import DTYPES
from qlora_ext.ops import _C

on_cuda_kernels = pytest.mark.parametrize("backend", ["simt", "cuda"], indirect=True)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture
def c(backend):
    return CFunctions(backend.ops, backend.device)


def quantized(backend, shape, blocksize, quant_type, codebook=None):
    """Packed bytes and the bytes of fp32 scales, by our CPU backend."""
    packed, absmax, _ = torch.ops.qlora_ext.quantize_4bit(
        torch.randn(shape), blocksize, quant_type, codebook, "absmax", 3.0, "none", 1.0
    )
    return packed.reshape(-1).to(backend.device), absmax.to(backend.device)


def same_bytes(a, b):
    return torch.equal(a.clone().view(torch.uint8), b.clone().view(torch.uint8))


# Dequantizing -----------------------------------------------------------------------------------


@on_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_is_our_op(c, backend, quant_type, dtype):
    """Also of no weight, of an odd number, and of one that does not end with a block."""
    for blocksize in BLOCKSIZES:
        for n in {0, 1, 31, 64, 65, 1000, blocksize, 3 * blocksize - 7}:
            packed, absmax = quantized(backend, [n], blocksize, quant_type)
            got = c.dequantize(quant_type, dtype, packed, absmax, blocksize, n)
            want = backend.ops.dequantize_4bit(
                packed, absmax, None, None, [n], blocksize, quant_type, None, dtype
            )
            assert same_bytes(got, want), (blocksize, n)


@on_cuda_kernels
def test_dequantize_from_any_address(c, backend):
    """Views of a larger buffer begin anywhere."""
    n = 300
    packed, absmax = quantized(backend, [n], 64, "nf4")
    moved = torch.cat([packed.new_zeros(3), packed])[3:]
    want = c.dequantize("nf4", torch.bfloat16, packed, absmax, 64, n)
    assert same_bytes(c.dequantize("nf4", torch.bfloat16, moved, absmax, 64, n), want)


# Products ---------------------------------------------------------------------------------------

SHAPES = [(64, 128), (100, 576), (33, 66), (1, 64), (5, 40), (40, 9216), (3, 2)]
UNSORTED = [((7 * i) % 16 - 7.5) / 8 for i in range(16)]


def devices(backend):
    """Emulated GPUs with and without tensor cores for bf16, and so large that K is split."""
    if backend.name != "simt":
        return [contextlib.nullcontext()]
    return [backend.ops.device(75), backend.ops.device(80), backend.ops.device(90, 132)]


@on_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "custom"])
def test_product_is_our_op(c, backend, quant_type, dtype):
    """NF4 bit for bit. Tensor cores take a table that is rounded to 16 bits, and how is only tuned
    to NF4: another table, which is read from the caller's memory, is as near as its rounding."""
    codebook = UNSORTED if quant_type == "custom" else None
    levels = codebook or _C.codebooks()[quant_type]
    table = torch.tensor(levels, dtype=torch.float32, device=backend.device)
    for device in devices(backend):
        with device:
            for (m, k), blocksize in [
                *((s, 64) for s in SHAPES),
                ((48, 256), 32),
                ((8, 512), 4096),
            ]:
                packed, absmax = quantized(backend, [m, k], blocksize, quant_type, codebook)
                x = torch.randn(1, k).to(dtype).to(backend.device)
                weight = (packed, absmax, None, None, [m, k], blocksize, quant_type, codebook)
                got = c.gemm(x, packed, absmax, table, m, blocksize)
                want = backend.ops.gemm_4bit(x, *weight, None, None, None).reshape(-1)
                if quant_type == "nf4" or dtype == torch.float32:
                    assert same_bytes(got, want), (m, k, blocksize)
                    continue
                terms = backend.ops.dequantize_4bit(*weight, torch.float32).double() * x.double()
                rounding = torch.finfo(dtype).eps / 2
                limit = 2 * rounding * terms.abs().sum(1) + rounding * terms.sum(1).abs()
                assert ((got.double() - terms.sum(1)).abs() <= limit).all(), (m, k, blocksize)


@on_cuda_kernels
def test_product_of_nothing(c, backend):
    packed, absmax = quantized(backend, [4, 64], 64, "nf4")
    table = torch.tensor(_C.codebooks()["nf4"], device=backend.device, dtype=torch.float32)
    x = torch.ones(64, device=backend.device)
    assert c.gemm(x, packed, absmax, table, 0, 64).numel() == 0
    assert (c.gemm(x[:0], packed, absmax, table, 4, 64) == 0).all()  # sums of no terms


# Errors -----------------------------------------------------------------------------------------

DEQUANTIZE = dict(code=None, A=64, absmax=64, out=64, blocksize=64, n=128, stream=None)
GEMM = dict(m=4, n=1, k=64, A=64, B=64, absmax=64, table=64, out=64, lda=4, ldb=32, ldc=4)
GEMM |= dict(blocksize=64, stream=None)
BLOCKSIZE = "want a power of two from 32 to 4096"
BAD_DEQUANTIZE = [
    ({"blocksize": 0}, f"blocksize is 0, {BLOCKSIZE}"),
    ({"blocksize": -64}, f"blocksize is -64, {BLOCKSIZE}"),
    ({"blocksize": 96}, f"blocksize is 96, {BLOCKSIZE}"),
    ({"blocksize": 16}, f"blocksize is 16, {BLOCKSIZE}"),
    ({"blocksize": 8192}, f"blocksize is 8192, {BLOCKSIZE}"),
    ({"n": -1}, "n is -1, want the number of weights, 0 or more"),
    ({"A": None}, "A is null, want an address on the GPU"),
    ({"absmax": None}, "absmax is null, want an address on the GPU"),
    ({"absmax": 66}, "absmax starts 2 bytes past a multiple of 4, want an aligned address"),
    ({"out": None}, "out is null, want an address on the GPU"),
    ({"out": 65}, "out starts 1 bytes past a multiple of 2, want an aligned address"),
]
BAD_GEMM = [
    ({"blocksize": 48}, f"blocksize is 48, {BLOCKSIZE}"),
    ({"m": -2}, "m is -2, want the number of rows of the weight, 0 or more"),
    ({"n": 2}, "n is 2, want 1: it multiplies one vector"),
    ({"n": -1}, "n is -1, want 1: it multiplies one vector"),
    ({"k": -64}, "k is -64, want the length of a weight's row, even"),
    ({"k": 65, "ldb": 33}, "k is 65, want the length of a weight's row, even"),
    ({"ldb": 40}, "ldb is 40, want 32 bytes (k / 2): rows of B without gaps between them"),
    ({"A": None}, "A is null, want an address on the GPU"),
    ({"A": 65}, "A starts 1 bytes past a multiple of 2, want an aligned address"),
    ({"B": None}, "B is null, want an address on the GPU"),
    ({"table": None}, "the table is null, want an address on the GPU"),
    ({"absmax": 65}, "absmax starts 1 bytes past a multiple of 4, want an aligned address"),
    ({"out": None}, "out is null, want an address on the GPU"),
]


@on_cuda_kernels
@pytest.mark.parametrize(
    ("name", "good", "bad", "sentence"),
    [("cdequantize_blockwise_bf16_nf4", DEQUANTIZE, *case) for case in BAD_DEQUANTIZE]
    + [("cgemm_4bit_inference_naive_fp16", GEMM, *case) for case in BAD_GEMM],
)
def test_a_bad_argument_is_an_error(c, name, good, bad, sentence):
    """The addresses are made up: nothing may read them."""
    with pytest.raises(RuntimeError) as error:
        c.call[name](*{**good, **bad}.values())
    assert str(error.value) == f"{name}: {sentence}"


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
def test_a_failed_launch_is_an_error(c, backend):
    """And the call after it is as any other."""
    packed, absmax = quantized(backend, [128], 64, "nf4")
    with backend.ops.ptx(), pytest.raises(RuntimeError) as error:  # that nvcc did not make here
        c.dequantize("nf4", torch.float32, packed, absmax, 64, 128)
    assert str(error.value).startswith(
        "cdequantize_blockwise_fp32_nf4: dequantize_4bit_vector<float, false>: launch failed: "
    )
    c.dequantize("nf4", torch.float32, packed, absmax, 64, 128)


@on_cuda_kernels
def test_errors_do_not_cross_threads(c):
    """ctypes lets other Python threads run during a call."""
    messages, barrier = {}, threading.Barrier(2)

    def work(n):
        barrier.wait()
        for _ in range(200):
            with pytest.raises(RuntimeError) as error:
                c.call["cdequantize_blockwise_fp16_fp4"](*{**DEQUANTIZE, "n": n}.values())
            messages.setdefault(n, set()).add(str(error.value))

    threads = [threading.Thread(target=work, args=(n,)) for n in (-1, -2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sentence = "cdequantize_blockwise_fp16_fp4: n is {}, want the number of weights, 0 or more"
    assert messages == {n: {sentence.format(n)} for n in (-1, -2)}


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
def test_an_error_that_nobody_takes_is_printed(backend):
    """As a caller without Python would leave it: by the next call, and when the thread ends."""
    code = f"""
import ctypes, torch
library = ctypes.CDLL({str(backend.ops.path)!r})
for n in (-1, -2):
    library.cdequantize_blockwise_fp32_nf4(None, None, None, None, 64, n, None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence = (
        "qlora_ext: cdequantize_blockwise_fp32_nf4: n is {}, want the number of weights, 0 or more"
    )
    assert done.stderr.splitlines() == [sentence.format(n) for n in (-1, -2)]


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
def test_calls_can_be_captured(c, backend):
    """Neither reads the GPU's memory back, not even for the table."""
    packed, absmax = quantized(backend, [4, 64], 64, "nf4")
    table = torch.tensor(_C.codebooks()["nf4"], dtype=torch.float32)
    before = backend.ops.synchronizations()
    with backend.ops.capture():
        c.dequantize("nf4", torch.float16, packed, absmax, 64, 256)
        c.gemm(torch.ones(64).half(), packed, absmax, table, 4, 64)
    assert backend.ops.synchronizations() == before
