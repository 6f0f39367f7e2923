"""Plug-ins for torch, transformers, PEFT and bitsandbytes; import_hook attaches them."""

from .import_hook import attach, check_version, named_by_version

__all__ = ["attach", "check_version", "named_by_version"]
