"""The CPU backend's instruction sets: one set of bits, whichever is live."""

import functools
import json
import os
import subprocess
import sys

import pytest

from qlora_ext.ops import _C

PATHS = _C.cpu_paths[::-1]

# Bytes and decoded values must agree to the bit; of products, the bits for 1, 2 and 8 threads.
PROBE = """
import hashlib, json, torch
from qlora_ext.ops import _C
from qlora_ext import QuantConfig, build_info, dequantize_4bit, quantize_4bit

def digest(*tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

ops = torch.ops.qlora_ext
torch.manual_seed(0)
bits, errors = {}, {}
for shape in ((64, 192), (33, 130), (7, 77)):
    for quant_type in _C.codebooks():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(shape).to(dtype)
            q = quantize_4bit(weight, quant_type=quant_type)
            parts = [t for t in (q.packed, q.absmax, q.nested) if t is not None]
            dense = [dequantize_4bit(q, d) for d in (torch.float32, torch.bfloat16, torch.float16)]
            bits[f"{shape} {quant_type} {dtype}"] = digest(*parts, *dense)
            x, dY = torch.randn(19, shape[1]).to(dtype), torch.randn(19, shape[0]).to(dtype)
            runs = []
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                y, dX = ops.gemm_4bit(x, *q.op_args()), ops.gemm_4bit_backward(dY, *q.op_args())
                runs.append(digest(y, dX))
            W = dense[0].double()
            off = (y.double() - x.double() @ W.T).abs().max()
            off += (dX.double() - dY.double() @ W).abs().max()
            unit = torch.finfo(dtype).eps * shape[1] ** 0.5
            errors[f"{shape} {quant_type} {dtype}"] = float(off) / unit
            assert len(set(runs)) == 1, (shape, quant_type, dtype)
# Few rows of x take other kernels, which cut x into pieces where it's long.
W = torch.randn(40, 4288)
q = quantize_4bit(W)
W = dequantize_4bit(q, torch.float32).double()
for M in (1, 2, 3, 4, 5, 8):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(M, 4288).to(dtype)
        runs = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            y = ops.gemm_4bit(x, *q.op_args())
            runs.append(digest(y))
        assert len(set(runs)) == 1, (M, dtype)
        off = (y.double() - x.double() @ W.T).abs().max()
        errors[f"M={M} {dtype}"] = float(off) / (torch.finfo(dtype).eps * 4288**0.5)
print(json.dumps({"path": build_info()["cpu_path"], "bits": bits, "errors": errors}))
"""


@functools.cache
def probe(path: str) -> dict:
    """What PROBE prints with `path` forced; skips where this CPU lacks it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "QLORA_EXT_CPU": path},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and ("this CPU lacks" in done.stderr or "want one of" in done.stderr):
        pytest.skip(f"this machine has no {path} path")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def portable() -> dict:
    """The reference path."""
    return probe("portable")


@pytest.mark.parametrize("path", PATHS[1:])
def test_paths_agree(path, portable):
    result = probe(path)
    assert result["path"] == path
    assert result["bits"] == portable["bits"]


@pytest.mark.parametrize("path", PATHS)
def test_products_are_right(path):
    for case, error in probe(path)["errors"].items():
        # Units of eps * sqrt(K). In fp32 the order of the sums shows; in 16 bits the output's
        # rounding and, with bf16 instructions, the weight's.
        assert error < (64.0 if "float32" in case else 8.0), (case, error)
