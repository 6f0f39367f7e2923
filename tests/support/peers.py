"""The paths that bitsandbytes' CPU library can take, so that tests hold on every one of them.

The library has code for AVX-512, code for AVX512-BF16, and plain code. It asks the CPU which of
them it may run, and has no switch. `hide_from_bitsandbytes` makes it take the path of a CPU that
lacks some of these. `take_the_path_of` does so for the path that QLORA_EXT_CPU names, so that
bitsandbytes, torch and our kernels all see the same CPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess

import torch

# QLORA_EXT_CPU -> what torch is told the CPU has, and what bitsandbytes is not to see.
HIDDEN = {
    "portable": ("default", ("avx512f", "avx512bf16")),
    "avx2": ("avx2", ("avx512f", "avx512bf16")),
    "avx512": (None, ("avx512bf16",)),
}
_ANCHOR = "cquantize_blockwise_cpu_fp32"  # an exported function: tells where the library lies


def bitsandbytes_sees(feature: str) -> bool:
    """Whether its library takes the CPU for one with `feature`: "avx512f" or "avx512bf16"."""
    from bitsandbytes.cextension import lib

    ask = getattr(getattr(lib, "_lib", lib), f"has_{feature}_cpu", None)
    return ask is not None and bool(ask() & 0xFF)  # it returns a bool, which is one byte


def assert_bitsandbytes_same(got: torch.Tensor, theirs: torch.Tensor, *, nested: bool = False):
    """Equal values. Signs of zero are bitsandbytes' choice: FP4's code 8 is 0 in our format, and
    -0 on some of its paths.

    With `nested`, scales went through its 8-bit map. It computes the map by torch.linspace, and
    where torch has no vector instructions, the map's last bits differ from our table's.
    """
    from bitsandbytes.functional import create_dynamic_map

    from qlora_ext import _C  # not above: importing it makes torch ask the CPU

    assert got.shape == theirs.shape and got.dtype == theirs.dtype
    if nested and create_dynamic_map().tolist() != _C.dynamic_map():
        rtol = max(5e-7, 2 * torch.finfo(got.dtype).eps)
        torch.testing.assert_close(got, theirs, rtol=rtol, atol=0)
    else:
        assert torch.equal(got, theirs), f"largest difference {(got - theirs).abs().max()}"


def hide_from_bitsandbytes(*features: str) -> None:
    """Makes its library take the CPU for one without `features`, for this process.

    The library caches the CPU's answers in static variables. `nm` finds them by name.

    Raises:
        RuntimeError: `nm` is missing, or the library keeps no such variables; it goes on using
            what the CPU has.
    """
    from bitsandbytes.cextension import lib

    library = getattr(lib, "_lib", lib)
    try:
        listing = subprocess.run(["nm", library._name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"`nm`, from binutils, cannot read {library._name}: {error}") from error
    symbols = [line.split() for line in listing.stdout.splitlines() if len(line.split()) == 3]
    address = {name: int(at, 16) for at, _, name in symbols}
    # `static bool supported = ...` compiles to the value (_ZZ...) and to a guard (_ZGVZ...) whose
    # first byte is 1 once the value is there.
    for feature in features:
        asks = f"has_{feature}v"  # the function's mangled name; v: it takes no arguments
        values = [name for name in address if name.startswith("_ZZ") and asks in name]
        guards = [name for name in address if name.startswith("_ZGVZ") and asks in name]
        if not values or len(values) != len(guards) or _ANCHOR not in address:
            raise RuntimeError(f"{library._name} has no static variable for {feature}")
        anchor = ctypes.cast(getattr(library, _ANCHOR), ctypes.c_void_p).value
        for names, byte in ((values, 0), (guards, 1)):
            for name in names:
                ctypes.c_uint8.from_address(anchor - address[_ANCHOR] + address[name]).value = byte


def take_the_path_of(path: str) -> None:
    """Shows torch and bitsandbytes a CPU that has no more than our path `path` uses.

    Call it before torch runs its first kernel: torch asks the CPU once. Does nothing for a `path`
    that hides nothing, and leaves bitsandbytes alone where it is not installed or where the CPU
    lacks those features anyway.

    Raises:
        RuntimeError: torch has asked the CPU already, or `hide_from_bitsandbytes` failed.
    """
    if path not in HIDDEN:
        return
    capability, features = HIDDEN[path]
    if capability is not None:
        os.environ["ATEN_CPU_CAPABILITY"] = capability
        now = torch.backends.cpu.get_cpu_capability()
        if now.lower() not in (capability, "default"):  # default: a CPU without AVX2
            raise RuntimeError(f"torch uses {now} already, want {capability}: call this earlier")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return
    hide_from_bitsandbytes(*(feature for feature in features if bitsandbytes_sees(feature)))
