"""What values from a config or a file are judged by, and how a sentence shows them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch

FLOAT_MAX = torch.finfo(torch.float32).max


def short(value) -> str:
    """repr, cut where it is long; an integer of too many digits for repr by its size."""
    try:
        text = repr(value)
    except ValueError:
        if not isinstance(value, int):
            return f"a {type(value).__name__} with integers of thousands of digits"
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def is_number(value) -> bool:
    """Whether it is a number, infinities and NaN too, that float() takes: not 10**400."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= FLOAT_MAX
    return isinstance(value, float)


def is_integer(value) -> bool:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_scaling(function: str, scaling, argument: str = "scaling") -> None:
    """ValueError unless scaling is a number, or a tensor of one, that fp32 can hold."""
    if torch.compiler.is_compiling():  # a traced value has no number to look at
        return
    if isinstance(scaling, torch.Tensor):
        is_good = scaling.numel() == 1 and not scaling.is_complex()
        is_good = is_good and (scaling.is_meta or abs(scaling.item()) <= FLOAT_MAX)
    else:
        is_good = is_number(scaling) and abs(scaling) <= FLOAT_MAX
    if not is_good:
        raise ValueError(
            f"{function}: {argument} is {short(scaling)}, want a finite number that fits float32"
        )


def not_plain(value) -> str | None:
    """What a value from outside is, where it is no dense tensor in plain memory; else None.

    Tensors of such kinds are refused: their memory does not hold their values, or they have none.
    Which of them a call takes all the same (meta tensors, subclasses) is for the caller to say.
    """
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"a quantized tensor of torch ({value.dtype})"
    if value.layout != torch.strided:
        return None  # which the callers name
    if value.is_conj():
        return "a conjugate view (resolve_conj() makes a tensor of it)"
    if value.is_neg():
        return "a view with the negative bit (resolve_neg() makes a tensor of it)"
    return None


def count(number: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(nbytes: float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:,.2f} {unit}"
        nbytes /= 1024
    raise AssertionError


def some(names, limit: int = 4) -> str:
    """The first names of a list and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class CheckpointError(Exception):
    """Files of a checkpoint that cannot be read as what they should be; its text is one sentence.

    The commands show it as they show a CliError.
    """


# Regular expressions ------------------------------------------------------------------------------

_NAME_LENGTH = 64
_MAX_STEPS = 10**6  # tens of milliseconds
_LOOK = ("(?=", "(?!", "(?<=", "(?<!")
# An escape, a set, the head of a group, or one character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:<?[=!]|:)|.", re.DOTALL)


def _steps(pattern: str) -> float:
    """A bound of the steps in which `re` fails to match a name of 64 characters; infinite where
    there is none to tell: a group that repeats, which can take 2^64, or syntax beyond groups."""
    alternatives, choices, repeats, looks = [1], 1, 0, False
    last = ""
    for token in _TOKEN.findall(pattern):
        if token in ("(", "(?:", *_LOOK):
            alternatives.append(1)
            looks |= token in _LOOK
        elif token == ")":
            choices *= alternatives.pop()
        elif token == "|":
            alternatives[-1] += 1
        elif token == "?":
            if last == "(":  # flags, names, comments
                return math.inf
            choices *= 2
        elif token in ("*", "+", "{"):
            if last == ")":
                return math.inf
            repeats += 1
        last = token
    # Repeats share the name's characters, but for those that look ahead.
    ways = _NAME_LENGTH**repeats if looks else math.comb(_NAME_LENGTH + repeats, repeats)
    return ways * choices * alternatives[0]


def is_regex(text: str) -> bool:
    """Whether `re` compiles it."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def bad_regex(patterns: Iterable[str]) -> tuple[str, str] | None:
    """The first pattern that is not to be matched with names, and what is wanted; or None.

    `re` goes back and tries again, so a pattern from a file could keep a program busy for years:
    all of them together get a budget of steps, which names and what one writes for them (`.*`,
    `[0-9]+`, `(q|k|v)_proj`) are far below.
    """
    total = 0.0
    for pattern in patterns:
        if not is_regex(f"({pattern})"):
            return pattern, "a regular expression"
        total += _steps(f"({pattern})")
        if total > _MAX_STEPS:
            return pattern, (
                "a name, or a regular expression that is quick to match: no group repeated by "
                "* + or {}, no (? but (?: and lookarounds, and few of * + ? { |"
            )
    return None
