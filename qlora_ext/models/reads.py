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
from collections import defaultdict

from torch import nn

from .method_source import (
    functions_of,
    functions_of_file,
    methods_of,
    names_reached,
    source_of,
)
from .reader import Reader, Search, _items


def read_past_forward(model: nn.Module, values_only: bool = False) -> dict[int, str]:
    """id of a layer -> the method that reads its weight, such as "MambaMixer.slow_forward".

    Args:
        values_only: count only reads of the values, not of dtype or shape, and not guesses made
            without source. For an adapter on a dense layer only products with the weight matter.
    """
    modules = list(model.modules())
    layers = defaultdict(list)
    for module in modules:
        for parameter in module._parameters.values():
            layers[id(parameter)].append(module)
    # Packing marks the configs of transformers models, whose code checks the mark.
    marked = {
        id(m.config) for m in modules if hasattr(m, "base_model_prefix") and hasattr(m, "config")
    }
    search = Search({}, layers, marked, values_only)
    reached = names_reached({type(module) for module in modules})
    for module in modules:
        if _holds_modules(module):
            for name, function in methods_of(module, reached):
                _read(search, function, module, name in reached)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            for function in functions_of(hook):
                names = _arguments(function)[isinstance(hook, types.MethodType) :][:1]
                known = {name: [module] for name in names}
                Reader(search, function, None, known, function.__name__).run()
    forget_sources()
    return search.found


def read_in_frame(
    frame: types.FrameType, module: nn.Module | None, layers: dict[int, list[nn.Module]]
) -> dict[int, str]:
    """As read_past_forward, for the code that runs in a frame and the other methods of `module`,
    whose method it is. Its variables are known.

    Args:
        layers: id of a parameter -> the layers that have it.
    """
    search, code = Search({}, layers, set(), False), frame.f_code
    cells = tuple(types.CellType() for _ in code.co_freevars)
    running = types.FunctionType(code, frame.f_globals, closure=cells)
    known = {name: [value] for name, value in frame.f_locals.items()}
    Reader(search, running, module, known, code.co_name).run()
    if not search.found and module is not None:
        for _, function in methods_of(module, frozenset()):
            _read(search, function, module, runs=False)
    return search.found


def _read(search: Search, function: types.FunctionType, module: nn.Module, runs: bool) -> None:
    """Reads a method of a module, of which only the first argument is known."""
    known = {name: [module] for name in ("self", *_arguments(function)[:1])}
    method = f"{type(module).__name__}.{function.__name__}"
    Reader(search, function, module, known, method, runs).run()


def _arguments(function: types.FunctionType) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def forget_sources() -> None:
    for cache in (functions_of_file, source_of):
        cache.cache_clear()  # syntax trees take tens of megabytes


def _holds_modules(module: nn.Module) -> bool:
    values = [v for v in vars(module).values() if isinstance(v, (list, tuple, dict))]
    return any(isinstance(item, nn.Module) for v in values for item in _items(v))
