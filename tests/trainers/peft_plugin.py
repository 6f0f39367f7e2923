"""A plug-in of pytest that runs PEFT's own 4-bit tests on a CPU, on a quantizer of choice.

`pytest -p peft_plugin` in a folder with PEFT's `tests`; tools/peft_tests.sh prepares it. PEFT's
files are not changed. $PEFT_TESTS_ON says on what they run:

    stock   bitsandbytes' layers
    config  QLoraExtConfig in the place of BitsAndBytesConfig(load_in_4bit=True)
    layers  the same BitsAndBytesConfig, with QLORA_EXT_ENABLE=layers in the environment

The tests want one GPU: "cuda" and 0 are the CPU here, and training is in fp32 where they say fp16.
What wants several GPUs is skipped by PEFT's own marks. Models come from peft_hub.py's cache.
$PEFT_TESTS_RESULT gets a line for each test: name, outcome, reason.
"""

import collections
import functools
import gc
import inspect
import json
import os
import re
import types

import pytest
import torch

ON = os.environ.get("PEFT_TESTS_ON", "stock")
ONE_GPU = re.compile(r"requires (a |an )?(GPU|hardware accelerator|XPU)")
QUOTES = [f"Be number {i}; everyone else is already taken." for i in range(48)]

made = []  # the 4-bit configs of the test that runs


# One GPU, which is the CPU -------------------------------------------------------------------


def on_cpu(device):
    """The device that stands for `device`."""
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return "cpu"
    if type(device) is int:
        return "cpu"
    return device


def translating(function):
    """A function of tensors or modules whose devices are on_cpu's."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        args = [args[0], *map(on_cpu, args[1:])] if len(args) > 1 else args
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


def pretend_gpu():
    import accelerate.test_utils.testing as testing
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import BatchEncoding

    testing.get_backend = lambda: ("cuda", 1, lambda: 0)
    for owner in (torch.Tensor, torch.nn.Module, BatchEncoding):
        owner.to = translating(owner.to)
    for name in ("arange", "ones", "rand", "randn", "zeros"):
        function = getattr(torch, name)

        @functools.wraps(function)
        def factory(*args, _function=function, device=None, **kwargs):
            return _function(*args, device=on_cpu(device), **kwargs)

        setattr(torch, name, factory)

    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls, *args, device_map=None, **kwargs):
        if isinstance(device_map, dict):
            device_map = {name: on_cpu(device) for name, device in device_map.items()}
        return load(cls, *args, device_map=on_cpu(device_map), **kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


# No hub --------------------------------------------------------------------------------------


class Everything(collections.defaultdict):
    """PEFT's `_HUB_MODEL_ACCESSES`, by which it goes offline for a model that it has seen."""

    def __contains__(self, key):
        return True


def local_data():
    import datasets

    def load_dataset(*args, split=None, **kwargs):
        data = datasets.Dataset.from_dict({"quote": QUOTES})
        return data if split else datasets.DatasetDict({"train": data})

    datasets.load_dataset = load_dataset


# Our config and our layers' names in PEFT's test modules -------------------------------------


def config_class():
    """What the tests call as BitsAndBytesConfig."""
    from transformers import BitsAndBytesConfig

    def make(*args, **kwargs):
        config = BitsAndBytesConfig(*args, **kwargs)
        if not config.load_in_4bit:
            return config
        made.append(config)
        if ON != "config":
            return config
        from qlora_ext.integrations.transformers import QLoraExtConfig

        return QLoraExtConfig.from_bnb(config)

    return make


def training_arguments(original):
    @functools.wraps(original)
    def make(*args, fp16=False, bf16=False, **kwargs):
        return original(*args, use_cpu=True, report_to="none", **kwargs)

    return make


def our_names():
    """Our layers under the names by which the tests look for bitsandbytes'."""
    if ON == "stock":
        return {}
    import bitsandbytes

    from qlora_ext.integrations.peft.lora import PeftLoraLinear4bit
    from qlora_ext.integrations.peft.other_layers import (
        IA3Linear4bit,
        RandLoraLinear4bit,
        RoadLinear4bit,
    )
    from qlora_ext.nn import Linear4bit

    nn = types.SimpleNamespace(**{**vars(bitsandbytes.nn), "Linear4bit": Linear4bit})
    bnb = types.SimpleNamespace(**{**vars(bitsandbytes), "nn": nn})
    names = {"bnb": bnb, "LoraLinear4bit": PeftLoraLinear4bit, "IA3Linear4bit": IA3Linear4bit}
    return names | {"RandLoraLinear4bit": RandLoraLinear4bit, "RoadLinear4bit": RoadLinear4bit}


def patch(module):
    names = our_names()
    names |= {"BitsAndBytesConfig": config_class()}
    for name in ("TrainingArguments", "Seq2SeqTrainingArguments"):
        if hasattr(module, name):
            names[name] = training_arguments(getattr(module, name))
    if hasattr(module, "DEVICE"):  # PEFT skips merges on a CPU
        names["DEVICE"] = "cuda"
    for name, value in names.items():
        if hasattr(module, name):
            setattr(module, name, value)


# pytest's hooks ------------------------------------------------------------------------------


def pytest_configure(config):
    pretend_gpu()
    local_data()
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = Everything(int)
    for mark in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "regression"):
        config.addinivalue_line("markers", f"{mark}: PEFT's")


@functools.cache
def loaders(cls) -> tuple[str, ...]:
    """The fixtures and helpers of a class that make a 4-bit config."""
    found = []
    for name, member in inspect.getmembers(cls):
        function = getattr(member, "__wrapped__", getattr(member, "_fixture_function", member))
        if inspect.isfunction(function) and not name.startswith("test"):
            code = inspect.getsource(function)
            if "load_in_4bit" in code and "self" in code:
                found.append(name)
    return tuple(found)


def is_4bit(item) -> bool:
    """Whether a test asks for 4 bits, itself or by a fixture or a helper."""
    function = inspect.unwrap(item.function)
    if not inspect.isfunction(function):  # one of PEFT's has its decorators in a wrong order
        return False
    code = inspect.getsource(function)
    if re.search(r"8_?bit", item.name):
        return False
    if "load_in_4bit" in code or "4bit" in item.name:
        return True
    return any(re.search(rf"\b{name}\b", code) for name in loaders(item.cls))


def pytest_collection_modifyitems(config, items):
    for module in {item.module for item in items}:
        patch(module)
    kept = [item for item in items if is_4bit(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        if item.get_closest_marker("multi_gpu_tests") and not item.get_closest_marker(
            "single_gpu_tests"
        ):
            item.add_marker(pytest.mark.skip(reason="test requires multiple hardware accelerators"))
    nodes = {node for item in items for node in item.listchain()}
    for node in nodes:
        node.own_markers = [
            mark
            for mark in node.own_markers
            if not (mark.name == "skipif" and ONE_GPU.search(mark.kwargs.get("reason", "")))
        ]


def pytest_collection_finish():
    gc.freeze()  # each of PEFT's tests collects garbage at its end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    made.clear()
    torch.manual_seed(0)
    return (yield)


reported = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    name = item.nodeid.partition("tests/")[2]
    if report.failed and reported.get(name, {}).get("outcome") != "failed":
        error = call.excinfo.exconly().strip().splitlines()
        reported[name] = {"outcome": "failed", "reason": error[0][:300]}
    elif hasattr(report, "wasxfail"):
        reported[name] = {"outcome": "xfailed", "reason": report.wasxfail}
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reported[name] = {"outcome": "skipped", "reason": reason.removeprefix("Skipped: ")}
    elif report.when == "call":
        reported.setdefault(name, {"outcome": "passed", "reason": ""})
    if report.when == "teardown":
        with open(os.environ["PEFT_TESTS_RESULT"], "a") as file:
            file.write(json.dumps({"name": name, **reported[name], "packs": bool(made)}) + "\n")
    return report
