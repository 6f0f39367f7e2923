"""The old name of qlora_ext.nn.shared_input, which torch.save of whole adapted models holds."""

from .nn.shared_input import SharedInput

__all__ = ["SharedInput"]
