"""Finds the functions behind methods and names, and parses their source."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import linecache
import re
import sys
import types
from typing import Any

# Modules with general code, which is not about a particular layer.
GENERAL = re.compile(
    r"torch\.nn\.modules\.(module|container)|abc|typing|qlora_ext\.|"
    r"transformers\.(modeling_utils|distributed|generation|integrations|utils|hub)"
)
TORCH = re.compile(r"torch(\.|$)")


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
    return [f for f in found if not GENERAL.match(f.__module__ or "")]


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


def forget_sources() -> None:
    for cache in (functions_of_file, source_of):
        cache.cache_clear()  # syntax trees take tens of megabytes
