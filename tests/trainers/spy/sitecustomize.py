"""Counts what ran, in a process that knows nothing of it: on PYTHONPATH, Python imports this first.

Each process in which anything was counted writes `{SPY_FOLDER}/{pid}.json` when it ends:
bitsandbytes' and our 4-bit layers' forward calls, our ops' calls, and the releases in use.
"""

import atexit
import collections
import functools
import importlib.abc
import json
import os
import sys
from importlib import metadata
from pathlib import Path

counts = collections.Counter()


def counted(owner, name, label):
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        counts[label] += 1
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


# Of a module, once it was imported: (class or None, function, label).
WATCHED = {
    "bitsandbytes.nn.modules": [("Linear4bit", "forward", "bitsandbytes.Linear4bit")],
    "qlora_ext.nn.linear": [("Linear4bit", "forward", "qlora_ext.Linear4bit")],
    "qlora_ext.ops": [
        (None, name, name)
        for name in ("dequantize_4bit", "gemm_4bit", "lora_linear", "lora_gemm_4bit")
    ],
}


class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)))
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for owner, name, label in WATCHED[fullname]:
                counted(getattr(module, owner) if owner else module, name, label)

        spec.loader.exec_module = exec_module
        return spec


def write():
    if not counts:
        return
    versions = {}
    for name in ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "-"
    found = {"calls": counts, "versions": versions, "argv": sys.argv}
    Path(os.environ["SPY_FOLDER"], f"{os.getpid()}.json").write_text(json.dumps(found))


if "SPY_FOLDER" in os.environ:
    sys.meta_path.insert(0, Watch())
    atexit.register(write)
