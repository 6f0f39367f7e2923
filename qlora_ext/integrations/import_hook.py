"""Attaches the plug-ins for torch.compile, transformers, PEFT and TRL when those are imported.

`import qlora_ext` does not import them, because together they take seconds. `attach()` puts a
finder on `sys.meta_path`. It watches for the modules in `_HOOKS`, and runs a module's hook right
after the module has been executed. A module that is already loaded gets its hook at once, so the
order of imports does not matter.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from typing import NamedTuple

from . import averaging, torch_modules


class Window(NamedTuple):
    """The release series of a library that we work with."""

    oldest: str  # the oldest that `make test-versions` runs
    newest: str  # the newest that it runs; newer ones of the same major version are welcome
    older: str  # what is known of older ones; it ends the warning about them


WINDOWS = {
    "transformers": Window(
        "5.6",
        "5.24",
        "5.0 to 5.5 loaded, saved and merged a small model in a trial. Before 5.0 the plug-in is "
        "off: QLoraExtConfig fails, and PEFT's adapters on 4-bit layers fail to merge",
    ),
    "peft": Window("0.18", "0.21", "older ones cannot be imported together with transformers 5"),
    "trl": Window("0.24", "1.16", "no failure is known with older ones"),
    "accelerate": Window("1.4", "1.15", "TRL 0.24 and newer need it"),
}

# module whose execution triggers the hook -> (distribution, our plug-in or None).
# transformers itself is a lazy module, but every way to load a model imports modeling_utils.
_HOOKS = {
    "torch._dynamo": ("torch", "compiled"),
    "transformers.modeling_utils": ("transformers", "transformers"),
    "peft": ("peft", "peft"),
    "trl": ("trl", None),
    "accelerate": ("accelerate", None),
}

_attached: set[str] = set()
_older: set[str] = set()  # distributions that are older than their window


def _series(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def check_version(distribution: str) -> None:
    """Warns if the installed `distribution` is older than its window, or of a newer major version.

    Args:
        distribution: a key of `WINDOWS`.
    """
    found = importlib.metadata.version(distribution)
    window = WINDOWS[distribution]
    if _series(found) < _series(window.oldest):
        _older.add(distribution)
        said = f"want {window.oldest} or newer; {window.older}"
    elif _series(found)[0] > _series(window.newest)[0]:
        said = f"the newest release tested is {window.newest}; our plug-in for it may not work"
    else:
        return
    warnings.warn(f"qlora_ext: found {distribution} {found}, {said}", stacklevel=2)


def named_by_version(error: ImportError, distribution: str) -> ImportError:
    """The error to raise for `error`, which importing a plug-in raised. If the installed
    `distribution` is too old for the plug-in, it says so."""
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return error
    oldest = WINDOWS[distribution].oldest
    if _series(found) >= _series(oldest):
        return error
    return ImportError(f"qlora_ext: found {distribution} {found}, want {oldest} or newer ({error})")


def _run_hook(module: str) -> None:
    """Checks the version and attaches our plug-in once, after `module` has been executed."""
    if module in _attached:
        return
    _attached.add(module)
    distribution, plugin = _HOOKS[module]
    if distribution in WINDOWS:
        check_version(distribution)
    if plugin is None:
        return
    try:
        importlib.import_module(f"{__package__}.{plugin}")  # importing it attaches it
    except (ImportError, AttributeError) as error:
        # Another release may lack a function that we hook. That must not break its own import.
        if _older:  # a warning has said what fails (PEFT's plug-in needs that of transformers)
            return
        window = WINDOWS.get(distribution)
        warnings.warn(
            f"qlora_ext: could not attach to {distribution} "
            f"{importlib.metadata.version(distribution)} ({error}); our plug-in for it is off"
            + (f"; install a tested one, {window.oldest} to {window.newest}" if window else ""),
            stacklevel=2,
        )


class _HookFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself. It wraps the loader that other finders give for a watched module."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _HOOKS or name in _attached or name in self._searching:
            return None
        self._searching.add(name)  # find_spec below asks every finder again, this one included
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _run_hook(name)

        # Set it on this one loader, so that its class and other modules are not affected.
        spec.loader.exec_module = exec_module
        return spec


def attach() -> None:
    """Attaches the plug-ins: now for packages that are loaded, later for the others. Idempotent."""
    averaging.attach()
    torch_modules.attach()
    if not any(isinstance(finder, _HookFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HookFinder())
    for name in _HOOKS:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        # A module that is being imported right now is not complete, so it cannot be hooked yet.
        if module is not None and not getattr(spec, "_initializing", False):
            _run_hook(name)
