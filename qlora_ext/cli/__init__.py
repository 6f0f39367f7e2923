"""The command line: `qlora-ext COMMAND`, or `python -m qlora_ext COMMAND`.

app.py declares the commands; the module of a command's name does the work. `quantize` and `merge`
share stream.py (converts a module at a time), shards.py (writes files) and output.py (the folder
that is made). ../integrations/transformers/checkpoint.py reads the input.
"""

from __future__ import annotations

import importlib.util
import sys

from .errors import INSTALL


def main() -> None:
    """Runs the command line. If its packages are missing, prints what to install and exits."""
    if missing := missing_packages():
        print_build_info()
        print(f"the commands need {' and '.join(missing)}: {INSTALL}", file=sys.stderr)
        sys.exit(1)
    from .app import run

    run()


def missing_packages() -> list[str]:
    """Names of missing packages that every command needs."""
    found = []
    for name in ("typer", "rich", "safetensors"):
        try:
            if importlib.util.find_spec(name) is None:
                found.append(name)
        except ValueError:  # sys.modules has None for it: it is hidden on purpose
            found.append(name)
    return found


def print_build_info() -> None:
    """Prints build_info(), one line for each key."""
    from ..build_info import build_info, in_words

    for key, text in in_words(build_info()).items():
        print(f"{key:>14}  {text}")
