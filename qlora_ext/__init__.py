"""qlora_ext: the low-level 4-bit backend for QLoRA.

Importing it needs torch alone; the plug-ins for transformers and PEFT attach when those load.
"""

from . import integrations
from .build_info import build_info
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
    "QuantConfig",
    "QuantizedTensor",
    "build_info",
    "dequantize_4bit",
    "linear_4bit",
    "lora_linear_4bit",
    "merge_lora_4bit",
    "quantize_4bit",
]


def __getattr__(name: str):
    """QLoraExtConfig, on first use: its base class is in transformers."""
    if name == "QLoraExtConfig":
        from .integrations.transformers import QLoraExtConfig

        return QLoraExtConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


integrations.attach()
