"""Attributes that other libraries look for on a packed layer's parameter `weight`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.compiler import is_compiling


class MarkedWeight(nn.Module):
    """A layer that sets `weight_marks` as attributes of its `weight` whenever that is read, because
    copies, load_state_dict(assign=True), offloading and sharding replace the parameter."""

    weight_marks: Mapping[str, Any] = MappingProxyType({})

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if name == "weight" and value is not None and not is_compiling():
            for mark, content in self.weight_marks.items():
                setattr(value, mark, content)
        return value
