"""Finds out whether a file that a command reads has changed since the command began."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..files import INDEX, extra_files
from ..text import first_few
from .errors import CliError

SETTINGS = ("config.json", "adapter_config.json", INDEX)


class InputsChanged(CliError):
    """A file that the command reads has changed since the command began.

    Args:
        message: the error's text, which names the file.
        stale: whether the weights written so far no longer match the input.
    """

    def __init__(self, message: str, stale: bool):
        super().__init__(message)
        self.stale = stale


class Inputs:
    """Sizes and times of the input files, at the moment when this object is made.

    The times are those of the last write (mtime) and of the last change of the inode (ctime). A
    program cannot set ctime, so it also shows a file that was replaced by one of the same size and
    age. Inode numbers are not compared, because some network file systems change them.

    Args:
        paths: folders of checkpoints and adapters, and single files.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)
        self.before = self._look()

    def _look(self) -> dict[Path, tuple[int, int, int] | None]:
        return {path: _stamp(path) for source in self.paths for path in _files(source)}

    def fingerprint(self) -> list:
        """Name, bytes and time of the last write of every file."""
        return [[path.name, *stamp[:2]] for path, stamp in sorted(self.before.items()) if stamp]

    def check(self) -> None:
        """Raises InputsChanged if a file has changed or is gone."""
        now = self._look()
        changed = [p for p in {**self.before, **now} if self.before.get(p) != now.get(p)]
        if not changed:
            return
        left = [path for path in changed if now.get(path) is not None]
        stale = any(_makes_weights(path, self.paths) for path in left)
        names = first_few(map(str, changed))
        if left:
            raise InputsChanged(f"{names} changed during the run", stale)
        raise InputsChanged(f"{names} disappeared during the run", stale)

    def holds(self, path: str | Path | None) -> bool:
        """Whether a path is one of the inputs or inside one."""
        if path is None:
            return False
        path = Path(path)
        return any(source == path or source in path.parents for source in self.paths)


def _files(source: Path) -> list[Path]:
    """The files that a command reads from an input."""
    try:
        if not source.is_dir():
            return [source]
        found = [source / name for name in SETTINGS if (source / name).exists()]
        found += sorted(source.glob("*.safetensors"))
        if (source / "config.json").exists():  # nothing else in an adapter's folder is read
            found += extra_files(source)
    except OSError:  # the folder is being removed
        return []
    return found


def _makes_weights(path: Path, sources: list[Path]) -> bool:
    return path in sources or path.name in SETTINGS or path.suffix == ".safetensors"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
