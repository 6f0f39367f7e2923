"""Finds the methods of a module that may read a weight, and parses their source."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import linecache
import operator
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# Parameters that packing replaces: those of linear layers and embeddings, and of fused experts.
_PACKED = ("weight", "gate_up_proj", "up_proj", "down_proj")
# Methods that run before packing or replace weights on purpose. Only those that a forward calls
# count.
_BEFORE_PACKING = re.compile(
    r"__init__|_?init_.*|_?initialize_.*|_?reset_parameters|post_init|_?tie_.*|from_.*|"
    r"(get|set)_(input|output|decoder)_?.*embeddings.*|_?resize_.*|_?get_resized_.*|"
    r"_?prune_.*|_?load_.*|_?save_.*|convert_.*|_?freeze.*|extra_repr|__(str|repr|setstate)__|"
    r"(apply|remove)_weight_norm"
)
_NEVER = re.compile(r"__init__|_init_weights|post_init|_?tie_.*|extra_repr|__(str|repr|setstate)__")
# The methods where a model's computation begins. The steps are LightningModule's.
_BEGINS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
# Methods that give the weights of a module and of its submodules.
_ALL_WEIGHTS = frozenset(("parameters", "named_parameters", "state_dict", "get_parameter"))
# Modules with general code, which is not about a particular layer.
_GENERAL = re.compile(
    r"torch\.nn\.modules\.(module|container)|abc|typing|qlora_ext\.|"
    r"transformers\.(modeling_utils|generation|integrations|utils|hub)"
)
_HARMLESS = frozenset(("device", "requires_grad", "is_meta", "is_cuda", "grad", "layout"))


def _methods(
    module: nn.Module, every: bool, reached: set[str]
) -> list[tuple[str, types.FunctionType]]:
    methods = [
        (name, function)
        for name, function in _class_methods(type(module))
        if name in reached or not _BEFORE_PACKING.fullmatch(name)
    ]
    every = every or any(_reads_an_argument(f) for _, f in methods)
    own = module.__dict__.get("forward")  # a forward on the instance replaces the class's
    if own is not None:
        methods += [("forward", f) for f in _functions(own)]
    return [(name, f) for name, f in methods if every or _is_relevant(f)]


@functools.lru_cache(maxsize=4096)
def _class_methods(cls: type) -> tuple[tuple[str, types.FunctionType], ...]:
    """The methods that an instance runs. An overridden method counts only if super() calls it."""
    found, calls_super = [], {}
    for owner in cls.__mro__:
        if _GENERAL.match(owner.__module__) or owner is object:
            continue
        for name, attribute in vars(owner).items():
            if _NEVER.fullmatch(name) or calls_super.get(name) is False:
                continue
            functions = _functions(attribute)
            if functions:
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
    names = _names(function.__code__)
    for called in _functions_called(function):
        names |= _names(called.__code__)
    return frozenset(names)


@functools.lru_cache(maxsize=16384)
def _functions_called(function: types.FunctionType) -> tuple[types.FunctionType, ...]:
    """The functions outside the class that the code of `function` names: `multiply(x)`,
    `helpers.multiply(x)`, `Helpers.multiply(x)`."""
    names = _names(function.__code__)
    found = []
    for name in names:
        named = _object_named(function, name)
        if isinstance(named, types.FunctionType):
            found += _functions(named)
        elif isinstance(named, (types.ModuleType, type)):
            if re.match(r"torch(\.|$)", getattr(named, "__module__", None) or named.__name__):
                continue
            for other in names & vars(named).keys():
                found += _functions(vars(named)[other])
    return tuple(found)


def _object_named(function: types.FunctionType, name: str) -> Any:
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


def _functions(attribute: Any) -> list[types.FunctionType]:
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
def _functions_of_file(path: str) -> dict[int, ast.FunctionDef]:
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
def _source(function: types.FunctionType) -> ast.FunctionDef | None:
    code = function.__code__
    node = _functions_of_file(code.co_filename).get(code.co_firstlineno)
    return node if node is not None and node.name == code.co_name else None


def _names(code: types.CodeType) -> set[str]:
    names = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    return names.union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _reads(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions `x.weight`, x not being `self`, and `getattr(x, "weight")`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and child.attr in _PACKED:
            if not (isinstance(child.value, ast.Name) and child.value.id == "self"):
                yield child
        elif _getattr_name(child) in _PACKED:
            yield child


def _getattr_name(node: ast.AST) -> str | None:
    """ "name" of the expression getattr(x, "name")."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    ):
        return node.args[1].value
    return None


@functools.lru_cache(maxsize=16384)
def _is_relevant(function: types.FunctionType) -> bool:
    """Whether the function may read a layer's weight, itself or through a function it calls."""
    names = _names(function.__code__)
    if not names.isdisjoint(_ALL_WEIGHTS) or not names.isdisjoint(("_parameters", "attrgetter")):
        return True
    if any(type(function.__globals__.get(name)) is operator.attrgetter for name in names):
        return True
    if not names.isdisjoint(_PACKED):
        node = _source(function)
        if "weight" in names if node is None else any(True for _ in _reads(node)):
            return True
    return any(map(_reads_an_argument, _functions_called(function)))


@functools.lru_cache(maxsize=16384)
def _reads_an_argument(function: Any) -> bool:
    """Whether it reads the weight of a layer that is an argument, or is inside an argument."""
    for inner in _functions(function):
        names = _names(inner.__code__)
        if names.isdisjoint({"weight", *_ALL_WEIGHTS}) or re.match(
            r"torch\.", inner.__module__ or ""
        ):
            continue
        node = _source(inner)
        if node is None:
            continue
        given = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)} - {"self"}
        for _ in range(2):  # add names bound to these; twice, for names bound later in a loop
            for child in ast.walk(node):
                for target, value in _bindings(child):
                    if _mentions(value, given):
                        given |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        if any(_mentions(owner, given) for owner in _owners(node)):
            return True
    return False


def _owners(node: ast.AST) -> Iterator[ast.AST]:
    """The x in x.weight, getattr(x, "weight") and x.parameters()."""
    for read in _reads(node):
        yield read.value if isinstance(read, ast.Attribute) else read.args[0]
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and child.attr in _ALL_WEIGHTS:
            yield child.value


def _bindings(node: ast.AST) -> list[tuple[ast.AST, ast.AST]]:
    """(target, value) pairs of a node that binds names."""
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    if isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        return [(node.target, node.value)]
    if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        return [(node.target, node.iter)]
    return []


def _mentions(node: ast.AST, names: Iterable[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


@functools.lru_cache(maxsize=16384)
def _parents(node: ast.FunctionDef) -> dict[ast.AST, ast.AST]:
    return {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}


def _first_argument(function: types.FunctionType) -> str | None:
    """The name of a method's first argument, usually `self`; None if it is not a method."""
    owner = function.__qualname__.rpartition(".")[0]
    count = function.__code__.co_argcount
    if not owner or owner.endswith("<locals>") or count == 0:
        return None
    return function.__code__.co_varnames[0]


def _is_static(module: nn.Module, function: types.FunctionType) -> bool:
    method = inspect.getattr_static(type(module), function.__name__, None)
    return isinstance(method, staticmethod)


def _argument_names(function: ast.FunctionDef | ast.Lambda) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args)]


@functools.lru_cache(maxsize=16384)
def _binding_nodes(node: ast.FunctionDef) -> tuple[ast.AST, ...]:
    kinds = (ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.Call)
    kinds += (ast.For, ast.AsyncFor, ast.comprehension)
    return tuple(child for child in ast.walk(node) if isinstance(child, kinds))


@functools.lru_cache(maxsize=16384)
def _may_return_layers(node: ast.FunctionDef) -> bool:
    """Whether a method is short, like one that picks a layer. Following methods that compute would
    take too long."""
    return len(node.body) <= 6 and sum(1 for _ in ast.walk(node)) <= 200 and any(_returns(node))


def _returns(node: ast.FunctionDef) -> Iterator[ast.AST]:
    for child in ast.walk(node):
        if isinstance(child, (ast.Return, ast.Yield)) and child.value is not None:
            yield child.value


def _is_call_of_name(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _first_of(node: ast.Call) -> ast.AST | None:
    """The x in next(x.parameters())."""
    inner = node.args[0] if _is_call_of_name(node) and node.func.id == "next" else None
    while _is_call_of_name(inner) and inner.func.id == "iter" and inner.args:
        inner = inner.args[0]
    if not isinstance(inner, ast.Call) or not isinstance(inner.func, ast.Attribute):
        return None
    return inner.func.value if inner.func.attr == "parameters" else None


def _is_constant(args: list[ast.AST]) -> bool:
    return bool(args) and isinstance(args[0], ast.Constant) and isinstance(args[0].value, str)


def _is_of(node: ast.AST, name: str) -> bool:
    """Whether an expression is `name` or an attribute chain that begins with it."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == name
