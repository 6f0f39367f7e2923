"""The emulated machine's own tests: for each class of error a planted bug that it must find, and a
clean twin that it must pass (planted.cu)."""

import os
import re
import subprocess

import pytest

from simt import build

# Two patterns in shared memory and outputs; the second run also takes lanes and blocks in reverse.
PATTERNS = ({"SIMT_POISON": "255"}, {"SIMT_POISON": "17", "SIMT_REVERSE": "1"})

# planted bug -> (tool, what it must say). "initcheck" compares the bytes of the two patterns;
# "sentence" is the error that the launch itself returns, in every build; "late" is that under the
# second pattern, where asynchronous work runs as late as its wait allows; "result": the bytes are
# others than the clean twin's.
PLANTED = {
    "second_barrier": ("thread", r"data race"),
    "shuffle_is_no_fence": ("thread", r"data race"),
    "ldmatrix_is_no_fence": ("thread", r"data race"),
    "copied_by_another": ("thread", r"data race"),
    "last_block": ("thread", r"data race"),
    "blocks_overlap": ("thread", r"data race"),
    "mbarrier_refill": (
        "sentence",
        r"mbarrier: byte 0 of shared memory was written while an async",
    ),
    "misaligned_load": ("address", r"misaligned address"),
    "beyond_shared": ("address", r"use-after-poison"),
    "beyond_shared_member": ("address", r"index 256 out of bounds"),
    "beyond_global": ("address", r"heap-buffer-overflow"),
    "copy_beyond_global": ("address", r"heap-buffer-overflow"),
    "copy_beyond_shared": (
        "sentence",
        r"thread \(1,0,0\): cp_async_16: 16 bytes at byte 2064 are outside shared memory of 2064",
    ),
    "ldmatrix_misaligned": ("sentence", r"ldmatrix: byte 8 of shared memory is misaligned"),
    "uninitialized_shared": ("initcheck", ""),
    "uninitialized_local": ("initcheck", ""),
    "output_not_written": ("initcheck", ""),
    "copy_not_waited": ("initcheck", ""),
    "bulk_copy_not_waited": ("initcheck", ""),
    "reused_under_copy": ("sentence", r"byte 0 of shared memory was written while an asynchronous"),
    "barrier_in_branch": (
        "sentence",
        r"block \(0,0,0\): deadlock: threads \(0,0,0\)..\(15,0,0\) wait in __syncthreads",
    ),
    "barrier_in_both_branches": (
        "sentence",
        r"block \(0,0,0\), thread \(16,0,0\): divergent barrier",
    ),
    "returned_before_barrier": ("sentence", r"thread \(7,0,0\) returned"),
    "lanes_missing_from_shuffle": (
        "sentence",
        r"deadlock: threads \(0,0,0\)..\(15,0,0\) wait in __shfl_xor_sync",
    ),
    "shuffle_from_outside": ("sentence", r"reads lane 20, which is not in mask 0000ffff"),
    "named_barriers_cross": ("sentence", r"deadlock: .* wait in barrier_sync"),
    "too_few_bytes": ("sentence", r"deadlock: .* wait in mbarrier_wait"),
    "launched_with_too_little": ("sentence", r"launched with 2064 bytes, its struct has 4096"),
    "wgmma_mbarrier_init_not_fenced": ("sentence", r"made no fence_mbarrier_init since"),
    "wgmma_too_many_bytes_expected": (
        "sentence",
        r"deadlock: .*; phase 0 of the mbarrier at byte \d+ misses 0 arrivals and 8192 bytes",
    ),
    "wgmma_too_few_bytes_expected": ("sentence", r"4096 bytes more landed than this phase"),
    "wgmma_stage_reused": ("late", r"written while wgmma at planted_hopper.cuh:\d+ was reading it"),
    "wgmma_wrong_swizzle": ("result", ""),
    "wgmma_wrong_stride": ("result", ""),
    "wgmma_no_first_fence": ("sentence", r"no wgmma_fence since the kernel began"),
    "wgmma_no_fence": ("sentence", r"no wgmma_fence since the last wgmma_commit"),
    "wgmma_a_written_after_fence": (
        "sentence",
        r"register 2 of A was written after the last wgmma",
    ),
    "wgmma_a_written_in_flight": ("sentence", r"register 0 of A .* was written while wgmma at"),
    "wgmma_accumulator_written_in_flight": (
        "sentence",
        r"accumulator 3 .* was written while wgmma",
    ),
    "wgmma_accumulator_read_in_flight": ("initcheck", ""),
    "wgmma_not_waited": ("sentence", r"returned while wgmma was under way"),
    "wgmma_warp_missing": ("sentence", r"deadlock: threads .*..\(63,0,0\) wait in wgmma at"),
    "wgmma_one_thread_waits": ("thread", r"data race"),
    "wgmma_staging_not_fenced": (
        "sentence",
        r"tensor_store reads byte \d+ of shared memory, which thread \(4,0,0\) wrote, and",
    ),
    "wgmma_staging_reused": ("sentence", r"was written while a bulk store was reading it"),
    "wgmma_store_not_read": (
        "sentence",
        r"returned before a bulk store had read its shared memory",
    ),
    "wgmma_registers": ("sentence", r"deadlock: threads .* wait in setmaxnreg_increase"),
    "wgmma_registers_of_three_warps": ("sentence", r"deadlock: .* wait in setmaxnreg_decrease"),
    "wgmma_arrived_twice": (
        "sentence",
        r"this thread has arrived at barrier 2, which still misses",
    ),
    "wgmma_b_not_fenced": (
        "sentence",
        r"wgmma reads byte 0 of shared memory, which thread \(0,0,0\)",
    ),
    "wgmma_copy_not_waited": ("initcheck", ""),
}


def run(*planted, sanitize=None, pattern=PATTERNS[0], ptx=False):
    """`ptx`: the kernels as nvcc compiled them for 9.0a."""
    if ptx:
        build.require_nvcc()
        pattern = {**pattern, "SIMT_PTX": "1", "SIMT_ARCH": "90"}
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    if sanitize:
        build.require(sanitize)
    fixed = build.fixed_addresses() if sanitize == "thread" else []
    command = [*fixed, str(build.harness("planted", sanitize, ptx=("90a",) * ptx)), *planted]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **options, **pattern},
    )


def test_a_missing_sanitizer_skips_but_fails_where_it_is_required(monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda sanitize: f"no {sanitize} here")
    monkeypatch.delenv("SIMT_REQUIRE_SANITIZERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no thread here"):
        build.require("thread")
    monkeypatch.setenv("SIMT_REQUIRE_SANITIZERS", "1")
    with pytest.raises(pytest.fail.Exception, match="no thread here"):
        build.require("thread")


def test_every_planted_bug_has_a_verdict():
    assert sorted(run("list").stdout.split()) == sorted(PLANTED)


@pytest.mark.parametrize(
    "sanitize", [None, "address", "thread"], ids=["plain", "address", "thread"]
)
def test_clean_twins_pass(sanitize):
    outputs = []
    for pattern in PATTERNS:
        result = run("clean", sanitize=sanitize, pattern=pattern)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count(" ok ") == len(PLANTED)
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]  # no bytes that nothing wrote


def test_clean_twins_pass_as_nvcc_compiled_them():
    """Barriers, mbarriers, bulk and asynchronous copies of csrc/cuda/ptx.cuh itself."""
    for pattern in PATTERNS:
        result = run("clean", pattern=pattern, ptx=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout == run("clean", pattern=pattern).stdout


# PTX does not say how large a kernel's struct is. And a register of A that is written again has
# another name there: ptxas keeps the two apart.
NOT_IN_PTX = ("launched_with_too_little", "wgmma_a_written_in_flight")
IN_PTX = [p for p, (t, _) in PLANTED.items() if t in ("sentence", "late") and p not in NOT_IN_PTX]


@pytest.mark.parametrize("planted", IN_PTX)
def test_planted_bug_is_found_as_nvcc_compiled_it(planted):
    result = run(planted, pattern=PATTERNS[PLANTED[planted][0] == "late"], ptx=True)
    assert result.returncode == 3 and ">: run failed: block" in result.stdout, result
    assert planted.startswith("wgmma") or result.stdout.startswith(f"{planted}<true>:"), result


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_bug_is_found(planted):
    tool, says = PLANTED[planted]
    if tool == "initcheck":
        outputs = [run(planted, pattern=pattern) for pattern in PATTERNS]
        assert all(o.returncode == 0 for o in outputs), outputs
        assert outputs[0].stdout != outputs[1].stdout
    elif tool == "result":
        result, clean = run(planted), run("clean", planted)
        assert result.returncode == clean.returncode == 0
        assert result.stdout.split()[-1] != clean.stdout.split()[-1]
    else:
        in_launch = tool in ("sentence", "late")
        pattern = PATTERNS[tool == "late"]
        result = run(planted, sanitize=None if in_launch else tool, pattern=pattern)
        assert result.returncode not in (0, 2), f"not found:\n{result.stdout}"
        assert re.search(says, result.stdout if in_launch else result.stderr), (
            result.stdout + result.stderr
        )


def test_second_barrier_shows_without_a_sanitizer_too():
    # Lanes in ascending and in descending order disagree about an unordered read.
    outputs = [run("second_barrier", pattern=pattern).stdout for pattern in PATTERNS]
    assert outputs[0] != outputs[1]
