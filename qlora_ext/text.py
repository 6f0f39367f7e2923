"""Prints values in error messages, and defines the errors whose text is for the user."""

from __future__ import annotations


def shorten(value) -> str:
    """repr(value), cut if it is long. For an integer with too many digits for repr, its size."""
    try:
        text = repr(value)
    except ValueError:
        if not isinstance(value, int):
            return f"a {type(value).__name__} with integers of thousands of digits"
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def plural(number: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(nbytes: float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:,.2f} {unit}"
        nbytes /= 1024
    raise AssertionError


def first_few(names, limit: int = 4) -> str:
    """The first names of a list, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


def printable(text: str) -> str:
    """Text for a message: cut if it is long, with escapes in place of line breaks, a terminal's
    control characters and half surrogate pairs."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:1000])
    return text if len(text) <= 300 else f"{text[:280]}... ({len(text)} characters or more)"


def first_line(error: BaseException, with_type: bool = False) -> str:
    """An error's text in one line that is not too long. It adds the error's type if the text alone
    does not say what went wrong."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # the first line is a heading
        lines[0] += f" {lines[1].strip()}"
    text = printable(lines[0]) if lines else ""
    with_type |= not isinstance(error, (ValueError, RuntimeError, OSError, ImportError))
    return ": ".join([type(error).__name__] * (with_type or not text) + [text] * bool(text))


class UserError(ValueError):
    """An error whose text is for the user. The commands print it without a traceback and exit."""


class CheckpointError(UserError):
    """A file of a checkpoint or adapter is missing, damaged or not what it should be."""
