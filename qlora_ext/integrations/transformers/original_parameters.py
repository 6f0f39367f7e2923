"""Reads the parameters of an unquantized folder under the names they have in a packed model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import nn

from ...files import FLOATS
from ...text import CheckpointError
from .checkpoint import Checkpoint, Unit


class OriginalParameters(Mapping):
    """The unquantized parameters of a folder under the names they have in a model. Each is read
    when asked for, and renamed, stacked and transposed as transformers does for the model's class.

    Args:
        folder: has the safetensors files.
        model: the transformers model that they are for; it may be packed.

    Raises:
        CheckpointError: the folder's tensors cannot be read as those of this model.
    """

    def __init__(self, folder: Path, model: nn.Module):
        checkpoint = Checkpoint(folder, like=model)
        dtypes = checkpoint.files.dtypes
        for name, parameter in checkpoint.model.named_parameters():
            for key in checkpoint.sources.get(name, ()):
                # For bytes and float8, the scale may be in another tensor, unknown here.
                if parameter.is_floating_point() and dtypes[key] not in FLOATS:
                    raise CheckpointError(f"{folder} has {key} in {dtypes[key]}, want float values")
        self.checkpoint = checkpoint
        self.units = {module: unit for unit in checkpoint.units(set()) for module in unit.modules}
        self.last: tuple[Unit, dict[str, torch.Tensor]] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.checkpoint.sources:
            raise KeyError(name)
        unit = self.units[name.rpartition(".")[0]]
        if self.last is None or self.last[0] is not unit:
            self.last = None  # free it before the next is read
            with self.checkpoint.loaded(unit) as modules:
                tensors = {
                    f"{module}.{key}": parameter.detach()
                    for module, part in modules.items()
                    for key, parameter in part._parameters.items()
                    if parameter is not None and f"{module}.{key}" in self.checkpoint.sources
                }
            self.last = unit, tensors
        return self.last[1][name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.checkpoint.sources

    def __iter__(self):
        return iter(self.checkpoint.sources)

    def __len__(self) -> int:
        return len(self.checkpoint.sources)


def original_parameters(folder: Path, model: nn.Module) -> OriginalParameters | None:
    """OriginalParameters of folder for model; None if model is not a transformers model."""
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    return OriginalParameters(folder, model)
