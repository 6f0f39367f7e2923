"""Layers with packed weights, and adapters on them.

`Linear4bit`, `Embedding4bit` and `Experts4bit` replace dense layers; `Stack4bit` holds one matrix
of all experts of a layer. `LoraLinear4bit` adds LoRA to a packed linear layer, `LoraStack4bit` to a
stack, `LoraLinear` to a dense layer.
"""

from .embedding import Embedding4bit
from .experts import Experts4bit
from .linear import Linear4bit
from .lora import LoraLinear, LoraLinear4bit
from .panel import PanelLinear
from .stack import LoraStack4bit, Stack4bit

__all__ = [
    "Embedding4bit",
    "Experts4bit",
    "Linear4bit",
    "LoraLinear",
    "LoraLinear4bit",
    "LoraStack4bit",
    "PanelLinear",
    "Stack4bit",
]
