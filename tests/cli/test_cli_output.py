"""OUT of quantize and merge: a kill before every file operation, two runs at once, folders that
others make meanwhile, inputs that change. What is there is never lost, and the same command goes on
to the result of an undisturbed run, byte for byte."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qlora_ext
import tiny_models
from integration_helpers import tiny_tokenizer
from qlora_ext.cli import app, lock, output, rename
from qlora_ext.cli.errors import CliError
from warm_commands import Warm

slow = pytest.mark.slow
LAST_RENAME = "rename out.partial"


def tree(folder):
    """Everything in a folder: bytes of files, targets of links, None for folders; None if there is
    no folder."""
    folder = Path(folder)
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink():
        return os.readlink(folder)
    if folder.is_file():
        return folder.read_bytes()
    return {p.relative_to(folder).as_posix(): None if p.is_dir() and not p.is_symlink() else tree(p)
            for p in folder.rglob("*")}  # fmt: skip


class World:
    """Inputs, commands on them, the warm process that runs them."""

    def __init__(self, folder):
        self.folder, self.counter = folder, 0
        model = tiny_models.make("llama", torch.bfloat16, vocab_size=256, num_hidden_layers=1)
        model.save_pretrained(folder / "in", max_shard_size="60KB")
        tiny_tokenizer(folder / "in")
        (folder / "text.txt").write_text("some words that the model is for " * 40)
        self.warm = Warm()
        self.warm.imports("quantize", folder / "in", folder / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        qlora_ext.add_lora(base, qlora_ext.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for name, parameter in base.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.02)
        qlora_ext.save_adapter(base, folder / "adapter")
        for path in (folder / "in").glob("tokenizer*"):
            shutil.copy(path, folder / "adapter")
        self.warm.imports("merge", folder / "base", folder / "adapter", folder / "merged")
        self.undisturbed = {}

    def fresh(self, force=False):
        """A folder for OUT and what is next to it; with a checkpoint at OUT if `force`."""
        self.counter += 1
        parent = self.folder / f"run-{self.counter}"
        parent.mkdir()
        if force:
            (parent / "out" / "original").mkdir(parents=True)
            (parent / "out" / "config.json").write_text("{}")
            (parent / "out" / "model.safetensors").write_bytes(b"old weights")
            (parent / "out" / "original" / "params.json").write_text("old")
            (parent / "out" / "link").symlink_to(self.folder / "in")
        return parent

    def run(self, command, parent, *more, inputs=None, **settings):
        inputs = inputs or self.folder
        argv = {
            "quantize": [inputs / "in", parent / "out", "--max-shard-size", "60KB"],
            "merge": [inputs / "base", inputs / "adapter", parent / "out",
                      "--max-shard-size", "90KB"],
            "calibrate": [inputs / "base", inputs / "adapter", parent / "out",
                          "--calibration", inputs / "text.txt"],
            "own text": [inputs / "base", inputs / "adapter", parent / "out", "--own-text"],
        }  # fmt: skip
        name = "quantize" if command == "quantize" else "merge"
        return self.warm.run(name, *argv[command], *more, within=parent, **settings)

    def reference(self, command, *more, **settings):
        """The operations of an undisturbed run and what it makes."""
        key = command, more, tuple(settings.items())
        if key not in self.undisturbed:
            parent = self.fresh("--force" in more)
            run = self.run(command, parent, *more, **settings)
            assert run["status"] == 0, run["said"]
            assert os.listdir(parent) == ["out"]
            assert (
                command in ("calibrate", "own text")
                or len(list(parent.glob("out/model-*-of-00002*"))) == 2
            )
            self.undisturbed[key] = run["operations"], tree(parent / "out")
        return self.undisturbed[key]

    def check_goes_on(self, command, parent, *more, **settings):
        """The same command ends with the complete result and leaves nothing next to it."""
        again = self.run(command, parent, *more, **settings)
        assert again["status"] == 0, again["said"]
        settings.pop("inputs", None)
        assert tree(parent / "out") == self.reference(command, *more, **settings)[1]
        assert os.listdir(parent) == ["out"]
        return again


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.warm.close()


# Kills --------------------------------------------------------------------------------------------

MODES = {
    "plain": ((), {}),
    "force": (("--force",), {}),
    # Where the file system or the C library has no renameat2.
    "plain, os.rename": ((), {"renameat2": False}),
    "force, os.rename": (("--force",), {"renameat2": False}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("command", ["quantize", "merge"])
@pytest.mark.parametrize("which", ["first and last", pytest.param("the others", marks=slow)])
def test_killed_before_each_operation(world, command, mode, which):
    """OUT is what it was or the complete result, and the same command goes on."""
    more, settings = MODES[mode]
    operations, complete = world.reference(command, *more, **settings)
    assert any(line == LAST_RENAME for line in operations)
    numbers = list(range(1, len(operations) + 1))
    at_the_ends = numbers[:8] + numbers[-20:] if settings == {} else numbers[-12:]
    if which == "the others":
        numbers = [number for number in numbers if number not in at_the_ends]
    else:
        numbers = at_the_ends
    missing = 0
    for number in numbers:
        parent = world.fresh("--force" in more)
        before = tree(parent / "out")
        killed = world.run(command, parent, *more, before=number, **settings)
        assert killed["status"] == -9, killed["said"]
        now = tree(parent / "out")
        if now is None and before is not None:
            missing += 1
            assert tree(parent / "out.partial.old") == before
        else:
            assert now in (before, complete), operations[number - 1]
        world.check_goes_on(command, parent, *more, **settings)
        shutil.rmtree(parent)
    # Two renames, where names cannot be exchanged: OUT is missing between them.
    assert missing == (mode == "force, os.rename" and which == "first and last")


@slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_killed_again_while_it_goes_on(world, command, mode):
    """Sixty pairs of kills: at the end of a run, and anywhere in the run that goes on."""
    more, settings = MODES[mode]
    operations, complete = world.reference(command, *more, **settings)
    draw = random.Random(0)
    killed_twice = 0
    for _ in range(60):
        parent = world.fresh("--force" in more)
        before = tree(parent / "out")
        first = len(operations) - draw.randrange(24)
        assert world.run(command, parent, *more, before=first, **settings)["status"] == -9
        again = world.run(command, parent, *more, before=draw.randrange(1, 25), **settings)
        assert again["status"] in (0, -9), again["said"]
        killed_twice += again["status"] == -9
        missing = mode == "force, os.rename" and tree(parent / "out.partial.old") == before
        assert missing or tree(parent / "out") in (before, complete)
        if again["status"] == -9:
            world.check_goes_on(command, parent, *more, **settings)
        shutil.rmtree(parent)
    assert killed_twice > 20


@pytest.mark.parametrize("mode", ["plain", "force"])
def test_merge_by_text_killed_in_its_last_operations(world, mode):
    """What the model wrote is not made again once it is whole."""
    more, settings = MODES[mode]
    operations, complete = world.reference("calibrate", *more, **settings)
    at = operations.index(LAST_RENAME) + 1
    for number in (at - 12, at, at + 1, len(operations)):
        parent = world.fresh("--force" in more)
        before = tree(parent / "out")
        killed = world.run("calibrate", parent, *more, before=number)
        assert killed["status"] == -9
        assert tree(parent / "out") == (complete if number > at else before)
        again = world.check_goes_on("calibrate", parent, *more)
        assert ("is complete: an interrupted run" in again["said"]) == (number >= at)


def test_the_lock_holds_no_record_that_is_torn(world):
    """Killed while the record was written: it does not count, and a later one does."""
    operations, _ = world.reference("quantize")
    parent = world.fresh()
    number = operations.index("pwrite out.partial.lock") + 1
    assert world.run("quantize", parent, before=number)["status"] == -9
    torn = (parent / "out.partial.lock").read_bytes()
    assert torn.startswith(lock.RECORD) and not torn.endswith(b"\n")
    world.check_goes_on("quantize", parent)


@pytest.mark.parametrize("text", ["{}", '{"new": null, "files": {}, "old": null}', "{", "[1]", "7"])
def test_a_record_that_is_none_counts_for_nothing(world, text):
    parent = world.fresh()
    path = parent / "out.partial.lock"
    path.write_bytes(lock.RECORD + b"1}\n" + lock.RECORD + b"{}}\n" + f"\n{text}\n".encode())
    held = lock.Lock(path, parent / "out")
    assert held.record() is None
    held.close()
    if text == "{}":
        world.check_goes_on("quantize", parent)


def test_a_deep_record_counts_for_nothing(world):
    parent = world.fresh()
    (parent / "out.partial.lock").write_bytes(lock.RECORD + b"[" * 10**5 + b"\n")
    world.check_goes_on("quantize", parent)


@pytest.mark.parametrize("name", ["out.partial.lock", f"out.partial/{output.STATE}"])
def test_what_is_too_large_to_be_a_runs_is_not_read(world, name):
    """A sparse file of 1 TiB that begins as a record does."""
    parent = world.fresh()
    (parent / name).parent.mkdir(exist_ok=True)
    with open(parent / name, "wb") as file:
        file.write(lock.RECORD)
        file.truncate(2**40)
    text = said("quantize", world.folder / "in", parent / "out")
    assert "move it away" in text or "start over with --restart" in text
    assert (parent / name).stat().st_size == 2**40


@pytest.mark.parametrize("name", [output.STATE, "model-00001-of-00002.safetensors"])
def test_a_pipe_in_a_stopped_run_is_not_waited_for(world, name):
    operations, _ = world.reference("quantize")
    parent = world.fresh()
    assert world.run("quantize", parent, before=half_way(operations))["status"] == -9
    (parent / "out.partial" / name).unlink(missing_ok=True)
    os.mkfifo(parent / "out.partial" / name)
    if name == output.STATE:
        assert "--restart" in said("quantize", world.folder / "in", parent / "out")
    world.check_goes_on("quantize", parent, "--restart")


# Two runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "force", "force, os.rename"])
def test_a_second_run_is_refused_to_the_very_end_of_the_first(world, mode):
    more, settings = MODES[mode]
    operations, complete = world.reference("quantize", *more, **settings)
    total = len(operations)
    others = itertools.cycle([more, (*more, "--restart"), ("--force",)])
    for number in (3, total // 2, total - 12, total - 5, total - 2, total - 1, total):
        parent = world.fresh("--force" in more)
        first = world.run("quantize", parent, *more, before=number, how="SIGSTOP", **settings)
        assert first["status"] == "stopped"
        there = tree(parent)
        second = world.run("quantize", parent, *next(others), **settings)
        assert second["status"] == 1
        assert "another run is writing" in second["said"]
        assert tree(parent) == there
        first = world.warm.go_on(first)
        assert first["status"] == 0, first["said"]
        assert tree(parent / "out") == complete
        assert os.listdir(parent) == ["out"]
        shutil.rmtree(parent)


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """A run opens the lock's file, and then its holder removes it and another run makes it anew."""
    path = tmp_path / "out.partial.lock"
    first = lock.Lock(path, tmp_path / "out")
    flock, others = fcntl.flock, []

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.remove()
        others.append(lock.Lock(path, tmp_path / "out"))
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CliError, match="another run is writing"):
        lock.Lock(path, tmp_path / "out")
    others[0].remove()
    assert not path.exists()
    lock.Lock(path, tmp_path / "out").remove()


# What others make ---------------------------------------------------------------------------------


def make_thesis(path):
    path.mkdir()
    (path / "thesis.txt").write_text("the only copy")


THINGS = {
    "folder": make_thesis,
    "empty folder": Path.mkdir,
    "file": lambda path: path.write_text("the only copy"),
    "link to a folder": lambda path: path.symlink_to("/usr"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("renameat2", [True, False])
@pytest.mark.parametrize("thing", THINGS)
def test_what_appears_at_out_is_left_alone(world, thing, renameat2):
    """Early in the run, and in the moment before the last rename."""
    operations, _ = world.reference("quantize", renameat2=renameat2)
    last = operations.index(LAST_RENAME) + 1
    if not renameat2:  # os.rename replaces an empty folder, so it must be there a moment before
        last -= thing == "empty folder"
    for number in (4, last) if thing == "folder" else (last,):
        parent = world.fresh()
        first = world.run("quantize", parent, before=number, how="SIGSTOP", renameat2=renameat2)
        THINGS[thing](parent / "out")
        before = tree(parent / "out")
        first = world.warm.go_on(first)
        assert first["status"] == 1
        assert "appeared during the run" in first["said"]
        assert tree(parent / "out") == before
        again = world.run("quantize", parent, renameat2=renameat2)
        assert again["status"] == 1
        assert tree(parent / "out") == before
        (parent / "out").rename(parent / "mine")
        again = world.run("quantize", parent, renameat2=renameat2)
        assert again["status"] == 0, again["said"]
        assert "an interrupted run had finished it" in again["said"]
        assert tree(parent / "mine") == before
        assert tree(parent / "out") == world.reference("quantize")[1]
        assert sorted(os.listdir(parent)) == ["mine", "out"]


@pytest.mark.parametrize("thing", THINGS)
def test_force_replaces_checkpoints_only(world, thing):
    """Also those that came into being during the run."""
    parent = world.fresh()
    first = world.run("quantize", parent, "--force", before=4, how="SIGSTOP")
    THINGS[thing](parent / "out")
    before = tree(parent / "out")
    first = world.warm.go_on(first)
    if thing == "empty folder":
        assert first["status"] == 0, first["said"]
        return
    assert first["status"] == 1
    assert f"The finished checkpoint is kept in {parent}/out.partial" in first["said"]
    assert tree(parent / "out") == before
    (parent / "out").rename(parent / "mine")
    again = world.run("quantize", parent, "--force")
    assert again["status"] == 0, again["said"]
    assert tree(parent / "mine") == before
    assert sorted(os.listdir(parent)) == ["mine", "out"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": '{"name": "a web site"}', "index.js": "1"}, "names no model, and no"),
        ({"config.json": "[" * 10**5}, "names no model, and no safetensors file"),
        ({"config.json": '{"model_type": "llama"}', "src/thesis.tex": "1"}, r"1 folder that no .*"),
        ({"config.json": "{}", "model.safetensors": "", "a/b": "1", "original/c": "1"}, r"\(a\)"),
    ],
)
def test_force_leaves_a_folder_that_holds_more_than_a_checkpoint(world, files, message):
    parent = world.fresh()
    for name, text in files.items():
        (parent / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (parent / "out" / name).write_text(text)
    before = tree(parent)
    assert re.search(message, said("quantize", world.folder / "in", parent / "out", "--force"))
    assert tree(parent) == before


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', '{"architectures": ["M"]}'])
def test_force_replaces_a_config_that_names_a_model(world, config):
    parent = world.fresh()
    (parent / "out" / "onnx").mkdir(parents=True)
    (parent / "out" / "config.json").write_text(config)
    assert world.run("quantize", parent, "--force")["status"] == 0
    assert tree(parent / "out") == world.reference("quantize")[1]


@pytest.mark.parametrize("way", ["files", "one file", "a link on the way", "text"])
def test_links_that_lead_into_out_are_inputs_there(world, way):
    """--force would remove what they lead to."""
    parent = world.fresh()
    shutil.copytree(world.folder / "base", parent / "out")
    (parent / "base").mkdir()
    elsewhere = shutil.copytree(world.folder / "base", parent / "elsewhere")
    if way == "a link on the way":
        (parent / "out" / "original").symlink_to(elsewhere / "model.safetensors")
    (parent / "out" / "text.txt").write_text("some words " * 200)
    for path in sorted(elsewhere.iterdir()):
        is_linked = way == "files" or (way != "text" and path.name == "model.safetensors")
        if is_linked and way == "a link on the way":
            (parent / "base" / path.name).symlink_to("../out/original")
        elif is_linked:
            (parent / "base" / path.name).symlink_to(parent / "out" / path.name)
        else:
            shutil.copy(path, parent / "base")
    (parent / "text.txt").symlink_to("out/text.txt")
    before = tree(parent)
    command = ["merge", parent / "base", world.folder / "adapter", parent / "out", "--force"]
    if way == "text":
        command += ["--calibration", parent / "text.txt"]
    text = said(*command)
    link = "" if way == "text" else "which is a link to .*/out/.*: "
    assert re.search(rf"out holds the input .*, {link}want another folder", text), text
    assert tree(parent) == before


@pytest.mark.parametrize("renameat2", [True, False])
def test_a_folder_put_at_out_in_the_last_moment_is_not_replaced(world, renameat2):
    """--force looked at a checkpoint there; then it was moved away, and a folder took its place."""
    operations, _ = world.reference("quantize", "--force", renameat2=renameat2)
    rename = LAST_RENAME if renameat2 else "rename out"
    parent = world.fresh(force=True)
    old = tree(parent / "out")
    number = operations.index(rename) + 1
    first = world.run(
        "quantize", parent, "--force", before=number, how="SIGSTOP", renameat2=renameat2
    )
    (parent / "out").rename(parent / "old")
    make_thesis(parent / "out")
    first = world.warm.go_on(first)
    assert first["status"] == 1
    assert "was left alone" in first["said"]
    assert tree(parent / "out") == {"thesis.txt": b"the only copy"}
    assert tree(parent / "old") == old
    again = world.run("quantize", parent, "--force", renameat2=renameat2)
    assert "--force replaces only checkpoints" in again["said"]
    shutil.rmtree(parent / "out")
    assert world.run("quantize", parent, "--force", renameat2=renameat2)["status"] == 0
    assert sorted(os.listdir(parent)) == ["old", "out"]


@pytest.mark.parametrize("name", ["out.partial", "out.partial.lock", "out.partial.old"])
@pytest.mark.parametrize("thing", THINGS)
def test_what_has_a_name_that_the_run_needs_is_left_alone(world, name, thing):
    if (thing, name) == ("empty folder", "out.partial"):
        return  # nothing is lost when that one is used
    parent = world.fresh(force=True)
    THINGS[thing](parent / name)
    before = tree(parent)
    for more in (("--force",), ("--force", "--restart")):
        run = world.run("quantize", parent, *more, renameat2=False)
        assert run["status"] == 1
        assert "move it away" in run["said"] or "cannot be made" in run["said"]
        now = tree(parent)
        assert {key: now.get(key) for key in before} == before
    if name == "out.partial.old":  # exchanging the names, it is not needed
        assert world.run("quantize", parent, "--force")["status"] == 0
        assert tree(parent / name) == tree(parent)[name] if thing == "file" else True
        assert os.path.lexists(parent / name)


def test_a_strangers_folder_made_after_a_kill_is_kept(world):
    """A folder that gets the name, and perhaps the inode number, of one the killed run removed."""
    operations, _ = world.reference("quantize", "--force")
    tried = 0
    for number in range(len(operations) - 8, len(operations) + 1):
        parent = world.fresh(force=True)
        assert world.run("quantize", parent, "--force", before=number)["status"] == -9
        names = [n for n in ("out.partial", "out.partial.old") if not (parent / n).exists()]
        for name in names:
            make_thesis(parent / name)
        tried += "out.partial" in names
        world.run("quantize", parent, "--force")
        for name in names:
            assert (parent / name / "thesis.txt").read_text() == "the only copy", number
    assert tried >= 1


# Places -------------------------------------------------------------------------------------------


def said(*arguments):
    """What a command that fails says, run in this process."""
    result = CliRunner().invoke(app.app, [str(a) for a in arguments])
    assert isinstance(result.exception, CliError), (result.exception, result.output)
    return str(result.exception)


def test_relative_paths_slashes_links_and_missing_parents(world, monkeypatch):
    complete = world.reference("quantize")[1]
    parent = world.fresh()
    monkeypatch.chdir(parent)
    (parent / "real").mkdir()
    (parent / "way").symlink_to("real/deeper")
    (parent / "real" / "deeper").mkdir()
    quantize = ["quantize", str(world.folder / "in"), "--max-shard-size", "60KB"]
    for out, real in (
        ("one/", "one"),
        ("./two//", "two"),
        ("way/../three", "real/three"),
        ("new/parents/four", "new/parents/four"),
    ):
        run = world.warm.run(*quantize, parent.joinpath(out), within=parent)
        assert run["status"] == 0, run["said"]
        assert tree(parent / real) == complete
    result = CliRunner().invoke(app.app, [*quantize, "five/"])
    assert result.exit_code == 0 and tree(parent / "five") == complete
    (parent / "link").symlink_to("five")
    for force in ((), ("--force",)):
        assert "is a symbolic link to five" in said(*quantize, "link", *force)
        assert "is a symbolic link to five" in said(*quantize, "link/", *force)
        assert "cannot be replaced: name a folder in it" in said(*quantize, "/", *force)
    assert "exists" in said(*quantize, ".")
    # Parents that were made for a run that fails are removed.
    said("quantize", world.folder / "in", "new/other/out", "--keep", "nothing")
    assert sorted(os.listdir("new")) == ["parents"]
    assert sorted(os.listdir(parent)) == ["five", "link", "new", "one", "real", "two", "way"]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, where mounting is allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_mount_point_and_a_disk_that_cannot_be_written(world, disk):
    """OUT on another disk than its parent; a disk that is read-only from the start."""
    (disk / "config.json").write_text("{}")
    assert "exists" in said("quantize", world.folder / "in", disk)
    mounted = said("quantize", world.folder / "in", disk, "--force")
    assert "is a mount point, which cannot be replaced" in mounted
    assert os.listdir(disk) == ["config.json"] and os.listdir(disk.parent) == ["disk"]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "(Read-only file system)" in said("quantize", world.folder / "in", disk / "out")
    assert "(Read-only file system)" in said("quantize", world.folder / "in", disk / "a" / "out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EACCES])
def test_a_rename_that_the_system_refuses(world, monkeypatch, number, force):
    """As in a container whose image holds OUT, or where OUT is bound to another place."""
    parent = world.fresh(force)
    before = tree(parent / "out")
    more = ["--max-shard-size", "60KB", *(["--force"] if force else [])]

    def refused(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(rename, "_renameat2", refused)
        text = said("quantize", world.folder / "in", parent / "out", *more)
    assert re.search(rf"cannot be put into place \({os.strerror(number)}\).* is kept in", text)
    assert tree(parent / "out") == before
    world.check_goes_on("quantize", parent, *(["--force"] if force else []))


@pytest.mark.parametrize("name", ["out.partial.lock", "config.json", ".qlora_ext_progress"])
def test_a_disk_that_is_full_at_the_end(world, monkeypatch, name):
    """The record, a file next to the weights, or the notes of the run cannot be written."""
    parent = world.fresh(force=True)
    before = tree(parent / "out")
    pwrite, fsync = os.pwrite, os.fsync

    def full(function, file, *arguments):
        if name in os.path.basename(os.readlink(f"/proc/self/fd/{file}")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *a: full(pwrite, *a))
        patch.setattr(os, "fsync", lambda *a: full(fsync, *a))
        text = said("quantize", world.folder / "in", parent / "out", "--force",
                    "--max-shard-size", "60KB")  # fmt: skip
    assert "No space left on device" in text
    assert tree(parent / "out") == before
    world.check_goes_on("quantize", parent, "--force")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_a_disk_that_is_full_while_files_are_copied(world, monkeypatch, command, number):
    """A copy's error names the file that is read, which is whole."""
    parent = world.fresh()

    def full(source, target):
        Path(target).touch()
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    argv = ["quantize", world.folder / "in", parent / "out", "--max-shard-size", "60KB"]
    if command == "calibrate":
        argv = ["merge", world.folder / "base", world.folder / "adapter", parent / "out",
                "--calibration", world.folder / "text.txt"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        text = said(*argv)
    assert re.search(rf"out.partial cannot be written \(.*{os.strerror(number)}", text), text
    assert "cannot be read" not in text
    world.check_goes_on(command, parent)


def test_what_was_replaced_and_cannot_be_removed(world, monkeypatch):
    """OUT is complete; the next run tries again."""
    parent = world.fresh(force=True)
    before = tree(parent / "out")

    def refused(folder, keep=()):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(output, "_empty", refused)
        text = said("quantize", world.folder / "in", parent / "out", "--force",
                    "--max-shard-size", "60KB")  # fmt: skip
    assert "out is complete; what it held before is in" in text
    assert tree(parent / "out") == world.reference("quantize")[1]
    assert tree(parent / "out.partial") == before
    # Any command into OUT clears up.
    assert "exists" in said("quantize", world.folder / "in", parent / "out")
    assert os.listdir(parent) == ["out"]


def test_a_refused_run_leaves_nothing(world):
    parent = world.fresh()
    make_thesis(parent / "out")
    for more in ((), ("--force",), ("--restart",)):
        assert world.run("quantize", parent, *more)["operations"][3:] == []
        assert os.listdir(parent) == ["out"]


def test_another_command_on_what_was_finished(world):
    """Killed before the last rename: another command says so, and starts over with --restart."""
    operations, _ = world.reference("quantize")
    parent = world.fresh()
    number = operations.index(LAST_RENAME) + 1
    assert world.run("quantize", parent, before=number)["status"] == -9
    other = world.run("quantize", parent, "--quant-type", "fp4")
    assert other["status"] == 1
    assert "differs from this one in settings" in other["said"]
    # Killed while it starts over, it still knows whose folder it is.
    for before in (4, 6, 8):
        killed = world.run("quantize", parent, "--quant-type", "fp4", "--restart", before=before)
        assert killed["status"] == -9
    assert world.run("quantize", parent, "--quant-type", "fp4", "--restart")["status"] == 0
    assert json.loads((parent / "out" / "config.json").read_text())["quantization_config"][
        "quant_type"
    ] == "fp4"  # fmt: skip
    assert os.listdir(parent) == ["out"]


# Inputs that change -------------------------------------------------------------------------------


def other_weights(path):
    """Another file of the same name, as a program that saves a model makes it."""
    weights = {key: tensor * 2 for key, tensor in load_file(path).items()}
    save_file(weights, path.with_suffix(".new"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".new"), path)


def other_weights_of_the_same_age(path):
    """In place, and then the time of the last write is set back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    places = [t["data_offsets"] for t in json.loads(data[8:start]).values() if "shape" in t]
    start += max(places, key=lambda place: place[1] - place[0])[0]  # of the largest tensor
    data[start : start + 128] = data[start + 128 : start + 256]
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def other_setting(path):
    """JSON with a change that the result shows."""
    settings = json.loads(path.read_text())
    keys = [k for k in ("rms_norm_eps", "lora_alpha", "added_later") if k in settings]
    key = keys[0] if keys else "added_later"
    settings[key] = settings.get(key, 1) * 2
    path.write_text(json.dumps(settings))


CHANGES = {
    "shard replaced": ("quantize", "in/model-00001-of-00003.safetensors", other_weights),
    "shard overwritten, same age": (
        "quantize", "in/model-00003-of-00003.safetensors", other_weights_of_the_same_age
    ),
    "shard cut": ("quantize", "in/model-00002-of-00003.safetensors", cut),
    "config": ("quantize", "in/config.json", other_setting),
    "tokenizer": ("quantize", "in/tokenizer_config.json", other_setting),
    "base": ("merge", "base/model.safetensors", other_weights_of_the_same_age),
    "adapter": ("merge", "adapter/adapter_model.safetensors", other_weights),
    "adapter's config": ("merge", "adapter/adapter_config.json", other_setting),
    "text": ("calibrate", "text.txt", lambda path: path.write_text("other words " * 200)),
    "base, by text": ("calibrate", "base/config.json", other_setting),
    "adapter's tokenizer": ("own text", "adapter/tokenizer_config.json", other_setting),
}  # fmt: skip


def half_way(operations):
    """Before the second shard, or the first file that save_pretrained writes."""
    return next(n for n, o in enumerate(operations, 1) if "model-00002" in o or "config" in o)


def copied(world):
    """The inputs, to be changed."""
    parent = world.fresh()
    for name in ("in", "base", "adapter"):
        shutil.copytree(world.folder / name, parent / name)
    shutil.copy(world.folder / "text.txt", parent)
    return parent


@pytest.mark.parametrize(
    "change, late", [*((c, False) for c in CHANGES), ("config", True), ("base, by text", True)]
)
def test_an_input_that_changes_is_named_before_out_exists(world, change, late):
    """After the first shard; `late`: when everything is written and OUT is not made yet."""
    command, name, how = CHANGES[change]
    operations, _ = world.reference(command)
    if late:
        number = operations.index("pwrite out.partial.lock") - 1
    else:
        number = half_way(operations)
    inputs, parent = copied(world), world.fresh()
    first = world.run(command, parent, inputs=inputs, before=number, how="SIGSTOP")
    assert first["status"] == "stopped"
    whole = (inputs / name).read_bytes()
    how(inputs / name)
    first = world.warm.go_on(first)
    assert first["status"] == 1
    assert re.search(rf"{re.escape(name)} changed during the run", first["said"]), first["said"]
    assert "cannot be written" not in first["said"]
    assert not (parent / "out").exists()
    stale = change != "tokenizer"
    assert (parent / "out.partial").exists() != stale
    if how is cut:
        assert "is damaged" in world.run(command, parent, inputs=inputs)["said"]
        (inputs / name).write_bytes(whole)
    again = world.run(command, parent, inputs=inputs)
    assert again["status"] == 0, again["said"]
    assert ("continuing:" in again["said"]) != stale
    other = world.fresh()
    assert world.run(command, other, inputs=inputs)["status"] == 0
    assert tree(parent / "out") == tree(other / "out")
    assert os.listdir(parent) == ["out"]


@pytest.mark.parametrize("command, name", [
    ("quantize", "in"), ("merge", "base"), ("merge", "adapter"), ("calibrate", "base"),
])  # fmt: skip
def test_an_input_folder_that_is_removed_is_no_fault_of_the_output(world, command, name):
    operations, _ = world.reference(command)
    number = half_way(operations)
    inputs, parent = copied(world), world.fresh()
    first = world.run(command, parent, inputs=inputs, before=number, how="SIGSTOP")
    (inputs / name).rename(inputs / "elsewhere")
    first = world.warm.go_on(first)
    assert first["status"] == 1
    assert re.search(rf"/{name}/.* disappeared during the run", first["said"]), first["said"]
    assert "cannot be written" not in first["said"]
    assert not (parent / "out").exists()
    (inputs / "elsewhere").rename(inputs / name)
    again = world.run(command, parent, inputs=inputs)
    assert again["status"] == 0, again["said"]
    # What was finished is of those files, and is used.
    assert command == "calibrate" or "continuing: 1 of 2" in again["said"]
    assert tree(parent / "out") == world.reference(command)[1]


def test_an_input_that_changes_before_anything_is_written(world):
    """Nothing is dropped then: what lies at OUT.partial may be somebody else's."""
    inputs, parent = copied(world), world.fresh()
    make_thesis(parent / "out.partial")
    first = world.run("quantize", parent, inputs=inputs, before=2, how="SIGSTOP")
    other_setting(inputs / "in" / "config.json")
    first = world.warm.go_on(first)
    assert first["status"] == 1
    assert "in/config.json changed during the run" in first["said"]
    assert tree(parent) == {"out.partial": None, "out.partial/thesis.txt": b"the only copy"}


def test_files_of_an_earlier_attempt_are_not_taken_along(world):
    """A file of the input was copied, the run killed, and then the input has it no more."""
    operations, _ = world.reference("quantize")
    inputs, parent = copied(world), world.fresh()
    (inputs / "in" / "LICENSE").write_text("a licence")
    assert world.run("quantize", parent, inputs=inputs, before=len(operations) - 8)["status"] == -9
    assert (parent / "out.partial" / "LICENSE").exists()
    (inputs / "in" / "LICENSE").unlink()
    # Somebody's own file in there is no business of the command.
    with contextlib.suppress(FileNotFoundError):
        (parent / "out.partial" / "notes.txt").write_text("mine")
    assert world.run("quantize", parent, inputs=inputs)["status"] == 0
    assert not (parent / "out" / "LICENSE").exists()
    assert (parent / "out" / "notes.txt").read_text() == "mine"
