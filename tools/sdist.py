"""Builds the source archive and prints its path: sdist.py FOLDER

It is made from a copy of the files that git tracks or would track. In the checkout itself,
setuptools would also take what an earlier build listed in qlora_ext.egg-info/SOURCES.txt.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(root: Path = ROOT) -> list[str]:
    """The paths of the project's files: from git, or in an unpacked archive from its own list."""
    if (root / ".git").exists():
        words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(words, cwd=root, stdout=subprocess.PIPE, check=True)
        names = os.fsdecode(done.stdout).split("\0")
    else:
        listed = root / "qlora_ext.egg-info" / "SOURCES.txt"
        if not listed.exists():
            sys.exit(f"sdist: {root} is neither a git checkout nor an unpacked source archive")
        names = [n for n in listed.read_text(encoding="utf-8").split("\n") if "egg-info" not in n]
    return sorted(name for name in names if (root / name).is_file())


def build(folder: Path, root: Path = ROOT) -> Path:
    """Builds the archive of the project at root in a folder, which must hold no other; returns its
    path. Exits with setup.py's messages if that fails."""
    with tempfile.TemporaryDirectory() as copy:
        for name in files(root):
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, Path(copy) / name)
        words = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder.resolve()]
        done = subprocess.run(words, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(os.fsdecode(done.stdout))
    (archive,) = folder.glob("qlora_ext-*.tar.gz")
    return archive


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
