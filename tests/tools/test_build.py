"""setup.py's decisions, asked without building: what it says, and which toolkit it takes."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_ext
from paths import REPOSITORY, TESTS
from qlora_ext.ops import _C

SETUP = REPOSITORY / "setup.py"
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
    with pytest.raises(SystemExit, match="USE_CUDA is 'yes', want 0 or 1"):
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
    assert len(SETUP.read_text().splitlines()) <= 120


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
from qlora_ext.adapters.files import _read_config
assert locale.getpreferredencoding(False) != "utf-8"
folder = pathlib.Path(sys.argv[1])
assert files.read_json(folder / "config.json")["base_model_name_or_path"] == "\\u00e9\\u4e2d"
assert _read_config(folder)["base_model_name_or_path"] == "\\u00e9\\u4e2d"
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
    for folder in (tree / "tests", tree / "csrc", tree / "qlora_ext", python.parent):
        folder.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\necho "$(basename "$PWD"): $*"\n')
    python.chmod(0o755)
    shutil.copy(REPOSITORY / "Makefile", tree)
    for name in ("setup.py", "pyproject.toml"):
        (tree / name).touch()
    name = re.sub(r"[^A-Za-z0-9.-]", "_", str(python))
    state = tree / (f"build/state{name}" if given else ".venv/qlora_ext")
    state.mkdir(parents=True)
    (state / "torch").write_text("torch \n")
    (state / "built").touch()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    words = ["make", "info", *([f"PYTHON={python}"] if given else [])]
    made = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.endswith("tests: -m qlora_ext\n")
