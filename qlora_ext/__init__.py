"""qlora_ext: the low-level 4-bit backend for QLoRA.

Importing it needs only torch. The plug-ins for transformers and PEFT attach when those load.
"""

from . import integrations
from . import nn as nn  # not in __all__: a star import would hide torch.nn
from .adapters.add import add_lora, print_trainable_parameters
from .adapters.config import LoraConfig
from .adapters.files import load_adapter, save_adapter
from .build_info import build_info
from .merging.calibration_text import write_calibration
from .merging.dense import merge_and_unload
from .merging.into_4bit import merge_into_4bit
from .models.quantize import quantize_model
from .models.report import memory_report, num_parameters
from .nn.expert_offload import offload_experts
from .tensor.config import QuantConfig
from .tensor.functions import (
    dequantize_4bit,
    linear_4bit,
    lora_linear_4bit,
    merge_lora_4bit,
    quantize_4bit,
    quantize_stack_4bit,
)
from .tensor.quantized import QuantizedTensor

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
    "offload_experts",
    "print_trainable_parameters",
    "quantize_4bit",
    "quantize_model",
    "quantize_stack_4bit",
    "save_adapter",
    "write_calibration",
]


# Imported on first use, because they need transformers.
_LAZY = {"QLoraExtConfig", "from_pretrained", "save_pretrained"}


def __getattr__(name: str):
    if name in _LAZY:
        try:
            from .integrations import transformers
        except ImportError as error:
            raise integrations.named_by_version(error, "transformers") from error
        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


integrations.attach()
