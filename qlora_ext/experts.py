"""The old name of qlora_ext.nn.experts, kept for pickles of whole models that contain it."""

from .nn.experts import Experts4bit, _Expert

__all__ = ["Experts4bit", "_Expert"]
