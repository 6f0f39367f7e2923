"""PEFT's KappaTune, which chooses layers by their weights' condition numbers, on packed layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ...nn.experts import Experts4bit
from ...nn.linear import Linear4bit
from ...nn.stack import Stack4bit
from .stand_in import dequantize


class _Dequantized(torch.nn.Linear):
    """A packed layer as a linear layer that dequantizes its weight whenever it is read."""

    def __init__(self, packed: Linear4bit):
        torch.nn.Module.__init__(self)
        self.__dict__["packed"] = packed  # not as a submodule

    @property
    def weight(self) -> torch.Tensor:
        return dequantize(self.packed)


class _DenseStack:
    """A packed stack [E, N, K] as a parameter that is dequantized whenever it is read."""

    def __init__(self, packed: Stack4bit):
        self.packed = packed

    def dim(self) -> int:
        return 3

    @property
    def data(self) -> torch.Tensor:
        return dequantize(self.packed)


class _Dense:
    """A model whose packed layers read as linear layers, and packed stacks as parameters."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name, module in self.model.named_modules():
            yield name, _Dequantized(module) if isinstance(module, Linear4bit) else module

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter | _DenseStack]]:
        """The model's, with the stacks of packed experts by the names of the dense ones."""
        experts = {n: m for n, m in self.model.named_modules() if isinstance(m, Experts4bit)}
        inside = tuple(f"{name}." for name in experts)
        for name, parameter in self.model.named_parameters():
            if not (inside and name.startswith(inside)):
                yield name, parameter
        for holder, module in experts.items():
            for name, stack in module.stacks().items():
                yield f"{holder}.{name}", _DenseStack(stack)


def _condition_numbers(original):
    """Wraps `KappaTuneSelector._compute_kappas`, which would read packed bytes as a weight."""

    @functools.wraps(original)
    def _compute_kappas(self):
        model = self.model
        self.model = _Dense(model)
        try:
            return original(self)
        finally:
            self.model = model

    return _compute_kappas
