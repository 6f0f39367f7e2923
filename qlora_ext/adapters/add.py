"""Adds adapters to a model, and counts its trainable parameters."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from .. import hosts
from ..models.architectures import SAME_INPUT
from ..models.plan import TRAINS, is_factor
from ..models.raw_errors import explain_errors
from ..models.report import num_parameters
from ..models.walk import check_model, places_of, replace_module, stacked_names
from ..nn.linear import Linear4bit, is_conv1d
from ..nn.lora import LoraLinear, LoraLinear4bit, _Lora
from ..nn.offload import check_can_adapt, device_of
from ..nn.shared_input import SharedInput
from ..nn.stack import LoraStack4bit, Stack4bit
from ..text import first_few, shorten
from .config import LoraConfig
from .targets import _read_past_forward, target_names


def adapters_of(model: nn.Module) -> dict[str, _Lora]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Lora)}


def check_adaptable(op: str, model: nn.Module) -> None:
    check_model(
        op,
        model,
        one_layer="LoraLinear4bit.from_linear adapts one layer",
        peft="a model whose adapters are ours; a PeftModel has methods of its own for this",
    )


def check_trainable(op: str, model: nn.Module) -> None:
    """Raises ValueError if a parameter was made under torch.inference_mode, because autograd cannot
    save it for a backward pass. (Such buffers, rotary frequencies say, are seldom saved.)"""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{op}: {name} was made under torch.inference_mode, and autograd cannot train "
                "through it; load the model outside of inference_mode, or under torch.no_grad()"
            )


def check_foreign(op: str, model: nn.Module) -> None:
    """Raises ValueError if another library's adapters in model require gradients, because op
    freezes all but its own."""
    own = {id(p) for m in adapters_of(model).values() for p in (m.lora_A, m.lora_B)}
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own and is_factor(name)
    ]
    if names:
        raise ValueError(
            f"{op}: {', '.join(stacked_names(names)[:4])} are adapters of another library and "
            f"require gradients, but {op} would freeze them: train them without {op}, merge them "
            "first, or freeze them yourself (requires_grad_(False)) to keep them as they are"
        )


def _warn_of_frozen(model: nn.Module) -> None:
    """Warns about layers that quantize_model left alone because they train, and that are about to
    be frozen."""
    report = getattr(model, "quantization_report", None)
    left = {part.name for part in report.unquantized if part.reason == TRAINS} if report else ()
    names = [
        name
        for name, module in model.named_modules()
        if name in left
        and any(p.requires_grad for p in module._parameters.values() if p is not None)
    ]
    if names:
        warnings.warn(
            f"add_lora: froze {', '.join(stacked_names(names)[:8])}, which quantize_model left "
            "alone because they train; call requires_grad_(True) on those that you train on",
            stacklevel=3,
        )


def with_adapter(name: str, base: nn.Module, **settings) -> _Lora:
    if isinstance(base, Stack4bit):
        settings.pop("lora_dropout")
        return LoraStack4bit.from_stack(base, device=device_of(base), **settings)
    if isinstance(base, Linear4bit):
        return LoraLinear4bit.from_linear(base, **settings)
    if is_conv1d(base):
        raise TypeError(
            f"add_lora: {name} is an unquantized Conv1D, want a 4-bit layer or an nn.Linear; "
            "quantize_model packs it"
        )
    try:
        return LoraLinear.from_linear(base, **settings)
    except TypeError as error:
        raise TypeError(f"add_lora: {name}: {error}") from None


def _input_groups(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Groups of the named packed layers whose names suggest a shared input. Raises ValueError if
    there is no such group."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        for siblings in SAME_INPUT:
            if own in siblings and isinstance(model.get_submodule(name), Linear4bit):
                groups.setdefault((parent, siblings), []).append(name)
    found = [group for group in groups.values() if len(group) > 1]
    if not found:
        looked_for = "; ".join(", ".join(siblings) for siblings in SAME_INPUT)
        raise ValueError(
            "add_lora: share_inputs=True, but no two of the layers to adapt are packed siblings "
            f"that read the same input (looked for {looked_for}), want False or other layers than "
            f"{first_few(names)}"
        )
    return found


def add_lora(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    lora_dtype: torch.dtype = torch.float32,
    share_inputs: bool = False,
) -> nn.Module:
    """Freezes a model and puts a trainable adapter on the layers that config selects, in place.

    Packed layers become LoraLinear4bit, the stacks of a mixture's experts LoraStack4bit (without
    dropout), unquantized layers (a head) LoraLinear. Their weights are shared, not copied. Until it
    is trained, the model computes what it did before. If a head's weight is tied to the embedding,
    only the head gets the adapter; the embedding does not change. If accelerate offloads a layer,
    its adapter stays on the device that the layer computes on.

    Args:
        model: quantized with quantize_model or from_pretrained, or not quantized.
        config: a LoraConfig; None is LoraConfig() (query and value, r = 8).
        lora_dtype: dtype of A and B. float32 trains best, whatever the activations' dtype is.
        share_inputs: packed siblings that read the same x (query, key and value; gate and up)
            compute x A^T once for all of them. Outputs and gradients are the same. Layers do not
            share with dropout active (lora_dropout, in training), under torch.compile or under
            torch.inference_mode.

    Returns:
        model.

    Raises:
        TypeError: config is not a LoraConfig; model is a single layer or has PEFT's adapters; a
            target is an unquantized Conv1D, or a subclass of nn.Linear whose forward may compute
            something else ("all-linear" leaves those out and warns).
        ValueError: the model has adapters (others' count if they require gradients) or was loaded
            under torch.inference_mode; the architecture is unknown, or a switch or name matches
            nothing (the error lists the linear layers); config selects a part of a fused
            query-key-value layer; share_inputs=True, but no two layers can share. The model then
            stays as it was.
    """
    config = LoraConfig() if config is None else config
    if not isinstance(config, LoraConfig):
        raise TypeError(f"add_lora: config is a {type(config).__name__}, want qlora_ext.LoraConfig")
    if not isinstance(share_inputs, bool):
        raise TypeError(f"add_lora: share_inputs is {shorten(share_inputs)}, want a bool")
    check_adaptable("add_lora", model)
    check_trainable("add_lora", model)
    if present := adapters_of(model):
        raise ValueError(
            f"add_lora: {next(iter(present))} has an adapter already, want a model without "
            "adapters; merge_and_unload merges them"
        )
    check_foreign("add_lora", model)
    names = target_names(model, config)
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "lora_dtype": lora_dtype,
    }
    groups = _input_groups(model, names) if share_inputs else []
    install(model, {name: settings for name in names})
    for group in groups:
        SharedInput([model.get_submodule(name) for name in group])
    _warn_of_frozen(model)
    model.requires_grad_(False)
    for module in adapters_of(model).values():
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
    allow_training(model)
    return model


def allow_training(model: nn.Module) -> None:
    """Tells the hooks in hosts.on_adapted whether the adapters of model require gradients."""
    trains = any(m.lora_A.requires_grad for m in adapters_of(model).values())
    hosts.tell(hosts.on_adapted, model, trains)


def install(model: nn.Module, settings: dict[str, dict]) -> None:
    """Replaces the named layers by layers with an adapter: all of them, or none if one raises."""
    new = {}
    bases = {name: model.get_submodule(name) for name in settings}
    read = _read_past_forward(model, bases)
    for name, keywords in settings.items():
        base = bases[name]
        if name in read:
            raise ValueError(
                f"add_lora: {read[name]} reads the weight of {name} and bypasses its forward, so "
                "an adapter would have no effect; leave this layer out of target_modules"
            )
        check_can_adapt("add_lora", base, model)
        new[name] = (base, with_adapter(name, base, **keywords))
    places = places_of(model)
    for base, module in new.values():
        replace_module(model, base, module, places)
    explain_errors(model)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the trainable share, worded as PEFT does. It counts logical weights, not bytes."""
    trainable = num_parameters(model, only_trainable=True)
    total = num_parameters(model)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(total, 1):.4f}"
    )
