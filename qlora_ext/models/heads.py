"""Which layers of a transformers model are its heads: they stay dense, and may be fresh.

A head is what a class adds to its backbone: the output embeddings, and the linear layers outside
the backbone (`score`, `classifier`, `qa_outputs`, and the layers before them, as RoBERTa's
`classifier.dense`). The backbone is what `base_model_prefix` names, or, in a class that has none
under that name (T5ForQuestionAnswering), every part that is a transformers model itself. So it is
in a module of the user's own around such a model.
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
    """id of a head's layer -> what it is: OUTPUT or TASK. Heads of parts that are transformers
    models themselves (the decoder of an EncoderDecoderModel) are found too."""
    found: dict[int, str] = {}
    for part in [m for m in model.modules() if m is model or is_transformers_model(m)]:
        for layer in _outside_backbone(part):
            found.setdefault(id(layer), TASK)
        head = output_embeddings(part)
        if head is not None:
            found[id(head)] = OUTPUT
    return found


def is_transformers_model(module: nn.Module) -> bool:
    """Whether module has what the core reads of a transformers model, a name for its backbone."""
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
        # A backbone itself, or one whose parts cannot be told, if the class is the library's.
        library = type(model).__module__.startswith("transformers.")
        return [] if library else _beside_parts(model)
    if backbone is None:  # a stack is no head, whatever its class is
        parts += [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inside = {id(m) for part in parts for m in part.modules()}
    return [m for m in model.modules() if id(m) not in inside and _is_linear(m)]


def _beside_parts(model: nn.Module) -> list[nn.Module]:
    """The linear layers of a user's own class beside the transformers models in it.

    What holds a stack (a ModuleList) is a network of its own. Layers between two parts, or beside
    one that writes text, are what joins them: the projector of a vision-language model.
    """
    parts: list[nn.Module] = []
    beside: list[tuple[int, nn.Module]] = []  # how many parts come before, layer

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
    """The modules below model, without those inside of transformers models below it."""
    for child in model.children():
        yield child
        if not is_transformers_model(child):
            yield from _without_inside(child)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_plain_linear(module)
