"""Finds layers whose weight the model's code reads other than through the layer's forward.

A packed layer's weight is bytes in another shape. So `F.linear(x, self.proj.weight)` in the module
around it fails, and `x.to(self.proj.weight.dtype)` truncates activations to integers. This file
finds such layers in the source of the modules' classes. It follows every expression
`<layer>.weight` on the given module, through attributes, lists, local names, and functions that are
given a layer. If the config or the module decides a condition, the other branch is skipped. Nothing
is executed.

Code that only compares dtypes, asks for the device or tests for None does no harm; it is ignored.
"""

from __future__ import annotations

import functools
import re
import types
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from .method_source import GENERAL, TORCH, forget_sources, functions_of, names_in, object_named
from .reader import Reader, Search, items_of

# Methods that run before packing or replace weights on purpose. Only those that a forward calls
# count.
_BEFORE_PACKING = re.compile(
    r"_*init_.*|_?initialize_.*|_?reset_parameters|post_init|_?tie_.*|from_.*|"
    r"(get|set)_(input|output|decoder)_?.*embeddings.*|_?resize_.*|_?get_resized_.*|"
    r"_?prune_.*|_?load_.*|_?save_.*|convert_.*|_?freeze.*|extra_repr|__(str|repr|setstate)__|"
    r"(apply|remove)_weight_norm"
)
# The methods where a model's computation begins. The steps are LightningModule's.
_BEGINS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


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
    reached = _reached({type(module) for module in modules})
    for module in modules:
        if _holds_modules(module):
            for name, function in _methods(module, reached):
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
    """As read_past_forward, for a method of `module` that runs in a frame, whose variables are
    known, and for the other methods of `module`.

    Args:
        layers: id of a parameter -> the layers that have it.
    """
    search, code = Search({}, layers, set(), False), frame.f_code
    cells = tuple(types.CellType() for _ in code.co_freevars)
    running = types.FunctionType(code, frame.f_globals, closure=cells)
    known = {name: [value] for name, value in frame.f_locals.items()}
    Reader(search, running, module, known, code.co_name).run()
    if not search.found and module is not None:
        for _, function in _methods(module, frozenset()):
            _read(search, function, module, runs=False)
    return search.found


def _read(search: Search, function: types.FunctionType, module: nn.Module, runs: bool) -> None:
    """Follows a method of a module; only its first argument is known."""
    known = {name: [module] for name in ("self", *_arguments(function)[:1])}
    method = f"{type(module).__name__}.{function.__name__}"
    Reader(search, function, module, known, method, runs).run()


def _arguments(function: types.FunctionType) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _holds_modules(module: nn.Module) -> bool:
    values = [v for v in vars(module).values() if isinstance(v, (list, tuple, dict))]
    return any(isinstance(item, nn.Module) for v in values for item in items_of(v))


def _methods(module: nn.Module, reached: set[str]) -> Iterator[tuple[str, types.FunctionType]]:
    """(name, function) of the methods that may run while a packed model is in use."""
    for name, function in _class_methods(type(module)):
        if name in reached or not _BEFORE_PACKING.fullmatch(name):
            yield name, function
    # A forward on the instance replaces the class's.
    yield from (("forward", f) for f in functions_of(module.__dict__.get("forward")))


@functools.lru_cache(maxsize=4096)
def _class_methods(cls: type) -> tuple[tuple[str, types.FunctionType], ...]:
    """The methods that an instance runs. An overridden method counts only if super() calls it."""
    found, calls_super = [], {}
    for owner in cls.__mro__:
        if GENERAL.match(owner.__module__) or owner is object:
            continue
        for name, attribute in vars(owner).items():
            if calls_super.get(name) is not False and (functions := functions_of(attribute)):
                found += [(name, f) for f in functions]
                calls_super[name] = any("super" in f.__code__.co_names for f in functions)
    return tuple(found)


def _reached(classes: set[type]) -> set[str]:
    """Names of the methods that a forward may call, judged by name alone. A method that nothing
    calls, such as one that loops over all weights to freeze or count them, is not part of the
    computation."""
    methods: dict[str, list] = {}
    for cls in classes:
        for name, function in _class_methods(cls):
            methods.setdefault(name, []).append(function)
    reached, queue = set(), list(_BEGINS)
    while queue:
        name = queue.pop()
        if name in reached:
            continue
        reached.add(name)
        for function in methods.get(name, ()):
            queue += _names_called(function)
    return reached


@functools.lru_cache(maxsize=16384)
def _names_called(function: types.FunctionType) -> frozenset[str]:
    """The names in a function, and in the functions outside the class that it names:
    `multiply(x)`, `helpers.multiply(x)`, `Helpers.multiply(x)`."""
    names, called = names_in(function.__code__), []
    for name in names:
        named = object_named(function, name)
        called += functions_of(named)
        if isinstance(named, (types.ModuleType, type)) and not TORCH.match(
            getattr(named, "__module__", None) or named.__name__
        ):
            for other in names & vars(named).keys():
                called += functions_of(vars(named)[other])
    return names.union(*(names_in(each.__code__) for each in called))
