"""Wraps PEFT's `_create_new_module`, so that a packed layer gets a layer of ours."""

from __future__ import annotations

import functools

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

from ...nn.embedding import Embedding4bit
from ...nn.experts import Experts4bit
from ...nn.linear import Linear4bit
from . import experts
from .lora import AdaLoraLinear4bit, LoraEmbedding4bit, ParamWrapper, PeftLoraLinear4bit
from .versions import adapted_layer


def _create_for_parameter(base, config, adapter_name, target, *, parameter_name, **kwargs):
    """The layer for one of target_parameters on a packed layer. Raises ValueError if it is not the
    weight [out, in] of a linear layer."""
    name = parameter_name.rpartition(".")[2]
    layer = adapted_layer.get().removesuffix(f".{name}")
    # The weight of a Conv1D and that of an embedding are the other way round for PEFT, so the
    # adapter would not fit the dense model.
    if not isinstance(base, Linear4bit) or base.from_conv1d or name != "weight":
        raise ValueError(
            f"PEFT's target_parameters got {layer}.{name} of a 4-bit layer, want the weight of a "
            "linear layer; name the layer in target_modules"
        )
    if config.fan_in_fan_out:
        raise ValueError(
            f"PEFT's target_parameters on {layer}.weight does not work with fan_in_fan_out=True, "
            "want False"
        )
    return ParamWrapper(target, adapter_name, config=config, **{**kwargs, "target_name": layer})


def _as_linear(config, settings: dict) -> None:
    """Turns off fan_in_fan_out. It is for GPT-2's Conv1D layers, [in, out], which become ordinary
    [out, in] layers when they are packed."""
    if getattr(config, "fan_in_fan_out", False):
        config.fan_in_fan_out = False
        if "fan_in_fan_out" in settings:
            settings["fan_in_fan_out"] = False


def _create_lora_module(original):
    """Wraps `_create_new_module` of LoraModel and AdaLoraModel."""

    @functools.wraps(original)
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, Experts4bit) or isinstance(target, experts.ParamWrapper):
            return experts.ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        if not isinstance(base, (Linear4bit, Embedding4bit)):
            return original(lora_config, adapter_name, target, **kwargs)
        if kwargs.get("parameter_name") is not None:
            return _create_for_parameter(base, lora_config, adapter_name, target, **kwargs)
        if isinstance(base, Embedding4bit):
            return LoraEmbedding4bit(target, adapter_name, config=lora_config, **kwargs)
        _as_linear(lora_config, kwargs)
        if lora_config.peft_type == peft.PeftType.ADALORA:
            kwargs.pop("device_map", None)
            return AdaLoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
        return PeftLoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)

    return _create_new_module


def _create_as(cls: type):
    """A wrapper for a tuner's `_create_new_module` that gives a packed layer a `cls`."""

    def wrap(original):
        @functools.wraps(original)
        def _create_new_module(config, *args, **kwargs):
            *_, target = args  # RandLoRA's function takes two arguments more than the others
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if not isinstance(base, Linear4bit):
                return original(config, *args, **kwargs)
            _as_linear(config, kwargs)
            # For a model that says it is bitsandbytes', PEFT would look for its layers.
            layer = original(config, *args, **{**kwargs, "loaded_in_4bit": False})
            # Change the class afterwards: PEFT chooses it, and its arguments depend on the release.
            layer.__class__ = cls
            return layer

        return _create_new_module

    return wrap
