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
from ..nn.stack import LoraStack4bit, Stack4bit
from ..tensor.functions import merge_lora_4bit
from ..tensor.quantized import QuantizedTensor
from .dense import IN_MEMORY, merge_and_unload, tied_head


@dataclasses.dataclass
class AdaptedLayer:
    """A packed layer with an adapter, or one expert of a packed stack with adapters."""

    name: str  # of the module
    module: nn.Module  # the module that the model calls; a stack's gets (x, offsets, rows)
    packed: Linear4bit | Stack4bit
    lora: tuple[Tensor, Tensor, float]  # A [r, K], B [N, r], scaling
    expert: int | None = None  # its number in the stack
    # Turns the adapter on or off, if it is not `module` itself that adds it.
    switch: Callable[[bool], None] | None = None

    @property
    def called(self) -> str:
        """The layer's name in messages: experts.up[7]."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def quantized(self) -> QuantizedTensor:
        """The packed weight [N, K]."""
        q = self.packed.quantized
        return q if self.expert is None else q[self.expert]

    def target(self) -> Tensor:
        """dequantize(W) + s B A, fp32 [N, K]."""
        A, B, scaling = self.lora
        return merge_lora_4bit(self.quantized, A, B, scaling, torch.float32)

    def change(self) -> Tensor:
        """s B A, fp32 [N, K]."""
        A, B, scaling = self.lora
        return (B @ A).mul_(scaling)


def adapted_experts(
    name: str,
    stack: Stack4bit,
    A: Tensor,
    B: Tensor,
    scaling: float,
    switch: Callable[[bool], None] | None = None,
) -> list[AdaptedLayer]:
    """The experts of a stack whose adapters are A [E, r, K] and B [E, N, r], fp32."""
    factors = zip(A.unbind(), B.unbind(), strict=True)
    return [
        AdaptedLayer(name, stack, stack, (a.contiguous(), b.contiguous(), scaling), e, switch)
        for e, (a, b) in enumerate(factors)
    ]


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
    elif any(isinstance(m, (Linear4bit, Stack4bit)) for m in modules):
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
        if isinstance(module, (LoraLinear4bit, LoraStack4bit)):
            A, B = module.lora_A.detach().float(), module.lora_B.detach().float()
            if isinstance(module, LoraStack4bit):
                layers += adapted_experts(name, module, A, B, module.scaling)
            else:
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
