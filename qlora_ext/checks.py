"""What values from a config or a file are judged by, and how a sentence shows them."""

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
    """Whether it is a number, infinities and NaN too, that float() takes: not 10**400."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= FLOAT_MAX
    return isinstance(value, float)


def is_integer(value) -> bool:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_scaling(function: str, scaling, argument: str = "scaling"):
    """The scaling: a float, or a tensor as it was given. ValueError unless it is a number, or a
    tensor of one, that fp32 can hold."""
    if torch.compiler.is_compiling():  # a traced value has no number to look at
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
    """TypeError unless each is a tensor of a layout that the ops take. Nothing is asked under
    torch.compile, which cannot trace some of the questions.

    Functions ask before they compute. Layers, where that would cost time, ask when that failed.
    """
    if torch.compiler.is_compiling():
        return
    for argument, value in tensors.items():
        got = not_plain(value)
        if got is None and value.layout != torch.strided:
            got = f"a tensor of layout {value.layout}"
        if got is not None and not got.endswith("makes a tensor of it)"):  # torch resolves views
            advice = ""
            if getattr(value, "layout", None) is torch.jagged:
                advice = " (its values() is one: torch.nested.nested_tensor_from_jagged makes a "
                advice += "jagged tensor of the result and its offsets())"
            raise TypeError(f"{function}: {argument} is {got}, want a dense tensor{advice}")


def not_plain(value) -> str | None:
    """What a value from outside is, where it is no dense tensor in plain memory; else None.

    Tensors of such kinds are refused: their memory does not hold their values, or they have none.
    Which of them a call takes all the same (meta tensors, subclasses) is for the caller to say.
    """
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"a quantized tensor of torch ({value.dtype})"
    if value.layout != torch.strided:
        return None  # which the callers name
    if value.is_conj():
        return "a conjugate view (resolve_conj() makes a tensor of it)"
    if value.is_neg():
        return "a view with the negative bit (resolve_neg() makes a tensor of it)"
    return None


def not_stored(value) -> str | None:
    """As not_plain, for an entry of a state dict: a tensor whose storage does not hold its elements
    is told too, since reading it ends the process."""
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
        return "a tensor whose storage was freed or cut under it"
    return None


NO_DATA = "a tensor without data (on the meta device, or a FakeTensor)"


def not_readable(value) -> str | None:
    """As not_plain, and of what it leaves to the callers: a layout without strides, and a tensor
    that has a shape and no values."""
    got = not_plain(value)
    if got is None and value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    if got is None and lacks_data(value):
        return NO_DATA
    return got


def lacks_data(tensor: torch.Tensor) -> bool:
    """Whether it has a shape and no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a float dtype has a smaller range than another."""
    return torch.finfo(dtype).max < torch.finfo(other).max


def check_finite(
    name: str,
    values: torch.Tensor,
    dtype: torch.dtype,
    exact: Callable[[], torch.Tensor] | None = None,
    advice: str = "",
) -> None:
    """The one check of weights before they are written or put into a model.

    Args:
        name: of the weight, with its layer's, for the error.
        values: of any float dtype; they are to become `dtype`, or have been rounded to it.
        exact: makes the values before they were rounded, for the error; called only for that.
        advice: what to do, where a wider dtype would hold them; it is said of finite values alone.

    Raises:
        OverflowError: a value is a NaN, or beyond the range of dtype; names the layer and the dtype
            and says how many values those are, and what the largest magnitude is.
    """
    if values.numel() == 0 or lacks_data(values):
        return
    least, most = values.detach().aminmax()
    if least.to(dtype).isfinite() and most.to(dtype).isfinite():
        return
    source = (values if exact is None else exact()).detach()
    bad = int((~source.to(dtype).isfinite()).sum())
    if not bad:  # rounded once from what is not here
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
    """The values of a buffer that are to be finite: it may be a mask, whose infinities stay."""
    return buffer[~buffer.isinf()]


def check_parameters(
    op: str,
    model: nn.Module,
    dtype: torch.dtype | None = None,
    skipped: Container[str] = (),
) -> None:
    """OverflowError unless `dtype` (None: its own) holds each float parameter of a model, but for
    those whose names are skipped."""
    for name, parameter in model.named_parameters():
        if name in skipped:
            continue
        if parameter.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            check_finite(f"{op}: {name}", parameter, dtype or parameter.dtype)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory could be had, on the CPU or a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )
