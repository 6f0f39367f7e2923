"""Safetensors shards written tensor by tensor, in a folder that is moved into place when complete.

safetensors' own writer wants a whole shard in memory. The sizes of all tensors are known before the
first weight is read, so a shard's header is written first and each tensor goes to its place as it
is made: the peak is one layer. Format: https://github.com/huggingface/safetensors (8 bytes of
header length, JSON header, data).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..checks import count, size
from ..files import DTYPE_NAMES, INDEX
from .errors import CliError

CHUNK = 64 * 2**20  # bytes a write call takes at most; some systems refuse 2 GiB
STATE = "qlora_ext_progress.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, torch dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """Where every tensor of one file goes."""

    def __init__(self, filename: str, entries: list[Entry]):
        self.filename = filename
        # As safetensors orders them: wide dtypes first, so that every tensor is aligned.
        order = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        self.entries = {entry.name: entry for entry in order}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.offsets, end = {}, 0
        for entry in order:
            self.offsets[entry.name] = end
            end += entry.nbytes
            header[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [self.offsets[entry.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self.header) + end

    def is_whole(self, path: Path) -> bool:
        """Whether path holds this shard: moved into place complete, so size and header tell."""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return (
                os.fstat(file.fileno()).st_size == self.nbytes
                and file.read(len(self.header)) == self.header
            )
        return False


def plan_shards(units: list[list[Entry]], max_bytes: int) -> tuple[list[Shard], list[int]]:
    """Files of at most max_bytes, no unit (tensors made together) across two of them.

    Returns the shards, and the number of each unit's shard.
    """
    groups: list[list[Entry]] = [[]]
    where, filled = [], 0
    for unit in units:
        nbytes = sum(entry.nbytes for entry in unit)
        if groups[-1] and filled + nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += unit
        filled += nbytes
        where.append(len(groups) - 1)
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])], where
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ], where


class ShardWriter:
    """Writes one shard under a draft's name; `finish` gives it its own."""

    def __init__(self, folder: Path, shard: Shard):
        self.shard = shard
        self.path = folder / shard.filename
        self.draft = folder / f".{shard.filename}.draft"
        self.missing = set(shard.entries)
        self.file = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._reserve()
            self._write(0, memoryview(shard.header))
        except BaseException:
            self.close()
            raise

    def _reserve(self) -> None:
        """Takes the space of the whole shard: a full disk shows before a layer is converted."""
        try:
            os.posix_fallocate(self.file, 0, self.shard.nbytes)
        except AttributeError:  # not a system that has it
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self.file, data[:CHUNK], offset)
            offset, data = offset + written, data[written:]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        entry = self.shard.entries[name]
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise CliError(
                f"{name} became {tensor.dtype} {list(tensor.shape)}, planned was {entry.dtype} "
                f"{list(entry.shape)}: this is a fault of qlora-ext, please report it"
            )
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        offset = len(self.shard.header) + self.shard.offsets[name]
        if raw.numel():
            self._write(offset, memoryview(raw.numpy()))
        self.missing.discard(name)

    def finish(self) -> None:
        if self.missing:
            raise CliError(
                f"{self.shard.filename} lacks {sorted(self.missing)[:4]}: this is a fault of "
                "qlora-ext, please report it"
            )
        os.fsync(self.file)
        os.replace(self.draft, self.path)
        sync_folder(self.path.parent)

    def close(self) -> None:
        os.close(self.file)
        self.draft.unlink(missing_ok=True)  # after finish() there is none


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Output:
    """The folder `OUT.partial`, which becomes `OUT` when everything is in it.

    What it holds after an interruption is used again if the run is the same one: same command,
    settings, versions, input files and layout.
    """

    def __init__(self, out: Path, *, force: bool, restart: bool, inputs: tuple[Path, ...] = ()):
        self.out = Path(os.path.abspath(out))  # "." and ".." have no name to write beside
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.force, self.restart = force, restart
        self.lock: int | None = None
        for source in inputs:
            for written in (self.out.resolve(), self.folder.resolve()):
                if source.resolve() in (written, *written.parents):
                    raise CliError(f"{out} lies in the input {source}, want another folder")
                if written in source.resolve().parents:
                    raise CliError(f"{out} holds the input {source}, want another folder")
        if self.out.is_file():
            raise CliError(f"{out} is a file, want the name of a folder to make")
        if self.out.exists() and not force:
            raise CliError(f"{out} exists: name another folder, or replace it with --force")
        is_checkpoint = (self.out / "config.json").is_file()
        if self.out.exists() and any(self.out.iterdir()) and not is_checkpoint:
            raise CliError(
                f"{out} holds files and no config.json, so it is no checkpoint for --force to "
                "replace: name another folder"
            )

    def open(self, shards: list[Shard], run: dict) -> list[Shard]:
        """Makes or takes up the folder; returns the shards that are still to be written."""
        layout = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
        run = {**run, "layout": layout}
        state = self.folder / STATE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CliError(f"{self.folder} cannot be made ({error.strerror})") from None
        self._take_lock()
        if self.restart:
            self._empty()
        if state.exists():
            self._compare(state, run)
        else:
            if any(child.name != ".lock" for child in self.folder.iterdir()):
                raise CliError(
                    f"{self.folder} is in the way and not of an interrupted run: move it away, or "
                    "have it emptied with --restart"
                )
            write_text(state, json.dumps(run, indent=2))
        for leftover in self.folder.glob(".*.draft"):
            leftover.unlink()
        todo = [shard for shard in shards if not shard.is_whole(self.folder / shard.filename)]
        need = sum(shard.nbytes for shard in todo)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            kept = "" if len(todo) == len(shards) else "; the finished shards are kept"
            if not kept:
                self.discard()
            raise CliError(
                f"{self.out} needs {size(need)} more and its disk has {size(free)} free{kept}"
            )
        return todo

    @contextlib.contextmanager
    def at_once(self, run: dict) -> Iterator[Path]:
        """The folder, for a run of which nothing is used again: it starts empty, and is moved into
        place at the end, or removed after an error."""
        self.open([], run)
        try:
            self._empty(keep=(".lock", STATE))
            yield self.folder
            self.complete()
        except BaseException as error:
            self.discard()
            if isinstance(error, (OSError, SafetensorError)):
                raise CliError(f"{self.folder} cannot be written ({error})") from None
            raise

    def _take_lock(self) -> None:
        self.lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CliError(f"another run is writing {self.folder}: wait for it to end") from None

    def _compare(self, state: Path, run: dict) -> None:
        try:
            then = json.loads(state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            then = {}
        changed = [key for key in run if then.get(key) != run[key]]
        if changed:
            raise CliError(
                f"{self.folder} is of an interrupted run that differs from this one in "
                f"{', '.join(changed)}: repeat that run's command, or start over with --restart"
            )

    def _empty(self, keep: tuple[str, ...] = (".lock",)) -> None:
        for child in self.folder.iterdir():
            if child.name not in keep:
                shutil.rmtree(child) if child.is_dir() else child.unlink()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def complete(self) -> None:
        """Moves the folder into place."""
        for child in self.folder.iterdir():
            if child.is_file():
                with open(child, "rb") as file:
                    os.fsync(file.fileno())
        (self.folder / STATE).unlink()
        (self.folder / ".lock").unlink()
        sync_folder(self.folder)
        old = None
        if self.out.exists():
            # A name that nothing has: what is removed below is what was replaced here.
            old = Path(tempfile.mkdtemp(prefix=f"{self.out.name}.old-", dir=self.out.parent))
            self.out.rename(old / self.out.name)
        self.folder.rename(self.out)
        sync_folder(self.out.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def kept(self, shards: list[Shard]) -> str:
        """What a stopped run leaves, in words."""
        done = sum(shard.is_whole(self.folder / shard.filename) for shard in shards)
        return (
            f"{done} of {count(len(shards), 'shard')} are finished and kept in {self.folder}; the "
            "same command goes on from there"
        )


def write_text(path: Path, text: str) -> None:
    """Written aside and moved into place."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_index(folder: Path, shards: list[Shard], num_parameters: int) -> None:
    """transformers' index of a checkpoint of several files."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.filename for shard in shards for name in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries.values())
    metadata = {"total_parameters": num_parameters, "total_size": total}
    index = {"metadata": metadata, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
