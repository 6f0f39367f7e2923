"""PEFT's merges of adapters on packed layers, into 16 bits and into 4 bits."""

from __future__ import annotations

import contextlib
import functools

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...checks import check_parameters
from ...merging.adapted import AdaptedLayer, AdaptedModel, adapted_experts
from ...merging.dense import IN_MEMORY, leave_no_packed_layer
from ...nn.dense import check_weight
from ...nn.embedding import Embedding4bit
from ...nn.experts import Experts4bit
from ...nn.linear import Linear4bit
from ...nn.offload import check_in_memory
from ...nn.packed import _Packed4bit
from ...nn.stack import Stack4bit
from .experts import ParamWrapper
from .lora import PeftLoraLinear4bit
from .stand_in import _check_whole, _holds_packed, _merge_to_4bit


def _refuse_merged(model: torch.nn.Module) -> None:
    """Raises ValueError if a dense layer stands in for a packed one: unload() would leave it there
    for good, with its adapters merged."""
    for name, module in model.named_modules():
        if "_qlora_ext_packed" not in module.__dict__:
            continue
        if isinstance(module.base_layer, (_Packed4bit, Experts4bit)):
            continue
        raise ValueError(
            f"unload: the adapters of {name} are merged, and a dense layer stands in for the "
            "packed one; call unmerge_adapter() first to get the packed model back, or "
            "merge_and_unload() for a dense one"
        )


def _check_mergeable(op: str, model: torch.nn.Module) -> None:
    """Raises ValueError for a sharded or offloaded model with packed layers."""
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


@contextlib.contextmanager
def _no_bitsandbytes(model: torch.nn.Module):
    """A context in which a model with our layers lacks `is_loaded_in_4bit`, because PEFT's IA3
    refuses to merge or unload a model that has it."""
    marks = model.__dict__
    if "is_loaded_in_4bit" not in marks or not _holds_packed(model):
        yield
        return
    mark = marks.pop("is_loaded_in_4bit")
    try:
        yield
    finally:
        marks["is_loaded_in_4bit"] = mark


def _merge_and_unload(original):
    """Wraps `BaseTuner._unload_and_optionally_merge`."""

    @functools.wraps(original)
    def _unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        if merge:
            _check_mergeable("merge_and_unload", self.model)
            if any(isinstance(m, _Packed4bit) for m in self.model.modules()):
                _check_unadapted(self.model, self.prefix)
                if len(args) < 2:
                    kwargs["safe_merge"] = True  # for the dense layers, which PEFT merges
        else:
            _refuse_merged(self.model)
        with _no_bitsandbytes(self.model):
            model = original(self, merge, *args, **kwargs)
        if merge and not _merge_to_4bit.get():
            leave_no_packed_layer(model)
        return model

    return _unload_and_optionally_merge


def _check_unadapted(model: torch.nn.Module, prefix: str) -> None:
    """Raises ValueError, before PEFT changes anything, if a weight without an adapter does not fit
    its dtype: a norm, a bias, or a packed layer that becomes dense. Merging checks the others."""
    adapters = {name for name, _ in model.named_parameters() if prefix in name}
    try:
        check_parameters("merge_and_unload", model, skipped=adapters)
        for name, module in model.named_modules():
            is_adapted = name.endswith("base_layer")
            if isinstance(module, (Linear4bit, Embedding4bit, Stack4bit)) and not is_adapted:
                check_weight(f"merge_and_unload: {name}.weight", module, module.dtype)
    except OverflowError as error:
        raise ValueError(str(error)) from None


# Merging into 4 bits ------------------------------------------------------------------------------


def adapted_model(model: torch.nn.Module) -> AdaptedModel | None:
    """The adapters of a PeftModel on packed layers, for merge_into_4bit. None for other models."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return None

    def merge_dense(dtype: torch.dtype, progress_bar: bool) -> torch.nn.Module:
        merged = model.merge_and_unload()
        check_parameters("merge_into_4bit", merged, dtype)
        return merged.to(dtype)

    return AdaptedModel(_adapted_layers(model), lambda swaps: _unload(model), merge_dense)


def _adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    if not hasattr(model, "unload") or not hasattr(model, "get_base_model"):
        raise ValueError(
            f"merge_into_4bit: model is a {type(model).__name__} with PEFT's layers inside, want "
            "the PeftModel itself"
        )
    layers = []
    stacks = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise ValueError(
                f"merge_into_4bit: {name} has adapters merged ({module.merged_adapters}), want "
                "them unmerged; call model.unmerge_adapter() first"
            )
        if isinstance(module.get_base_layer(), Embedding4bit) and any(
            name in module.r for name in module.active_adapters
        ):
            raise ValueError(
                f"merge_into_4bit: {name} is a packed embedding with an adapter, want adapters on "
                "linear layers only; model.merge_and_unload() merges it into 16 bits"
            )
        if isinstance(module, ParamWrapper) and module.stack is not None:
            layers += _adapted_stack(module, stacks)
            continue
        if not isinstance(module.get_base_layer(), Linear4bit):
            continue
        active = [a for a in module.active_adapters if a in getattr(module, "lora_A", {})]
        plain = isinstance(module, PeftLoraLinear4bit) and not any(
            a in module.lora_variant or module.lora_bias[a] for a in active
        )
        if not plain:
            raise ValueError(
                f"merge_into_4bit: {name} is PEFT's {type(module).__name__} with more than plain "
                "LoRA, want plain LoRA; model.merge_and_unload() merges it into 16 bits"
            )
        if active:
            A, B, scaling = module._stacked(active)
            # float(): PEFT's hot-swapping may have made the scaling a tensor.
            lora = (A.detach().float(), B.detach().float(), float(scaling))
            layers.append(AdaptedLayer(name, module, module.get_base_layer(), lora))
    return layers


def _adapted_stack(module: ParamWrapper, names: dict[nn.Module, str]) -> list[AdaptedLayer]:
    """The experts of the stack that `module` adapts."""
    active = [a for a in module.active_adapters if a in module.lora_A]
    if not active:
        return []
    A, B, scaling = module._stacked(active)
    stack = module.stack
    factors = (A.detach().float(), B.detach().float(), float(scaling))

    def switch(on: bool) -> None:  # off, or the wrapper adds its adapter to the merged stack, too
        module._disable_adapters = not on

    return adapted_experts(names[stack], stack, *factors, switch)


def _unload(model: nn.Module) -> nn.Module:
    """The model that a PeftModel wraps, with the adapters of its dense layers merged."""
    dense = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module.get_base_layer(), (Linear4bit, Experts4bit))
    ]
    before = []  # the old tensors; safe_merge puts new ones into the parameters
    try:
        for module in dense:
            weights = [(p, p.data) for p in module.get_base_layer().parameters()]
            before.append((module, list(module.merged_adapters), weights))
            module.merge(safe_merge=True)
        return model.unload()
    except BaseException:
        for module, merged, weights in reversed(before):
            module.merged_adapters = merged
            for parameter, data in weights:
                parameter.data = data
        raise
