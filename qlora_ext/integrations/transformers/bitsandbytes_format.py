"""Writes a model with our layers as transformers and bitsandbytes write theirs."""

from __future__ import annotations

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from ...nn.linear import Linear4bit


def bitsandbytes_state_dict(model) -> dict[str, torch.Tensor]:
    """The model's state dict with packed weights under bitsandbytes' keys."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            for key in [*module._sizes(), "weight_codebook"]:
                del state[f"{name}.{key}"]
            state.update(module.quantized.state_dict(f"{name}.weight"))
    return state


def skip_modules(model, kept: list[str]) -> list[str]:
    """Names that keep exactly the layers in `kept` dense in stock transformers. There a name means
    every layer whose name ends with it, even in the middle of a word."""
    packed = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    # With "$" at its end, transformers reads it as a regular expression for the whole name.
    return [
        f"{name}$" if any(not should_convert_module(p, [name]) for p in packed) else name
        for name in kept
    ]
