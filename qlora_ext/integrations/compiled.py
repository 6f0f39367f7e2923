"""torch.compile over models with packed weights: the look at the bytes that graphs leave out.

A forward pass looks whether its layer's bytes were changed (nn.py), and a graph does not contain
that. So what `torch.compile(model)` and `model.compile()` give looks at every packed layer of the
model before it calls the graph. A compiled function that calls a model does not.
"""

from __future__ import annotations

import functools
import weakref

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, skip_code
from torch.compiler import disable, is_compiling

from ..nn import _Packed4bit

_LAYERS = "_qlora_ext_packed_layers"


def _packed_layers(model: nn.Module) -> list[weakref.ref[_Packed4bit]]:
    return [weakref.ref(m) for m in model.modules() if isinstance(m, _Packed4bit)]


@disable  # a module of torch's own around the model leaves the tracing to what it calls
def _look(layers: list[weakref.ref[_Packed4bit]]) -> None:
    """RuntimeError if the bytes of one of them were changed."""
    for reference in layers:
        layer = reference()
        weight = None if layer is None else layer._parameters.get("weight")
        # Not what FSDP2 has sharded or a hook will load: those bytes are not there yet.
        if type(weight) is nn.Parameter and not weight.is_meta:
            layer._w4(False)


def _looking_call(call):
    @functools.wraps(call)
    def looking(self: OptimizedModule, *args, **kwargs):
        if not is_compiling():
            layers = self.__dict__.get(_LAYERS)
            if layers is None:
                layers = self.__dict__[_LAYERS] = _packed_layers(self)
            _look(layers)
        return call(self, *args, **kwargs)

    skip_code(looking.__code__)  # as torch does with the method itself
    looking.looks = True
    return looking


def _looking_compile(compile):
    @functools.wraps(compile)
    def looking(self: nn.Module, *args, **kwargs) -> None:
        compile(self, *args, **kwargs)
        compiled, layers = self._compiled_call_impl, _packed_layers(self)
        if not layers or compiled is None:
            return

        @functools.wraps(compiled)
        def call(*args, **kwargs):
            if not is_compiling():
                _look(layers)
            return compiled(*args, **kwargs)

        skip_code(call.__code__)
        self._compiled_call_impl = call

    looking.looks = True
    return looking


def attach() -> None:
    """Makes compiled models look. Idempotent."""
    if not hasattr(OptimizedModule.__call__, "looks"):
        OptimizedModule.__call__ = _looking_call(OptimizedModule.__call__)
    if not hasattr(nn.Module.compile, "looks"):
        nn.Module.compile = _looking_compile(nn.Module.compile)


attach()
