"""Notices that a tool did arithmetic on the bytes of a packed layer.

Tools that average models (EMA, SWA, model soups) treat every tensor as numbers. Codes and the bytes
of statistics are not numbers: an average of uint8 tensors is truncated, so it differs even if all
inputs are equal. A layer keeps a sample of its bytes from when they were packed or loaded, and
compares it later. Arithmetic changes all elements alike, so a sample shows it as well as a checksum
of everything, and takes microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

_CODES, _STATISTICS = 1024, 256  # bytes sampled from the first tensor, and from each other one
_WINDOWS = 4  # places to sample, because the start of a table may be all zeros
# Bytes of a probe (Python allocates an object of this size fast), and how many different values
# they must have: an average in bf16 with a decay of 0.9 changes only 12 of the 256 values.
_PROBE, _VALUES = 448, 128


def _windows(tensor: Tensor, size: int) -> Tensor:
    if tensor.numel() <= size:
        return tensor.detach().reshape(-1)
    flat = tensor.detach().contiguous()
    # One call, because a few slices and views would take several times as long.
    step, offset = flat.numel() // _WINDOWS, flat.storage_offset()
    return flat.as_strided((_WINDOWS, size // _WINDOWS), (step, 1), offset).reshape(-1)


def byte_sample(tensors: Sequence[Tensor]) -> bytes | None:
    """Up to 1,024 bytes of the first uint8 tensor and 256 of each other one.

    None if they cannot be read: on meta, for a DTensor or another subclass, while a graph is traced
    or captured, or in a transform of torch.func. On a GPU this waits for the device.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    plain = (Tensor, torch.nn.Parameter)
    if not all(type(t) in plain and t.dtype == torch.uint8 and not t.is_meta for t in tensors):
        return None
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return None
    sizes = [_CODES] + [_STATISTICS] * (len(tensors) - 1)
    # A dispatch mode may fake the results, so leave it. Leaving takes as long as all the rest, so
    # do it only if there is one.
    in_mode = is_in_torch_dispatch_mode()
    with _disable_current_modes() if in_mode else contextlib.nullcontext():
        parts = [_windows(t, size) for t, size in zip(tensors, sizes, strict=True)]
        if len({part.device for part in parts}) > 1:
            parts = [part.cpu() for part in parts]
        # NumPy gets a copy, because FSDP2 cannot free a storage that NumPy has seen.
        return torch.cat(parts).cpu().numpy().tobytes()


def byte_probe(tensor: Tensor) -> ctypes.Array | None:
    """A view of 448 bytes of a plain uint8 tensor on the CPU; .raw reads them.

    Reading takes 0.1 us, so every forward pass can compare them. Read only while the tensor's
    data_ptr() is still the same. None for tensors on other devices, for small ones, and for those
    with too few different bytes to show every kind of arithmetic.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() < _PROBE:
        return None
    start, step = tensor.data_ptr(), (tensor.numel() - _PROBE) // (_WINDOWS - 1)
    windows = [(ctypes.c_char * _PROBE).from_address(start + i * step) for i in range(_WINDOWS)]
    best = max(windows, key=lambda window: len(set(window.raw)))
    return best if len(set(best.raw)) >= _VALUES else None


def is_arithmetic(old: bytes, new: bytes) -> bool:
    """Whether new looks like old after arithmetic on each byte, such as a truncated average.

    Then equal bytes have become equal bytes, none of them grew (or none shrank), and different
    ones mostly stayed different. The bytes of other weights do not look like that.
    """
    if len(old) != len(new) or old == new:
        return False
    pairs = set(zip(old, new, strict=True))
    values = len({before for before, _ in pairs})
    return (
        len(pairs) == values  # new is a function of old, byte by byte
        and len(old) - values >= 32  # and not by chance: enough bytes repeat
        and 3 * len({after for _, after in pairs}) >= values >= 16
        and (all(a >= b for a, b in pairs) or all(a <= b for a, b in pairs))
    )
