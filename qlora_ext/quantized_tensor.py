"""The old name of qlora_ext.tensor, which pickles and torch.save of whole models hold."""

from .tensor.config import QuantConfig
from .tensor.quantized import QuantizedTensor

__all__ = ["QuantConfig", "QuantizedTensor"]
