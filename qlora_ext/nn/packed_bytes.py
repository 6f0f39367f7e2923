"""How a packed layer notices that arithmetic was done on its bytes.

Tools that average models (EMA, SWA, model soups) treat every tensor as numbers. Codes and the bytes
of statistics are none: an average of uint8 tensors is truncated, so it differs even where all the
inputs are equal. A layer keeps a sample of its bytes from when they were packed or loaded and
compares it later. Arithmetic touches all elements alike, so a sample shows it as well as a checksum
of everything, and costs microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

_CODES, _STATISTICS = 1024, 256  # bytes of the sample, of the first tensor and of each other one
_WINDOWS = 4  # places that they are taken from: the head of a table alone may be all zeros
# Bytes of a probe, as many as Python keeps in its small objects, and how many of their 256 values
# must be there: the average in bf16 with a decay of 0.9 changes 12 values alone.
_PROBE, _VALUES = 448, 128


def _windows(tensor: Tensor, size: int) -> Tensor:
    if tensor.numel() <= size:
        return tensor.detach().reshape(-1)
    flat = tensor.detach().contiguous()
    # One call: a few slices and views would take several times as long.
    step, offset = flat.numel() // _WINDOWS, flat.storage_offset()
    return flat.as_strided((_WINDOWS, size // _WINDOWS), (step, 1), offset).reshape(-1)


def byte_sample(tensors: Sequence[Tensor]) -> bytes | None:
    """Up to 1,024 bytes of the first uint8 tensor and 256 of each other one.

    None if they cannot be read here: on meta or in part (a DTensor, another subclass), while a
    graph is traced or captured, under transforms of torch.func. On a GPU this waits for the device.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    plain = (Tensor, torch.nn.Parameter)
    if not all(type(t) in plain and t.dtype == torch.uint8 and not t.is_meta for t in tensors):
        return None
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return None
    sizes = [_CODES] + [_STATISTICS] * (len(tensors) - 1)
    # A mode may fake the results. Leaving none takes as long as all the rest.
    in_mode = is_in_torch_dispatch_mode()
    with _disable_current_modes() if in_mode else contextlib.nullcontext():
        parts = [_windows(t, size) for t, size in zip(tensors, sizes, strict=True)]
        if len({part.device for part in parts}) > 1:
            parts = [part.cpu() for part in parts]
        # NumPy reads a copy: a storage that it has seen cannot be freed by FSDP2.
        return torch.cat(parts).cpu().numpy().tobytes()


def byte_probe(tensor: Tensor) -> ctypes.Array | None:
    """448 bytes of a plain uint8 tensor on the CPU, read where they lie: .raw gives them.

    Reading takes 0.1 us, so that every forward pass can compare them. It is allowed only while the
    tensor's data_ptr() is what it was here. None for tensors elsewhere, small ones, and those whose
    bytes are too much alike to show every arithmetic.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() < _PROBE:
        return None
    start, step = tensor.data_ptr(), (tensor.numel() - _PROBE) // (_WINDOWS - 1)
    windows = [(ctypes.c_char * _PROBE).from_address(start + i * step) for i in range(_WINDOWS)]
    best = max(windows, key=lambda window: len(set(window.raw)))
    return best if len(set(best.raw)) >= _VALUES else None


def is_arithmetic(old: bytes, new: bytes) -> bool:
    """Whether new looks like old after arithmetic on each byte, as a truncated average does.

    Then equal bytes have become equal bytes, none of them grew (or none shrank), and different
    ones mostly stayed different. Other weights do not stand in such a relation.
    """
    if len(old) != len(new) or old == new:
        return False
    pairs = set(zip(old, new, strict=True))
    values = len({before for before, _ in pairs})
    return (
        len(pairs) == values  # a function of the byte
        and len(old) - values >= 32  # which is no accident
        and 3 * len({after for _, after in pairs}) >= values >= 16
        and (all(a >= b for a, b in pairs) or all(a <= b for a, b in pairs))
    )
