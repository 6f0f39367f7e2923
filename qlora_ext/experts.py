"""The old name of qlora_ext.nn.experts, which pickles and torch.save of whole models hold."""

from .nn.experts import Experts4bit, _Expert

__all__ = ["Experts4bit", "_Expert"]
