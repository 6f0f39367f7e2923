"""Builds and loads the CUDA kernels for the host: csrc/cuda/*.cu compiled with g++ against the
emulated machine (machine.cpp), registered as torch.ops.qlora_ext_simt.* for CPU tensors.

    simt = load_simt()         # builds what changed, loads
    simt.dequantize_4bit(...)  # an op
    simt.kernels()             # and a control

Sanitizers: run Python with sanitizer_environment("address" or "thread") added to its environment;
load_simt() then loads that library (SIMT_LIBRARY) as it is.

Objects are cached under build/simt (SIMT_BUILD_DIR overrides), each with the hashes of the files
it was made of. `python tests/simt/build.py [plain|address|thread ...]` builds ahead of time.
"""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SIMT = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(SIMT.parent))

from simt import ptx_to_cpp

ROOT = SIMT.parent.parent
BUILD = Path(os.environ.get("SIMT_BUILD_DIR") or ROOT / "build" / "simt")
CXX = os.environ.get("CXX", "g++")

# No contraction: nvcc's is not seen here, and bit-exact code must not depend on it. No strict
# aliasing: nvcc has none. Unknown pragmas: `#pragma unroll`.
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
]
FLAGS += [
    "-fno-gnu-unique",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
]
OPTIMIZE = {
    None: ["-O2"],
    "address": ["-O1", "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-fno-omit-frame-pointer"],
}
SANITIZE = {
    None: [],
    # Overflow of a null pointer's offset is how kernels skip absent operands, and harmless.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=pointer-overflow,vptr",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-fsanitize=thread"],
}
# In files with wgmma each store calls the machine (hopper.cpp), which notes those to shared memory.
# This is AddressSanitizer's instrumentation without its library, so builds with a sanitizer lack
# it. Elsewhere nothing reads by the async proxy, and some kernels would take three times as long.
STORES = ["-fsanitize=kernel-address", "-U__SANITIZE_ADDRESS__"]
for _off in ("instrument-reads", "stack", "globals", "instrumentation-with-call-threshold"):
    STORES += ["--param", f"asan-{_off}=0"]
MACHINE = [SIMT / "machine.cpp", SIMT / "hopper.cpp"]
WHEELS = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")


class BuildError(RuntimeError):
    """The compiler's or the linker's own words."""


# ---------------------------------------------------------------- CUDA headers


def _toolkit_include():
    """The headers of the toolkit that nvcc uses: it may be a wrapper, so its dry run is asked."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    text = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"TOP=(.+)", text)
    if top is None:
        return []
    root = Path(top.group(1).strip()).resolve()
    return [
        d
        for d in (root / "targets" / "x86_64-linux" / "include", root / "include")
        if (d / "cuda_bf16.h").is_file()
    ][:1]


def _wheel_include(site):
    """Headers that the three wheels put under site/nvidia."""
    found = []
    for name in ("cuda_bf16.h", "crt/host_defines.h", "nv/target"):
        hits = sorted(Path(site).glob(f"nvidia/*/include/{name}")) + sorted(
            Path(site).glob(f"nvidia/*/include/cccl/{name}")
        )
        if not hits:
            return []
        found.append(hits[-1].parents[name.count("/")])
    return list(dict.fromkeys(found))


@functools.cache
def cuda_include():
    """Directories of CUDA headers: the toolkit's, an installed wheel's, or fetched wheels'."""
    if os.environ.get("SIMT_CUDA_HEADERS", "") != "wheels":
        if dirs := _toolkit_include():
            return dirs
        for site in sys.path:
            if site and (dirs := _wheel_include(site)):
                return dirs
    fetched = BUILD / "cuda-headers"
    if not (dirs := _wheel_include(fetched)):
        print(
            f"simt: no CUDA toolkit: fetching {', '.join(WHEELS)} for their headers",
            file=sys.stderr,
        )
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(fetched),
            *WHEELS,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if not (dirs := _wheel_include(fetched)):
            raise BuildError(
                f"simt: no CUDA headers: no nvcc here, and pip got no {WHEELS}:\n{result.stderr}"
            )
    return dirs


# ---------------------------------------------------------------- compiling


@functools.cache
def _hash(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


@functools.cache
def _compiler():
    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    target = subprocess.run(
        [CXX, "-march=native", "-Q", "--help=target"], capture_output=True, text=True
    ).stdout
    return version + target


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode != 0:
        raise BuildError(" ".join(command) + "\n" + result.stdout + result.stderr)
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def _listed(rule):
    """The files that a target is made of, from a compiler's rule for make."""
    words = re.findall(r"(?:\\.|\S)+", rule.replace("\\\n", " ").split(": ", 1)[1])
    return [re.sub(r"\\(.)", r"\1", word).replace("$$", "$") for word in words]


def _made(source, suffix, compiler, command):
    """A file that a compiler makes of one source, made if anything it is made of has changed.
    `command(target, depfile, source)`; `compiler`: its version. Paths are relative to the checkout,
    so that a copy of the build folder serves a copy of the checkout."""
    source = os.path.relpath(source, ROOT)
    key = json.dumps([compiler, command("", "", source)])
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    name = os.path.basename(source).replace(".", "_")
    target, record = BUILD / f"{name}-{key}{suffix}", BUILD / f"{name}-{key}.json"
    if target.is_file() and record.is_file():
        made_of = json.loads(record.read_text())
        if all(_hash(ROOT / path) == digest for path, digest in made_of.items()):
            return target
    depfile = target.with_suffix(".d")
    before = time.time()
    _run(command(str(target), str(depfile), source))
    paths = [os.path.relpath(ROOT / word, ROOT) for word in _listed(depfile.read_text())]
    # A file that was edited while it was being compiled must not count as compiled.
    edited = any((ROOT / path).stat().st_mtime > before for path in paths)
    record.write_text(json.dumps({path: edited or _hash(ROOT / path) for path in paths}, indent=1))
    return target


def _compile(source, flags):
    """The object of one source."""

    def command(target, depfile, source):
        options = ["-MMD", "-MF", depfile, "-x", "c++", "-c", source, "-o", target]
        return [CXX, *flags, *options]

    return _made(source, ".o", _compiler(), command)


@contextlib.contextmanager
def _locked():
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _hash.cache_clear()
        yield


def _parallel(function, jobs):
    threads = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda job: function(*job), jobs))


def _compile_all(jobs):
    return [str(done) for done in _parallel(_compile, jobs)]


def _includes(source, header):
    """Whether a file of kernels includes a header of csrc or of the twins, itself or by another."""
    if source.name == header:
        return True
    folders = [source.parent, ROOT / "csrc"]
    for name in re.findall(r'^#include "(.+)"', source.read_text(), re.M):
        found = next((f / name for f in folders if (f / name).is_file()), None)
        if found and _includes(found, header):
            return True
    return False


def _kernel_flags(source, sanitize):
    noted = sanitize is None and _includes(source, "wgmma.cuh")
    return _flags(sanitize) + STORES * noted


def _flags(sanitize, *, machine=False):
    flags = FLAGS + OPTIMIZE[sanitize]
    # The machine is its own bookkeeper: instrumented for addresses, but not for races.
    if sanitize == "thread" and machine:
        flags += ["-O3", "-DSIMT_TSAN=1"]
    elif sanitize is None and machine:
        flags += ["-O3"]  # mma is a loop nest
    else:
        flags += SANITIZE[sanitize]
    flags += ["-I", "tests/simt/include", "-I", "csrc"]
    for directory in cuda_include():
        flags += ["-isystem", str(directory)]
    return flags


def _link(objects, target, extra, sanitize):
    stamp = hashlib.sha256(
        json.dumps([[o, _hash(o)] for o in objects] + [extra]).encode()
    ).hexdigest()
    record = target.with_suffix(target.suffix + ".stamp")
    if not (target.is_file() and record.is_file() and record.read_text() == stamp):
        # A new file each time: a library that is loaded may not change under its process.
        made = target.with_suffix(f".{os.getpid()}.tmp")
        _run([CXX, *objects, *SANITIZE[sanitize], *extra, "-o", str(made)])
        os.replace(made, target)
        record.write_text(stamp)
    return target


# The binaries that the PTX of the kernels is translated for (machine.cpp: binary_for).
PTX_ARCHS = ("75", "80", "90a")
# Long functions of short statements, many of no effect. Registers are local variables, which
# no address can reach; UBSan would take minutes, and the instructions check alignment themselves.
PTX_FLAGS = ["-O1", "-g0", "-w", "-fno-sanitize=undefined", "-fno-sanitize-address-use-after-scope"]
PTX_FLAGS += ["--param", "asan-stack=0"]


@functools.cache
def _nvcc():
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def _ptx(source, arch):
    """The C++ of a device file's PTX for one architecture."""

    def command(target, depfile, source):
        flags = ["-std=c++20", "-O3", "-I", "csrc", f"-arch=compute_{arch}"]
        return ["nvcc", *flags, "-MD", "-MF", depfile, "-ptx", "-o", target, source]

    ptx = _made(source, f"_sm{arch}.ptx", _nvcc(), command)
    text = ptx_to_cpp.translate(ptx.read_text(), ptx.name)
    cpp = ptx.with_suffix(".cpp")
    if not cpp.is_file() or cpp.read_text() != text:
        cpp.write_text(text)
    return cpp


def _ptx_jobs(sources, archs, sanitize):
    flags = [*_flags(sanitize), *PTX_FLAGS]
    made = _parallel(_ptx, [(source, arch) for arch in archs for source in sources])
    return [(cpp, flags) for cpp in made]


def _variant(sanitize, ptx):
    return f"{'-ptx' if ptx else ''}{'-' + sanitize if sanitize else ''}"


def library(sanitize=None, *, ptx=()):
    """Builds the torch library for None, "address" or "thread"; its path. It also holds the kernels
    as nvcc compiled them for the architectures `ptx`, for Simt.ptx()."""
    import torch

    torch_root = Path(torch.__file__).parent
    torch_flags = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-DSIMT_TORCH_{torch.__version__.split('+')[0].replace('.', '_')}",
    ]
    for directory in (
        torch_root / "include",
        torch_root / "include" / "torch" / "csrc" / "api" / "include",
    ):
        torch_flags += ["-isystem", str(directory)]
    kernels = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    hosts = [*sorted((ROOT / "csrc" / "host").rglob("*.cpp")), SIMT / "register.cpp"]
    # Of the CUDA library's own host code register.cpp has a twin here; the rest is as it is.
    hosts += sorted(set((ROOT / "csrc" / "cuda").glob("*.cpp")) - {ROOT / "csrc/cuda/register.cpp"})
    with _locked():
        jobs = [(source, _flags(sanitize, machine=True)) for source in MACHINE]
        jobs += [(source, _kernel_flags(source, sanitize)) for source in kernels]
        # Host code is tested by the CPU backend; it is not instrumented here.
        jobs += [(source, _flags(None) + torch_flags) for source in hosts]
        jobs += _ptx_jobs(kernels, ptx, sanitize)
        objects = _compile_all(jobs)
        extra = [
            "-shared",
            "-Wl,-Bsymbolic",
            f"-L{torch_root / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        return _link(
            objects,
            BUILD / f"libqlora_ext_simt{_variant(sanitize, ptx)}.so",
            extra,
            sanitize,
        )


def harness(name, sanitize=None, *, shared=False, ptx=()):
    """Builds tests/simt/<name>.cu with the machine, no torch: a program, or a ctypes library; `ptx`
    as for library()."""
    with _locked():
        jobs = [(source, _flags(sanitize, machine=True)) for source in MACHINE]
        jobs += [(SIMT / f"{name}.cu", _kernel_flags(SIMT / f"{name}.cu", sanitize))]
        jobs += _ptx_jobs([SIMT / f"{name}.cu"], ptx, sanitize)
        target = BUILD / f"{name}{_variant(sanitize, ptx)}{'.so' if shared else ''}"
        extra = ["-shared", "-Wl,-Bsymbolic"] if shared else []
        return _link(_compile_all(jobs), target, extra, sanitize)


def program(name, *, suffix=".cu", include=()):
    """Builds tests/simt/<name>.cu by itself, without the machine; its path."""
    flags = _flags(None)
    for directory in include:
        flags += ["-isystem", str(directory)]
    with _locked():
        objects = _compile_all([(SIMT / f"{name}{suffix}", flags)])
        return _link(objects, BUILD / name, [], None)


# ---------------------------------------------------------------- running


def _runtime(sanitize):
    """The sanitizer's runtime library, or None."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitize]
    command = [CXX, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) else None


def preloaded(sanitize):
    """LD_PRELOAD for a process that loads code built with a sanitizer. AddressSanitizer looks C++'s
    throw up when it starts: without libstdc++ there, the first library that throws (triton, at its
    import) ends the process."""
    command = [CXX, "-print-file-name=libstdc++.so.6"]
    standard = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return " ".join([_runtime(sanitize), *([standard] if os.path.isabs(standard) else [])])


@functools.cache
def fixed_addresses():
    """What goes before a command that ThreadSanitizer watches: it places its shadow memory by
    hand, and that of older compilers cannot where a new kernel randomizes more address bits."""
    prefix = ["setarch", "-R"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except OSError:
        works = False
    return prefix if works else []  # a container may forbid it


@functools.cache
def why_not(sanitize):
    """Why this machine cannot run a sanitizer, or None."""
    if _runtime(sanitize) is None:
        return f"{CXX} has no {sanitize} sanitizer"
    command = [*fixed_addresses(), sys.executable, "-c", "import ctypes"]
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded(sanitize),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return result.stderr.strip() or "it does not start" if result.returncode != 0 else None


def require(sanitize):
    """Skips the test that is running where a sanitizer does not work, or, where the environment has
    SIMT_REQUIRE_SANITIZERS=1, as it has in continuous integration, fails it."""
    import pytest

    if reason := why_not(sanitize):
        (pytest.fail if os.environ.get("SIMT_REQUIRE_SANITIZERS") == "1" else pytest.skip)(reason)


def require_nvcc():
    """Skips the test that is running where nvcc, which makes the PTX, is not on the PATH."""
    import pytest

    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: there is no PTX to run")


def sanitizer_environment(sanitize):
    """Builds the sanitized library; what a Python process needs in its environment to load it."""
    options = {
        "address": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
        # Python and torch are not instrumented: only what the kernels do counts.
        "thread": "halt_on_error=1:history_size=4:ignore_noninstrumented_modules=1"
        ":report_mutex_bugs=0:report_thread_leaks=0",
    }
    return {
        "LD_PRELOAD": preloaded(sanitize),
        "SIMT_LIBRARY": str(library(sanitize)),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ASAN_OPTIONS": options["address"],
        "TSAN_OPTIONS": options["thread"],
    }


class Simt:
    """The emulated machine: its ops (those of torch.ops.qlora_ext_simt) and its controls."""

    def __init__(self, path):
        self.path = Path(path)
        self._machine = ctypes.CDLL(str(path))
        self._machine.simt_kernels.restype = ctypes.c_char_p
        self._machine.simt_translations.restype = ctypes.c_char_p
        self._machine.simt_set_last_blocks.argtypes = [ctypes.c_int64]
        self._machine.simt_synchronizations.restype = ctypes.c_int64
        self._libc = ctypes.CDLL(None)

    def __getattr__(self, op):
        import torch

        return getattr(torch.ops.qlora_ext_simt, op)

    def kernels(self):
        """{kernel: launches} of every instantiation that a launcher names, launched or not."""
        lines = self._machine.simt_kernels().decode().splitlines()
        return {name: int(launches) for launches, name in (line.split("\t") for line in lines)}

    def translations(self):
        """{(architecture, kernel)} of what is there as nvcc compiled it."""
        lines = self._machine.simt_translations().decode().splitlines()
        return {(int(arch), name) for arch, name in (line.split("\t") for line in lines)}

    def plan(self, op, M, N, K, R=16, dtype=2):
        """(parts of the contraction, lines of W in a chunk for cuBLAS or 0, whether the last block
        adds the parts) that dispatch chooses for a product of this shape; dtype as in params.h, 2
        is bf16. Nothing runs."""
        plan = (ctypes.c_int64 * 3)()
        shape = [ctypes.c_int64(n) for n in (M, N, K, R)]
        self._machine.simt_plan(op.encode(), *shape, dtype, plan)
        return plan[0], plan[1], bool(plan[2])

    def reset_launches(self):
        self._machine.simt_reset_launches()

    @contextlib.contextmanager
    def device(self, arch=80, sm_count=4):
        """Dispatch sees this architecture (75, 80, 86, 89, 90, 120) and number of SMs."""
        before = self._machine.simt_arch(), self._machine.simt_sm_count()
        self._machine.simt_set_device(arch, sm_count)
        try:
            yield
        finally:
            self._machine.simt_set_device(*before)

    @contextlib.contextmanager
    def poison(self, byte, *, reverse=False):
        """Shared memory, local variables, and what malloc returns start filled with `byte`; with
        `reverse` the highest lanes, warps and blocks run first, and asynchronous work as late as
        its wait allows. Bytes computed under different
        settings must be equal: a difference is a read of something nothing wrote, or a missing
        barrier."""
        self._machine.simt_set_poison(byte)
        self._machine.simt_set_poison_stacks(1)
        self._machine.simt_set_reverse(int(reverse))
        m_perturb = -6
        self._libc.mallopt(m_perturb, byte ^ 0xFF)  # malloc fills with the complement
        try:
            yield
        finally:
            self._libc.mallopt(m_perturb, 0)
            self._machine.simt_set_poison(0xFF)
            self._machine.simt_set_poison_stacks(0)
            self._machine.simt_set_reverse(0)

    @contextlib.contextmanager
    def ptx(self, on=True):
        """Kernels run as nvcc compiled them for the device: its PTX, translated (ptx_to_cpp.py)."""
        before = self._machine.simt_ptx()
        self._machine.simt_set_ptx(int(on))
        try:
            yield
        finally:
            self._machine.simt_set_ptx(before)

    @contextlib.contextmanager
    def capture(self):
        """As under a CUDA graph's capture: a synchronization is an error."""
        self._machine.simt_set_capturing(1)
        try:
            yield
        finally:
            self._machine.simt_set_capturing(0)

    def synchronizations(self):
        """How often an op has waited for the device so far."""
        return self._machine.simt_synchronizations()

    @contextlib.contextmanager
    def last_blocks(self, count):
        """Only the last `count` blocks of every grid run: of a huge tensor little is touched."""
        self._machine.simt_set_last_blocks(count)
        try:
            yield
        finally:
            self._machine.simt_set_last_blocks(0)

    @contextlib.contextmanager
    def trace(self, kernel):
        """Yields a function that returns what the first block of `kernel` has done to shared
        memory so far: (PTX line, thread, address, bytes) of each lane's access, as nvcc compiled
        it."""
        accesses = ctypes.POINTER(ctypes.c_uint32 * 4)()
        self._machine.simt_traced.restype = ctypes.c_int64
        self._machine.simt_trace(kernel.encode())

        def read():
            count = self._machine.simt_traced(ctypes.byref(accesses))
            return [tuple(accesses[i]) for i in range(count)]

        try:
            yield read
        finally:
            self._machine.simt_trace(b"")

    @contextlib.contextmanager
    def skip(self, *kernels):
        """These kernels do nothing: whatever tests them must fail."""
        before = os.environ.get("SIMT_SKIP")
        self._setenv(";".join(kernels))
        try:
            yield
        finally:
            self._setenv(before)

    @staticmethod
    def _setenv(value):
        if value is None:
            os.environ.pop("SIMT_SKIP", None)
        else:
            os.environ["SIMT_SKIP"] = value


@functools.cache
def load_simt():
    """Builds what changed and loads it, once; returns the ops and their controls."""
    import torch

    path = os.environ.get("SIMT_LIBRARY") or library()
    torch.ops.load_library(str(path))
    return Simt(path)


if __name__ == "__main__":
    for choice in sys.argv[1:] or ["plain"]:
        print(library(None if choice == "plain" else choice))
