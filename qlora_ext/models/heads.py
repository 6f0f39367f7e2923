"""Finds the heads of a transformers model. They stay dense, and a checkpoint may lack them.

A head is what a class adds to its backbone: the output embeddings, and the linear layers outside
the backbone (`score`, `classifier`, `qa_outputs`, and layers before them such as RoBERTa's
`classifier.dense`). `base_model_prefix` names the backbone. In a class that has nothing under that
name (T5ForQuestionAnswering), and in a user's own module around transformers models, every part
that is a transformers model itself counts as backbone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..nn.linear import is_plain_linear
from .walk import output_embeddings

OUTPUT, TASK = "output head", "task head"
_TASK_CLASS = re.compile(r"For[A-Z]|Heads?|Classifi|Regress|Tagger")


def heads_of(model: nn.Module) -> dict[int, str]:
    """id of a head's layer -> its kind, OUTPUT or TASK. This includes the heads of parts that are
    transformers models themselves (the decoder of an EncoderDecoderModel)."""
    found: dict[int, str] = {}
    for part in [m for m in model.modules() if m is model or is_transformers_model(m)]:
        for layer in _outside_backbone(part):
            found.setdefault(id(layer), TASK)
        head = output_embeddings(part)
        if head is not None:
            found[id(head)] = OUTPUT
    return found


def is_transformers_model(module: nn.Module) -> bool:
    """Whether module is a transformers model: its class has a name for the backbone."""
    return isinstance(getattr(type(module), "base_model_prefix", None), str)


def _outside_backbone(model: nn.Module) -> list[nn.Module]:
    if not is_transformers_model(model):
        return _beside_parts(model)
    prefix = model.base_model_prefix
    backbone = model._modules.get(prefix) if prefix else None
    parts = [m for m in _without_inside(model) if is_transformers_model(m)]
    if backbone is not None:
        parts.append(backbone)
    elif not parts or not _TASK_CLASS.search(type(model).__name__):
        # If the class is transformers' own: a backbone, or a model whose parts cannot be told.
        library = type(model).__module__.startswith("transformers.")
        return [] if library else _beside_parts(model)
    if backbone is None:  # a stack (ModuleList) is not a head, whatever its class is
        parts += [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inside = {id(m) for part in parts for m in part.modules()}
    return [m for m in model.modules() if id(m) not in inside and _is_linear(m)]


def _beside_parts(model: nn.Module) -> list[nn.Module]:
    """The heads of a user's own class: its linear layers outside the transformers models in it.

    A child that holds a stack (a ModuleList) is a network, not a head. Layers between two parts, or
    next to a part that writes text, connect the parts (a vision-language model's projector) and are
    not heads either.
    """
    parts: list[nn.Module] = []
    beside: list[tuple[int, nn.Module]] = []  # (number of parts before the layer, layer)

    def walk(owner: nn.Module) -> None:
        for child in owner.children():
            if is_transformers_model(child):
                parts.append(child)
            elif any(is_transformers_model(m) for m in child.modules()):
                walk(child)
            elif not any(isinstance(m, nn.ModuleList) for m in child.modules()):
                beside.extend((len(parts), m) for m in child.modules() if _is_linear(m))

    walk(model)
    if not parts or (len(parts) > 1 and any(output_embeddings(part) for part in parts)):
        return []
    inside = {id(m) for part in parts for m in part.modules()}
    last = len(parts) if len(parts) > 1 else 0
    return [m for before, m in beside if before >= last and id(m) not in inside]


def _without_inside(model: nn.Module) -> Iterator[nn.Module]:
    """The modules below model, except those inside transformers models below it."""
    for child in model.children():
        yield child
        if not is_transformers_model(child):
            yield from _without_inside(child)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_plain_linear(module)
