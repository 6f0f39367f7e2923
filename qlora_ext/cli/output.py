"""Makes the folder OUT of a command as `OUT.partial`, and renames it when it is complete.

Next to OUT a run uses only these names:

    OUT.partial       the unfinished folder; STATE in it says which run makes it
    OUT.partial.lock  held by the run from start to end; see Lock
    OUT.partial.old   the folder that --force replaces, briefly, if names cannot be exchanged

A run can be killed between any two file operations; the next run into OUT then repairs the state.
It recognises folders by their inode numbers, which do not change when a folder is renamed. Before
the last step, the numbers of the new folder and of the replaced one are written into the lock's
file (a `record`). So a run only removes the folder that --force replaced, never someone else's.

This file is longer than others because it both writes and repairs each state of the folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..files import read_json
from ..text import CheckpointError, first_few, format_bytes, plural
from .errors import CliError
from .inputs import Inputs, InputsChanged
from .lock import Lock, Record, inode, sizes
from .rename import exchange, rename_new
from .shards import Shard, sync_folder, write_text

STATE = "qlora_ext_progress.json"
MAX_LINKS = 40  # Linux's own
# Subfolders of a checkpoint: transformers' templates, and those that model hubs add.
SUBFOLDERS = {"additional_chat_templates", "original", "onnx", "openvino", ".cache"}


class Output(contextlib.AbstractContextManager):
    """The folder `OUT.partial`, which becomes `OUT` when it is complete.

    After an interruption, the same run (same command, settings, versions, input files and layout)
    uses its contents again.

    Args:
        out: the folder to make; its parents are made too.
        force: replace a checkpoint that is there.
        restart: use nothing from an interrupted run.
        inputs: folders and files that the command reads. Their state is recorded here, so make
            this object before reading any of them; see check_inputs.

    Raises:
        CliError: OUT cannot be made or replaced, or another run is writing it.
    """

    def __init__(self, out: Path, *, force: bool, restart: bool, inputs: Iterable[Path] = ()):
        self.out = _absolute(out)
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.aside = self.out.with_name(f"{self.out.name}.partial.old")
        lock = self.out.with_name(f"{self.out.name}.partial.lock")
        self.force, self.restart = force, restart
        self.lock: Lock | None = None
        self.run: dict = {}  # settings; a run that this one continues must have the same
        self.in_place = False  # whether OUT is a complete result, according to the lock's file
        self.taken = False  # whether OUT.partial belongs to this run
        self.made_parents: list[Path] = []
        self.inputs = Inputs(inputs)
        for source in self.inputs.paths:
            self._check_apart(source)
        if not os.path.lexists(lock):  # otherwise an interrupted run may just have made OUT
            self._check_out()
        self._make_parents()
        try:
            self.lock = Lock(lock, self.out)
            self._recover()
            if not self.in_place:
                self._check_out()
        except OSError as error:
            self.close()
            raise CliError(
                f"{self.out} cannot be made ({_reason(error)}): name another folder"
            ) from None
        except BaseException:
            self.close()
            raise

    def _check_apart(self, source: Path) -> None:
        for written in map(_real, (self.out, self.folder, self.aside)):
            if _real(source) in (written, *written.parents):
                raise CliError(f"{self.out} lies in the input {source}, want another folder")
            if written in _real(source).parents:
                raise CliError(f"{self.out} holds the input {source}, want another folder")
            for path in _entries(source):
                for place in _places(path):
                    if written == place or written in place.parents:
                        raise CliError(
                            f"{self.out} holds the input {path}, which is a link to {place}: want "
                            "another folder"
                        )

    def _check_out(self) -> int | None:
        """The inode number of OUT; None if it does not exist. Raises CliError if it must not be
        replaced."""
        try:
            mode = os.lstat(self.out).st_mode
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CliError(
                f"{self.out} cannot be made ({error.strerror}): name another folder"
            ) from None
        if stat.S_ISLNK(mode):
            raise CliError(
                f"{self.out} is a symbolic link to {os.readlink(self.out)}: name that folder, or "
                "another"
            )
        if not stat.S_ISDIR(mode):
            raise CliError(f"{self.out} is a file, want the name of a folder to make")
        if not self.force:
            raise CliError(f"{self.out} exists: name another folder, or replace it with --force")
        if os.path.ismount(self.out):
            raise CliError(
                f"{self.out} is a mount point, which cannot be replaced: name a folder in it"
            )
        try:
            self._check_is_checkpoint()
        except OSError as error:
            raise CliError(f"{self.out} cannot be read ({error.strerror})") from None
        return inode(self.out)

    def _check_is_checkpoint(self) -> None:
        """Raises CliError unless OUT is empty, or holds a checkpoint and only usual subfolders."""
        with os.scandir(self.out) as found:
            entries = list(found)
        if not entries:
            return
        path, what = self.out / "config.json", None
        if not path.is_file():
            what = "holds files and no config.json"
        elif not any(entry.name.endswith(".safetensors") for entry in entries):
            try:
                config = read_json(path)
            except CheckpointError:
                config = {}
            if not {"model_type", "architectures"} & config.keys():
                what = "has a config.json that names no model, and no safetensors file"
        if what is not None:
            raise CliError(
                f"{self.out} {what}; --force replaces only checkpoints: name another folder"
            )
        folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
        if strange := folders - SUBFOLDERS:
            raise CliError(
                f"{self.out} holds {plural(len(strange), 'folder')} that no checkpoint has "
                f"({first_few(strange)}), so --force does not replace it: move them away, or name "
                "another folder"
            )

    def _make_parents(self) -> None:
        missing = [p for p in self.out.parents if not p.exists()]
        for parent in reversed(missing):
            try:
                parent.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                self.close()
                raise CliError(
                    f"{parent} cannot be made ({error.strerror}): name another folder"
                ) from None
            self.made_parents.append(parent)

    def _recover(self) -> None:
        """Finishes the last step of a run that was killed in it."""
        record = self.lock.record()
        if record is None:
            return
        if record.is_old(self.aside) and not record.is_new(self.out):
            # It was killed between the two renames, so OUT is missing.
            source = self.folder if record.is_new(self.folder) else self.aside
            try:
                rename_new(source, self.out)
            except FileExistsError:
                raise CliError(
                    f"{self.out} was made while a run was replacing it. What it held before is in "
                    f"{self.aside}, the new checkpoint in {self.folder}: move {self.out} away and "
                    "give the same command again"
                ) from None
            sync_folder(self.out.parent)
        if record.is_new(self.out):
            self._remove_old(record)
            self.in_place = True

    def open(self, shards: list[Shard], run: dict, *, reuse: bool = True) -> list[Shard]:
        """Makes the folder, or takes over an interrupted run's. Returns the shards still to write.

        If the same run was killed in its last step, this finishes it. Then `in_place` is True, and
        nothing is left to do.

        Args:
            run: settings, JSON values by name. Only a run with the same ones is continued.
            reuse: False for a run that uses nothing of an interrupted one. Then only the command
                must be the same.
        """
        layout = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
        # Convert it through JSON, so that it can be compared with what is read from a file.
        self.run = json.loads(json.dumps({**run, "layout": layout}))
        record = self.lock.record()
        same = record is not None and not _differences(record.qlora_ext_run, self.run)
        if self.in_place:
            if same:
                return []
            self.in_place = False
            self._check_out()
        elif same and not self.restart and self._is_finished(record):
            self.check_inputs()
            self._put_into_place()
            return []
        self._take_folder(None if reuse else ["command"])
        todo = [shard for shard in shards if not shard.is_whole(self.folder / shard.filename)]
        need = sum(shard.nbytes for shard in todo)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            kept = "" if len(todo) == len(shards) else "; the finished shards are kept"
            if not kept:
                self.discard()
            raise CliError(
                f"{self.out} needs {format_bytes(need)} more, but its disk has "
                f"{format_bytes(free)} free{kept}: free some space, or name another disk"
            )
        return todo

    def _take_folder(self, keys: list[str] | None) -> None:
        """Makes OUT.partial or takes it over, with STATE in it and no half-written files.

        keys: names of the settings that an interrupted run must have had, too. None means all.
        """
        state = self.folder / STATE
        try:
            self.folder.mkdir()
        except FileExistsError:
            if not self._is_ours():
                raise CliError(
                    f"{self.folder} already exists and was not left by an interrupted run: move "
                    "it away"
                ) from None
            self._take_over(keys)
        except OSError as error:
            raise CliError(
                f"{self.folder} cannot be made ({error.strerror}): name another folder"
            ) from None
        if not state.exists():
            write_text(state, json.dumps(self.run, indent=2))
        self.taken = True

    def _take_over(self, keys: list[str] | None) -> None:
        then = self._interrupted_run()
        if then is not None and not self.restart:
            changed = _differences(then, self.run, keys)
            if changed:
                raise CliError(
                    f"{self.folder} is from an interrupted run that differs from this one in "
                    f"{', '.join(changed)}: repeat that run's command, or start over with --restart"
                )
            rest = then.get("rest")
            for name in rest if isinstance(rest, list) else ():
                if name in os.listdir(self.folder):
                    (self.folder / name).unlink()
        elif then is not None:
            if not (self.folder / STATE).exists():  # it tells whose folder this is
                write_text(self.folder / STATE, json.dumps(then))
            self._empty()
        for leftover in self.folder.glob(".*.draft"):
            leftover.unlink()

    def _is_ours(self) -> bool:
        """Whether a run made OUT.partial, judged by its contents or by the record."""
        if inode(self.folder) is None:  # a file or a link
            return False
        names = set(os.listdir(self.folder))
        if STATE in names or names <= {f".{STATE}.draft"}:
            return True
        record = self.lock.record()
        return record is not None and self._is_finished(record)

    def _is_finished(self, record: Record) -> bool:
        """Whether OUT.partial is the complete result of the record's run."""
        return record.is_new(self.folder) and not (self.folder / STATE).exists()

    def _interrupted_run(self) -> dict | None:
        """The settings of the run that made OUT.partial; None if it had written nothing."""
        if not os.path.lexists(self.folder / STATE):
            # It had written nothing, or it had removed STATE before its last step.
            record = self.lock.record()
            finished = record is not None and self._is_finished(record)
            return record.qlora_ext_run if finished else None
        try:
            return read_json(self.folder / STATE)
        except CheckpointError:  # STATE is damaged
            return {}

    @contextlib.contextmanager
    def at_once(self, run: dict) -> Iterator[Path | None]:
        """A context with the folder, for a run that is never continued. The folder starts empty. It
        is moved into place at the end, or removed after an error. The context gives None if OUT is
        complete already, because the same run was killed in its last step.

        Args:
            run: as in `open`; the inputs are added.
        """
        try:
            self.open([], {**run, "input": self.inputs.fingerprint()}, reuse=False)
            if not self.in_place:
                self._empty(keep=(STATE,))
        except OSError as error:
            raise CliError(f"{self.folder} cannot be written ({_reason(error)})") from None
        if self.in_place:
            yield None
            return
        try:
            yield self.folder
            self.complete()
        except BaseException as error:
            if self.is_recorded():  # only the last rename is missing
                raise
            self.discard()
            if isinstance(error, Exception):
                try:
                    self.check_inputs()
                except InputsChanged as changed:
                    raise CliError(f"{changed}: give the same command again") from None
            if self._is_of_inputs(error):
                raise CliError(f"the input cannot be read ({error})") from None
            if isinstance(error, (OSError, SafetensorError)):
                raise CliError(f"{self.folder} cannot be written ({error})") from None
            raise

    def _is_of_inputs(self, error: BaseException) -> bool:
        if isinstance(error, SafetensorError):
            return "deserializ" in str(error)
        return (
            isinstance(error, OSError) and not is_full(error) and self.inputs.holds(error.filename)
        )

    def is_recorded(self) -> bool:
        """Whether this run has reached its last step."""
        record = self.lock.record()
        return record is not None and record.qlora_ext_run == self.run and (
            self._is_finished(record) or record.is_new(self.out)
        )  # fmt: skip

    def check_inputs(self) -> None:
        """Raises InputsChanged if an input file has changed since the run began."""
        self.inputs.check()

    def announce(self, names: Iterable[str]) -> None:
        """Notes the files that will be written besides the shards. A run that continues this one
        removes them first, because the input may no longer have some of them."""
        then = {**self.run, "rest": sorted(names)}
        write_text(self.folder / STATE, json.dumps(then, indent=2))

    def _empty(self, keep: tuple[str, ...] = ()) -> None:
        """Removes the folder's contents. STATE, which tells whose folder this is, goes last."""
        _empty(self.folder, keep=(*keep, STATE))
        if STATE not in keep:
            (self.folder / STATE).unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes OUT.partial if this run made it or took it over."""
        with contextlib.suppress(OSError):
            if self.taken:
                self._empty()
                self.folder.rmdir()

    def complete(self) -> None:
        """Moves the folder into place.

        Raises:
            InputsChanged: an input has changed since it was read.
            CliError: OUT has appeared meanwhile, or cannot be replaced. The folder is kept; `open`
                puts it into place when the same run is started again.
        """
        for path, _, names in os.walk(self.folder):
            for name in names:
                with open(os.path.join(path, name), "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(path))
        self.check_inputs()
        self._put_into_place()

    def _put_into_place(self) -> None:
        """The last step: writes the record, puts OUT into place, removes the replaced folder."""
        files = {name: nbytes for name, nbytes in sizes(self.folder).items() if name != STATE}
        record = Record(self.run, inode(self.folder), files, inode(self.out))
        self.lock.write(record)
        (self.folder / STATE).unlink(missing_ok=True)
        sync_folder(self.folder)
        try:
            if not self.force and os.path.lexists(self.out):
                raise FileExistsError
            if self._check_out() != record.old:
                raise FileExistsError
            self._place(record)
        except CliError as error:
            raise CliError(f"{error}. The finished checkpoint is kept in {self.folder}") from None
        except FileExistsError:
            raise CliError(
                f"{self.out} appeared during the run and was left alone; the finished checkpoint "
                f"is kept in {self.folder}: move {self.out} away and give the same command again"
            ) from None
        except OSError as error:
            raise CliError(
                f"{self.out} cannot be put into place ({_reason(error)}); the finished checkpoint "
                f"is kept in {self.folder}: move {self.out} away, if it is there, and give the "
                "same command again"
            ) from None
        sync_folder(self.out.parent)
        self._remove_old(record)
        self.in_place = True

    def _place(self, record: Record) -> None:
        if record.old is None:
            rename_new(self.folder, self.out)
        elif exchange(self.folder, self.out):
            if not record.is_old(self.folder):  # another folder came in between
                exchange(self.folder, self.out)
                raise FileExistsError
        else:
            if os.path.lexists(self.aside):
                raise CliError(f"{self.aside} exists, but its name is needed: move it away")
            rename_new(self.out, self.aside)
            if not record.is_old(self.aside):
                rename_new(self.aside, self.out)
                raise FileExistsError
            rename_new(self.folder, self.out)

    def _remove_old(self, record: Record) -> None:
        """Removes the replaced folder, which is now OUT.partial or OUT.partial.old."""
        for path in filter(record.is_old, (self.folder, self.aside)):
            try:
                if not record.emptied:
                    _empty(path)
                    # Once the folder is removed, someone else's may get its inode number.
                    self.lock.write(dataclasses.replace(record, emptied=True))
                path.rmdir()
            except OSError as error:
                if record.emptied:  # by now it is someone else's folder
                    return
                raise CliError(
                    f"{self.out} is complete; what it held before is in {path} and cannot be "
                    f"removed ({_reason(error)}): remove it, or give the same command again"
                ) from None
            sync_folder(path.parent)

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock. The lock's file stays if the next run needs its record."""
        if self.lock is not None:
            record = self.lock.record()
            old = record and not record.emptied and any(
                map(record.is_old, (self.folder, self.aside))
            )  # fmt: skip
            if not record or not (old or self._is_finished(record)):
                with contextlib.suppress(OSError):
                    self.lock.remove()
            self.lock.close()
            self.lock = None
        while self.made_parents:
            with contextlib.suppress(OSError):  # not empty: the result is there
                self.made_parents.pop().rmdir()

    def kept(self, shards: list[Shard]) -> str:
        """A text that says what a stopped run leaves."""
        if self.is_recorded():
            return "only the last step is missing, and the same command does it"
        if not self.taken:
            return "nothing was written yet"
        done = sum(shard.is_whole(self.folder / shard.filename) for shard in shards)
        return (
            f"{done} of {plural(len(shards), 'shard')} are finished and kept in {self.folder}; "
            "give the same command again to continue"
        )


def _absolute(path: Path) -> Path:
    """The folder's absolute path with links in its parents resolved, but not in its last part."""
    path = Path(path)
    if path.name in ("", ".."):  # "." and "/" have no name, so nothing could be written next to it
        path = _real(path)
    if not path.name:
        raise CliError(f"{path} cannot be replaced: name a folder in it")
    return _real(path.parent) / path.name


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _entries(source: Path) -> list[Path]:
    """An input, and its contents if it is a folder."""
    with contextlib.suppress(OSError):
        if source.is_dir():
            return [source, *sorted(source.iterdir())]
    return [source]


def _places(path: Path) -> Iterator[Path]:
    """The targets of a chain of links, one after another, because each of them is needed."""
    for _ in range(MAX_LINKS):
        if not path.is_symlink():
            return
        path = path.parent / os.readlink(path)
        path = _real(path.parent) / path.name
        yield path


def _empty(folder: Path, keep: tuple[str, ...] = ()) -> None:
    for child in folder.iterdir():
        if child.name not in keep:
            is_folder = child.is_dir() and not child.is_symlink()
            shutil.rmtree(child) if is_folder else child.unlink()


def _differences(then: dict, run: dict, keys: Iterable[str] | None = None) -> list[str]:
    return [key for key in (run if keys is None else keys) if then.get(key) != run[key]]


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk is full, even if it names the file that a copy reads."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
