"""Reads and adapts layers whose weights accelerate offloads (a `device_map` with "cpu" or "disk",
`cpu_offload`, `disk_offload`).

A hook of accelerate on each module fetches the module's parameters by name before its forward and
drops them afterwards; between calls they are on the meta device. This file reads them through the
hook. It hides adapters from the hook, because adapters are trained and because the hook knows only
the names that the module had when it was offloaded. accelerate is imported only when a hook is
moved, so it is installed then.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import nn

from .. import hosts

_ADAPTER = ("lora_A", "lora_B")


def _hooks(module: nn.Module) -> list:
    """accelerate's hooks that offload module's own parameters."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return [h for h in hooks if getattr(h, "offload", False) and hasattr(h, "weights_map")]


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of module fetches its parameters for each forward."""
    return bool(_hooks(module))


def check_in_memory(op: str, model: nn.Module, instead: str) -> None:
    """Raises ValueError if parameters of the model are offloaded; `instead` says what to do."""
    for name, module in model.named_modules():
        if is_offloaded(module):
            key = next((key for key, p in module._parameters.items() if p is not None), "weight")
            raise ValueError(
                f"{op}: {name}.{key} is offloaded (accelerate fetches it for each forward), want "
                f"all weights in memory: {instead}"
            )


def check_can_adapt(op: str, layer: nn.Module, model: nn.Module) -> None:
    """Raises ValueError if the hook of a module around `layer` fetches layer's weight. That hook
    would look for the adapter's parameters too."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_meta or is_offloaded(layer):
        return
    for name, module in model.named_modules():
        if is_offloaded(module) and any(child is layer for child in module.modules()):
            raise ValueError(
                f"{op}: the weights of {name or 'the model'} are offloaded together (accelerate's "
                "preload_module_classes), want each layer offloaded by itself; or add the adapters "
                "before offloading the model"
            )


def device_of(module: nn.Module) -> torch.device | str | int:
    """The device that module computes on: its weight's, or its hook's if it is offloaded."""
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return hook.execution_device
    return getattr(module, "device", module.weight.device)


def value_of(module: nn.Module, key: str) -> torch.Tensor:
    """The parameter `key` of module, fetched through the hook if it is offloaded."""
    tensor = module._parameters[key]
    if tensor.is_meta:
        for hook in _hooks(module):
            if key in hook.weights_map:
                return hook.weights_map[key]
    return tensor


@contextlib.contextmanager
def loaded(module: nn.Module):
    """A context in which an offloaded module has its parameters, even after a forward. Do not
    change them."""
    is_there = not any(p is not None and p.is_meta for p in module._parameters.values())
    hooks = [] if is_there else _hooks(module)
    if not hooks:
        yield
        return
    hook = module._hf_hook
    for each in hooks:
        each.pre_forward(module)
    # Put a hook that does nothing in its place: a forward with the real one drops the parameters.
    module._hf_hook = hosts.accelerate_hooks().ModelHook()
    try:
        yield
    finally:
        module._hf_hook = hook
        for each in reversed(hooks):
            each.post_forward(module, torch.empty(0))


def offload(module: nn.Module, device: torch.device | str | int) -> None:
    """Makes accelerate keep the weights of module in memory and fetch them to device for each
    forward."""
    hosts.accelerate_hooks().attach_align_device_hook(
        module,
        execution_device=device,
        offload=True,
        weights_map={name: p.to("cpu") for name, p in module.named_parameters()},
    )


# Adapters ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_adapter(module: nn.Module):
    hidden = {key: module._parameters.pop(key) for key in _ADAPTER if key in module._parameters}
    try:
        yield
    finally:
        module._parameters.update(hidden)


class _LeavesAdapter:
    """A mixin for the class of an accelerate hook that hides lora_A and lora_B from the hook."""

    def init_hook(self, module):
        with _without_adapter(module):
            return super().init_hook(module)

    def pre_forward(self, module, *args, **kwargs):
        with _without_adapter(module):
            return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module, output):
        with _without_adapter(module):
            return super().post_forward(module, output)

    def detach_hook(self, module):
        with _without_adapter(module):
            return super().detach_hook(module)


@functools.cache
def _leaving_adapter(hook_class: type) -> type:
    return type(hook_class.__name__, (_LeavesAdapter, hook_class), {})


def keep_adapter(module: nn.Module) -> None:
    """Makes module's hooks leave lora_A and lora_B alone. Offloaded ones are fetched and stay."""
    for hook in _hooks(module):
        for key in _ADAPTER:
            parameter = module._parameters.get(key)
            if parameter is not None and parameter.is_meta:
                value = hook.weights_map[key].to(device_of(module), parameter.dtype, copy=True)
                setattr(module, key, nn.Parameter(value, parameter.requires_grad))
            hook.original_devices.pop(key, None)
        if not isinstance(hook, _LeavesAdapter):
            hook.__class__ = _leaving_adapter(type(hook))


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Moves accelerate's hook, if there is one, from old to new. If old is offloaded, new must hold
    old's parameters."""
    hook = old.__dict__.get("_hf_hook")
    if hook is None:
        return
    hooks = hosts.accelerate_hooks()
    if not is_offloaded(old):
        hooks.remove_hook_from_module(old)
        hooks.add_hook_to_module(new, hook)
        return
    # Detach and attach an empty hook instead: detaching the real one would fetch the weights, and
    # attaching it would record meta as the device that they came from.
    old._hf_hook = hooks.ModelHook()
    hooks.remove_hook_from_module(old)
    hooks.add_hook_to_module(new, hooks.ModelHook())
    new._hf_hook = hook
    keep_adapter(new)
