"""Validates untrusted values: arguments, and values and tensors from configs and files."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Container

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .text import plural, shorten

FLOAT_MAX = torch.finfo(torch.float32).max


def is_number(value) -> bool:
    """Whether it is an int or a float, and not too large for one (as 10**400 is). Infinities and
    NaN count as numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= FLOAT_MAX
    return isinstance(value, float)


def is_integer(value) -> bool:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_scaling(function: str, scaling, argument: str = "scaling"):
    """Returns the scaling: a number as a float, a tensor unchanged. Raises ValueError unless it is
    a number, or a tensor of one number, that fp32 can hold."""
    if torch.compiler.is_compiling():  # the value of a traced number is not known
        return scaling
    if isinstance(scaling, torch.Tensor):
        is_good = scaling.numel() == 1 and not scaling.is_meta
        is_good = is_good and not scaling.is_complex() and scaling.dtype != torch.bool
        is_good = is_good and abs(scaling.item()) <= FLOAT_MAX
    else:
        is_good = isinstance(scaling, numbers.Real) and not isinstance(scaling, bool)
        is_good = is_good and abs(scaling) <= FLOAT_MAX
    if not is_good:
        raise ValueError(
            f"{function}: {argument} is {shorten(scaling)}, want a finite number that fits float32"
        )
    return scaling if isinstance(scaling, torch.Tensor) else float(scaling)


def check_input(function: str, **tensors) -> None:
    """Raises TypeError unless each value is a tensor of a kind that the ops take. Checks nothing
    under torch.compile, which cannot trace some of the checks.

    Functions check before they compute. Layers check only after their op failed, to save time.
    """
    if torch.compiler.is_compiling():
        return
    for argument, value in tensors.items():
        got = not_dense(value)
        if got is not None and not got.endswith("() first)"):  # the ops resolve such views
            advice = ""
            if getattr(value, "layout", None) is torch.jagged:
                advice = " (pass its values(), and make a jagged tensor of the result and its "
                advice += "offsets() with torch.nested.nested_tensor_from_jagged)"
            raise TypeError(f"{function}: {argument} is {got}, want a dense tensor{advice}")


def not_plain(value) -> str | None:
    """Describes a value from outside if it is not a dense tensor in plain memory; else None.

    Such tensors are refused, because their memory does not hold their values. For meta tensors,
    subclasses and other layouts this returns None: the caller decides about them.
    """
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"a tensor quantized by torch ({value.dtype})"
    if value.layout != torch.strided:
        return None  # the callers report the layout
    if value.is_conj():
        return "a conjugate view (call resolve_conj() first)"
    if value.is_neg():
        return "a view with the negative bit (call resolve_neg() first)"
    return None


def not_dense(value) -> str | None:
    """As not_plain. It also describes a tensor whose layout has no strides (sparse, jagged)."""
    got = not_plain(value)
    if got is None and value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    return got


def not_stored(value) -> str | None:
    """As not_plain, for an entry of a state dict. It also describes a tensor whose storage is too
    small for its elements, because reading that would crash the process."""
    got = not_plain(value)
    if got is not None or type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta:
        return got
    if torch._is_functional_tensor(value):
        return "a functional tensor, which stands for another one"
    if value.layout != torch.strided or not value.numel():
        return None
    last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    end = (value.storage_offset() + last + 1) * value.itemsize
    if value.untyped_storage().nbytes() < end:
        return "a tensor whose storage is too small for it (freed or resized)"
    return None


NO_DATA = "a tensor without data (on the meta device, or a FakeTensor)"


def not_readable(value) -> str | None:
    """As not_dense. It also describes a tensor without values."""
    got = not_dense(value)
    if got is None and lacks_data(value):
        return NO_DATA
    return got


def lacks_data(tensor: torch.Tensor) -> bool:
    """Whether it has a shape but no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a float dtype has a smaller range than the other."""
    return torch.finfo(dtype).max < torch.finfo(other).max


def check_finite(
    name: str,
    values: torch.Tensor,
    dtype: torch.dtype,
    exact: Callable[[], torch.Tensor] | None = None,
    advice: str = "",
) -> None:
    """Checks that weights are finite in dtype, before they are written or put into a model.

    Args:
        name: the name of the weight and its layer, for the error.
        values: of any float dtype; they will be cast to `dtype`, or have been rounded to it.
        exact: computes the values as they were before rounding. Called only for the error.
        advice: what to do if a wider dtype would hold the values. Used only if all are finite.

    Raises:
        OverflowError: a value is a NaN or beyond the range of dtype. The error gives name, dtype,
            the number of such values and the largest magnitude.
    """
    if values.numel() == 0 or lacks_data(values):
        return
    least, most = values.detach().aminmax()
    if least.to(dtype).isfinite() and most.to(dtype).isfinite():
        return
    source = (values if exact is None else exact()).detach()
    bad = int((~source.to(dtype).isfinite()).sum())
    if not bad:  # exact has no bad value, so count those after rounding
        source, bad = values.detach(), int((~values.isfinite()).sum())
    finite = source.double()
    nans = int(finite.isnan().sum())
    largest = finite.abs().nan_to_num(nan=0.0, posinf=math.inf).max().item()
    kinds = f"{plural(bad, 'value')} of {values.numel():,} that {dtype} cannot hold"
    kinds += f", {plural(nans, 'NaN')} among them" if nans else ""
    raise OverflowError(
        f"{name} holds {kinds}; the largest magnitude is {largest:g}, want at most "
        f"{torch.finfo(dtype).max:g}"
        + (f"; {advice}" if advice and not nans and math.isfinite(largest) else "")
    )


def without_mask(buffer: torch.Tensor) -> torch.Tensor:
    """The values of a buffer without infinities: it may be a mask, which may hold them."""
    return buffer[~buffer.isinf()]


def check_parameters(
    op: str,
    model: nn.Module,
    dtype: torch.dtype | None = None,
    skipped: Container[str] = (),
) -> None:
    """Raises OverflowError unless `dtype` (None: its own dtype) holds each float parameter of a
    model. It does not check the names in skipped."""
    for name, parameter in model.named_parameters():
        if name in skipped:
            continue
        if parameter.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            check_finite(f"{op}: {name}", parameter, dtype or parameter.dtype)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )
