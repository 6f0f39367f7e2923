"""The lock that lets one run at a time write a folder; its file records the run's last step."""

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

RECORD = b'\n{"qlora_ext_run": '  # the beginning of a record, which is one line
MAX_BYTES = 2**26  # for all records; a checkpoint with a million files takes half of it


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run does in its last step, written before that step begins."""

    qlora_ext_run: dict  # the run's settings; a run that continues it must have the same
    new: int  # inode number of the folder that becomes OUT
    files: dict[str, int]  # its files and their sizes in bytes
    old: int | None  # inode number of the folder that --force replaces
    emptied: bool = False  # the old folder is empty; once it is removed, its number may be reused

    def __post_init__(self):
        kinds = type(self.qlora_ext_run), type(self.new), type(self.files)
        if kinds != (dict, int, dict):  # a file may hold anything
            raise TypeError(f"not a record: {kinds}")

    def is_new(self, path: Path) -> bool:
        """Whether path is the folder that becomes or became OUT, with all its files."""
        return inode(path) == self.new and self.files.items() <= sizes(path).items()

    def is_old(self, path: Path) -> bool:
        return self.old is not None and inode(path) == self.old


class Lock:
    """A file that one run at a time holds. It also stores the record of that run's last step.

    The holder removes the file before it releases the lock. Another run that had opened the file
    by then gets the lock of a removed file. It notices that and opens the name again.

    Raises:
        CliError: another run holds it, the file is not ours, or it cannot be made.
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
            raise CliError(
                f"{self.path} cannot be made ({error.strerror}): name another folder"
            ) from None
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
        """The last complete record, or None."""
        size = min(os.fstat(self.file).st_size, MAX_BYTES)  # pread allocates this many bytes
        for line in reversed(os.pread(self.file, size, 0).splitlines()):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                return Record(**json.loads(line))
        return None

    def write(self, record: Record) -> None:
        """Appends a record. An older one stays whole if this one does not reach the disk."""
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
    """The inode number of a folder; None if path is missing or not a folder."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            return found.st_ino
    return None


def sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files in a folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        return {f.name: f.stat().st_size for f in found if f.is_file(follow_symlinks=False)}
    return {}
