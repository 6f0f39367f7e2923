"""Reports which weights of a model are packed, and how many bytes its parts take."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from .walk import _numel, is_packed


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Whether one layer's (or one bare parameter's) weights were packed, and why not."""

    name: str
    kind: str  # class of the module that holds it
    numel: int  # logical weights; without the bias if the weight was packed
    nbytes: int  # bytes after quantizing
    reason: str | None  # why it is unquantized; None if it was packed


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Every weight of a model, packed or not. `str()` is a table of what was not packed and why."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were packed."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def unquantized(self) -> tuple[LayerReport, ...]:
        """The layers that were not packed, largest first."""
        rest = [layer for layer in self.layers if layer.reason is not None]
        return tuple(sorted(rest, key=lambda layer: -layer.numel))

    @property
    def quantized_share(self) -> float:
        """Share of the model's weights that are packed, 0 to 1."""
        return sum(layer.numel for layer in self.quantized) / max(self.numel, 1)

    @property
    def numel(self) -> int:
        """Logical weights of the model."""
        return sum(layer.numel for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per packed weight, statistics included."""
        numel = sum(layer.numel for layer in self.quantized)
        return 8 * sum(layer.nbytes for layer in self.quantized) / max(numel, 1)

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} layers in {self.bits_per_weight:.3f} bits per weight: "
            f"{self.quantized_share:.1%} of {self.numel:,} weights. Unquantized:"
        ]
        grouped: dict[tuple[str, str, str], list[LayerReport]] = defaultdict(list)
        for layer in self.unquantized:
            # Layers of a stack share a row: layers.0.norm and layers.7.norm become layers.*.norm.
            pattern = re.sub(r"\b\d+\b", "*", layer.name)
            grouped[pattern, layer.kind, layer.reason].append(layer)
        rows = sorted(grouped.items(), key=lambda item: -sum(part.numel for part in item[1]))
        for (pattern, kind, reason), parts in rows:
            numel = sum(layer.numel for layer in parts)
            times = f" x{len(parts)}" if len(parts) > 1 else ""
            share = numel / max(self.numel, 1)
            lines.append(f"  {share:7.2%}  {pattern}{times} ({kind}, {numel:,}): {reason}")
        return "\n".join(lines if rows else [lines[0].replace(" Unquantized:", "")])


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a model by part. A shared tensor is counted once."""

    parts: dict[str, int]  # part -> bytes
    quantized_numel: int  # logical weights that are packed
    num_parameters: int  # logical weights of the model

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per packed weight: codes, scales and means; 0 if nothing is packed."""
        packed = self.parts["4-bit weights"] + self.parts["4-bit statistics"]
        return 8 * packed / self.quantized_numel if self.quantized_numel else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.total / 2**20:,.2f} MiB, {self.num_parameters:,} weights, "
            f"{self.bits_per_weight:.3f} bits per packed weight"
        ]
        for part, nbytes in self.parts.items():
            if nbytes:
                lines.append(f"  {nbytes / 2**20:10,.2f} MiB  {part}")
        return "\n".join(lines)


def num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Logical weights of a model: a packed weight counts in_features * out_features.

    Args:
        only_trainable: count only parameters with requires_grad. Packed ones have none.
        exclude_embeddings: leave out the weights of embedding tables.

    Shared parameters count once.
    """
    return sum(
        numel
        for _, _, tensor, numel in _tensors(model, nn.Embedding if exclude_embeddings else ())
        if isinstance(tensor, nn.Parameter) and (tensor.requires_grad or not only_trainable)
    )


def logical_surplus(module: nn.Module) -> int:
    """How many more weights `module` has than its parameters have elements.

    A packed byte holds two weights, and the scale statistics are not weights.
    """
    return num_parameters(module) - sum(p.numel() for p in module.parameters())


def _tensors(
    model: nn.Module, without: type | tuple[()] = ()
) -> Iterator[tuple[str, nn.Module, torch.Tensor, int]]:
    """(full name, the module that has it, tensor, how many weights it holds) of each parameter and
    buffer, a shared one once. `without` is a class of modules to leave out."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, without):
            continue
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            numel = tensor.numel()
            if is_packed(module) and key.startswith("weight"):
                numel = _numel(module) if key == "weight" else 0
            yield f"{name}.{key}", module, tensor, numel


def memory_report(model: nn.Module) -> MemoryReport:
    """Bytes by part: 4-bit weights and statistics, LoRA adapters, embeddings, unquantized layers,
    other parameters (norms, biases) and buffers. Gradients and optimizer states are not counted."""
    parts = dict.fromkeys(
        (
            "4-bit weights",
            "4-bit statistics",
            "LoRA adapters",
            "embeddings",
            "unquantized layers",
            "other parameters",
            "buffers",
        ),
        0,
    )
    quantized = 0
    for name, module, tensor, numel in _tensors(model):
        key = name.rpartition(".")[2]
        if is_packed(module) and key == "weight":
            part = "4-bit weights"
            quantized += numel
        elif is_packed(module) and key in ("weight_absmax", "weight_nested", "weight_mean"):
            part = "4-bit statistics"
        elif "lora_" in name:
            part = "LoRA adapters"
        elif not isinstance(tensor, nn.Parameter):
            part = "buffers"
        elif isinstance(module, nn.Embedding):
            part = "embeddings"
        elif tensor.ndim > 1:
            part = "unquantized layers"
        else:
            part = "other parameters"
        parts[part] += tensor.nbytes
    return MemoryReport(parts, quantized, num_parameters(model))
