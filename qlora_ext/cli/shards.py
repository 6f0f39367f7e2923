"""Writes safetensors shards tensor by tensor.

safetensors' own writer needs a whole shard in memory. But the sizes of all tensors are known before
the first weight is read. So this file writes a shard's header first, and then each tensor in its
place as soon as it is made. Peak memory is one layer. Format:
https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import torch

from ..files import DTYPE_NAMES, INDEX, check_file
from ..text import CheckpointError
from .errors import CliError

CHUNK = 64 * 2**20  # most bytes per write call; some systems refuse 2 GiB


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, torch dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """The layout of one file: its header and the place of every tensor."""

    def __init__(self, filename: str, entries: list[Entry]):
        self.filename = filename
        # safetensors' order: wide dtypes first, so that every tensor is aligned.
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
        """Whether path holds this shard. A complete file was renamed to it, so size and header
        suffice."""
        with contextlib.suppress(OSError, CheckpointError):
            if check_file(path) == self.nbytes:  # check_file refuses pipes, which could block
                with open(path, "rb") as file:
                    return file.read(len(self.header)) == self.header
        return False


def plan_shards(units: list[list[Entry]], max_bytes: int) -> tuple[list[Shard], list[int]]:
    """Divides units into files of about max_bytes. A unit is a list of tensors that are made
    together; it is never split, and one larger than max_bytes gets its own file.

    Returns the shards, and for each unit the number of its shard.
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
    """Writes one shard under a temporary name. `finish` gives it its final name."""

    def __init__(self, folder: Path, shard: Shard):
        self.shard = shard
        self.path = folder / shard.filename
        self.draft = folder / f".{shard.filename}.draft"
        self.missing = set(shard.entries)
        self.file = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._reserve()
            self._write(0, memoryview(shard.header))
        except BaseException:
            self.close()
            raise

    def _reserve(self) -> None:
        """Reserves disk space for the whole shard, so that a full disk shows at once."""
        try:
            os.posix_fallocate(self.file, 0, self.shard.nbytes)
        except AttributeError:  # this system lacks the call
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self.file, data[:CHUNK], offset)
            offset, data = offset + written, data[written:]

    def write(self, name: str, tensor: torch.Tensor, number: int | None = None) -> None:
        """Writes a tensor, or its slice [number : number + 1] if a number is given. Slices must be
        written in order, because the last one completes the tensor."""
        entry = self.shard.entries[name]
        offset = len(self.shard.header) + self.shard.offsets[name]
        is_last = True
        if number is not None:
            count = entry.shape[0]
            entry = dataclasses.replace(entry, shape=(1, *entry.shape[1:]))
            offset += number * entry.nbytes
            is_last = number == count - 1
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise CliError(
                f"{name} became {tensor.dtype} {list(tensor.shape)}, want {entry.dtype} "
                f"{list(entry.shape)} as planned: this is a bug of qlora-ext, please report it"
            )
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        if raw.numel():
            self._write(offset, memoryview(raw.numpy()))
        if is_last:
            self.missing.discard(name)

    def finish(self) -> None:
        if self.missing:
            raise CliError(
                f"{self.shard.filename} lacks {sorted(self.missing)[:4]}: this is a bug of "
                "qlora-ext, please report it"
            )
        os.fsync(self.file)
        os.replace(self.draft, self.path)
        sync_folder(self.path.parent)

    def close(self) -> None:
        os.close(self.file)
        self.draft.unlink(missing_ok=True)  # finish() has renamed it


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes text to a temporary file and renames it to path."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with open(draft, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_index(folder: Path, shards: list[Shard], num_parameters: int) -> None:
    """Writes transformers' index if the checkpoint has several files."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.filename for shard in shards for name in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries.values())
    metadata = {"total_parameters": num_parameters, "total_size": total}
    index = {"metadata": metadata, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
