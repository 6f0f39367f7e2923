"""Matches names of layers to leave alone. A name means the same everywhere.

A name matches a layer if it is a run of the dotted parts of the layer's full name: "lm_head",
"vision_tower", "layers.0.mlp" or the full name. "proj" does not match "q_proj". A name with
characters that names do not have is a regular expression for such a run: "layers.[0-3]",
"(q|k)_proj".

The full name may also be the layer's name in another class of the same architecture (with or
without the backbone's prefix, "model." for Llama), or in the checkpoint that is being read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..text import shorten
from .patterns import bad_regex

_PLAIN = re.compile(r"[\w.-]+")


def as_names(names: Any, owner: str, argument: str = "modules_to_not_convert") -> list[str]:
    """`modules_to_not_convert` as a list of names. A string is one name; None gives an empty list.

    Args:
        names: None, a string, or any iterable of strings except a mapping.
        owner, argument: the function or class and its argument, for the error.

    Raises:
        ValueError: names holds something else, or a regular expression that could take long.
    """
    if names is None:
        return []
    is_list = isinstance(names, Iterable) and not isinstance(names, Mapping)
    listed = [names] if isinstance(names, str) or not is_list else list(names)
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{owner}: {argument} got {shorten(names)}, want a list of layer names")
    patterns = [name for name in listed if not _PLAIN.fullmatch(name)]
    if bad := bad_regex(patterns):
        raise ValueError(f"{owner}: {argument} has {shorten(bad[0])}, want {bad[1]}")
    return sorted(listed) if isinstance(names, (set, frozenset)) else listed


@functools.lru_cache(maxsize=1024)
def _expression(pattern: str) -> re.Pattern:
    if not _PLAIN.fullmatch(pattern):
        return re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")
    return re.compile(rf"(?:^|\.){re.escape(pattern)}(?:\.|$)")


def literal(name: str) -> str:
    """A pattern that matches only this module's name, whatever characters it has."""
    return name if _PLAIN.fullmatch(name) else re.escape(name)


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that is a run of name's dotted parts, as "mlp.gate" is of "h.0.mlp.gate".

    A pattern may name a layer by its weight: "lm_head.weight".
    """
    for pattern in patterns:
        if _expression(pattern.removesuffix(".weight") or pattern).search(name):
            return pattern
    return None


class Names:
    """All names by which a user may mean each module of a model.

    Args:
        stored: mappings of module name -> its name in a checkpoint, as far as it is known: in the
            checkpoint being read, and in those that the class writes.
    """

    def __init__(self, model: nn.Module, *stored: Mapping[str, str]):
        self.model = model
        self.stored = stored
        prefix = getattr(model, "base_model_prefix", "")
        # The model is a backbone loaded alone: other classes put the prefix before its names.
        alone = isinstance(prefix, str) and prefix and not hasattr(model, prefix)
        self.prefix = f"{prefix}." if alone else ""
        first: dict[int, str] = {}
        self.shared: dict[str, list[str]] = {}  # a module's first name -> its others
        for name, module in model.named_modules(remove_duplicate=False):
            if first.setdefault(id(module), name) != name:
                self.shared.setdefault(first[id(module)], []).append(name)

    def spellings(self, name: str) -> tuple[str, ...]:
        """All names of one module."""
        own = (name, *self.shared.get(name, ()))
        prefixed = tuple(self.prefix + one for one in own) if self.prefix else ()
        stored = tuple(names[name] for names in self.stored if name in names)
        return own + prefixed + stored

    def matches(self, name: str, patterns: Iterable[str]) -> str | None:
        """The first pattern that matches the module of that name."""
        patterns = tuple(patterns)
        for spelling in self.spellings(name):
            if pattern := matches(spelling, patterns):
                return pattern
        return None

    def unmatched(self, patterns: Iterable[str]) -> list[str]:
        """The patterns that match no module. Modules without own parameters that hold others are
        not tried: a pattern that matches one matches those inside it too, unless it is a regular
        expression that ends there ("mlp$")."""
        modules = [
            name
            for name, module in self.model.named_modules()
            if name and (not module._modules or any(True for _ in module.parameters(recurse=False)))
        ]
        return [p for p in patterns if not any(self.matches(name, [p]) for name in modules)]
