"""What a command says when it cannot go on: one sentence, no traceback."""


class CliError(Exception):
    """Ends the command with exit status 1; its text is the sentence that the user reads."""


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
