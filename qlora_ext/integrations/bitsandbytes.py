"""Runs bitsandbytes' own 4-bit layers on our kernels, between `enable()` and `disable()`.

bitsandbytes calls its kernels through torch ops (`torch.ops.bitsandbytes.*`). `enable()` replaces
these kernels by ours on the CPU, and on CUDA if our CUDA kernels are built. Models do not change.
`disable()` puts bitsandbytes' kernels back. Its 8-bit ops and optimizers are left alone.
Source: bitsandbytes/_ops.py and backends/cpu/ops.py of 0.50.
"""

from __future__ import annotations

import warnings
from importlib import metadata

import torch
import torch.nn.functional as F

from .. import ops
from ..build_info import cuda_library
from ..ops import _C
from . import bitsandbytes_functions

TESTED = "0.50"
_SMALLEST = 1e-38  # bitsandbytes divides no block by less

_library: torch.library.Library | None = None
_pack_for_cpu = None
_swap: bitsandbytes_functions.Swap | None = None


def _w4(packed, absmax, nested, shape, blocksize: int, quant_type: str) -> ops.W4:
    """bitsandbytes' description of a weight as the arguments of our ops.

    packed: any quant_storage dtype; the bytes are the same. absmax: fp32 [num_blocks], or uint8
    codes with `nested`, the bytes of the fp32 offset and absmax2.
    """
    packed = packed.contiguous().reshape(-1).view(torch.uint8)
    if absmax.dtype != torch.uint8:
        absmax = absmax.float().contiguous().view(torch.uint8)
    return (packed, absmax, nested, None, list(shape), blocksize, quant_type, None)


def _quantize_4bit(A, blocksize, quant_type, quant_storage):
    packed, absmax, _ = torch.ops.qlora_ext.quantize_4bit.default(
        A, blocksize, quant_type, None, "absmax", 3.0, "none", 1.0
    )
    return packed.view(quant_storage).reshape(-1, 1), absmax.view(torch.float32)


def _quantize_4bit_cpu(A, blocksize, quant_type, quant_storage):
    """Packs as bitsandbytes does on a CPU, byte for byte.

    It differs from our format in three ways. FP4's sixteen levels are one sorted list, so ties go
    down, also below zero, and 0 gets the lower of its two zeros. No block is divided by less than
    1e-38. A last block that is not full is divided by its absmax instead of multiplied by the
    reciprocal, and padded with a zero.
    """
    flat, codebook = A.reshape(-1), None
    if quant_type == "fp4":
        quant_type, codebook = "custom", _C.codebooks()["fp4"]
    full = flat.numel() - flat.numel() % blocksize
    packed, absmax, _ = torch.ops.qlora_ext.quantize_4bit.default(
        flat[:full], blocksize, quant_type, codebook, "absmax", 3.0, "none", 1.0
    )
    packed, absmax = packed.reshape(-1), absmax.view(torch.float32)

    def codes_of(scaled):
        return torch.ops.qlora_ext.quantize_4bit.default(
            scaled, 0, quant_type, codebook, "none", 3.0, "none", 1.0
        )[0].reshape(-1)

    # A block of zeros is the same either way.
    tiny = ((absmax < _SMALLEST) & (absmax > 0)).nonzero().reshape(-1)
    if tiny.numel():
        blocks = flat[:full].reshape(-1, blocksize)[tiny].float()
        scaled = blocks * (1.0 / absmax[tiny].clamp(min=_SMALLEST).view(-1, 1))
        packed.view(-1, blocksize // 2)[tiny] = codes_of(scaled).view(-1, blocksize // 2)
    if full < flat.numel():
        rest = flat[full:].float()
        scale = rest.abs().max().clamp(min=_SMALLEST)
        last = codes_of(F.pad((rest / scale).clamp(-1, 1), (0, rest.numel() % 2)))
        packed = torch.cat([packed, last])
        absmax = torch.cat([absmax, scale.reshape(1)])
    return packed.view(quant_storage).reshape(-1, 1), absmax


def _dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    return ops.dequantize_4bit(_w4(A, absmax, None, shape, blocksize, quant_type), dtype)


def _dequantize_4bit_cpu(A, absmax, blocksize, quant_type, shape, dtype):
    from bitsandbytes.backends.cpu import ops as theirs

    weight = _dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype)
    # Their CPU kernel returns a 1-d weight as one row, unless it leaves the weight to torch.
    left = shape[-1] % 2 or (blocksize >= 2048 and getattr(theirs, "_has_avx512", False))
    return weight.reshape(1, -1) if len(shape) == 1 and not left else weight


def _dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out):
    # bitsandbytes lets `out` be any view; our op writes contiguous memory.
    w4 = _w4(A, absmax, None, shape, blocksize, quant_type)
    if out.is_contiguous():
        ops.dequantize_4bit(w4, dtype, out)
    else:
        out.copy_(ops.dequantize_4bit(w4, dtype))


def _gemm_4bit(
    A,
    B,
    shapeB,
    absmax,
    blocksize,
    quant_type,
    bias=None,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    nested = None
    if absmax_8bit is not None:
        # Their 8-bit map is ours, except for the last bit of torch.linspace's results.
        nested = torch.cat([absmax_offset.reshape(1).float(), absmax.float()]).view(torch.uint8)
        absmax = absmax_8bit
    return ops.gemm_4bit(A, _w4(B, absmax, nested, shapeB, blocksize, quant_type), bias)


def is_enabled() -> bool:
    """Whether bitsandbytes' 4-bit ops now run on our kernels."""
    return _library is not None


def enable() -> None:
    """Runs bitsandbytes' 4-bit ops on our kernels, for this process, until `disable()`.

    Covers quantize_4bit, dequantize_4bit and gemm_4bit on the CPU, and on CUDA if our CUDA kernels
    are built. On a CPU with AVX512-BF16, bitsandbytes repacks a weight into another layout at its
    first evaluation. enable() turns that off, but a layer that was repacked before stays on
    bitsandbytes' kernel. Calling it again does nothing.

    On CUDA it also replaces the C functions in `bitsandbytes.functional.lib` that axolotl's and
    unsloth's kernels call. Their modules take these functions when they are imported. A warning
    names the modules that were imported before, and so keep bitsandbytes' own.

    Raises:
        ImportError: bitsandbytes is not installed.
        RuntimeError: it lacks what we replace, as releases before 0.50 do. Nothing was replaced.
    """
    global _library, _pack_for_cpu, _swap
    if _library is not None:
        return
    from bitsandbytes import functional
    from bitsandbytes.nn import modules

    found = metadata.version("bitsandbytes")
    theirs = (torch.ops.bitsandbytes, "gemm_4bit"), (modules, "_convert_weight_packed_for_cpu")
    if lacks := [name for holder, name in theirs if not hasattr(holder, name)]:
        raise RuntimeError(
            f"enable: found bitsandbytes {found}, which has no {' and no '.join(lacks)}, want "
            f"{TESTED}; install that, or use QLoraExtConfig, which does not need bitsandbytes"
        )
    if found.split(".")[:2] != TESTED.split("."):
        warnings.warn(
            f"qlora_ext: found bitsandbytes {found}, tested with {TESTED}.*; if it fails, install "
            "a tested one",
            stacklevel=2,
        )
    keys = [
        key
        for key in ("CPU", "CUDA")
        if torch._C._dispatch_has_kernel_for_dispatch_key("qlora_ext::gemm_4bit", key)
    ]
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # The dispatcher warns that a kernel is replaced, which is what we want.
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered.*")
        for key in keys:
            quantize, dequantize = (
                (_quantize_4bit_cpu, _dequantize_4bit_cpu)
                if key == "CPU"
                else (_quantize_4bit, _dequantize_4bit)
            )
            library.impl("quantize_4bit", quantize, key, allow_override=True)
            library.impl("dequantize_4bit", dequantize, key, allow_override=True)
            library.impl("dequantize_4bit.out", _dequantize_4bit_out, key, allow_override=True)
            library.impl("gemm_4bit", _gemm_4bit, key, allow_override=True)
    _library = library
    _pack_for_cpu = modules._convert_weight_packed_for_cpu
    modules._convert_weight_packed_for_cpu = lambda weight, quant_state, *args, **kwargs: (
        weight,
        quant_state,
    )
    _swap = bitsandbytes_functions.put_into(functional.lib, cuda_library())


def disable() -> None:
    """Puts bitsandbytes' own kernels back. Does nothing if ours are not in use."""
    global _library, _pack_for_cpu, _swap
    if _library is None:
        return
    from bitsandbytes.nn import modules

    _library._destroy()
    modules._convert_weight_packed_for_cpu = _pack_for_cpu
    if _swap is not None:
        _swap.undo()
    _library = _pack_for_cpu = _swap = None
