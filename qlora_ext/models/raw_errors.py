"""Explains torch's errors from code outside a packed layer that computed with the layer's bytes.

reads.py finds such code before a model is packed, but misses some, such as a layer looked up by a
computed name. Then torch raises an error about shapes or dtypes that names no layer. A forward hook
adds to such an error which packed layers are involved, and how to keep them dense. The error's type
and own text stay. Other errors are not changed.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from ..nn.experts import parameter_names
from .method_source import forget_sources
from .reads import read_in_frame
from .walk import is_packed

_TYPES = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)
_OF_BYTES = re.compile(r"\b(Byte(Tensor)?|uint8(_t)?|unsigned char)\b")
# A list of accepted dtypes in an error ("Long or Byte") does not say which dtype was given.
_TYPE = r"(?:torch\.)?(?:[Bb]yte|[Cc]har|[Ss]hort|[Ii]nt|[Ll]ong|[Bb]ool|[Hh]alf|[Ff]loat|[Dd]ouble"
_TYPE += r"|BFloat16|u?int\d+(?:_t)?|b?float\d+|unsigned char)(?:Tensor)?"
_ACCEPTED = re.compile(rf"\b{_TYPE}(?:(?:,? or |, |/){_TYPE})+\b")
_GOT = re.compile(r"\b([Gg]ot|found)\b")
_DTYPES = re.compile(r"\b(u?int|b?float|complex|BFloat|bfloat)\d+")
_OF_MASKS = re.compile(r"\b(boolean )?masks?\b|masked_")  # old masks are bytes
_OF_SHAPES = re.compile(r"shape|size|dim|type|broadcast|mat1|mat2")
_MARK = "\nqlora_ext: "
_MOST = 8  # the most layers that a message names


def explain_errors(model: nn.Module) -> None:
    """Makes torch's errors about packed weights in forward passes say what to do. Idempotent.

    The hook goes on the model and on the transformers models in it, which may be called alone (an
    encoder). Each hook takes 1 to 2 us per call.
    """
    for module in model.modules():
        called_alone = module is model or hasattr(type(module), "base_model_prefix")
        if called_alone and any(map(is_packed, module.modules())) and not is_packed(module):
            watch(module)


def watch(module: nn.Module) -> None:
    """Puts the hook on one module, unless it is there already."""
    if add_explanation not in module._forward_hooks.values():
        module.register_forward_hook(add_explanation, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Removes the hooks from a model and all its modules, once nothing in it is packed any more."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if hook is add_explanation]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def add_explanation(module: nn.Module, args: Any, result: Any) -> None:
    """The hook. torch also calls it after a forward that raised; then there is no result."""
    if result is not None or is_compiling():
        return
    error = sys.exc_info()[1]
    trace = getattr(error, "__traceback__", None)
    # If the call is inside someone's except block, the current error is not from this forward.
    if trace is None or trace.tb_frame is not sys._getframe(1):
        return
    if type(module).__module__.startswith("peft."):
        module = module.model
    text = error.args[0] if error.args and isinstance(error.args[0], str) else None
    if not isinstance(error, _TYPES) or isinstance(error, torch.OutOfMemoryError):
        return
    if text is None or _MARK in text:
        return
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    explanation = _Search(module, text, args).explanation(frames[::-1])
    forget_sources()
    if explanation:
        error.args = (f"{text}{_MARK}{explanation}", *error.args[1:])


def _is_own(name: str) -> bool:
    return name.partition(".")[0] == "qlora_ext"


class _Search:
    """Looks for the code at fault in the frames that an error went through."""

    def __init__(self, root: nn.Module, text: str, args: tuple):
        self.text = text
        self.args = args
        self.of_bytes = _tells_bytes(text)
        sizes = re.findall(r"\d+", _DTYPES.sub("", text))
        self.numbers = {int(size) for size in sizes if len(size) < 16}
        self.layers = {m: name for name, m in root.named_modules() if is_packed(m)}
        self.names = {m: name for name, m in root.named_modules()}
        # A stack of experts has no name in the unquantized model, but its holder has.
        self.stacks = parameter_names(root)
        self.tensors = {
            id(p): layer for layer in self.layers for p in layer._parameters.values()
            if p is not None and p.dtype is torch.uint8
        }  # fmt: skip

    def explanation(self, frames: list[types.FrameType]) -> str | None:
        """What to add to the error, or None. frames: deepest first."""
        if not self.layers:
            return None
        origin = next((n for n in map(_file, frames) if not n.startswith("torch.")), "")
        if _is_own(origin) and "x has dtype uint8" not in self.text:
            return None  # our own errors say what is wrong
        if any(t.dtype is torch.uint8 for t in _tensors(frames[0])):
            self.of_bytes |= _OF_SHAPES.search(self.text) is not None
        if self._was_given_bytes(frames):
            self.of_bytes = False
        likely = None
        for frame in frames:
            if _is_own(_file(frame)) or _file(frame) == "torch.nn.modules.module":
                continue
            module = _module_of(frame)
            if tied := self._tied(module):
                return tied
            if layers := self._read(frame, module):
                return self._advice(next(self._readers(frames, layers[0]), None), layers)
            if module is None:
                continue
            below = [part for part in module.modules() if part in self.layers]
            if below and likely is None and not isinstance(module, (nn.Sequential, nn.ModuleList)):
                likely = module, below
        return self._advice(*likely) if likely is not None and self.of_bytes else None

    def _was_given_bytes(self, frames: list[types.FrameType]) -> bool:
        """Whether the model's own input holds bytes, as images do."""
        outer = next(f for f in frames[::-1] if _file(f) != "torch.nn.modules.module")
        given = list(self.args)
        if outer is not frames[0]:  # frames[0] may hold parts of packed weights
            given += [t for t in _tensors(outer) if id(t) not in self.tensors]
        return any(isinstance(t, torch.Tensor) and t.dtype is torch.uint8 for t in given)

    def _read(self, frame: types.FrameType, module: nn.Module | None) -> list[nn.Module]:
        """The packed layers whose weights the frame's code reads, if the error is about them."""
        if not any(map(self._is_of, self.layers)):
            return []
        found = read_in_frame(frame, module, {key: [layer] for key, layer in self.tensors.items()})
        layers = [layer for layer in self.layers if id(layer) in found]
        return layers if any(map(self._is_of, layers)) else []

    def _is_of(self, layer: nn.Module) -> bool:
        """Whether the error is about bytes, or mentions a size that the layer's bytes have."""
        weight = layer._parameters.get("weight")
        if self.of_bytes or weight is None:
            return self.of_bytes
        numel = max(weight.numel(), 2)
        width = weight.shape[-1] if weight.shape[-1] > 1 else numel
        return any(n == width or (n >= numel and n % numel == 0) for n in self.numbers)

    def _readers(self, frames, layer: nn.Module) -> Iterator[nn.Module]:
        for frame in frames:
            module = _module_of(frame)
            if module in self.names and module is not layer and layer in set(module.modules()):
                yield module

    def _tied(self, module: nn.Module | None) -> str | None:
        """The message for a dense layer that was tied to a packed one after packing, else None."""
        if module is None or module in self.layers or not _OF_SHAPES.search(self.text):
            return None
        for parameter in module._parameters.values():
            if (layer := self.tensors.get(id(parameter))) is not None:
                mine, other = self._called(module), self.layers[layer]
                kind = "a packed embedding" if isinstance(layer, nn.Embedding) else "a packed layer"
                return (
                    f"{mine} was tied to {other}, {kind}, after packing (tie_weights, or an "
                    "assignment), so its weight is packed bytes. Tie them before packing, which "
                    "leaves tied weights dense, or keep the packed one dense: "
                    f"modules_to_not_convert={[_keep(other)]!r}"
                )
        return None

    def _called(self, module: nn.Module) -> str:
        name = self.names.get(module)
        return f"{name} ({type(module).__name__})" if name else type(module).__name__

    def _advice(self, module: nn.Module | None, layers: list[nn.Module]) -> str:
        first = layers[0]
        names = [".".join(_parts(self.layers[layer])) for layer in layers]
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        kept = (self.layers[layer] for layer in layers)
        kept = (name.rpartition(".")[0] if name in self.stacks else name for name in kept)
        keep = list(dict.fromkeys(map(_keep, kept)))[:_MOST]
        weight = first._parameters.get("weight")
        stored = "bytes" if weight is None else f"uint8 {list(weight.shape)}"
        return (
            f"{'the code' if module is None else self._called(module)} seems to read the weight of "
            f"a packed layer ({names[0]}.weight is {stored} for {list(first._shape)}). Only the "
            f"layer itself can compute with these bytes. Packed layers here: "
            f"{', '.join(names[:_MOST])}{more}. Pack the unquantized model again, and keep dense "
            f"the layers whose weights this code reads: modules_to_not_convert={keep!r}"
        )


def _tells_bytes(text: str) -> bool:
    """Whether the text of torch's error says that it was given bytes."""
    if _OF_MASKS.search(text):
        return False
    got = _GOT.search(text)
    wanted = text[: got.start()] if got else text
    rest = text[got.start() :] if got else ""
    return _OF_BYTES.search(_ACCEPTED.sub("", wanted) + rest) is not None


def _file(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def _tensors(frame: types.FrameType) -> list[torch.Tensor]:
    """The tensors in a function's variables, and in tuples, lists and dicts of them."""
    values = list(frame.f_locals.values())
    values += [v for given in values if isinstance(given, dict) for v in given.values()]
    values += [v for given in values if isinstance(given, (list, tuple)) for v in given]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _module_of(frame: types.FrameType) -> nn.Module | None:
    """The module whose method runs in a frame, or the first argument of a function."""
    code, values = frame.f_code, frame.f_locals
    first = values.get(code.co_varnames[0]) if code.co_argcount else None
    for value in (first, values.get("self")):
        if isinstance(value, nn.Module) and not _is_own(type(value).__module__):
            return value
    return None


def _parts(name: str) -> list[str]:
    """The parts of a layer's name, without PEFT's "base_layer"."""
    return [part for part in name.split(".") if part != "base_layer"]


def _keep(name: str) -> str:
    """A name for modules_to_not_convert that keeps this layer dense in all blocks of a stack:
    mixer.out_proj for layers.3.mixer.out_proj. A layer in a list gives the list's name."""
    parts = _parts(name)
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
