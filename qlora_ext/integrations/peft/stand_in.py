"""Puts a dense layer in a packed layer's place (a stand-in) while PEFT's adapters are merged.

The packed layer is kept, so unmerging puts the same bytes back.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ...checks import check_finite
from ...merging.dense import IN_MEMORY
from ...models.walk import check_whole
from ...nn.dense import dense_embedding, dense_linear
from ...nn.embedding import Embedding4bit
from ...nn.experts import Experts4bit
from ...nn.linear import Linear4bit
from ...nn.offload import check_in_memory, loaded
from ...nn.packed import _Packed4bit
from ...tensor.functions import dequantize_4bit, merge_lora_4bit

_merge_to_4bit = contextvars.ContextVar("qlora_ext_merge_to_4bit", default=False)


@contextlib.contextmanager
def merging_to_4bit():
    """A context in which PEFT's merges requantize the result instead of leaving it in 16 bits.

    Requantizing keeps only 5 to 10% of a short fine-tune's gain (measured), because the fine-tune
    changes a weight by far less than the distance between two 4-bit levels. Each merge warns.
    """
    token = _merge_to_4bit.set(True)
    try:
        yield
    finally:
        _merge_to_4bit.reset(token)


def _innermost(layer: BaseTunerLayer) -> BaseTunerLayer:
    """The tuner layer that holds the base layer itself. Tuner layers can be nested."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


def _packed_base(layer: BaseTunerLayer) -> _Packed4bit | Experts4bit:
    """The packed layer (or experts) under `layer`, whether or not adapters are merged."""
    holder = _innermost(layer)
    aside = holder.__dict__.get("_qlora_ext_packed")
    return aside[0] if aside else holder.base_layer


def _dense(packed: _Packed4bit, dtype: torch.dtype, weight=None) -> torch.nn.Module:
    """The packed layer as a frozen nn.Linear or nn.Embedding with weight, or with its own
    dequantized weight if None."""
    weight = dequantize_4bit(packed.quantized, dtype) if weight is None else weight
    make = dense_linear if isinstance(packed, Linear4bit) else dense_embedding
    return make(packed, weight)


def _repacked(dense: torch.nn.Module, packed: _Packed4bit) -> _Packed4bit:
    """The dense layer packed with the settings of `packed`."""
    if isinstance(packed, Embedding4bit):
        return Embedding4bit.from_embedding(dense, packed.config)
    return Linear4bit.from_linear(dense, packed.config)._in_place_of(packed)


def _warn_of_requantizing() -> None:
    warnings.warn(
        "qlora_ext: merging into 4 bits by requantizing keeps 5 to 10% of a short fine-tune's "
        "gain; merge outside merging_to_4bit() to get 16 bits",
        stacklevel=5,
    )


def _swap_in(layer: BaseTunerLayer, weight: torch.Tensor) -> None:
    """Puts a layer with `weight` in the packed layer's place. It is dense, or packed again within
    merging_to_4bit()."""
    packed = _packed_base(layer)
    stand_in = _dense(packed, weight.dtype, weight)
    if _merge_to_4bit.get():
        _warn_of_requantizing()
        stand_in = _repacked(stand_in, packed)
    holder = _innermost(layer)
    # Keep it in a list, so that it is not a submodule. Then state_dict and parameters() give the
    # stand-in's tensors.
    holder.__dict__["_qlora_ext_packed"] = [packed]
    holder.base_layer = stand_in


def _restore(layer: BaseTunerLayer) -> None:
    """Puts the packed layer back with the same bytes."""
    holder = _innermost(layer)
    aside = holder.__dict__.pop("_qlora_ext_packed", None)
    if not aside:
        return
    (packed,), stand_in = aside, holder.base_layer
    dtype = stand_in.dtype if isinstance(stand_in, _Packed4bit) else stand_in.weight.dtype
    packed = packed.to(stand_in.weight.device)  # the model may have been moved or cast meanwhile
    holder.base_layer = packed if dtype == packed.dtype else packed.to(dtype)


def unmerge(layer: BaseTunerLayer, restore: Callable[[BaseTunerLayer], None]) -> None:
    """Undoes a layer's merges: restore puts the packed one back. Raises ValueError if the layer was
    sharded meanwhile."""
    check_whole(f"unmerge: {layer._name}", layer)
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    restore(layer)
    layer.merged_adapters.clear()


def _check_finite(
    name: str,
    values: torch.Tensor,
    adapters: list[str],
    dtype: torch.dtype,
    exact: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Raises ValueError, which PEFT's callers expect, if the merged weight or bias `name` does not
    fit dtype. exact computes it before rounding."""
    try:
        check_finite(name, values, dtype, exact)
    except OverflowError as error:
        raise ValueError(
            f"merge: with adapters {adapters}, {error}; load the base in a wider dtype, or another "
            "adapter if one is damaged"
        ) from None


def _adapters_to_merge(layer: BaseTunerLayer, adapter_names: list[str] | None, own) -> list[str]:
    """The adapters to merge: those in `own` that are named, or active if none are named. Raises
    ValueError if the layer is sharded or offloaded."""
    check_whole(f"merge: {layer._name}", layer)
    check_in_memory(f"merge: {layer._name}", layer, IN_MEMORY)
    return [name for name in check_adapters_to_merge(layer, adapter_names) if name in own]


class _MergesIntoDense:
    """A mixin with merging and unmerging of LoRA on a packed layer, for a PEFT class whose
    `_stacked` gives several adapters as one. While adapters are merged, a dense layer stands in for
    the packed one.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into a dense layer that stands in for the packed one until `unmerge`.

        Args:
            safe_merge: has no effect, because values that are not finite are always refused.
            adapter_names: None means the active adapters.

        Raises:
            ValueError: a merged value is not finite or overflows the dtype, or the layer is sharded
                or offloaded. The layer then stays as it was.
        """
        names = _adapters_to_merge(self, adapter_names, self.r)
        if not names:
            return
        dtype = _packed_base(self).dtype
        merged = self.merged_adapters + names
        if not any(name in self.lora_variant for name in merged):
            # Merge all at once into the packed weight: it is rounded once, in whatever order they
            # were merged.
            lora_A, lora_B, scaling = self._stacked(merged)
            sum_in = functools.partial(
                merge_lora_4bit,
                _packed_base(self).quantized,
                lora_A.detach(),
                lora_B.detach(),
                scaling,
            )
            weight = sum_in(dtype)
            exact = functools.partial(sum_in, torch.float32)
            _check_finite(f"{self._name}.weight", weight, names, dtype, exact)
            self._set_merged(weight, names)
            return
        for name in names:
            weight = dequantize(self.get_base_layer()).detach().float()
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight)
            else:
                weight = weight + self.get_delta_weight(name)
            _check_finite(f"{self._name}.weight", weight, [name], dtype)
            self._set_merged(weight.detach().to(dtype), [name])

    def _set_merged(self, weight: torch.Tensor, names: list[str]) -> None:
        bias_change = [
            self.lora_B[name].bias.detach() * self.scaling[name]
            for name in names
            if self.lora_bias[name]
        ]
        bias = getattr(self.get_base_layer(), "bias", None)  # an embedding has no bias
        if bias_change and bias is None:
            raise RuntimeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
            )
        if bias_change:
            summed = bias.detach() + sum(bias_change)
            _check_finite(f"{self._name}.bias", summed, names, bias.dtype)
        _swap_in(self, weight)
        if bias_change:
            self.get_base_layer().bias.data = summed.to(bias.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the packed layer back with the bytes it had before the first merge.

        Raises:
            ValueError: the layer was sharded while adapters were merged. It stays as it was.
        """
        unmerge(self, _restore)


def dequantize(module: torch.nn.Module) -> torch.Tensor:
    """The weight [out, in] of a linear layer, or an embedding's table: dequantized to fp32 if the
    layer is packed, else unchanged."""
    if isinstance(module, _Packed4bit):
        with loaded(module):
            return dequantize_4bit(module.quantized, torch.float32)
    return module.weight


def _holds_packed(model: torch.nn.Module) -> bool:
    """Whether a model has packed layers or stand-ins."""
    return any(
        isinstance(module, _Packed4bit) or "_qlora_ext_packed" in module.__dict__
        for module in model.modules()
    )


def _check_whole(op: str, model: torch.nn.Module, only: str = "") -> None:
    """Raises ValueError for a sharded model with packed layers or with stand-ins. It looks only at
    parameters with `only` in their name."""
    if _holds_packed(model):
        check_whole(op, model, only)
