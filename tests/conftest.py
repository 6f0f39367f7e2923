"""One test body, three backends: `cpu`, `simt` (the CUDA kernels emulated on the host), `cuda`."""

import dataclasses
import os
import types

import pytest
import torch

import peers


def pytest_configure():
    # How wide and in which colours a user's shell wants output: tests read it as a pipe gets it.
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        os.environ.pop(name, None)
    # Where QLORA_EXT_CPU shows our kernels a lesser CPU, torch and bitsandbytes see it as well.
    peers.take_the_path_of(os.environ.get("QLORA_EXT_CPU", ""))
    # Processes that test side by side (pytest -n) share the cores: threads beyond them make each
    # other wait, and a test takes three times as long.
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where ops run: `ops.<name>` are its ops, tensors are made on `device`."""

    name: str
    ops: types.SimpleNamespace
    device: str

    def __str__(self) -> str:
        return self.name


def _load(name: str) -> Backend:
    import qlora_ext  # noqa: F401  (registers the ops)

    if name == "simt":
        from simt.build import load_simt

        return Backend(name, load_simt(), "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Backend(name, torch.ops.qlora_ext, "cuda" if name == "cuda" else "cpu")


@pytest.fixture(scope="session", params=["cpu", "simt", "cuda"])
def backend(request) -> Backend:
    return _load(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
