"""What a command says when it cannot go on: one sentence, no traceback."""

from ..text import SentenceError

INSTALL = "pip install 'qlora_ext[cli]'"


class CliError(SentenceError):
    """Ends the command with exit status 1; its text is the sentence that the user reads."""
