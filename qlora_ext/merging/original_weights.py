"""Reads the unquantized weights that a packed model was made from, by the names of its layers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import hosts
from ..checks import check_finite, not_readable
from ..files import SafetensorsFiles
from ..nn.dense import adapted_weight
from ..nn.experts import Experts4bit, up_name
from ..nn.linear import Linear4bit
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import quantize_tensor
from ..text import CheckpointError, shorten
from .adapted import AdaptedLayer


class OriginalWeights:
    """The weights that the packed layers of a model were made from, by the layers' names.

    Args:
        base: the unquantized model, its state dict, or a folder or file of safetensors.
        model: the packed model, or a PeftModel around it.
        op: the name of the calling function, for errors.
    """

    def __init__(self, base, model: nn.Module, op: str = "merge_into_4bit"):
        self.op = op
        is_path = isinstance(base, (str, os.PathLike))
        self.called = f"base ({os.fspath(base)})" if is_path else "base"
        self.reason = ""  # why transformers could not name the folder's tensors
        self.experts = {n: m for n, m in model.named_modules() if isinstance(m, Experts4bit)}
        if isinstance(base, nn.Module):
            self.tensors = dict(base.named_parameters(remove_duplicate=False))
        elif isinstance(base, Mapping):
            self.tensors = base
        elif isinstance(base, (str, os.PathLike)) and isinstance(os.fspath(base), str) and base:
            self.tensors = self._read(Path(base), model)
        else:
            raise TypeError(
                f"{self.op}: base is {shorten(base)}, want the unquantized model, its state "
                "dict, or "
                "a folder or file of safetensors"
            )

    def _read(self, path: Path, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors of a folder, named, stacked and transposed as transformers does for this
        model. As they are, for a file or if transformers cannot do that."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if os.path.isdir(path):
            try:
                tensors = hosts.first(hosts.original_weights, path, model)
                if tensors is not None:
                    return tensors
            except (CheckpointError, ImportError, AttributeError) as error:
                self.reason = str(error)
        is_file = os.path.lexists(path) and not os.path.isdir(path)
        files = [path] if is_file else sorted(path.glob("*.safetensors"))
        want = (
            "want the folder of the unquantized model, with its safetensors files, or one such "
            "file; a model on the hub must be downloaded first"
        )
        if not files:
            lacks = "has no safetensors files" if os.path.isdir(path) else "does not exist"
            raise ValueError(f"{self.op}: base is {shorten(str(path))}, which {lacks}, {want}")
        try:
            return SafetensorsFiles(files, any_dtype=True)
        except CheckpointError as error:
            raise CheckpointError(f"{self.op}: {self.called}: {error}") from error

    def weight(self, full_name: str, packed: Linear4bit) -> Tensor:
        """The unquantized weight of a packed layer, fp32 [N, K].

        Raises:
            ValueError: base has no weight of that name, or one of another shape or not of floats.
        OverflowError: the weight has a NaN or an infinity.
        """
        name = full_name.removeprefix("base_model.model.")
        key, pick = f"{name}.weight", None
        match = re.fullmatch(r"(.+)\.packed\.(\d+)\.(up|down)", name)
        holder = full_name[: -len(name)] + match[1] if match else None
        if holder in self.experts:
            experts = self.experts[holder].template
            key = f"{match[1]}.{up_name(experts) if match[3] == 'up' else 'down_proj'}"
            pick = int(match[2])
        if key not in self.tensors:
            end = name.rpartition(".")[2] + ".weight"
            near = [k for k in self.tensors if isinstance(k, str) and k.endswith(end)]
            raise ValueError(
                f"{self.op}: {self.called} has no {key}, want the unquantized model that was "
                f"packed; it has {near[:3] or list(self.tensors)[:3]}"
                + (f"; as a model's folder it cannot be read: {self.reason}" if self.reason else "")
            )
        weight = self.tensors[key]
        got = not_readable(weight)
        if got is None and weight.dtype not in FLOAT_DTYPES:
            got = f"a tensor of {weight.dtype}"
        if got is not None:
            raise ValueError(
                f"{self.op}: {self.called} has {key} as {got}, want float values: the model as it "
                "was before it was packed"
            )
        flip = packed.from_conv1d
        if pick is not None:
            weight, flip = self._expert(key, weight, pick), experts.is_transposed
        weight = weight.T if flip else weight
        want = (packed.out_features, packed.in_features)
        if tuple(weight.shape) != want:
            raise ValueError(
                f"{self.op}: {self.called} has {key} of shape {list(weight.shape)}, want "
                f"{list(want)}: it must be the unquantized model that was packed"
            )
        check_finite(f"{self.op}: {self.called}: {key}", weight, weight.dtype)
        return weight.detach().to(packed.weight.device, torch.float32)

    def _expert(self, key: str, stack: Tensor, number: int) -> Tensor:
        """One expert's weight from a stack [experts, ...]."""
        if stack.ndim != 3 or len(stack) <= number:
            raise ValueError(
                f"{self.op}: {self.called} has {key} of shape {list(stack.shape)}, want a stack of "
                f"more than {number} matrices: it must be the unquantized model that was packed"
            )
        return stack[number]

    def check(self, layer: AdaptedLayer) -> None:
        """Raises ValueError unless the weight packs to nearly the same codes as the layer's."""
        again = quantize_tensor(
            self.weight(layer.name, layer.packed), layer.packed.config
        ).packed.reshape(-1)
        now = layer.packed.quantized.packed.reshape(-1)
        same = (again >> 4 == now >> 4).float().mean() + (again & 15 == now & 15).float().mean()
        # If base is stored in another dtype, one weight in a hundred gets another code.
        if now.numel() and same / 2 < 0.9:
            raise ValueError(
                f"{self.op}: {self.called} is not what was packed: {same / 2:.0%} of the codes of "
                f"{layer.name} agree, want nearly all. An adapter that was initialised by changing "
                "the packed weight (PiSSA, OLoRA) needs calibration instead"
            )

    def target(self, layer: AdaptedLayer) -> Tensor:
        """W + s B A, fp32 [N, K]."""
        A, B, scaling = layer.lora
        return adapted_weight(self.weight(layer.name, layer.packed), A, B, scaling)
