"""The old name of qlora_ext.tensor, kept for pickles of whole models that contain it."""

from .tensor.config import QuantConfig
from .tensor.quantized import QuantizedTensor

__all__ = ["QuantConfig", "QuantizedTensor"]
