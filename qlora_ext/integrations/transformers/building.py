"""Makes a config and a model from config.json, with errors that name the key at fault."""

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
    """A context in which transformers does not read ahead in threads, which would hold the tensors
    of several modules in memory."""
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


CULPRIT_SECONDS = 5.0  # time to find the key of config.json that is at fault


def read_config(folder: Path, files: SafetensorsFiles | None = None):
    """transformers' config of a checkpoint.

    Args:
        folder: its config.json is read; no code in it is run.
        files: the folder's files if they are known. They limit the numbers of layers and experts.
    """
    raw = read_raw_config(folder, files)
    return _naming_the_key(
        folder / "config.json",
        raw,
        lambda: _usable(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)),
        _config_of,
    )


def _config_of(raw: dict):
    """A config made from raw values, as from_pretrained makes it from a file's."""
    return _usable(transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw))


def _usable(config):
    """Returns config. Raises TypeError if its text part is not a config, or if a key has the name
    of one of its methods and hides it: transformers makes every key an attribute."""
    inner = [v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig)]
    for part in (config, *inner):
        for key in vars(part):
            if key == "_auto_class" or callable(getattr(type(part), key, None)):
                raise TypeError(f"the config's own code uses the name {key}")
    for part in (config.get_text_config(), config.get_text_config(decoder=True)):
        if not isinstance(part, transformers.PreTrainedConfig):
            raise TypeError(f"the config of its text model is {shorten(part)}, want an object")
    return config


def _naming_the_key(path: Path, raw: dict, make: Callable, make_of: Callable):
    """Returns make(). If that fails, and make_of succeeds without one of the keys of `raw`, the
    object in `path`, the error names that key."""
    try:
        with reading(path):
            return make()
    except CheckpointError as error:
        cause = error.__cause__
        key = None if cause is None else _culprit(raw, make_of)
        if key is None:
            raise
    raise CheckpointError(
        f"{path}: {printable(key)} is {shorten(raw[key])}, which transformers does not accept "
        f"({first_line(cause)}); correct it, or download the file again"
    )


def _culprit(raw: dict, make_of: Callable) -> str | None:
    """The key without which make_of(raw) works; None if it is not found in CULPRIT_SECONDS.

    There may be many keys that the architecture's config does not know, so they are halved until
    one is left. Known keys may need each other, so they are left out one at a time.
    """
    end = time.monotonic() + CULPRIT_SECONDS

    def works(values: dict) -> bool:
        if time.monotonic() > end:
            return False
        try:
            make_of(copy.deepcopy(values))
        except Exception:  # the first error or any other
            return False
        return True

    def without(keys: Iterable[str]) -> dict:
        left_out = set(keys)
        return {key: value for key, value in raw.items() if key not in left_out}

    few = {key: min(value, 1) for key, value in raw.items() if key in LAYER_COUNTS
           and isinstance(value, int)}  # fmt: skip
    raw = {**raw, **few}  # with few layers, so that building is quick
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
    """The keys that the config of an architecture knows."""
    try:
        cls = transformers.CONFIG_MAPPING[model_type]
    except (KeyError, TypeError):
        return {"model_type"}
    fields = (getattr(part, "__annotations__", {}) for part in cls.__mro__)
    return set().union(*fields, cls.attribute_map, inspect.signature(cls).parameters)


def model_class(config, path: Path | str = "config.json") -> type:
    """The class that was saved, or else the causal language model of the config's architecture.
    Errors call the config's file `path`."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            # A class may serve several architectures: Glm4MoeForCausalLM is Sarvam's, too.
            serves = found is _causal_class(config)
            if found.config_class is not None and not (
                serves or isinstance(config, found.config_class)
            ):
                raise CheckpointError(
                    f"{path}: architectures has {name}, want a class for model_type "
                    f"{config.model_type!r}; one of the two is wrong"
                )
            return found
    found = _causal_class(config)
    if found is None:
        raise CheckpointError(
            f"{path}: architectures is {shorten(config.architectures)}, and transformers "
            f"{transformers.__version__} has none of these, nor a language model for model_type "
            f"{config.model_type!r}; a newer one may have it"
        )
    return found


def _causal_class(config) -> type | None:
    """The causal language model of a config's architecture."""
    mapping = transformers.AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def stored_method(config) -> str | None:
    """The quant_method of a quantized checkpoint, else None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "unknown")
    return str(getattr(method, "value", method))  # transformers has an enum for some methods


def unquantized(config):
    """A copy of a config without its quantization settings."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for attribute in ("quantization_config", "_is_quantized"):
            part.__dict__.pop(attribute, None)
    return config


def build(config, dtype: torch.dtype, cls: type | None = None) -> nn.Module:
    """The model on the meta device, with the classes and dtypes that from_pretrained gives it."""
    cls = cls or model_class(config)
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model = cls(copy.deepcopy(config))
    if plan := model._get_dtype_plan(dtype):  # the parts that stay in fp32
        protected, pattern_of_group, _ = build_glob_alternation(list(plan))
        for name, parameter in model.named_parameters():
            if match := protected.search(name):
                parameter.data = parameter.data.to(plan[pattern_of_group[match.lastgroup]])
    return model.eval()


def build_folder(
    folder: Path, config, dtype: torch.dtype, find_class: Callable = model_class
) -> nn.Module:
    """Like `build`, for a config that was read from a folder. An error names the key at fault.

    Args:
        find_class: gives the class for (config, path of its file).
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
    """A context in which transformers loads the model of a folder. Errors become CheckpointErrors.

    Args:
        files: the folder's files if they are read; the error names the file at fault.
        config: the folder's config; if no model can be made from it, the error names the key.
        keywords: the caller's keywords. An error about one of them stays a TypeError.
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
    """A tensor that transformers' loader could not use, and why; (None, "") if it reports none. Its
    error only refers to a report in its log, so this reads the report's variable from the frame."""
    trace = error.__traceback__
    while trace is not None:
        for problem in problems_of(trace.tb_frame.f_locals.get("loading_info")).items():
            return problem
        trace = trace.tb_next
    return None, ""


def problems_of(info) -> dict[str, str]:
    """Tensor -> why transformers' loader could not use it, from its loading info."""
    shapes = {
        key: f"shape got {list(got)}, want {list(want)} by config.json"
        for key, got, want in sorted(getattr(info, "mismatched_keys", ()))
    }
    errors = getattr(info, "conversion_errors", {})
    return {key: _last_words(text) for key, text in errors.items()} | shapes


def _last_words(text: str) -> str:
    """The message of an error, from the traceback's text, which transformers keeps."""
    before, _, _ = text.rpartition("\nError")  # followed by the operation and the tensor's name
    words = (before or text).rpartition("\n")[2].strip(" \"'")  # a KeyError quotes its message
    return first_line(ValueError(words or text))


def check_complete(folder: Path | str, model: nn.Module, missing: Iterable[str]) -> None:
    """Raises CheckpointError if a folder lacks tensors, which transformers initialised at random.

    Args:
        missing: `missing_keys` of from_pretrained's loading info, which leaves out tied ones.
    """
    missing = sorted(missing)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {plural(len(missing), 'tensor')} of {type(model).__name__}: "
            f"{first_few(missing)}: download it again, or save the model again"
        )
