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
# "sentence" is the error that the launch itself returns, in every build.
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
}


def run(planted, sanitize=None, pattern=PATTERNS[0], *, ptx=False):
    """`ptx`: the kernels as nvcc compiled them for 9.0a."""
    if ptx:
        build.require_nvcc()
        pattern = {**pattern, "SIMT_PTX": "1", "SIMT_ARCH": "90"}
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    if sanitize:
        build.require(sanitize)
    fixed = build.fixed_addresses() if sanitize == "thread" else []
    command = [*fixed, str(build.harness("planted", sanitize, ptx=("90a",) * ptx)), planted]
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
        result = run("clean", sanitize, pattern)
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


# PTX does not say how large a kernel's struct is.
IN_PTX = [p for p, (t, _) in PLANTED.items() if t == "sentence" and p != "launched_with_too_little"]


@pytest.mark.parametrize("planted", IN_PTX)
def test_planted_bug_is_found_as_nvcc_compiled_it(planted):
    result = run(planted, ptx=True)
    assert result.returncode == 3 and f"{planted}<true>: run failed: block" in result.stdout, result


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_bug_is_found(planted):
    tool, says = PLANTED[planted]
    if tool == "initcheck":
        outputs = [run(planted, pattern=pattern) for pattern in PATTERNS]
        assert all(o.returncode == 0 for o in outputs), outputs
        assert outputs[0].stdout != outputs[1].stdout
    else:
        result = run(planted, None if tool == "sentence" else tool)
        assert result.returncode not in (0, 2), f"not found:\n{result.stdout}"
        assert re.search(says, result.stdout if tool == "sentence" else result.stderr), (
            result.stdout + result.stderr
        )


def test_second_barrier_shows_without_a_sanitizer_too():
    # Lanes in ascending and in descending order disagree about an unordered read.
    outputs = [run("second_barrier", pattern=pattern).stdout for pattern in PATTERNS]
    assert outputs[0] != outputs[1]
