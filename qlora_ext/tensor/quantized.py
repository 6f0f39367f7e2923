"""QuantizedTensor: a 4-bit tensor as plain bytes.

The layout is bitsandbytes' (docs/format.md): two codes a byte, one scale per `blocksize` elements,
and the scales themselves in 8 bits if double-quantized. It is not a tensor subclass; its fields are
plain uint8 tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .. import ops
from ..ops import _C
from ..text import shorten
from . import bitsandbytes_keys
from .config import _DTYPES


def view_matrix(packed: Tensor, shape) -> Tensor:
    if len(shape) == 2 and shape[1] % 2 == 0:
        return packed.view(shape[0], shape[1] // 2)
    return packed


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 4 bits, which stands for a dense one of `shape` and `dtype`.

    A stack of experts [E, N, K] has E as the first size of every tensor: packed is [E, N, K / 2],
    and each expert has the bytes that packing it alone gives. `q[e]` is one expert and `q[a:b]` a
    smaller stack; both share the bytes.

    packed: uint8, two codes a byte, high nibble first; [out, in / 2] for a matrix with an even
        number of columns, else flat [ceil(numel / 2)].
    absmax: uint8, 8-bit scale codes [num_blocks] if `nested` is not None, else fp32 bytes.
    nested: uint8, fp32 bytes: the scales' mean, then one scale per 256 codes; or None.
    mean: uint8, fp32 bytes, one mean per block (normalization "standard"); or None.
    blocksize: elements per scale; 0: one scale for the whole tensor.
    codebook: the 16 values, for quant_type "custom"; else None.
    """

    packed: Tensor
    absmax: Tensor
    nested: Tensor | None
    mean: Tensor | None
    shape: torch.Size
    dtype: torch.dtype = torch.float32
    blocksize: int = 64
    quant_type: str = "nf4"
    codebook: tuple[float, ...] | None = None

    def op_args(self) -> ops.W4:
        """The arguments of torch.ops.qlora_ext.* that describe the weight, in schema order."""
        return (
            self.packed,
            self.absmax,
            self.nested,
            self.mean,
            tuple(self.shape),  # parsed faster than a torch.Size
            self.blocksize,
            self.quant_type,
            self.codebook,
        )

    @property
    def is_stack(self) -> bool:
        """Whether this is a stack of experts, as `quantize_stack_4bit` makes it."""
        return self.absmax.dim() == 2

    def __getitem__(self, index: int | slice) -> QuantizedTensor:
        """One expert of a stack, or a stack of some, without a copy. Raises TypeError if this is
        not a stack or index is neither an int nor a slice of step 1, IndexError if it is out of
        range."""
        step = index.step if isinstance(index, slice) else None
        if not self.is_stack or not isinstance(index, (int, slice)) or step not in (None, 1):
            raise TypeError(
                f"QuantizedTensor: index is {shorten(index)} into shape {list(self.shape)}, want "
                "an int or a slice of step 1 into a stack of experts"
            )
        E = self.shape[0]
        if isinstance(index, int):
            if not -E <= index < E:
                raise IndexError(f"QuantizedTensor: index is {index}, want one of {E} experts")
            shape = self.shape[1:]
        else:
            shape = torch.Size((len(range(E)[index]), *self.shape[1:]))

        def part(t):
            return None if t is None else t[index]

        return dataclasses.replace(
            self,
            packed=part(self.packed),
            absmax=part(self.absmax),
            nested=part(self.nested),
            mean=part(self.mean),
            shape=shape,
        )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        """The number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes and all statistics."""
        return sum(
            t.nbytes for t in (self.packed, self.absmax, self.nested, self.mean) if t is not None
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element (4.127 for NF4, block 64, double-quantized)."""
        return 8 * self.nbytes / max(self.numel(), 1)

    @property
    def values(self) -> tuple[float, ...]:
        """The codebook, by code."""
        return self.codebook or tuple(_C.codebooks()[self.quant_type])

    def to(self, *args, **kwargs) -> QuantizedTensor:
        """Moves to a device, changes `dtype` (of dequantize_4bit's default output), or both. Takes
        torch.Tensor.to's arguments. The stored bytes never change."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype not in _DTYPES.values():
            raise TypeError(
                f"QuantizedTensor.to: dtype is {dtype}, want float32, float16 or bfloat16"
            )

        def move(t):
            return t if t is None or device is None else t.to(device, non_blocking=non_blocking)

        return dataclasses.replace(
            self,
            packed=move(self.packed),
            absmax=move(self.absmax),
            nested=move(self.nested),
            mean=move(self.mean),
            dtype=dtype or self.dtype,
        )

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape={list(self.shape)}, dtype={self.dtype}, "
            f"quant_type={self.quant_type!r}, blocksize={self.blocksize or None}, "
            f"{self.bits_per_weight:.3f} bits per weight, device={self.device})"
        )

    # bitsandbytes' keys ---------------------------------------------------------------------

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """bitsandbytes' state-dict entries: `prefix`, `prefix.absmax`, `prefix.quant_map`,
        `prefix.nested_absmax`, `prefix.nested_quant_map`, `prefix.quant_state.bitsandbytes__nf4`.

        What bitsandbytes does not have (any quant_type but nf4 and fp4, `mean`) is stored in the
        same way, under names that bitsandbytes refuses. Raises ValueError for a stack of experts.
        """
        if self.is_stack:
            raise ValueError(
                f"QuantizedTensor.state_dict: shape is {list(self.shape)}, a stack of experts, "
                "which bitsandbytes' keys cannot describe; want one expert (q[e])"
            )
        return bitsandbytes_keys.entries(self, prefix)

    @classmethod
    def from_state_dict(cls, d: Mapping[str, Tensor], prefix: str = "weight") -> QuantizedTensor:
        """Reads what `state_dict` or bitsandbytes wrote, with any quant_storage.

        It trusts nothing. Raises ValueError for a wrong size, an unknown type, a hostile
        description, or a tensor whose memory does not hold its values (quantized by torch, nested,
        sparse, conjugate, negative), and KeyError for a missing key; the error names the entry.
        Raises TypeError unless d is a mapping and prefix a str."""
        if not isinstance(d, Mapping):
            raise TypeError(
                f"QuantizedTensor.from_state_dict: d is a {type(d).__name__}, want a mapping of "
                "names to tensors"
            )
        fields = bitsandbytes_keys.fields(d, prefix)
        fields["packed"] = view_matrix(fields["packed"], fields["shape"])
        return cls(**fields)


_TENSORS = ("packed", "absmax", "nested", "mean")


def _flatten_with_keys(q: QuantizedTensor):
    present = tuple(name for name in _TENSORS if getattr(q, name) is not None)
    context = (present, q.shape, q.dtype, q.blocksize, q.quant_type, q.codebook)
    return [(pytree.GetAttrKey(name), getattr(q, name)) for name in present], context


def _flatten(q: QuantizedTensor):
    keyed, context = _flatten_with_keys(q)
    return [tensor for _, tensor in keyed], context


def _unflatten(tensors, context):
    present, *rest = context
    by_name = dict(zip(present, tensors, strict=True))
    return QuantizedTensor(*(by_name.get(name) for name in _TENSORS), *rest)


pytree.register_pytree_node(
    QuantizedTensor,
    _flatten,
    _unflatten,
    serialized_type_name="qlora_ext.QuantizedTensor",
    flatten_with_keys_fn=_flatten_with_keys,
)
