"""PEFT's IA3, PVeRA, RandLoRA and RoAd layers on packed weights, with PEFT's forward and our
merging; its HiRA layer with both of ours; and its SHiRA layer with our forward."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.randlora.layer import Linear as RandLoraLinear
from peft.tuners.road.layer import Linear as RoadLinear
from peft.tuners.shira.layer import Linear as ShiraLinear

from ...nn.dense import dense_linear
from .stand_in import (
    _adapters_to_merge,
    _check_finite,
    _innermost,
    _MergesIntoDense,
    _packed_base,
    _swap_in,
    dequantize,
)
from .versions import HiraLinear, PveraLinear


class _MergesOnStandIn:
    """A mixin for PEFT's layers whose own merge changes a dense layer's weight and bias."""

    @property
    def _name(self) -> str:
        return self.__dict__.get("_qlora_ext_name", type(self).__name__)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PeftLoraLinear4bit's merge. All merged adapters are merged again into the packed
        weight in fp32, in the order in which they were merged, and the sum is rounded once."""
        own = getattr(self, self.adapter_layer_names[0])
        names = _adapters_to_merge(self, adapter_names, own)
        if not names:
            return
        packed, holder = _packed_base(self), _innermost(self)
        before = self.merged_adapters, holder.base_layer
        merged = [*self.merged_adapters, *names]
        dense = dense_linear(packed, dequantize(packed))
        holder.base_layer, self.merged_adapters = dense, []
        try:
            with torch.no_grad():
                super().merge(adapter_names=merged)
        finally:
            self.merged_adapters, holder.base_layer = before
        weight, bias, dtype = dense.weight.data, dense.bias, packed.dtype
        _check_finite(f"{self._name}.weight", weight, names, dtype)
        if bias is not None:
            _check_finite(f"{self._name}.bias", bias.data, names, dtype)
        _swap_in(self, weight.to(dtype).contiguous())
        if bias is not None:
            self.get_base_layer().bias.data = bias.data.to(dtype)
        self.merged_adapters = merged

    unmerge = _MergesIntoDense.unmerge


class IA3Linear4bit(_MergesOnStandIn, IA3Linear):
    """PEFT's IA3 layer on a `Linear4bit`: it scales the layer's outputs, or its inputs if the layer
    is one of feedforward_modules."""


class HiraLinear4bit(_MergesOnStandIn, HiraLinear):
    """PEFT's HiRA layer on a `Linear4bit`: it adds W ⊙ (B A) to the weight."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As IA3Linear4bit's."""
        super().merge(safe_merge, adapter_names)
        self._base_weight_before_merge = None  # PEFT would unmerge with it; we keep the packed one

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The packed product and the adapters' own. PEFT's forward reads the weight as it is."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.hira_A]
        weight = dequantize(self.get_base_layer()) if names else None
        for name in names:
            delta = self.hira_B[name] @ self.hira_A[name]
            change = weight.to(delta.dtype) * delta
            inputs = self.hira_dropout[name](self._cast_input_dtype(x, change.dtype))
            result = result + torch.nn.functional.linear(inputs, change).to(result.dtype)
        return result


class PveraLinear4bit(_MergesOnStandIn, PveraLinear):
    """PEFT's PVeRA layer on a `Linear4bit`. In training its adapter draws from a distribution."""


class RandLoraLinear4bit(_MergesOnStandIn, RandLoraLinear):
    """PEFT's RandLoRA layer on a `Linear4bit`."""


class RoadLinear4bit(_MergesOnStandIn, RoadLinear):
    """PEFT's RoAd layer on a `Linear4bit`: it rotates and scales groups of the layer's outputs."""


class ShiraLinear4bit(ShiraLinear):
    """PEFT's SHiRA layer on a `Linear4bit`, which adds to single weights. PEFT merges it through
    `PackedBackend`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The packed product and the adapters' own. PEFT's forward would multiply x by the sum of
        both weights, which is fp32 whatever x is."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.shira_weight:
                weight = self.get_delta_weight(name).to_dense().to(result.dtype)
                result = result + torch.nn.functional.linear(x.to(result.dtype), weight)
        return result
