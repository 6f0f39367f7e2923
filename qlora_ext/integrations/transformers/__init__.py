"""The plug-in for transformers: `from_pretrained(quantization_config=QLoraExtConfig())`.

Importing it registers the config and the quantizer with transformers.
"""

from . import answering
from .classes import attach
from .config import QLoraExtConfig
from .pretrained import from_pretrained, save_pretrained
from .quantizer import QLoraExtHfQuantizer

__all__ = ["QLoraExtConfig", "QLoraExtHfQuantizer", "from_pretrained", "save_pretrained"]

attach()
answering.attach()
