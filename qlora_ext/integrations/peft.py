"""LoRA of PEFT on packed weights, through our fused op; other PEFT tuners correct or refused.

PEFT has no registry that outlives one config, so a few of its functions are wrapped, once, by
`attach()`. What is wrapped is the table at its foot, and nothing else of PEFT is touched:

    {Lora,AdaLora}Model._create_new_module   a packed layer gets `LoraLinear4bit` or AdaLoRA's, a
                                             packed embedding `LoraEmbedding4bit`
    resolve_quantization_backend    BOFT, MiSS, OFT, SHiRA, VeRA read and merge packed weights
    dequantize_module_weight        DoRA's norms
    <tuner>._create_and_replace     any other tuner is refused with a sentence
    BaseTuner._unload_and_optionally_merge   merge_and_unload gives a model without packed layers
    BaseTuner.{merge,unmerge}_adapter        a sharded or offloaded model is refused
    PeftModel.save_pretrained                the same, unless it is given a state_dict; what is
                                             offloaded is fetched, NaN and Inf are refused
    LoraModel.add_weighted_adapter           one that is not finite is refused
    {ModulesToSaveWrapper,TrainableTokensLayer}.__init__   a packed layer is refused with a sentence
    {get,set}_peft_model_state_dict          a packed embedding is stored and read as a dense
                                             table; NaN and Inf are not read
    PeftModel.get_nb_trainable_parameters    counts weights, not bytes
    prepare_model_for_kbit_training          its checkpointing, without its fp32 copies
    replace_lora_weights_loftq               LoftQ's start, against our quantizer

While adapters are merged, a dense layer stands in for the packed one, which is kept as it was:
unmerging puts the same bytes back.

Source: peft/tuners/lora/{model,layer,bnb}.py and peft/utils/quantization_utils.py of PEFT 0.21.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners import lora
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel, SVDLinear
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.layer import Embedding as PeftLoraEmbedding
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import loftq_utils, quantization_utils, save_and_load
from peft.utils import other as peft_other
from peft.utils.integrations import dequantize_module_weight

from .. import ops
from ..checks import check_finite, check_input, check_parameters, check_scaling
from ..lora import check_trainable
from ..merge import IN_MEMORY, check_weight
from ..merge_4bit import UnquantizedWeights
from ..models import check_whole, output_embeddings
from ..models.raw_errors import watch
from ..nn import _PACKED_KEYS, Embedding4bit, Linear4bit, _Lora, _Packed4bit
from ..offload import check_can_adapt, check_in_memory, is_offloaded, loaded, value_of
from ..quantized_tensor import dequantize_4bit, merge_lora_4bit
from .transformers import dense_linear, leave_no_packed_layer, local_part, logical_surplus

# Tuners whose layers train and merge on a packed weight; each is in tests/test_integration_peft.py.
_SUPPORTED = {"ADALORA", "LORA", "BOFT", "MISS", "OFT", "SHIRA", "VERA"}

_KEEP_TABLE = (
    "or keep the table dense: quantize the unquantized model without quantize_embeddings=True "
    "(the command: without --embeddings)"
)

_merge_to_4bit = contextvars.ContextVar("qlora_ext_merge_to_4bit", default=False)


@contextlib.contextmanager
def merging_to_4bit():
    """Within this context PEFT's merges requantize the result instead of leaving 16 bits.

    Requantizing a short fine-tune's weights was measured to keep 5 to 10% of its gain: the change
    of a weight is far below the distance of two 4-bit levels. Each merge warns of it.
    """
    token = _merge_to_4bit.set(True)
    try:
        yield
    finally:
        _merge_to_4bit.reset(token)


# The stand-in for a packed layer while adapters are merged -----------------------------------


def _innermost(layer: BaseTunerLayer) -> BaseTunerLayer:
    """The tuner layer that holds the base layer itself (tuners can be nested)."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


def _packed_base(layer: BaseTunerLayer) -> _Packed4bit:
    """The packed layer under `layer`, whether or not adapters are merged."""
    holder = _innermost(layer)
    aside = holder.__dict__.get("_qlora_ext_packed")
    return aside[0] if aside else holder.base_layer


def _dense(packed: _Packed4bit, dtype: torch.dtype, weight=None) -> torch.nn.Module:
    """The packed layer as a frozen nn.Linear or nn.Embedding; weight: None dequantizes its own."""
    if isinstance(packed, Linear4bit):
        return dense_linear(packed, dtype, weight)
    weight = dequantize_4bit(packed.quantized, dtype) if weight is None else weight
    table = torch.nn.Embedding(*weight.shape, packed.padding_idx, device="meta")
    table.weight = torch.nn.Parameter(weight, requires_grad=False)
    return table.train(packed.training)


def _repacked(dense: torch.nn.Module, packed: _Packed4bit) -> _Packed4bit:
    """The dense layer packed with the settings of `packed`."""
    if isinstance(packed, Embedding4bit):
        return Embedding4bit.from_embedding(dense, packed.config)
    return Linear4bit.from_linear(dense, packed.config)


def _swap_in(layer: BaseTunerLayer, weight: torch.Tensor) -> None:
    """Puts `weight` in the packed layer's place: dense, or packed again if asked for."""
    packed = _packed_base(layer)
    stand_in = _dense(packed, weight.dtype, weight)
    if _merge_to_4bit.get():
        warnings.warn(
            "qlora_ext: merging into 4 bits by requantizing keeps 5 to 10% of a short fine-tune's "
            "gain; merge outside merging_to_4bit() to get 16 bits",
            stacklevel=4,
        )
        stand_in = _repacked(stand_in, packed)
    holder = _innermost(layer)
    # In a list, so that it is no submodule: state_dict and parameters() are the stand-in's.
    holder.__dict__["_qlora_ext_packed"] = [packed]
    holder.base_layer = stand_in


def _restore(layer: BaseTunerLayer) -> None:
    """Puts the packed layer back, byte for byte as it was."""
    holder = _innermost(layer)
    aside = holder.__dict__.pop("_qlora_ext_packed", None)
    if not aside:
        return
    (packed,), stand_in = aside, holder.base_layer
    dtype = stand_in.dtype if isinstance(stand_in, _Packed4bit) else stand_in.weight.dtype
    packed = packed.to(stand_in.weight.device)  # the model may have been moved or cast meanwhile
    holder.base_layer = packed if dtype == packed.dtype else packed.to(dtype)


def _check_finite(
    layer: str,
    weight: torch.Tensor,
    names: list[str],
    dtype: torch.dtype,
    exact: Callable[[], torch.Tensor] | None = None,
) -> None:
    """ValueError, which is what PEFT's callers expect, for a merged weight that dtype cannot hold;
    exact makes it before it was rounded."""
    try:
        check_finite(f"{layer}.weight", weight, dtype, exact)
    except OverflowError as error:
        raise ValueError(
            f"merge: with adapters {names}, {error}: an adapter is broken, or the dtype too narrow"
        ) from None


# LoRA ----------------------------------------------------------------------------------------


class _MergesIntoDense:
    """Merging and unmerging of LoRA on a packed layer, for a class of PEFT's whose `_stacked` gives
    several adapters as one. A dense layer stands in for the packed one while adapters are merged.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into a dense layer that stands in for the packed one until `unmerge`.

        Args:
            safe_merge: makes no difference: values that are not finite are always refused.
            adapter_names: None means the active ones.

        Raises:
            ValueError: a merged value is not finite, or overflows the dtype; a sharded layer. The
                layer is then as before.
        """
        check_whole(f"merge: {self._name}", self)
        check_in_memory(f"merge: {self._name}", self, IN_MEMORY)
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.r]
        if not names:
            return
        dtype = _packed_base(self).dtype
        merged = self.merged_adapters + names
        if not any(name in self.lora_variant for name in merged):
            # All of them at once from the packed weight: one rounding, whatever the order.
            lora_A, lora_B, scaling = self._stacked(merged)
            sum_in = functools.partial(
                merge_lora_4bit,
                _packed_base(self).quantized,
                lora_A.detach(),
                lora_B.detach(),
                scaling,
            )
            weight = sum_in(dtype)
            _check_finite(self._name, weight, names, dtype, lambda: sum_in(torch.float32))
            self._set_merged(weight, names)
            return
        for name in names:
            weight = dequantize(self.get_base_layer()).detach().float()
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight)
            else:
                weight = weight + self.get_delta_weight(name)
            _check_finite(self._name, weight, [name], dtype)
            self._set_merged(weight.detach().to(dtype), [name])

    def _set_merged(self, weight: torch.Tensor, names: list[str]) -> None:
        bias_change = [
            self.lora_B[name].bias.detach() * self.scaling[name]
            for name in names
            if self.lora_bias[name]
        ]
        bias = getattr(self.get_base_layer(), "bias", None)  # an embedding has none
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
        """Puts the packed layer back, byte for byte as it was before the first merge.

        Raises:
            ValueError: a layer that was sharded while the dense one stood in; it is as before.
        """
        check_whole(f"unmerge: {self._name}", self)
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        _restore(self)
        self.merged_adapters.clear()


class LoraLinear4bit(_MergesIntoDense, PeftLoraLinear):
    """PEFT's LoRA layer on a `Linear4bit`.

    Plain adapters go through the fused op: y = W x + s B A x in one pass over the packed weight, in
    the dtype of x, with fp32 adapters. Mixed batches, DoRA, aLoRA, biases on B and layers with
    hooks take PEFT's general path.
    """

    def __init__(self, base_layer, adapter_name: str, config, target_name: str = "", **kwargs):
        self._name = target_name or type(self).__name__
        super().__init__(base_layer, adapter_name, config, target_name=target_name, **kwargs)

    def set_scale(self, adapter: str, scale: float) -> None:
        """As PEFT's. ValueError for a scale that is not finite or does not fit float32."""
        check_scaling(f"set_scale: {self._name}", scale, "scale")
        super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """As PEFT's. ValueError for a scale that is not finite or does not fit float32."""
        check_scaling(f"scale_layer: {self._name}", scale, "scale")
        super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """As PEFT's. ValueError for a scale that is zero, not finite or does not fit float32."""
        if scale is not None:
            check_scaling(f"unscale_layer: {self._name}", scale, "scale")
            check_scaling(
                f"unscale_layer: {self._name}", 1 / scale if scale else math.inf, "1 / scale"
            )
        super().unscale_layer(scale)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, *args, **kwargs) -> None:
        """As PEFT's. ValueError for a lora_alpha that is not finite or does not fit float32."""
        check_scaling(f"LoraConfig: {self._name}", lora_alpha, "lora_alpha")
        super().update_layer(adapter_name, r, lora_alpha, *args, **kwargs)

    @property
    def lora_variants(self):
        supported = [(), ("use_dora",), ("alora_invocation_tokens",)]
        return {key: value for key, value in super().lora_variants.items() if key in supported}

    def _fused_adapters(self) -> list[str] | None:
        """The active adapters if the fused op computes them, else None.

        Reads nn.Module's dicts: through __getattr__ this would cost more than a small product.
        """
        modules = self._modules
        base = modules["base_layer"]
        if self._disable_adapters or self.merged_adapters or not isinstance(base, Linear4bit):
            return None
        # A hook on a submodule (offloading, sharding, a user's) is only run if that is called.
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
        # With one x A^T for several adapters there is one dropout mask.
        if len(names) != 1 and any(self._dropout(name) for name in names):
            return None
        return names or None

    def _dropout(self, name: str) -> float:
        """The probability with which the adapter's input is dropped now."""
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
                    f"tensor parallel: the base layer of {self._name} was cut, and PEFT's adapters "
                    "cannot be: use add_lora"
                )
            base = self._modules["base_layer"]
            if not self.lora_variant or not is_offloaded(base):
                return super().forward(x, *args, **kwargs)
            with loaded(base):  # PEFT's variants read the bias when the base layer has run
                return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._fused(x, names, True)
        try:
            return self._fused(x, names, False)
        except Exception:
            check_input(self._name, x=x)
            raise

    def _fused(self, x: torch.Tensor, names: list[str], is_traced: bool) -> torch.Tensor:
        """The layer and its active adapters in one op."""
        lora_A, lora_B, scaling = self._stacked(names)
        base = self._modules["base_layer"]
        bias = base._parameters["bias"]
        dropout = self._dropout(names[0])
        x = base._input(x)
        if dropout == 0.0:
            return ops.lora_gemm_4bit(x, base._w4(is_traced), lora_A, lora_B, scaling, bias)
        S = ops.lora_shrink(torch.nn.functional.dropout(x, dropout), lora_A, scaling)
        return ops.gemm_4bit(x, base._w4(is_traced), bias, S, lora_B)

    def _stacked(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Several adapters as one: A [sum of r, in], B [out, sum of r], and the scaling, a number
        or the 0-d tensor that PEFT's `prepare_model_for_compiled_hotswap` makes of it."""
        A, B = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
        if len(names) == 1:
            (name,) = names
            return A[name].weight, B[name].weight, self.scaling[name]
        lora_A = torch.cat([A[name].weight for name in names])
        lora_B = torch.cat([B[name].weight * self.scaling[name] for name in names], dim=1)
        return lora_A, lora_B, 1.0

    @contextlib.contextmanager
    def _dense_base(self):
        """For initialisations that read and change the base weight: a dense layer within, its
        weight packed again at the end if it changed."""
        packed = _packed_base(self)
        holder = _innermost(self)
        dense = dense_linear(packed, torch.float32)
        before = dense.weight.detach().clone()
        holder.base_layer = dense
        try:
            yield
        finally:
            holder.base_layer = packed
        if not torch.equal(before, dense.weight):
            holder.base_layer = Linear4bit.from_linear(dense, packed.config).to(packed.dtype)

    def olora_init(self, adapter_name: str) -> None:
        """OLoRA: B A takes the weight's leading QR part, and what remains is packed again."""
        with self._dense_base():
            super().olora_init(adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        """Orthogonal A and B; PEFT takes their dtype from the base weight."""
        with self._dense_base():
            super().orthogonal_init(adapter_name)

    def loftq_init(self, adapter_name: str, config) -> None:
        """Refused: PEFT's would take the packed bytes for weights."""
        raise ValueError(
            "init_lora_weights='loftq' needs the unquantized weight; on a 4-bit layer use "
            "peft.replace_lora_weights_loftq(model, folder of the unquantized model)"
        )

    def lora_ga_init(self, adapter_name: str, lora_ga_config) -> None:
        """Refused where gradients were gathered: PEFT's would subtract from the packed bytes."""
        if hasattr(self.get_base_layer(), "_peft_loraga_grad"):
            raise ValueError("init_lora_weights='lora_ga' needs the unquantized weight")
        super().lora_ga_init(adapter_name, lora_ga_config)


class _DoraEmbedding(DoraEmbeddingLayer):
    """PEFT's layer of magnitudes, whose forward reads the table of the base layer."""

    def forward(self, x, *, base_layer, **kwargs):
        table = types.SimpleNamespace(weight=dequantize(base_layer))
        return super().forward(x, base_layer=table, **kwargs)


class _DoraEmbeddingVariant(DoraEmbeddingVariant):
    @staticmethod
    def init(module, adapter_name: str, **kwargs):
        DoraEmbeddingVariant.init(module, adapter_name, **kwargs)
        # PEFT's init makes its own class and gives no way to name another.
        module.lora_magnitude_vector[adapter_name].__class__ = _DoraEmbedding


class LoraEmbedding4bit(_MergesIntoDense, PeftLoraEmbedding):
    """PEFT's LoRA layer on an `Embedding4bit`: its forward as it is, merging as in LoRA.

    The adapter is PEFT's: lora_embedding_A [r, num_embeddings], lora_embedding_B [dim, r]; the
    table is W + scaling A^T B^T.
    """

    def __init__(self, base_layer, adapter_name: str, config, target_name: str = "", **kwargs):
        self._name = target_name or type(self).__name__
        super().__init__(base_layer, adapter_name, config, **kwargs)

    @property
    def lora_variants(self):
        return {(): None, ("use_dora",): _DoraEmbeddingVariant}

    def _stacked(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Several adapters as one, in the roles of a [num_embeddings, dim] layer's: A [sum of r,
        dim], B [num_embeddings, sum of r], and the scaling."""
        A, B = self.lora_embedding_B, self.lora_embedding_A
        if len(names) == 1:
            (name,) = names
            return A[name].T.contiguous(), B[name].T.contiguous(), self.scaling[name]
        lora_A = torch.cat([A[name].T for name in names])
        lora_B = torch.cat([B[name].T * self.scaling[name] for name in names], dim=1)
        return lora_A, lora_B, 1.0

    def loftq_init(self, adapter_name: str, *args) -> None:
        """Refused: PEFT's would take the packed bytes for weights."""
        raise ValueError(
            f"init_lora_weights='loftq' on {self._name} needs the unquantized weight; a packed "
            "embedding starts with init_lora_weights=True, or stays dense without "
            "quantize_embeddings=True"
        )


class AdaLoraLinear4bit(SVDLinear):
    """PEFT's AdaLoRA layer on a `Linear4bit`: its forward as it is, merging as in LoRA."""

    def __init__(self, base_layer, adapter_name: str, config, target_name: str = "", **kwargs):
        self._name = target_name or type(self).__name__
        super().__init__(base_layer, adapter_name, config, target_name=target_name, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `LoraLinear4bit.merge`."""
        check_whole(f"merge: {self._name}", self)
        check_in_memory(f"merge: {self._name}", self, IN_MEMORY)
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                weight = dequantize(self.get_base_layer()).detach().float()
                weight = (weight + self.get_delta_weight(name)).detach()
                _check_finite(self._name, weight, [name], _packed_base(self).dtype)
                _swap_in(self, weight.to(_packed_base(self).dtype))
                self.merged_adapters.append(name)

    unmerge = _MergesIntoDense.unmerge


def _create_lora_module(original):
    """Wraps `_create_new_module` of LoraModel and AdaLoraModel."""

    @functools.wraps(original)
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (Linear4bit, Embedding4bit)):
            return original(lora_config, adapter_name, target, **kwargs)
        if kwargs.get("parameter_name") is not None:
            parameter = f".{kwargs['parameter_name'].rpartition('.')[2]}"
            layer = kwargs["target_name"].removesuffix(parameter)
            raise ValueError(
                f"PEFT's target_parameters got {layer}{parameter}, a 4-bit weight; name its layer "
                "in target_modules"
            )
        if isinstance(base, Embedding4bit):
            return LoraEmbedding4bit(target, adapter_name, config=lora_config, **kwargs)
        if lora_config.fan_in_fan_out:
            # A GPT-2 layer is a Conv1D, [in, out]; packed it is an ordinary [out, in] layer.
            lora_config.fan_in_fan_out = False
        if lora_config.peft_type == peft.PeftType.ADALORA:
            kwargs.pop("device_map", None)
            return AdaLoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
        return LoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)

    return _create_new_module


# Other tuners --------------------------------------------------------------------------------


class PackedBackend(quantization_utils.QuantizationBackend):
    """How BOFT, MiSS, OFT, SHiRA and VeRA read a packed weight, and where they merge."""

    supports_merge = True
    backend_name = "qlora_ext 4bit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: torch.nn.Module) -> torch.Tensor:
        """The weight [out, in] of the packed layer, or of the dense one that stands in for it."""
        return dequantize(base_layer)

    def set_base_weight(self, peft_layer: BaseTunerLayer, weight_data: torch.Tensor) -> None:
        """Merging puts a dense layer in; taking the last adapter out puts the packed one back."""
        is_merged = "_qlora_ext_packed" in _innermost(peft_layer).__dict__
        if is_merged and not peft_layer.merged_adapters:
            _restore(peft_layer)
        else:
            dtype = _packed_base(peft_layer).dtype
            name = peft_layer.__dict__.get("_qlora_ext_name", type(peft_layer).__name__)
            check_in_memory(f"merge: {name}", peft_layer, IN_MEMORY)
            _check_finite(name, weight_data, list(peft_layer.active_adapters), dtype)
            _swap_in(peft_layer, weight_data.detach().to(dtype).contiguous())


def _resolve_backend(original):
    """Wraps `resolve_quantization_backend`."""

    @functools.wraps(original)
    def resolve_quantization_backend(base_layer, **kwargs):
        if isinstance(base_layer, Linear4bit):
            return PackedBackend()
        return original(base_layer, **kwargs)

    return resolve_quantization_backend


def dequantize(module: torch.nn.Module) -> torch.Tensor:
    """The weight [out, in] of a linear layer, or the table of an embedding: of a packed one in
    fp32, else as it is."""
    if isinstance(module, _Packed4bit):
        with loaded(module):
            return dequantize_4bit(module.quantized, torch.float32)
    return module.weight


def _dequantize_module(original):
    """Wraps `dequantize_module_weight`."""

    @functools.wraps(original)
    def dequantize_module_weight(module):
        return dequantize(module) if isinstance(module, _Packed4bit) else original(module)

    return dequantize_module_weight


def _tuner(layer: BaseTunerLayer) -> str:
    """The name of the method that a tuner layer belongs to."""
    if isinstance(layer, AdaLoraLayer):
        return "ADALORA"
    if isinstance(layer, LoraLayer):
        return "LORA"
    return type(layer).__module__.split(".")[2].upper()  # peft.tuners.oft.layer


def _refuse_packed(original):
    """Wraps a tuner's `_create_and_replace`: such a tuner would train on a packed weight and then
    fail to merge, or add to its bytes."""

    @functools.wraps(original)
    def _create_and_replace(self, config, adapter_name, target, *args, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        method = str(getattr(config.peft_type, "value", config.peft_type))
        if isinstance(base, _Lora):
            # PEFT's forward and merge would read the base weight alone and lose A and B.
            raise ValueError(
                f"PEFT's {method} on {kwargs.get('current_key', args[-1] if args else 'a layer')}: "
                "it has an adapter of qlora_ext.add_lora already; merge it with "
                "qlora_ext.merge_and_unload, or let PEFT start from a model without"
            )
        if isinstance(base, Embedding4bit) and method != "LORA":
            layer = kwargs.get("current_key", args[-1] if args else "an embedding")
            raise ValueError(
                f"PEFT's {method} cannot train {layer}, an embedding that is packed in 4 bits; use "
                f"LORA there, {_KEEP_TABLE}"
            )
        if isinstance(base, Linear4bit):
            if method not in _SUPPORTED:
                raise ValueError(
                    f"PEFT's {method} cannot train a 4-bit layer of qlora_ext; use one of "
                    f"{', '.join(sorted(_SUPPORTED))}, or load the model unquantized"
                )
            if isinstance(target, BaseTunerLayer) and _tuner(target) != method:
                # Merging two kinds into one weight depends on an order that neither knows.
                raise ValueError(
                    f"PEFT's {method} on a 4-bit layer that has {_tuner(target)} already: adapters "
                    "of one kind only"
                )
        if isinstance(base, _Packed4bit):
            check_can_adapt(f"PEFT's {method}", base, self.model)
            if not config.inference_mode:
                layer = kwargs.get("current_key", args[-1] if args else "a layer")
                check_trainable(f"PEFT's {method} on {layer}", base)
        # PEFT puts an adapter where the base weight is, and starts some of them from its values.
        with loaded(base) if isinstance(base, _Packed4bit) else contextlib.nullcontext():
            original(self, config, adapter_name, target, *args, **kwargs)
        if isinstance(base, _Packed4bit):
            watch(self)  # PEFT calls the model's forward, past the hook on the model
        given = dict(zip(("target_name", "parent"), args, strict=False)) | kwargs
        name, parent = given.get("target_name"), given.get("parent")
        if parent is not None and name in parent._modules:
            key = given.get("current_key") or name
            parent._modules[name].__dict__["_qlora_ext_name"] = key  # for errors

    return _create_and_replace


# Whole models --------------------------------------------------------------------------------


def _refuse_merged(model: torch.nn.Module) -> None:
    """ValueError where a dense layer stands in: without its adapters it would stay for good."""
    for name, module in model.named_modules():
        if "_qlora_ext_packed" not in module.__dict__ or isinstance(module.base_layer, _Packed4bit):
            continue
        raise ValueError(
            f"unload: the adapters of {name} are merged, and a dense layer stands in for the "
            "packed one; call unmerge_adapter() first to get the packed model back, or "
            "merge_and_unload() for a dense one"
        )


def _check_whole(op: str, model: torch.nn.Module, only: str = "") -> None:
    """ValueError for a sharded model with packed layers, or with dense ones that stand in; of the
    parameters, those with `only` in their names are looked at."""
    if any(
        isinstance(module, _Packed4bit) or "_qlora_ext_packed" in module.__dict__
        for module in model.modules()
    ):
        check_whole(op, model, only)


def _check_mergeable(op: str, model: torch.nn.Module) -> None:
    """ValueError for a sharded or offloaded model with packed layers."""
    _check_whole(op, model)
    if any(isinstance(module, _Packed4bit) for module in model.modules()):
        check_in_memory(op, model, IN_MEMORY)


def _refuse_sharded(original):
    """Wraps `BaseTuner.merge_adapter` and `unmerge_adapter`."""

    @functools.wraps(original)
    def checked(self, *args, **kwargs):
        _check_mergeable(original.__name__, self.model)
        return original(self, *args, **kwargs)

    return checked


def _save_pretrained(original):
    """Wraps `PeftModel.save_pretrained`, which reads the state of the model if it is given none."""

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        packed = [module for module in self.modules() if isinstance(module, _Packed4bit)]
        prefix = getattr(self.base_model, "prefix", "")
        if kwargs.get("state_dict") is None:
            _check_whole("save_pretrained", self, only=prefix)
            if any(is_offloaded(module) for module in packed):
                kwargs["state_dict"] = _fetched_state(self, prefix)
        if packed:
            names = args[2] if len(args) > 2 else kwargs.get("selected_adapters")
            state = kwargs.get("state_dict") or dict(self.named_parameters())
            _check_written(state, prefix, list(self.peft_config) if names is None else names)
        return original(self, *args, **kwargs)

    return save_pretrained


def _check_written(state: dict[str, torch.Tensor], prefix: str, adapters: list[str]) -> None:
    """OverflowError, before anything is written, for a NaN or an infinity in what is to be saved of
    some adapters: what we would refuse to read."""
    kinds = (prefix, "modules_to_save.", "trainable_tokens_")
    for key, tensor in state.items():
        saved = any(f".{name}." in f"{key}." for name in adapters)
        if saved and any(kind and kind in key for kind in kinds) and tensor.is_floating_point():
            check_finite(f"save_pretrained: {key}", local_part(tensor.detach()), tensor.dtype)


def _check_combined(original):
    """Wraps `LoraModel.add_weighted_adapter`: an adapter that is not finite is taken away again."""

    @functools.wraps(original)
    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs):
        is_new = adapter_name not in self.peft_config
        result = original(self, adapters, weights, adapter_name, *args, **kwargs)
        if is_new and any(isinstance(module, _Packed4bit) for module in self.model.modules()):
            own = {
                name: parameter
                for name, parameter in self.model.named_parameters()
                if self.prefix in name and f".{adapter_name}." in f"{name}."
            }
            try:
                for name, parameter in own.items():
                    check_finite(name, local_part(parameter.detach()), parameter.dtype)
            except OverflowError as error:
                self.delete_adapter(adapter_name)
                raise ValueError(
                    f"add_weighted_adapter: with weights {weights}, {error}: an adapter is broken, "
                    "or a weight too large"
                ) from None
        return result

    return add_weighted_adapter


def _fetched_state(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The model's state dict in which what may be saved is fetched from where it is offloaded:
    names with `prefix` in them, embeddings and the head."""
    state = model.state_dict()
    head = output_embeddings(model)
    for name, module in model.named_modules():
        table = isinstance(module, torch.nn.Embedding) or module is head
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}"
            if parameter is not None and parameter.is_meta and (table or prefix in full):
                state[full] = value_of(module, key)
    return state


def _merge_and_unload(original):
    """Wraps `BaseTuner._unload_and_optionally_merge`."""

    @functools.wraps(original)
    def _unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        if merge:
            _check_mergeable("merge_and_unload", self.model)
            if any(isinstance(m, _Packed4bit) for m in self.model.modules()):
                _check_unadapted(self.model, self.prefix)
                if len(args) < 2:
                    kwargs["safe_merge"] = True  # of the dense layers too, which PEFT merges
        else:
            _refuse_merged(self.model)
        model = original(self, merge, *args, **kwargs)
        if merge and not _merge_to_4bit.get():
            leave_no_packed_layer(model)
        return model

    return _unload_and_optionally_merge


def _check_unadapted(model: torch.nn.Module, prefix: str) -> None:
    """ValueError, before PEFT changes anything, for a value without adapter that its dtype cannot
    hold: of a norm, a bias, or a packed layer that becomes dense. Merging checks the others."""
    adapters = {name for name, _ in model.named_parameters() if prefix in name}
    try:
        check_parameters("merge_and_unload", model, skipped=adapters)
        for name, module in model.named_modules():
            is_adapted = name.endswith("base_layer")
            if isinstance(module, (Linear4bit, Embedding4bit)) and not is_adapted:
                check_weight(f"merge_and_unload: {name}.weight", module, module.dtype)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def _all_or_nothing(original):
    """Wraps a tuner's `inject_adapter`: where one layer of a model with packed layers is refused,
    those that were wrapped before it are put back, and what was trainable is again."""

    @functools.wraps(original)
    def inject_adapter(self, model, *args, **kwargs):
        modules = list(model.modules())
        if not any(isinstance(module, _Packed4bit) for module in modules):
            return original(self, model, *args, **kwargs)
        before = [(module, _attributes(module)) for module in modules]
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            return original(self, model, *args, **kwargs)
        except BaseException:
            undo = [functools.partial(_put_back, *entry) for entry in before]
            undo += [functools.partial(_set_requires_grad, *entry) for entry in trained]
            for step in undo:
                with contextlib.suppress(Exception):  # the first error says more, and all else
                    step()  # is still put back
            raise

    return inject_adapter


def _attributes(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and where it is a container a copy of it: children, adapters' settings."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in module.__dict__.items()
    }


def _put_back(module: torch.nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    """Undoes changes since `_attributes`; containers stay the same objects."""
    module.__dict__.clear()
    module.__dict__.update((name, value) for name, (value, _) in attributes.items())
    for value, content in attributes.values():
        # Not compared with what they were: `==` of two tensors is no bool.
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(content)


def _set_requires_grad(parameter: torch.nn.Parameter, requires_grad: bool) -> None:
    """Sets it where it differs; a tensor of inference mode takes no setting at all."""
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)


def _refuse_packed_layer(original, what: str):
    """Wraps the `__init__` of PEFT's `ModulesToSaveWrapper` and `TrainableTokensLayer`, the setting
    `what`: neither a packed layer nor rows of it can be trained."""

    @functools.wraps(original)
    def __init__(self, base_layer, *args, **kwargs):
        if isinstance(base_layer, _Packed4bit):
            dense = "keep it dense with modules_to_not_convert"
            if isinstance(base_layer, Embedding4bit):
                dense = _KEEP_TABLE.removeprefix("or ")
            raise ValueError(
                f"PEFT's {what} names a {type(base_layer).__name__}, whose packed weight cannot be "
                f"trained; adapt it with target_modules, or {dense}"
            )
        original(self, base_layer, *args, **kwargs)

    return __init__


# Files -----------------------------------------------------------------------------------------


def _packed_tables(model: torch.nn.Module) -> dict[str, Embedding4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Embedding4bit)}


def _get_state_dict(original):
    """Wraps `get_peft_model_state_dict`: where PEFT stores an embedding beside the adapter
    (`save_embedding_layers`), its packed tensors become the dense table that they stand for, which
    PEFT can load onto any base."""

    @functools.wraps(original)
    def get_peft_model_state_dict(model, *args, **kwargs):
        state = original(model, *args, **kwargs)
        for name, table in _packed_tables(getattr(model, "_orig_mod", model)).items():
            parts = {key: state.get(f"{name}.{key}") for key in _PACKED_KEYS}
            if parts["weight"] is None or parts["weight_absmax"] is None:
                continue
            # The tensors that were given: they may have been gathered from several processes.
            q = dataclasses.replace(
                table.quantized,
                packed=parts["weight"],
                absmax=parts["weight_absmax"],
                nested=parts["weight_nested"],
                mean=parts["weight_mean"],
            )
            for key in _PACKED_KEYS:
                state.pop(f"{name}.{key}", None)
            state[f"{name}.weight"] = dequantize_4bit(q, table.dtype)
        return state

    return get_peft_model_state_dict


def _set_state_dict(original):
    """Wraps `set_peft_model_state_dict`: an embedding stored beside the adapter is packed as the
    model's own is, unless it is the one that the model has."""

    @functools.wraps(original)
    def set_peft_model_state_dict(model, peft_model_state_dict, *args, **kwargs):
        state = dict(peft_model_state_dict)
        if any(isinstance(module, _Packed4bit) for module in model.modules()):
            _check_read(state)
        tables = []
        for name, table in _packed_tables(model).items():
            # An embedding without adapter here may have had one where it was stored, or none.
            plain = name.removesuffix(".base_layer")
            for key in (f"{plain}.weight", f"{plain}.base_layer.weight"):
                if key in state and state[key].is_floating_point():
                    dense = state.pop(key)
                    _check_table(key, dense, table)
                    with loaded(table):
                        own = dequantize_4bit(table.quantized, table.dtype)
                    if not torch.equal(dense.to(own), own):
                        check_in_memory(
                            f"set_peft_model_state_dict: {key}",
                            table,
                            "load the model without 'cpu' and 'disk' in device_map",
                        )
                        tables.append((table, dense))
        result = original(model, state, *args, **kwargs)
        for table, dense in tables:
            table._quantize(dense.to(table.weight.device))
        return result

    return set_peft_model_state_dict


def _check_read(state: dict[str, torch.Tensor]) -> None:
    """ValueError for a tensor of an adapter with a NaN or Inf."""
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        if not local_part(tensor).isfinite().all():
            raise ValueError(
                f"set_peft_model_state_dict: {key} has a NaN or Inf, want finite values"
            )


def _check_table(key: str, dense: torch.Tensor, table: Embedding4bit) -> None:
    """ValueError for a table of another size than the model's."""
    N, K = table._shape
    if tuple(dense.shape) != (N, K):
        raise ValueError(
            f"set_peft_model_state_dict: {key} has shape {list(dense.shape)}, want [{N}, {K}] like "
            "the model's packed embedding; resize the unquantized model (resize_token_embeddings) "
            "before it is packed"
        )


def _count_logical_weights(original):
    """Wraps `PeftModel.get_nb_trainable_parameters`."""

    @functools.wraps(original)
    def get_nb_trainable_parameters(self):
        trainable, total = original(self)
        return trainable, total + logical_surplus(self)

    return get_nb_trainable_parameters


def prepare_model_for_kbit_training(
    model: torch.nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """Freezes a packed model and turns gradient checkpointing on, with inputs that need gradients.

    PEFT's function of this name also makes fp32 copies of norms, embeddings and head; ours leaves
    dtypes alone, since adapters are fp32 and each op accumulates in fp32.

    Args:
        model: a transformers model with `Linear4bit` layers; changed in place and returned.
        use_gradient_checkpointing: recompute activations in the backward.
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`; the default is
            {"use_reentrant": False}.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        # Reentrant checkpointing drops the gradient of a block whose inputs need none, and the
        # inputs of the first block are the outputs of a frozen embedding.
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {"use_reentrant": False}
        )
    return model


def _prepare(original):
    """Wraps `prepare_model_for_kbit_training`."""

    @functools.wraps(original)
    def prepare(
        model,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs=None,
        *args,
        **kwargs,
    ):
        ours = any(isinstance(module, _Packed4bit) for module in model.modules())
        if ours:
            return prepare_model_for_kbit_training(
                model, use_gradient_checkpointing, gradient_checkpointing_kwargs
            )
        return original(
            model, use_gradient_checkpointing, gradient_checkpointing_kwargs, *args, **kwargs
        )

    return prepare


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: torch.nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[torch.nn.Module, str], bool] | None = None,
) -> None:
    """Starts LoRA from what quantizing took away: B A nearest to W - dequantize(W4), by SVD.

    The packed weights stay as they are, so the adapter fits any copy of the 4-bit model. Source:
    LoftQ (arXiv 2310.08659), one step of its iteration, as PEFT does for bitsandbytes.

    Args:
        peft_model: a `PeftModel` with LoRA on packed layers.
        model_path: folder or file with the unquantized weights in safetensors; None takes the
            folder that the base was loaded from.
        adapter_name: the adapter to write.
        callback: called with (peft_model, layer name) after each layer; returning False takes that
            layer's change back.

    Raises:
        ValueError: no LoRA on a packed layer, a sharded model, or the file holds something else
            than its weight.
        FileNotFoundError: no safetensors file there.
    """
    check_whole("replace_lora_weights_loftq", peft_model)
    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLinear4bit) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"replace_lora_weights_loftq: no packed layer with LoRA named {adapter_name!r}"
        )
    model_path = model_path or peft_model.get_base_model().config._name_or_path
    if not any(Path(model_path).glob("*.safetensors")) and not Path(model_path).is_file():
        # A sharded model of the hub.
        loader = loftq_utils._SafetensorLoader(peft_model, str(model_path))
        model_path = Path(next(iter(loader.weight_map.values()))).parent
    unquantized = UnquantizedWeights(model_path, peft_model, "replace_lora_weights_loftq")
    for name, layer in layers.items():
        packed = _packed_base(layer)
        lost = unquantized.weight(prefix + name, packed) - dequantize(packed)
        # The seed of the random projection: the same start in every run.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            r = layer.r[adapter_name]
            U, S, V = torch.svd_lowrank(lost, q=min(2 * r + 8, *lost.shape), niter=4)
        root = (S[:r] / abs(layer.scaling[adapter_name])).sqrt()
        lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        before = lora_A.clone(), lora_B.clone()
        lora_A.copy_((V[:, :r] * root).T)
        lora_B.copy_(U[:, :r] * root)
        if callback is not None and not callback(peft_model, name):
            lora_A.copy_(before[0])
            lora_B.copy_(before[1])


def _loftq(original):
    """Wraps `replace_lora_weights_loftq`."""

    @functools.wraps(original)
    def replace(peft_model, *args, **kwargs):
        ours = any(isinstance(module, LoraLinear4bit) for module in peft_model.modules())
        return (replace_lora_weights_loftq if ours else original)(peft_model, *args, **kwargs)

    return replace


def load_adapters(path: str | Path, base: Any = None, is_trainable: bool = False, **kwargs: Any):
    """A saved adapter on its 4-bit base, in one call, for a fresh process.

    Args:
        path: folder that `save_pretrained` of a PEFT model wrote.
        base: the loaded base model, or its folder or hub name; None takes the name that the
            adapter's config recorded.
        is_trainable: continue training the adapter.
        kwargs: for `AutoModelForCausalLM.from_pretrained` of the base, e.g. dtype, device_map or
            quantization_config=QLoraExtConfig() where the base is an unquantized model.

    Returns:
        the `peft.PeftModel`.

    Raises:
        ValueError: no base was given and the config names none.
    """
    config = peft.PeftConfig.from_pretrained(path)
    base = base if base is not None else config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"load_adapters: base got None, and adapter_config.json in {path} names none"
        )
    if not isinstance(base, torch.nn.Module):
        base = transformers.AutoModelForCausalLM.from_pretrained(base, **kwargs)
    return peft.PeftModel.from_pretrained(base, path, is_trainable=is_trainable)


# Attaching -----------------------------------------------------------------------------------


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))


def _replace_everywhere(function, wrap) -> None:
    """Puts wrap(function) wherever PEFT or TRL hold `function`: they import it by name."""
    wrapper = wrap(function)
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] not in ("peft", "trl"):
            continue
        for attribute, value in list(vars(module).items()):
            if value is function:
                setattr(module, attribute, wrapper)


def attach() -> None:
    """Wraps the functions of PEFT that this file's head lists. Idempotent.

    Raises:
        AttributeError, ImportError: a PEFT that lacks one of them.
    """
    if isinstance(vars(lora.LoraModel).get("_qlora_ext_attached"), bool):
        return
    for tuner in (lora.LoraModel, AdaLoraModel):
        tuner._create_new_module = staticmethod(_create_lora_module(tuner._create_new_module))
    for tuner in _subclasses(BaseTuner):
        if "_create_and_replace" in vars(tuner):
            tuner._create_and_replace = _refuse_packed(tuner._create_and_replace)
        if "inject_adapter" in vars(tuner):
            tuner.inject_adapter = _all_or_nothing(tuner.inject_adapter)
        if "_unload_and_optionally_merge" in vars(tuner):
            tuner._unload_and_optionally_merge = _merge_and_unload(
                tuner._unload_and_optionally_merge
            )
        for name in ("merge_adapter", "unmerge_adapter"):
            if name in vars(tuner):
                setattr(tuner, name, _refuse_sharded(vars(tuner)[name]))
    peft.PeftModel.save_pretrained = _save_pretrained(peft.PeftModel.save_pretrained)
    for wrapper, what in (
        (peft_other.ModulesToSaveWrapper, "modules_to_save"),
        (TrainableTokensLayer, "trainable tokens (trainable_token_indices)"),
    ):
        wrapper.__init__ = _refuse_packed_layer(wrapper.__init__, what)
    for model in (peft.PeftModel, peft.PeftMixedModel):
        if "get_nb_trainable_parameters" in vars(model):
            model.get_nb_trainable_parameters = _count_logical_weights(
                model.get_nb_trainable_parameters
            )
    _replace_everywhere(quantization_utils.resolve_quantization_backend, _resolve_backend)
    _replace_everywhere(dequantize_module_weight, _dequantize_module)
    _replace_everywhere(save_and_load.get_peft_model_state_dict, _get_state_dict)
    _replace_everywhere(save_and_load.set_peft_model_state_dict, _set_state_dict)
    _replace_everywhere(loftq_utils.replace_lora_weights_loftq, _loftq)
    _replace_everywhere(peft_other.prepare_model_for_kbit_training, _prepare)
    lora.LoraModel.add_weighted_adapter = _check_combined(lora.LoraModel.add_weighted_adapter)
    lora.LoraModel._qlora_ext_attached = True


attach()
