"""Prints for the commands, with rich: text, tables, a progress bar."""

from __future__ import annotations

import contextlib
import os

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

# For a file or pipe, rich assumes 80 columns and breaks longer rows, even if colours are forced.
_WIDTH = None if "COLUMNS" in os.environ else 200


def console(stderr: bool = False) -> Console:
    """A new console at each call, because tests replace sys.stdout."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.file.isatty() else Console(stderr=stderr, highlight=False, width=_WIDTH)


def say(text: str, *, stderr: bool = False) -> None:
    """Prints plain text. Brackets are not markup, and lines are not wrapped."""
    console(stderr).print(shown(text), markup=False, soft_wrap=True)


def shown(text: str) -> str:
    """Text from a file, with escapes for control characters and those that cannot be encoded."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> None:
    """Prints a table. Columns after the first `left` hold numbers and are aligned right."""
    if title:
        say(title)
    made = Table(box=None, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        made.add_column(
            escape(column), justify="left" if number < left else "right", overflow="fold"
        )
    for row in rows:
        made.add_row(*(escape(shown(cell)) for cell in row))
    console().print(made)


class Bar:
    """A progress bar over the bytes read. It names the shard that is being written."""

    def __init__(self, what: str, nbytes: int):
        self.what = what
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console(stderr=True),
        )
        self.task = self.progress.add_task(what, total=nbytes)

    def shard(self, number: int, total: int) -> None:
        self.progress.update(self.task, description=f"{self.what} (shard {number} of {total})")

    def advance(self, nbytes: int) -> None:
        self.progress.advance(self.task, nbytes)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar(what: str, nbytes: int):
    made = Bar(what, nbytes)
    with made.progress:
        yield made
