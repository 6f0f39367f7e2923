"""The model on kernels whose speed is known: how wrong it is.

bitsandbytes has a table, calibrated on GPUs, of the number of rows up to which its fused kernel is
faster than decoding the weight and calling cuBLAS. The kernels' SASS and that table are read out of
the installed wheel. Marlin's kernel is in auto-gptq's wheel; its README says how much faster than
cuBLAS it is on an A10. Nothing of either is copied here but the facts in PUBLISHED and the tiles.

Their bank conflicts are not counted from addresses, as the emulator does not run these kernels.
Marlin states that it has none. bitsandbytes states up to four: for its 4-byte stores the fast end
takes one and the slow end four.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import kernel_report
from sass_flow import find_tool

from . import issue, ops, sass
from .assumptions import ALL, Scenario
from .cases import A10, GPUS
from .kernels import Sm, together

ROWS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
# (N, K): ours, and one that is three waves of their tiles on every GPU.
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (36864, 12288))
TILES = "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, "  # then rows, columns and depth of a block's step
BINARIES = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "4090": "sm_89", "A10": "sm_86"}
# Rows, and how many times as fast as cuBLAS with fp16 weights. Marlin's README, on an A10 with a
# large matrix that its SMs divide evenly, groups of 128, boost clock: "essentially ideal" 3.87 up
# to 16 to 32 rows. Its paper, arXiv 2408.11743: "gradually decreasing, but still significant,
# acceleration" at 64 to 128 rows.
PUBLISHED = ((1, "3.87"), (16, "3.87"), (32, "close to 3.87"), (64, "> 1"), (128, "> 1"))

# Parts of Marlin's loop that run once per column of blocks: they add the warps' and blocks' sums.
ADDING = ("FADD", "STS", "STG", "LDG", "RED", "ATOM")


# ---------------------------------------------------------------- their binaries


def extract(library, arch, folder):
    """The cubins of one architecture in a library."""
    run_in = Path(folder) / f"{library.stem}-{arch}"
    run_in.mkdir(exist_ok=True)
    command = [find_tool("cuobjdump"), "-arch", arch, "-xelf", "all", str(library.resolve())]
    subprocess.run(command, cwd=run_in, check=True, capture_output=True)
    return sorted(run_in.glob("*.cubin"))


def one(folder, pattern):
    found = sorted(
        Path(folder).rglob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)]
    )
    if not found:
        raise FileNotFoundError(f"kernel_model: no {pattern} under {folder}; --help says how to")
    return found[-1]


@dataclasses.dataclass(eq=False)
class Theirs:
    """A kernel of another library, its main loop, and what a block of it holds."""

    name: str
    loop: sass.Loop
    sm: Sm
    rows: int
    columns: int
    weights: float  # that a block multiplies in one turn
    stores_conflict: bool


def wavefronts(instruction, conflicts):
    """(least, most) without addresses: what the width needs, and `conflicts` for 4-byte stores."""
    if not instruction.touches_shared:
        return 0, 0
    matrices = [m for m in kernel_report.modifiers(instruction.text) if m in ("2", "4")]
    ideal = int(matrices[-1]) if matrices else {8: 2, 16: 4}.get(instruction.bytes, 1)
    if instruction.opcode in ("LDSM", "STSM") and not matrices:
        ideal = 1
    small = instruction.opcode == "STS" and instruction.bytes <= 4
    return ideal, ideal * (conflicts if small else 1)


def whole_loop(kernel, cubin):
    """The shortest loop that has HMMA and loads from global memory: a loop over the steps inside
    one stage has no loads."""
    best = None
    for address, text in kernel.code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)\s*$", text)
        if not target or int(target[1], 16) >= address:
            continue
        inside = [t for a, t in kernel.code if int(target[1], 16) <= a <= address]
        if not kernel_report.count(inside, "HMMA"):
            continue
        if not kernel_report.count(inside, "LDG", "LDGSTS"):
            continue
        if best is None or len(inside) < best[0]:
            best = len(inside), (int(target[1], 16), address)
    return sass.main_loop(kernel, cubin, best[1]) if best else None


def make(kernel, cubin, gpu, rows, columns, shared, conflicts):
    loop = whole_loop(kernel, cubin)
    if loop is None:
        return None
    macs = sum(i.flops for i in loop.code) / 2 * 8  # of eight warps
    sm = Sm(256, kernel.registers, shared)
    return Theirs(kernel.name, loop, sm, rows, columns, macs / rows, conflicts)


def their_time(gpu, scenario, theirs, blocks, turns, memory, l2):
    """Microseconds; as kernels.launch_time, for blocks of another library."""
    resident = theirs.sm.at_once(gpu)
    clock = scenario.value("clock", gpu) * 1e3
    waves = [wavefronts(i, 4 if theirs.stores_conflict else 1) for i in theirs.loop.code]

    def cycles(count):
        key = theirs, gpu.arch, scenario.issue, count
        if key not in _CYCLES:
            _CYCLES[key] = issue.simulate(
                theirs.loop.code, waves, gpu, Scenario(issue=scenario.issue), 2 * count, count
            ).cycles
        return _CYCLES[key]

    full, rest = divmod(blocks, gpu.sms * resident)
    outside = scenario.value("outside", gpu) * (theirs.loop.before + theirs.loop.after) * 2
    edge = scenario.value("starts", gpu) * scenario.value("load latency", gpu) + outside
    busy = full * (turns * cycles(resident) + edge)
    if rest:
        busy += turns * cycles(-(-rest // gpu.sms)) + edge
    p = scenario.value("overlap", gpu)
    moved = together(
        memory / scenario.value("memory", gpu) / 1e6, l2 / scenario.value("l2", gpu) / 1e6, p
    )
    fixed = scenario.value("launch", gpu) + scenario.value("tail", gpu)
    return fixed + together(busy / clock, moved, p)


_CYCLES = {}


# ---------------------------------------------------------------- bitsandbytes


def bitsandbytes_kernels(folder, gpu, scratch):
    """Theirs for each tile that the binary of this GPU has."""
    library = one(folder, "libbitsandbytes_cuda*.so")
    found = []
    for cubin in extract(library, BINARIES[gpu.name], scratch):
        for kernel in kernel_report.disassemble(cubin, "9.0a"):
            if not kernel.name.startswith(TILES) or kernel.is_empty or kernel.registers < 16:
                continue
            rows, columns, depth = (int(a) for a in kernel.arguments[1:])
            shared = 2 * (rows + columns) * (depth + 8) * 2
            made = make(kernel, cubin, gpu, rows, columns, shared, True)
            # 32x256 on sm_90 has a loop inside its loop: how often it turns is not known here.
            if made and made.weights == columns * depth:
                found.append(made)
    return found


def bitsandbytes_time(gpu, scenario, kernels, M, N, K):
    """With the tile that is best: their dispatch was tuned to find it."""
    times = []
    for k in kernels:
        row_tiles, column_tiles = ops.ceil(M, k.rows), ops.ceil(N, k.columns)
        turns = k.columns * K / k.weights
        weight = N * K * 0.516
        l2 = weight * row_tiles + 2 * M * K * column_tiles
        memory = weight + 2 * M * (N + K)
        times.append(their_time(gpu, scenario, k, row_tiles * column_tiles, turns, memory, l2))
    return min(times)


def two_passes(gpu, scenario, M, N, K):
    """Decoded at the speed of a copy, or of L2 if the result stays there, then cuBLAS."""
    in_l2 = ops.fits_l2(gpu, 2 * N * K)
    decode = ops.streaming(gpu, scenario, N * K * (2 if in_l2 else 2.516), in_l2)
    return ops.total([decode, ops.cublas(gpu, scenario, M, N, K, in_l2)])


def their_table(folder):
    """use_fused(gpu, M, N, K), of the function in their wheel, with this GPU for the device's."""
    source = one(folder, "bitsandbytes/backends/cuda/ops.py").read_text()
    tree = ast.parse(source)
    wanted = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name == "_gemm_4bit_use_custom_cuda")
        or (isinstance(node, ast.Assign) and "_GEMM_4BIT_CUSTOM_FLOOR_M" in ast.unparse(node))
    ]
    for node in wanted:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    bf16 = object()
    names = {"torch": SimpleNamespace(float32=object(), float16=object(), bfloat16=bf16)}
    exec(compile(ast.Module(wanted, []), "bitsandbytes", "exec"), names)

    def use_fused(gpu, M, N, K):
        names["_gpu_dispatch_props"] = lambda device: (gpu.sms, gpu.arch // 10, gpu.arch % 10)
        return names["_gemm_4bit_use_custom_cuda"](0, bf16, M, N, K)

    return use_fused


def crossover(faster):
    """The last of ROWS up to which the fused kernel is faster, without a gap; 0 if never."""
    last = 0
    for M in ROWS:
        if not faster(M):
            return last
        last = M
    return last


def bitsandbytes_rows(folder, scratch):
    use_fused = their_table(folder)
    for gpu in (g for g in GPUS if g.name != "H200"):
        kernels = bitsandbytes_kernels(folder, gpu, scratch)
        for N, K in LAYERS:

            def ratio(scenario, M, gpu=gpu, kernels=kernels, N=N, K=K):
                fused = bitsandbytes_time(gpu, scenario, kernels, M, N, K)
                return fused / two_passes(gpu, scenario, M, N, K)

            found = [crossover(lambda M, s=s: ratio(s, M) < 1) for s in ALL]
            theirs = crossover(lambda M, gpu=gpu, N=N, K=K: use_fused(gpu, M, N, K))
            there = [ratio(s, max(theirs, ROWS[0])) for s in ALL]
            yield gpu.name, f"{N}x{K}", theirs, min(found), max(found), min(there), max(there)


# ---------------------------------------------------------------- Marlin


def marlin_kernels(folder, scratch):
    """{rows of a block: Theirs}. Marlin<256, rows / 16, columns / 16, depth / 16, stages, group>:
    blocks are 64 deep and 256 columns wide, those with 16 rows 128 and 128."""
    found = {}
    for cubin in extract(one(folder, "autogptq_marlin_cuda*.so"), "sm_86", scratch):
        for kernel in kernel_report.disassemble(cubin, "8.0"):
            if kernel.base != "Marlin" or kernel.arguments[5] != "8":
                continue
            rows, columns, depth = (int(a) for a in kernel.arguments[1:4])
            if (columns, depth) != ((8, 8) if rows == 1 else (16, 4)):
                continue
            made = make(kernel, cubin, A10, 16 * rows, 16 * columns, 96 * 1024, False)
            if made:
                made.loop = made.loop.without(lambda i: i.opcode in ADDING)
                found[16 * rows] = made
    return found


def marlin_time(scenario, kernels, M, N, K):
    """Its blocks are one to an SM and divide the weight evenly."""
    rows = next(r for r in (16, 32, 48, 64, 10**9) if min(M, 64) <= r)
    kernel, passes = kernels[rows], ops.ceil(M, 64)
    turns = passes * N * K / kernel.weights / A10.sms
    weight = N * K * (0.5 + 2 / 128)
    memory = weight * passes + 2 * M * (N + K)
    l2 = weight * passes + 2 * M * K * ops.ceil(N, kernel.columns)
    return their_time(A10, scenario, kernel, A10.sms, turns, memory, l2)


def marlin_rows(folder, scratch):
    kernels = marlin_kernels(folder, scratch)
    N, K = 256 * A10.sms, 4 * 256 * A10.sms
    for M, published in PUBLISHED:
        speedups = [
            ops.cublas(A10, s, M, N, K).time / marlin_time(s, kernels, M, N, K) for s in ALL
        ]
        yield M, published, min(speedups), max(speedups)


# ---------------------------------------------------------------- the report

TITLE = """\
# How wrong the model is

Made by `python bench/kernel_model.py --peers FOLDER --write`: the model of
[kernel_model.md](kernel_model.md) on kernels of known speed, from the SASS in their wheels.
[kernels.md](../kernels.md), "Predicted", says what follows from it.

"""


def report(folder):
    with tempfile.TemporaryDirectory() as scratch:
        crossings = list(bitsandbytes_rows(folder, scratch))
        marlin = list(marlin_rows(folder, scratch))
    text = TITLE + "## Up to how many rows bitsandbytes' kernel beats dequantize + cuBLAS\n\n"
    text += "Row counts tried: " + ", ".join(map(str, ROWS)) + ". Their table was calibrated on "
    text += "GPUs. The ratio, by the model, is (their kernel's time) / (dequantize + cuBLAS) at\n"
    text += "their table's row count, or at 8 if that is 0.\n\n"
    text += kernel_report.table(
        ["GPU", "N x K", "their table", "model, low", "high", "in the range", "time ratio there"],
        [
            [
                *row[:5],
                "yes" if row[3] <= row[2] <= row[4] else "no",
                f"{row[5]:.2f} to {row[6]:.2f}",
            ]
            for row in crossings
        ],
    )
    text += "\n\n## Marlin's speed over cuBLAS with fp16 weights, A10\n\n"
    text += kernel_report.table(
        ["M", "published", "model, low", "high"],
        [[M, published, f"{least:.2f}", f"{most:.2f}"] for M, published, least, most in marlin],
    )
    return text + "\n"
