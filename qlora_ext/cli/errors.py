"""The error that ends a command with a message and without a traceback."""

from ..text import SentenceError

INSTALL = "pip install 'qlora_ext[cli]'"


class CliError(SentenceError):
    """Ends the command with exit status 1. The user sees its text."""
