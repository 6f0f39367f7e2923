"""`qlora-ext inspect`: what a checkpoint or adapter holds, read from the headers of its files."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import _C
from ..checks import count, size
from ..quantized_tensor import BLOCKSIZES
from .errors import CliError

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}
OURS = ("weight_absmax", "weight_nested", "weight_mean", "weight_codebook")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight, with the tensors that belong to it."""

    name: str
    kind: str  # "nf4, block 64, nested", "BF16", "LoRA r=8"
    shape: tuple[int, ...] | None  # logical; None where the file does not say
    numel: int  # logical weights
    nbytes: int
    packed: bool

    @property
    def bits(self) -> float:
        """Stored bits per weight: codes and statistics; the 64 bytes of codebook are left out."""
        return 8 * self.nbytes / max(self.numel, 1)


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything in a folder or file."""

    format: str
    files: list[Path]
    settings: dict
    layers: list[Layer]
    nbytes: int


class _Headers:
    def __init__(self, files: list[Path]):
        self.files = files
        self.tensors: dict[str, tuple[str, tuple[int, ...], Path]] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt", backend="pread") as handle:
                    names = handle.keys()
                    for key in names:
                        part = handle.get_slice(key)
                        self.tensors[key] = (part.get_dtype(), tuple(part.get_shape()), path)
            except (SafetensorError, OSError) as error:
                raise CliError(f"{path} is damaged or not a safetensors file ({error})") from None

    def numel(self, key: str) -> int:
        return math.prod(self.tensors[key][1])

    def nbytes(self, key: str) -> int:
        return self.numel(key) * BITS.get(self.tensors[key][0], 8) // 8

    def read(self, key: str) -> torch.Tensor:
        with safe_open(self.tensors[key][2], framework="pt", backend="pread") as handle:
            return handle.get_tensor(key)


def read(path: Path) -> Contents:
    """What is in a checkpoint's or adapter's folder, or in one safetensors file."""
    files, settings, kind = _find(path)
    headers = _Headers(files)
    names = headers.tensors
    if any(".quant_state.bitsandbytes__" in key for key in names):
        kind = "bitsandbytes, 4 bits"
    elif any(key.endswith(".weight_absmax") for key in names):
        kind = "qlora_ext, 4 bits"
    elif any(".lora_A." in key or ".lora_embedding_A" in key for key in names):
        kind = "LoRA adapter (PEFT's format)"
    elif any(key.endswith(".SCB") for key in names):
        kind = "bitsandbytes, 8 bits"
    layers = _layers(headers, settings)
    return Contents(kind, files, settings, layers, sum(headers.nbytes(key) for key in names))


def _find(path: Path) -> tuple[list[Path], dict, str]:
    if path.is_file():
        return [path], {}, "safetensors file"
    if not path.is_dir():
        raise CliError(f"{path} is neither a folder nor a file")
    adapter = path / "adapter_config.json"
    if adapter.exists():
        from ..files import read_json

        files = sorted(path.glob("adapter_model*.safetensors"))
        if not files:
            raise CliError(f"{path} has no adapter_model.safetensors")
        return files, read_json(adapter), "adapter"
    from ..files import read_json, safetensors_files

    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    return safetensors_files(path), config, "unquantized"


def _layers(headers: _Headers, settings: dict) -> list[Layer]:
    found, taken = [], set()
    for key in headers.tensors:
        if key.endswith(".weight_absmax"):
            found.append(_ours(headers, settings, key.removesuffix(".weight_absmax"), taken))
        elif ".quant_state.bitsandbytes__" in key:
            found.append(_bitsandbytes(headers, key, taken))
        elif key.endswith(".lora_A.weight"):
            found.append(_lora(headers, settings, key, taken))
    for key, (dtype, shape, _) in headers.tensors.items():
        if key not in taken:
            numel = headers.numel(key)
            name = key.removesuffix(".weight")
            found.append(Layer(name, dtype, shape, numel, headers.nbytes(key), False))
    order = {name: i for i, name in enumerate(sorted(headers.tensors, key=_natural))}
    return sorted(found, key=lambda layer: order.get(f"{layer.name}.weight", len(order)))


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _describe(quant_type: str, blocksize: int, nested: bool, mean: bool) -> str:
    block = f"block {blocksize}" if blocksize else "one scale"
    text = f"{quant_type}, {block}"
    return text + (", nested" if nested else "") + (", with means" if mean else "")


def _ours(headers: _Headers, settings: dict, name: str, taken: set) -> Layer:
    keys = [
        f"{name}.weight",
        *(f"{name}.{key}" for key in OURS if f"{name}.{key}" in headers.tensors),
    ]
    if keys[0] not in headers.tensors:
        raise CliError(f"{name}.weight_absmax is there without {name}.weight: the file is damaged")
    taken.update(keys)
    packed = headers.tensors[keys[0]][1]
    # [N, K / 2] where K is even; else the bytes alone, and the shape is the model's to know.
    flat = len(packed) != 2 or packed[1] == 1
    numel = 2 * headers.numel(keys[0])
    nested = f"{name}.weight_nested" in headers.tensors
    blocks = headers.numel(f"{name}.weight_absmax") // (1 if nested else 4)
    blocksize = next((b for b in BLOCKSIZES if -(-numel // b) == blocks), 0)
    quant_type = (settings.get("quantization_config") or {}).get("quant_type")
    codebook = f"{name}.weight_codebook"
    if codebook in headers.tensors:
        values = tuple(headers.read(codebook).view(torch.float32).tolist())
        known = {tuple(table): name for name, table in _C.codebooks().items()}
        quant_type = known.get(values, "custom")
    nbytes = sum(headers.nbytes(key) for key in keys if key != codebook)
    return Layer(
        name,
        _describe(
            quant_type or "4 bits", blocksize, nested, f"{name}.weight_mean" in headers.tensors
        ),
        None if flat else (packed[0], 2 * packed[1]),
        numel,
        nbytes,
        True,
    )


def _bitsandbytes(headers: _Headers, key: str, taken: set) -> Layer:
    stem = key.partition(".quant_state.")[0]
    keys = [k for k in headers.tensors if k == stem or k.startswith(f"{stem}.")]
    taken.update(keys)
    try:
        meta = json.loads(bytes(headers.read(key).to(torch.uint8).reshape(-1).tolist()))
        shape = tuple(int(n) for n in meta["shape"])
        kind = _describe(
            str(meta["quant_type"]), int(meta["blocksize"]), "nested_offset" in meta, False
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"{key} is damaged ({type(error).__name__}: {error})") from None
    nbytes = sum(headers.nbytes(k) for k in keys if not k.endswith("quant_map") and k != key)
    return Layer(stem.removesuffix(".weight"), kind, shape, math.prod(shape), nbytes, True)


def _lora(headers: _Headers, settings: dict, key: str, taken: set) -> Layer:
    name = key.removesuffix(".lora_A.weight")
    other = f"{name}.lora_B.weight"
    if other not in headers.tensors:
        raise CliError(f"{key} is there without {other}: the adapter is damaged")
    taken.update((key, other))
    r, K = headers.tensors[key][1]
    N = headers.tensors[other][1][0]
    short = name.removeprefix("base_model.model.")
    numel = headers.numel(key) + headers.numel(other)
    nbytes = headers.nbytes(key) + headers.nbytes(other)
    return Layer(short, f"LoRA r={r}, {headers.tensors[key][0]}", (N, K), numel, nbytes, False)


def rows(contents: Contents, every: bool) -> list[list[str]]:
    """Table rows; layers of a stack that are alike share one unless `every`."""
    groups: dict[tuple, list[Layer]] = defaultdict(list)
    for layer in contents.layers:
        name = layer.name if every else re.sub(r"\b\d+\b", "*", layer.name)
        groups[name, layer.kind, layer.shape].append(layer)
    return [
        [
            name + (f"  x{len(layers)}" if len(layers) > 1 else ""),
            kind,
            "?" if shape is None else " x ".join(map(str, shape)) or "1",
            f"{sum(x.numel for x in layers):,}",
            f"{layers[0].bits:.3f}",
            size(sum(x.nbytes for x in layers)),
        ]
        for (name, kind, shape), layers in groups.items()
    ]


def summary(contents: Contents) -> list[str]:
    """Lines above the table."""
    numel = sum(layer.numel for layer in contents.layers)
    packed = [layer for layer in contents.layers if layer.packed]
    weights = sum(layer.numel for layer in packed)
    lines = [
        f"{contents.format}: {count(numel, 'weight')} in {size(contents.nbytes)}, "
        f"{count(len(contents.files), 'file')}"
    ]
    if packed:
        bits = 8 * sum(layer.nbytes for layer in packed) / weights
        lines.append(
            f"packed: {count(len(packed), 'layer')}, {weights / numel:.1%} of the weights, "
            f"{bits:.3f} bits per packed weight, {8 * contents.nbytes / numel:.3f} over all"
        )
    settings = contents.settings
    if "peft_type" in settings:
        lines.append(
            f"{settings.get('peft_type')} for {settings.get('base_model_name_or_path')}: "
            f"r={settings.get('r')}, lora_alpha={settings.get('lora_alpha')}"
            + (", rsLoRA" if settings.get("use_rslora") else "")
            + (", DoRA" if settings.get("use_dora") else "")
        )
    elif settings:
        lines.append(
            f"architecture {', '.join(settings.get('architectures') or ['unknown'])} "
            f"({settings.get('model_type')})"
        )
    return lines


def as_json(contents: Contents) -> dict:
    """The same for programs."""
    return {
        "format": contents.format,
        "files": [path.name for path in contents.files],
        "bytes": contents.nbytes,
        "layers": [
            {**dataclasses.asdict(layer), "bits_per_weight": layer.bits}
            for layer in contents.layers
        ],
    }
