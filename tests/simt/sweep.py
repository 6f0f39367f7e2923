"""Small calls of every op that together launch every kernel instantiation that dispatch can reach.

test_simt_kernels.py runs them under two poison patterns, compares them with the CPU backend, and
turns kernels off one by one; `python sweep.py [NAME ...]` runs them bare, which is what the
sanitizers watch.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if __name__ == "__main__":
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests / "support")]

from c_functions import CFunctions
from qlora_ext.ops import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """`run(ops)` returns tensors; `exact`: the CPU backend gives the same bytes."""

    name: str
    run: Callable
    exact: bool = False
    arch: int = 80
    sm_count: int = 4
    large: bool = False  # takes a second or more: not under a sanitizer

    def __str__(self):
        return self.name


def _seeded(name):
    return torch.Generator().manual_seed(sum(map(ord, name)))


def _randn(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def _unaligned(tensor):
    """The same values, contiguous, one element past an aligned address."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = buffer[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def _weight(generator, shape, *, blocksize=64, quant_type="nf4", normalization="absmax", nested):
    """W4 arguments from the CPU backend."""
    cpu = torch.ops.qlora_ext
    w = _randn(generator, *shape, scale=0.05)
    packed, absmax, mean = cpu.quantize_4bit(
        w, blocksize, quant_type, None, normalization, 3.0, "none", 1.0
    )
    code, scales = cpu.quantize_absmax(absmax) if nested else (absmax, None)
    mean = mean if normalization == "standard" else None
    return packed, code, scales, mean, list(shape), blocksize, quant_type, None


def _quantize(name, dtype, normalization, blocksize, shape, aligned, quant_type="nf4"):
    def run(ops):
        w = _randn(_seeded(name), *shape, dtype=dtype)
        w = w if aligned else _unaligned(w)
        args = (w, blocksize, quant_type, None, normalization, 3.0, "none", 1.0)
        packed, absmax, mean = ops.quantize_4bit(*args)
        return (packed, absmax, mean) if normalization == "standard" else (packed, absmax)

    return Case(name, run, exact=True)


def _dequantize(name, dtype, shape, aligned, **weight):
    def run(ops):
        w4 = _weight(_seeded(name), shape, **weight)
        if aligned:
            return (ops.dequantize_4bit(*w4, dtype),)
        out = _unaligned(torch.empty(shape, dtype=dtype))
        ops.dequantize_4bit.out(*w4, out=out)
        return (out,)

    return Case(name, run, exact=True)


def _embedding(name, dtype, shape, **weight):
    def run(ops):
        w4 = _weight(_seeded(name), shape, **weight)
        indices = torch.tensor([3, 0, shape[0] - 1, 3])
        return (ops.embedding_4bit(indices, *w4, dtype),)

    return Case(name, run, exact=True)


def _gemm(name, dtype, M, N, K, *, nested, lora=0, bias=False, **case):
    def run(ops):
        g = _seeded(name)
        w4 = _weight(g, (N, K), nested=nested)
        x = _randn(g, M, K, dtype=dtype)
        b = _randn(g, N, dtype=dtype) if bias else None
        if not lora:
            return (ops.gemm_4bit(x, *w4, b),)
        S, B = _randn(g, M, lora), _randn(g, N, lora, scale=0.1)
        return (ops.gemm_4bit(x, *w4, b, S, B),)

    return Case(name, run, **case)


def _function(name, dtype, N, K, **case):
    """bitsandbytes' C function, which takes the codebook from memory."""

    def run(ops):
        g = _seeded(name)
        w4 = _weight(g, (N, K), nested=False)
        x = _randn(g, 1, K, dtype=dtype)
        if ops is torch.ops.qlora_ext:
            return (ops.gemm_4bit(x, *w4, None).reshape(-1),)
        table = torch.tensor(_C.codebooks()["nf4"], dtype=torch.float32)
        return (CFunctions(ops).gemm(x, w4[0], w4[1], table, N, 64),)

    return Case(name, run, **case)


def _backward(name, dtype, M, N, K, *, nested, lora=0, **case):
    def run(ops):
        g = _seeded(name)
        w4 = _weight(g, (N, K), nested=nested)
        dY = _randn(g, M, N, dtype=dtype)
        if not lora:
            return (ops.gemm_4bit_backward(dY, *w4),)
        dS, A = _randn(g, M, lora), _randn(g, lora, K, scale=0.1)
        return (ops.gemm_4bit_backward(dY, *w4, dS, A),)

    return Case(name, run, **case)


def _scales(name, num_blocks, *, large=False):
    def run(ops):
        absmax = (_randn(_seeded(name), num_blocks).abs() + 0.1).view(torch.uint8)
        code, nested = ops.quantize_absmax(absmax)
        return code, nested, ops.dequantize_absmax(code, nested)

    return Case(name, run, exact=True, large=large)


def _lora(name, dtype, lora_dtype, M, N, K, r, **case):
    def run(ops):
        g = _seeded(name)
        x, dY = _randn(g, M, K, dtype=dtype), _randn(g, M, N, dtype=dtype)
        A, B = _randn(g, r, K, dtype=lora_dtype, scale=0.1), _randn(g, N, r, dtype=lora_dtype)
        S = _randn(g, M, r)
        results = [ops.lora_shrink(x, A, 0.5)]
        results += ops.lora_shrink_backward(S, x, A, 0.5, True)
        results += ops.lora_expand_backward(dY, S, B)
        return tuple(results)

    return Case(name, run, **case)


def _merge(name, dtype, N, K, r, **weight):
    def run(ops):
        g = _seeded(name)
        w4 = _weight(g, (N, K), **weight)
        A, B = _randn(g, r, K, scale=0.1), _randn(g, N, r, scale=0.1)
        return (ops.merge_lora_4bit(*w4, A, B, 2.0, dtype),)

    return Case(name, run)


def _stack(generator, shape, **weight):
    """W4 arguments of experts of `shape` [E, N, K], each packed alone."""
    experts = [_weight(generator, shape[1:], **weight) for _ in range(shape[0])]
    packed, absmax, nested, mean = (
        None if parts[0] is None else torch.stack(parts)
        for parts in zip(*(expert[:4] for expert in experts), strict=True)
    )
    return packed, absmax, nested, mean, list(shape), *experts[0][5:]


def _groups(generator, E, M, T):
    """offsets, with an empty expert and rows past the last, and rows of x [T, ...]."""
    cuts = torch.randint(0, M, (E,), generator=generator).sort().values
    if E > 1:
        cuts[1] = cuts[0]
    rows = torch.randint(0, T, (M,), generator=generator)
    return cuts.int(), rows.int()


def lawful(offsets, rows, x, M):
    """What kernels make of bad offsets and rows, as arguments that the CPU takes: running maxima
    cut to [0, M], and a row of zeros for indices outside x."""
    offsets = offsets.clamp(0, M).cummax(0).values
    if rows is not None:
        rows = torch.where((rows >= 0) & (rows < len(x)), rows, len(x)).int()
    return offsets, rows, torch.cat([x, torch.zeros_like(x[:1])])


def _grouped(name, dtype, E, M, N, K, *, nested=True, r=5, hostile=False, blocksize=64, **case):
    """The products and the LoRA products of M rows of E experts, x through an index."""

    def run(ops):
        g = _seeded(name)
        w4 = _stack(g, (E, N, K), nested=nested, blocksize=blocksize)
        T = M // 2 + 1
        offsets, rows = _groups(g, E, M, T)
        x, dY = _randn(g, T, K, dtype=dtype), _randn(g, M, N, dtype=dtype)
        if hostile:
            offsets[-1] = M + 1000
            offsets[E // 2 :: 3] = -7
            rows[::3] = T + 5
            rows[1::5] = -1
            if ops is torch.ops.qlora_ext:
                offsets, rows, x = lawful(offsets, rows, x, M)
        bias = _randn(g, E, N, dtype=dtype)
        A, B = _randn(g, E, r, K, scale=0.1), _randn(g, E, N, r, scale=0.1)
        S, dS = _randn(g, M, r), _randn(g, M, r)
        results = [ops.grouped_gemm_4bit(x, *w4, offsets, rows, bias, S, B)]
        results += [ops.grouped_gemm_4bit_backward(dY, *w4, offsets, dS, A)]
        results += [ops.grouped_lora_shrink(x, A, 0.5, offsets, rows)]
        results += ops.grouped_lora_shrink_backward(dS, x, A, 0.5, offsets, rows, True)
        results += ops.grouped_lora_expand_backward(dY, S, B, offsets)
        return tuple(results)

    return Case(name, run, **case)


def _sum_rows(name, dtype, K):
    def run(ops):
        g = _seeded(name)
        values = _randn(g, 30, K, dtype=dtype)
        order = torch.randint(0, 30, (41,), generator=g).int()
        ends = torch.randint(0, 42, (12,), generator=g).sort().values.int()
        return (ops.sum_rows(values, order, ends),)

    return Case(name, run, exact=True)


def _cases():
    for d, dtype in DTYPES.items():
        for aligned in (True, False):
            a = "" if aligned else "-unaligned"
            for normalization in ("absmax", "standard"):
                yield _quantize(
                    f"quantize-{d}-{normalization}-64{a}",
                    dtype,
                    normalization,
                    64,
                    (33, 66),
                    aligned,
                )
                yield _quantize(
                    f"quantize-{d}-{normalization}-tensor{a}",
                    dtype,
                    normalization,
                    0,
                    (7, 41),
                    aligned,
                )
            yield _quantize(
                f"quantize-{d}-none{a}", dtype, "none", 0, (7, 41), aligned, quant_type="linear"
            )
        for blocksize in (32, 512, 4096):  # scales within a warp, across warps, across the block
            name = f"quantize-{d}-standard-{blocksize}"
            yield _quantize(name, dtype, "standard", blocksize, (5, 4099), True)
        yield _quantize(f"quantize-{d}-fp4-4096", dtype, "absmax", 4096, (3, 2049), True, "fp4")
        yield _quantize(f"quantize-{d}-standard-levels", dtype, "standard", 0, (129, 128), True)
        yield _dequantize(f"dequantize-{d}", dtype, (33, 65), True, nested=True)
        yield _dequantize(
            f"dequantize-{d}-plain-32", dtype, (40, 96), True, nested=False, blocksize=32
        )
        yield _dequantize(
            f"dequantize-{d}-mean", dtype, (9, 72), True, nested=True, normalization="standard"
        )
        yield _dequantize(f"dequantize-{d}-unaligned", dtype, (9, 70), False, nested=True)
        yield _embedding(f"embedding-{d}", dtype, (9, 96), nested=True)
        yield _embedding(
            f"embedding-{d}-mean", dtype, (9, 64), nested=True, normalization="standard"
        )
        yield _embedding(f"embedding-{d}-odd", dtype, (9, 41), nested=False)
        yield _merge(f"merge-{d}", dtype, 40, 72, 3, nested=True)
        yield _lora(f"lora-{d}", dtype, torch.float32, 9, 24, 72, 4)
        yield _lora(f"lora-{d}-split", dtype, dtype, 3, 40, 600, 16, sm_count=132)
        for r in (24, 48, 130):
            yield _lora(f"lora-{d}-r{r}", dtype, torch.float32, 19, 40, 72, r)
        yield _lora(f"lora-{d}-odd", dtype, torch.float32, 19, 41, 73, 7)
        yield _gemm(f"gemm-{d}-odd", dtype, 5, 33, 65, nested=True, lora=3, bias=True)
        yield _backward(f"backward-{d}-odd", dtype, 5, 33, 65, nested=True, lora=3)
        for hostile in (False, True):
            h = "-hostile" if hostile else ""
            yield _grouped(f"grouped-{d}-odd{h}", dtype, 3, 40, 33, 66, r=3, hostile=hostile)
        yield _grouped(f"grouped-{d}-split", dtype, 3, 9, 576, 600, r=9, sm_count=132, hostile=True)
        yield _sum_rows(f"sum-rows-{d}", dtype, 64)
        yield _sum_rows(f"sum-rows-{d}-odd", dtype, 41)
    for n in (1, 300, 20_000):
        yield _scales(f"scales-{n}", n)
    yield _scales("scales-4300000", 4_300_000, large=True)

    variants = [("fp16", 75), ("fp16", 80), ("bf16", 80), ("bf16", 86)]
    for d, arch in variants:
        dtype = DTYPES[d]
        for nested in (True, False):
            s = f"{d}-sm{arch}{'' if nested else '-plain'}"
            for M in (1, 13, 24, 40):
                yield _gemm(
                    f"gemm-{s}-M{M}", dtype, M, 72, 256, nested=nested, lora=5, bias=True, arch=arch
                )
                yield _backward(
                    f"backward-{s}-M{M}", dtype, M, 72, 192, nested=nested, lora=5, arch=arch
                )
            # Tiles of 8, 16, 32 and, if the shared memory is there, 64 rows.
            for E, M, r in ((40, 9, 5), (3, 36, 12), (1, 30, 20), (2, 130, 5)):
                hostile = nested and E == 40
                yield _grouped(
                    f"grouped-{s}-E{E}-M{M}{'-hostile' if hostile else ''}",
                    dtype,
                    E,
                    M,
                    72,
                    192,
                    nested=nested,
                    r=r,
                    hostile=hostile,
                    arch=arch,
                )
        yield _gemm(
            f"gemm-{d}-sm{arch}-split", dtype, 3, 40, 9216, nested=True, arch=arch, sm_count=132
        )
        yield _backward(
            f"backward-{d}-sm{arch}-split", dtype, 3, 640, 64, nested=True, arch=arch, sm_count=132
        )
        yield _gemm(
            f"gemm-{d}-sm{arch}-chunks", dtype, 300, 72, 128, nested=True, bias=True, arch=arch
        )
        yield _backward(
            f"backward-{d}-sm{arch}-chunks", dtype, 300, 72, 128, nested=True, arch=arch
        )
        yield _function(f"function-{d}-sm{arch}", dtype, 72, 256, arch=arch)
    yield _function("function-fp32", torch.float32, 9, 66)
    yield _function("function-bf16-split", torch.bfloat16, 40, 9216, sm_count=132)
    # More rows than the fused kernels take, and one SM, which a cuBLAS tile of 256 lines fills: a
    # chunk of 256 and one of 64.
    one = {"nested": True, "lora": 5, "arch": 90, "sm_count": 1, "large": True}
    yield _gemm("gemm-bf16-two-chunks", torch.bfloat16, 257, 320, 2048, bias=True, **one)
    yield _backward("backward-bf16-two-chunks", torch.bfloat16, 257, 2048, 320, **one)


CASES = tuple(_cases())


def run_case(simt, case):
    # Where the environment names an architecture, what is for Ampere and newer runs on that one.
    arch = max(case.arch, int(os.environ.get("SIMT_ARCH", 0))) if case.arch >= 80 else case.arch
    with simt.device(arch, case.sm_count):
        return case.run(simt)


if __name__ == "__main__":
    import qlora_ext  # noqa: F401  (the CPU ops, which make the weights)
    from simt.build import load_simt

    machine = load_simt()
    for sweep_case in CASES:
        if not sweep_case.large and sweep_case.name in (sys.argv[1:] or [sweep_case.name]):
            print(sweep_case.name, flush=True)  # the last line names what a sanitizer stopped
            run_case(machine, sweep_case)
