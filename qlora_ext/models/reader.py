"""Follows the expressions of one function, to find the layers whose weights it reads.

Names stand for real objects: modules, their parameters, lists and dicts of them, configs,
functions. An expression stands for any of several objects, or for none if nothing is known of it.
torch's functions that list modules and parameters are called; the model's code is only followed.

This file is longer than others: it is one interpreter of Python's syntax, whose parts call each
other.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import itertools
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from .method_source import (
    TORCH,
    functions_of,
    names_in,
    object_named,
    source_of,
)

_HARMLESS = frozenset(("device", "requires_grad", "is_meta", "is_cuda", "grad", "layout"))
_ALL_WEIGHTS = frozenset(("parameters", "named_parameters", "state_dict", "get_parameter"))
# The parameters that packing replaces, of linear layers, embeddings and fused experts.
_READING = _ALL_WEIGHTS | {"weight", "gate_up_proj", "up_proj", "down_proj"}
# Methods of modules and dicts that list what is inside. Those in _ALL may list a whole model, so
# they count only in code that a forward calls.
_ALL = _ALL_WEIGHTS | {"modules", "named_modules"}
_LISTING = _ALL | {"children", "named_children", "get_submodule", "values", "items", "get"}
# Functions that return a list of what is in their arguments.
_PASSING = frozenset(("list", "tuple", "iter", "reversed", "sorted", "set", "chain", "islice"))
_PASSING |= {"filter", "zip", "enumerate", "dict", "OrderedDict"}
# Functions that read no weight: they only ask about it, or call a module's own forward.
_ASKING = frozenset(("isinstance", "hasattr", "id", "type", "len", "functional_call", "checkpoint"))
_DESCRIBING = frozenset(("dtype", "shape", "size", "ndim", "dim", "numel", "element_size"))
# Attributes that change while a model is in use.
_CHANGES = frozenset(("training", "gradient_checkpointing"))
_ABSENT = object()
_SETTINGS = (bool, int, float, str, type(None))
_HOLDERS = (nn.Module, nn.Parameter, list, tuple, dict)
_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
}  # fmt: skip
_SHORT = 20  # a method with at most this many names may be one that only picks a layer
_DEPTH = 3  # how many nested calls to follow, and how deep to look into lists


class Search(NamedTuple):
    """What all readers of a model share."""

    found: dict[int, str]  # id of a layer -> the method that reads its weight
    layers: dict[int, list[nn.Module]]  # id of a parameter -> the layers that have it
    marked: set[int]  # ids of the configs that packing marks as quantized
    values_only: bool  # see read_past_forward


class _Nested:
    """A function or lambda in a function that is followed."""

    def __init__(self, reader: Reader, node: ast.FunctionDef | ast.Lambda):
        self.reader, self.node = reader, node


class Reader:
    """Walks one function, and notes which layers it reads.

    Args:
        module: the module whose method it is, whose own weights do not count.
        known: name of an argument -> the objects it may stand for.
        method: what reads, for the reason.
        runs: whether a forward calls the function, judged by names.
    """

    def __init__(self, search: Search, function, module, known, method, runs=True, depth=_DEPTH):
        self.search, self.function, self.module = search, function, module
        self.method, self.runs, self.depth = method, runs, depth
        # name -> id of an object it may stand for -> the object
        self.locals = {name: {id(v): v for v in values} for name, values in known.items()}
        self.returned: list = []
        self.active: set[ast.AST] = set()  # nested functions being called

    def run(self) -> list:
        """Notes what the function reads. Returns the modules, weights and lists it may return."""
        node, names = source_of(self.function), names_in(self.function.__code__)
        if node is not None:
            self.block(node.body)
        elif "weight" in names and not self.search.values_only:
            # Without source (a class from an interactive session), it reads what it names.
            given = [v for values in self.locals.values() for v in values.values()]
            for module in [v for v in given if isinstance(v, nn.Module)]:
                named = [child for key, child in module._modules.items() if key in names]
                for layer in filter(None, (module, *named)):
                    self.note(layer._parameters.get("weight"))
        self.locals.clear()  # nested functions refer to self, and would keep weights alive
        return [v for v in self.returned if isinstance(v, _HOLDERS)]

    def note(self, value: Any, depth: int = _DEPTH) -> None:
        """Notes that the code uses a value, which may be a weight or a list of them."""
        if isinstance(value, nn.Parameter) and value.ndim >= 2:
            for layer in self.search.layers.get(id(value), ()):
                if layer is not self.module:
                    self.search.found.setdefault(id(layer), self.method)
        elif isinstance(value, (list, tuple, dict)) and depth:
            for inner in items_of(value):
                self.note(inner, depth - 1)

    # names

    def bind(self, target: ast.AST, values: list) -> None:
        match target:
            case ast.Name(id=name):
                self.locals.setdefault(name, {}).update((id(v), v) for v in values)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                starred = any(isinstance(one, ast.Starred) for one in targets)
                for inside in map(items_of, values):
                    paired = len(inside) == len(targets) and not starred
                    for n, one in enumerate(targets):
                        self.bind(one, [inside[n]] if paired else inside)
            case ast.Starred(value=one):
                self.bind(one, [values])
            case ast.Attribute() | ast.Subscript():
                self.note(values)
                self.values(target)

    @contextlib.contextmanager
    def narrowed(self, tests: list[ast.AST], truth: bool = True) -> Iterator[None]:
        """A context in which names stand for fewer objects, because the tests hold (or do not).
        After `isinstance(m, nn.LayerNorm)` m is not a linear layer. After a test of requires_grad
        the weight is not packed."""
        before = dict(self.locals)
        for test in tests:
            self.narrow(test, truth)
        try:
            yield
        finally:
            for name, values in before.items():
                if self.locals[name] is not values:
                    self.locals[name] = values | self.locals[name]

    def narrow(self, test: ast.AST, truth: bool) -> None:
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return self.narrow(inner, not truth)
            case ast.BoolOp(op=op, values=parts) if isinstance(op, ast.And) is truth:
                for part in parts:
                    self.narrow(part, truth)
                return None
            case ast.Attribute(value=ast.Name(id=name), attr="requires_grad") if truth:
                kinds, truth = (nn.Parameter,), False
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), asked]):
                kinds = self.values(asked)
                kinds = kinds[0] if kinds and isinstance(kinds[0], tuple) else tuple(kinds)
                if not kinds or not all(isinstance(kind, type) for kind in kinds):
                    return None
            case _:
                return None
        known = self.locals.get(name, {})
        self.locals[name] = {k: v for k, v in known.items() if isinstance(v, kinds) is truth}

    # statements

    def block(self, statements: list[ast.stmt]) -> None:
        with contextlib.ExitStack() as rest:
            for statement in statements:
                if not isinstance(statement, ast.If):
                    self.visit(statement)
                    continue
                test, bodies = statement.test, {True: statement.body, False: statement.orelse}
                truth = self.truth(test)
                self.values(test)
                for holds, body in bodies.items():
                    if truth in (holds, None):
                        with self.narrowed([test], holds):
                            self.block(body)
                taken = bodies.get(truth)
                if taken and isinstance(taken[-1], (ast.Return, ast.Raise)):
                    return  # what follows does not run
                if isinstance(statement.body[-1], (ast.Continue, ast.Return, ast.Raise)):
                    rest.enter_context(self.narrowed([test], False))

    def visit(self, node: ast.AST) -> None:
        """Follows a statement, or an expression that uses all its parts."""
        match node:
            case ast.For() | ast.AsyncFor():
                for _ in range(2):  # a name may be bound from one that is bound further down
                    self.bind(node.target, self.items(node.iter))
                    self.block(node.body)
                self.block(node.orelse)
            case ast.Assign(targets=targets, value=value):
                values = self.values(value)
                for target in targets:
                    self.bind(target, values)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.bind(target, self.values(value))
            case ast.Return(value=ast.expr() as value) | ast.Yield(value=ast.expr() as value):
                self.returned += (values := self.values(value))
                if not self.active and self.depth == _DEPTH:
                    self.note(values)
            case ast.FunctionDef(name=name):
                self.bind(ast.Name(name), [_Nested(self, node)])
                self.note(self.call_nested(node, [], {}))
            case ast.ImportFrom(module=path, level=level, names=names):
                with contextlib.suppress(ImportError):  # more dots than packages
                    package = self.function.__globals__.get("__package__") or ""
                    path = importlib.util.resolve_name("." * level + (path or ""), package)
                    for alias in names:
                        given = getattr(sys.modules.get(path), "__dict__", {}).get(alias.name)
                        self.bind(ast.Name(alias.asname or alias.name), [given])
            case ast.Delete():
                return
            case _:
                for _, part in ast.iter_fields(node):
                    parts = part if isinstance(part, list) else [part]
                    if parts and isinstance(parts[0], ast.stmt):
                        self.block(parts)
                        continue
                    for inner in parts:
                        if isinstance(inner, ast.expr):
                            self.use(inner)
                        elif isinstance(inner, ast.AST):
                            self.visit(inner)

    def truth(self, node: ast.AST) -> bool | None:
        """Whether a condition holds; None if that is not known before the model runs."""
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                truth = self.truth(inner)
                return None if truth is None else not truth
            case ast.BoolOp(op=op, values=parts):
                truths, decisive = [self.truth(part) for part in parts], isinstance(op, ast.Or)
                if decisive in truths:
                    return decisive
                return None if None in truths else not decisive
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                one, other = self.setting(left), self.setting(right)
                with contextlib.suppress(TypeError):
                    return _COMPARE[type(op)](one[0], other[0]) if one and other else None
                return None
            case ast.Call(
                func=ast.Name(id="hasattr" | "getattr"),
                args=[config, ast.Constant(value="_is_quantized" as name), *_],
            ):
                known = self.values(config)
                return any(id(v) in self.search.marked or hasattr(v, name) for v in known) or None
        known = self.setting(node)
        return (isinstance(known[0], nn.Module) or bool(known[0])) if known else None

    def setting(self, node: ast.AST) -> list:
        """[the value of a constant or of a setting of the model], or []."""
        if isinstance(node, ast.Constant):
            return [node.value]
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if root is node or getattr(root, "id", None) != "self" or node.attr in _CHANGES:
            return []
        owners = self.values(node.value)
        if len(owners) != 1 or isinstance(owners[0], nn.Parameter):
            return []
        if _is_property(owners[0], node.attr):
            return []
        found = self.attribute(owners[0], node.attr)
        return [v for v in found if isinstance(v, (*_SETTINGS, nn.Module))]

    # expressions

    def use(self, node: ast.AST) -> None:
        self.note(self.values(node))

    def items(self, node: ast.AST) -> list:
        """What is in the modules and lists that an expression may stand for."""
        values = self.values(node)
        self.note([v for v in values if isinstance(v, nn.Parameter)])
        return [item for value in values for item in items_of(value)]

    def values(self, node: ast.AST) -> list:
        """The objects that an expression may stand for. Notes the weights that it uses."""
        match node:
            case ast.Constant(value=value):
                return [value]
            case ast.Name(id=name):
                code = self.function.__code__
                if name in self.locals or name in code.co_varnames + code.co_cellvars:
                    return list(self.locals.get(name, {}).values())
                known = object_named(self.function, name)
                return [] if known is None else [known]
            case ast.Attribute(value=owner, attr=name):
                return [v for o in self.values(owner) for v in self.attribute(o, name)]
            case ast.Subscript(value=owner, slice=key):
                self.use(key)
                return self.selected(self.values(owner), _literal(key))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                truth = self.truth(test)
                self.values(test)
                found = self.values(body) if truth is not False else []
                return found + (self.values(orelse) if truth is not True else [])
            case ast.BoolOp(op=op, values=parts):
                found = []
                for part in parts:
                    found += self.values(part)
                    if self.truth(part) is isinstance(op, ast.Or):
                        break
                return found
            case ast.BinOp(left=left, op=ast.Add(), right=right):  # perhaps of lists
                both = self.values(left) + self.values(right)
                self.note([v for v in both if isinstance(v, nn.Parameter)])
                return [v for v in both if isinstance(v, (list, tuple, nn.Module))]
            case ast.NamedExpr(target=target, value=value):
                values = self.values(value)
                self.bind(target, values)
                return values
            case ast.Starred(value=value):
                return self.items(value)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                if any(isinstance(part, ast.Starred) for part in parts):
                    return [[v for part in parts for v in self.values(part)]]
                return list(itertools.zip_longest(*map(self.values, parts)))
            case ast.Dict(keys=keys, values=parts):
                keys = [getattr(key, "value", key) for key in keys]
                rows = itertools.zip_longest(*map(self.values, parts))
                return [dict(zip(keys, row, strict=True)) for row in rows]
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                for part in node.generators:
                    self.bind(part.target, self.items(part.iter))
                tests = [test for part in node.generators for test in part.ifs]
                for test in tests:
                    self.values(test)
                with self.narrowed(tests):
                    if isinstance(node, ast.DictComp):
                        return [dict(enumerate(self.values(node.value)))]
                    return [self.values(node.elt)]
            case ast.Compare(left=left, ops=ops, comparators=others):
                for part in (left, *others):
                    if isinstance(part, ast.Attribute) and part.attr == "dtype":
                        self.values(part.value)
                    elif all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops):
                        self.values(part)
                    else:
                        self.use(part)
            case ast.Lambda():
                self.note(self.call_nested(node, [], {}))
                return [_Nested(self, node)]
            case ast.Call():
                return self.call(node)
            case _:
                self.visit(node)
        return []

    def attribute(self, owner: Any, name: str) -> list:
        """owner.name, without running the model's code."""
        if isinstance(owner, nn.Parameter):
            if name not in _HARMLESS and not (self.search.values_only and name in _DESCRIBING):
                self.note(owner)
        elif isinstance(owner, nn.Module):
            for place in (owner._modules, owner._parameters, owner._buffers, vars(owner)):
                if name in place:
                    return [place[name]]
            found = inspect.getattr_static(type(owner), name, _ABSENT)
            if _is_property(owner, name):
                return self.follow(found, [], {}, owner) or []
            if isinstance(found, (staticmethod, classmethod)):
                return [found.__func__]
            if callable(found):
                return [types.MethodType(found, owner)]
            return [found] if isinstance(found, _SETTINGS) else []
        elif isinstance(owner, (types.ModuleType, type)):
            return [vars(owner)[name]] if name in vars(owner) else []
        elif type(owner).__name__.endswith("Config") and not name.startswith("_"):
            with contextlib.suppress(Exception):  # a config's own code
                return [getattr(owner, name)]
        return []

    def selected(self, owners: list, key: Any) -> list:
        """owner[key] of each owner, or all that is in it if the key is not known (None)."""
        found = []
        for owner in owners:
            self.note([owner] if isinstance(owner, nn.Parameter) else None)
            by_name = isinstance(owner, nn.Module) and isinstance(key, str)
            inside = owner._modules if by_name else owner
            try:
                found.append((inside if isinstance(inside, dict) else items_of(inside))[key])
            except (KeyError, IndexError, TypeError):
                found += items_of(owner)
        return found

    # calls

    def call(self, node: ast.Call) -> list:
        """What a call returns. Follows it if it is of the model's own code."""
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", None))
        if isinstance(function, ast.Attribute):
            owners = self.values(function.value)
            called = [v for owner in owners for v in self.attribute(owner, name)]
        else:
            owners, called = [], self.values(function)
        # next(self.parameters()) counts in any code: new models ask that weight for its dtype.
        runs, self.runs = self.runs, self.runs or name == "next"
        given = [self.values(argument) for argument in node.args]
        self.runs = runs
        named = {k.arg: self.values(k.value) for k in node.keywords if k.arg is not None}
        inside = [[item for v in values for item in items_of(v)] for values in given]
        if name in _LISTING and (listing := [o for o in owners if _is_listed(o, name)]):
            key = _literal(node.args[0]) if node.args else None
            return [v for owner in listing for v in self.listed(owner, name, key)]
        if name in _ASKING:
            return []
        if name == "getattr" and len(given) > 1:
            if isinstance(name := _literal(node.args[1]), str):
                found = [v for owner in given[0] for v in self.attribute(owner, name)]
                return found + [v for values in given[2:] for v in values]
            return inside[0]  # the name is computed, so it may be any child
        if name == "next" and given:
            if isinstance(node.args[0], ast.Call):  # a new iterator: next() returns its first item
                return [item for value in given[0] for item in items_of(value)[:1]]
            return given[0] + inside[0]
        returned = self.call_handed(name, owners, given, named)
        if name in _PASSING:
            items = [item for part in inside for item in part]
            if name in ("dict", "OrderedDict"):
                with contextlib.suppress(TypeError, ValueError):
                    return [dict(items)]
            if name == "enumerate":
                return [[(None, item) for item in items]]
            return [list(itertools.zip_longest(*inside)) if name == "zip" else items]
        followed = [r for c in called if (r := self.follow(c, given, named)) is not None]
        if not followed:
            for values in (*given, *named.values()):
                self.note(values)
        return [v for values in followed for v in values] + ([returned] if returned else [])

    def listed(self, owner: Any, name: str, key: Any) -> list:
        """The result of a method of torch that lists what is in a module, or of a dict's."""
        if name in _ALL and not self.runs:
            return []
        if name == "state_dict":
            return [dict(owner.named_parameters())]
        named = {"get_parameter": "named_parameters", "get_submodule": "named_modules"}.get(name)
        if named or name == "get":
            return self.selected([dict(getattr(owner, named)()) if named else owner], key)
        return [list(getattr(owner, name)())]

    def call_handed(self, name: str, owners: list, given: list, named: dict) -> list:
        """The results of nested functions that a call is given, as f in `map(f, layers)`. Each of
        their arguments may be any layer that the call is given."""
        handed = [v for values in given for o in values for v in (o, *items_of(o))]
        if name == "apply" and self.runs:
            handed += [m for o in owners if isinstance(o, nn.Module) for m in o.modules()]
        layers = [v for v in handed if isinstance(v, (nn.Module, nn.Parameter))]
        returned = []
        for function in [v for values in (*given, *named.values()) for v in values]:
            if isinstance(function, _Nested):
                every = [layers] * len(_arguments(function.node))
                returned += function.reader.call_nested(function.node, every, {})
        return returned

    def call_nested(self, node: ast.FunctionDef | ast.Lambda, given: list, named: dict) -> list:
        if node in self.active:
            return []
        names = _arguments(node)
        for name, values in (*zip(names, itertools.repeat([])), *zip(names, given), *named.items()):
            self.bind(ast.Name(name), values)
        outer, self.returned = self.returned, []
        self.active.add(node)
        if isinstance(node, ast.Lambda):
            self.returned += self.values(node.body)
        else:
            self.block(node.body)
        self.active.discard(node)
        returned, self.returned = self.returned, outer
        return returned

    def follow(self, called: Any, given: list, named: dict, owner: Any = None) -> list | None:
        """The modules, weights and lists that a call returns; None if it is not followed. Functions
        that read layers they are given are followed, and short methods."""
        if isinstance(called, _Nested):
            return called.reader.call_nested(called.node, given, named)
        if type(called) is operator.attrgetter:
            found = [v for values in given[:1] for v in values]
            for part in called.__reduce__()[1][0].split("."):
                found = [v for o in found for v in self.attribute(o, part)]
            return found
        if called is operator.attrgetter:
            paths = [path for path in itertools.chain(*given) if isinstance(path, str)]
            return [operator.attrgetter(path) for path in paths]
        if isinstance(called, nn.Module):
            owner, called = called, type(called).forward
        elif isinstance(called, types.MethodType):
            owner = called.__self__
        handed = [v for values in (*given, *named.values()) for v in values]
        handed += [item for value in handed for item in items_of(value)]
        is_given = any(isinstance(v, (nn.Module, nn.Parameter)) for v in handed)
        module, found = self.module if owner is None else owner, None
        for function in functions_of(called) if self.depth else ():
            names = names_in(function.__code__)
            reads = is_given and not _READING.isdisjoint(names)
            # Following a method that computes, to see which layer it returns, would take too long.
            picks = isinstance(owner, nn.Module) and function.__name__ != "forward"
            if TORCH.match(function.__module__ or "") or not (
                reads or (picks and len(names) <= _SHORT)
            ):
                continue
            if (node := source_of(function)) is not None:
                known = {} if owner is None else {"self": [owner]}
                known |= zip(_arguments(node), given if owner is None else [[owner], *given])
                # If the function is given a layer, the caller is named as the reader.
                own = f"{type(owner).__name__}.{function.__name__}"
                reader = Reader(
                    self.search, function, module, known | named,
                    self.method if is_given else own, self.runs, self.depth - 1,
                )  # fmt: skip
                found = (found or []) + reader.run()
        return found


def items_of(value: Any) -> list:
    """What is in a module, dict, list or tuple."""
    if isinstance(value, nn.Module):
        value = value._modules
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


def _literal(node: ast.AST) -> Any:
    """The value of a literal or of a slice of literals; None, or the whole slice, if unknown."""
    try:
        if isinstance(node, ast.Slice):
            bounds = (node.lower, node.upper, node.step)
            return slice(*(None if bound is None else ast.literal_eval(bound) for bound in bounds))
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return slice(None) if isinstance(node, ast.Slice) else None


def _is_property(owner: Any, name: str) -> bool:
    found = inspect.getattr_static(type(owner), name, None)
    return isinstance(owner, nn.Module) and isinstance(found, (property, functools.cached_property))


def _is_listed(owner: Any, name: str) -> bool:
    """Whether owner.name is a method of dicts, or torch's of modules."""
    method = inspect.getattr_static(type(owner), name, None)
    is_torchs = (getattr(method, "__module__", None) or "").startswith("torch.nn.modules.")
    return isinstance(owner, dict) or (isinstance(owner, nn.Module) and is_torchs)


def _arguments(node: ast.FunctionDef | ast.Lambda) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
