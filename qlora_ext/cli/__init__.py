"""The command line: `qlora-ext COMMAND`, or `python -m qlora_ext COMMAND`.

app.py declares the commands; each does its work in the module of its name. `quantize` and `merge`
share stream.py (a module at a time), shards.py (writing) and output.py (the folder that is made);
../checkpoint.py reads.
"""

from __future__ import annotations

import importlib.util
import sys

from .errors import INSTALL


def main() -> None:
    """Runs the command line; without its packages, says what to install."""
    if missing := missing_packages():
        print_build_info()
        print(f"the commands need {' and '.join(missing)}: {INSTALL}", file=sys.stderr)
        sys.exit(1)
    from .app import run

    run()


def missing_packages() -> list[str]:
    """Of those that every command needs."""
    found = []
    for name in ("typer", "rich", "safetensors"):
        try:
            if importlib.util.find_spec(name) is None:
                found.append(name)
        except ValueError:  # sys.modules holds None: hidden on purpose
            found.append(name)
    return found


def print_build_info() -> None:
    """build_info(), a line a key."""
    from ..build_info import build_info, in_words

    for key, text in in_words(build_info()).items():
        print(f"{key:>14}  {text}")
