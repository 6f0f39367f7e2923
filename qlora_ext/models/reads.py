"""Layers whose weight the model's code reads past the layer's own forward.

The weight of a packed layer is bytes in a shape of its own, so `F.linear(x, self.proj.weight)` in
the module around it fails, and `x.to(self.proj.weight.dtype)` cuts activations to integers. Such
layers are found in the source of the modules' classes: every expression `<layer>.weight` is
followed on the module at hand, through attributes, lists, local names, and functions that are
given a layer. Where a condition is known from the config or the module, the code under the other
branch is left out. Nothing is executed.

What only compares dtypes, asks for the device or tests for None does no harm and is no read.
"""

from __future__ import annotations

import types

from torch import nn

from .method_source import (
    _binding_nodes,
    _functions,
    _functions_of_file,
    _may_return_layers,
    _methods,
    _names,
    _parents,
    _reached,
    _reads_an_argument,
    _source,
)
from .reader import _children, _Reader


def read_past_forward(model: nn.Module, values_only: bool = False) -> dict[int, str]:
    """id of a layer -> the method that reads its weight, as "MambaMixer.slow_forward".

    Args:
        values_only: what reads the dtype or shape alone does not count, nor what cannot be told
            for want of the source: an adapter on a dense layer is left out by products alone.
    """
    modules = list(model.modules())
    # A module that is given a layer and reads its weight: then all callers are looked at.
    handed = any(_reads_an_argument(type(module).forward) for module in modules)
    # Packing marks the configs of transformers' models, and their code asks for the mark.
    marked = [m.config for m in modules if hasattr(m, "base_model_prefix") and hasattr(m, "config")]
    found: dict[int, str] = {}
    reached = _reached({type(module) for module in modules})
    for module in modules:
        if not _holds_modules(module):
            continue
        for name, function in _methods(module, handed, reached):
            runs = name in reached
            _Reader(module, function, found, marked, runs=runs, values_only=values_only).run()
    for module in modules:
        _read_in_hooks(module, found, values_only)
    caches = (_functions_of_file, _source, _parents, _binding_nodes, _may_return_layers)
    for cache in caches:
        cache.cache_clear()  # syntax trees take tens of megabytes
    return found


def _read_in_hooks(module: nn.Module, found: dict[int, str], values_only: bool) -> None:
    """The layers that hooks on a module read, which are given it as their first argument."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        for function in _functions(hook):
            code, index = function.__code__, int(isinstance(hook, types.MethodType))
            given = {name: [module] for name in code.co_varnames[: code.co_argcount][index:][:1]}
            reader = _Reader(
                nn.Module(), function, found, (), given, function.__name__,
                bound=False, values_only=values_only,
            )  # fmt: skip
            if _source(function) is not None:
                reader.run()
            elif "weight" in _names(code) and not values_only:  # a lambda
                reader._note(module, "weight")


def _holds_modules(module: nn.Module) -> bool:
    return bool(module._modules) or any(map(_children, vars(module).values()))
