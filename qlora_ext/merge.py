"""Merging adapters into dense weights: a plain model at the end, which needs nothing of ours."""

from __future__ import annotations

import sys

import torch
from torch import nn

from . import ops
from .checks import check_finite
from .experts import Experts4bit, dense_experts
from .models import check_model, check_whole, own_config, places_of, progress, replace_module
from .models.raw_errors import unwatch
from .nn import (
    FLOAT_DTYPES,
    Embedding4bit,
    Linear4bit,
    LoraLinear,
    PanelLinear,
    _Lora,
    _Packed4bit,
)
from .offload import check_in_memory
from .quantized_tensor import QuantizedTensor, dequantize_4bit

__all__ = ["merge_and_unload"]

# What to do where a model is offloaded.
IN_MEMORY = (
    "save the adapter, load the model without 'cpu' and 'disk' in device_map, and load the adapter "
    "again (a CPU merges as well as a GPU); or the command qlora-ext merge, which reads one shard "
    "at a time"
)


def merge_and_unload(
    model: nn.Module, dtype: torch.dtype = torch.float16, *, progress_bar: bool = True
) -> nn.Module:
    """Makes a plain dense model of one with adapters, in place: W + scaling B A in every layer.

    The sum is made in fp32 from the packed weight and rounded once to dtype. Packed layers become
    nn.Linear (or Conv1D, where they were one), packed embeddings nn.Embedding, and every other
    floating parameter and saved buffer takes dtype. A layer's packed weight is released when its
    dense one is there. A head that was tied to the embedding is untied: its weight differs.

    Args:
        model: a model that went through add_lora or load_adapter.
        dtype: torch.float16, torch.bfloat16 or torch.float32.
        progress_bar: show a tqdm bar.

    Returns:
        model, whose parameters require gradients as those of a freshly loaded model do.

    Raises:
        TypeError: dtype is another one; model is a single layer or carries PEFT's adapters.
        ValueError: no adapters: merged already, or never added; a sharded model, whose parameters
            are DTensors; an offloaded model.
        OverflowError: a merged value, or another parameter, is a NaN or beyond dtype's range,
            naming the layer, how many such values it has and the largest. The model is then as it
            was.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"merge_and_unload: dtype is {dtype}, want torch.float16, "
            "torch.bfloat16 or torch.float32"
        )
    _check_adapters(model)
    _check_range(model, dtype)
    head = _tied_head(model)
    names = _layers_to_replace(model)
    places = places_of(model)
    for name in progress(names, "merge", progress_bar):
        old = model.get_submodule(name)
        replace_module(model, old, dense_layer(old, dtype), places)
        del old
    unwatch(model)
    _cast(model, dtype)
    _forget_quantization(model, dtype, untied=head)
    return model


def _check_adapters(model: nn.Module) -> None:
    check_model(
        "merge_and_unload",
        model,
        one_layer="put it in an nn.Sequential to merge one layer",
        peft="adapters from add_lora or load_adapter; model.merge_and_unload() merges PEFT's",
        layers=(nn.Linear, nn.Embedding, Experts4bit),
    )
    check_whole("merge_and_unload", model)
    check_in_memory("merge_and_unload", model, IN_MEMORY)
    modules = list(model.modules())
    if any(isinstance(module, _Lora) for module in modules):
        return
    packed = any(isinstance(module, _Packed4bit) for module in modules)
    why = "its layers are still packed" if packed else "it was merged already, or never quantized"
    raise ValueError(
        f"merge_and_unload: model has no adapters ({why}), want one that add_lora or load_adapter "
        "gave adapters to"
    )


def _layers_to_replace(model: nn.Module) -> list[str]:
    """Names of the modules to make dense; experts go as the layer that holds them."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (_Packed4bit, _Lora, Experts4bit, PanelLinear)):
            inside = names and name.startswith(f"{names[-1]}.")
            if not inside:
                names.append(name)
    return names


# Layers -------------------------------------------------------------------------------------------


def _merged_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The dense [N, K] weight of a packed or adapted layer in dtype."""
    if isinstance(module, LoraLinear):
        delta = module.lora_B.detach().float() @ module.lora_A.detach().float()
        return module.weight.detach().float().add(delta, alpha=module.scaling).to(dtype)
    if isinstance(module, _Lora):
        # The op wants A and B of one dtype; fp32 holds either exactly.
        A, B = module.lora_A.detach().float(), module.lora_B.detach().float()
        return ops.merge_lora_4bit(module.quantized.op_args(), A, B, module.scaling, dtype)
    if not isinstance(module, _Packed4bit):
        return module.weight.detach().to(dtype)
    return dequantize_4bit(module.quantized, dtype)


def dense_layer(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain layer that computes what module did."""
    if isinstance(module, Experts4bit):
        return dense_experts(module, lambda layer: _merged_weight(layer, dtype))
    if type(module) is PanelLinear:
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        # The very parameters: they may be tied, and are cast with the rest of the model.
        linear.weight, linear.bias = module.weight, module.bias
        return linear.train(module.training)
    weight = _merged_weight(module, dtype)
    if isinstance(module, Embedding4bit):
        N, K = weight.shape
        embedding = nn.Embedding(N, K, module.padding_idx, device="meta")
        embedding.weight = nn.Parameter(weight)
        return embedding.train(module.training)
    bias = module.bias
    if isinstance(module, Linear4bit) and module.from_conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            linear = Conv1D(module.out_features, module.in_features)
        weight = weight.T.contiguous()
    else:
        linear = nn.Linear(
            module.in_features, module.out_features, bias=bias is not None, device="meta"
        )
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype))
    return linear.train(module.training)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is left one tensor at a time, so that tied parameters and buffers stay tied."""
    cast = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if _is_float(parameter):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(True)
        for key, buffer in module._buffers.items():
            if _is_float(buffer) and _is_saved(module, key):
                cast.setdefault(buffer, buffer.to(dtype))
                module._buffers[key] = cast[buffer]


def _is_float(tensor: torch.Tensor | None) -> bool:
    """Whether it has a dtype that merging casts: not float8, which has a scale somewhere else."""
    return tensor is not None and tensor.dtype in (*FLOAT_DTYPES, torch.float64)


def _is_saved(module: nn.Module, key: str) -> bool:
    # Buffers outside the checkpoint (rotary frequencies) are fp32 whatever the model's dtype is.
    return key not in module._non_persistent_buffers_set


# Range --------------------------------------------------------------------------------------------


def _weight_bound(q: QuantizedTensor) -> float:
    """A bound on |dequantized weight| from the statistics alone."""
    values = max(abs(v) for v in q.values)
    if q.nested is None:
        scale = q.absmax.clone().view(torch.float32).abs().max().item()
    else:
        nested = q.nested.clone().view(torch.float32).abs()
        scale = (nested[0] + nested[1:].max()).item()
    mean = 0.0 if q.mean is None else q.mean.clone().view(torch.float32).abs().max().item()
    return values * scale + mean


WIDER = "merge to torch.bfloat16 or torch.float32"


def check_weight(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """OverflowError, by that name, unless dtype holds the weight of a packed or adapted layer.

    The weight itself is made only where bounds from its statistics do not settle it.
    """
    weight = module._parameters["weight"]
    if weight.is_meta:
        return
    packed = isinstance(module, _Packed4bit)
    bound = _weight_bound(module.quantized) if packed else weight.abs().max().item()
    if isinstance(module, _Lora):
        A, B = module.lora_A.detach().float(), module.lora_B.detach().float()
        # |B A| <= (row norms of B) * (column norms of A), by Cauchy-Schwarz.
        bound += abs(module.scaling) * (B.norm(dim=1).max() * A.norm(dim=0).max()).item()
    if not bound < torch.finfo(dtype).max / 2:
        values = _merged_weight(module, torch.float32)
        check_finite(name, values, dtype, advice=WIDER if dtype == torch.float16 else "")


def _check_range(model: nn.Module, dtype: torch.dtype) -> None:
    """OverflowError, before anything is changed, if a value is not finite in dtype."""
    op = "merge_and_unload: "
    advice = WIDER if dtype == torch.float16 else ""
    for name, module in model.named_modules():
        own = dict(module._parameters)
        if isinstance(module, (_Packed4bit, _Lora)):
            own.pop("weight")
            check_weight(f"{op}{name}.weight".replace(" .", " "), module, dtype)
        for key, parameter in own.items():
            if _is_float(parameter) and "lora_" not in key:
                check_finite(f"{op}{f'{name}.{key}'.lstrip('.')}", parameter, dtype, advice=advice)
        for key, buffer in module._buffers.items():
            if _is_float(buffer) and _is_saved(module, key) and not buffer.is_meta:
                values = buffer.to_dense() if buffer.layout != torch.strided else buffer
                # A mask's infinities stay what they are.
                values = values[values.isfinite()]
                check_finite(f"{op}{f'{name}.{key}'.lstrip('.')}", values, dtype, advice=advice)


# transformers' bookkeeping ------------------------------------------------------------------------


def _tied_head(model: nn.Module) -> bool:
    """Whether an adapted dense layer shares its weight with another module."""
    adapted = {id(m.weight) for m in model.modules() if isinstance(m, LoraLinear)}
    owners = [id(m._parameters["weight"]) for m in model.modules() if "weight" in m._parameters]
    return any(owners.count(i) > 1 for i in adapted)


def _forget_quantization(model: nn.Module, dtype: torch.dtype, untied: bool) -> None:
    for attribute in ("quantization_report", "hf_quantizer", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    model.is_quantized = False
    own_config(model)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config.__dict__.pop("_is_quantized", None)
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("quantization_config", None)
        config.dtype = dtype
        if untied:
            config.tie_word_embeddings = False
    if untied and hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
