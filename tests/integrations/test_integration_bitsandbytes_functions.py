"""Our C functions in `bitsandbytes.functional.lib` under enable(). tests/ops has what they
compute."""

import ctypes as ct
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from integration_helpers import run_python

bnb = pytest.importorskip("bitsandbytes")

from bitsandbytes.cextension import BNBNativeLibrary, CudaBNBNativeLibrary

from qlora_ext.integrations import bitsandbytes as plugin
from qlora_ext.integrations import bitsandbytes_functions as swap

NF4 = "cdequantize_blockwise_bf16_nf4"


def c_function(name, argtypes=None):
    """A C function that does nothing."""
    made = ct.CFUNCTYPE(None)(lambda *_: None)
    made.__name__ = name
    if argtypes is not None:
        made.argtypes = argtypes
    return made


class Ours:
    """Stands for our CUDA library: a new function for each look-up, as with ctypes."""

    error = None

    def __getitem__(self, name):
        if name == "qlora_ext_take_error":
            return lambda: self.error
        return c_function(name)


def their_library(*missing, **argtypes):
    """What holds bitsandbytes' CUDA library, over functions that do nothing."""
    names = {*swap.ARGTYPES, "cdequantize_blockwise_fp32", "get_context", "cget_managed_ptr"}
    return CudaBNBNativeLibrary(
        types.SimpleNamespace(
            **{
                name: c_function(name, argtypes.get(name, swap.ARGTYPES.get(name)))
                for name in names - {*missing}
            }
        )
    )


@pytest.fixture
def enabled(monkeypatch):
    """enable() with a CUDA library of ours, and with `lib` as bitsandbytes'."""

    def enable(lib, ours=None):
        monkeypatch.setattr(bnb.functional, "lib", lib)
        monkeypatch.setattr(plugin, "cuda_library", lambda: ours or Ours())
        plugin.enable()

    yield enable
    plugin.disable()


def test_functions_go_in_and_out(enabled):
    lib = their_library()
    theirs = {name: getattr(lib, name) for name in swap.ARGTYPES}
    kept = lib.cdequantize_blockwise_fp32
    enabled(lib)
    for name, argtypes in swap.ARGTYPES.items():
        ours = getattr(lib, name)
        assert ours is not theirs[name] and hasattr(ours, "restype"), name
        assert list(ours.argtypes) == argtypes and ours.restype is None
    assert lib.cdequantize_blockwise_fp32 is kept
    plugin.disable()
    assert {name: getattr(lib, name) for name in swap.ARGTYPES} == theirs


def test_an_error_of_ours_is_raised(enabled):
    lib, ours = their_library(), Ours()
    enabled(lib, ours)
    arguments = [None, None, None, None, 64, 0, None]
    assert getattr(lib, NF4)(*arguments) is None
    ours.error = b"a sentence"
    with pytest.raises(RuntimeError, match=r"^a sentence$"):
        getattr(lib, NF4)(*arguments)
    ours.error = None
    with pytest.raises(ct.ArgumentError):
        getattr(lib, NF4)(*arguments[:5], 1.5, None)


def test_what_their_library_lacks_is_left_alone(enabled):
    lib = their_library(NF4)
    enabled(lib)
    with pytest.raises(RuntimeError, match=f"'{NF4}' not available"):
        getattr(lib, NF4)()


def test_another_signature_is_left_alone(enabled):
    other = [*swap.ARGTYPES[NF4], ct.c_int32]
    lib = their_library(**{NF4: other})
    theirs = getattr(lib, NF4)
    with pytest.warns(UserWarning, match=f"{NF4} of this bitsandbytes takes other arguments"):
        enabled(lib)
    assert getattr(lib, NF4) is theirs


def test_what_was_set_after_us_stays(enabled):
    lib = their_library()
    enabled(lib)
    setattr(lib, NF4, "another program's")
    plugin.disable()
    assert getattr(lib, NF4) == "another program's"


@pytest.mark.parametrize("ours", [None, Ours()], ids=["no-cuda-library", "their-cpu-library"])
def test_without_cuda_nothing_is_replaced(monkeypatch, ours):
    """A BNBNativeLibrary is what holds the library for CPUs."""
    lib = their_library() if ours is None else BNBNativeLibrary(types.SimpleNamespace())
    before = getattr(lib, NF4)
    monkeypatch.setattr(bnb.functional, "lib", lib)
    monkeypatch.setattr(plugin, "cuda_library", lambda: ours)
    plugin.enable()
    try:
        assert getattr(lib, NF4) is before
    finally:
        plugin.disable()


def test_a_trainer_imported_before_is_named(enabled, monkeypatch):
    lib = their_library()
    for name in ("axolotl.kernels.quantize", "unsloth.kernels.utils", "bystander"):
        module = types.ModuleType(name)
        if name != "bystander":  # as both bind it when they are imported
            setattr(module, NF4, getattr(lib, NF4))
        monkeypatch.setitem(sys.modules, name, module)
    sentence = (
        "qlora_ext: axolotl.kernels.quantize, unsloth.kernels.utils: imported before enable(), "
        "with bitsandbytes' own C functions, which they keep. Call enable() before importing them, "
        "or set QLORA_EXT_ENABLE=1 in the environment"
    )
    with pytest.warns(UserWarning) as told:
        enabled(lib)
    assert [str(w.message) for w in told] == [sentence]
    plugin.disable()
    for name in ("axolotl.kernels.quantize", "unsloth.kernels.utils"):
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enabled(lib)


# Against bitsandbytes itself --------------------------------------------------------------------


def test_signatures_are_those_of_bitsandbytes():
    """What its module for CUDA sets on import. Without a GPU, it sets it on functions that only
    raise."""
    found = run_python(
        """
        import torch
        torch._C.__dict__.setdefault("_cuda_getCurrentRawStream", None)  # a CPU build has none
        import bitsandbytes.backends.cuda.ops as theirs
        from qlora_ext.integrations.bitsandbytes_functions import ARGTYPES
        for name, argtypes in ARGTYPES.items():
            function = getattr(theirs.lib, name)
            print(name, function.restype is None and list(function.argtypes) == argtypes)
        """
    )
    assert found.split("\n") == [f"{name} True" for name in swap.ARGTYPES] + [""]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on the PATH")
def test_its_cuda_libraries_have_these_functions():
    libraries = sorted(Path(bnb.__file__).parent.glob("libbitsandbytes_cuda*.so"))
    assert libraries
    for library in libraries:
        listing = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
        names = {line.split()[-1] for line in listing.stdout.splitlines()}
        assert set(swap.ARGTYPES) <= names, library.name
