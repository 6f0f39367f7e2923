"""The error that ends a command with a message and without a traceback."""

import contextlib
from collections.abc import Iterator

from ..text import UserError

INSTALL = "pip install 'qlora_ext[cli]'"


class CliError(UserError):
    """Ends the command with exit status 1. The user sees its text."""


@contextlib.contextmanager
def as_cli_error(*kinds: type[Exception]) -> Iterator[None]:
    """A context in which errors of these kinds become a CliError of the same text."""
    try:
        yield
    except kinds as error:
        raise CliError(str(error).removeprefix("load_adapter: ")) from None
