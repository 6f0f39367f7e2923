"""Writes files that are either whole or absent: to a temporary name, flushed, then renamed.

A full disk, a missing directory or a kill while writing leaves what was there before.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

KEPT = 2  # the newest checkpoint, and one more in case that one cannot be read


def write_file(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step; OSError leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Calls `fill(folder)` on an empty folder next to `path`, then renames it to `path`.

    If anything is raised, the folder that was at `path` before is there again. A kill between the
    two renames leaves it next to `path`, as `.NAME.old`, and the next call first puts it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not path.exists():
        old.rename(path)
    partial.mkdir()
    try:
        fill(partial)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():  # else `old` holds the only whole one
            shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(folder: Path, state: dict) -> Path:
    """Writes `state` (tensors, numbers, strings, and dicts and lists of them) as the newest
    checkpoint, named by state["step"], and removes all but the newest `KEPT`."""
    # To memory first: torch.save straight to a full disk raises no OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{state['step']:06d}.pt"
    write_file(path, buffer.getvalue())
    for older in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        older.unlink(missing_ok=True)
    return path


def load_newest(folder: Path) -> tuple[dict, Path] | None:
    """The newest checkpoint that can be read, and its path; None if there is none."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, weights_only=True, map_location="cpu"), path
        except Exception as e:  # a damaged file can make the reader raise anything
            print(f"{path} cannot be read ({type(e).__name__}); trying the one before it")
    return None
