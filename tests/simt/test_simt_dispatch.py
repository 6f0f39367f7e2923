"""How dispatch cuts products into blocks and chunks, over the shapes of real layers on GPUs of 108,
132 and 142 SMs. The cost of a choice is counted here once more, by arithmetic that shares nothing
with heuristics.cuh, and compared with that of every other choice."""

import itertools

import pytest
import torch

import qlora_ext  # noqa: F401  (the CPU backend's ops)
from simt import build
from simt.sweep import _randn, _seeded, _weight

# (N, K), from Llama-3 8B and 70B and Qwen2.5-7B.
LAYERS = [
    (4096, 4096),
    (4096, 14336),
    (14336, 4096),
    (8192, 8192),
    (1024, 4096),
    (28672, 8192),
    (18944, 3584),
]
DEVICES = {"A100": (80, 108), "H100": (90, 132), "RTX 6000 Ada": (89, 142)}
TOKENS = (1, 8, 16, 32, 64, 128, 256)
LARGE = (129, 257, 512, 1024, 2048, 8192)


@pytest.fixture(scope="module")
def simt():
    return build.load_simt()


def ceil(a, b):
    return -(-a // b)


def tiles_of(op, M, N, K, arch):
    """(blocks without a split, steps of the contraction, blocks an SM holds, elements of the
    result) of the kernel that takes this shape; the tiles are those that its file's head states."""
    wide = arch in (80, 90)  # 64 rows at a time need 131 KiB of shared memory
    if op == "lora_shrink":
        return ceil(M, 128), ceil(K, 64), 2, M * 16
    if op == "lora_shrink_backward":
        return ceil(K, 128), ceil(M, 64), 2, K * 16
    if op == "gemm_4bit_backward":
        rows = 32 if M <= 32 or not wide else 64
        return ceil(K, 256) * ceil(M, rows), ceil(N, 64), 1, M * K
    rows = 8 if M <= 8 else 16 if M <= 16 else 32 if M <= 32 or not wide else 64
    lines = {8: 32, 16: 64}.get(rows, 128)
    resident = 2 if arch == 90 and rows <= 16 else 1
    return ceil(N, lines) * ceil(M, rows), ceil(K, 16384 // lines), resident, M * N


def turns(tiles, steps, parts, slots):
    """Steps that the slowest SM does one after the other, by whole waves of blocks."""
    return ceil(tiles * parts, slots) * ceil(steps, parts)


def cost_of_adding(op, M, parts, numel):
    """In us. Parts are added at 5 TB/s after a launch; or by the last block of a tile, whose 256
    threads load eight at a time."""
    if parts == 1:
        return 0
    launch = 1.8 + parts * numel * 8 / 5e6
    tile = {"lora_shrink": min(M, 128) * 16, "lora_shrink_backward": 128 * 16}.get(op)
    if op == "gemm_4bit" and M <= 16:
        return 1.2 + parts * M * (32 if M <= 8 else 64) / 2048 * 0.35
    return min(launch, 1.2 + parts * tile / 2048 * 0.35) if tile else launch


CASES = list(itertools.product(DEVICES, LAYERS, TOKENS, ("gemm_4bit", "gemm_4bit_backward")))
CASES += itertools.product(
    DEVICES, LAYERS, (*TOKENS, *LARGE), ("lora_shrink", "lora_shrink_backward")
)


def test_no_split_spills_into_a_wave_that_another_split_would_save(simt):
    """A split must not take 1.3 times the turns of the best one, unless adding that one's parts
    would cost more than it saves: a step takes 0.3 us or more, and each wave 1 us to start."""
    wrong = []
    for gpu, (N, K), M, op in CASES:
        arch, sms = DEVICES[gpu]
        with simt.device(arch, sms):
            parts, chunk, _ = simt.plan(op, M, N, K)
        if chunk:
            continue
        tiles, steps, resident, numel = tiles_of(op, M, N, K, arch)
        slots = sms * resident
        got, waves = turns(tiles, steps, parts, slots), ceil(tiles * parts, slots)
        for other in range(1, 65):
            if ceil(steps, ceil(steps, other)) != other or (other > 1 and steps // other < 2):
                continue
            adding = cost_of_adding(op, M, other, numel) - cost_of_adding(op, M, parts, numel)
            adding += ceil(tiles * other, slots) - waves
            saved = (got - turns(tiles, steps, other, slots)) * 0.3
            if got > 1.3 * turns(tiles, steps, other, slots) and saved > 2 * max(adding, 0) + 1.5:
                wrong.append((gpu, op, f"M={M} {N}x{K}", parts, got, "better", other))
                break
    assert not wrong


def test_few_rows_fill_the_device(simt):
    """Small batches: no choice leaves half of the SMs idle that a split could use."""
    for gpu, (N, K), M in itertools.product(DEVICES, LAYERS, (16, 32, 64)):
        arch, sms = DEVICES[gpu]
        with simt.device(arch, sms):
            parts, *_ = simt.plan("gemm_4bit", M, N, K)
        tiles, steps, _, _ = tiles_of("gemm_4bit", M, N, K, arch)
        least = min(sms // 2, tiles * (steps // 4))
        assert tiles * parts >= least, (gpu, M, N, K, parts)


def test_decoding_with_an_adapter_is_two_launches(simt):
    """Although both contractions are split: the last block of a tile adds the parts."""
    g = _seeded("two launches")
    x, weight = _randn(g, 1, 4096, dtype=torch.bfloat16), _weight(g, (128, 4096), nested=True)
    A, B = _randn(g, 16, 4096), _randn(g, 128, 16)
    with simt.device(90, 132):
        for op in ("lora_shrink", "gemm_4bit"):
            parts, _, last_block = simt.plan(op, 1, 128, 4096)
            assert parts > 1 and last_block, op
        simt.reset_launches()
        S = simt.lora_shrink(x, A, 0.5)
        y = simt.gemm_4bit(x, *weight, None, S, B)
    launched = {name.split("<")[0]: n for name, n in simt.kernels().items() if n}
    assert launched == {"lora_rows_mma": 1, "gemm_4bit_fused": 1}
    ops = torch.ops.qlora_ext
    want = ops.lora_shrink(x, A, 0.5)
    torch.testing.assert_close(S, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y, ops.gemm_4bit(x, *weight, None, want, B), rtol=0.02, atol=1)


@pytest.mark.parametrize(
    "arch, most",
    [(75, 64), (80, 256), (86, 256), (89, 256), (90, 128), (100, 128), (120, 256)],
)
def test_rows_from_which_cublas_multiplies(simt, arch, most):
    """mma.sync, which the fused kernels use, reaches about 60% of a Hopper's tensor cores, and all
    of an Ampere's, an Ada's and a consumer Blackwell's."""
    dtype = 1 if arch == 75 else 2  # 7.5 has no bf16
    with simt.device(arch, 132):
        for op in ("gemm_4bit", "gemm_4bit_backward"):
            assert simt.plan(op, most, 4096, 4096, dtype=dtype)[1] == 0
            assert simt.plan(op, most + 1, 4096, 4096, dtype=dtype)[1] > 0


def product_units(M, lines, sms):
    """Work of the slowest SM for one product of cuBLAS, in 128x256 tiles at the full rate."""
    tiles = [(128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.86), (64, 256, 0.8), (64, 128, 0.66)]
    return min(
        ceil(ceil(M, m) * ceil(lines, n), sms) * m * n / 32768 / share for m, n, share in tiles
    )


def test_chunks_fill_cublas_and_stay_small(simt):
    """Chunks cost at most 12% more turns of cuBLAS than all of W at once (8192x8192, M = 2048 in
    chunks of 16 MiB: 45%), and never more than 128 MiB."""
    for gpu, (N, K), M in itertools.product(DEVICES, LAYERS, LARGE):
        arch, sms = DEVICES[gpu]
        for op, lines, depth in (("gemm_4bit", N, K), ("gemm_4bit_backward", K, N)):
            with simt.device(arch, sms):
                _, chunk, _ = simt.plan(op, M, N, K)
            if chunk == 0:
                assert M <= 256
                continue
            case = (gpu, op, M, N, K, chunk)
            assert chunk == lines or chunk % 128 == 0, case
            assert chunk * depth * 2 <= 128 << 20, case
            whole, rest = divmod(lines, chunk)
            units = whole * product_units(M, chunk, sms)
            units += product_units(M, rest, sms) if rest else 0
            # As many cuts as 128 MiB ask for cannot be avoided.
            pieces = ceil(lines * depth * 2, 128 << 20)
            least = min(
                product_units(M, lines, sms),
                pieces * product_units(M, ceil(lines, pieces), sms),
            )
            # A step of cuBLAS's tile on all of `depth` against what a chunk's launches cost.
            assert units <= 1.12 * max(least, pieces), (*case, units, least)


def test_the_sweep_covers_two_chunks(simt):
    with simt.device(90, 1):
        assert simt.plan("gemm_4bit", 257, 320, 2048)[1] == 256
        assert simt.plan("gemm_4bit_backward", 257, 2048, 320)[1] == 256
