"""Models whose weights accelerate keeps elsewhere: a `device_map` with "cpu" or "disk",
`cpu_offload`, `disk_offload`.

A hook on each module fetches the module's parameters by name before its forward and drops them
afterwards; between calls they are on the meta device. What is here reads them through the hook, and
keeps adapters out of it: they are to be trained, and the hook knows only the names that the module
had when it was offloaded. accelerate itself is imported where a hook is moved, so where there is
one.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import nn

from .. import hosts

_ADAPTER = ("lora_A", "lora_B")


def _hooks(module: nn.Module) -> list:
    """The hooks of accelerate that offload module's own parameters."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return [h for h in hooks if getattr(h, "offload", False) and hasattr(h, "weights_map")]


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of module fetches its parameters for each forward."""
    return bool(_hooks(module))


def check_in_memory(op: str, model: nn.Module, instead: str) -> None:
    """ValueError if parameters of the model are offloaded; instead: what the user can do."""
    for name, module in model.named_modules():
        if is_offloaded(module):
            key = next((key for key, p in module._parameters.items() if p is not None), "weight")
            raise ValueError(
                f"{op}: {name}.{key} is offloaded (accelerate fetches it for each forward), want "
                f"all weights in memory: {instead}"
            )


def check_can_adapt(op: str, layer: nn.Module, model: nn.Module) -> None:
    """ValueError if a hook of a module around `layer` fetches its weight: the parameters of an
    adapter would be looked up there too."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_meta or is_offloaded(layer):
        return
    for name, module in model.named_modules():
        if is_offloaded(module) and any(child is layer for child in module.modules()):
            raise ValueError(
                f"{op}: the weights of {name or 'the model'} are offloaded together (accelerate's "
                "preload_module_classes), want each layer by itself, or the adapters added before "
                "the model is offloaded"
            )


def device_of(module: nn.Module) -> torch.device | str | int:
    """The device that module computes on: that of its weight, or of its hook if it is offloaded."""
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return hook.execution_device
    return module.weight.device


def value_of(module: nn.Module, key: str) -> torch.Tensor:
    """The parameter `key` of module, fetched from where it is offloaded."""
    tensor = module._parameters[key]
    if tensor.is_meta:
        for hook in _hooks(module):
            if key in hook.weights_map:
                return hook.weights_map[key]
    return tensor


@contextlib.contextmanager
def loaded(module: nn.Module):
    """Within, an offloaded module has its parameters, also past its forward; they are not to be
    changed."""
    is_there = not any(p is not None and p.is_meta for p in module._parameters.values())
    hooks = [] if is_there else _hooks(module)
    if not hooks:
        yield
        return
    hook = module._hf_hook
    for each in hooks:
        each.pre_forward(module)
    # A hook that does nothing: with the real one, a forward would drop the parameters.
    module._hf_hook = hosts.accelerate_hooks().ModelHook()
    try:
        yield
    finally:
        module._hf_hook = hook
        for each in reversed(hooks):
            each.post_forward(module, torch.empty(0))


# Adapters ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_adapter(module: nn.Module):
    hidden = {key: module._parameters.pop(key) for key in _ADAPTER if key in module._parameters}
    try:
        yield
    finally:
        module._parameters.update(hidden)


class _LeavesAdapter:
    """A part of the class of an accelerate hook: the hook does not see lora_A and lora_B."""

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
    """Has module's hooks leave its lora_A and lora_B alone; if they are offloaded, they are fetched
    for good."""
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
    """Moves the hook of accelerate, if old has one, to new, which holds old's parameters if they
    are offloaded."""
    hook = old.__dict__.get("_hf_hook")
    if hook is None:
        return
    hooks = hosts.accelerate_hooks()
    if not is_offloaded(old):
        hooks.remove_hook_from_module(old)
        hooks.add_hook_to_module(new, hook)
        return
    # An empty hook takes its place meanwhile: detaching the real one would fetch the weights, and
    # attaching it would note meta as the device that they came from.
    old._hf_hook = hooks.ModelHook()
    hooks.remove_hook_from_module(old)
    hooks.add_hook_to_module(new, hooks.ModelHook())
    new._hf_hook = hook
    keep_adapter(new)
