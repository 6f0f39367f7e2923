"""Finds layers whose weight the model's code reads without calling the layer's forward.

A packed layer's weight is bytes in another shape. So `F.linear(x, self.proj.weight)` in the module
around it fails, and `x.to(self.proj.weight.dtype)` truncates activations to integers. This file
finds such layers in the source of the modules' classes. It follows every expression
`<layer>.weight` on the given module, through attributes, lists, local names, and functions that are
given a layer. If the config or the module decides a condition, the other branch is skipped. Nothing
is executed.

Code that only compares dtypes, asks for the device or tests for None does no harm; it is ignored.
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
    """id of a layer -> the method that reads its weight, such as "MambaMixer.slow_forward".

    Args:
        values_only: count only reads of the values, not of dtype or shape, and not guesses made
            without source. For an adapter on a dense layer only products with the weight matter.
    """
    modules = list(model.modules())
    # If some module's forward reads the weight of a layer it is given, look at all methods.
    handed = any(_reads_an_argument(type(module).forward) for module in modules)
    # Packing marks the configs of transformers models, whose code checks the mark.
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
    """Notes the layers that hooks on a module read. The hook's first argument is the module."""
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
