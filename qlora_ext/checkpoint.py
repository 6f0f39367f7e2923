"""A transformers checkpoint read module by module.

transformers decides what a tensor in a file means: names change and experts are fused on loading
(its `conversion_mapping`). Here its own loader runs on the tensors of one module at a time, on a
model that otherwise stays on the meta device, so what is read is what `from_pretrained` would have
put there, and which layers are packed is asked of the same model class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import ContextManagers, LoadStateDictConfig, _get_dtype

from .checks import (
    CheckpointError,
    check_finite,
    count,
    first_line,
    narrower,
    out_of_memory,
    printable,
    short,
    size,
    some,
)
from .config_file import LAYER_COUNTS, read_raw_config
from .files import (
    FLOATS,
    SafetensorsFiles,
    check_file,
    fingerprint,
    read_json,
    reading,
    safetensors_files,
)

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
            raise TypeError(f"it has {short(part)} for the config of its text model")
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
        f"{path}: {printable(key)} is {short(raw[key])}, which transformers cannot take "
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
            f"{path}: architectures is {short(config.architectures)}, and transformers "
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
            f"{folder} lacks {count(len(missing), 'tensor')} of {type(model).__name__}: "
            f"{some(missing)}: download it again, or save the model again"
        )


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


class Unit:
    """Modules that are read together because their tensors lie in the same ones of the files."""

    def __init__(self):
        self.modules: list[str] = []  # names in the model
        self.sources: list[str] = []  # names in the files

    def __repr__(self) -> str:
        return f"Unit({self.modules}, {self.sources})"


class Checkpoint:
    """A model on the meta device, and for each of its modules the tensors of the files it needs.

    Args:
        folder: config.json and safetensors files.
        untie: names of parameters to read a copy of where the config ties them.
        like: a transformers model whose class and config are taken, instead of the folder's; it may
            be packed. Tensors that the folder lacks are then left out of `sources`.
    """

    def __init__(self, folder: Path, *, untie: tuple[str, ...] = (), like: nn.Module | None = None):
        self.folder = folder
        self.cls = None if like is None else type(like)
        self.may_lack = like is not None
        path = folder / "config.json"
        if like is None:
            check_file(path)  # before the weights: a folder without it is no checkpoint
        self.files = SafetensorsFiles(safetensors_files(folder))
        if like is None:
            self.config = read_config(folder, self.files)
        else:
            self.config = unquantized(like.config)
        dtype = "auto" if like is None else self.files.float_dtype()
        paths = [str(path) for path in self.files.paths]
        method = stored_method(self.config)
        self.quantizer = None
        with reading(path):
            self.config, self.dtype = _get_dtype(
                dtype, paths, self.config, None, None, weights_only=True
            )
        if method is not None:
            self._unpacker(method)
        if self.may_lack:
            self.model = build(self.config, self.dtype, self.cls)
        else:
            self.model = build_folder(folder, self.config, self.dtype)
        # From here on names and shapes of the files meet a model that config.json describes.
        with reading(folder):
            self._match(paths, untie)

    def _match(self, paths: list[str], untie: tuple[str, ...]) -> None:
        """Which tensors of the files make what of the model."""
        if self.quantizer is not None:
            self._pack(paths)
        self.conversions = get_model_conversion_mapping(self.model, None, self.quantizer)
        self.load_config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=self.quantizer,
            weight_mapping=self.conversions,
            device_map={"": "cpu"},
        )
        self.names = list(self.model.state_dict())
        self.wholes: set[str] = set()
        self.unexpected: list[str] = []
        self._find_sources()
        self._tie(untie)

    # 4-bit checkpoints

    def _unpacker(self, method: str) -> None:
        from .integrations.transformers import QLoraExtConfig, QLoraExtHfQuantizer

        stored = self.config.quantization_config
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        with reading(f"{self.folder / 'config.json'}: quantization_config"):
            if method == "bitsandbytes":
                settings = QLoraExtConfig.from_bnb(stored)
                settings.checkpoint_format = "bitsandbytes"
            elif method == "qlora_ext":
                settings = QLoraExtConfig(**stored)
            else:
                raise CheckpointError(
                    f"{self.folder} is quantized by {method}, want an unquantized checkpoint, or "
                    "one of qlora_ext or bitsandbytes in 4 bits"
                )
        self.quantizer = QLoraExtHfQuantizer(settings, pre_quantized=True)

    def _pack(self, paths: list[str]) -> None:
        with torch.device("meta"):
            self.quantizer._process_model_before_weight_loading(
                self.model, dtype=self.dtype, checkpoint_files=paths
            )

    # names

    def _find_sources(self) -> None:
        """Which tensors of the files make which parameters of the model."""
        state = self.model.state_dict()
        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, list[str]] = defaultdict(list)
        used: dict[str, WeightConverter] = {}
        for key in sorted(self.files.where, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                self.unexpected.append(key)
                continue
            groups[name].append(key)
            if pattern is not None:
                used[name] = by_pattern[pattern]
        # model parameter -> tensors of the files
        self.sources: dict[str, list[str]] = {}
        for name, keys in groups.items():
            for target in self._targets(name, keys, used.get(name)):
                self.sources[target] = keys
        ignored = self.model._keys_to_ignore_on_load_unexpected or []
        self.unexpected = [
            key for key in self.unexpected if not any(re.search(p, key) for p in ignored)
        ]

    def _targets(self, name: str, keys: list[str], converter) -> list[str]:
        """The parameters that transformers' loader makes of some tensors."""
        from .integrations.transformers import ReadBitsandbytes

        if converter is None:
            self._check_shape(name, keys)
            return [name]
        if any(isinstance(op, ReadBitsandbytes) for op in converter.operations):
            stem = f"{name}_"
            return [name, *(other for other in self.names if other.startswith(stem))]
        config = LoadStateDictConfig(
            dtype=self.dtype, weight_mapping=self.conversions, device_map={"": "meta"}
        )
        meta = {key: self.files.meta(key) for key in keys}
        with reading_in_order():
            info, _ = convert_and_load_state_dict_in_model(self.model, meta, config, None)
        problems = [
            *map(last_words, info.conversion_errors.values()),
            *sorted(info.mismatched_keys),
        ]
        if problems:
            raise CheckpointError(
                f"transformers cannot make {name} of {some(keys)} ({problems[0]})"
            )
        return [other for other in self.names if other not in info.missing_keys]

    def _check_shape(self, name: str, keys: list[str]) -> None:
        want, got = tuple(self.model.state_dict()[name].shape), self.files.shapes[keys[0]]
        if len(keys) > 1:
            raise CheckpointError(
                f"{some(keys)} are all named {name} in the model, want one of them"
            )
        if want != got:
            raise CheckpointError(
                f"{self.files.where[keys[0]]}: {keys[0]} has shape {list(got)}, want {list(want)} "
                "by config.json"
            )

    def _tie(self, untie: tuple[str, ...]) -> None:
        """Ties the model as from_pretrained does: by the config, unless both are stored and differ.

        `copies`: parameter -> the parameter that it is read as.
        """
        tied = self.model.all_tied_weights_keys
        missing = {name for name in self.names if name not in self.sources}
        self.copies: dict[str, str] = {}
        for target, source in list(tied.items()):
            if target in untie:
                del tied[target]
                if target not in self.sources:
                    self.sources[target] = self.sources[source]
                    self.copies[target] = source
                    missing.discard(target)
                elif source not in self.sources:
                    self.sources[source] = self.sources[target]
                    self.copies[source] = target
                    missing.discard(source)
            elif target in self.sources and source in self.sources:
                one, other = self.sources[target], self.sources[source]
                if len(one) == len(other) == 1 and self.files.equal(one[0], other[0]):
                    del self.sources[target]
                    missing.add(target)
                else:
                    del tied[target]
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if missing and not self.may_lack:
            raise CheckpointError(
                f"{self.folder} lacks {count(len(missing), 'tensor')} of "
                f"{type(self.model).__name__}: {some(missing)}"
            )
        self.tied = dict(tied)

    def same_model(self, config=None, dtype: torch.dtype | None = None) -> nn.Module:
        """Another dense model on meta, tied as this one is."""
        model = build(config or self.config, dtype or self.dtype, self.cls)
        tied = model.all_tied_weights_keys
        for target in list(tied):
            if target not in self.tied:
                del tied[target]
        model.tie_weights(missing_keys=set(self.tied), recompute_mapping=False)
        model._weight_conversions = self.used_conversions
        return model

    @property
    def used_conversions(self) -> list:
        """What transformers reverses when it saves: the conversions this checkpoint needed. Those
        that read bitsandbytes' layout are no part of the result."""
        from .integrations.transformers import ReadBitsandbytes

        return [
            c
            for c in self.conversions
            if c.was_used()
            and not any(isinstance(op, ReadBitsandbytes) for op in getattr(c, "operations", ()))
        ]

    # reading

    def units(self, wholes: set[str]) -> list[Unit]:
        """The model in pieces to be read one after another, in the model's order.

        Args:
            wholes: names of modules to be read with everything inside them.
        """
        self.wholes = wholes

        def owner(name: str) -> str:
            module = name.rpartition(".")[0]
            parts = module.split(".")
            for end in range(1, len(parts)):
                if ".".join(parts[:end]) in wholes:
                    return ".".join(parts[:end])
            return module

        unit_of: dict[str, Unit] = {}  # module -> unit
        unit_of_source: dict[str, Unit] = {}
        units: list[Unit] = []
        for name in self.names:
            keys = self.sources.get(name)
            if keys is None:
                continue  # tied to one that is read
            module = owner(name)
            found = unit_of.get(module) or unit_of_source.get(keys[0])
            if found is None:
                found = Unit()
                units.append(found)
            elif keys[0] in unit_of_source and unit_of_source[keys[0]] is not found:
                found = self._join(units, unit_of, unit_of_source, found, unit_of_source[keys[0]])
            if module not in found.modules:
                found.modules.append(module)
            unit_of[module] = found
            for key in keys:
                if key not in unit_of_source:
                    found.sources.append(key)
                unit_of_source[key] = found
        return units

    @staticmethod
    def _join(units, unit_of, unit_of_source, one: Unit, other: Unit) -> Unit:
        first, second = sorted((one, other), key=units.index)
        first.modules += [name for name in second.modules if name not in first.modules]
        first.sources += second.sources
        units.remove(second)
        for names in (unit_of, unit_of_source):
            for name, unit in names.items():
                if unit is second:
                    names[name] = first
        return first

    @contextlib.contextmanager
    def loaded(self, unit: Unit):
        """The modules of a unit with their values, by name; on leaving they are on meta again."""
        modules = {name: self.model.get_submodule(name) for name in unit.modules}
        before = [
            (part, dict(part._parameters), dict(part._buffers))
            for name, module in modules.items()
            for part in (module.modules() if name in self.wholes else [module])
        ]
        try:
            self._read(unit)
            yield modules
        finally:
            for part, parameters, buffers in before:
                part._parameters.update(parameters)
                part._buffers.update(buffers)

    def _read(self, unit: Unit) -> None:
        paths = some({self.files.where[key].name for key in unit.sources})
        try:
            with reading(self.folder / paths):
                tensors = {key: self.files.slice(key) for key in unit.sources}
                with reading_in_order():
                    info, _ = convert_and_load_state_dict_in_model(
                        self.model, tensors, self.load_config, None
                    )
        except CheckpointError as error:
            if error.__cause__ is None or not out_of_memory(error.__cause__):
                raise
            need = sum(self.files.nbytes(key) for key in unit.sources)
            raise CheckpointError(
                f"memory is used up: {some(unit.modules)} alone takes {size(need)}"
            ) from None
        finally:
            self.model._weight_conversions = self.used_conversions
        for key, text in info.conversion_errors.items():
            where = self.files.where.get(key, self.folder)
            raise CheckpointError(f"{where}: {key} cannot be loaded ({last_words(text)})")
        for problem in sorted(info.mismatched_keys):
            raise CheckpointError(f"{self.folder}: transformers cannot load {problem}")
        for target, source in self.copies.items():
            module, _, key = target.rpartition(".")
            if module in unit.modules:
                self.model.get_submodule(module)._parameters[key] = self.model.get_parameter(source)
        self._check_cast(unit)

    def _check_cast(self, unit: Unit) -> None:
        """CheckpointError where config.json names a narrower dtype than the files have, and it
        does not hold what they do."""
        stored = {self.files.dtypes[key] for key in unit.sources} & set(FLOATS)
        for name in unit.modules:
            module = self.model.get_submodule(name)
            parts = module.named_parameters() if name in self.wholes else module._parameters.items()
            for key, parameter in parts:
                if parameter is None or parameter.is_meta or not parameter.is_floating_point():
                    continue
                if not any(narrower(parameter.dtype, dtype) for dtype in stored):
                    continue
                full = f"{name}.{key}".lstrip(".")
                sources = self.sources.get(full, ())
                exact = None
                if len(sources) == 1 and self.files.shapes[sources[0]] == parameter.shape:
                    exact = functools.partial(self.files.__getitem__, sources[0])
                try:
                    check_finite(full, parameter.detach(), parameter.dtype, exact)
                except OverflowError as error:
                    for source in sources:
                        if not self.files[source].isfinite().all():
                            raise CheckpointError(
                                f"{self.files.where[source]}: {source} holds a NaN or an infinity: "
                                "the file is damaged, download or save it again"
                            ) from None
                    raise CheckpointError(
                        f"{self.folder}: config.json has dtype {parameter.dtype}, and {error}"
                    ) from None

    def fingerprint(self) -> list:
        """Of the input files: name, bytes and time of the last change."""
        return fingerprint([self.folder / "config.json", *self.files.paths])


class Weights(Mapping):
    """The unquantized parameters of a folder under the names that they have in a model, each read
    when asked for, as its transformers class reads them: renamed, stacked, transposed.

    Args:
        folder: safetensors files.
        model: the transformers model they are for; it may be packed.

    Raises:
        CheckpointError: the folder's tensors cannot be read as those of such a model.
    """

    def __init__(self, folder: Path, model: nn.Module):
        checkpoint = Checkpoint(folder, like=model)
        dtypes = checkpoint.files.dtypes
        for name, parameter in checkpoint.model.named_parameters():
            for key in checkpoint.sources.get(name, ()):
                # Of bytes and float8 the scale may lie in a tensor that is not known here.
                if parameter.is_floating_point() and dtypes[key] not in FLOATS:
                    raise CheckpointError(f"{folder} has {key} in {dtypes[key]}, want float values")
        self.checkpoint = checkpoint
        self.units = {module: unit for unit in checkpoint.units(set()) for module in unit.modules}
        self.last: tuple[Unit, dict[str, torch.Tensor]] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.checkpoint.sources:
            raise KeyError(name)
        unit = self.units[name.rpartition(".")[0]]
        if self.last is None or self.last[0] is not unit:
            self.last = None  # before the next is read
            with self.checkpoint.loaded(unit) as modules:
                tensors = {
                    f"{module}.{key}": parameter.detach()
                    for module, part in modules.items()
                    for key, parameter in part._parameters.items()
                    if parameter is not None and f"{module}.{key}" in self.checkpoint.sources
                }
            self.last = unit, tensors
        return self.last[1][name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read it
        return name in self.checkpoint.sources

    def __iter__(self):
        return iter(self.checkpoint.sources)

    def __len__(self) -> int:
        return len(self.checkpoint.sources)
