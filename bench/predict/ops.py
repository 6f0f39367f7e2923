"""The ops as launches of our kernels and calls of cuBLAS, as dispatch makes them, and how other
libraries get the same result. Each function takes a GPU and a scenario and returns Parts."""

from __future__ import annotations

import functools
import math

from . import shared
from .cases import EXPERTS, PACKED, RANK, TOP
from .kernels import Launch, Part, launch_time, library


def ceil(a, b):
    return -(-a // b)


def total(parts):
    return sum(part.time for part in parts)


def limits(parts):
    """{limit: us} of all parts together."""
    names = {name for part in parts for name in part.limits}
    return {name: sum(part.limits.get(name, 0) for part in parts) for name in sorted(names)}


# ---------------------------------------------------------------- dispatch, as recorded


def plan(gpu, op, N, K, M):
    """(parts, lines of a chunk, whether the last block adds the parts) that dispatch chose for this
    shape."""
    return shared.record()["plans"][f"{gpu.arch}x{gpu.sms}"][op][f"{N}x{K}"][str(M)]


def grouped_kernel_of(gpu, op, tokens):
    """(kernel, rows of the run that was traced) for this many tokens of a mixture."""
    name = shared.record()["experts"][str(gpu.arch)][op][str(tokens)]
    runs = shared.record()["kernels"][str(gpu.arch)][op]
    return name, max(int(rows) for rows, names in runs.items() if name in names)


def kernel_of(gpu, op, rows):
    """(kernel, rows of the run that was traced)"""
    runs = shared.record()["kernels"][str(gpu.arch)][op]
    traced = max((int(r) for r in runs if int(r) <= rows), default=min(map(int, runs)))
    return runs[str(traced)][0], traced


# ---------------------------------------------------------------- what is not our kernel


def cublas(gpu, scenario, M, N, K, depth_in_l2=False):
    """A dense bf16 product [M, K] by [K, N]."""
    waste = scenario.value("cublas waves", gpu)
    small = scenario.value("cublas small tiles", gpu)
    tiles = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.5 + small / 2), (64, 128, small))
    if gpu.arch in (80, 86, 89):  # mma.sync needs no 256 lines to reach its rate
        tiles = ((128, 256, 1.0), (128, 128, 1.0), (64, 128, small))
    work = math.inf
    for rows, columns, share in tiles:
        waves = ceil(M, rows) * ceil(N, columns) / gpu.sms
        waves += (math.ceil(waves) - waves) * waste
        work = min(work, waves * gpu.sms * rows * columns * 2 * K / share)
    compute = work / scenario.value("cublas", gpu) / 1e6
    weight = 2 * N * K
    memory = (
        (2 * M * (N + K) + (0 if depth_in_l2 else weight)) / scenario.value("memory", gpu) / 1e6
    )
    fixed = scenario.value("launch", gpu) + scenario.value("cublas start", gpu)
    return Part(
        fixed + max(compute, memory),
        {"cuBLAS": compute, "memory": memory, "launch, start, tail": fixed},
    )


def streaming(gpu, scenario, moved, l2=False, launches=1):
    """A kernel that only moves bytes, such as torch's elementwise ones."""
    time = moved / scenario.value("l2" if l2 else "memory", gpu) / 1e6
    fixed = launches * (scenario.value("launch", gpu) + scenario.value("tail", gpu))
    return Part(fixed + time, {"L2" if l2 else "memory": time, "launch, start, tail": fixed})


def fits_l2(gpu, moved):
    return moved <= gpu.l2 * (1 << 20) / 2


def reduction(gpu, scenario, parts, numel, last_block, tile):
    """Adding the parts of a split. The last block of a tile of `tile` elements does it: a fence, an
    atomic, and loads of its 256 threads, eight at a time. Else it is reduce_parts, a launch."""
    if parts == 1:
        return []
    if last_block:
        trips = 2 + ceil(parts * min(tile, numel), 8 * 256)
        time = trips * scenario.value("load latency", gpu) / scenario.value("clock", gpu) / 1e3
        return [Part(time, {"launch, start, tail": time})]
    moved = numel * (4 * parts + 2)
    return [streaming(gpu, scenario, moved, fits_l2(gpu, moved))]


# ---------------------------------------------------------------- ours


def dequantize(gpu, scenario, N, K, to_l2=False):
    name, rows = kernel_of(gpu, "dequantize_4bit", 256)
    tile = library(gpu.binary)[name].tile
    read, written = N * K * PACKED, N * K * 2
    launch = Launch(
        name,
        rows,
        ceil(N * K, tile.rows),
        1,
        read + (0 if to_l2 else written),
        read + written,
        short=True,
    )
    return [launch_time(gpu, scenario, launch)]


def quantize(gpu, scenario, N, K):
    name, rows = kernel_of(gpu, "quantize_4bit", 256)
    tile = library(gpu.binary)[name].tile
    moved = N * K * (2 + 0.5 + 4 / 64)
    launch = Launch(name, rows, ceil(N * K, tile.rows), 1, moved, moved, short=True)
    return [launch_time(gpu, scenario, launch)]


def fused(gpu, scenario, op, M, N, K):
    """gemm_4bit or gemm_4bit_backward in one kernel that decodes W itself."""
    lines, depth = (N, K) if op == "gemm_4bit" else (K, N)
    parts, _, last_block = plan(gpu, op, N, K, M)
    name, rows = kernel_of(gpu, op, M)
    tile = library(gpu.binary)[name].tile
    row_tiles, line_tiles = ceil(M, tile.rows), ceil(lines, tile.columns)
    steps = ceil(ceil(depth, tile.step), parts)
    weight, dense = N * K * PACKED, 2 * M * (N + K)
    launch = Launch(
        name,
        rows,
        row_tiles * line_tiles * parts,
        steps / tile.steps,
        weight + dense,
        weight * row_tiles + 2 * M * depth * line_tiles + 2 * M * lines,
    )
    elements = min(M, tile.rows) * tile.columns
    adding = reduction(gpu, scenario, parts, M * lines, last_block, elements)
    return [launch_time(gpu, scenario, launch), *adding]


@functools.cache
def row_tiles(tokens, rows):
    """Tiles of this many rows that the experts of a mixture have together, on average over tokens
    that choose any TOP of EXPERTS. With `rows` = tokens: experts that have rows."""
    share, found = TOP / EXPERTS, 0.0
    for n in range(1, tokens + 1):
        ways = math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        chance = math.exp(ways + n * math.log(share) + (tokens - n) * math.log(1 - share))
        found += chance * ceil(n, rows)
    return EXPERTS * found


def grouped(gpu, scenario, op, tokens, N, K):
    """grouped_gemm_4bit or its backward. Blocks without rows, which exit, cost nothing here."""
    lines, depth = (N, K) if op == "grouped_gemm_4bit" else (K, N)
    name, traced = grouped_kernel_of(gpu, op, tokens)
    tile = library(gpu.binary)[name].tile
    tiles, line_tiles = row_tiles(tokens, tile.rows), ceil(lines, tile.columns)
    rows, weight = tokens * TOP, N * K * PACKED
    launch = Launch(
        name,
        traced,
        math.ceil(tiles * line_tiles),
        ceil(depth, tile.step) / tile.steps,
        weight * row_tiles(tokens, tokens) + 2 * rows * (N + K),
        weight * tiles + 2 * rows * depth * line_tiles + 2 * rows * lines,
    )
    return [launch_time(gpu, scenario, launch)]


def chunked(gpu, scenario, op, M, N, K, lora):
    """W decoded in chunks that cuBLAS multiplies; a second product adds the bypass to each."""
    lines, depth = (N, K) if op == "gemm_4bit" else (K, N)
    _, chunk, _ = plan(gpu, op, N, K, M)
    parts = []
    for begin in range(0, lines, chunk):
        count = min(chunk, lines - begin)
        in_l2 = fits_l2(gpu, 2 * count * depth)
        parts += dequantize(gpu, scenario, count, depth, in_l2)
        parts.append(cublas(gpu, scenario, M, count, depth, in_l2))
        if lora:
            result = 2 * M * count
            parts.append(streaming(gpu, scenario, 2 * result, fits_l2(gpu, 2 * result)))
    return parts


def product(gpu, scenario, op, M, N, K, lora=False):
    _, chunk, _ = plan(gpu, op, N, K, M)
    if chunk:
        return chunked(gpu, scenario, op, M, N, K, lora)
    return fused(gpu, scenario, op, M, N, K)


def lora_product(gpu, scenario, over_rows, M, columns):
    """A long operand [M, columns] by a small one: over its columns (S, dS) or its rows (dA, dB)."""
    if over_rows:
        (_, traced), op = kernel_of(gpu, "lora_expand_backward", 256), "lora_shrink_backward"
        names = shared.record()["kernels"][str(gpu.arch)]["lora_expand_backward"]["256"]
        name = next(n for n in names if n.startswith("lora_columns"))
        length, depth = columns, M
    else:
        (name, traced), op = kernel_of(gpu, "lora_shrink", 256), "lora_shrink"
        length, depth = M, columns
    parts, _, last_block = plan(gpu, op, columns, columns, M)
    tile = library(gpu.binary)[name].tile
    tiles = ceil(length, tile.rows) * ceil(RANK, tile.columns)
    big, small = 2 * M * columns, 4 * depth * RANK
    launch = Launch(
        name,
        traced,
        tiles * parts,
        ceil(ceil(depth, tile.step), parts),
        big + small,
        big + small * ceil(length, tile.rows),
    )
    elements = min(length, tile.rows) * min(RANK, tile.columns)
    adding = reduction(gpu, scenario, parts, length * RANK, last_block, elements)
    return [launch_time(gpu, scenario, launch), *adding]


def lora_shrink(gpu, scenario, M, K):
    return lora_product(gpu, scenario, False, M, K)


def lora_shrink_backward(gpu, scenario, M, K):
    """dA."""
    return lora_product(gpu, scenario, True, M, K)


def lora_expand_backward(gpu, scenario, M, N):
    """dS and dB."""
    return [
        *lora_product(gpu, scenario, False, M, N),
        *lora_product(gpu, scenario, True, M, N),
    ]


def lora_forward(gpu, scenario, M, N, K):
    return [
        *lora_shrink(gpu, scenario, M, K),
        *product(gpu, scenario, "gemm_4bit", M, N, K, lora=True),
    ]


def lora_backward(gpu, scenario, M, N, K):
    """dX, dA and dB."""
    return [
        *lora_expand_backward(gpu, scenario, M, N),
        *lora_shrink_backward(gpu, scenario, M, K),
        *product(gpu, scenario, "gemm_4bit_backward", M, N, K, lora=True),
    ]


# ---------------------------------------------------------------- the others


def grouped_mm(gpu, scenario, tokens, N, K):
    """torch._grouped_mm on bf16 experts, in tiles of 128 or 64 rows."""
    small = scenario.value("cublas small tiles", gpu)
    sizes = ((128, 1), (64, small))
    work = min(row_tiles(tokens, rows) * rows * 2 * N * K / share for rows, share in sizes)
    compute = work / scenario.value("grouped mm", gpu) / 1e6
    moved = 2 * N * K * row_tiles(tokens, tokens) + 2 * tokens * TOP * (N + K)
    memory = moved / scenario.value("memory", gpu) / 1e6
    fixed = scenario.value("launch", gpu) + scenario.value("cublas start", gpu)
    return [Part(fixed + max(compute, memory), {"cuBLAS": compute, "memory": memory})]


def two_passes(gpu, scenario, M, N, K):
    """All of W decoded to memory at once by our kernel, then cuBLAS."""
    in_l2 = fits_l2(gpu, 2 * N * K)
    return [
        *dequantize(gpu, scenario, N, K, in_l2),
        cublas(gpu, scenario, M, N, K, in_l2),
    ]


def peft_backward(gpu, scenario, M, N, K):
    """bitsandbytes + PEFT: W decoded at the speed of a copy, dY W, and the adapters' chain in bf16:
    dY scaled, dB, dS, dA, dS A, and the sum of the two gradients of x."""
    dy, x = 2 * M * N, 2 * M * K
    chain = 2 * dy + dy + dy + x + x + 3 * x
    return [
        streaming(gpu, scenario, N * K * (PACKED + 2)),
        cublas(gpu, scenario, M, K, N, fits_l2(gpu, 2 * N * K)),
        streaming(gpu, scenario, chain, fits_l2(gpu, chain / 4), launches=6),
    ]
