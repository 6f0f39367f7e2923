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
from ..nn.experts import parameter_names
from ..nn.linear import Linear4bit
from ..nn.stack import Stack4bit
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
        self.stacks = parameter_names(model)
        if isinstance(base, nn.Module):
            self.tensors = dict(base.named_parameters(remove_duplicate=False))
        elif isinstance(base, Mapping):
            self.tensors = base
        elif isinstance(base, (str, os.PathLike)) and isinstance(os.fspath(base), str) and base:
            self.tensors = self._read(Path(base), model)
        else:
            raise TypeError(
                f"{self.op}: base is {shorten(base)}, want the unquantized model, its state dict, "
                "or a folder or file of safetensors"
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

    def weight(
        self, full_name: str, packed: Linear4bit | Stack4bit, expert: int | None = None
    ) -> Tensor:
        """The unquantized weight of a packed layer or of an expert of a stack, fp32 [N, K].

        Raises:
            ValueError: base has no weight of that name, or one of another shape or not of floats.
            OverflowError: the weight has a NaN or an infinity.
        """
        name = full_name.removeprefix("base_model.model.")
        key = f"{name}.weight"
        if expert is not None:  # PEFT's layers around the experts are in their name
            key = self.stacks[full_name].removeprefix("base_model.model.")
            key = re.sub(r"(\.base_layer)+\.", ".", key)
        if key not in self.tensors:
            end = name.rpartition(".")[2] + ".weight"
            near = [k for k in self.tensors if isinstance(k, str) and k.endswith(end)]
            raise ValueError(
                f"{self.op}: {self.called} has no {key}, want the unquantized model that was "
                f"packed; it has {near[:3] or list(self.tensors)[:3]}"
                + (f"; transformers cannot read the folder: {self.reason}" if self.reason else "")
            )
        weight = self.tensors[key]
        got = not_readable(weight)
        if got is None and weight.dtype not in FLOAT_DTYPES:
            got = f"a tensor of {weight.dtype}"
        if got is not None:
            raise ValueError(
                f"{self.op}: {self.called} has {key} as {got}, want float values: give the model "
                "as it was before packing"
            )
        shape = (packed.out_features, packed.in_features)
        called, is_transposed = key, getattr(packed, "from_conv1d", False)
        want = shape[::-1] if is_transposed else shape
        if expert is not None:
            called, is_transposed = f"{key}[{expert}]", packed.is_transposed
            want = (packed.num_experts, *(shape[::-1] if is_transposed else shape))
        if tuple(weight.shape) != want:
            raise ValueError(
                f"{self.op}: {self.called} has {key} of shape {list(weight.shape)}, want "
                f"{list(want)}: it must be the unquantized model that was packed"
            )
        weight = weight if expert is None else weight[expert]
        weight = weight.T if is_transposed else weight
        check_finite(f"{self.op}: {self.called}: {called}", weight, weight.dtype)
        return weight.detach().to(packed.weight.device, torch.float32)

    def check(self, layer: AdaptedLayer) -> None:
        """Raises ValueError unless the weight packs to nearly the same codes as the layer's."""
        again = quantize_tensor(self._of(layer), layer.packed.config).packed.reshape(-1)
        now = layer.quantized.packed.reshape(-1)
        same = (again >> 4 == now >> 4).float().mean() + (again & 15 == now & 15).float().mean()
        # If base is stored in another dtype, one weight in a hundred gets another code.
        if now.numel() and same / 2 < 0.9:
            raise ValueError(
                f"{self.op}: {self.called} is not the model that was packed: {same / 2:.0%} of the "
                f"codes of {layer.called} agree, want nearly all. If the adapter's initialisation "
                "changed the packed weight (PiSSA, OLoRA), give calibration instead of base"
            )

    def target(self, layer: AdaptedLayer) -> Tensor:
        """W + s B A, fp32 [N, K]."""
        A, B, scaling = layer.lora
        return adapted_weight(self._of(layer), A, B, scaling)

    def _of(self, layer: AdaptedLayer) -> Tensor:
        return self.weight(layer.name, layer.packed, layer.expert)
