"""Layers with packed weights, and adapters on them.

`Linear4bit`, `Embedding4bit` and `Experts4bit` replace dense layers. `LoraLinear4bit` adds LoRA to
a packed linear layer, `LoraLinear` to a dense one.
"""

from .embedding import Embedding4bit
from .experts import Experts4bit
from .linear import Linear4bit
from .lora import LoraLinear, LoraLinear4bit
from .panel import PanelLinear

__all__ = [
    "Embedding4bit",
    "Experts4bit",
    "Linear4bit",
    "LoraLinear",
    "LoraLinear4bit",
    "PanelLinear",
]
