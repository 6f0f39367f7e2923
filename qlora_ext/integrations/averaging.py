"""Makes torch's AveragedModel (EMA, SWA) work on models with packed weights.

It averages every parameter and, with use_buffers, every buffer. Integers among them (packed bytes,
position ids, counters) would be averaged as numbers and truncated. With this wrapper they are left
out of the average and copied from the model, as AveragedModel does with buffers by default. Models
without a packed layer go to torch's own code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..models.walk import is_packed
from ..nn.packed import _Packed4bit

_Entry = tuple[dict[str, Tensor | None], str, Tensor]  # a module's dict, a key, the tensor there

# For each AveragedModel, the tensors of the last copy with their versions (torch's write counts).
_copied: weakref.WeakKeyDictionary[AveragedModel, list] = weakref.WeakKeyDictionary()


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _integers(model: nn.Module) -> list[_Entry]:
    """Every integer parameter and buffer of the model, in order."""
    return [
        (owner, key, tensor)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for key, tensor in owner.items()
        if tensor is not None and not _is_averaged(tensor)
    ]


def _layout(model: nn.Module) -> list[tuple[str, torch.Size, bool]]:
    """(name, shape, whether it is averaged) of every parameter and every integer buffer, in the
    order in which AveragedModel pairs them."""
    parameters = [(name.rpartition(".")[2], p) for name, p in model.named_parameters()]
    buffers = [(name.rpartition(".")[2], b) for name, b in model.named_buffers()]
    entries = parameters + [(key, b) for key, b in buffers if not _is_averaged(b)]
    return [(key, t.shape, _is_averaged(t)) for key, t in entries]


@contextlib.contextmanager
def _hidden(entries: list[_Entry]) -> Iterator[None]:
    """A context in which parameters() and buffers() skip the entries."""
    try:
        for owner, key, _ in entries:
            owner[key] = None
        yield
    finally:
        for owner, key, tensor in entries:
            owner[key] = tensor


def _is_as_copied(averaged: AveragedModel, tensors: list[Tensor]) -> bool:
    last = _copied.get(averaged, [])
    return len(last) == len(tensors) and all(
        ref() is t and not t.is_inference() and t._version == version
        for (ref, version), t in zip(last, tensors, strict=True)
    )


@torch.no_grad()
def _copy(averaged: AveragedModel, model: nn.Module, pairs: list[tuple[_Entry, _Entry]]) -> None:
    """Copies the model's integers into the average, unless none was written since the last copy."""
    tensors = [entry[2] for pair in pairs for entry in pair]
    if _is_as_copied(averaged, tensors):
        return
    for (_, _, own), (_, _, theirs) in pairs:
        own.detach().copy_(theirs.detach())
    layers = ([m for m in x.modules() if isinstance(m, _Packed4bit)] for x in (averaged, model))
    for own_layer, their_layer in zip(*layers, strict=True):
        own_layer._copied_from(their_layer)
    # An inference tensor counts no writes.
    _copied[averaged] = [
        (weakref.ref(t), None if t.is_inference() else t._version) for t in tensors
    ]


def _keeping_integers(update_parameters):
    @functools.wraps(update_parameters)
    def update(self: AveragedModel, model: nn.Module) -> None:
        both = itertools.chain(self.module.modules(), model.modules())
        if not any(map(is_packed, both)):
            return update_parameters(self, model)
        if _layout(self.module) != _layout(model):
            raise ValueError(
                "AveragedModel: the model's parameters have other names or shapes than those of "
                "the average, want the model that it was made from, with the same adapters and not "
                "packed, dequantized or merged since; or make a new AveragedModel"
            )
        own, theirs = _integers(self.module), _integers(model)
        with _hidden(own + theirs):
            update_parameters(self, model)
        _copy(self, model, list(zip(own, theirs, strict=True)))

    update.keeps_integers = True
    return update


def attach() -> None:
    """Makes AveragedModel.update_parameters leave integers as they are. Idempotent."""
    if not hasattr(AveragedModel.update_parameters, "keeps_integers"):
        AveragedModel.update_parameters = _keeping_integers(AveragedModel.update_parameters)
