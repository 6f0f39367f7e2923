"""Lets those tuners of PEFT that can work on packed layers read them, and refuses the others."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import peft
import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ...adapters.add import check_trainable
from ...merging.dense import IN_MEMORY
from ...models.raw_errors import watch
from ...nn.embedding import Embedding4bit
from ...nn.experts import Experts4bit
from ...nn.linear import Linear4bit
from ...nn.lora import _Lora
from ...nn.offload import check_can_adapt, check_in_memory, loaded
from ...nn.packed import _Packed4bit
from ...nn.stack import Stack4bit
from .experts import ParamWrapper, check_biases, named_stacks
from .stand_in import _check_finite, _innermost, _packed_base, _restore, _swap_in, dequantize
from .versions import ADAPTS_STACKS, NEWER, SUPPORTED, QuantizationBackend, adapted_layer

_KEEP_TABLE = (
    "keep the table dense: quantize the unquantized model without quantize_embeddings=True "
    "(the command: without --embeddings)"
)


class PackedBackend(QuantizationBackend):
    """Reads a packed weight for BOFT, MiSS, OFT, SHiRA and VeRA, and takes what they merge."""

    supports_merge = True
    backend_name = "qlora_ext 4bit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: torch.nn.Module) -> torch.Tensor:
        """The weight [out, in] of the packed layer, or of the dense layer in its place."""
        return dequantize(base_layer)

    def set_base_weight(self, peft_layer: BaseTunerLayer, weight_data: torch.Tensor) -> None:
        """Puts a dense layer with weight_data in the packed one's place. When the last adapter is
        unmerged, it puts the packed layer back instead."""
        is_merged = "_qlora_ext_packed" in _innermost(peft_layer).__dict__
        if is_merged and not peft_layer.merged_adapters:
            _restore(peft_layer)
        else:
            dtype = _packed_base(peft_layer).dtype
            name = peft_layer.__dict__.get("_qlora_ext_name", type(peft_layer).__name__)
            check_in_memory(f"merge: {name}", peft_layer, IN_MEMORY)
            _check_finite(f"{name}.weight", weight_data, list(peft_layer.active_adapters), dtype)
            _swap_in(peft_layer, weight_data.detach().to(dtype).contiguous())


def _resolve_backend(original):
    """Wraps `resolve_quantization_backend`."""

    @functools.wraps(original)
    def resolve_quantization_backend(base_layer, **kwargs):
        if isinstance(base_layer, Linear4bit):
            return PackedBackend()
        return original(base_layer, **kwargs)

    return resolve_quantization_backend


def _dequantize_module(original):
    """Wraps `dequantize_module_weight`."""

    @functools.wraps(original)
    def dequantize_module_weight(module):
        return dequantize(module) if isinstance(module, _Packed4bit) else original(module)

    return dequantize_module_weight


def _tuner(layer: BaseTunerLayer) -> str:
    """The name of the tuner layer's method, such as LORA."""
    if isinstance(layer, AdaLoraLayer):
        return "ADALORA"
    if isinstance(layer, LoraLayer):
        return "LORA"
    # A layer of ours is derived from PEFT's, which is in peft.tuners.oft.layer and the like.
    modules = (cls.__module__ for cls in type(layer).__mro__)
    return next(m for m in modules if m.startswith("peft.tuners.")).split(".")[2].upper()


def _refuse_packed(original):
    """Wraps a tuner's `_create_and_replace`. It refuses tuners that would train on a packed weight
    and then fail to merge, or add to its bytes."""

    @functools.wraps(original)
    def _create_and_replace(self, config, adapter_name, target, *args, **kwargs):
        given = dict(zip(("target_name", "parent", "current_key"), args, strict=False)) | kwargs
        layer = given.get("current_key") or given.get("target_name") or "a layer"
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        method = str(getattr(config.peft_type, "value", config.peft_type))
        parts = base.stacks().values() if isinstance(base, Experts4bit) else [base]
        if any(isinstance(part, _Lora) for part in parts):
            # PEFT's forward and merge would read only the base weight and lose A and B.
            raise ValueError(
                f"PEFT's {method} on {layer}: it has an adapter of qlora_ext.add_lora already; "
                "merge it with qlora_ext.merge_and_unload, or load the base again for PEFT"
            )
        if isinstance(base, Experts4bit):
            _check_experts(base, method, layer, kwargs.get("parameter_name"))
        if isinstance(base, Stack4bit):
            raise ValueError(
                f"PEFT's {method} on {layer}: it is a packed stack of a mixture's experts, want it "
                "in target_parameters under its name in the dense model, such as "
                "experts.gate_up_proj"
            )
        if isinstance(base, Embedding4bit) and method != "LORA":
            raise ValueError(
                f"PEFT's {method} cannot train {layer}, an embedding that is packed in 4 bits; use "
                f"LORA there, or {_KEEP_TABLE}"
            )
        if isinstance(base, Linear4bit):
            if method not in SUPPORTED:
                raise ValueError(
                    f"PEFT's {method} cannot train a 4-bit layer of qlora_ext; use one of "
                    f"{', '.join(sorted(SUPPORTED))}{NEWER}, or load the model unquantized"
                )
            if isinstance(target, BaseTunerLayer) and _tuner(target) != method:
                # Merging two kinds into one weight depends on their order, which neither knows.
                raise ValueError(
                    f"PEFT's {method} on {layer}: this 4-bit layer has {_tuner(target)} already, "
                    "want adapters of one kind only; unload the other first"
                )
        if not isinstance(base, (_Packed4bit, Experts4bit)):
            original(self, config, adapter_name, target, *args, **kwargs)
        else:
            for part in parts:
                check_can_adapt(f"PEFT's {method}", part, self.model)
            if not config.inference_mode:
                check_trainable(f"PEFT's {method} on {layer}", base)
            token = adapted_layer.set(layer)
            try:
                # Some adapters start from the base weight's values, and all go to its device.
                with loaded(base):
                    original(self, config, adapter_name, target, *args, **kwargs)
            finally:
                adapted_layer.reset(token)
            watch(self)  # PEFT calls the model's forward directly, without the model's hook
        name, parent = given.get("target_name"), given.get("parent")
        if parent is not None and isinstance(parent._modules.get(name), BaseTunerLayer):
            parent._modules[name].__dict__["_qlora_ext_name"] = layer  # for errors

    return _create_and_replace


def _check_experts(experts: Experts4bit, method: str, layer: str, parameter: str | None) -> None:
    """Raises ValueError unless this is LoRA on a stack of packed experts."""
    if parameter is None:
        raise ValueError(
            f"PEFT's {method} cannot train {layer}, a mixture's packed experts, as one module; "
            f"name their weights in LORA's target_parameters: {', '.join(experts.names)}"
        )
    if method != "LORA":
        raise ValueError(
            f"PEFT's {method} cannot train {layer}, a stack of packed experts, want LORA"
        )
    if not ADAPTS_STACKS:
        raise ValueError(
            f"PEFT {peft.__version__} cannot adapt {layer}, a stack of packed experts: it would "
            "read [experts, out, in] as [experts, in, out]; want PEFT 0.19.1 or newer, or use "
            "qlora_ext.add_lora"
        )


def _all_or_nothing(original):
    """Wraps a tuner's `inject_adapter`. It shows PEFT the stacks of packed experts. If a layer of a
    model with packed layers is refused, it restores the layers that were wrapped before, and every
    parameter's requires_grad."""

    @functools.wraps(original)
    def inject_adapter(self, model, *args, **kwargs):
        modules = list(model.modules())
        if not any(isinstance(module, _Packed4bit) for module in modules):
            return original(self, model, *args, **kwargs)
        before = [(module, _attributes(module)) for module in modules]
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        adapter = args[0] if args else kwargs["adapter_name"]
        check_biases(getattr(self.peft_config[adapter], "bias", None), model)
        try:
            with named_stacks(model):
                return original(self, model, *args, **kwargs)
        except BaseException:
            undo = [functools.partial(_put_back, *entry) for entry in before]
            undo += [functools.partial(_set_requires_grad, *entry) for entry in trained]
            for step in undo:
                with contextlib.suppress(Exception):  # go on restoring; the first error says more
                    step()
            raise

    return inject_adapter


def _cast_adapters(original):
    """Wraps `BaseTuner._cast_adapter_dtype`, which casts to fp32 if autocast_adapter_dtype. If not,
    adapters on packed layers get the dtype of the layer, or the compute dtype of the
    BitsAndBytesConfig that the layer came from, as on bitsandbytes' layers since PEFT 0.19."""

    @functools.wraps(original)
    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
        original(self, adapter_name, autocast_adapter_dtype)
        for layer in () if autocast_adapter_dtype else self.model.modules():
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
            base = layer.stack if isinstance(layer, ParamWrapper) else base
            if not isinstance(base, _Packed4bit):
                continue
            trained = {name: p.requires_grad for name, p in layer.named_parameters()}
            # PEFT reads this attribute if a weight is bytes. It exists only during this call,
            # because adapters start in fp32 and are rounded only on request.
            base.compute_dtype = base.adapter_dtype or base.dtype
            try:
                with loaded(base):  # or adapters would go to the meta device of its weight
                    layer._move_adapter_to_device_of_base_layer(adapter_name)
            finally:
                del base.compute_dtype
            for name, parameter in layer.named_parameters():
                _set_requires_grad(parameter, trained[name])

    return _cast_adapter_dtype


def _attributes(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of it if it is a container (of children, adapters' settings)."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in module.__dict__.items()
    }


def _put_back(module: torch.nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    """Restores what `_attributes` returned. Containers stay the same objects."""
    module.__dict__.clear()
    module.__dict__.update((name, value) for name, (value, _) in attributes.items())
    for value, content in attributes.values():
        # Restore without comparing first: `==` of two tensors is not a bool.
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(content)


def _set_requires_grad(parameter: torch.nn.Parameter, requires_grad: bool) -> None:
    """Sets it only if it differs, because an inference tensor raises on any setting."""
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)


def _refuse_packed_layer(original, what: str):
    """Wraps the `__init__` of PEFT's `ModulesToSaveWrapper` and `TrainableTokensLayer`. It refuses
    a packed layer, because neither it nor its rows can be trained. `what` is the setting's name."""

    @functools.wraps(original)
    def __init__(self, base_layer, *args, **kwargs):
        if isinstance(base_layer, (_Packed4bit, Experts4bit)):
            dense = "keep it dense with modules_to_not_convert"
            setting = "target_modules"
            if isinstance(base_layer, Experts4bit):
                setting = f"target_parameters ({', '.join(base_layer.names)})"
            if isinstance(base_layer, Embedding4bit):
                dense = _KEEP_TABLE
            raise ValueError(
                f"PEFT's {what} names a {type(base_layer).__name__}, whose packed weight cannot be "
                f"trained; adapt it with {setting}, or {dense}"
            )
        original(self, base_layer, *args, **kwargs)

    return __init__
