"""What a launch asks of CUDA's runtime: launch.cuh itself over a runtime that only takes notes
(launching.cu). And what ops do under a graph's capture, on the emulated machine."""

import os
import subprocess

import pytest
import torch

import qlora_ext  # noqa: F401  (the CPU backend's ops)
from simt import build
from simt.sweep import CASES, run_case

LAUNCH = "cudaLaunchKernel grid 3 block 256 shared 1000 stream 7 argument 5"
ILLEGAL_ADDRESS = 700


def run(scenario, *errors, debug=None):
    """(what each launch returned, the runtime's calls in order)."""
    environment = {k: v for k, v in os.environ.items() if k != "QLORA_EXT_DEBUG"}
    if debug is not None:
        environment["QLORA_EXT_DEBUG"] = debug
    done = subprocess.run(
        [build.program("launching"), scenario, *errors],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    returned, calls = done.stdout.split("--\n")
    return returned.splitlines(), calls.splitlines()


@pytest.mark.parametrize("debug", [None, "", "0"])
def test_a_launch_is_one_call(debug):
    """No synchronization, allocation or copy; the caller's stream."""
    assert run("launch", debug=debug) == (["null"], [LAUNCH])


def test_nothing_to_do_is_no_call():
    assert run("empty", debug="1") == (["null"], [])


def test_debug_synchronizes_and_names_the_kernel():
    calls = ["cudaStreamIsCapturing", "cudaStreamSynchronize", LAUNCH, "cudaStreamSynchronize"]
    assert run("launch", debug="1") == (["null"], calls)
    returned, _ = run("launch", f"kernel={ILLEGAL_ADDRESS}", debug="1")
    assert returned == ["product<4>: run failed: cudaErrorIllegalAddress (as the runtime words it)"]
    # What failed before is not blamed on this kernel, which is not launched.
    failing = f"cudaStreamSynchronize={ILLEGAL_ADDRESS}"
    returned, calls = run("launch", failing, debug="1")
    assert returned == [
        "before product<4>: other work failed: cudaErrorIllegalAddress (as the runtime words it)"
    ]
    assert LAUNCH not in calls
    assert run("launch", failing) == (["null"], [LAUNCH])  # the error surfaces later, elsewhere


def test_debug_does_not_synchronize_under_capture():
    assert run("capture", debug="1") == (["null"], ["cudaStreamIsCapturing", LAUNCH])
    assert run("capture") == (["null"], [LAUNCH])
    # The legacy stream while another stream is captured: CUDA refuses to say.
    returned, calls = run("launch", "cudaStreamIsCapturing=906", debug="1")
    assert (returned, calls) == (["null"], ["cudaStreamIsCapturing", "cudaGetLastError", LAUNCH])


def test_a_workspace_is_filled_for_initcheck_alone():
    """The kernels that count blocks do not care what it held."""
    assert run("workspace") == (["null"], [])
    call = "cudaMemsetAsync 0 bytes 256 stream 7"
    assert run("workspace", debug="1") == (["null"], [call])
    returned, calls = run("workspace", "cudaMemsetAsync=1", debug="1")
    assert returned == [
        "the workspace: cudaMemsetAsync failed: cudaErrorOther (as the runtime words it)"
    ]
    assert calls == [call, "cudaGetLastError"]


def test_a_refused_launch_names_the_kernel_and_leaves_no_error():
    returned, calls = run("launch", "cudaLaunchKernel=1")
    assert returned == ["product<4>: launch failed: cudaErrorOther (as the runtime words it)"]
    assert calls == [LAUNCH, "cudaGetLastError"]
    (sentence,), _ = run("launch", "cudaLaunchKernel=209")
    assert "built for other GPUs" in sentence and "TORCH_CUDA_ARCH_LIST" in sentence


def test_shared_memory_is_allowed_once_per_device():
    returned, calls = run("devices")
    assert returned == ["null"] * 4
    assert calls.count("cudaFuncSetAttribute 231424") == 2  # the device's limit, less the static
    assert len([call for call in calls if call.startswith("cudaLaunchKernel")]) == 4
    returned, _ = run("devices", "cudaFuncSetAttribute=1")
    assert returned[0].startswith("product<4>: cudaFuncSetAttribute failed: ")


def test_device_properties_are_read_once():
    returned, calls = run("properties")
    assert returned == ["90 132 232448 52428800"] * 2
    assert calls.count("cudaDeviceGetAttribute") == 5 and calls.count("cudaGetDevice") == 2
    returned, _ = run("properties", "cudaDeviceGetAttribute=1")
    assert returned == ["0 1 0 0"] * 2  # the launch that follows reports the real error


# ---------------------------------------------------------------- capture

# What the host halves ask of torch beside kernels: views, allocations, fills, copies on the device
# (another dtype, another layout), cuBLAS. Each can be captured.
CAPTURE_SAFE = {
    "aten::as_strided",
    "aten::clone",
    "aten::contiguous",
    "aten::copy_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::expand",
    "aten::fill_",
    "aten::narrow",
    "aten::reshape",
    "aten::resolve_conj",
    "aten::slice",
    "aten::to",
    "aten::_to_copy",
    "aten::transpose",
    "aten::view",
    "aten::zero_",
}


@pytest.fixture(scope="module")
def simt():
    return build.load_simt()


def calls_of_ours(profile):
    """What our ops call of torch's."""
    for event in profile.events():
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("qlora_ext_simt::"):
            parent = parent.cpu_parent
        if parent is not None:
            yield event.name


def test_every_op_but_the_quantizer_can_be_captured(simt):
    before, refused = simt.synchronizations(), set()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with simt.capture(), torch.profiler.profile(activities=activities) as profile:
        for case in CASES:
            if not case.large:
                try:
                    run_case(simt, case)
                except RuntimeError as error:
                    assert case.name.startswith("quantize-"), case
                    refused.add(str(error).splitlines()[0])
    assert simt.synchronizations() == before
    assert refused == {
        "quantize_4bit: the current stream is being captured into a CUDA graph, want the weight "
        "quantized before the capture, because the check for NaN waits for the GPU"
    }
    called = set(calls_of_ours(profile))
    assert "aten::narrow" in called  # the profiler sees what ops call, all but addmm_out itself
    assert called <= CAPTURE_SAFE, called - CAPTURE_SAFE


def test_the_quantizer_synchronizes_once_and_nothing_else_does(simt):
    for case in CASES:
        if case.large:
            continue
        before = simt.synchronizations()
        run_case(simt, case)
        assert simt.synchronizations() - before == int(case.name.startswith("quantize-")), case
