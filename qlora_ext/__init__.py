"""qlora_ext: the low-level 4-bit backend for QLoRA.

Importing it needs torch alone; the plug-ins for transformers and PEFT attach when those load.
"""

from . import integrations, nn
from .build_info import build_info
from .lora import (
    LoraConfig,
    add_lora,
    load_adapter,
    print_trainable_parameters,
    save_adapter,
)
from .merge import merge_and_unload
from .models import memory_report, num_parameters, quantize_model
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
    "merge_lora_4bit",
    "nn",
    "num_parameters",
    "print_trainable_parameters",
    "quantize_4bit",
    "quantize_model",
    "save_adapter",
]


def __getattr__(name: str):
    """QLoraExtConfig, on first use: its base class is in transformers."""
    if name == "QLoraExtConfig":
        from .integrations.transformers import QLoraExtConfig

        return QLoraExtConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


integrations.attach()
