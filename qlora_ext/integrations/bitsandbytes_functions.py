"""bitsandbytes' C functions on our CUDA kernels.

Some trainers (axolotl, unsloth) have kernels of their own. They call C functions of bitsandbytes'
CUDA library through ctypes and not through torch's ops, so replacing the ops does not reach them.
`put_into` replaces the functions in `bitsandbytes.functional.lib`, from which trainers take them
when they are imported. `cdequantize_blockwise_fp32`, which decodes nested scales, stays
bitsandbytes'.
Source: bitsandbytes/backends/cuda/ops.py of 0.50.
"""

from __future__ import annotations

import ctypes as ct
import sys
import warnings

_DEQUANTIZE = [ct.c_void_p] * 4 + [ct.c_int32] * 2 + [ct.c_void_p]
_GEMM = [ct.c_int32] * 3 + [ct.c_void_p] * 5 + [ct.c_int32] * 4 + [ct.c_void_p]
_DTYPES = ("fp32", "fp16", "bf16")

# What csrc/cuda/bitsandbytes_functions.cpp exports. These functions return nothing.
ARGTYPES: dict[str, list[type]] = {
    **{
        f"cdequantize_blockwise_{dtype}_{quant_type}": _DEQUANTIZE
        for dtype in _DTYPES
        for quant_type in ("nf4", "fp4")
    },
    **{f"cgemm_4bit_inference_naive_{dtype}": _GEMM for dtype in _DTYPES},
}


def functions(library: ct.CDLL) -> dict[str, ct._CFuncPtr]:
    """Our functions by bitsandbytes' names. A call that fails raises RuntimeError."""
    take_error = library["qlora_ext_take_error"]
    take_error.argtypes, take_error.restype = [], ct.c_char_p

    def raise_error(result, function, arguments):
        if error := take_error():
            raise RuntimeError(error.decode())
        return result

    made = {}
    for name, argtypes in ARGTYPES.items():
        made[name] = library[name]  # by key: an object of its own each time
        made[name].argtypes, made[name].restype = argtypes, None
        made[name].errcheck = raise_error
    return made


class Swap:
    """Our functions in bitsandbytes' `lib`, until `undo()`."""

    def __init__(self, lib, ours: dict):
        self.lib = lib
        self.pairs = {}  # name: (theirs, ours)
        for name, function in ours.items():
            theirs = getattr(lib, name, None)
            if not hasattr(theirs, "restype"):
                continue  # their library lacks it: they put a function there that raises
            if theirs.argtypes and list(theirs.argtypes) != list(function.argtypes):
                warnings.warn(
                    f"qlora_ext: {name} of this bitsandbytes takes other arguments than in 0.50 "
                    "and is not replaced; to replace it, install 0.50",
                    stacklevel=4,
                )
                continue
            self.pairs[name] = (theirs, function)
            setattr(lib, name, function)

    def undo(self) -> None:
        for name, (theirs, ours) in self.pairs.items():
            if getattr(self.lib, name) is ours:
                setattr(self.lib, name, theirs)

    def late(self) -> list[str]:
        """Modules that took bitsandbytes' own functions before they were replaced."""
        return sorted(
            module
            for module, loaded in list(sys.modules.items())
            if any(
                getattr(loaded, "__dict__", {}).get(name) is theirs
                for name, (theirs, _) in self.pairs.items()
            )
        )


def put_into(lib, library: ct.CDLL | None) -> Swap | None:
    """Replaces the functions in `lib` (bitsandbytes.functional.lib) by those of `library`, our CUDA
    library. None if there is no such library, or if `lib` isn't bitsandbytes' CUDA library.

    Warns about modules that were imported too early and keep bitsandbytes' own functions."""
    if library is None or not getattr(lib, "compiled_with_cuda", False):
        return None
    swap = Swap(lib, functions(library))
    if late := swap.late():
        warnings.warn(
            f"qlora_ext: {', '.join(late)}: imported before enable(), with bitsandbytes' own C "
            "functions, which they keep. Call enable() before importing them, or set "
            "QLORA_EXT_ENABLE=1 in the environment",
            stacklevel=3,
        )
    return swap
