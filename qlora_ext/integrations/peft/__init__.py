"""The plug-in for PEFT: makes its tuners train and merge on packed layers.

Importing it wraps the functions of PEFT that attach.py lists.
"""

from .attach import attach
from .files import load_adapters
from .lora import AdaLoraLinear4bit, LoraEmbedding4bit, PeftLoraLinear4bit
from .lora import _DoraEmbedding as _DoraEmbedding  # pickles name it here
from .other_layers import (
    HiraLinear4bit,
    IA3Linear4bit,
    PveraLinear4bit,
    RandLoraLinear4bit,
    RoadLinear4bit,
    ShiraLinear4bit,
)
from .stand_in import dequantize, merging_to_4bit
from .training import prepare_model_for_kbit_training, replace_lora_weights_loftq
from .tuners import PackedBackend

# Its old name, which pickles of whole models hold.
LoraLinear4bit = PeftLoraLinear4bit

__all__ = [
    "AdaLoraLinear4bit",
    "HiraLinear4bit",
    "IA3Linear4bit",
    "LoraEmbedding4bit",
    "PackedBackend",
    "PeftLoraLinear4bit",
    "PveraLinear4bit",
    "RandLoraLinear4bit",
    "RoadLinear4bit",
    "ShiraLinear4bit",
    "dequantize",
    "load_adapters",
    "merging_to_4bit",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
]

attach()
