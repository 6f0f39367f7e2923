"""Checks regular expressions from configs and files: matching a name must not take long."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_NAME_LENGTH = 64
_MAX_STEPS = 10**6  # tens of milliseconds
_LOOK = ("(?=", "(?!", "(?<=", "(?<!")
# An escape, a set, the head of a group, or one character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:<?[=!]|:)|.", re.DOTALL)


def _steps(pattern: str) -> float:
    """An upper bound on the steps that `re` takes to fail on a name of 64 characters. It is
    infinite for a repeated group, which can take 2^64, and for syntax beyond groups."""
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
    # Repeats share the name's characters, except with lookarounds, which read them again.
    ways = _NAME_LENGTH**repeats if looks else math.comb(_NAME_LENGTH + repeats, repeats)
    return ways * choices * alternatives[0]


def is_regex(text: str) -> bool:
    """Whether `re` compiles it."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


_QUICK = (
    "a name, or a regular expression that is quick to match: no repeated group such as (ab)*, no "
    "(? except (?: and lookarounds (so no flags such as (?i)), and few of * + ? { |"
)


def bad_regex(patterns: Iterable[str]) -> tuple[str, str] | None:
    """The first pattern that must not be matched with names, and what to give instead; or None.

    `re` backtracks, so a pattern from a file could keep a program busy for years. All patterns
    together get a budget of steps. Names, and usual patterns for them (`.*`, `[0-9]+`,
    `(q|k|v)_proj`), stay far below it.
    """
    total = 0.0
    for pattern in patterns:
        in_group = is_regex(f"({pattern})")
        if not in_group and not is_regex(pattern):
            return pattern, "a regular expression"
        if not in_group:  # flags, which must come first
            return pattern, _QUICK
        total += _steps(f"({pattern})")
        if total > _MAX_STEPS:
            return pattern, _QUICK
    return None
