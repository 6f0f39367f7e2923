"""Raw ops of torch.ops.qlora_ext on hostile arguments: `make fuzz` runs it under ASan and UBSan.

    python tests/fuzz/ops.py [--cases 2000] [--first 0] [--library build/fuzz/lib]

Case n depends on n alone. Each draws an op and valid arguments, lays the tensors out in unusual
memory (against a page that may not be touched, read-only, at an odd address, strided, expanded),
and changes none, one or two arguments to something wrong: dtypes, shapes, layouts, sizes to 2^62,
settings. Then the op must either raise an error that names it, or give what the numpy reference
gives for the same arguments: bytes exactly, sums within the rounding of their dtype. An access out
of bounds ends the process; the case's number stands in the line printed before it.
"""

import argparse
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import math
import mmap
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import grouped
import numpy as np
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAGE = mmap.PAGESIZE


def load(library: Path | None):
    """qlora_ext, with the compiled library of that folder instead of the installed one."""
    if library is not None:
        (path,) = library.resolve().glob("qlora_ext/_C.*.so")
        loader = importlib.machinery.ExtensionFileLoader("qlora_ext._C", str(path))
        spec = importlib.util.spec_from_loader("qlora_ext._C", loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sys.modules["qlora_ext._C"] = module
    import qlora_ext

    return qlora_ext


# ---------------------------------------------------------------- memory

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Memory:
    """Pages of a case's own, given back at its end. Every piece lies between two pages that must
    not be touched."""

    def __init__(self):
        self.maps = []

    def place(self, values: torch.Tensor, *, at_end: bool, odd: bool, read_only: bool):
        """`values` copied so that they end where a page begins that may not be touched (or start
        where one ends), one byte off if `odd`, in pages that may not be written if `read_only`."""
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        pages = -(-(data.size + 1) // PAGE) + 2
        size = pages * PAGE
        base = libc.mmap(None, size, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.maps.append((base, size))
        start = base + PAGE + odd
        if at_end:
            start = base + size - PAGE - data.size - odd
        inside = (ctypes.c_uint8 * data.size).from_address(start)
        placed = np.frombuffer(inside, np.uint8) if data.size else np.empty(0, np.uint8)
        placed[:] = data
        for guard in (base, base + size - PAGE):
            assert libc.mprotect(guard, PAGE, 0) == 0
        if read_only:
            assert libc.mprotect(base + PAGE, size - 2 * PAGE, mmap.PROT_READ) == 0
        return torch.from_numpy(placed).view(values.dtype).view(values.shape)

    def release(self):
        for base, size in self.maps:
            libc.munmap(base, size)


LAYOUTS = ("plain", "end", "start", "odd", "read-only", "columns", "transposed", "negative")


def lay_out(rng, memory, tensor):
    """The same values in memory of another kind."""
    layout = rng.choice(LAYOUTS)
    if tensor.numel() == 0 or layout == "plain":
        return tensor
    if layout in ("end", "start", "odd", "read-only"):
        return memory.place(
            tensor,
            at_end=layout != "start" and rng.random() < 0.7,
            odd=layout == "odd",
            read_only=layout == "read-only",
        )
    if layout == "columns" and tensor.dim() >= 1:
        last = tensor.shape[-1]
        wide = torch.zeros(*tensor.shape[:-1], last + rng.choice((1, 3, 8)), dtype=tensor.dtype)
        part = wide[..., -last:] if rng.random() < 0.5 else wide[..., :last]
        return part.copy_(tensor)
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if layout == "negative" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    return tensor


# ---------------------------------------------------------------- arguments

W4 = ("packed", "absmax", "nested", "mean", "shape", "blocksize", "quant_type", "codebook")
SIGNATURES = {
    "quantize_4bit": [
        *("weight", "blocksize", "quant_type", "codebook"),
        *("normalization", "std_factor", "companding", "companding_k"),
    ],
    "quantize_absmax": ["absmax"],
    "dequantize_absmax": ["code", "nested"],
    "dequantize_4bit": [*W4, "dtype"],
    "dequantize_4bit.out": [*W4, "out"],
    "gemm_4bit": ["x", *W4, "bias", "lora_S", "lora_B"],
    "gemm_4bit_backward": ["dY", *W4, "lora_dS", "lora_A"],
    "lora_shrink": ["x", "lora_A", "scaling"],
    "lora_shrink_backward": ["dS", "x", "lora_A", "scaling", "need_dx"],
    "lora_expand_backward": ["dY", "lora_S", "lora_B"],
    "lora_gemm_4bit": ["x", *W4, "lora_A", "lora_B", "scaling", "bias", "lora_S"],
    "lora_gemm_4bit_backward": (
        ["dY", "x", "lora_S", *W4, "lora_A", "lora_B", "scaling", "need_dx"]
    ),
    "merge_lora_4bit": [*W4, "lora_A", "lora_B", "scaling", "dtype"],
    "embedding_4bit": ["indices", *W4, "dtype"],
    "linear": ["x", "weight", "bias"],
    "linear_backward": ["dY", "weight"],
    **grouped.SIGNATURES,
}
SIZES = (0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 128, 130, 192, 320)
ROWS = (0, 1, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33)
RANKS = (1, 2, 4, 5, 8, 16, 17)


def as_bytes(array):
    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())


def draw_weight(rng, reference, shape):
    """The W4 arguments of random bytes with finite statistics."""
    numel = math.prod(shape)
    blocksize = rng.choice((0, 32, 64, 64, 64, 128, 256, 4096))
    blocks = -(-numel // (blocksize or max(numel, 1)))
    make = np.random.default_rng(rng.getrandbits(32))
    nested = mean = None
    if rng.random() < 0.6:
        absmax = make.integers(0, 256, blocks, dtype=np.uint8)
        nested = make.normal(0, 0.02, 1 + -(-blocks // 256)).astype(np.float32)
    else:
        absmax = np.abs(make.normal(0, 0.05, blocks)).astype(np.float32)
    if rng.random() < 0.2:
        mean = make.normal(0, 0.01, blocks).astype(np.float32)
    quant_type = rng.choice(("nf4", *reference.CODEBOOKS, "custom"))
    codebook = [rng.uniform(-1, 1) for _ in range(16)] if quant_type == "custom" else None
    return {
        "packed": as_bytes(make.integers(0, 256, (numel + 1) // 2, dtype=np.uint8)),
        "absmax": as_bytes(absmax),
        "nested": None if nested is None else as_bytes(nested),
        "mean": None if mean is None else as_bytes(mean),
        "shape": list(shape),
        "blocksize": blocksize,
        "quant_type": quant_type,
        "codebook": codebook,
    }


def draw(rng, reference, op):
    """Valid arguments of `op`, by name."""
    if op in grouped.SIGNATURES:
        values = grouped.draw(rng, lambda shape: draw_weight(rng, reference, shape), FLOATS)
        return {name: values[name] for name in SIGNATURES[op]}
    N, K, M, R = rng.choice(SIZES), rng.choice(SIZES), rng.choice(ROWS), rng.choice(RANKS)
    dtype, lora_dtype = rng.choice(FLOATS), rng.choice(FLOATS)
    scale = 10.0 ** rng.uniform(-3, 2)
    leading = rng.choice(((M,), (M,), (1, M), (2, M), ()))

    def dense(*sizes, dtype=dtype):
        return (torch.randn(sizes) * scale).to(dtype)

    rows = math.prod(leading)
    values = {
        "x": dense(*leading, K),
        "dY": dense(*leading, N),
        "bias": rng.choice((None, dense(N), dense(N, dtype=lora_dtype))),
        "lora_A": dense(R, K, dtype=lora_dtype),
        "lora_B": dense(N, R, dtype=lora_dtype),
        "lora_S": dense(*leading, R, dtype=torch.float32),
        "dS": dense(*leading, R, dtype=torch.float32),
        "lora_dS": dense(*leading, R, dtype=torch.float32),
        "scaling": rng.choice((1.0, 0.0, -2.5, 16.0)),
        "need_dx": rng.random() < 0.5,
        "dtype": rng.choice(FLOATS),
        "indices": torch.randint(0, max(N, 1), leading if N else (0,)).to(
            rng.choice((torch.int64, torch.int32))
        ),
        "code": torch.randint(0, 256, (max(rows * 37, N),), dtype=torch.uint8),
        "companding": "none",
        "companding_k": 1.0,
        "normalization": "absmax",
        "std_factor": rng.choice((3.0, 2.5)),
        "weight": dense(N, K, dtype=rng.choice((dtype, lora_dtype))),
    }
    values |= draw_weight(rng, reference, (N, K))
    if op == "quantize_4bit":
        values["weight"] = dense(*rng.choice(((N, K), (N * K,), (2, N, K), ())))
        values["normalization"] = rng.choice(("absmax", "absmax", "standard", "none"))
        if values["normalization"] == "none":
            values["blocksize"] = 0
        values["companding"] = rng.choice(("none", "none", "logarithmic", "exponential"))
        values["companding_k"] = rng.choice((1.0, 15.0))
    elif op == "quantize_absmax":
        values["absmax"] = as_bytes(
            np.abs(np.random.default_rng(N + K).normal(size=N * 13 + K)).astype(np.float32)
        )
    elif op == "dequantize_absmax":
        groups = 1 + -(-values["code"].numel() // 256)
        values["nested"] = as_bytes(
            np.random.default_rng(N).normal(0, 0.1, groups).astype(np.float32)
        )
    elif op == "dequantize_4bit.out":
        values["out"] = torch.full((N, K), math.nan).to(dtype)
    elif op == "dequantize_4bit":
        values |= draw_weight(rng, reference, rng.choice(((N, K), (N * K,), (2, N, K), ())))
    if op in ("gemm_4bit", "gemm_4bit_backward") and rng.random() < 0.5:
        values |= {"lora_S": None, "lora_B": None, "lora_dS": None, "lora_A": None}
    if op == "lora_gemm_4bit":
        # lora_S stands for scaling x A^T: the op may take the caller's word for it.
        S = values["scaling"] * values["x"].double() @ values["lora_A"].double().T
        values["lora_S"] = rng.choice((None, S.float()))
    return {name: values[name] for name in SIGNATURES[op]}


NUMBERS = (-1, 0, 1, 3, 31, 63, 2**31, 2**32 + 1, 2**40, 2**62, -(2**62), 2**63 - 1)
DTYPES = (
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint8,
    *FLOATS,
)


KINDS = ("dtype", "short", "long", "flat", "rank", "scalar", "empty", "huge", "sparse", "meta")
KINDS += ("bytes", "gradient", "none", "number", "freed")


def spoil_tensor(rng, tensor):
    """Something that is not what the op wants, or rarely is."""
    kind = rng.choice(KINDS)
    if kind == "dtype":
        return tensor.to(rng.choice(DTYPES))
    if kind == "short" and tensor.numel():
        return tensor.narrow(-1, 0, tensor.shape[-1] - 1) if tensor.dim() else tensor.reshape(1)
    if kind == "long":
        return torch.cat([tensor, tensor], -1) if tensor.dim() else tensor.reshape(1)
    if kind == "flat":
        return tensor.reshape(-1)
    if kind == "rank":
        return tensor[None]
    if kind == "scalar":
        return torch.zeros((), dtype=tensor.dtype)
    if kind == "empty":
        return torch.zeros(rng.choice(((0,), (0, 3), (3, 0))), dtype=tensor.dtype)
    if kind == "huge":
        sizes = rng.choice(((2**40,), (2**31, 2**20), (2**62,), (2**20, 2**41), (1, 2**47)))
        return torch.zeros(1, dtype=tensor.dtype).expand(sizes)
    if kind == "sparse":
        return tensor.to_sparse() if tensor.dim() and tensor.device.type == "cpu" else tensor
    if kind == "meta":
        return tensor.to("meta")
    if kind == "bytes" and tensor.numel():
        changed = tensor.clone()
        # Any bytes at all: in fp32 statistics these are NaN, infinities and subnormals.
        raw = changed.reshape(-1).view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))
        return changed
    if kind == "gradient" and tensor.is_floating_point():
        return tensor.clone().requires_grad_()
    if kind == "freed" and tensor.numel():
        freed = tensor.clone()
        freed.untyped_storage().resize_(rng.choice((0, freed.nbytes - 1)))
        return freed
    if kind == "none":
        return None
    if kind == "number":
        return rng.choice((7, 2.5, "text", [1, 2]))
    return tensor


def spoil(rng, name, value):
    if name == "shape":
        shape = list(value)
        if shape and rng.random() < 0.6:
            shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
            return shape
        return rng.choice(([], [1], [2**62, 2], [2**31, 2**31], [0, 2**62], shape[::-1], [1] * 60))
    if name == "blocksize":
        return rng.choice(NUMBERS)
    if name == "quant_type":
        return rng.choice(("", "NF4", "custom", "nf4\0", "x" * 5000, "int8"))
    if name == "codebook":
        return rng.choice(
            ([], [0.5] * 16, [math.nan] * 16, [1e300] * 16, [0.1] * 15, [0.1] * 17, None)
        )
    if name in ("normalization", "companding"):
        return rng.choice(("", "ABSMAX", "none", "standard", "logarithmic", "absmax\0"))
    if name in ("scaling", "std_factor", "companding_k"):
        return rng.choice((math.nan, math.inf, -math.inf, 1e300, -1e39, 1e38, 0.0, -1.0, 1e-320))
    if name == "need_dx":
        return rng.choice((True, False, 2, None))
    if name == "dtype":
        return rng.choice(DTYPES)
    if name == "indices" and rng.random() < 0.5 and torch.is_tensor(value) and value.numel():
        changed = value.clone().reshape(-1)
        changed[rng.randrange(changed.numel())] = rng.choice((-1, 2**31 - 1, -(2**31), 320, 1000))
        return changed.reshape(value.shape)
    indices = name in grouped.INDICES and torch.is_tensor(value) and value.numel()
    if indices and rng.random() < 0.5:
        return grouped.spoil_index(rng, value)
    if torch.is_tensor(value):
        return spoil_tensor(rng, value)
    return rng.choice((None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8), 1.0))


# ---------------------------------------------------------------- what is right


class Unknown(Exception):
    """The reference cannot say: the op had to refuse these arguments."""


def array(tensor, dtype=np.float64):
    return None if tensor is None else tensor.detach().double().numpy().astype(dtype)


def stored(reference, args):
    """The reference's view of the W4 arguments."""
    shape, blocksize = tuple(args["shape"]), args["blocksize"]
    book = reference.make_codebook(args["quant_type"], args["codebook"])
    tensors = {k: args[k] for k in ("packed", "absmax", "nested", "mean")}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.uint8:
            raise Unknown(f"{name} is {tensor.dtype}")

    def floats(tensor):
        return None if tensor is None else tensor.reshape(-1).contiguous().numpy().view(np.float32)

    packed = tensors["packed"].reshape(-1).numpy()
    nested, absmax = floats(tensors["nested"]), tensors["absmax"]
    absmax = absmax.reshape(-1).numpy() if nested is not None else floats(absmax)
    return reference.QuantizedArray(
        packed, absmax, nested, floats(tensors["mean"]), shape, blocksize, book
    )


UNIT = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOATS}


def check_sum(name, got, want, terms, dtype, sums=0.0):
    """got within the rounding of `dtype` of want, whose terms have the absolute sum `terms`. Where
    terms are not finite, or leave the range of the dtype, the result may be anything; so it may
    where `sums`, the fp32 sums that the op computes on the way, leave theirs: zero times infinity
    is NaN."""
    want, terms = np.asarray(want), np.asarray(terms)
    if tuple(got.shape) != want.shape:
        raise AssertionError(f"{name} has shape {list(got.shape)}, want {list(want.shape)}")
    got = got.detach().double().numpy()
    limit = UNIT[dtype] * terms + 1e-6
    clear = np.isfinite(terms) & (terms < LARGEST[dtype] / 4)
    clear &= np.asarray(sums) < LARGEST[torch.float32] / 4
    wrong = clear & ~(np.abs(got - want) <= limit)  # NaN is never within
    if wrong.any():
        at = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise AssertionError(f"{name} at {at}: {got[at]}, want {want[at]} within {limit[at]}")


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_bytes(name, got, want):
    got, want = raw(got), np.ascontiguousarray(want).reshape(-1).view(np.uint8)
    if got.shape != want.shape or (got != want).any():
        raise AssertionError(f"{name}: other bytes than the reference's")


def check_values(name, got, want):
    """Equal fp32 values, or both NaN."""
    if tuple(got.shape) != want.shape:
        raise AssertionError(f"{name} has shape {list(got.shape)}, want {list(want.shape)}")
    if not np.array_equal(got.detach().float().numpy(), want, equal_nan=True):
        raise AssertionError(f"{name}: other values than the reference's")


def folded(a):
    """Its leading dimensions as one."""
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])


def rows_of(tensor, like):
    """A factor of the bypass in the leading dimensions of x: the ops ask for as many rows."""
    return None if tensor is None else array(tensor).reshape(*like.shape[:-1], tensor.shape[-1])


def product(a, b):
    """(a b, |a| |b|) over the last axes."""
    with np.errstate(all="ignore"):
        return a @ b, np.abs(a) @ np.abs(b)


def narrowest(*tensors):
    return max((t.dtype for t in tensors if t is not None), key=UNIT.__getitem__)


def check(reference, op, args, result):
    """Raises AssertionError where `result` is not what the reference says of `args`."""
    name = op.partition(".")[0]
    if op in grouped.SIGNATURES:
        grouped.check(op, args, result)
        return
    if op == "quantize_4bit":
        book = reference.make_codebook(
            args["quant_type"], args["codebook"], args["companding"], args["companding_k"]
        )
        want = reference.quantize_4bit(
            array(args["weight"], np.float32),
            args["blocksize"],
            book,
            False,
            args["normalization"],
            args["std_factor"],
        )
        packed, absmax, mean = result
        check_bytes("packed", packed, want.packed)
        check_bytes("absmax", absmax, want.absmax)
        check_bytes("mean", mean, np.empty(0) if want.mean is None else want.mean)
        return
    if op == "quantize_absmax":
        scales = args["absmax"].reshape(-1).contiguous().numpy().view(np.float32)
        if not np.isfinite(scales).all() or np.abs(scales).max(initial=0) > 1e30:
            return
        code, nested = reference.quantize_absmax(scales)
        check_bytes("code", result[0], code)
        check_bytes("nested", result[1], nested)
        return
    if op == "dequantize_absmax":
        code = args["code"].reshape(-1).numpy()
        nested = args["nested"].reshape(-1).contiguous().numpy().view(np.float32)
        want = reference.dequantize_absmax(code, nested)
        check_values("absmax", result.view(torch.float32), want)
        return
    if op in ("linear", "linear_backward"):
        rows, weight = array(args.get("x", args.get("dY"))), array(args["weight"])
        y, terms = product(rows, weight.T if op == "linear" else weight)
        if args.get("bias") is not None:
            y, terms = y + array(args["bias"]), terms + np.abs(array(args["bias"]))
        check_sum(op, result, y, terms, result.dtype)
        return
    x, dY, A, B = (array(args.get(n)) for n in ("x", "dY", "lora_A", "lora_B"))
    scaling = args.get("scaling", 1.0)
    if op == "lora_shrink":
        S, terms = product(x, A.T)
        check_sum("S", result, scaling * S, abs(scaling) * terms, torch.float32, terms)
        return
    if op == "lora_shrink_backward":
        dS = array(args["dS"])
        dx, dA = result
        flat, rows = folded(x), folded(dS)
        want, terms = product(rows.T, flat)
        dtype = narrowest(args["lora_A"])
        check_sum("dA", dA, scaling * want, abs(scaling) * terms, dtype, terms)
        if args["need_dx"]:
            want, terms = (part.reshape(x.shape) for part in product(folded(dS), A))
            dtype = args["x"].dtype
            check_sum("dx", dx, scaling * want, abs(scaling) * terms, dtype, terms)
        return
    if op == "lora_expand_backward":
        S = array(args["lora_S"])
        check_sum("dS", result[0], *product(dY, B), torch.float32)
        want = product(folded(dY).T, folded(S))
        check_sum("dB", result[1], *want, narrowest(args["lora_B"]))
        return

    q = stored(reference, args)
    with np.errstate(all="ignore"):
        W = reference.dequantize_4bit(q)
    if name == "dequantize_4bit":
        out = args["out"] if op.endswith(".out") else result
        dtype = str(out.dtype).removeprefix("torch.")
        with np.errstate(all="ignore"):
            check_values("the result", out, reference.dequantize_4bit(q, dtype))
        return
    if op == "embedding_4bit":
        dtype = str(args["dtype"]).removeprefix("torch.")
        rows = reference.round_to(W, dtype)[args["indices"].long().numpy()]
        check_values("the result", result, rows)
        return
    W = W.astype(np.float64)
    if op == "merge_lora_4bit":
        delta, terms = product(B, A)
        want, all_terms = W + scaling * delta, np.abs(W) + abs(scaling) * terms
        check_sum("the result", result, want, all_terms, args["dtype"], terms)
        return

    if op in ("gemm_4bit", "lora_gemm_4bit"):
        y, terms = product(x, W.T)
        if args["bias"] is not None:
            y, terms = y + array(args["bias"]), terms + np.abs(array(args["bias"]))
        sums = 0.0
        if B is not None:
            S = S_terms = rows_of(args["lora_S"], x)
            if op == "lora_gemm_4bit":
                unscaled, sums = product(x, A.T)
                S = scaling * unscaled if S is None else S
                S_terms = abs(scaling) * sums
                sums = sums.max(-1, keepdims=True, initial=0)
            part, part_terms = product(S, B.T)
            y, terms = y + part, terms + np.abs(S_terms) @ np.abs(B.T)
            terms = np.maximum(terms, part_terms)
        got = result[0] if op == "lora_gemm_4bit" else result
        check_sum("y", got, y, terms, got.dtype, sums)
        return
    dX, terms = product(dY, W)
    if op == "gemm_4bit_backward":
        if A is not None:
            part, part_terms = product(rows_of(args["lora_dS"], dY), A)
            dX, terms = dX + part, terms + part_terms
        check_sum("dX", result, dX, terms, result.dtype)
        return
    assert op == "lora_gemm_4bit_backward"
    S, flat = folded(array(args["lora_S"])), folded(x)
    dS, dS_terms = product(dY, B)
    check_sum("dB", result[2], *product(folded(dY).T, S), narrowest(args["lora_B"]))
    want, _ = product(scaling * folded(dS).T, flat)
    largest = folded(dS_terms).max(0, initial=0)
    sums = np.maximum(folded(dS_terms).T @ np.abs(flat), largest[:, None])
    check_sum("dA", result[1], want, abs(scaling) * sums, narrowest(args["lora_A"]), sums)
    if args["need_dx"]:
        part, _ = product(scaling * dS, A)
        sums = np.maximum(dS_terms @ np.abs(A), dS_terms.max(-1, keepdims=True, initial=0))
        terms = terms + abs(scaling) * sums
        check_sum("dX", result[0], dX + part, terms, result[0].dtype, sums)


# ---------------------------------------------------------------- a case


def names_the_op(op, error):
    """The project's own errors start with the op; torch's, of an argument that its schema does not
    know or a backend that has no kernel, hold its qualified name."""
    text = str(error)
    return text.startswith(f"{op}: ") or f"qlora_ext::{op}" in text or f"{op}()" in text


def run_case(qlora_ext, reference, number):
    """ "refused" or "right"; a finding raises AssertionError."""
    rng = random.Random(number)
    torch.manual_seed(number)
    op = rng.choice(sorted(SIGNATURES))
    args = draw(rng, reference, op)
    memory = Memory()
    try:
        for name, value in args.items():
            if torch.is_tensor(value) and name != "out" and rng.random() < 0.6:
                args[name] = lay_out(rng, memory, value)
        spoiled = rng.sample(sorted(args), min(len(args), rng.choice((0, 0, 1, 1, 1, 2))))
        for name in spoiled:
            args[name] = spoil(rng, name, args[name])
        call = torch.ops.qlora_ext
        for part in op.split("."):
            call = getattr(call, part)
        before = {n: v.clone() for n, v in args.items() if is_plain(v) and n != "out"}
        values = dict(args)
        positional = [values.pop(n) for n in SIGNATURES[op] if n != "out"]
        try:
            result = call(*positional, **values)
        except Exception as error:
            if not spoiled:
                raise AssertionError(f"refused valid arguments: {error}") from error
            refusals = (RuntimeError, TypeError, ValueError, IndexError)  # torch's and ours
            if not isinstance(error, refusals) or not names_the_op(op.partition(".")[0], error):
                kind = type(error).__name__
                raise AssertionError(
                    f"an error that does not name the op: {kind}: {error}"
                ) from error
            return "refused"
        if any(torch.is_tensor(v) and v.device.type == "meta" for v in args.values()):
            return "shapes"
        for name, value in before.items():
            check_bytes(f"{name} after the call", args[name], raw(value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check(reference, op, args, result)
            except AssertionError:
                raise
            except Exception as error:
                # NumPy makes no array of [0, 2^62]; the op's result has no element either.
                if "array is too big" in str(error) and not result.numel():
                    return "right"
                raise AssertionError(
                    f"accepted what the reference does not: {type(error).__name__}: {error}"
                ) from error
        del result, before, values, positional
        return "right"
    except AssertionError as error:
        shown = {n: describe(v) for n, v in args.items()}
        raise AssertionError(f"case {number}, {op}: {error}\n    {shown}") from error
    finally:
        args.clear()
        memory.release()


def is_plain(value):
    """A tensor small enough, and of a kind, that it can be compared afterwards."""
    return (
        torch.is_tensor(value)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.numel() < 2**24
        and not value.is_neg()
        and (value.numel() == 0 or value.untyped_storage().nbytes() >= value.nbytes)
    )


def describe(value):
    if not torch.is_tensor(value):
        return repr(value)[:60]
    strides = value.stride() if value.layout == torch.strided else value.layout
    return f"{value.dtype} {list(value.shape)} strides {strides} {value.device}".replace(
        "torch.", ""
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--library", type=Path, help="a folder with qlora_ext/_C.*.so")
    parser.add_argument("--verbose", action="store_true", help="print each case before it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    qlora_ext = load(arguments.library)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
    import reference

    outcomes, findings, begin = Counter(), [], time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.cases):
        if arguments.verbose or number % 1000 == 0:
            print(f"case {number}", flush=True)
        try:
            outcomes[run_case(qlora_ext, reference, number)] += 1
        except AssertionError as error:
            findings.append(number)
            print(error, flush=True)
            if arguments.verbose:
                traceback.print_exc()
    seconds = time.monotonic() - begin
    counts = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
    print(f"{arguments.cases} cases in {seconds:.0f} s: {counts}, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
