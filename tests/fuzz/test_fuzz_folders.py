"""Folders from anyone, given to every command that reads one: docs/cli.md's promise that a failure
is one sentence and exit status 1, on thousands of mutated files (folders.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")

SEED = 20
FEW, MANY = 200, 2000


def outcomes(folder: Path, first: int, count: int) -> list[dict]:
    """What came of some cases, from a process of one thread that forks for each."""
    tests = Path(__file__).resolve().parent.parent
    words = [sys.executable, str(tests / "fuzz" / "folders.py"), str(folder)]
    path = [str(tests), str(tests / "support"), *sys.path]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*words, str(SEED), str(first), str(count)],
        capture_output=True,
        text=True,
        env={**os.environ, **offline, "PYTHONPATH": os.pathsep.join(path)},
    )
    lines = [line[5:] for line in result.stdout.splitlines() if line.startswith("CASE ")]
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in lines]


def check(folder: Path, first: int, count: int) -> None:
    found = outcomes(folder, first, count)
    assert len(found) == count
    bad = [case for case in found if case["problem"]]
    assert not bad, "\n".join(json.dumps(case) for case in bad[:10])
    # Mutations that do nothing, or that end every command alike, would test nothing.
    failed = [case for case in found if case["code"] == 1]
    assert 0.3 * count < len(failed) < 0.95 * count
    assert len({case["command"].split()[0] for case in found}) == 8


def test_hostile_folders_end_in_one_sentence(tmp_path):
    check(tmp_path, 0, FEW)


@pytest.mark.slow
def test_many_hostile_folders_end_in_one_sentence(tmp_path):
    check(tmp_path, FEW, MANY)
