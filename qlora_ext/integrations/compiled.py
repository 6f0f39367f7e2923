"""Makes compiled models check their packed bytes, because compiled graphs leave that check out.

In eager mode a forward pass checks whether its layer's bytes were changed (nn/packed.py). A graph
does not contain the check. So a model from `torch.compile(model)` or after `model.compile()` checks
all its packed layers before it calls the graph. A compiled function that calls a model does not.
"""

from __future__ import annotations

import functools
import weakref

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, skip_code
from torch.compiler import disable, is_compiling
from torch.nn.modules.module import register_module_module_registration_hook

from ..nn.packed import _Packed4bit

_Layers = list[weakref.ref[_Packed4bit]]
# For each compiled model: the value of _placed when its packed layers were listed, and that list.
# It is not stored on the models, because their copies have other layers.
_listed: weakref.WeakKeyDictionary[nn.Module, tuple[int, _Layers]] = weakref.WeakKeyDictionary()
_placed = 0  # how many modules were put into another one since the first list, in this process


def _count(parent: nn.Module, name: str, module: nn.Module) -> None:
    global _placed
    if not is_compiling():
        _placed += 1


def _layers_of(model: nn.Module) -> _Layers:
    """The packed layers of a model. It lists them again if any module was put into another one."""
    at, layers = _listed.get(model, (-1, []))
    if at != _placed:
        if not _listed:  # only processes that compile a model count
            _start_counting()
        at = _placed
        layers = [weakref.ref(m) for m in model.modules() if isinstance(m, _Packed4bit)]
        _listed[model] = at, layers
    return layers


@functools.cache
def _start_counting() -> None:
    register_module_module_registration_hook(_count)


@disable  # dynamo skips a module of torch's around the model, but traces what that calls
def _check_layers(model: nn.Module) -> None:
    """Raises RuntimeError if the bytes of a packed layer of the model were changed."""
    for reference in _layers_of(model):
        layer = reference()
        weight = None if layer is None else layer._parameters.get("weight")
        # Skip weights that FSDP2 has sharded or that a hook will load: their bytes are not here.
        if type(weight) is nn.Parameter and not weight.is_meta:
            _Packed4bit._w4(layer, False)  # Stack4bit's own would fetch experts from host memory


def _checking_call(call):
    @functools.wraps(call)
    def checking(self: OptimizedModule, *args, **kwargs):
        if not is_compiling():
            _check_layers(self)
        return call(self, *args, **kwargs)

    skip_code(checking.__code__)  # torch does the same with the method itself
    checking.checks_layers = True
    return checking


def _checking_compile(compile):
    @functools.wraps(compile)
    def checking(self: nn.Module, *args, **kwargs) -> None:
        compile(self, *args, **kwargs)
        compiled, model = self._compiled_call_impl, weakref.ref(self)
        if compiled is None:
            return

        @functools.wraps(compiled)
        def call(*args, **kwargs):
            if not is_compiling():
                _check_layers(model())
            return compiled(*args, **kwargs)

        skip_code(call.__code__)
        self._compiled_call_impl = call

    checking.checks_layers = True
    return checking


def attach() -> None:
    """Makes compiled models check their bytes. Idempotent."""
    if not hasattr(OptimizedModule.__call__, "checks_layers"):
        OptimizedModule.__call__ = _checking_call(OptimizedModule.__call__)
    if not hasattr(nn.Module.compile, "checks_layers"):
        nn.Module.compile = _checking_compile(nn.Module.compile)


attach()
