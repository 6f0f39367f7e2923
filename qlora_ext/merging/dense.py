"""Merges adapters into dense weights. The result is a plain model that does not need qlora_ext."""

from __future__ import annotations

import torch
from torch import nn

from .. import hosts
from ..checks import check_finite, check_parameters
from ..models.raw_errors import unwatch
from ..models.walk import check_model, check_whole, places_of, progress, replace_module
from ..nn.dense import WIDER, check_weight, dense_layer, restore_conv1d
from ..nn.embedding import Embedding4bit
from ..nn.experts import Experts4bit
from ..nn.linear import Linear4bit
from ..nn.lora import LoraLinear, _Lora
from ..nn.offload import check_in_memory
from ..nn.packed import _Packed4bit
from ..nn.panel import PanelLinear
from ..tensor.config import FLOAT_DTYPES

# What to do if a model is offloaded.
IN_MEMORY = (
    "save the adapter, load the model without 'cpu' and 'disk' in device_map, and load the adapter "
    "again (a CPU merges as well as a GPU); or use the command qlora-ext merge, which reads one "
    "shard at a time"
)


def merge_and_unload(
    model: nn.Module, dtype: torch.dtype = torch.float16, *, progress_bar: bool = True
) -> nn.Module:
    """Turns a model with adapters into a plain dense one, in place: W + scaling B A in every layer.

    The sum is computed in fp32 from the packed weight and rounded once to dtype. Packed layers
    become nn.Linear (or Conv1D, if they were that before), and packed embeddings nn.Embedding. All
    other float parameters and saved buffers are cast to dtype. Each packed weight is released as
    soon as its dense one exists. An adapted head that was tied to the embedding is untied.

    Args:
        model: a model that went through add_lora or load_adapter.
        dtype: torch.float16, torch.bfloat16 or torch.float32.
        progress_bar: show a tqdm bar.

    Returns:
        model. Its parameters require gradients, like those of a freshly loaded model.

    Raises:
        TypeError: dtype is another one; model is a single layer or has PEFT's adapters.
        ValueError: the model has no adapters (merged already, or never added), is sharded (its
            parameters are DTensors) or is offloaded.
        OverflowError: a merged value or another parameter is a NaN or beyond dtype's range. The
            error names the layer, the number of such values and the largest. The model then stays
            as it was.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"merge_and_unload: dtype is {dtype}, want torch.float16, "
            "torch.bfloat16 or torch.float32"
        )
    _check_adapters(model)
    _check_range(model, dtype)
    head = tied_head(model)
    names = _layers_to_replace(model)
    places = places_of(model)
    for name in progress(names, "merge", progress_bar):
        old = model.get_submodule(name)
        replace_module(model, old, dense_layer(old, dtype), places)
        del old
    unwatch(model)
    _cast(model, dtype)
    _tell_dense(model, dtype)
    if head:
        hosts.tell(hosts.on_untied, model)
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
    """Names of the modules to make dense. Experts are replaced as a whole layer."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (_Packed4bit, _Lora, Experts4bit, PanelLinear)):
            inside = names and name.startswith(f"{names[-1]}.")
            if not inside:
                names.append(name)
    return names


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the remaining tensors in place or once each, so that tied ones stay tied."""
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
    """Whether it has a dtype that merging casts. float8 stays: its scale is stored elsewhere."""
    return tensor is not None and tensor.dtype in (*FLOAT_DTYPES, torch.float64)


def _is_saved(module: nn.Module, key: str) -> bool:
    # Buffers that are not saved (rotary frequencies) stay fp32, whatever the model's dtype is.
    return key not in module._non_persistent_buffers_set


def _check_range(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises OverflowError if a value is not finite in dtype, before anything is changed."""
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
                # A mask may hold infinities.
                values = values[values.isfinite()]
                check_finite(f"{op}{f'{name}.{key}'.lstrip('.')}", values, dtype, advice=advice)


def tied_head(model: nn.Module) -> bool:
    """Whether an adapted dense layer shares its weight with another module."""
    adapted = {id(m.weight) for m in model.modules() if isinstance(m, LoraLinear)}
    owners = [id(m._parameters["weight"]) for m in model.modules() if "weight" in m._parameters]
    return any(owners.count(i) > 1 for i in adapted)


def leave_no_packed_layer(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes every packed layer of a model dense, in place.

    Afterwards it is an ordinary model: saving it writes no quantization config.

    Args:
        dtype: of the result. None keeps each parameter's dtype, and gives a packed layer the dtype
            it had before packing.

    Raises:
        OverflowError: that dtype cannot hold a weight.
        ValueError: weights are offloaded. In both cases the model stays as it was.
    """
    check_in_memory("dequantize", model, "load it without 'cpu' and 'disk' in device_map")
    check_parameters("dequantize", model, dtype)
    for name, module in model.named_modules():
        if isinstance(module, _Packed4bit):
            check_weight(f"dequantize: {name}.weight", module, dtype or module.dtype)
    if dtype is not None:
        # Not the model's own `to`: transformers' refuses a model that answers as bitsandbytes'.
        nn.Module.to(model, dtype)
    done = set()  # the parts of an Experts4bit, which becomes one dense module
    for module in list(model.modules()):
        if module in done:
            continue
        if isinstance(module, Experts4bit):
            done.update(module.modules())
            new = dense_layer(module, module.up.dtype)
            replace_module(model, module, new.requires_grad_(False))
        elif type(module) is PanelLinear:
            replace_module(model, module, dense_layer(module, module.weight.dtype))
        elif isinstance(module, (Linear4bit, Embedding4bit)):
            replace_module(model, module, dense_layer(module, module.dtype))
        elif getattr(module, "from_conv1d", False):
            replace_module(model, module, restore_conv1d(module))
    unwatch(model)
    _tell_dense(model, dtype)


def _tell_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    model.__dict__.pop("quantization_report", None)
    hosts.tell(hosts.on_dense, model, dtype)
