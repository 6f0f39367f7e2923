"""Finds the methods of a module that may read a weight, and parses their source."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import linecache
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

# Methods that run before packing or replace weights on purpose. Only those that a forward calls
# count.
_BEFORE_PACKING = re.compile(
    r"__init__|_?init_.*|_?initialize_.*|_?reset_parameters|post_init|_?tie_.*|from_.*|"
    r"(get|set)_(input|output|decoder)_?.*embeddings.*|_?resize_.*|_?get_resized_.*|"
    r"_?prune_.*|_?load_.*|_?save_.*|convert_.*|_?freeze.*|extra_repr|__(str|repr|setstate)__|"
    r"(apply|remove)_weight_norm"
)
# The methods where a model's computation begins. The steps are LightningModule's.
_BEGINS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
# Modules with general code, which is not about a particular layer.
_GENERAL = re.compile(
    r"torch\.nn\.modules\.(module|container)|abc|typing|qlora_ext\.|"
    r"transformers\.(modeling_utils|distributed|generation|integrations|utils|hub)"
)
TORCH = re.compile(r"torch(\.|$)")


def methods_of(module: nn.Module, reached: set[str]) -> Iterator[tuple[str, types.FunctionType]]:
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
        if _GENERAL.match(owner.__module__) or owner is object:
            continue
        for name, attribute in vars(owner).items():
            if calls_super.get(name) is not False and (functions := functions_of(attribute)):
                found += [(name, f) for f in functions]
                calls_super[name] = any("super" in f.__code__.co_names for f in functions)
    return tuple(found)


def names_reached(classes: set[type]) -> set[str]:
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


def object_named(function: types.FunctionType, name: str) -> Any:
    """The object that a non-local name means in a function. It may be a module that the function
    imports, if that was imported before. None if it is not known."""
    if name in function.__code__.co_freevars and function.__closure__ is not None:
        cell = function.__closure__[function.__code__.co_freevars.index(name)]
        with contextlib.suppress(ValueError):  # an empty cell
            return cell.cell_contents
    for place in (function.__globals__, vars(builtins), sys.modules):
        if name in place:
            return place[name]
    return sys.modules.get(f"{function.__globals__.get('__package__')}.{name}")


def functions_of(attribute: Any) -> list[types.FunctionType]:
    """The Python functions behind a method, also behind a property, partial or decorator."""
    found, queue, seen = [], [attribute], set()
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (staticmethod, classmethod, types.MethodType)):
            queue.append(item.__func__)
        elif isinstance(item, property):
            queue.append(item.fget)
        elif isinstance(item, (functools.partial, functools.cached_property)):
            queue.append(item.func)
        elif isinstance(item, types.FunctionType):
            found.append(item)
            if hasattr(item, "__wrapped__"):
                queue.append(item.__wrapped__)
            for cell in item.__closure__ or ():
                try:
                    if isinstance(cell.cell_contents, types.FunctionType):
                        queue.append(cell.cell_contents)
                except ValueError:  # an empty cell
                    continue
    return [f for f in found if not _GENERAL.match(f.__module__ or "")]


@functools.lru_cache(maxsize=512)
def functions_of_file(path: str) -> dict[int, ast.FunctionDef]:
    """First line -> function, for a source file. A decorator's line counts as the first."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except (SyntaxError, ValueError, RecursionError):
        return {}
    return {
        min([node.lineno, *(d.lineno for d in node.decorator_list)]): node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


@functools.lru_cache(maxsize=16384)
def source_of(function: types.FunctionType) -> ast.FunctionDef | None:
    code = function.__code__
    node = functions_of_file(code.co_filename).get(code.co_firstlineno)
    return node if node is not None and node.name == code.co_name else None


@functools.lru_cache(maxsize=16384)
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names and strings in a function's code, and in functions inside of it."""
    names = frozenset((*code.co_names, *(c for c in code.co_consts if isinstance(c, str))))
    return names.union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))
