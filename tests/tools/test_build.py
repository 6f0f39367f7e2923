"""What setup.py, tools/ and the Makefile decide, asked without building; and what was built."""

import importlib.machinery
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

import qlora_ext
import qlora_ext_enable
from paths import REPOSITORY, TESTS
from qlora_ext.ops import _C

SETUP = REPOSITORY / "setup.py"
TOOLS = REPOSITORY / "tools"
CPU_TORCH = torch.version.cuda is None


@pytest.fixture
def setup_module(monkeypatch):
    """Runs setup.py with setuptools' setup() replaced; returns its globals."""
    pytest.importorskip("setuptools")

    def run(torch_cuda=None, path="", **environment):
        called = {}
        monkeypatch.setattr("setuptools.setup", lambda **kwargs: called.update(kwargs))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setenv("PATH", path)
        for key in ("USE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        return runpy.run_path(str(SETUP)), called

    return run


def fake_nvcc(folder: Path, top: Path, release: str = "13.0") -> str:
    """A folder with a wrapper script for an nvcc that lies elsewhere, as some machines have."""
    top.mkdir()
    script = folder / "nvcc"
    script.write_text(f'#!/bin/sh\necho "#$ TOP={top}/bin/.." >&2\n')
    script.chmod(0o755)
    (top / "bin").mkdir()
    real = top / "bin" / "nvcc"
    real.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    real.chmod(0o755)
    return f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin"


def test_no_nvcc_or_a_cpu_torch_builds_the_cpu_backend_and_says_so(setup_module, tmp_path, capsys):
    _, called = setup_module(torch_cuda=None)
    assert [e.name for e in called["ext_modules"]] == ["qlora_ext._C"]
    assert "needs a CUDA build of torch" in capsys.readouterr().out
    _, called = setup_module(torch_cuda="13.0", path=str(tmp_path))
    assert len(called["ext_modules"]) == 1
    assert "needs nvcc on the PATH" in capsys.readouterr().out


@pytest.mark.parametrize(
    "torch_cuda, sentence",
    [
        (None, "USE_CUDA=1 needs a CUDA build of torch"),
        ("12.6", "USE_CUDA=1 needs CUDA 12.8 or newer"),
        ("13.0", "USE_CUDA=1 needs nvcc on the PATH"),
    ],
)
def test_use_cuda_in_vain_is_one_sentence(setup_module, tmp_path, torch_cuda, sentence):
    with pytest.raises(SystemExit) as stopped:
        setup_module(torch_cuda=torch_cuda, path=str(tmp_path), USE_CUDA="1")
    assert sentence in str(stopped.value) and "\n" not in str(stopped.value)


def test_an_older_toolkit_is_refused_by_a_sentence(setup_module, tmp_path):
    (tmp_path / "bin").mkdir()
    path = fake_nvcc(tmp_path / "bin", tmp_path / "toolkit", "12.6")
    with pytest.raises(SystemExit, match=r"USE_CUDA=1 needs nvcc of CUDA 12\.8 or newer \(that of"):
        setup_module(torch_cuda="13.0", path=path, USE_CUDA="1")
    module, called = setup_module(torch_cuda="13.0", path=path)
    assert len(called["ext_modules"]) == 1  # unasked, the CPU backend alone
    assert module["toolkit_version"](module["TOOLKIT"]) == (12, 6)


def test_another_processor_is_refused_by_a_sentence(setup_module, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="USE_CUDA=1 needs CUDA on linux-x86_64"):
        setup_module(torch_cuda="13.0", USE_CUDA="1")


def test_rocm_is_refused_by_a_sentence(setup_module, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(SystemExit, match="USE_CUDA=1 needs CUDA on linux-x86_64"):
        setup_module(torch_cuda=None, USE_CUDA="1")


def test_turing_is_built_where_it_is_seen(setup_module, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    path = fake_nvcc(tmp_path / "bin", tmp_path / "toolkit")
    seen = [(8, 6)]
    monkeypatch.setattr("torch.utils.cpp_extension.CUDAExtension", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: seen[i])
    setup_module(torch_cuda="13.0", path=path)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0a;9.0+PTX"
    seen.append((7, 5))
    setup_module(torch_cuda="13.0", path=path)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0a;9.0+PTX"
    setup_module(torch_cuda="13.0", path=path, TORCH_CUDA_ARCH_LIST="8.6;7.5")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6;7.5"


@pytest.mark.parametrize("arch", ["7.0", "6.1+PTX", "7.5+PTX"])
def test_architectures_without_kernels_are_refused(setup_module, tmp_path, arch):
    (tmp_path / "bin").mkdir()
    path = fake_nvcc(tmp_path / "bin", tmp_path / "toolkit")
    with pytest.raises(SystemExit) as stopped:
        setup_module(torch_cuda="13.0", path=path, TORCH_CUDA_ARCH_LIST=f"8.0 {arch}")
    assert f"TORCH_CUDA_ARCH_LIST has {arch}, want 7.5, 8.0 or newer" in str(stopped.value)


def test_use_cuda_is_0_or_1(setup_module):
    with pytest.raises(SystemExit, match="USE_CUDA is 'yes', want 0, 1, or unset"):
        setup_module(USE_CUDA="yes")


def test_the_toolkit_is_the_one_nvcc_itself_uses(setup_module, tmp_path):
    """nvcc on the PATH may be a script in a folder that is no toolkit."""
    (tmp_path / "bin").mkdir()
    path = fake_nvcc(tmp_path / "bin", tmp_path / "toolkit")
    module, _ = setup_module(torch_cuda=None, path=path)
    assert module["TOOLKIT"] == str(tmp_path / "toolkit")


def test_without_torch_it_says_what_to_run():
    code = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(SETUP)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SETUP.parent
    )
    assert done.returncode == 1
    assert "pip install --no-build-isolation ." in done.stderr and "Traceback" not in done.stderr


def test_setup_is_short():
    assert len(SETUP.read_text().splitlines()) <= 150


# Builds in place, and wheels ----------------------------------------------------------------


def test_a_build_in_place_keeps_objects_and_no_library_of_another_build(
    setup_module, monkeypatch, tmp_path
):
    from setuptools import Distribution

    _, called = setup_module()
    command = called["cmdclass"]["build_ext"](Distribution({"packages": []}))
    command.extensions, command.inplace = [], True
    command.finalize_options()
    tag = f"{sys.implementation.cache_tag}-{torch.__version__}"
    assert command.build_temp == f"build/in-place-{tag}"
    assert command.build_lib == f"build/in-place-{tag}/lib"
    package = tmp_path / "qlora_ext"
    package.mkdir()
    for name in ("_C.cpython-39.so", "_C_cuda.cpython-311.so", "nn.py"):
        (package / name).touch()
    monkeypatch.setitem(command.copy_extensions_to_source.__globals__, "ROOT", str(tmp_path))
    command.copy_extensions_to_source()
    assert [path.name for path in package.iterdir()] == ["nn.py"]


def test_other_builds_go_where_setuptools_puts_them(setup_module):
    from setuptools import Distribution

    _, called = setup_module()
    command = called["cmdclass"]["build_ext"](Distribution({"packages": []}))
    command.extensions, command.build_lib, command.build_temp = [], "fuzz/lib", "fuzz/temp"
    command.finalize_options()
    assert (command.build_lib, command.build_temp) == ("fuzz/lib", "fuzz/temp")


def test_a_wheel_has_no_module_of_an_earlier_one(setup_module, monkeypatch, tmp_path):
    from setuptools import Distribution

    _, called = setup_module()
    monkeypatch.chdir(tmp_path)
    source, built, unpacked = Path("qlora_ext"), Path("lib/qlora_ext"), Path("build/bdist.linux")
    for folder, name in ((source, "new.py"), (built, "old.py"), (unpacked, "old.py")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    project = Distribution({"packages": ["qlora_ext"], "script_name": "setup.py"})
    command = called["cmdclass"]["build_py"](project)
    command.build_lib = "lib"
    command.ensure_finalized()
    command.run()
    assert [path.name for path in built.iterdir()] == ["new.py"] and not unpacked.exists()


def tool(name: str):
    """The program tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PIP = "-m pip install -q --no-build-isolation --no-deps -e ."
COMPILE = "setup.py -q build_ext --inplace"


def test_make_builds_what_changed_and_links_again_if_the_link_is_gone(monkeypatch, tmp_path):
    build = tool("build")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "RECORD", tmp_path / "build" / "built.json")
    for name in build.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in ("csrc/cpu/op.cpp", "csrc/op.h", "qlora_ext/nn.py", "setup.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    library = tmp_path / "qlora_ext" / "_C.so"
    links, ran, status = ["a wheel"], [], 0

    def run(words, cwd):
        assert words[0] == sys.executable and cwd == tmp_path
        ran.append(" ".join(words[1:]))
        library.touch()
        if "pip" in words:
            links[0] = "the checkout"
        return subprocess.CompletedProcess(words, status)

    def make() -> list[str]:
        ran.clear()
        build.main()
        return ran

    def change(name):
        path = tmp_path / name
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    monkeypatch.setattr(build, "link", lambda: links[0])
    monkeypatch.setattr(build.subprocess, "run", run)
    assert make() == [PIP] and make() == []
    change("qlora_ext/nn.py")
    assert make() == []
    for name in ("csrc/cpu/op.cpp", "csrc/op.h", "setup.py"):
        change(name)
        assert make() == [COMPILE] and make() == []
    change("pyproject.toml")
    assert make() == [PIP] and make() == []
    library.unlink()
    assert make() == [COMPILE] and make() == []
    for other in ("a wheel", None):  # pip install . was run, or pip uninstall
        links[0] = other
        assert make() == [PIP] and make() == []
    monkeypatch.setenv("USE_CUDA", "0")
    assert make() == [COMPILE] and make() == []
    with monkeypatch.context() as patched:
        patched.setattr(build.metadata, "version", lambda name: "2.99")
        assert make() == [COMPILE] and make() == []
    monkeypatch.setattr(build.sys, "prefix", "another environment")
    assert make() == [PIP] and make() == []
    # A build that fails is tried again.
    status = 3
    change("csrc/op.h")
    for _ in range(2):
        with pytest.raises(SystemExit, match="3"):
            make()
        assert len(ran) == 1


def test_wheels_are_tested_from_an_empty_folder_and_must_be_installed():
    code = "import os; print(os.listdir())"
    words = ["sh", TOOLS / "installed.sh", sys.executable, "-c", code]
    done = subprocess.run(words, cwd=SETUP.parent, capture_output=True, text=True)
    installed = Path(sysconfig.get_path("platlib")).resolve()
    if installed in Path(qlora_ext.__file__).resolve().parents:
        assert done.returncode == 0 and done.stdout == "[]\n", done.stderr
    else:
        assert done.returncode == 1 and done.stdout == ""
        assert f"want the one installed in {installed}" in done.stderr


def test_the_table_of_sizes():
    now = {"a/new.py": 410, "a/cut.py": 3, "a/same.py": 7}
    table = tool("size").table(now, {"a/cut.py": 5, "a/gone.py": 75, "a/same.py": 7}, "1a2b")
    assert [" ".join(row.split()) for row in table.splitlines()] == [
        "3 -2 a/cut.py",
        "0 -75 gone a/gone.py",
        "410* +410 new a/new.py",
        "7 a/same.py",
        "420 +333 in 3 files: 482.8% of 87 lines in 3 files at 1a2b; * is more than 400 lines",
    ]


def test_the_base_of_the_sizes_can_be_read():
    size = tool("size")
    commit, base = size.read_base(size.BASE.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    assert base["qlora_ext/__init__.py"] > 10 and sum(base.values()) > 10_000


# A library that does not fit ----------------------------------------------------------------


@pytest.fixture
def import_a_copy(tmp_path):
    """Imports a copy of the package that has these files as libraries; returns the error."""

    def run(*libraries: str) -> str:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        package = tmp_path / "qlora_ext"
        shutil.copytree(Path(qlora_ext.__file__).parent, package, ignore=ignored)
        shutil.copy(qlora_ext_enable.__file__, tmp_path)  # torch starts it
        for name in libraries:
            (package / name).write_text("no library")
        # Without the link to the checkout, which would give the copy the checkout's library.
        code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in "
        code += "getattr(f, '__module__', '')]; import qlora_ext"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1, done.stdout
        return done.stderr.splitlines()[-1]

    return run


SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
HOW = "; build it in this environment: `make build`, or `pip install --no-build-isolation .`"


@pytest.mark.parametrize("libraries", [(), ("_C.cpython-39-x.so", "_C.cpython-38-x.so")])
def test_a_source_tree_that_was_not_built_for_this_python_is_refused(
    import_a_copy, tmp_path, libraries
):
    found = ", ".join(sorted(libraries)) or "none"
    assert import_a_copy(*libraries) == (
        f"ImportError: qlora_ext: {tmp_path / 'qlora_ext'} has no compiled library for this "
        f"Python: found {found}, want _C{SUFFIX}{HOW}"
    )


def test_a_library_that_does_not_load_is_refused_with_torch_s_version(import_a_copy):
    error = import_a_copy(f"_C{SUFFIX}")
    start = f"qlora_ext: the compiled library does not load under torch {torch.__version__}: "
    assert error.startswith(f"ImportError: {start}") and error.endswith(HOW)


@pytest.fixture
def load_cuda(monkeypatch):
    """Loads these files as the CUDA library, built for CUDA 13.0, under a torch for this CUDA.
    Returns what was warned of and build_info()'s cuda_why_not."""
    module = sys.modules["qlora_ext.build_info"]
    monkeypatch.setattr(module._C, "cuda_version", "13.0", raising=False)

    def run(torch_cuda: str | None, *libraries) -> tuple[list[str], str | None]:
        monkeypatch.setattr(module, "_CUDA_LIBRARIES", list(libraries))
        monkeypatch.setattr(module, "_cuda_error", None)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module._load_cuda_backend()
        return [str(warning.message) for warning in caught], qlora_ext.build_info()["cuda_why_not"]

    return run


def test_a_library_for_another_cuda_stays_off_with_a_warning(load_cuda, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    warned, why_not = load_cuda("12.8", "_C_cuda.so")
    assert why_not == (
        "the CUDA library was built for CUDA 13.0, want CUDA 12.8 like torch " + torch.__version__
    )
    assert warned == [f"qlora_ext runs on the CPU only: {why_not}{HOW}"]
    warned, why_not = load_cuda(None, "_C_cuda.so")  # a CPU torch: nothing to warn of
    assert warned == [] and why_not == f"torch {torch.__version__} is a CPU build"
    assert loaded == []
    assert load_cuda("13.2", "_C_cuda.so") == ([], None)
    assert loaded == ["_C_cuda.so"]


def test_a_cuda_library_that_does_not_load_stays_off_with_a_warning(load_cuda, tmp_path):
    """As one does whose libcudart.so.13 is not there."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "a build needs a compiler too"
    (tmp_path / "empty.cpp").write_text("")
    words = [compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", "-L.", "empty.cpp", "-o"]
    missing = "libqlora_test_runtime.so.13"
    subprocess.run([*words, missing, f"-Wl,-soname,{missing}"], cwd=tmp_path, check=True)
    subprocess.run([*words, "_C_cuda.so", f"-l:{missing}"], cwd=tmp_path, check=True)
    (tmp_path / missing).unlink()
    warned, why_not = load_cuda("13.0", tmp_path / "_C_cuda.so")
    start = "the CUDA library does not load: "
    assert why_not.startswith(start) and missing in why_not
    assert warned == [f"qlora_ext runs on the CPU only: {why_not}{HOW}"]


def test_it_imports_and_runs_beside_a_cuda_library_that_does_not_fit(tmp_path):
    package = tmp_path / "qlora_ext"
    shutil.copytree(
        Path(qlora_ext.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("_C_cuda*", "__pycache__"),
    )
    (package / f"_C_cuda{SUFFIX}").write_text("no library")
    code = """
import torch
torch.version.cuda = "99.0"
import qlora_ext
q = qlora_ext.quantize_4bit(torch.ones(4, 64))
assert qlora_ext.linear_4bit(torch.ones(1, 64), q).tolist() == [[64.0] * 4]
print(qlora_ext.__file__, qlora_ext.build_info()["cuda_live"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(package / "__init__.py"), "False"]
    assert "qlora_ext runs on the CPU only: the CUDA library was built for CUDA " in done.stderr
    assert ", want CUDA 99.0 like torch " in done.stderr


# What was built -----------------------------------------------------------------------------


def test_build_info():
    info = qlora_ext.build_info()
    assert info["torch"] == torch.__version__ and info["torch_target"] == "2.11"
    assert info["cpu_path"] in _C.cpu_paths
    assert info["cuda_live"] == (
        info["cuda_built"] and not CPU_TORCH and info["cuda_why_not"] is None
    )
    assert info["cuda_live"] or info["cuda_why_not"]


@pytest.mark.parametrize(
    "live, gpus, says", [(True, 0, "built, no GPU seen"), (True, 2, "yes"), (False, 0, "no")]
)
def test_info_does_not_promise_a_gpu_that_is_not_seen(monkeypatch, capsys, live, gpus, says):
    from qlora_ext import cli

    def dispatches(op, key):
        return live

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", dispatches)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    info = qlora_ext.build_info()
    assert info["cuda_live"] is live and info["cuda_gpus"] == gpus
    cli.print_build_info()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert dict(lines)["cuda_live"] == says
    pytest.importorskip("typer")
    from qlora_ext.cli import app

    app.info()
    assert f"cuda_live {says}" in " ".join(capsys.readouterr().out.split())


def run_module(**environment):
    return subprocess.run(
        [sys.executable, "-m", "qlora_ext"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=TESTS,
    )


def test_python_m_prints_it():
    done = run_module(QLORA_EXT_CPU="portable")
    assert done.returncode == 0, done.stderr
    assert "cpu_path  portable" in done.stdout


def test_an_unknown_cpu_path_is_a_sentence():
    done = run_module(QLORA_EXT_CPU="sse9")
    assert done.returncode != 0 and "QLORA_EXT_CPU" in done.stderr and "sse9" in done.stderr
    code = "import torch, qlora_ext; qlora_ext.quantize_4bit(torch.zeros(4))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "QLORA_EXT_CPU": "sse9"},
        cwd=TESTS,
    )
    assert done.returncode != 0 and "sse9" in done.stderr and "want" in done.stderr


def test_importing_it_does_not_load_the_ecosystem():
    heavy = {"transformers", "peft", "trl", "accelerate", "bitsandbytes"}
    code = f"import sys, qlora_ext; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS)
    assert done.stdout.strip() == "[]", done.stderr


def test_importing_it_registers_a_fake_for_every_op():
    code = """
import torch, qlora_ext
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("qlora_ext::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(len(names) > 20, [name for name in names if not has(name, "Meta")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS)
    assert done.stdout.split(maxsplit=1)[0] == "True", done.stderr
    assert done.stdout.split(maxsplit=1)[1].strip() == "[]"


def test_no_torch_header_in_device_files():
    cuda = SETUP.parent / "csrc" / "cuda"
    files = [*cuda.glob("*.cu"), *cuda.glob("*.cuh")]
    assert files
    for file in files:
        for line in file.read_text().splitlines():
            assert not (
                line.startswith("#include") and ("torch" in line or "ATen" in line or "c10" in line)
            ), (file, line)


def test_files_are_read_as_utf_8_in_every_locale(tmp_path):
    """Python decodes files by the locale, unless told: one of ASCII or Latin-1 is still in use."""
    # The folder is an argument, since its name may have letters that ASCII lacks.
    code = """
import locale, pathlib, sys
from qlora_ext import files
from qlora_ext.adapters.peft_config import read_adapter_config
assert locale.getpreferredencoding(False) != "utf-8"
folder = pathlib.Path(sys.argv[1])
assert files.read_json(folder / "config.json")["base_model_name_or_path"] == "\\u00e9\\u4e2d"
assert read_adapter_config(folder)["base_model_name_or_path"] == "\\u00e9\\u4e2d"
"""
    text = (
        '{"base_model_name_or_path": "\u00e9\u4e2d", "peft_type": "LORA", "r": 4, "lora_alpha": 8}'
    )
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [False, True])
def test_make_works_where_paths_have_quotes_and_spaces(tmp_path, given):
    """Nothing is built: the files that say what was done are there, and the interpreter is a
    script that says how it was started."""
    tree = tmp_path / "it's a $HOME tree"
    python = (tmp_path / "an env's bin" if given else tree / ".venv" / "bin") / "python"
    for folder in (tree, python.parent):
        folder.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\necho "$(basename "$PWD"): $*"\n')
    python.chmod(0o755)
    shutil.copy(SETUP.parent / "Makefile", tree)
    shutil.copytree(TOOLS, tree / "tools")
    needed = ("pyproject.toml", "examples/requirements.txt", "tests/versions/newest.txt")
    for file in (tree / name for name in needed):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    name = re.sub(r"[^A-Za-z0-9.-]", "_", str(python))
    state = tree / (f"build/state{name}" if given else ".venv/qlora_ext")
    (state / "deepspeed-packages").mkdir(parents=True)
    (state / "deepspeed-packages" / "version").write_text("deepspeed==1")
    for name in ("torch", "train", "test", "demo"):
        (state / name).write_text("torch \n")
    (tree / "build" / "cutlass").mkdir(parents=True)
    (tree / "build" / "cutlass" / "ready").touch()
    # What a make that runs these tests was given, its recipes have in the environment.
    given_to_make = ("MAKE", "MFLAGS", "TORCH", "PYTHON", "ARGS", "JOBS", "CASES", "DEEPSPEED")
    env = {k: v for k, v in os.environ.items() if not k.startswith(given_to_make)}
    env |= {"PATH_TESTS": "test_a.py", "PEER_TESTS": "test_b.py test_c.py"}

    def started(*words: str) -> list[str]:
        """What the interpreter was started with, after the build."""
        words = ("make", "-s", *words, *([f"PYTHON={python}"] if given else []))
        made = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        lines = [
            line.removeprefix(f"{tree.name}: ")
            for line in made.stdout.splitlines()
            if line.startswith(f"{tree.name}: ") and "import torch" not in line
        ]
        assert lines[0] == "tools/build.py"
        return lines[1:]

    assert started("info") == ["-m qlora_ext"]
    assert started("finetune", "ARGS=--steps 6") == ["examples/finetune.py --steps 6"]
    assert started("test", "ARGS=-k 'a b'") == [
        "-m pytest -n 2 --dist worksteal -m not slow -k a b"
    ]
    assert started("test", "JOBS=1") == ["-m pytest -m not slow"]
    deepspeed = ["-c import deepspeed", "-m pytest tests/distributed/test_integration_deepspeed.py"]
    assert started("test-deepspeed", "DEEPSPEED=deepspeed==1") == deepspeed
    paths = started("test-paths", "ARGS=-x")
    kernels = (
        "-k not simt and not cuda and not compile and not opcheck and not t5 -x tests/test_a.py"
    )
    run = "-m pytest -q -n 2 --dist worksteal -m not slow"
    assert paths[0] == f"{run} {kernels}"
    assert paths[-1] == f"{run} -x tests/test_b.py tests/test_c.py"
