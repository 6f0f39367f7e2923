"""Writes a packed weight under bitsandbytes' state-dict keys, and reads and checks such keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOAT_MAX, lacks_data, not_stored
from ..ops import _C
from ..text import shorten
from .config import _DTYPES, _NESTED_BLOCKSIZE, BLOCKSIZES, QUANT_TYPES


def _check_prefix(function: str, prefix) -> None:
    if not isinstance(prefix, str):
        raise TypeError(
            f"QuantizedTensor.{function}: prefix is a {type(prefix).__name__}, want a str"
        )
    if "\0" in prefix:
        raise ValueError(
            f"QuantizedTensor.{function}: prefix is {shorten(prefix)}, want one without NUL"
        )


def entries(q, prefix: str) -> dict[str, Tensor]:
    """The state-dict entries of a QuantizedTensor; see its state_dict."""
    _check_prefix("state_dict", prefix)
    device = q.device
    meta: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.blocksize or q.numel(),
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    entries = {
        prefix: q.packed.reshape(-1, 1),
        f"{prefix}.quant_map": torch.tensor(q.values, dtype=torch.float32, device=device),
    }
    if q.nested is None:
        entries[f"{prefix}.absmax"] = q.absmax.view(torch.float32)
    else:
        nested = q.nested.view(torch.float32)
        entries[f"{prefix}.absmax"] = q.absmax
        entries[f"{prefix}.nested_absmax"] = nested[1:].clone()
        entries[f"{prefix}.nested_quant_map"] = torch.tensor(_C.dynamic_map(), device=device)
        meta |= {
            "nested_blocksize": _NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": nested[0].item(),
        }
    if q.mean is not None:
        entries[f"{prefix}.mean"] = q.mean.view(torch.float32)
    text = json.dumps(meta).encode()
    entries[f"{prefix}.quant_state.bitsandbytes__{q.quant_type}"] = torch.tensor(
        list(text), dtype=torch.uint8, device=device
    )
    return entries


def fields(d: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The fields of a QuantizedTensor, with packed flat. Raises as its from_state_dict does."""
    _check_prefix("from_state_dict", prefix)
    return _StateReader(d, prefix).read()


class _StateReader:
    def __init__(self, d: Mapping[str, Tensor], prefix: str):
        self.d = d
        self.prefix = prefix

    def fail(self, what: str) -> ValueError:
        # JSON can hold half a surrogate pair, which a terminal cannot print.
        what = what.encode("utf-8", "backslashreplace").decode()
        return ValueError(f"QuantizedTensor.from_state_dict: {self.prefix}: {what}")

    def tensor(self, suffix: str) -> Tensor:
        key = self.prefix + suffix
        if key not in self.d:
            raise KeyError(
                f"QuantizedTensor.from_state_dict: {key!r} is missing; the keys with this prefix "
                f"are {self.near()}"
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

    def read(self) -> dict[str, Any]:
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
        return {
            "packed": packed,
            "absmax": absmax,
            "nested": nested,
            "mean": mean,
            "shape": shape,
            "dtype": dtype,
            "blocksize": blocksize if blocksize in BLOCKSIZES else 0,
            "quant_type": quant_type,
            "codebook": codebook,
        }

    def read_meta(self) -> dict[str, Any]:
        keys = [k for k in self.names() if k.startswith(f"{self.prefix}.quant_state.")]
        if any("\0" in key for key in keys):
            raise self.fail(f"the state dict has the key {shorten(keys[0])}, want one without NUL")
        if len(keys) != 1:
            raise KeyError(
                "QuantizedTensor.from_state_dict: want one key "
                f"{self.prefix + '.quant_state.bitsandbytes__*'!r}, "
                f"got {keys}; the keys with this prefix are {self.near()}"
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
                f"quant_map differs from the {quant_type} table, want that table for quant_type "
                f"{quant_type!r}"
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
        # bitsandbytes computes the map with torch.linspace, whose last bit depends on the CPU.
        # Neighbouring entries differ by at least 0.7%, so this tolerance confuses none.
        ours = torch.tensor(_C.dynamic_map())
        if not torch.allclose(table.detach().cpu(), ours, rtol=1e-6, atol=0):
            raise self.fail(
                "nested_quant_map differs from bitsandbytes' signed dynamic map, want that map"
            )
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
    if flat.stride() != (1,):  # contiguous() keeps any stride of a tensor with one element
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
