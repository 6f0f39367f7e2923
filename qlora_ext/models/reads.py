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

import ast
import functools
import inspect
import linecache
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

# Parameters that packing replaces: those of linear layers and embeddings, and of fused experts.
_PACKED = ("weight", "gate_up_proj", "up_proj", "down_proj")
# Methods that run before packing, or replace weights on purpose.
_BEFORE_PACKING = re.compile(
    r"__init__|_?init_.*|_?initialize_.*|_?reset_parameters|post_init|_?tie_.*|from_.*|"
    r"(get|set)_(input|output|decoder)_?.*embeddings.*|_?resize_.*|_?get_resized_.*|"
    r"_?prune_.*|_?load_.*|_?save_.*|convert_.*|_?freeze.*|extra_repr|__(str|repr|setstate)__|"
    r"(apply|remove)_weight_norm"
)
# Classes with general code, about no layer in particular.
_GENERAL = re.compile(
    r"torch\.nn\.modules\.(module|container)|abc|typing|qlora_ext\.|"
    r"transformers\.(modeling_utils|generation|integrations|utils|hub)"
)
_HARMLESS = frozenset(("device", "requires_grad", "is_meta", "is_cuda", "grad", "layout"))
# Settings that change while a model is in use.
_CHANGES = frozenset(("training", "gradient_checkpointing"))
_DEPTH = 3  # of functions that hand a layer on


def read_past_forward(model: nn.Module) -> dict[int, str]:
    """id of a layer -> the method that reads its weight, as "MambaMixer.slow_forward"."""
    modules = list(model.modules())
    # A module that is given a layer and reads its weight: then all callers are looked at.
    handed = any(_reads_an_argument(type(module).forward) for module in modules)
    # Packing marks the configs of transformers' models, and their code asks for the mark.
    marked = [m.config for m in modules if hasattr(m, "base_model_prefix") and hasattr(m, "config")]
    found: dict[int, str] = {}
    for module in modules:
        if not _holds_modules(module):
            continue
        for function in _methods(module, handed):
            _Reader(module, function, found, marked).run()
    for cache in (_functions_of_file, _source, _parents):
        cache.cache_clear()  # syntax trees take tens of megabytes
    return found


def _holds_modules(module: nn.Module) -> bool:
    return bool(module._modules) or any(map(_children, vars(module).values()))


# Functions and their source -----------------------------------------------------------------------


def _methods(module: nn.Module, every: bool) -> list[types.FunctionType]:
    methods = _class_methods(type(module))
    every = every or any(_reads_an_argument(f) for f in methods)
    functions = [f for f in methods if every or _is_relevant(f)]
    own = module.__dict__.get("forward")  # one that was put in place of the class's
    if own is not None:
        functions += [f for f in _functions(own) if every or _is_relevant(f)]
    return functions


@functools.lru_cache(maxsize=4096)
def _class_methods(cls: type) -> tuple[types.FunctionType, ...]:
    """The methods that an instance runs: an overridden one only where super() calls it."""
    found, calls_super = [], {}
    for owner in cls.__mro__:
        if _GENERAL.match(owner.__module__) or owner is object:
            continue
        for name, attribute in vars(owner).items():
            if _BEFORE_PACKING.fullmatch(name) or calls_super.get(name) is False:
                continue
            functions = _functions(attribute)
            if functions:
                found += functions
                calls_super[name] = any("super" in f.__code__.co_names for f in functions)
    return tuple(found)


def _functions(attribute: Any) -> list[types.FunctionType]:
    """The Python functions behind a method: behind properties, partials and decorators too."""
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
        elif isinstance(item, functools.partial):
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
    """The functions of a source file by their first line, that of a decorator included."""
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
    """Expressions `x.weight` and `getattr(x, "weight")` where x is not `self`."""
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
    """Whether the function may read a layer's weight, itself or through one it calls."""
    names = _names(function.__code__)
    if {"next", "parameters"} <= names or "_parameters" in names:
        return True
    if not names.isdisjoint(_PACKED):
        node = _source(function)
        if "weight" in names if node is None else any(True for _ in _reads(node)):
            return True
    return any(
        _reads_an_argument(called)
        for called in (function.__globals__.get(name) for name in names)
        if isinstance(called, types.FunctionType)
    )


@functools.lru_cache(maxsize=16384)
def _reads_an_argument(function: Any) -> bool:
    """Whether it reads the weight of a layer that it is given."""
    for inner in _functions(function):
        if "weight" not in _names(inner.__code__) or (inner.__module__ or "").startswith("torch."):
            continue
        node = _source(inner)
        if node is None:
            continue
        arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)} - {"self"}
        for read in _reads(node):
            owner = read.value if isinstance(read, ast.Attribute) else read.args[0]
            if any(isinstance(n, ast.Name) and n.id in arguments for n in ast.walk(owner)):
                return True
    return False


@functools.lru_cache(maxsize=16384)
def _parents(node: ast.FunctionDef) -> dict[ast.AST, ast.AST]:
    return {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}


# Following expressions on a module ----------------------------------------------------------------

_UNKNOWN = object()


class _Reader:
    """Walks one function with `self` bound to a module, and notes which layers it reads."""

    def __init__(
        self, module, function, found, marked=(), arguments=None, method=None, depth=_DEPTH
    ):
        self.module = module
        self.function = function
        self.found = found
        self.marked = marked  # the configs that will say that the model is packed
        self.depth = depth
        self.method = method or f"{type(module).__name__}.{function.__name__}"
        # local name -> the objects it may stand for
        self.locals: dict[str, list] = {"self": [module], **(arguments or {})}

    def run(self) -> None:
        node = _source(self.function)
        if node is None:
            self._by_names()
            return
        self.parents = _parents(node)
        for _ in range(2):  # a name may be bound from one that is bound further down, in a loop
            for child in ast.walk(node):
                self._bind(child)
        self._block(node.body)

    def _by_names(self) -> None:
        """Without source (a class made in an interactive session): a layer that is named in a
        method that also names `weight`."""
        names = _names(self.function.__code__)
        for key, child in self.module._modules.items():
            if key in names and child is not None and child._parameters.get("weight") is not None:
                self._note(child, "weight")

    def _note(self, layer: Any, key: str) -> None:
        if not isinstance(layer, nn.Module) or layer is self.module:
            return
        parameter = layer._parameters.get(key)
        if parameter is not None and parameter.ndim >= 2:
            self.found.setdefault(id(layer), self.method)

    # names

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._loop(node.target, node.iter)

    def _assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self._add(target.id, self.values(value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._assign(one, other)

    def _add(self, name: str, values: list) -> None:
        known = self.locals.setdefault(name, [])
        known += [v for v in values if not any(v is k for k in known)]

    def _loop(self, target: ast.AST, iterated: ast.AST) -> None:
        name = iterated.func.id if _is_call_of_name(iterated) else None
        if name == "zip" and isinstance(target, ast.Tuple):
            for one, other in zip(target.elts, iterated.args, strict=False):
                self._loop(one, other)
        elif name == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            self._loop(target.elts[1], iterated.args[0])
        elif name in ("reversed", "list", "tuple", "iter") and iterated.args:
            self._loop(target, iterated.args[0])
        elif isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Attribute):
            owner = self.values(iterated.func.value)
            children = [c for o in owner for c in _children(o)]
            if iterated.func.attr in ("items", "named_children"):
                target = target.elts[-1] if isinstance(target, ast.Tuple) else target
            elif iterated.func.attr not in ("children", "values"):
                return
            if isinstance(target, ast.Name):
                self._add(target.id, children)
        elif isinstance(target, ast.Name):
            if isinstance(iterated, (ast.Tuple, ast.List)):
                self._add(target.id, [v for e in iterated.elts for v in self.values(e)])
            else:
                self._add(target.id, [c for o in self.values(iterated) for c in _children(o)])

    # expressions

    def values(self, node: ast.AST) -> list:
        """The modules, configs and settings that an expression may stand for."""
        if isinstance(node, ast.Constant):
            return [node.value]
        if isinstance(node, ast.Name):
            return self.locals.get(node.id, [])
        if isinstance(node, ast.Attribute):
            return self._attributes(node.value, node.attr)
        if isinstance(node, ast.Subscript):
            return self._items(node)
        if isinstance(node, ast.IfExp):
            truth = self.truth(node.test)
            branches = [node.body] if truth is not False else []
            branches += [node.orelse] if truth is not True else []
            return [v for branch in branches for v in self.values(branch)]
        if isinstance(node, ast.BoolOp):
            return [v for part in node.values for v in self.values(part)]
        if isinstance(node, ast.NamedExpr):
            return self.values(node.value)
        if isinstance(node, ast.Call):
            name = _getattr_name(node)
            if isinstance(name, str):
                return self._attributes(node.args[0], name)
            if _is_call_of_name(node) and node.func.id == "getattr" and node.args:
                # A name that is computed: any of the parts.
                return [c for o in self.values(node.args[0]) for c in _children(o)]
            if isinstance(node.func, ast.Attribute) and node.func.attr == "get_submodule":
                path = node.args[0].value if _is_constant(node.args) else ""
                return [
                    m
                    for owner in self.values(node.func.value)
                    if isinstance(owner, nn.Module)
                    for name, m in owner.named_modules()
                    if name == path and path
                ]
            if _is_call_of_name(node) and node.func.id in ("next", "iter", "list", "tuple"):
                return [v for a in node.args[:1] for v in self.values(a)]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("children", "values"):
                return [c for o in self.values(node.func.value) for c in _children(o)]
        return []

    def _attributes(self, owner: ast.AST, name: str) -> list:
        found = [_attribute(o, name) for o in self.values(owner)]
        return [value for value in found if value is not _UNKNOWN]

    def _items(self, node: ast.Subscript) -> list:
        found = []
        for owner in self.values(node.value):
            key = node.slice
            if isinstance(key, ast.UnaryOp) and isinstance(key.op, ast.USub):
                key = key.operand.value if isinstance(key.operand, ast.Constant) else None
                key = -key if isinstance(key, int) else None
            else:
                key = key.value if isinstance(key, ast.Constant) else None
            children = _children(owner)
            try:
                found += [owner[key]] if children and key is not None else children
            except (KeyError, IndexError, TypeError):
                found += children
        return found

    def truth(self, node: ast.AST) -> bool | None:
        """Whether a condition holds; None where that is not known before the model runs."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            truth = self.truth(node.operand)
            return None if truth is None else not truth
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(part) for part in node.values]
            decisive = isinstance(node.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self._compare(node)
        if self._asks_for_mark(node):
            return True
        value = self._setting(node)
        return None if value is _UNKNOWN else bool(value)

    def _asks_for_mark(self, node: ast.AST) -> bool:
        """hasattr(self.config, "_is_quantized")"""
        return (
            _is_call_of_name(node)
            and node.func.id in ("hasattr", "getattr")
            and len(node.args) >= 2
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value == "_is_quantized"
            and any(v is config for v in self.values(node.args[0]) for config in self.marked)
        )

    def _setting(self, node: ast.AST) -> Any:
        """The one value of a setting, or _UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if not isinstance(node, ast.Attribute) or node.attr in _CHANGES:
            return _UNKNOWN
        owners = self.values(node.value)
        if len(owners) != 1 or not _is_of(node.value, "self"):
            return _UNKNOWN
        value = _attribute(owners[0], node.attr)
        if isinstance(value, nn.Module):
            return True
        return value if isinstance(value, (bool, int, float, str, type(None))) else _UNKNOWN

    def _compare(self, node: ast.Compare) -> bool | None:
        left, right = self._setting(node.left), self._setting(node.comparators[0])
        if left is _UNKNOWN or right is _UNKNOWN:
            return None
        compare = {
            ast.Eq: lambda: left == right,
            ast.NotEq: lambda: left != right,
            ast.Is: lambda: left is right,
            ast.IsNot: lambda: left is not right,
            ast.Gt: lambda: left > right,
            ast.GtE: lambda: left >= right,
            ast.Lt: lambda: left < right,
            ast.LtE: lambda: left <= right,
        }.get(type(node.ops[0]))
        try:
            return None if compare is None else compare()
        except TypeError:
            return None

    # statements

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                truth = self.truth(statement.test)
                self._visit(statement.test)
                if truth is not False:
                    self._block(statement.body)
                if truth is not True:
                    self._block(statement.orelse)
                taken = {True: statement.body, False: statement.orelse}.get(truth)
                if taken and isinstance(taken[-1], (ast.Return, ast.Raise)):
                    return  # what follows does not run
            else:
                self._visit(statement)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.IfExp):
            truth = self.truth(node.test)
            self._visit(node.test)
            if truth is not False:
                self._visit(node.body)
            if truth is not True:
                self._visit(node.orelse)
            return
        if isinstance(node, ast.BoolOp):
            stop = isinstance(node.op, ast.Or)
            for part in node.values:
                self._visit(part)
                if self.truth(part) is stop:
                    return
            return
        if isinstance(node, ast.Attribute) and node.attr in _PACKED:
            self._read(node, node.value, node.attr)
        elif isinstance(node, ast.Call):
            if (name := _getattr_name(node)) in _PACKED:
                self._read(node, node.args[0], name)
            self._read_first(node)
            self._call(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if node.value.attr == "_parameters" and key in _PACKED:
                self._read(node, node.value.value, key)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and field in ("body", "orelse", "finalbody"):
                self._block(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.AST):
                        self._visit(item)
            elif isinstance(value, ast.AST):
                self._visit(value)

    def _read(self, node: ast.AST, owner: ast.AST, key: str) -> None:
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)) or self._is_harmless(node):
            return
        for layer in self.values(owner):
            self._note(layer, key)

    def _read_first(self, node: ast.Call) -> None:
        """next(x.parameters()): the first parameter, which may be a layer's weight."""
        inner = node.args[0] if _is_call_of_name(node) and node.func.id == "next" else None
        if not isinstance(inner, ast.Call) or not isinstance(inner.func, ast.Attribute):
            return
        if inner.func.attr != "parameters" or self._is_harmless(node):
            return
        for owner in self.values(inner.func.value):
            if isinstance(owner, nn.Module):
                for part in owner.modules():
                    keys = [key for key, p in part._parameters.items() if p is not None]
                    if keys:
                        self._note(part, keys[0])
                        break

    def _is_harmless(self, node: ast.AST) -> bool:
        """Whether what is read of the weight is the same, or not used, when it is packed."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            if parent.attr in _HARMLESS:
                return True
            return parent.attr == "dtype" and isinstance(self.parents.get(parent), ast.Compare)
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        return (
            _is_call_of_name(parent)
            and parent.func.id in ("isinstance", "hasattr", "id", "type")
            and parent.args[:1] == [node]
        )

    def _call(self, node: ast.Call) -> None:
        """A function of the model's own code that is given a layer."""
        if self.depth == 0:
            return
        given = [self.values(argument) for argument in node.args]
        named = {k.arg: self.values(k.value) for k in node.keywords if k.arg is not None}
        given = [[v for v in values if isinstance(v, nn.Module)] for values in given]
        named = {k: [v for v in values if isinstance(v, nn.Module)] for k, values in named.items()}
        if not any(given) and not any(named.values()):
            return
        for module, function in self._called(node.func):
            if not _reads_an_argument(function):
                continue
            source = _source(function)
            if source is None:
                continue
            names = [a.arg for a in (*source.args.posonlyargs, *source.args.args)]
            if names[:1] == ["self"]:
                names = names[1:]
            arguments = {k: v for k, v in zip(names, given, strict=False) if v}
            arguments |= {k: v for k, v in named.items() if v}
            deeper = self.depth - 1
            _Reader(module, function, self.found, self.marked, arguments, self.method, deeper).run()

    def _called(self, node: ast.AST) -> list[tuple[nn.Module, types.FunctionType]]:
        if isinstance(node, ast.Name) and node.id not in self.locals:
            called = self.function.__globals__.get(node.id)
            return [(self.module, f) for f in _functions(called)] if called is not None else []
        found = []
        for module in self.values(node):
            if isinstance(module, nn.Module):
                found += [(module, f) for f in _functions(type(module).forward)]
        if isinstance(node, ast.Attribute):
            for owner in self.values(node.value):
                if isinstance(owner, nn.Module) and node.attr not in owner._modules:
                    method = inspect.getattr_static(type(owner), node.attr, None)
                    found += [(owner, f) for f in _functions(method)]
        return found


def _is_call_of_name(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _is_constant(args: list[ast.AST]) -> bool:
    return bool(args) and isinstance(args[0], ast.Constant) and isinstance(args[0].value, str)


def _is_of(node: ast.AST, name: str) -> bool:
    """Whether an expression is `name` or an attribute chain that begins with it."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == name


def _children(owner: Any) -> list:
    if isinstance(owner, nn.Module):
        return [child for child in owner._modules.values() if child is not None]
    if isinstance(owner, dict):
        owner = list(owner.values())
    if isinstance(owner, (list, tuple)):
        return [item for item in owner if isinstance(item, nn.Module)]
    return []


def _attribute(owner: Any, name: str) -> Any:
    """owner.name without running a property's code; _UNKNOWN for tensors and what else changes."""
    if isinstance(owner, nn.Module):
        if name == "_modules":
            return dict(owner._modules)
        if name in owner._modules:
            return owner._modules[name]
        if name in owner._parameters or name in owner._buffers:
            return _UNKNOWN
        if name in owner.__dict__:
            return owner.__dict__[name]
        value = inspect.getattr_static(type(owner), name, _UNKNOWN)
        return value if isinstance(value, (bool, int, float, str, type(None))) else _UNKNOWN
    if type(owner).__name__.endswith("Config") and not name.startswith("_"):
        try:
            return getattr(owner, name)
        except Exception:  # a config's own code
            return _UNKNOWN
    return _UNKNOWN
