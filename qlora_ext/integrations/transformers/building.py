"""config.json and the model class made of it, with errors that name the key at fault."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import re
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_utils import ContextManagers

from ...checks import out_of_memory
from ...files import SafetensorsFiles, read_json, reading
from ...models.config_file import LAYER_COUNTS, read_raw_config
from ...text import CheckpointError, first_few, first_line, plural, printable, shorten


@contextlib.contextmanager
def reading_in_order():
    """transformers reads ahead in threads, which would hold more than one module's tensors."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


CULPRIT_SECONDS = 5.0  # for finding the key of config.json that is at fault


def read_config(folder: Path, files: SafetensorsFiles | None = None):
    """transformers' config of a checkpoint.

    Args:
        folder: its config.json is read; nothing in it is run.
        files: the folder's, where they are known: they bound what is made.
    """
    raw = read_raw_config(folder, files)
    return _naming_the_key(
        folder / "config.json",
        raw,
        lambda: _usable(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)),
        _config_of,
    )


def _config_of(raw: dict):
    """A config made of raw values, as from_pretrained makes it of a file's."""
    return _usable(transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw))


def _usable(config):
    """A config whose text part is one too, and whose methods are its class's: transformers takes
    any value for some names, and keeps every key of the file as an attribute."""
    inner = [v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig)]
    for part in (config, *inner):
        for key in vars(part):
            if key == "_auto_class" or callable(getattr(type(part), key, None)):
                raise TypeError(f"{key} is a name of its config's own code")
    for part in (config.get_text_config(), config.get_text_config(decoder=True)):
        if not isinstance(part, transformers.PreTrainedConfig):
            raise TypeError(f"it has {shorten(part)} for the config of its text model")
    return config


def _naming_the_key(path: Path, raw: dict, make: Callable, make_of: Callable):
    """make(); where it fails, the error names the value of `raw`, the object in `path`, without
    which make_of succeeds, if there is one."""
    try:
        with reading(path):
            return make()
    except CheckpointError as error:
        cause = error.__cause__
        key = None if cause is None else _culprit(raw, make_of)
        if key is None:
            raise
    raise CheckpointError(
        f"{path}: {printable(key)} is {shorten(raw[key])}, which transformers cannot take "
        f"({first_line(cause)})"
    )


def _culprit(raw: dict, make_of: Callable) -> str | None:
    """The key without whose value make_of(raw) works, if one is found within CULPRIT_SECONDS.

    Keys that the architecture's config does not know are halved until one is left, however many
    there are. Those that it knows may need each other, so they are left out one at a time.
    """
    end = time.monotonic() + CULPRIT_SECONDS

    def works(values: dict) -> bool:
        if time.monotonic() > end:
            return False
        try:
            make_of(copy.deepcopy(values))
        except Exception:  # whatever it was before, or another consequence
            return False
        return True

    def without(keys: Iterable[str]) -> dict:
        left_out = set(keys)
        return {key: value for key, value in raw.items() if key not in left_out}

    few = {key: min(value, 1) for key, value in raw.items() if key in LAYER_COUNTS
           and isinstance(value, int)}  # fmt: skip
    raw = {**raw, **few}  # quick to build
    known = _known_keys(raw.get("model_type"))
    unknown = [key for key in raw if key not in known]
    if unknown and works(without(unknown)):
        if works(raw):
            return None
        while len(unknown) > 1:
            half = unknown[: len(unknown) // 2]
            unknown = half if works(without(half)) else unknown[len(half) :]
        return unknown[0] if works(without(unknown)) else None
    raw = without(unknown)
    if works(raw):
        return None
    return next((key for key in raw if works(without([key]))), None)


def _known_keys(model_type: object) -> set[str]:
    """What the config of an architecture has names for."""
    try:
        cls = transformers.CONFIG_MAPPING[model_type]
    except (KeyError, TypeError):
        return {"model_type"}
    fields = (getattr(part, "__annotations__", {}) for part in cls.__mro__)
    return set().union(*fields, cls.attribute_map, inspect.signature(cls).parameters)


def model_class(config, path: Path | str = "config.json") -> type:
    """The class that was saved, or the causal language model of the config's architecture; path is
    how errors call the config's file."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            if found.config_class is not None and not isinstance(config, found.config_class):
                raise CheckpointError(
                    f"{path}: architectures has {name}, which is none of a {config.model_type!r}"
                )
            return found
    try:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise CheckpointError(
            f"{path}: architectures is {shorten(config.architectures)}, and transformers "
            f"{transformers.__version__} has none of them nor a language model for "
            f"{config.model_type!r}"
        ) from None


def stored_method(config) -> str | None:
    """quant_method of a checkpoint that is quantized, else None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "unknown")
    return str(getattr(method, "value", method))  # transformers has members of an enum for some


def unquantized(config):
    """A copy of a config without its quantization settings."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for attribute in ("quantization_config", "_is_quantized"):
            part.__dict__.pop(attribute, None)
    return config


def build(config, dtype: torch.dtype, cls: type | None = None) -> nn.Module:
    """The model on the meta device, in the classes and dtypes that from_pretrained makes."""
    cls = cls or model_class(config)
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model = cls(copy.deepcopy(config))
    if plan := model._get_dtype_plan(dtype):  # of parts that stay in fp32
        protected, pattern_of_group, _ = build_glob_alternation(list(plan))
        for name, parameter in model.named_parameters():
            if match := protected.search(name):
                parameter.data = parameter.data.to(plan[pattern_of_group[match.lastgroup]])
    return model.eval()


def build_folder(
    folder: Path, config, dtype: torch.dtype, find_class: Callable = model_class
) -> nn.Module:
    """As `build`, of a config that was read from a folder: an error names the value at fault.

    Args:
        find_class: the class for (config, path of its file).
    """
    path = folder / "config.json"

    def make(config):
        return build(config, dtype, find_class(config, path))

    return _naming_the_key(
        path, read_json(path), lambda: make(config), lambda raw: make(_config_of(raw))
    )


@contextlib.contextmanager
def loading(
    folder: Path | str,
    files: SafetensorsFiles | None = None,
    config=None,
    keywords: Container[str] = (),
):
    """Within it transformers loads the model of a folder: what it raises is a CheckpointError.

    Args:
        files: of the folder, where they are read: the error names the one at fault.
        config: of the folder; where no model can be made of it, the error names the key at fault.
        keywords: names of those that the caller gave: an error about one is his, a TypeError.
    """
    try:
        with reading(folder, "cannot be loaded as a model"):
            try:
                yield
            except RuntimeError as error:
                key, why = _reported(error)
                if key is None:
                    raise
                where = folder if files is None else files.where.get(key, folder)
                raise CheckpointError(f"{where}: {key} cannot be loaded ({why})") from error
    except CheckpointError as error:
        cause = error.__cause__
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        if isinstance(cause, TypeError) and unknown and unknown[1] in keywords:
            raise cause from None
        if config is not None and cause is not None and not out_of_memory(cause):
            build_folder(Path(folder), unquantized(config), torch.bfloat16)
        raise


def _reported(error: RuntimeError) -> tuple[str | None, str]:
    """A tensor that transformers' loader could not use, and why; (None, "") where it says of none.
    Its error refers to a report in its log, which is made of a variable of its own."""
    trace = error.__traceback__
    while trace is not None:
        info = trace.tb_frame.f_locals.get("loading_info")
        for key, text in getattr(info, "conversion_errors", {}).items():
            return key, last_words(text)
        for key, got, want in sorted(getattr(info, "mismatched_keys", ())):
            return key, f"shape got {list(got)}, want {list(want)} by config.json"
        trace = trace.tb_next
    return None, ""


def last_words(text: str) -> str:
    """The sentence of an error of which transformers keeps the traceback as a text."""
    before, _, _ = text.rpartition("\nError")  # then come the operation and the tensor's name
    words = (before or text).rpartition("\n")[2].strip(" \"'")  # a KeyError quotes its own
    return first_line(ValueError(words or text))


def check_nothing_anew(folder: Path | str, model: nn.Module, missing: Iterable[str]) -> None:
    """CheckpointError if transformers made tensors anew, at random, that a folder lacks.

    Args:
        missing: `missing_keys` of from_pretrained's loading info; tied ones are not among them.
    """
    missing = sorted(missing)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {plural(len(missing), 'tensor')} of {type(model).__name__}: "
            f"{first_few(missing)}: download it again, or save the model again"
        )
