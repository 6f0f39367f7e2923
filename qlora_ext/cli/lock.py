"""One run at a time writes a folder: the lock, and in its file what the run's last step does."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import stat
from pathlib import Path

from .errors import CliError
from .shards import sync_folder

RECORD = b'\n{"qlora_ext_run": '  # how a record begins; on a line of its own
MAX_BYTES = 2**26  # of all records; a million files in a checkpoint take half of it


@dataclasses.dataclass(frozen=True)
class Record:
    """What the last step of a run does, written before it is done."""

    qlora_ext_run: dict  # what the run must have in common with the one that goes on with it
    new: int  # inode number of the folder that becomes OUT
    files: dict[str, int]  # its files and their bytes
    old: int | None  # inode number of the folder that --force replaces
    emptied: bool = False  # of which nothing is left but the folder: its number may be used again

    def __post_init__(self):
        kinds = type(self.qlora_ext_run), type(self.new), type(self.files)
        if kinds != (dict, int, dict):  # a file may hold anything
            raise TypeError(f"no record: {kinds}")

    def is_new(self, path: Path) -> bool:
        """Whether a path is the folder that becomes OUT, or has become it, and is whole."""
        return inode(path) == self.new and self.files.items() <= sizes(path).items()

    def is_old(self, path: Path) -> bool:
        return self.old is not None and inode(path) == self.old


class Lock:
    """A file that one run at a time holds; it also keeps the record of that run's last step.

    The holder removes the file before it lets go. Another run may have opened it before that, and
    then gets the lock of a file without a name: it sees that, and opens the name again.

    Raises:
        CliError: another run holds it, or the file is somebody else's, or cannot be made.
    """

    def __init__(self, path: Path, out: Path):
        self.path = path
        while True:
            self.file = self._open()
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._has_name():
                    break
            except BlockingIOError:
                self.close()
                raise CliError(f"another run is writing {out}: wait for it to end") from None
            except OSError as error:
                self.close()
                raise CliError(
                    f"{path} cannot be locked ({error.strerror}): name a folder on another disk"
                ) from None
            self.close()
        is_small = os.fstat(self.file).st_size <= MAX_BYTES
        text = os.pread(self.file, len(RECORD), 0)
        if not is_small or not RECORD.startswith(text):
            self.close()
            raise CliError(f"{path} was not made by qlora-ext, which needs that name: move it away")

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise CliError(f"{self.path} cannot be made ({error.strerror})") from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise CliError(f"{self.path} is not a file: move it away")
        return file

    def _has_name(self) -> bool:
        try:
            named = os.lstat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self.file))

    def record(self) -> Record | None:
        """The last record that is whole."""
        size = min(os.fstat(self.file).st_size, MAX_BYTES)  # pread takes memory for all it may read
        for line in reversed(os.pread(self.file, size, 0).splitlines()):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                return Record(**json.loads(line))
        return None

    def write(self, record: Record) -> None:
        """Appends a record; an older one stays whole if this one does not get to the disk."""
        text = b"\n" + json.dumps(dataclasses.asdict(record)).encode() + b"\n"
        end = os.fstat(self.file).st_size
        if os.pwrite(self.file, text, end) != len(text):
            raise OSError(f"{self.path} cannot be written whole: is the disk full?")
        os.fsync(self.file)
        sync_folder(self.path.parent)

    def remove(self) -> None:
        os.unlink(self.path)
        self.close()

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def inode(path: Path) -> int | None:
    """Of a folder; None if there is none, or something else."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            return found.st_ino
    return None


def sizes(folder: Path) -> dict[str, int]:
    """Of the files in a folder, by name."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        return {f.name: f.stat().st_size for f in found if f.is_file(follow_symlinks=False)}
    return {}
