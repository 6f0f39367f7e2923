"""The old name of qlora_ext.adapters, which pickles and torch.save of whole models hold."""

from .adapters.config import LoraConfig

__all__ = ["LoraConfig"]
