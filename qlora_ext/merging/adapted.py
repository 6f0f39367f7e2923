"""Finds the adapted layers of a model to merge into 4 bits, with our adapters or a host's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import hosts
from ..models.walk import check_whole, replace_module
from ..nn.dense import check_weight, dense_layer
from ..nn.linear import Linear4bit
from ..nn.lora import LoraLinear, LoraLinear4bit
from ..nn.offload import check_in_memory
from ..tensor.functions import merge_lora_4bit
from .dense import IN_MEMORY, merge_and_unload, tied_head


@dataclasses.dataclass
class AdaptedLayer:
    """A packed layer with an adapter."""

    name: str
    module: nn.Module  # the module that the model calls
    packed: Linear4bit
    lora: tuple[Tensor, Tensor, float]  # A [r, K], B [N, r], scaling

    def target(self) -> Tensor:
        """dequantize(W) + s B A, fp32 [N, K]."""
        A, B, scaling = self.lora
        return merge_lora_4bit(self.packed.quantized, A, B, scaling, torch.float32)

    def change(self) -> Tensor:
        """s B A, fp32 [N, K]."""
        A, B, scaling = self.lora
        return (B @ A).mul_(scaling)


# (new layer, the layer it replaced) for each replacement, so that it can be undone after an error.
Swaps = list[tuple[nn.Module, nn.Module]]


@dataclasses.dataclass
class AdaptedModel:
    """A model's adapted packed layers, and functions that remove its adapters."""

    layers: list[AdaptedLayer]
    # Merges the adapters of dense layers after the packed ones; returns the plain model.
    unload: Callable[[Swaps], nn.Module]
    # (dtype, progress_bar): merges everything into dense layers of dtype; returns the plain model.
    merge_dense: Callable[[torch.dtype, bool], nn.Module]


def adapted_model(model: nn.Module) -> AdaptedModel:
    """Finds the adapters on the packed layers of a model.

    Raises:
        TypeError: model is not a module.
        ValueError: it is sharded or offloaded, has no adapters on 4-bit layers, or has adapters
            that cannot be merged into them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"merge_into_4bit: model is a {type(model).__name__}, want an nn.Module")
    check_whole("merge_into_4bit", model)
    check_in_memory("merge_into_4bit", model, IN_MEMORY)
    found = hosts.first(hosts.adapted_models, model) or _own(model)
    if found.layers:
        return found
    modules = list(model.modules())
    if any(isinstance(m, LoraLinear) for m in modules):
        why = "its only adapters are on unquantized layers: merge_and_unload merges those"
    elif any(isinstance(m, Linear4bit) for m in modules):
        why = "it was merged already, or none were added"
    else:
        why = "it has no 4-bit layers either"
    raise ValueError(
        f"merge_into_4bit: model has no adapters on 4-bit layers ({why}), want one that add_lora, "
        "load_adapter or PEFT gave adapters to"
    )


def _own(model: nn.Module) -> AdaptedModel:
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear4bit):
            A, B = module.lora_A.detach().float(), module.lora_B.detach().float()
            layers.append(AdaptedLayer(name, module, module, (A, B, module.scaling)))

    def unload(swaps: Swaps) -> nn.Module:
        tied = tied_head(model)
        for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]:
            check_weight(f"merge_into_4bit: {name}.weight", module, module.weight.dtype)
            new = dense_layer(module, module.weight.dtype)
            replace_module(model, module, new)
            swaps.append((new, module))
        if tied:
            hosts.tell(hosts.on_untied, model)
        return model

    def merge_dense(dtype: torch.dtype, progress_bar: bool) -> nn.Module:
        return merge_and_unload(model, dtype, progress_bar=progress_bar)

    return AdaptedModel(layers, unload, merge_dense)
