"""`make build`: compiles qlora_ext in place and links this environment to the checkout.

`pip install -e .` does the work: pip uninstalls an installed copy, and setup.py keeps the object
files, so only changed files are compiled. This program decides whether that is needed. The checkout
holds the libraries of one build, which build/built.json describes.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "build" / "built.json"
SETTINGS = ("USE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX")


def sources() -> list[Path]:
    """The files that libraries and metadata are made from. Python modules are used in place."""
    code = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    return [ROOT / "setup.py", ROOT / "pyproject.toml", *code]


def times(files: list[Path]) -> dict[str, int]:
    return {str(path.relative_to(ROOT)): path.stat().st_mtime_ns for path in sorted(files)}


def link() -> str | None:
    """Where this environment's qlora_ext comes from, as pip recorded it; None if pip did not
    install it."""
    # Python puts this file's folder first in sys.path, not the checkout, whose egg-info it would
    # find otherwise.
    try:
        return metadata.distribution("qlora_ext").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None


def state() -> dict[str, object]:
    """What decides whether the last build is still valid: the environment, settings and files."""
    return {
        "python": [sys.prefix, sys.version],
        "torch": metadata.version("torch"),
        "settings": {name: os.environ.get(name, "") for name in SETTINGS},
        "link": link(),
        "libraries": times(list((ROOT / "qlora_ext").glob("_C*.so"))),
        "sources": times(sources()),
    }


def read_record() -> dict[str, object]:
    try:
        return json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # never built, or interrupted while writing
        return {}


def command(last: dict, now: dict) -> list[str]:
    """The arguments of Python: pip, or only the compilation (half the time) if the last build made
    the same link."""
    same = [last.get(key) == now[key] for key in ("python", "link")]
    metadata_of = [state.get("sources", {}).get("pyproject.toml") for state in (last, now)]
    if all(same) and now["link"] and metadata_of[0] == metadata_of[1]:
        return ["setup.py", "-q", "build_ext", "--inplace"]
    return ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]


def main() -> None:
    last, before = read_record(), state()
    if last == before:
        return
    RECORD.unlink(missing_ok=True)
    words = command(last, before)
    print("python", *words, flush=True)
    if status := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(status)
    # Record the sources as they were before: a file edited meanwhile is then compiled next time.
    after = {**state(), "sources": before["sources"]}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(after, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
