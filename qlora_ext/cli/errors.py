"""The error that ends a command with a message and without a traceback."""

from ..text import UserError

INSTALL = "pip install 'qlora_ext[cli]'"


class CliError(UserError):
    """Ends the command with exit status 1. The user sees its text."""
