"""Wraps PEFT's functions that write, read and combine adapters, for models with packed layers."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils import hotswap
from peft.utils.other import get_pattern_key

from ...adapters.stacks import from_file, is_swapped, to_file
from ...checks import check_finite, check_scaling
from ...models.walk import output_embeddings
from ...nn.embedding import Embedding4bit
from ...nn.offload import check_in_memory, is_offloaded, loaded, value_of
from ...nn.packed import _PACKED_KEYS, _Packed4bit
from ...nn.stack import Stack4bit
from ...tensor.functions import dequantize_4bit
from ..transformers.files import local_part
from .experts import ParamWrapper
from .stand_in import _check_whole, _packed_base


def _save_pretrained(original):
    """Wraps `PeftModel.save_pretrained`, which reads the model's state if state_dict is None."""

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
    """Raises OverflowError, before anything is written, for a NaN or an infinity in the adapters to
    save. We would refuse to read such a file."""
    kinds = (prefix, "modules_to_save.", "trainable_tokens_")
    for key, tensor in state.items():
        saved = any(f".{name}." in f"{key}." for name in adapters)
        if saved and any(kind and kind in key for kind in kinds) and tensor.is_floating_point():
            check_finite(f"save_pretrained: {key}", local_part(tensor.detach()), tensor.dtype)


def _check_combined(original):
    """Wraps `LoraModel.add_weighted_adapter`. It removes the new adapter if it is not finite."""

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
                    f"add_weighted_adapter: with weights {weights}, {error}; use smaller weights, "
                    "or another adapter if one is damaged"
                ) from None
        return result

    return add_weighted_adapter


def _fetched_state(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The model's state dict, with offloaded tensors fetched if PEFT may save them: those with
    `prefix` in their name, embeddings and the head."""
    state = model.state_dict()
    head = output_embeddings(model)
    for name, module in model.named_modules():
        table = isinstance(module, torch.nn.Embedding) or module is head
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}"
            if parameter is not None and parameter.is_meta and (table or prefix in full):
                state[full] = value_of(module, key)
    return state


def _packed_tables(model: torch.nn.Module) -> dict[str, Embedding4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Embedding4bit)}


def _get_state_dict(original):
    """Wraps `get_peft_model_state_dict`. If PEFT stores an embedding with the adapter
    (`save_embedding_layers`), this replaces its packed tensors by the dense table, which PEFT can
    load onto any base."""

    @functools.wraps(original)
    def get_peft_model_state_dict(model, *args, **kwargs):
        state = original(model, *args, **kwargs)
        for name, table in _packed_tables(getattr(model, "_orig_mod", model)).items():
            parts = {key: state.get(f"{name}.{key}") for key in _PACKED_KEYS}
            if parts["weight"] is None or parts["weight_absmax"] is None:
                continue
            # Use the tensors in state: they may have been gathered from several processes.
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
    """Wraps `set_peft_model_state_dict`. An embedding stored with the adapter is packed like the
    model's own, unless it equals the model's own. Adapters of packed experts are read in the
    orientation of the release that wrote them."""

    @functools.wraps(original)
    def set_peft_model_state_dict(
        model, peft_model_state_dict, adapter_name="default", *args, **kwargs
    ):
        state = dict(peft_model_state_dict)
        if any(isinstance(module, _Packed4bit) for module in model.modules()):
            _check_read(state)
            _turn_stacks(model, state, adapter_name)
        tables = []
        for name, table in _packed_tables(model).items():
            # The embedding may have had an adapter when it was stored, whether or not it has now.
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
        result = original(model, state, adapter_name, *args, **kwargs)
        for table, dense in tables:
            table._quantize(dense.to(table.weight.device))
        return result

    return set_peft_model_state_dict


def _check_swapped(original):
    """Wraps `hotswap_adapter_from_state_dict`. It refuses values that are not finite."""

    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, *args, **kwargs):
        if any(isinstance(module, _Packed4bit) for module in model.modules()):
            for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
                check_scaling("hotswap_adapter", alpha, "lora_alpha")
            _check_read(state_dict, "hotswap_adapter")
        swapped = _swapped_stacks(model, state_dict, adapter_name, config)
        original(model, state_dict, adapter_name, config, *args, **kwargs)
        # PEFT looks up the patterns by the keys, which do not name the parameter.
        for wrapper in swapped:
            r, alpha = config.r, config.lora_alpha
            r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, wrapper._name), r)
            key = get_pattern_key(config.alpha_pattern, wrapper._name)
            alpha = config.alpha_pattern.get(key, alpha)
            scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
            hotswap._update_scaling(wrapper, adapter_name, scaling)

    return hotswap_adapter_from_state_dict


def _turn_stacks(model: torch.nn.Module, state: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Brings the adapters of packed experts in state into the orientation of this release. Raises
    ValueError if neither the release that wrote them nor their shapes tell the orientation."""
    config = model.peft_config[adapter_name]
    wrappers = _wrappers(model, adapter_name)
    if not wrappers:
        return
    op, adapters = "set_peft_model_state_dict", {}
    for name, wrapper in wrappers.items():
        # Files have this prefix in their keys. A model that is not a PeftModel has no such names.
        prefix = "" if f"{name}.lora_A.weight" in state else "base_model.model."
        keys = tuple(f"{prefix}{name}.{factor}.weight" for factor in ("lora_A", "lora_B"))
        if all(key in state for key in keys):
            adapters[keys] = (*(state[key] for key in keys), _packed_stack(wrapper))
    settings = {"peft_version": config.peft_version}
    if adapters and is_swapped(op, adapter_name, settings, list(adapters.values())):
        if all(stack.in_features == stack.out_features for *_, stack in adapters.values()):
            raise ValueError(
                f"{op}: PEFT {config.peft_version} stored experts' adapters the other way round, "
                f"but a later release may have saved {adapter_name!r} again, and because the "
                "matrices are square, their shapes do not tell; use qlora_ext.load_adapter, which "
                "goes by the release"
            )
        for keys, adapter in adapters.items():
            pair = from_file(*adapter, True)
            state |= {} if pair is None else dict(zip(keys, to_file(*pair), strict=True))
    config.peft_version = peft.__version__  # from now on it is saved in this orientation


def _wrappers(model: torch.nn.Module, adapter_name: str) -> dict[str, ParamWrapper]:
    """The wrappers of packed experts that have this adapter, by name."""
    model = getattr(model, "_orig_mod", model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper) and adapter_name in module.lora_A
    }


def _packed_stack(wrapper: ParamWrapper) -> Stack4bit:
    """The stack under a wrapper, whether or not adapters are merged."""
    return _packed_base(wrapper).stacks()[wrapper.parameter_name]


def _swapped_stacks(
    model: torch.nn.Module, state: dict[str, torch.Tensor], adapter_name: str, config
) -> list[ParamWrapper]:
    """The wrappers of packed experts that a hot-swap gives another adapter.

    Raises ValueError if its rank differs, because PEFT would cut or pad A, whose rows belong to one
    expert after the other; or if it is from a release that stored it the other way round."""
    op = "hotswap_adapter"
    swapped, adapters = [], []
    for name, wrapper in _wrappers(model, adapter_name).items():
        keys = [f"{name}.{factor}.{adapter_name}.weight" for factor in ("lora_A", "lora_B")]
        if all(key in state for key in keys):
            swapped.append(wrapper)
            adapters.append((*(state[key] for key in keys), _packed_stack(wrapper)))
    settings = {"peft_version": config.peft_version}
    if adapters and is_swapped(op, adapter_name, settings, adapters):
        raise ValueError(
            f"{op}: PEFT {config.peft_version} stored the new adapter of experts the other way "
            "round; load it with PeftModel.load_adapter, save it again, and swap that in"
        )
    for wrapper, (new, _, _) in zip(swapped, adapters, strict=True):
        old = wrapper.lora_A[adapter_name].weight
        if new.shape != old.shape:
            raise ValueError(
                f"{op}: {wrapper._name} has A {list(old.shape)} and the new adapter "
                f"{list(new.shape)}, want the same rank on packed experts; load it with "
                "PeftModel.load_adapter instead"
            )
    return swapped


def _check_read(state: dict[str, torch.Tensor], op: str = "set_peft_model_state_dict") -> None:
    """Raises ValueError if a tensor of an adapter has a NaN or Inf."""
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        if not local_part(tensor).isfinite().all():
            raise ValueError(
                f"{op}: {key} has a NaN or Inf, want finite values; the file is damaged, or the "
                "training diverged"
            )


def _check_table(key: str, dense: torch.Tensor, table: Embedding4bit) -> None:
    """Raises ValueError if a table has another size than the model's."""
    N, K = table._shape
    if tuple(dense.shape) != (N, K):
        raise ValueError(
            f"set_peft_model_state_dict: {key} has shape {list(dense.shape)}, want [{N}, {K}] like "
            "the model's packed embedding; resize the unquantized model (resize_token_embeddings) "
            "before it is packed"
        )


def load_adapters(path: str | Path, base: Any = None, is_trainable: bool = False, **kwargs: Any):
    """Loads a saved adapter and its 4-bit base in one call.

    Args:
        path: folder that `save_pretrained` of a PEFT model wrote.
        base: the loaded base model, or its folder or hub name; None takes the name in the adapter's
            config.
        is_trainable: continue training the adapter.
        kwargs: for `AutoModelForCausalLM.from_pretrained` of the base, e.g. dtype, device_map, or
            quantization_config=QLoraExtConfig() if the base is an unquantized model.

    Returns:
        the `peft.PeftModel`.

    Raises:
        ValueError: no base was given and the config does not name one.
    """
    config = peft.PeftConfig.from_pretrained(path)
    base = base if base is not None else config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"load_adapters: base got None, and adapter_config.json in {path} names no base; give "
            "one with base="
        )
    if not isinstance(base, torch.nn.Module):
        base = transformers.AutoModelForCausalLM.from_pretrained(base, **kwargs)
    return peft.PeftModel.from_pretrained(base, path, is_trainable=is_trainable)
