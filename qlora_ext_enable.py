"""Starts qlora_ext in programs that don't import it, if QLORA_EXT_ENABLE is in the environment.

    QLORA_EXT_ENABLE=1       bitsandbytes' 4-bit ops run on our kernels
    QLORA_EXT_ENABLE=layers  also, BitsAndBytesConfig(load_in_4bit=True) gives our layers

torch and bitsandbytes call these functions at the end of their own import (the entry points
`torch.backends` and `bitsandbytes.backends` in pyproject.toml). So this module stands outside the
package, whose import attaches plug-ins, and its functions raise nothing: that would break `import
torch`. Without the variable they do nothing.
"""

import contextlib
import functools
import os
import sys

VARIABLE = "QLORA_EXT_ENABLE"


def wanted() -> str:
    """ "", "1" or "layers"."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    return "" if value == "0" else value


_failed = False  # whether qlora_ext could not be imported
_too_late = False  # whether bitsandbytes was imported before qlora_ext


def layers_wanted() -> bool:
    """Whether BitsAndBytesConfig(load_in_4bit=True) gives our layers."""
    return wanted() == "layers" and not _too_late


@functools.cache  # an environment layered over another one has each entry point twice
def tell(text: str) -> None:
    """Writes a line to stderr once, if that can be written to."""
    if sys.stderr is None:  # closed; print would write to stdout
        return
    value = os.environ.get(VARIABLE)
    with contextlib.suppress(Exception):
        print(f"qlora_ext: {text}" + f" ({VARIABLE}={value})" * bool(value), file=sys.stderr)


def after_torch() -> None:
    """Imports qlora_ext if layers are wanted. Its plug-in then waits for transformers: when that
    imports bitsandbytes, it has already chosen what quantizes a model."""
    global _failed
    if wanted() != "layers":
        return
    try:
        import qlora_ext  # noqa: F401
    except Exception as error:
        _failed = True
        tell(f"not enabled: {type(error).__name__}: {error}")


def after_bitsandbytes() -> None:
    """Puts our kernels under bitsandbytes, and says so on stderr."""
    global _too_late
    value = wanted()
    if not value:
        return
    if value not in ("1", "layers"):
        tell("not enabled: want 1 or layers")
        return
    if value == "layers" and "qlora_ext" not in sys.modules:
        # A model may be loading right now, with bitsandbytes' layers; the next ones get the same.
        _too_late = True
        if not _failed:
            tell(
                "layers not enabled: torch did not start qlora_ext, as with "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0; import qlora_ext before bitsandbytes"
            )
    try:
        from qlora_ext.integrations import bitsandbytes

        bitsandbytes.enable()
    except Exception as error:
        tell(f"not enabled: {type(error).__name__}: {error}")
    else:
        tell("bitsandbytes' 4-bit ops run on qlora_ext's kernels")
