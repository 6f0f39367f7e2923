"""Loads the compiled libraries, and reports what was built and what runs (python -m qlora_ext)."""

import ctypes
import platform
import warnings
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_BUILD = "build it in this environment: `make build`, or `pip install --no-build-isolation .`"

try:
    from . import _C
except ImportError as error:
    if any((_FOLDER / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        _reason = f"the compiled library does not load under torch {torch.__version__}: {error}"
    else:
        _found = ", ".join(sorted(p.name for p in _FOLDER.glob("_C.*"))) or "none"
        _reason = (
            f"{_FOLDER} has no compiled library for this Python: "
            f"found {_found}, want _C{EXTENSION_SUFFIXES[0]}"
        )
    raise ImportError(f"qlora_ext: {_reason}; {_BUILD}") from error

_CUDA_LIBRARIES = sorted(_FOLDER.glob("_C_cuda*.so"))
_cuda_error: str | None = None


def _load_cuda_backend() -> None:
    """Loads the CUDA library if this torch has CUDA; a CPU torch lacks the symbols it links to.

    Warns if the library does not fit this torch or does not load; the CPU backend works then too.
    """
    global _cuda_error
    if not _CUDA_LIBRARIES or torch.version.cuda is None:
        return
    built, here = _C.cuda_version, torch.version.cuda
    if built.split(".")[0] != here.split(".")[0]:
        _cuda_error = (
            f"the CUDA library was built for CUDA {built}, want CUDA {here} like torch "
            f"{torch.__version__}"
        )
    else:
        try:
            torch.ops.load_library(str(_CUDA_LIBRARIES[0]))
        except OSError as error:  # torch's own says which library; its cause says why
            _cuda_error = f"the CUDA library does not load: {error.__cause__ or error}"
    if _cuda_error is not None:
        warnings.warn(f"qlora_ext runs on the CPU only: {_cuda_error}; {_BUILD}", stacklevel=2)


def _cuda_is_live() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("qlora_ext::gemm_4bit", "CUDA")


def cuda_library() -> ctypes.CDLL | None:
    """The CUDA library, for its C functions; None if it is not loaded."""
    return ctypes.CDLL(str(_CUDA_LIBRARIES[0])) if _cuda_is_live() else None


def build_info() -> dict[str, object]:
    """What was built, for which architectures, and which CPU path runs.

    Keys: version, torch (the running one), torch_target (oldest torch whose stable ABI the build
    uses), python, machine, compiler, cpu_path (docs/cpu.md lists them), cpu_threads, cuda_built,
    cuda_archs, cuda_live (whether the CUDA library is loaded, with or without a GPU), cuda_gpus
    (how many torch sees), cuda_why_not (why it is not loaded, or None).
    Raises RuntimeError if QLORA_EXT_CPU names a path that does not exist or cannot run here.
    """
    live = _cuda_is_live()
    why_not = None
    if not _CUDA_LIBRARIES:
        why_not = (
            "the CUDA backend was not built (no nvcc or a CPU torch at build time, or USE_CUDA=0)"
        )
    elif torch.version.cuda is None:
        why_not = f"torch {torch.__version__} is a CPU build"
    elif _cuda_error is not None:
        why_not = _cuda_error
    return {
        "version": _version(),
        "torch": torch.__version__,
        "torch_target": _C.torch_target_version,
        "python": platform.python_version(),
        "machine": f"{platform.system()}-{platform.machine()}",
        "compiler": _C.compiler,
        "cpu_path": _C.cpu_path(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_built": bool(_CUDA_LIBRARIES),
        "cuda_archs": _C.cuda_archs or None,
        "cuda_live": live,
        "cuda_gpus": torch.cuda.device_count(),
        "cuda_why_not": why_not,
    }


def in_words(info: dict[str, object]) -> dict[str, str]:
    """build_info() as text for people: yes and no for bools, and a note if no GPU was seen."""
    words = {None: "no", True: "yes", False: "no"}
    shown = {
        key: words[value] if isinstance(value, (bool, type(None))) else str(value)
        for key, value in info.items()
    }
    if info["cuda_live"] and not info["cuda_gpus"]:
        shown["cuda_live"] = "built, no GPU seen"
    return shown


def _version() -> str:
    try:
        return metadata.version("qlora_ext")
    except metadata.PackageNotFoundError:
        return "a source tree, not installed"


_load_cuda_backend()
