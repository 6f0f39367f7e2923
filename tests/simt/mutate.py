"""Mutation test of the kernels' synchronization: removes one barrier, wait or fence at a time from
a copy of csrc/cuda and runs the sweep on it; every removal must be noticed.

    python tests/simt/mutate.py [FILE ...]      # minutes: each mutant is compiled

A mutant is noticed by the launch's own report, by bytes that differ between the two poison patterns
and lane orders, by results unlike the CPU backend's, or else by ThreadSanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import qlora_ext

TWINNED = ("ptx.cuh", "wgmma.cuh", "launch.cuh", "tensor_map.cuh")
ROOT = Path(__file__).resolve().parent.parent.parent
SYNC = re.compile(
    r"(?:__syncthreads|__syncwarp|__threadfence\w*|ptx::(?:barrier_sync|mbarrier_wait|fence_\w+"
    r"|wgmma_fence|(?:cp_async_wait|bulk_wait|bulk_wait_read|wgmma_wait)<[^>]*>))"
    r"\([^;]*\);"
)
PLAIN = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "test_case", "-p", "no:cacheprovider"]
RACES = "import sys; sys.path[:0] = ['tests', 'tests/support']; from simt import build; import os\n"
RACES += "os.environ.update(build.sanitizer_environment('thread'))\n"
RACES += (
    "c = [*build.fixed_addresses(), sys.executable, 'tests/simt/sweep.py']; os.execvp(c[0], c)\n"
)


def sites(path):
    """(start, end, line) of every synchronization outside comments."""
    text = path.read_text()
    for match in SYNC.finditer(text):
        start_of_line = text.rfind("\n", 0, match.start()) + 1
        if "//" not in text[start_of_line : match.start()]:
            yield match.start(), match.end(), text.count("\n", 0, match.start()) + 1


def verdict(work, environment):
    plain = subprocess.run(
        [*PLAIN, str(work / "tests/simt/test_simt_kernels.py")],
        capture_output=True,
        text=True,
        cwd=work / "tests",
        env=environment,
    )
    if plain.returncode != 0:
        reason = re.findall(r"run failed: .*|reads what nothing wrote|BuildError", plain.stdout)
        return "plain: " + (reason[0] if reason else "results unlike the CPU's")[:90]
    races = subprocess.run(
        [sys.executable, "-c", RACES], capture_output=True, text=True, cwd=work, env=environment
    )
    return "thread: data race" if "data race" in races.stderr else None


def main(names):
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for part in ("csrc", "tests"):
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / part, work / part, ignore=ignore)
        if (ROOT / "build" / "simt").is_dir():
            shutil.copytree(ROOT / "build" / "simt", work / "build")
        environment = {**os.environ, "SIMT_BUILD_DIR": str(work / "build"), "OMP_NUM_THREADS": "1"}
        built = Path(qlora_ext.__file__).parent.parent
        environment["PYTHONPATH"] = os.pathsep.join([str(built), str(work / "tests" / "support")])
        if found := verdict(work, environment):
            sys.exit(f"the kernels as they are do not pass: {found}")
        for path in sorted((work / "csrc" / "cuda").iterdir()):
            if path.name in TWINNED or (names and path.name not in names):
                continue
            text = path.read_text()
            for start, end, line in sites(path):
                path.write_text(text[:start] + ";" + text[end:])
                found = verdict(work, environment)
                path.write_text(text)
                unnoticed += found is None
                what = text[start:end]
                print(f"{path.name}:{line}: {what} {found or 'NOT NOTICED'}", flush=True)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
