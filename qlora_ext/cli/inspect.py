"""`qlora-ext inspect`: lists a checkpoint's or adapter's layers, from the headers of its files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path

import torch

from ..files import MAX_NUMEL, SafetensorsFiles, read_json, reading, safetensors_files
from ..models.config_file import check_config
from ..ops import _C
from ..tensor.config import BLOCKSIZES
from ..text import first_line, format_bytes, plural, printable, shorten
from .errors import CliError

MARK = ".quant_state.bitsandbytes__"
OURS = ("weight_absmax", "weight_nested", "weight_mean", "weight_codebook")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight, with the tensors that belong to it."""

    name: str
    kind: str  # "nf4, block 64, nested", "BF16", "LoRA r=8"
    shape: tuple[int, ...] | None  # logical; None if the file does not say
    numel: int  # logical weights
    nbytes: int
    packed: bool

    @property
    def bits(self) -> float:
        """Stored bits per weight: codes and statistics, without the 64 bytes of the codebook."""
        return 8 * self.nbytes / max(self.numel, 1)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What `inspect` found in a folder or file."""

    format: str
    files: list[Path]
    settings: dict
    layers: list[Layer]
    nbytes: int


def read(path: Path) -> Contents:
    """Reads the contents of a checkpoint's or adapter's folder, or of one safetensors file."""
    files, settings, kind = _find(path)
    names = headers = SafetensorsFiles(files, any_dtype=True)
    if kind == "unquantized" and settings:
        check_config(path / "config.json", settings, headers)
    if any(MARK in key for key in names):
        kind = "bitsandbytes, 4 bits"
    elif any(key.endswith(".weight_absmax") for key in names):
        kind = "qlora_ext, 4 bits"
    elif any(".lora_A." in key or ".lora_embedding_A" in key for key in names):
        kind = "LoRA adapter (PEFT's format)"
    elif any(key.endswith(".SCB") for key in names):
        kind = "bitsandbytes, 8 bits"
    with reading(path, "is damaged"):
        layers = _layers(headers, settings)
    return Contents(kind, files, settings, layers, sum(headers.nbytes(key) for key in names))


def _find(path: Path) -> tuple[list[Path], dict, str]:
    if not os.path.lexists(path):
        raise CliError(
            f"{printable(str(path))} is neither a folder nor a file, want a checkpoint, an adapter "
            "or a safetensors file"
        )
    if not os.path.isdir(path):
        return [path], {}, "safetensors file"
    adapter = path / "adapter_config.json"
    if os.path.lexists(adapter):
        files = sorted(path.glob("adapter_model*.safetensors"))
        if not files:
            raise CliError(
                f"{path} has no adapter_model.safetensors: save the adapter with safetensors"
            )
        return files, read_json(adapter), "adapter"
    config = {}
    if os.path.lexists(path / "config.json"):
        config = read_json(path / "config.json")
    return safetensors_files(path), config, "unquantized"


def _layers(headers: SafetensorsFiles, settings: dict) -> list[Layer]:
    found, taken = [], set()
    stems = {key.partition(MARK)[0] for key in headers if MARK in key}
    inside = defaultdict(list)  # weight that bitsandbytes packed -> it and what belongs to it
    for key in headers if stems else ():
        parts = key.split(".")
        for stem in {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & stems:
            inside[stem].append(key)
    for key in headers:
        if key.endswith(".weight_absmax"):
            found.append(_ours(headers, settings, key.removesuffix(".weight_absmax"), taken))
        elif MARK in key:
            found.append(_bitsandbytes(headers, key, inside[key.partition(MARK)[0]], taken))
        elif key.endswith(".lora_A.weight"):
            found.append(_lora(headers, settings, key, taken))
    for key, shape in headers.shapes.items():
        if key not in taken:
            name = key.removesuffix(".weight")
            kind, numel, nbytes = headers.stored[key], headers.numel(key), headers.nbytes(key)
            found.append(Layer(name, kind, shape, numel, nbytes, False))
    order = {name: i for i, name in enumerate(sorted(headers, key=_natural))}
    return sorted(found, key=lambda layer: order.get(f"{layer.name}.weight", len(order)))


def _natural(name: str) -> list:
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _describe(quant_type: str, blocksize: int, nested: bool, mean: bool) -> str:
    block = f"block {blocksize}" if blocksize else "one scale"
    text = f"{quant_type}, {block}"
    return text + (", nested" if nested else "") + (", with means" if mean else "")


def _ours(headers: SafetensorsFiles, settings: dict, name: str, taken: set) -> Layer:
    keys = [
        f"{name}.weight",
        *(f"{name}.{key}" for key in OURS if f"{name}.{key}" in headers),
    ]
    if keys[0] not in headers:
        raise CliError(
            f"{headers.where[f'{name}.weight_absmax']}: {name}.weight_absmax is there without "
            f"{name}.weight: the file is damaged, download or save it again"
        )
    taken.update(keys)
    packed = headers.shapes[keys[0]]
    # It is [N, K / 2] if K is even; otherwise flat, and only the model knows the shape. The experts
    # of a layer are [E, N, K / 2], and the blocks start anew at each expert.
    is_stack = len(packed) == 3
    flat = not is_stack and (len(packed) != 2 or packed[1] == 1)
    numel = 2 * headers.numel(keys[0])
    nested = f"{name}.weight_nested" in headers
    experts = packed[0] if is_stack else 1
    blocks = headers.numel(f"{name}.weight_absmax") // (1 if nested else 4) // max(experts, 1)
    each = numel // max(experts, 1)
    blocksize = next((b for b in BLOCKSIZES if -(-each // b) == blocks), 0)
    quant_type = (settings.get("quantization_config") or {}).get("quant_type")
    codebook = f"{name}.weight_codebook"
    if codebook in headers:
        values = tuple(headers[codebook].view(torch.float32).tolist())
        known = {tuple(table): name for name, table in _C.codebooks().items()}
        quant_type = known.get(values, "custom")
    nbytes = sum(headers.nbytes(key) for key in keys if key != codebook)
    return Layer(
        name,
        _describe(quant_type or "4 bits", blocksize, nested, f"{name}.weight_mean" in headers),
        None if flat else (*packed[:-1], 2 * packed[-1]),
        numel,
        nbytes,
        True,
    )


def _bitsandbytes(headers: SafetensorsFiles, key: str, keys: list[str], taken: set) -> Layer:
    stem = key.partition(MARK)[0]
    taken.update(keys)
    try:
        meta = json.loads(bytes(headers[key].to(torch.uint8).reshape(-1).tolist()))
        shape = tuple(int(n) for n in meta["shape"])
        # Also limit tensors without elements, as files.py does for safetensors' own shapes.
        if min(shape, default=0) < 0 or math.prod(max(n, 1) for n in shape) > MAX_NUMEL:
            raise ValueError(f"shape is {shorten(shape)}")
        kind = _describe(
            str(meta["quant_type"]), int(meta["blocksize"]), "nested_offset" in meta, False
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CliError(
            f"{headers.where[key]}: {key} is damaged ({first_line(error, with_type=True)}): "
            "download the file again"
        ) from None
    nbytes = sum(headers.nbytes(k) for k in keys if not k.endswith("quant_map") and k != key)
    return Layer(stem.removesuffix(".weight"), kind, shape, math.prod(shape), nbytes, True)


def _lora(headers: SafetensorsFiles, settings: dict, key: str, taken: set) -> Layer:
    name = key.removesuffix(".lora_A.weight")
    other = f"{name}.lora_B.weight"
    if other not in headers:
        raise CliError(
            f"{headers.where[key]}: {key} is there without {other}: the adapter is damaged, "
            "download or save it again"
        )
    taken.update((key, other))
    if len(headers.shapes[key]) != 2 or len(headers.shapes[other]) != 2:
        raise CliError(
            f"{headers.where[key]}: {key} has shape {list(headers.shapes[key])} and {other} "
            f"{list(headers.shapes[other])}, want two matrices: the adapter is damaged"
        )
    (r, K), (N, _) = headers.shapes[key], headers.shapes[other]
    layer, shape = name.removeprefix("base_model.model."), (N, K)
    if experts := _experts_of(settings, layer, r):  # A is [E r, K], B [N, r E]
        r, shape = r // experts, (experts, N, K)
    numel = headers.numel(key) + headers.numel(other)
    nbytes = headers.nbytes(key) + headers.nbytes(other)
    return Layer(layer, f"LoRA r={r}, {headers.stored[key]}", shape, numel, nbytes, False)


def _experts_of(settings: dict, layer: str, rows: int) -> int:
    """The number of experts in the adapter of a layer, if target_parameters in its config names
    the layer and `r` is the rank of each; else 0."""
    r, parameters = settings.get("r"), settings.get("target_parameters")
    if not isinstance(parameters, list) or not isinstance(r, int) or settings.get("rank_pattern"):
        return 0
    holders = {name.rpartition(".")[0] for name in parameters if isinstance(name, str)} - {""}
    holder = re.sub(r"(\.base_layer)+$", "", layer)
    named = any(holder == one or holder.endswith(f".{one}") for one in holders)
    return rows // r if named and r > 0 and rows % r == 0 and rows > r else 0


def rows(contents: Contents, every: bool) -> list[list[str]]:
    """Table rows. Equal layers of a stack share a row unless `every`."""
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
            format_bytes(sum(x.nbytes for x in layers)),
        ]
        for (name, kind, shape), layers in groups.items()
    ]


def summary(contents: Contents) -> list[str]:
    """The lines above the table."""
    numel = sum(layer.numel for layer in contents.layers)
    packed = [layer for layer in contents.layers if layer.packed]
    weights = sum(layer.numel for layer in packed)
    lines = [
        f"{contents.format}: {plural(numel, 'weight')} in {format_bytes(contents.nbytes)}, "
        f"{plural(len(contents.files), 'file')}"
    ]
    if packed:
        bits = 8 * sum(layer.nbytes for layer in packed) / max(weights, 1)
        lines.append(
            f"packed: {plural(len(packed), 'layer')}, {weights / max(numel, 1):.1%} of the "
            "weights, "
            f"{bits:.3f} bits per packed weight, {8 * contents.nbytes / max(numel, 1):.3f} over all"
        )
    settings = contents.settings
    if "peft_type" in settings:
        said = {
            key: value if isinstance(value, str) and len(value) < 80 else shorten(value)
            for key, value in settings.items()
        }
        lines.append(
            f"{said.get('peft_type')} for {said.get('base_model_name_or_path')}: "
            f"r={said.get('r')}, lora_alpha={said.get('lora_alpha')}"
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
    """Contents as JSON values, for programs."""
    return {
        "format": contents.format,
        "files": [path.name for path in contents.files],
        "bytes": contents.nbytes,
        "layers": [
            {**dataclasses.asdict(layer), "bits_per_weight": layer.bits}
            for layer in contents.layers
        ],
    }
