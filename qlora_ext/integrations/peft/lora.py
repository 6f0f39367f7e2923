"""PEFT's LoRA and AdaLoRA layers on packed weights; plain LoRA runs through our fused op."""

from __future__ import annotations

import contextlib
import math
import types
from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.layer import Embedding as PeftLoraEmbedding
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.variants import (
    ALoraLinearVariant,
    ArrowLinearVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)

from ... import ops
from ...checks import check_input, check_scaling
from ...nn.dense import dense_linear
from ...nn.linear import Linear4bit
from ...nn.offload import is_offloaded, loaded
from .stand_in import (
    _adapters_to_merge,
    _check_finite,
    _innermost,
    _MergesIntoDense,
    _packed_base,
    _swap_in,
    dequantize,
)
from .versions import ChoosesVariant, adapted_layer, layer_arguments


class _FiniteScales:
    """A mixin for LoRA layers that refuses scales that are not finite: all outputs would be NaN."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """As PEFT's. Raises ValueError for a scale that is not finite or does not fit float32."""
        check_scaling(f"set_scale: {self._name}", scale, "scale")
        super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """As PEFT's. Raises ValueError for a scale that is not finite or does not fit float32."""
        check_scaling(f"scale_layer: {self._name}", scale, "scale")
        super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """As PEFT's. Raises ValueError for a scale that is zero, not finite or too big for fp32."""
        if scale is not None:
            check_scaling(f"unscale_layer: {self._name}", scale, "scale")
            check_scaling(
                f"unscale_layer: {self._name}", 1 / scale if scale else math.inf, "1 / scale"
            )
        super().unscale_layer(scale)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, *args, **kwargs) -> None:
        """As PEFT's. Raises ValueError if lora_alpha is not finite or does not fit float32."""
        check_scaling(f"LoraConfig: {self._name}", lora_alpha, "lora_alpha")
        super().update_layer(adapter_name, r, lora_alpha, *args, **kwargs)


class _NamedLora(_FiniteScales):
    """A mixin for LoRA layers on a packed layer: they know their name, for errors."""

    def __init__(self, base_layer, adapter_name: str, config, target_name: str = "", **kwargs):
        self._name = target_name or adapted_layer.get()
        arguments = layer_arguments(config, target_name)
        super().__init__(base_layer, adapter_name, **arguments, **kwargs)


class PeftLoraLinear4bit(ChoosesVariant, _NamedLora, _MergesIntoDense, PeftLoraLinear):
    """PEFT's LoRA layer on a `Linear4bit`.

    Plain adapters use the fused op: y = W x + s B A x in one pass over the packed weight, in the
    dtype of x, with fp32 adapters. Mixed batches, DoRA, aLoRA, Arrow, biases on B and layers with
    hooks use PEFT's own forward.
    """

    @property
    def lora_variants(self):
        return {
            (): None,
            ("alora_invocation_tokens",): ALoraLinearVariant,
            ("arrow_config",): ArrowLinearVariant,
            ("use_dora",): DoraLinearVariant,
        }

    def _fused_adapters(self) -> list[str] | None:
        """The active adapters if the fused op can compute them, else None.

        It reads nn.Module's dicts, because __getattr__ would take longer than a small product.
        """
        modules = self._modules
        base = modules["base_layer"]
        if self._disable_adapters or self.merged_adapters or not isinstance(base, Linear4bit):
            return None
        # Hooks on submodules (offloading, sharding, a user's) only run if the submodule is called.
        if base._forward_hooks or base._forward_pre_hooks or "_hf_hook" in base.__dict__:
            return None
        lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
        active = self._active_adapter
        names = [name for name in ([active] if type(active) is str else active) if name in lora_A]
        for name in names:
            if name in self.lora_variant or self.lora_bias[name]:
                return None
            A, B = lora_A[name], lora_B[name]
            if A._forward_hooks or A._forward_pre_hooks or B._forward_hooks or B._forward_pre_hooks:
                return None
        # Several adapters in one x A^T would share one dropout mask.
        if len(names) != 1 and any(self._dropout(name) for name in names):
            return None
        return names or None

    def _dropout(self, name: str) -> float:
        """The dropout probability of the adapter's input, 0 in evaluation."""
        if not self.training:
            return 0.0
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if isinstance(dropout, torch.nn.Dropout) else 0.0

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = None
        if not args and all(value is None for value in kwargs.values()):
            names = self._fused_adapters()
        if names is None:
            if type(self._modules["base_layer"]).__name__ == "ParallelLinear4bit":
                raise TypeError(
                    f"tensor parallel: the base layer of {self._name} was cut, but PEFT's adapters "
                    "cannot be cut; use add_lora"
                )
            base = self._modules["base_layer"]
            if not self.lora_variant or not is_offloaded(base):
                return super().forward(x, *args, **kwargs)
            with loaded(base):  # PEFT's variants read the bias after running the base layer
                return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._fused(x, names, True)
        try:
            return self._fused(x, names, False)
        except Exception:
            check_input(self._name, x=x)
            raise

    def _fused(self, x: torch.Tensor, names: list[str], is_traced: bool) -> torch.Tensor:
        """Computes the layer and its active adapters in one op."""
        lora_A, lora_B, scaling = self._stacked(names)
        base = self._modules["base_layer"]
        bias = base._parameters["bias"]
        dropout = self._dropout(names[0])
        w4 = base._w4(is_traced)
        return ops.lora_linear(base._input(x), w4, lora_A, lora_B, scaling, bias, dropout)

    def _stacked(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Several adapters as one: A [sum of r, in], B [out, sum of r], and the scaling. That is a
        number, or a 0-d tensor after PEFT's `prepare_model_for_compiled_hotswap`."""
        A, B = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
        if len(names) == 1:
            (name,) = names
            return A[name].weight, B[name].weight, self.scaling[name]
        lora_A = torch.cat([A[name].weight for name in names])
        lora_B = torch.cat([B[name].weight * self.scaling[name] for name in names], dim=1)
        return lora_A, lora_B, 1.0

    @contextlib.contextmanager
    def _dense_base(self):
        """A context with a dense base layer, for initialisations that read and change the base
        weight. At the end the weight is packed again if it changed."""
        packed = _packed_base(self)
        holder = _innermost(self)
        dense = dense_linear(packed, dequantize(packed))
        before = dense.weight.detach().clone()
        holder.base_layer = dense
        try:
            yield
        finally:
            holder.base_layer = packed
        if not torch.equal(before, dense.weight):
            again = Linear4bit.from_linear(dense, packed.config).to(packed.dtype)
            holder.base_layer = again._in_place_of(packed)

    def olora_init(self, adapter_name: str) -> None:
        """OLoRA: B A takes the leading part of the weight's QR, and the rest is packed again."""
        with self._dense_base():
            super().olora_init(adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        """Orthogonal A and B; PEFT takes their dtype from the base weight."""
        with self._dense_base():
            super().orthogonal_init(adapter_name)

    def loftq_init(self, adapter_name: str, *args) -> None:
        """Raises ValueError: PEFT's would read the packed bytes as weights."""
        raise ValueError(
            f"LoraConfig: init_lora_weights='loftq' on {self._name} needs the unquantized weight; "
            "use init_lora_weights=True, then call peft.replace_lora_weights_loftq(model, folder) "
            "with the folder of the unquantized model"
        )

    def lora_ga_init(self, adapter_name: str, lora_ga_config) -> None:
        """As PEFT's. Raises ValueError if gradients were gathered, because PEFT would then subtract
        from packed bytes."""
        if hasattr(self.get_base_layer(), "_peft_loraga_grad"):
            raise ValueError(
                f"LoraConfig: init_lora_weights='lora_ga' on {self._name} needs the unquantized "
                "weight; use init_lora_weights=True"
            )
        super().lora_ga_init(adapter_name, lora_ga_config)


class _DoraEmbedding(DoraEmbeddingLayer):
    """PEFT's DoRA magnitudes. Their forward gets the dequantized table of the base layer."""

    def forward(self, x, *, base_layer, **kwargs):
        table = types.SimpleNamespace(weight=dequantize(base_layer))
        return super().forward(x, base_layer=table, **kwargs)


class _DoraEmbeddingVariant(DoraEmbeddingVariant):
    @staticmethod
    def init(module, adapter_name: str, **kwargs):
        DoraEmbeddingVariant.init(module, adapter_name, **kwargs)
        # PEFT's init makes its own class and takes no other.
        module.lora_magnitude_vector[adapter_name].__class__ = _DoraEmbedding


class LoraEmbedding4bit(ChoosesVariant, _NamedLora, _MergesIntoDense, PeftLoraEmbedding):
    """PEFT's LoRA layer on an `Embedding4bit`, with PEFT's forward and our merging.

    The adapter is PEFT's: lora_embedding_A [r, num_embeddings], lora_embedding_B [dim, r]. The
    adapted table is W + scaling A^T B^T.
    """

    @property
    def lora_variants(self):
        return {(): None, ("use_dora",): _DoraEmbeddingVariant}

    def _stacked(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Several adapters as one, as A and B of a [num_embeddings, dim] layer: A [sum of r, dim],
        B [num_embeddings, sum of r], and the scaling."""
        A, B = self.lora_embedding_B, self.lora_embedding_A
        if len(names) == 1:
            (name,) = names
            return A[name].T.contiguous(), B[name].T.contiguous(), self.scaling[name]
        lora_A = torch.cat([A[name].T for name in names])
        lora_B = torch.cat([B[name].T * self.scaling[name] for name in names], dim=1)
        return lora_A, lora_B, 1.0

    def loftq_init(self, adapter_name: str, *args) -> None:
        """Raises ValueError: PEFT's would read the packed bytes as weights."""
        raise ValueError(
            f"LoraConfig: init_lora_weights='loftq' on {self._name} needs the unquantized weight; "
            "use init_lora_weights=True for a packed embedding, or pack the model without "
            "quantize_embeddings=True"
        )


class AdaLoraLinear4bit(_NamedLora, SVDLinear):
    """PEFT's AdaLoRA layer on a `Linear4bit`, with PEFT's forward and our merging."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PeftLoraLinear4bit's merge."""
        for name in _adapters_to_merge(self, adapter_names, self.lora_A):
            weight = dequantize(self.get_base_layer()).detach().float()
            weight = (weight + self.get_delta_weight(name)).detach()
            _check_finite(f"{self._name}.weight", weight, [name], _packed_base(self).dtype)
            _swap_in(self, weight.to(_packed_base(self).dtype))
            self.merged_adapters.append(name)

    unmerge = _MergesIntoDense.unmerge


class ParamWrapper(PeftLoraLinear4bit):
    """The layer for `target_parameters=["q_proj.weight"]` on a packed layer: the LoRA layer of
    `target_modules`. Its keys, shapes and outputs are those of PEFT's `ParamWrapper` on the dense
    weight.

    PEFT asks for the class by this name when a second adapter is added.
    """

    parameter_name = "weight"

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, *args, **kwargs) -> None:
        """As PEFT's. Raises ValueError for settings that PEFT's `ParamWrapper` refuses."""
        super().update_layer(adapter_name, r, lora_alpha, *args, **kwargs)
        refused = {
            "lora_dropout": isinstance(self.lora_dropout[adapter_name], torch.nn.Dropout),
            "lora_bias": self.lora_bias[adapter_name],
            "DoRA or another variant": adapter_name in self.lora_variant,
        }
        if any(refused.values()):
            settings = " and ".join(name for name, given in refused.items() if given)
            raise ValueError(
                f"PEFT's target_parameters on {self._name}.weight does not work with {settings}; "
                "name the layer in target_modules"
            )
