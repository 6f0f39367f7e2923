"""The performance model: its parts by cases whose answer is known, and the page that it wrote."""

import sys

import pytest

from paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))

import kernel_model
import kernel_report
from predict import cases, goals, issue, ops, peers, shared
from predict.assumptions import ALL, ASSUMPTIONS, FAST, GROUPS, SLOW, Scenario
from predict.kernels import Part, library
from predict.sass import Instruction, basic_blocks

A100, H100, H200, RTX4090 = cases.GPUS


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def rows():
    if sentence := kernel_report.missing_tools():
        pytest.skip(sentence)
    return kernel_model.all_rows()


def test_no_row_is_slower_than_the_page_says_and_the_page_is_current(rows, capsys):
    """`python bench/kernel_model.py --write` renews it."""
    with capsys.disabled():  # `make cuda` shows it
        print(f"\n{kernel_model.goal_table(rows)}")
    assert kernel_model.slower(rows) == []
    assert kernel_model.PAGE.read_text(encoding="utf-8") == kernel_model.markdown(rows)


def test_every_row_is_there_once(rows):
    keys = [(r.gpu, r.op, r.shape, r.M) for r in rows]
    assert len(set(keys)) == len(keys)
    per_gpu = 2 * 5 + 4 * 5 * 8 + (3 + 3 + 4) * 8 + 2 * 2 * 5
    assert len(keys) == 4 * per_gpu
    assert all(0 < r.low <= r.high and 0 < r.share < 1 for r in rows)


def test_no_prediction_beats_its_floor(rows):
    """The fast end still moves the bytes at the bandwidth of the data sheet, and does the flops at
    the data sheet's rate."""
    for r in rows:
        gpu = next(g for g in cases.GPUS if g.name == r.gpu)
        if r.op not in ("gemm_4bit", "gemm_4bit_backward", "dequantize_4bit"):
            continue
        N, K = map(int, r.shape.split("x"))
        moved = N * K * (0.5 if r.M else 2.5)
        flops = 2 * (r.M or 0) * N * K
        assert r.low > moved / gpu.memory / 1e6, r
        assert r.low > flops / gpu.tensor / 1e6, r


def test_main_loops_have_no_bank_conflicts(rows):
    """The kernels' heads say so. In lora_columns_mma the small operand's 2-byte stores have two."""
    ideal = {2: 1, 4: 1, 8: 2, 16: 4}
    worst = {}
    for binary, kernels in shared.record()["shared"].items():
        for name, runs in kernels.items():
            for traced in runs:
                loop, waves = library(binary)[name].code(int(traced))
                over = [
                    most / ideal[i.bytes] for i, (_, most) in zip(loop, waves) if i.touches_shared
                ]
                base = name.split("<")[0]
                worst[base] = max([worst.get(base, 0), *over])
    assert worst.pop("lora_columns_mma") == 2
    assert worst.pop("dequantize_4bit_vector") <= 2  # the map of 8-bit scales, by what they are
    assert worst.pop("gemm_4bit_backward_fused") <= 1 and worst.pop("gemm_4bit_fused") <= 1
    assert max(worst.values()) <= 1


def test_a_row_that_got_slower_is_named(monkeypatch):
    monkeypatch.setattr(
        kernel_model.page, "committed", lambda: {("A100", "gemm_4bit", "8x8", "1"): (10.0, 20.0)}
    )

    def row(low, high, M=1):
        return kernel_model.Row("A100", "gemm_4bit", "8x8", M, low, high, "memory", 0.5)

    assert kernel_model.slower([row(10.5, 21.0), row(99, 99, M=2)]) == []
    (sentence,) = kernel_model.slower([row(10.0, 21.2)])
    assert sentence == "A100 gemm_4bit 8x8 1: high end 20.0 -> 21.2 us"


# ---------------------------------------------------------------- goals


@pytest.mark.parametrize(
    "values, verdict", [((0.8, 0.9), "met"), ((0.9, 1.1), "undecided"), ((1.1, 1.2), "missed")]
)
def test_a_goal_is_met_only_if_the_worst_case_meets_it(values, verdict):
    low, high = values

    def metric(gpu, scenario):
        return high if scenario == SLOW else low

    assert goals.at_most("", 1.0, metric).judge(A100) == (low, high, verdict)
    inverse = goals.at_least("", 1.0, lambda g, s: 1 / metric(g, s))
    assert inverse.judge(A100)[2] == verdict
    assert goals.at_most("", 1.0, lambda g, s: 1.004).judge(A100)[2] == "met"


def test_both_sides_of_a_comparison_have_the_same_gpu():
    """All combinations of the groups, each group the same on both sides."""
    assert len(set(ALL)) == 2 ** len(GROUPS) and FAST in ALL and SLOW in ALL
    moved = goals.over(
        lambda g, s: [ops.streaming(g, s, 1e9)], lambda g, s: [ops.streaming(g, s, 1e9)]
    )
    assert goals.at_most("", 1.0, moved).judge(H200) == (1.0, 1.0, "met")


def test_rows_of_experts_on_average():
    """Of 128 experts a token takes 8. For few tokens a tile of 8 rows holds all of an expert's."""
    assert ops.row_tiles(1, 8) == pytest.approx(8)
    active = 128 * (1 - (15 / 16) ** 16)
    assert ops.row_tiles(16, 16) == pytest.approx(active)
    assert active < ops.row_tiles(16, 8) < 1.01 * active
    assert ops.row_tiles(4096, 1) == pytest.approx(8 * 4096)


# ---------------------------------------------------------------- assumptions


def test_every_assumption_has_a_source_and_one_value_for_each_gpu():
    for a in ASSUMPTIONS:
        assert a.source and a.unit and a.group in GROUPS, a
    for name in {a.name for a in ASSUMPTIONS}:
        # torch._grouped_mm is known on Hopper alone.
        known = (H100, H200) if name == "grouped mm" else (*cases.GPUS, cases.A10)
        for gpu in known:
            FAST.value(name, gpu)
            SLOW.value(name, gpu)
    with pytest.raises(LookupError, match="0 named 'colour' for A100, want 1"):
        FAST.value("colour", A100)


def test_tensor_rates_are_those_of_the_data_sheets():
    """A quarter of an SM needs 8 cycles for an m16n8k16 on A100 and 32 on a 4090 (half rate with
    fp32 sums); wgmma would need 4 on H100."""
    cycles = [4 * 4096 / gpu.flops_per_cycle for gpu in cases.GPUS]
    assert cycles == pytest.approx([8, 4, 4, 32], rel=0.03)


# ---------------------------------------------------------------- wavefronts


def lanes(function, active=32):
    return {lane: function(lane) for lane in range(active)}


@pytest.mark.parametrize(
    "addresses, size, want",
    [
        (lanes(lambda lane: 4 * lane), 4, (1, 1)),
        (lanes(lambda lane: 0), 4, (1, 1)),  # all lanes the same word
        (lanes(lambda lane: 8 * lane), 4, (2, 2)),
        (lanes(lambda lane: 128 * lane), 4, (32, 32)),
        (lanes(lambda lane: 132 * lane), 4, (1, 1)),  # rows padded by a word
        (lanes(lambda lane: 8 * lane), 8, (2, 2)),
        (lanes(lambda lane: 16 * lane), 16, (4, 4)),
        # Two lanes of a half warp share each bank, but the other half leaves those banks free.
        (lanes(lambda lane: lane // 16 * 64 + lane % 16 // 2 * 8 + lane % 2 * 256), 8, (2, 4)),
        (lanes(lambda lane: 16 * lane, active=8), 16, (1, 1)),
        (lanes(lambda lane: lane // 2 * 4 + lane % 2 * 2), 2, (1, 1)),
    ],
)
def test_wavefronts(addresses, size, want):
    assert shared.wavefronts(addresses, size) == want


# ---------------------------------------------------------------- the simulator


def control(stall=1, written=7, read=7, waits=0):
    return stall | written << 5 | read << 8 | waits << 11


def code(*instructions):
    return [Instruction(16 * i, text, c) for i, (text, c) in enumerate(instructions)]


def cycles(program, waves=None, warps=1, gpu=A100, **options):
    waves = waves or [(0, 0)] * len(program)
    return issue.simulate(program, waves, gpu, FAST, warps, **options).cycles


def test_stall_counts_are_obeyed():
    assert cycles(code(("NOP", control(stall=5)), ("NOP", control(stall=2)))) == 7


def test_a_quarter_issues_one_instruction_a_cycle():
    assert cycles(code(*[("NOP", control())] * 8), warps=4) == 32


def test_a_pipe_takes_its_cycles():
    """16 integer lanes: two cycles a warp. HMMA.16816 on A100: eight."""
    assert cycles(code(*[("LOP3.LUT R0, R1, R2", control())] * 4), warps=2) == 16
    mma = code(("HMMA.16816.F32 R0, R4, R8, R0", control()))
    assert cycles(mma, warps=2) == pytest.approx(16, rel=1e-3)


def test_a_warp_waits_for_the_barrier_that_its_load_set():
    """Of a load from shared memory: 1 wavefront, 4 cycles of a quarter's share, 27 of latency."""
    program = code(("LDS R0, [R1]", control(written=0)), ("FADD R2, R0, R3", control(waits=1)))
    assert cycles(program, [(1, 1), (0, 0)]) == 4 + 27 + 1


def test_wavefronts_bind_when_there_are_many():
    program = code(*[("LDS.128 R0, [R1]", control())] * 8)
    result = issue.simulate(program, [(4, 4)] * 8, A100, FAST, 4)
    assert result.binds == ("shared memory", 1.0)
    assert result.cycles == 8 * 4 * 4 * 4


def test_shuffles_go_through_the_crossbar():
    assert cycles(code(*[("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", control())] * 8), warps=4) == 128


def test_copies_are_waited_for_by_groups():
    """With two groups in flight, a turn takes half of the load's latency."""

    def program(pending):
        return code(
            ("LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]", control()),
            ("LDGDEPBAR", control()),
            (f"DEPBAR.LE SB0, {pending}", control()),
        )

    latency = FAST.value("load latency", A100)
    assert cycles(program("0x0"), turns=16) == pytest.approx(latency, rel=0.02)
    assert cycles(program("0x1"), turns=16) == pytest.approx(latency / 2, rel=0.2)


def test_a_barrier_waits_for_the_warps_of_its_block_only():
    slow = code(("NOP", control(stall=9)), ("BAR.SYNC.DEFER_BLOCKING 0x0", control()))
    assert cycles(slow, warps=2, blocks=2) == cycles(slow, warps=1)


def test_basic_blocks_end_at_branches_and_start_at_targets():
    program = code(
        ("MOV R0, R1", 0), ("@P0 BRA 0x30", 0), ("MOV R2, R3", 0), ("MOV R4, R5", 0), ("EXIT", 0)
    )
    assert [len(block) for block in basic_blocks(program)] == [2, 1, 2]


# ---------------------------------------------------------------- the ops' arithmetic


def test_cublas_reaches_its_rate_on_whole_waves_and_its_bandwidth_on_few_rows():
    whole = ops.cublas(H100, FAST, 128 * 12, 256 * 11 * 8, 8192)
    flops = 2 * 128 * 12 * 256 * 11 * 8 * 8192
    assert whole.limits["cuBLAS"] == pytest.approx(flops / FAST.value("cublas", H100) / 1e6)
    one = ops.cublas(H100, FAST, 1, 8192, 8192)
    assert one.limits["memory"] > one.limits["cuBLAS"]
    assert one.time == pytest.approx(2 * 8192**2 / 3.05e6, rel=0.1)


def test_limits_add_up_over_parts():
    parts = [Part(3.0, {"memory": 2.0}), Part(4.0, {"memory": 1.0, "L2": 3.0})]
    assert ops.total(parts) == 7.0
    assert ops.limits(parts) == {"L2": 3.0, "memory": 3.0}


def test_slow_assumptions_never_make_it_faster():
    for gpu in cases.GPUS:
        for name, _ in ((a.name, a) for a in ASSUMPTIONS if a.group == "machine"):
            fast, slow = (s.value(name, gpu) for s in (Scenario(), Scenario(machine=True)))
            better = fast >= slow if name in ("clock", "memory", "l2") else fast <= slow
            assert better, (gpu.name, name)


# ---------------------------------------------------------------- others' kernels


def test_their_crossover_is_read_from_their_function(tmp_path):
    """With the GPU in question instead of the one that is here."""
    module = tmp_path / "bitsandbytes" / "backends" / "cuda" / "ops.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import nothing_that_is_here\n"
        "_GEMM_4BIT_CUSTOM_FLOOR_M = 4\n"
        "@functools.cache\n"
        "def _gemm_4bit_use_custom_cuda(device_index, dtype, M, N, K):\n"
        "    if M <= _GEMM_4BIT_CUSTOM_FLOOR_M or dtype == torch.float32:\n"
        "        return True\n"
        "    sms, major, minor = _gpu_dispatch_props(device_index)\n"
        "    return M <= (64 if (sms, major, minor) == (132, 9, 0) else 16)\n"
    )
    use_fused = peers.their_table(tmp_path)
    assert peers.crossover(lambda M: use_fused(H100, M, 4096, 4096)) == 64
    assert peers.crossover(lambda M: use_fused(A100, M, 4096, 4096)) == 16


def test_a_crossover_is_the_last_row_before_the_first_that_is_slower():
    assert peers.crossover(lambda M: M in (8, 16, 32)) == 16
    assert peers.crossover(lambda M: False) == 0
    assert peers.crossover(lambda M: True) == peers.ROWS[-1]


def test_their_wavefronts_are_those_of_the_widths():
    want = {
        "LDS R0, [R1]": (1, 1),
        "LDS.128 R0, [R1]": (4, 4),
        "STS [R1], R0": (1, 4),  # up to four conflicts, they say
        "STS.128 [R1], R4": (4, 4),
        "LDSM.16.M88.4 R0, [R1]": (4, 4),
        "LDSM.16.M88.2 R0, [R1]": (2, 2),
        "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]": (4, 4),
        "FADD R0, R1, R2": (0, 0),
    }
    found = {text: peers.wavefronts(Instruction(0, text), conflicts=4) for text in want}
    assert found == want


def test_a_folder_without_their_library_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no libbits\*\.so under .*--help"):
        peers.one(tmp_path, "libbits*.so")
