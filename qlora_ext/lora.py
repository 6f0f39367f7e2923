"""The old name of qlora_ext.adapters, kept for pickles of whole models that contain it."""

from .adapters.config import LoraConfig

__all__ = ["LoraConfig"]
