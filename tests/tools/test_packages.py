"""The source archive, and what a wheel is made from. The archive is built by `make test-abi`, which
tests the wheel of it, and by `make wheel`, whose wheel other machines can install."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import qlora_ext
from paths import REPOSITORY

spec = importlib.util.spec_from_file_location("tools_sdist", REPOSITORY / "tools" / "sdist.py")
sdist = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sdist)

# What setuptools writes into every archive
WRITTEN = {"PKG-INFO", "setup.cfg"}


def names_in(archive: Path) -> set[str]:
    """The files of a source archive without its top folder and setuptools' own files."""
    with tarfile.open(archive) as tar:
        names = {m.name.split("/", 1)[1] for m in tar if m.isfile()}
    assert names >= WRITTEN
    return {n for n in names - WRITTEN if not n.startswith("qlora_ext.egg-info/")}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return sdist.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def unpacked(archive, tmp_path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


def test_the_source_archive_has_every_file_that_git_has(archive):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is an unpacked source archive: there is no git to compare with")
    words = ["git", "ls-files", "-z"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    tracked = {name for name in done.stdout.split("\0") if (REPOSITORY / name).is_file()}
    assert sum(name.startswith("csrc/") and name.endswith((".h", ".cuh")) for name in tracked) > 25
    names = names_in(archive)
    assert tracked <= names, f"MANIFEST.in leaves out {sorted(tracked - names)}"
    # Others may be new files that git doesn't track yet.
    assert names == set(sdist.files()), sorted(names ^ set(sdist.files()))


def test_what_builds_and_tests_leave_behind_stays_out(archive, unpacked):
    """Also if the archive is made in the checkout itself, as pip and build do."""
    names = names_in(archive)
    assert set(sdist.files(unpacked)) == names  # from its own list, without git
    for name in (
        "qlora_ext/_C.cpython-311-x86_64-linux-gnu.so",
        "csrc/cpu/gemm_4bit.o",
        "tests/ops/__pycache__/test_ops.cpython-311.pyc",
        "tests/.pytest_cache/CACHEDIR.TAG",
        "bench/.hypothesis/a",
        "tools/.ruff_cache/a",
        "examples/qlora_ext-0.1.0-cp311-cp311-linux_x86_64.whl",
        "build/temp/a.cpp",
        "dist/a.py",
        "runs/demo/report.json",
        ".venv/lib/a.py",
        ".cache/a",
    ):
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).touch()
    words = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "again"]
    done = subprocess.run(words, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (again,) = (unpacked / "again").iterdir()
    assert names_in(again) == names


def test_a_folder_without_a_list_of_its_files_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is neither a git checkout nor an unpacked source"):
        sdist.build(tmp_path / "dist", tmp_path)


def test_a_wheel_of_the_archive_has_every_module_and_nothing_else(unpacked):
    words = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib"]
    done = subprocess.run(words, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lib = unpacked / "lib"
    built = {p.relative_to(lib).as_posix() for p in lib.rglob("*") if p.is_file()}
    ours = {name for name in sdist.files() if name.startswith("qlora_ext/")}
    assert built == ours | {"qlora_ext_enable.py"}


def test_one_version_everywhere(archive, unpacked):
    version = qlora_ext.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert metadata.version("qlora_ext") == version
    declared = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', declared, re.M) == [version]
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (.+)$", changes, re.M)[1]
    assert re.fullmatch(rf"{re.escape(version)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", newest)
    for page in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("**/*.md")]:
        named = re.findall(
            r"(?:qlora_ext-|^version +)(\d[\d.]*\d)", page.read_text(encoding="utf-8"), re.M
        )
        assert set(named) <= {version}, page.name
    assert archive.name == f"qlora_ext-{version}.tar.gz"
    assert f"\nVersion: {version}\n" in (unpacked / "PKG-INFO").read_text(encoding="utf-8")


# Without torch --------------------------------------------------------------------------------

ADVICE = """\
qlora_ext builds against your torch, but found none: pip's build isolation hides an installed one.
Install torch and the other packages that a build needs, then run your command without isolation:
    pip install 'torch>=2.11' 'setuptools>=77' 'pybind11>=2.12' ninja wheel numpy
    pip install --no-build-isolation .      # or the name of the archive instead of the dot
"""


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel()", "build_wheel('.')"])
def test_a_build_without_torch_says_what_to_do(unpacked, hook):
    """As pip does it under isolation: the backend's hooks in a Python that has only setuptools."""
    alone = unpacked / "only setuptools"
    alone.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (alone / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"from setuptools import build_meta as b; b.{hook}"],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(alone)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, ADVICE)


@pytest.mark.slow
def test_pip_shows_it_under_build_isolation(archive, tmp_path):
    """It fetches the build requirements."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    words = [tmp_path / "env" / "bin" / "python", "-m", "pip", "install", archive]
    done = subprocess.run(words, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said
    lines = [line.strip() for line in said.splitlines()]
    at = lines.index(ADVICE.splitlines()[0])
    assert lines[at : at + 4] == [line.strip() for line in ADVICE.splitlines()]
