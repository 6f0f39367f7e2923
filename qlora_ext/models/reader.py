"""Follows the expressions of one method on one module, to find the layers whose weights it reads.

This file is longer than others: it is one interpreter of Python syntax, and its parts call each
other.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import operator
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from .method_source import (
    _ALL_WEIGHTS,
    _HARMLESS,
    _PACKED,
    _argument_names,
    _binding_nodes,
    _bindings,
    _first_argument,
    _first_of,
    _functions,
    _getattr_name,
    _is_call_of_name,
    _is_constant,
    _is_of,
    _is_static,
    _may_return_layers,
    _names,
    _object_named,
    _parents,
    _reads_an_argument,
    _returns,
    _source,
)

_ALL_MODULES = frozenset(("modules", "named_modules"))
# Calls that return what is in their arguments.
_PASSING = frozenset(("list", "tuple", "iter", "reversed", "sorted", "set", "dict", "enumerate"))
_PASSING |= frozenset(("zip", "chain", "islice", "filter", "OrderedDict"))
# Calls that take a module's parameters and compute with the module's own forward.
_RUNS_FORWARD = frozenset(("functional_call", "checkpoint"))
_DESCRIBING = frozenset(("dtype", "shape", "size", "ndim", "dim", "numel", "element_size"))
# Attributes that change while a model is in use.
_CHANGES = frozenset(("training", "gradient_checkpointing"))
_DEPTH = 3  # how many nested calls to follow that pass a layer on


_UNKNOWN = object()


class _Weight(NamedTuple):
    """A parameter of a layer, as parameters() lists it."""

    layer: nn.Module
    key: str


class _Reader:
    """Walks one function with `self` bound to a module, and notes which layers it reads."""

    def __init__(
        self,
        module,
        function,
        found,
        marked=(),
        arguments=None,
        method=None,
        depth=_DEPTH,
        runs=True,
        bound=True,
        values_only=False,
    ):
        self.module = module
        self.function = function
        self.found = found
        self.marked = marked  # configs that packing marks as quantized
        self.depth = depth
        self.method = method or f"{type(module).__name__}.{function.__name__}"
        self.values_only = values_only  # see read_past_forward
        self.runs = runs  # whether a forward calls the function, judged by names
        self.nested: dict[str, ast.FunctionDef | ast.Lambda] = {}
        # local name -> the objects it may stand for
        self.locals: dict[str, list] = {"self": [module], **(arguments or {})}
        first = _first_argument(function) if bound else None
        if first is not None and not _is_static(module, function):
            self.locals.setdefault(first, [module])

    def run(self) -> None:
        node = self.bind()
        if node is None:
            self._by_names()
            return
        self.parents = _parents(node)
        self._block(node.body)

    def bind(self) -> ast.FunctionDef | None:
        """Finds the objects that local names may stand for. Returns the function's syntax tree."""
        node = _source(self.function)
        if node is not None:
            binding = _binding_nodes(node)
            for child in binding:
                if isinstance(child, ast.FunctionDef) and child is not node:
                    self.nested[child.name] = child
                elif isinstance(child, ast.Assign) and isinstance(child.value, ast.Lambda):
                    names = [t.id for t in child.targets if isinstance(t, ast.Name)]
                    self.nested.update(dict.fromkeys(names, child.value))
            for _ in range(2):  # in a loop, a name may be bound from one that is bound further down
                for child in binding:
                    self._bind(child)
        return node

    def _by_names(self) -> None:
        """Used if there is no source (a class from an interactive session): notes the layers that
        the method names, if it also names `weight`."""
        names = set() if self.values_only else _names(self.function.__code__)
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
        if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._loop(node.target, node.iter)
        elif isinstance(node, ast.Call):
            self._bind_nested(node)
        else:
            for target, value in _bindings(node):
                self._assign(target, value)

    def _bind_nested(self, node: ast.Call) -> None:
        """Binds the arguments of nested functions: `f(layer)`, `map(f, self.layers)`."""
        called = self._nested(node.func)
        if called is not None:
            for argument, value in zip(_argument_names(called), node.args, strict=False):
                self._add(argument, self.values(value))
        handed = [f for f in map(self._nested, node.args) if f is not None]
        handed += [f for f in (self._nested(k.value) for k in node.keywords) if f is not None]
        if not handed:
            return
        given = [v for argument in node.args for v in self.values(argument)]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "apply":
            owners = self.values(node.func.value)
            given += [m for o in owners if isinstance(o, nn.Module) for m in self._all(o)]
        given += [c for v in given for c in _children(v)]
        for function in handed:
            for argument in _argument_names(function):
                self._add(argument, [v for v in given if isinstance(v, (nn.Module, _Weight))])

    def _nested(self, node: ast.AST) -> ast.FunctionDef | ast.Lambda | None:
        if isinstance(node, ast.Lambda):
            return node
        return self.nested.get(node.id) if isinstance(node, ast.Name) else None

    def _assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self._add(target.id, self.values(value))
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, (ast.Tuple, ast.List)) and len(target.elts) == len(value.elts):
                for one, other in zip(target.elts, value.elts, strict=True):
                    self._assign(one, other)
                return
            inside = [c for v in self.values(value) for c in _children(v)]
            self._spread(target, inside)

    def _spread(self, target: ast.AST, values: list) -> None:
        """Each name in target may be each of the values; a starred one is a list of them."""
        if isinstance(target, ast.Name):
            self._add(target.id, values)
        elif isinstance(target, ast.Starred) and isinstance(target.value, ast.Name):
            self._add(target.value.id, [values] if values else [])
        elif isinstance(target, (ast.Tuple, ast.List)):
            for one in target.elts:
                self._spread(one, values)

    def _add(self, name: str, values: list) -> None:
        known = self.locals.setdefault(name, [])
        known += [v for v in values if not any(v is k or _equal(v, k) for k in known)]

    def _loop(self, target: ast.AST, iterated: ast.AST) -> None:
        name = iterated.func.id if _is_call_of_name(iterated) else None
        if name == "zip" and isinstance(target, ast.Tuple):
            for one, other in zip(target.elts, iterated.args, strict=False):
                self._loop(one, other)
        elif name == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            self._loop(target.elts[1], iterated.args[0])
        elif name in _PASSING and len(iterated.args) == 1:
            self._loop(target, iterated.args[0])
        else:
            if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Attribute):
                pairs = iterated.func.attr == "items" or iterated.func.attr.startswith("named_")
                target = target.elts[-1] if pairs and isinstance(target, ast.Tuple) else target
            self._spread(target, [c for v in self.values(iterated) for c in _children(v)])

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
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):  # of lists
            both = self.values(node.left) + self.values(node.right)
            return [v for v in both if _children(v)]
        if isinstance(node, (ast.NamedExpr, ast.Starred)):
            return self.values(node.value)
        if isinstance(node, (ast.Tuple, ast.List)):
            return _listed(v for part in node.elts for v in self.values(part))
        if isinstance(node, ast.Dict):
            each = {
                key.value: values[0]
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and len(values := self.values(value)) == 1
            }
            if len(each) == len(node.keys):
                return [each]
            return _listed(v for part in node.values for v in self.values(part))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            with self._narrowed([t for g in node.generators for t in g.ifs]):
                return _listed(self.values(node.elt))
        if isinstance(node, ast.Call):
            name = _getattr_name(node)
            if isinstance(name, str):
                return self._attributes(node.args[0], name)
            if _is_call_of_name(node) and node.func.id == "getattr" and node.args:
                # The name is computed, so it may be any of the children.
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
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if _is_call_of_name(node) else name
            if name == "next" and node.args:
                values = self.values(node.args[0])
                return values + [c for v in values for c in _children(v)]
            if name in _PASSING:
                return [v for a in node.args for v in self.values(a)]
            if isinstance(node.func, ast.Attribute):
                return self._from_method(node, name)
        return []

    def _from_method(self, node: ast.Call, name: str) -> list:
        """What a method call returns: layers, lists of layers, weights."""
        owners = self.values(node.func.value)
        if name in ("children", "named_children"):
            return [_children(o) for o in owners]
        if name in ("values", "items"):
            return [_children(o) for o in owners]
        modules = [o for o in owners if isinstance(o, nn.Module)]
        if name == "get" and owners and _is_constant(node.args):
            return self._selected(owners, node.args[0].value)
        if name in _ALL_MODULES:
            return [self._all(o) for o in modules]
        if name in _ALL_WEIGHTS:
            found = [_Weight(m, k) for o in modules for m in self._all(o) for k in m._parameters]
            if name != "get_parameter":
                return [found]
            path = node.args[0].value if _is_constant(node.args) else None
            paths = {id(m): n for o in modules for n, m in o.named_modules()}
            whole = [".".join(filter(None, (paths[id(w.layer)], w.key))) for w in found]
            return [w for w, n in zip(found, whole, strict=True) if path in (None, n)]
        return self._returned(modules, name)

    def _all(self, module: nn.Module) -> list[nn.Module]:
        """A module and all modules below it; nothing if no forward calls this function."""
        return list(module.modules()) if self.runs else []

    def _returned(self, owners: list[nn.Module], name: str) -> list:
        """The layers that methods and properties of the model's own code return."""
        found = []
        if self.depth == 0 or name.startswith("__") or name == "forward":
            return found
        for owner in owners:
            if name in owner._modules or name in owner.__dict__:
                continue
            for function in _functions(inspect.getattr_static(type(owner), name, None)):
                node = _source(function)
                if node is None or not _may_return_layers(node):
                    continue
                inner = _Reader(
                    owner, function, {}, self.marked, None, self.method, self.depth - 1, self.runs
                )
                inner.bind()
                for value in _returns(node):
                    found += [
                        v
                        for v in inner.values(value)
                        if isinstance(v, (nn.Module, _Weight)) or _children(v)
                    ]
        return found

    def _attributes(self, owner: ast.AST, name: str) -> list:
        owners = self.values(owner)
        found = [_attribute(o, name) for o in owners]
        found = [value for value in found if value is not _UNKNOWN]
        computed = [
            o
            for o in owners
            if isinstance(o, nn.Module)
            and isinstance(
                inspect.getattr_static(type(o), name, None), (property, functools.cached_property)
            )
        ]
        return found + (self._returned(computed, name) if computed else [])

    def _items(self, node: ast.Subscript) -> list:
        owners = self.values(node.value)
        if isinstance(node.slice, ast.Slice):
            try:
                bounds = (node.slice.lower, node.slice.upper, node.slice.step)
                part = slice(*(None if b is None else ast.literal_eval(b) for b in bounds))
            except ValueError:
                part = slice(None)
            return [children[part] for o in owners if (children := _children(o))]
        try:
            key = ast.literal_eval(node.slice)
        except ValueError:
            key = None
        return self._selected(owners, key)

    def _selected(self, owners: list, key: Any) -> list:
        """owner[key] of each owner, or everything in owner if the key is not known."""
        found = []
        for owner in owners:
            children = _children(owner)
            weights = [w for w in (*children, owner) if isinstance(w, _Weight)]
            if weights:  # list(layer.parameters())[0], layer.state_dict()["weight"]
                named = isinstance(key, str)
                found += [w for w in weights if not named or w.key == key.rpartition(".")[2]]
                continue
            try:
                found += [owner[key]] if children and key is not None else children
            except (KeyError, IndexError, TypeError):
                found += children
        return found

    def truth(self, node: ast.AST) -> bool | None:
        """Whether a condition holds; None if that is not known before the model runs."""
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
        """Whether node is like hasattr(self.config, "_is_quantized"), for a marked config."""
        return (
            _is_call_of_name(node)
            and node.func.id in ("hasattr", "getattr")
            and len(node.args) >= 2
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value == "_is_quantized"
            and any(v is config for v in self.values(node.args[0]) for config in self.marked)
        )

    def _setting(self, node: ast.AST) -> Any:
        """The value of a constant or a setting of the model, or _UNKNOWN."""
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
        with contextlib.ExitStack() as rest:
            for statement in statements:
                if not isinstance(statement, ast.If):
                    self._visit(statement)
                    continue
                truth = self.truth(statement.test)
                self._visit(statement.test)
                if truth is not False:
                    with self._narrowed([statement.test]):
                        self._block(statement.body)
                if truth is not True:
                    with self._narrowed([statement.test], False):
                        self._block(statement.orelse)
                taken = {True: statement.body, False: statement.orelse}.get(truth)
                if taken and isinstance(taken[-1], (ast.Return, ast.Raise)):
                    return  # what follows does not run
                if isinstance(statement.body[-1], (ast.Continue, ast.Return, ast.Raise)):
                    rest.enter_context(self._narrowed([statement.test], False))

    @contextlib.contextmanager
    def _narrowed(self, tests: list[ast.AST], truth: bool = True) -> Iterator[None]:
        """A context in which names stand for fewer objects, because the tests hold (or do not).
        After `isinstance(m, nn.LayerNorm)` m is not a linear layer. After a test of requires_grad
        the weight is not packed."""
        before = dict(self.locals)
        for test in tests:
            self._narrow(test, truth)
        try:
            yield
        finally:
            for name, values in before.items():
                self.locals[name] = values

    def _narrow(self, test: ast.AST, truth: bool) -> None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self._narrow(test.operand, not truth)
        elif isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) is truth:
            for part in test.values:
                self._narrow(part, truth)
        elif isinstance(test, ast.Attribute) and test.attr == "requires_grad" and truth:
            if isinstance(test.value, ast.Name) and test.value.id in self.locals:
                values = self.locals[test.value.id]
                self.locals[test.value.id] = [v for v in values if not isinstance(v, _Weight)]
        elif (
            _is_call_of_name(test)
            and test.func.id == "isinstance"
            and len(test.args) == 2
            and isinstance(test.args[0], ast.Name)
            and test.args[0].id in self.locals
        ):
            kinds, name = self._classes(test.args[1]), test.args[0].id
            if kinds:
                values = self.locals[name]
                self.locals[name] = [v for v in values if isinstance(v, kinds) is truth]

    def _classes(self, node: ast.AST) -> tuple[type, ...]:
        """The classes in isinstance's second argument; () if one of them is not known."""
        if isinstance(node, ast.Tuple):
            parts = [self._classes(part) for part in node.elts]
            return tuple(c for part in parts for c in part) if all(parts) else ()
        named = self._object(node)
        return (named,) if isinstance(named, type) else ()

    def _object(self, node: ast.AST) -> Any:
        """The function, class or module that `helpers.multiply` names, or None."""
        if isinstance(node, ast.Name):
            return None if node.id in self.locals else _object_named(self.function, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._object(node.value)
            if isinstance(owner, (types.ModuleType, type)):
                return vars(owner).get(node.attr)
        return None

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
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            for generator in node.generators:
                self._visit(generator.iter)
            with self._narrowed([t for g in node.generators for t in g.ifs]):
                for part in ("elt", "key", "value"):
                    if (inside := getattr(node, part, None)) is not None:
                        self._visit(inside)
            return
        if isinstance(node, (ast.Name, ast.Subscript, ast.Call)):
            self._use(node)
        if isinstance(node, ast.Attribute) and node.attr in _PACKED:
            self._read(node, node.value, node.attr)
        elif isinstance(node, ast.Call):
            if (name := _getattr_name(node)) in _PACKED:
                self._read(node, node.args[0], name)
            self._read_by_getter(node)
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

    def _read_by_getter(self, node: ast.Call) -> None:
        """Notes operator.attrgetter("proj.weight")(self), also if the getter has a name."""
        path, inner = "", node.func
        if isinstance(inner, ast.Call) and _is_constant(inner.args):
            called = getattr(inner.func, "attr", getattr(inner.func, "id", None))
            path = inner.args[0].value if called == "attrgetter" else ""
        elif type(getter := self._object(inner)) is operator.attrgetter:
            path = getter.__reduce__()[1][0]
        *parts, key = path.split(".")
        if key in _PACKED and node.args and not self._is_harmless(node):
            for owner in self.values(node.args[0]):
                for part in parts:
                    owner = _attribute(owner, part)
                self._note(owner, key)

    def _use(self, node: ast.AST) -> None:
        """Notes the weights from parameters() that an expression uses for something."""
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            return
        if isinstance(node, ast.Call) and _first_of(node) is not None:
            return  # _read_first notes it
        parent = self.parents.get(node)
        if isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node:
            return
        if isinstance(parent, (ast.Assign, ast.NamedExpr, ast.AnnAssign)) and not isinstance(
            getattr(parent, "target", None), ast.Attribute
        ):
            return
        if isinstance(parent, ast.Subscript) and parent.value is node:
            return
        if isinstance(parent, ast.Attribute) and parent.attr in ("items", "values", "keys", "get"):
            return
        if isinstance(parent, ast.Call):
            called = getattr(parent.func, "attr", getattr(parent.func, "id", None))
            if called in _PASSING | _RUNS_FORWARD | {"next", "len"}:
                return
        if self._is_harmless(node):
            return
        for value in self.values(node):
            for weight in (value, *_children(value)):
                if isinstance(weight, _Weight):
                    self._note(weight.layer, weight.key)

    def _read_first(self, node: ast.Call) -> None:
        """Notes next(x.parameters()), the first parameter, which may be a layer's weight."""
        owners = _first_of(node)
        if owners is None or self._is_harmless(node):
            return
        for owner in self.values(owners):
            if isinstance(owner, nn.Module):
                for part in owner.modules():
                    keys = [key for key, p in part._parameters.items() if p is not None]
                    if keys:
                        self._note(part, keys[0])
                        break

    def _is_harmless(self, node: ast.AST) -> bool:
        """Whether the code only uses properties of the weight that packing does not change."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            if parent.attr in _HARMLESS or (self.values_only and parent.attr in _DESCRIBING):
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
        """Follows a call that passes a layer to a function of the model's own code."""
        if self.depth == 0:
            return
        given = [self.values(argument) for argument in node.args]
        named = {k.arg: self.values(k.value) for k in node.keywords if k.arg is not None}
        given = [[v for v in values if isinstance(v, nn.Module)] for values in given]
        named = {k: [v for v in values if isinstance(v, nn.Module)] for k, values in named.items()}
        if not any(given) and not any(named.values()):
            return
        for module, function, bound in self._called(node.func):
            if not _reads_an_argument(function):
                continue
            source = _source(function)
            if source is None:
                continue
            names = [a.arg for a in (*source.args.posonlyargs, *source.args.args)]
            if bound or names[:1] == ["self"]:
                names = names[1:]
            arguments = {k: v for k, v in zip(names, given, strict=False) if v}
            arguments |= {k: v for k, v in named.items() if v}
            _Reader(
                module, function, self.found, self.marked, arguments, self.method,
                self.depth - 1, self.runs, bound, self.values_only,
            ).run()  # fmt: skip

    def _called(self, node: ast.AST) -> list[tuple[nn.Module, types.FunctionType, bool]]:
        """(module, function, whether the function's first argument is that module) of a call."""
        called = self._object(node)
        if called is None and isinstance(node, ast.Name) and node.id not in self.locals:
            called = self._imported(node.id)
        if called is not None:
            return [(self.module, f, False) for f in _functions(called)]
        found = []
        for module in self.values(node):
            if isinstance(module, nn.Module):
                found += [(module, f, True) for f in _functions(type(module).forward)]
        if isinstance(node, ast.Attribute):
            for owner in self.values(node.value):
                if isinstance(owner, nn.Module) and node.attr not in owner._modules:
                    method = inspect.getattr_static(type(owner), node.attr, None)
                    bound = not isinstance(method, staticmethod)
                    found += [(owner, f, bound) for f in _functions(method)]
        return found

    def _imported(self, name: str) -> Any:
        """What the function imports under that name, if the module was imported before."""
        for node in ast.walk(_source(self.function)):
            if isinstance(node, ast.ImportFrom):
                package = self.function.__globals__.get("__package__") or ""
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                path = [*(above if node.level else []), *([node.module] if node.module else [])]
                module = sys.modules.get(".".join(path))
                for alias in node.names:
                    if module is not None and (alias.asname or alias.name) == name:
                        return vars(module).get(alias.name)
        return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same weight, or lists of the same layers."""
    if isinstance(one, _Weight) and isinstance(other, _Weight):
        return one.layer is other.layer and one.key == other.key
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(a is b or _equal(a, b) for a, b in zip(one, other, strict=True))
    return False


def _listed(values: Iterable) -> list:
    """One list of the layers and weights among the values, or nothing."""
    layers = [v for v in values if isinstance(v, (nn.Module, _Weight))]
    return [layers] if layers else []


def _children(owner: Any) -> list:
    if isinstance(owner, nn.Module):
        return [child for child in owner._modules.values() if child is not None]
    if isinstance(owner, dict):
        owner = list(owner.values())
    if isinstance(owner, (list, tuple)):
        if isinstance(owner, _Weight):
            return []
        return [item for item in owner if isinstance(item, (nn.Module, _Weight))]
    return []


def _attribute(owner: Any, name: str) -> Any:
    """owner.name without running a property's code; _UNKNOWN for tensors and other values."""
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
