"""The old name of qlora_ext.nn.shared_input, kept for pickles of whole models that contain it."""

from .nn.shared_input import SharedInput

__all__ = ["SharedInput"]
