"""qlora_ext: the low-level 4-bit backend for QLoRA.

Importing it needs torch alone; the plug-ins for transformers and PEFT attach when those load.
"""

from .build_info import build_info  # first: it says why the compiled library does not load

# isort: split
from . import integrations
from . import nn as nn  # not in __all__: a star import would hide torch.nn
from .lora import (
    LoraConfig,
    add_lora,
    load_adapter,
    print_trainable_parameters,
    save_adapter,
)
from .merge import merge_and_unload
from .merge_4bit import merge_into_4bit
from .models import memory_report, num_parameters, quantize_model
from .own_text import write_calibration
from .quantized_tensor import (
    QuantConfig,
    QuantizedTensor,
    dequantize_4bit,
    linear_4bit,
    lora_linear_4bit,
    merge_lora_4bit,
    quantize_4bit,
)

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "QuantConfig",
    "QuantizedTensor",
    "add_lora",
    "build_info",
    "dequantize_4bit",
    "linear_4bit",
    "load_adapter",
    "lora_linear_4bit",
    "memory_report",
    "merge_and_unload",
    "merge_into_4bit",
    "merge_lora_4bit",
    "num_parameters",
    "print_trainable_parameters",
    "quantize_4bit",
    "quantize_model",
    "save_adapter",
    "write_calibration",
]


# On first use: they need transformers.
_LAZY = {"QLoraExtConfig", "from_pretrained", "save_pretrained"}


def __getattr__(name: str):
    if name in _LAZY:
        from .integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


integrations.attach()
