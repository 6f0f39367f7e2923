"""Builds qlora_ext against the installed torch: `pip install --no-build-isolation .`. With `-e .`
it builds in place, keeps its object files and compiles only what changed (`make build`).

qlora_ext/_C holds the CPU backend and the ops' schemas. qlora_ext/_C_cuda holds the CUDA backend.
It is built if nvcc and a CUDA torch are there (no GPU is needed). USE_CUDA=0|1 overrides that, and
TORCH_CUDA_ARCH_LIST chooses architectures.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from sysconfig import get_path

from setuptools import setup

ROOT = os.path.dirname(os.path.abspath(__file__))
# Ampere (its binaries also run on Ada), Hopper, and PTX that the driver compiles for newer GPUs.
DEFAULT_ARCHS = "8.0;9.0a;9.0+PTX"

if not find_spec("torch"):
    sys.exit("""\
qlora_ext builds against your torch, but found none: pip's build isolation hides an installed one.
Install torch and the other packages that a build needs, then run your command without isolation:
    pip install 'torch>=2.11' 'setuptools>=77' 'pybind11>=2.12' ninja wheel numpy
    pip install --no-build-isolation .      # or the name of the archive instead of the dot""")
import torch  # noqa: E402


def toolkit_root():
    """The CUDA toolkit that nvcc uses, or None. nvcc on the PATH may be a wrapper script, so this
    reads TOP from nvcc's dry run instead of taking nvcc's folder."""
    in_home = os.path.join(os.environ.get("CUDA_HOME", ""), "bin")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=in_home)
    if nvcc is None:
        return None
    dry_run = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    top = re.search(r"TOP=(.+)", subprocess.run(dry_run, capture_output=True, text=True).stderr)
    return os.path.realpath(top.group(1).strip()) if top else None


def toolkit_version(root):
    """(major, minor) of the toolkit's nvcc; (0, 0) if it prints none."""
    nvcc = os.path.join(root, "bin", "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return tuple(map(int, (re.findall(r"release (\d+)\.(\d+)", said) or [(0, 0)])[0]))


def wants_cuda(toolkit):
    """Whether to build the CUDA backend. Exits with a message if it was requested but cannot be
    built."""
    asked = os.environ.get("USE_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"qlora_ext: USE_CUDA is {asked!r}, want 0, 1, or unset to build CUDA if possible")
    version = torch.version.cuda
    if asked == "0":
        missing = "USE_CUDA to be 1 or unset"
    elif sys.platform != "linux" or platform.machine() != "x86_64" or torch.version.hip:
        missing = "CUDA on linux-x86_64 (ROCm and other systems are not supported)"
    elif version is None:
        missing = f"a CUDA build of torch (torch {torch.__version__} is a CPU build)"
    elif tuple(map(int, version.split("."))) < (12, 8):
        missing = f"CUDA 12.8 or newer (torch {torch.__version__} was built for {version})"
    elif toolkit is None:
        missing = "nvcc on the PATH"
    elif toolkit_version(toolkit) < (12, 8):
        missing = f"nvcc of CUDA 12.8 or newer (that of {toolkit} is older)"
    else:
        return True
    if asked == "1":
        sys.exit(f"qlora_ext: USE_CUDA=1 needs {missing}")
    print(f"qlora_ext: building the CPU backend only; the CUDA backend needs {missing}")
    return False


def architectures():
    """TORCH_CUDA_ARCH_LIST, or the default, plus Turing if torch sees one. Exits for older ones."""
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "7.5;" * ((7, 5) in gpus) + DEFAULT_ARCHS
    # The PTX of 7.5 would also run on 8.0, but it lacks the kernels that dispatch chooses there.
    if older := re.search(r"(?<![\d.])([1-6]\.\d|7\.[0-4]|7\.5\+PTX)[^; ]*", archs):
        want = "7.5, 8.0 or newer, and +PTX from 8.0 on"
        sys.exit(f"qlora_ext: TORCH_CUDA_ARCH_LIST has {older[0]}, want {want}")
    return archs


def sources(*folders):
    """Every C++ and CUDA file in these csrc folders. CMakeLists.txt uses the same globs."""
    patterns = [f"csrc/{folder}/**/*.{ext}" for folder in folders for ext in ("cpp", "cu")]
    return sorted(p for pattern in patterns for p in glob(pattern, root_dir=ROOT, recursive=True))


def extensions():
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if CUDA else ""
    cxx = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
    cxx += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch's stable ABI, as of 2.11
    cxx += [f'-DQLORA_EXT_CUDA_ARCHS="{archs}"']
    cxx += [f'-DQLORA_EXT_CUDA_VERSION="{torch.version.cuda if CUDA else ""}"']
    links = [f"-fsanitize={s}"] if (s := os.environ.get("QLORA_EXT_SANITIZE")) else []
    if links:  # for tests/fuzz, e.g. address,undefined
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *links]
    nvcc = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
    nvcc += ["-Xptxas=--warn-on-spills,--warning-as-error"]
    options = {"include_dirs": [os.path.join(ROOT, "csrc")], "extra_link_args": links}
    options["extra_compile_args"] = {"cxx": cxx, "nvcc": nvcc}
    cpu, cuda = ["csrc/library.cpp", *sources("host", "cpu")], sources("host", "cuda")
    built = [CppExtension("qlora_ext._C", cpu, **options)]
    return built + [CUDAExtension("qlora_ext._C_cuda", cuda, **options)] if CUDA else built


TOOLKIT = toolkit_root()
CUDA = wants_cuda(TOOLKIT)
if CUDA:
    os.environ["CUDA_HOME"] = TOOLKIT  # cpp_extension reads it once, when it is imported below
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()

# pip puts ninja here. With this on the PATH, the environment need not be activated.
os.environ["PATH"] = os.pathsep.join([get_path("scripts"), os.environ.get("PATH", os.defpath)])

from setuptools.command.build_py import build_py  # noqa: E402
from torch.utils.cpp_extension import BuildExtension  # noqa: E402


class BuildLibraries(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        if self.inplace:  # in pip install -e's own folder, new each time, nothing would be reused
            self.build_temp = f"build/in-place-{sys.implementation.cache_tag}-{torch.__version__}"
            self.build_lib = os.path.join(self.build_temp, "lib")

    def copy_extensions_to_source(self):
        for library in glob(os.path.join(ROOT, "qlora_ext", "_C*.so")):
            os.remove(library)  # it is from an earlier build, perhaps for another Python or CUDA
        super().copy_extensions_to_source()


class CopyModules(build_py):
    def run(self):  # an earlier build may have left modules that no longer exist
        for folder in (os.path.join(self.build_lib, "qlora_ext"), *glob("build/bdist.*")):
            shutil.rmtree(folder, ignore_errors=True)
        super().run()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries, "build_py": CopyModules})
