"""A 4-bit tensor as plain bytes, and the functions that make and use one.

The layout is bitsandbytes' (docs/format.md): `packed` holds two codes a byte, one scale per
`blocksize` elements, the scales themselves in 8 bits when double-quantized. Nothing here is a
tensor subclass: the fields are plain frozen uint8 tensors.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import _C, ops
from .checks import (
    FLOAT_MAX,
    check_input,
    check_scaling,
    is_number,
    lacks_data,
    not_stored,
    short,
)

QUANT_TYPES = (*_C.codebooks(), "custom")
NORMALIZATIONS = ("absmax", "standard", "none")
COMPANDINGS = ("none", "logarithmic", "exponential")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT_DTYPES = tuple(_DTYPES.values())
_NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class QuantConfig:
    """How a weight becomes 4 bits. The default is QLoRA's: NF4, block 64, double quantization.

    quant_type: "nf4", "fp4", "linear", or "custom" with `codebook`, any 16 finite values.
    blocksize: elements per scale, a power of two from 32 to 4096, or None for one per tensor.
    double_quant: scales in 8 bits (4.127 bits per weight at block 64) instead of fp32 (4.5).
    normalization: "absmax" (w / max|w|), "standard" ((w - mean) / (std_factor * std), clipped to
        [-1, 1]; stores two statistics), or "none" (values taken as they are; no scales).
    companding: "none", "logarithmic" (sign(w) log(1 + k|w|)) or "exponential"
        (sign(w) (exp(k|w|) - 1)), both normalised to [-1, 1], with k = companding_k.

    Raises ValueError for a value outside these.
    """

    quant_type: str = "nf4"
    blocksize: int | None = 64
    double_quant: bool = True
    normalization: str = "absmax"
    codebook: tuple[float, ...] | None = None
    companding: str = "none"
    companding_k: float = 1.0
    std_factor: float = 3.0

    def __post_init__(self):
        def check(ok: bool, argument: str, want: str):
            if not ok:
                raise ValueError(
                    f"QuantConfig: {argument} is {short(getattr(self, argument))}, want {want}"
                )

        check(self.quant_type in QUANT_TYPES, "quant_type", f"one of {QUANT_TYPES}")
        check(isinstance(self.double_quant, bool), "double_quant", "True or False")
        check(is_number(self.companding_k), "companding_k", "a number that fits a float")
        check(is_number(self.std_factor), "std_factor", "a number that fits a float")
        check(
            self.blocksize is None
            or (type(self.blocksize) is int and self.blocksize in BLOCKSIZES),
            "blocksize",
            f"one of {BLOCKSIZES}, or None for one scale per tensor",
        )
        check(self.normalization in NORMALIZATIONS, "normalization", f"one of {NORMALIZATIONS}")
        check(self.companding in COMPANDINGS, "companding", f"one of {COMPANDINGS}")
        if self.codebook is not None:
            values = self.codebook.tolist() if hasattr(self.codebook, "tolist") else self.codebook
            check(
                isinstance(values, (list, tuple)) and all(is_number(v) for v in values),
                "codebook",
                "a list of 16 numbers that fit a float, or None",
            )
            object.__setattr__(self, "codebook", tuple(float(v) for v in values))
        check(
            (self.quant_type == "custom") == (self.codebook is not None),
            "codebook",
            "16 values with quant_type 'custom', and None with any other",
        )
        # The compiled half has the last word on values (16 of them, finite, constants in range).
        try:
            _C.resolve_codebook(
                self.quant_type, self.codebook, self.companding, float(self.companding_k)
            )
        except RuntimeError as error:
            raise ValueError(str(error).replace("quantize_4bit", "QuantConfig", 1)) from None
        check(0 < self.std_factor <= 1e6, "std_factor", "a factor in (0, 1e6]")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        fields = dataclasses.asdict(self)
        fields["codebook"] = None if self.codebook is None else list(self.codebook)
        return fields

    @property
    def stored_quant_type(self) -> str:
        """The quant_type of what is stored: companding turns a named codebook into a custom one."""
        return self.quant_type if self.companding == "none" else "custom"

    @property
    def stored_codebook(self) -> tuple[float, ...] | None:
        """The 16 effective values of a custom codebook (fp32, by code), else None."""
        if self.stored_quant_type != "custom":
            return None
        values, _ = _C.resolve_codebook(
            self.quant_type, self.codebook, self.companding, float(self.companding_k)
        )
        return tuple(values)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 4 bits: `QuantizedTensor.shape` logical elements of `dtype`, as bytes.

    packed: uint8, two codes a byte, high nibble first; [out, in / 2] for a matrix with an even
        number of columns, else flat [ceil(numel / 2)].
    absmax: uint8: 8-bit scale codes [num_blocks] if `nested` is there, else fp32 bytes.
    nested: uint8, fp32 bytes: the scales' mean, then one scale per 256 codes; or None.
    mean: uint8, fp32 bytes, one mean per block (normalization "standard"); or None.
    blocksize: elements per scale, 0 for one per tensor.
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
        """The weight's arguments to torch.ops.qlora_ext.*, in schema order."""
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
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        """Logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and every statistic."""
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

    def to(self, *args, **kwargs) -> "QuantizedTensor":
        """Moves to a device and/or changes `dtype`, that of dequantize_4bit's default output; takes
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

        Codebooks and statistics that bitsandbytes does not have (any quant_type but nf4 and fp4,
        `mean`) are stored in the same way under names it will refuse.
        """
        _check_prefix("state_dict", prefix)
        device = self.device
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize or self.numel(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        entries = {
            prefix: self.packed.reshape(-1, 1),
            f"{prefix}.quant_map": torch.tensor(self.values, dtype=torch.float32, device=device),
        }
        if self.nested is None:
            entries[f"{prefix}.absmax"] = self.absmax.view(torch.float32)
        else:
            nested = self.nested.view(torch.float32)
            entries[f"{prefix}.absmax"] = self.absmax
            entries[f"{prefix}.nested_absmax"] = nested[1:].clone()
            entries[f"{prefix}.nested_quant_map"] = torch.tensor(_C.dynamic_map(), device=device)
            meta |= {
                "nested_blocksize": _NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": nested[0].item(),
            }
        if self.mean is not None:
            entries[f"{prefix}.mean"] = self.mean.view(torch.float32)
        text = json.dumps(meta).encode()
        entries[f"{prefix}.quant_state.bitsandbytes__{self.quant_type}"] = torch.tensor(
            list(text), dtype=torch.uint8, device=device
        )
        return entries

    @classmethod
    def from_state_dict(cls, d: Mapping[str, Tensor], prefix: str = "weight") -> "QuantizedTensor":
        """Reads what `state_dict` or bitsandbytes wrote, any quant_storage. Nothing is trusted: a
        wrong size, an unknown type, a tensor whose memory does not hold its values (quantized by
        torch, nested, sparse, conjugate, negative) or a hostile description is a ValueError, a
        missing key a KeyError, and each names what it is about. TypeError unless d is a mapping and
        prefix a str."""
        if not isinstance(d, Mapping):
            raise TypeError(
                f"QuantizedTensor.from_state_dict: d is a {type(d).__name__}, want a mapping of "
                "names to tensors"
            )
        _check_prefix("from_state_dict", prefix)
        return _StateReader(d, prefix).read()


def _check_prefix(function: str, prefix) -> None:
    if not isinstance(prefix, str):
        raise TypeError(
            f"QuantizedTensor.{function}: prefix is a {type(prefix).__name__}, want a str"
        )
    if "\0" in prefix:
        raise ValueError(
            f"QuantizedTensor.{function}: prefix is {short(prefix)}, want one without NUL"
        )


class _StateReader:
    def __init__(self, d: Mapping[str, Tensor], prefix: str):
        self.d = d
        self.prefix = prefix

    def fail(self, what: str) -> ValueError:
        # JSON can hold half a surrogate pair, which no terminal takes.
        what = what.encode("utf-8", "backslashreplace").decode()
        return ValueError(f"QuantizedTensor.from_state_dict: {self.prefix}: {what}")

    def tensor(self, suffix: str) -> Tensor:
        key = self.prefix + suffix
        if key not in self.d:
            raise KeyError(
                f"QuantizedTensor.from_state_dict: {key!r} is missing; with this prefix there are "
                f"{self.near()}"
            )
        return self.checked(key, self.d[key])

    def checked(self, key: str, value) -> Tensor:
        got = not_stored(value)
        if got is None and lacks_data(value):
            got = "a tensor without data"
        if got is not None:
            raise self.fail(f"{key} is {got}, want a tensor with data")
        if value.layout != torch.strided:
            raise self.fail(f"{key} has layout {value.layout}, want torch.strided")
        return value

    def near(self) -> list[str]:
        return sorted(
            k for k in self.names() if k == self.prefix or k.startswith(self.prefix + ".")
        )

    def names(self) -> list[str]:
        return [key for key in self.d if isinstance(key, str)]

    def read(self) -> QuantizedTensor:
        meta = self.read_meta()
        shape, numel, blocksize = self.read_sizes(meta)
        quant_type, codebook = self.read_codebook(meta)
        packed = _as_bytes(self.tensor(""))
        if packed.numel() != (numel + 1) // 2:
            raise self.fail(
                f"packed has {packed.numel()} bytes, want {(numel + 1) // 2} "
                f"for shape {list(shape)}"
            )
        num_blocks = -(-numel // blocksize)
        absmax, nested = self.read_scales(meta, num_blocks)
        mean = None
        if f"{self.prefix}.mean" in self.d:
            mean = self.floats(".mean", num_blocks)
        dtype = _DTYPES.get(str(meta.get("dtype")))
        if dtype is None:
            raise self.fail(
                f"dtype is {str(meta.get('dtype'))[:40]!r}, want one of {sorted(_DTYPES)}"
            )
        return QuantizedTensor(
            _view_matrix(packed, shape),
            absmax,
            nested,
            mean,
            shape,
            dtype,
            blocksize if blocksize in BLOCKSIZES else 0,
            quant_type,
            codebook,
        )

    def read_meta(self) -> dict[str, Any]:
        keys = [k for k in self.names() if k.startswith(f"{self.prefix}.quant_state.")]
        if any("\0" in key for key in keys):
            raise self.fail(f"the state dict has the key {short(keys[0])}, want one without NUL")
        if len(keys) != 1:
            raise KeyError(
                "QuantizedTensor.from_state_dict: want one key "
                f"{self.prefix + '.quant_state.bitsandbytes__*'!r}, "
                f"got {keys}; with this prefix there are {self.near()}"
            )
        raw = self.checked(keys[0], self.d[keys[0]])
        try:
            meta = json.loads(bytes(raw.to("cpu", torch.uint8).reshape(-1).tolist()))
        except (ValueError, RecursionError) as error:
            raise self.fail(f"{keys[0]} is not JSON ({error})") from None
        if not isinstance(meta, dict):
            raise self.fail(f"{keys[0]} holds a {type(meta).__name__}, want a JSON object")
        return meta

    def read_sizes(self, meta) -> tuple[torch.Size, int, int]:
        shape = meta.get("shape")
        if (
            not isinstance(shape, list)
            or len(shape) > 8
            or not all(type(s) is int and 0 <= s < 2**48 for s in shape)
        ):
            raise self.fail(f"shape is {str(shape)[:80]}, want at most 8 sizes of 0 or more")
        numel = math.prod(shape)
        blocksize = meta.get("blocksize")
        if type(blocksize) is not int or (blocksize not in BLOCKSIZES and blocksize != numel):
            raise self.fail(
                f"blocksize is {str(blocksize)[:40]}, want one of {BLOCKSIZES}, "
                f"or {numel} (per tensor)"
            )
        return torch.Size(shape), numel, max(blocksize, 1)

    def read_codebook(self, meta) -> tuple[str, tuple[float, ...] | None]:
        quant_type = meta.get("quant_type")
        if not isinstance(quant_type, str) or quant_type not in QUANT_TYPES:
            raise self.fail(f"quant_type is {str(quant_type)[:40]!r}, want one of {QUANT_TYPES}")
        table = self.tensor(".quant_map")
        if table.shape != (16,) or table.dtype != torch.float32 or not table.isfinite().all():
            raise self.fail(
                f"quant_map is {table.dtype} {list(table.shape)}, want 16 finite float32 values"
            )
        values = tuple(table.tolist())
        if quant_type == "custom":
            return quant_type, values
        if values != tuple(_C.codebooks()[quant_type]):
            raise self.fail(
                f"quant_map differs from the {quant_type} table, whose codes these are said to be"
            )
        return quant_type, None

    def read_scales(self, meta, num_blocks: int) -> tuple[Tensor, Tensor | None]:
        if "nested_offset" not in meta:
            return self.floats(".absmax", num_blocks), None
        absmax = self.tensor(".absmax")
        if absmax.dtype != torch.uint8 or absmax.numel() != num_blocks:
            raise self.fail(
                f"absmax is {absmax.dtype} {list(absmax.shape)}, want {num_blocks} uint8 codes"
            )
        offset = meta["nested_offset"]
        if type(offset) not in (int, float) or not abs(offset) <= FLOAT_MAX:
            raise self.fail(f"nested_offset is {str(offset)[:40]}, want a finite float32")
        if meta.get("nested_blocksize") != _NESTED_BLOCKSIZE:
            raise self.fail(
                f"nested_blocksize is {str(meta.get('nested_blocksize'))[:40]}, "
                f"want {_NESTED_BLOCKSIZE}"
            )
        table = self.tensor(".nested_quant_map")
        if table.shape != (256,) or table.dtype != torch.float32:
            raise self.fail(
                f"nested_quant_map is {table.dtype} {list(table.shape)}, want 256 float32 values"
            )
        # bitsandbytes computes the map by torch.linspace, whose last bit depends on the CPU.
        # Neighbouring entries are at least 0.7% apart.
        ours = torch.tensor(_C.dynamic_map())
        if not torch.allclose(table.detach().cpu(), ours, rtol=1e-6, atol=0):
            raise self.fail("nested_quant_map differs from the signed dynamic map")
        absmax2 = self.floats(".nested_absmax", -(-num_blocks // _NESTED_BLOCKSIZE)).view(
            torch.float32
        )
        first = torch.tensor([offset], dtype=torch.float32, device=absmax2.device)
        return absmax.reshape(-1), torch.cat([first, absmax2]).view(torch.uint8)

    def floats(self, suffix: str, count: int) -> Tensor:
        values = self.tensor(suffix)
        if values.dtype != torch.float32 or values.numel() != count:
            raise self.fail(
                f"{suffix[1:]} is {values.dtype} {list(values.shape)}, want {count} float32 values"
            )
        if not values.isfinite().all():
            raise self.fail(f"{suffix[1:]} holds a NaN or an infinity, want finite values")
        return _as_bytes(values)


def _as_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1)
    if flat.stride() != (1,):  # of one element: contiguous() leaves that
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


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


def _view_matrix(packed: Tensor, shape) -> Tensor:
    if len(shape) == 2 and shape[1] % 2 == 0:
        return packed.view(shape[0], shape[1] // 2)
    return packed


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_4bit: weight is a {type(weight).__name__}, want a torch.Tensor")
    if weight.dtype not in _DTYPES.values():
        raise TypeError(
            f"quantize_4bit: weight has dtype {weight.dtype}, want float32, float16 or bfloat16"
        )
    if weight.device.type == "meta":
        raise ValueError(
            "quantize_4bit: weight is on the meta device and has no values, want cpu or cuda"
        )
    if weight.is_nested:
        raise TypeError("quantize_4bit: weight is a nested tensor, want a dense tensor")
    if weight.layout != torch.strided:
        raise TypeError(f"quantize_4bit: weight has layout {weight.layout}, want torch.strided")


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int | None = 64,
    double_quant: bool = True,
    normalization: str = "absmax",
    codebook=None,
    companding: str = "none",
    companding_k: float = 1.0,
    std_factor: float = 3.0,
) -> QuantizedTensor:
    """Quantizes a tensor to 4 bits (QLoRA, arXiv 2305.14314; settings: see QuantConfig).

    weight: any shape and strides, float32, float16 or bfloat16, on the CPU or a CUDA device.
    Returns a QuantizedTensor on the same device, with the same bytes on every backend.

    On a GPU this reads one flag back (it waits for the device) and cannot be captured in a graph.

    Raises ValueError for a setting out of range or a weight without data, TypeError for a dtype
    or layout it cannot take, RuntimeError naming the index of a NaN or Inf weight.
    """
    return quantize_with(
        weight,
        QuantConfig(
            quant_type,
            blocksize,
            double_quant,
            normalization,
            codebook,
            companding,
            companding_k,
            std_factor,
        ),
    )


def quantize_with(weight: Tensor, config: QuantConfig) -> QuantizedTensor:
    """`quantize_4bit` with its settings in a QuantConfig."""
    _check_weight(weight)
    per_tensor = config.blocksize is None or config.normalization == "none"
    blocksize = 0 if per_tensor else config.blocksize
    packed, absmax, mean = torch.ops.qlora_ext.quantize_4bit.default(
        weight.detach(),
        blocksize,
        config.quant_type,
        config.codebook,
        config.normalization,
        config.std_factor,
        config.companding,
        float(config.companding_k),
    )
    nested = None
    if config.double_quant and config.normalization != "none":  # "none" stores the scale 1, exactly
        absmax, nested = torch.ops.qlora_ext.quantize_absmax.default(absmax)
    return QuantizedTensor(
        _view_matrix(packed, weight.shape),
        absmax,
        nested,
        mean if config.normalization == "standard" else None,
        weight.shape,
        weight.dtype,
        blocksize,
        config.stored_quant_type,
        config.stored_codebook,
    )


def dequantize_4bit(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The dense tensor: codebook[code] * scale (+ mean), computed in fp32 and rounded once.

    dtype: float32, float16 or bfloat16; None takes out's, else q.dtype. out: a contiguous tensor
    of q.shape to write into. A value beyond dtype's range (65,504 for float16) becomes an infinity,
    as in torch's own `.to(dtype)`: this op checks nothing per value. The functions that put dense
    weights into a model or file (merge_and_unload, model.dequantize) refuse it.

    Raises RuntimeError if the statistics do not fit the shape, or `out` does not; ValueError if
    `dtype` contradicts `out`.
    """
    if out is not None and out.requires_grad:
        raise ValueError("dequantize_4bit: out requires grad, want a tensor that does not")
    if out is not None and dtype is not None and dtype != out.dtype:
        raise ValueError(f"dequantize_4bit: dtype is {dtype}, want out's {out.dtype} (or None)")
    return ops.dequantize_4bit(_op_args("dequantize_4bit", q), dtype or q.dtype, out)


def _op_args(function: str, q: QuantizedTensor) -> ops.W4:
    if not isinstance(q, QuantizedTensor):
        raise TypeError(
            f"{function}: q is a {type(q).__name__}, want a QuantizedTensor, as quantize_4bit makes"
        )
    return q.op_args()


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on, as torch's own linear would take it."""
    # Asked without a device first, which costs a tenth of a small layer; and "meta" is not one
    # that autocast knows.
    if (
        torch._C._is_any_autocast_enabled()
        and x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype in FLOAT_DTYPES  # it leaves integers and float64 alone
    ):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def linear_4bit(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, decoding W inside the multiplication.

    x [..., K] float32, bfloat16 or float16; q.shape [N, K]; bias [N] or None. Returns [..., N] of
    x's dtype (autocast's, where it is on), accumulated in fp32 and rounded once. Differentiable in
    x and bias; the saved tensors are the packed bytes. Raises RuntimeError naming a shape, dtype or
    device that does not fit.
    """
    check_input("linear_4bit", x=x)
    return ops.gemm_4bit(autocast(x), _op_args("linear_4bit", q), bias)


def lora_linear_4bit(
    x: Tensor,
    q: QuantizedTensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + bias + scaling (dropout(x) A^T) B^T: a 4-bit layer with its LoRA bypass fused in.

    lora_A [r, K] and lora_B [N, r] of one dtype (float32 is what fine-tuning wants, also with
    bfloat16 or float16 x), scaling = alpha / r (LoRA, arXiv 2106.09685). `dropout` is the
    probability of zeroing an element of the bypass's input; it is always applied when > 0, so
    pass 0 for evaluation. Otherwise as `linear_4bit`; differentiable in x, lora_A, lora_B, bias.
    Raises ValueError for a scaling that is not finite or does not fit float32.
    """
    check_input("lora_linear_4bit", x=x, lora_A=lora_A, lora_B=lora_B)
    scaling = check_scaling("lora_linear_4bit", scaling)
    x = autocast(x)
    args = _op_args("lora_linear_4bit", q)
    if dropout == 0.0:
        return ops.lora_gemm_4bit(x, args, lora_A, lora_B, scaling, bias)
    dropped = torch.nn.functional.dropout(x, dropout, training=True)
    return ops.gemm_4bit(x, args, bias, ops.lora_shrink(dropped, lora_A, scaling), lora_B)


def merge_lora_4bit(
    q: QuantizedTensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """dequantize(W) + scaling B A, summed in fp32 and rounded once to `dtype`: a dense [N, K].

    lora_A [r, K], lora_B [N, r] of one dtype. Raises RuntimeError for shapes that do not fit,
    ValueError for a scaling that is not finite or does not fit float32. A sum beyond float16's
    range becomes an infinity here; merge_and_unload names the layer instead.
    """
    check_input("merge_lora_4bit", lora_A=lora_A, lora_B=lora_B)
    scaling = check_scaling("merge_lora_4bit", scaling)
    return ops.merge_lora_4bit(_op_args("merge_lora_4bit", q), lora_A, lora_B, scaling, dtype)
