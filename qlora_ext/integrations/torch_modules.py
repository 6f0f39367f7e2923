"""Wraps two functions of torch for modules with packed weights.

nn.Module.requires_grad_(True)   makes all parameters but packed weights require gradients, and
                                 warns; torch would raise at the first packed weight
torch.nn.utils.spectral_norm     (the older one) refuses a packed layer with our error
"""

from __future__ import annotations

import functools
import warnings

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from ..nn.packed import _PACKED_KEYS, _Packed4bit
from ..text import first_few


def _leaving_packed_frozen(original):
    @functools.wraps(original)
    def requires_grad_(self, requires_grad: bool = True):
        try:
            return original(self, requires_grad)
        except RuntimeError:
            layers = {n: m for n, m in self.named_modules() if isinstance(m, _Packed4bit)}
            packed = {id(p) for m in layers.values() for k, p in m._parameters.items()
                      if k in _PACKED_KEYS}  # fmt: skip
            others = [p for p in self.parameters() if id(p) not in packed]
            if not layers or not all(p.is_floating_point() or p.is_complex() for p in others):
                raise
        for parameter in others:
            parameter.requires_grad_(requires_grad)
        names = [name or type(self).__name__ for name in layers]
        warnings.warn(
            f"requires_grad_(True): the packed weights of {first_few(names, 3)} stay frozen. All "
            "other parameters now require gradients. To train packed layers, use add_lora or PEFT",
            stacklevel=2,
        )
        return self

    requires_grad_.leaves_packed_frozen = True
    return requires_grad_


def _refusing_packed(original):
    @functools.wraps(original)
    def apply(module, name: str, *args, **kwargs):
        if isinstance(module, _Packed4bit) and name in _PACKED_KEYS:
            raise module._packed_error(name)
        return original(module, name, *args, **kwargs)

    return apply


def attach() -> None:
    """Wraps the two functions. Idempotent."""
    if hasattr(nn.Module.requires_grad_, "leaves_packed_frozen"):
        return
    nn.Module.requires_grad_ = _leaving_packed_frozen(nn.Module.requires_grad_)
    SpectralNorm.apply = staticmethod(_refusing_packed(SpectralNorm.apply))
