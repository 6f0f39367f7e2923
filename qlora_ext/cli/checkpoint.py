"""A transformers checkpoint read module by module.

transformers decides what a tensor in a file means: names change and experts are fused on loading
(its `conversion_mapping`). Here its own loader runs on the tensors of one module at a time, on a
model that otherwise stays on the meta device, so what is read is what `from_pretrained` would have
put there, and which layers are packed is asked of the same model class.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
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

from .errors import CliError, count, size, some
from .shards import DTYPE_NAMES, INDEX

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
NOT_COPIED = ("config.json", "README.md", ".gitattributes", "quantize_config.json")
OPEN_FILES = 2  # a module may lie across two shards


# Files --------------------------------------------------------------------------------------------


def find_folder(name: str) -> Path:
    """The folder of a model or adapter given as a folder or a hub name (then it is downloaded)."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CliError(f"{name} is no folder, want one with config.json and safetensors files")
    try:
        from huggingface_hub import snapshot_download

        ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]
        return Path(snapshot_download(name, ignore_patterns=ignored))
    except Exception as error:  # many kinds: no such name, no network, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CliError(
            f"{name} is no folder here, and as a hub name it cannot be had: "
            f"{type(error).__name__}: {reason}"
        ) from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CliError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CliError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CliError(f"{path} holds a {type(value).__name__}, want a JSON object")
    return value


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files: those its index names, or its only one."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CliError(f"{index} has no weight_map, want one that names the shards")
        names = sorted(set(weight_map.values()))
        bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if bad:
            raise CliError(f"{index} names {bad[0]!r}, want files of its own folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CliError(
                f"{folder} lacks {count(len(missing), 'shard')} of {len(names)}: {some(missing)}"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS[1:])
    hint = f" (it holds {some(others)}; transformers' save_pretrained writes safetensors)"
    raise CliError(
        f"{folder} has no model.safetensors nor {INDEX}, want a safetensors checkpoint"
        f"{hint if others else ''}"
    )


def open_shard(path: Path):
    """safetensors' handle; a damaged file is one sentence. Reads by pread: a mapped file would
    count as memory of this process."""
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise CliError(f"{path} is damaged or not a safetensors file ({error})") from None


class Files:
    """The tensors of several safetensors files, read on demand."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.handles: OrderedDict[Path, object] = OrderedDict()
        for path in paths:
            handle = open_shard(path)
            names = handle.keys()
            for key in names:
                part = handle.get_slice(key)
                if key in self.where:
                    raise CliError(f"{key} is in {self.where[key]} and in {path}, want it once")
                if part.get_dtype() not in TORCH_DTYPES:
                    raise CliError(f"{path}: {key} has dtype {part.get_dtype()}, which is unknown")
                self.where[key] = path
                self.shapes[key] = tuple(part.get_shape())
                self.dtypes[key] = TORCH_DTYPES[part.get_dtype()]

    def nbytes(self, key: str) -> int:
        return self.shapes_numel(key) * self.dtypes[key].itemsize

    def shapes_numel(self, key: str) -> int:
        return torch.Size(self.shapes[key]).numel()

    def slice(self, key: str):
        """safetensors' slice; only what is indexed is read."""
        path = self.where[key]
        if path not in self.handles:
            while len(self.handles) >= OPEN_FILES:
                self.handles.popitem(last=False)
            self.handles[path] = open_shard(path)
        self.handles.move_to_end(path)
        return self.handles[path].get_slice(key)

    def meta(self, key: str) -> torch.Tensor:
        return torch.empty(self.shapes[key], dtype=self.dtypes[key], device="meta")

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, read a few rows at a time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        if not self.shapes[one]:
            return bool((self.slice(one)[...] == self.slice(other)[...]).all())
        rows = self.shapes[one][0]
        step = max(1, 2**22 // max(1, self.shapes_numel(one) // max(rows, 1)))
        return all(
            torch.equal(
                self.slice(one)[i : min(i + step, rows)], self.slice(other)[i : min(i + step, rows)]
            )
            for i in range(0, rows, step)
        )


# Models -------------------------------------------------------------------------------------------


def read_config(folder: Path):
    """transformers' config of a checkpoint."""
    raw = read_json(folder / "config.json")
    if raw.get("auto_map"):
        raise CliError(
            f"{folder}/config.json brings model code of its own (auto_map), which is not run here; "
            "want an architecture of transformers"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise CliError(f"{folder}/config.json: {str(error).strip().splitlines()[0]}") from None


def model_class(config) -> type:
    """The class that was saved, or the causal language model of the config's architecture."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    try:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise CliError(
            f"config.json names the architectures {config.architectures}, and transformers "
            f"{transformers.__version__} has none of them nor a language model for "
            f"{config.model_type!r}"
        ) from None


def stored_method(config) -> str | None:
    """quant_method of a checkpoint that is quantized, else None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return str(stored.get("quant_method", "unknown")).removeprefix("QuantizationMethod.").lower()


def build(config, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, in the classes and dtypes that from_pretrained makes."""
    cls = model_class(config)
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model = cls(copy.deepcopy(config))
    if plan := model._get_dtype_plan(dtype):  # of parts that stay in fp32
        protected, pattern_of_group, _ = build_glob_alternation(list(plan))
        for name, parameter in model.named_parameters():
            if match := protected.search(name):
                parameter.data = parameter.data.to(plan[pattern_of_group[match.lastgroup]])
    return model.eval()


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
    """

    def __init__(self, folder: Path, *, untie: tuple[str, ...] = ()):
        self.folder = folder
        self.config = read_config(folder)
        self.files = Files(safetensors_files(folder))
        paths = [str(path) for path in self.files.paths]
        method = stored_method(self.config)
        self.quantizer = None
        try:
            self.config, self.dtype = _get_dtype(
                "auto", paths, self.config, None, None, weights_only=True
            )
        except (ValueError, AttributeError) as error:
            raise CliError(f"{folder}/config.json: {error}") from None
        if method is not None:
            self._unpacker(method)
        self.model = build(self.config, self.dtype)
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
        from ..integrations.transformers import QLoraExtConfig, QLoraExtHfQuantizer

        stored = self.config.quantization_config
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        try:
            if method == "bitsandbytes":
                settings = QLoraExtConfig.from_bnb(stored)
                settings.checkpoint_format = "bitsandbytes"
            elif method == "qlora_ext":
                settings = QLoraExtConfig(**stored)
            else:
                raise CliError(
                    f"{self.folder} is quantized by {method}, want an unquantized checkpoint, or "
                    "one of qlora_ext or bitsandbytes in 4 bits"
                )
        except (ValueError, TypeError) as error:
            raise CliError(f"{self.folder}/config.json: {error}") from None
        self.quantizer = QLoraExtHfQuantizer(settings, pre_quantized=True)

    def _pack(self, paths: list[str]) -> None:
        try:
            with torch.device("meta"):
                self.quantizer._process_model_before_weight_loading(
                    self.model, dtype=self.dtype, checkpoint_files=paths
                )
        except ValueError as error:
            raise CliError(f"{self.folder}: {error}") from None

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
        from ..integrations.transformers import ReadBitsandbytes

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
        if info.conversion_errors or info.mismatched_keys:
            raise CliError(
                f"transformers cannot make {name} of {some(keys)}: "
                f"{list(info.conversion_errors.values()) or sorted(info.mismatched_keys)}"
            )
        return [other for other in self.names if other not in info.missing_keys]

    def _check_shape(self, name: str, keys: list[str]) -> None:
        want, got = tuple(self.model.state_dict()[name].shape), self.files.shapes[keys[0]]
        if len(keys) > 1:
            raise CliError(f"{some(keys)} are all named {name} in the model, want one of them")
        if want != got:
            raise CliError(
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
        if missing:
            raise CliError(
                f"{self.folder} lacks {count(len(missing), 'tensor')} of "
                f"{type(self.model).__name__}: {some(missing)}"
            )
        self.tied = dict(tied)

    def same_model(self, config=None, dtype: torch.dtype | None = None) -> nn.Module:
        """Another dense model on meta, tied as this one is."""
        model = build(config or self.config, dtype or self.dtype)
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
        from ..integrations.transformers import ReadBitsandbytes

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
        try:
            tensors = {key: self.files.slice(key) for key in unit.sources}
            with reading_in_order():
                info, _ = convert_and_load_state_dict_in_model(
                    self.model, tensors, self.load_config, None
                )
        except (SafetensorError, OSError) as error:
            paths = {self.files.where[key].name for key in unit.sources}
            raise CliError(f"{some(paths)} cannot be read ({error})") from None
        except MemoryError:
            need = sum(self.files.nbytes(key) for key in unit.sources)
            raise CliError(
                f"memory is used up: {some(unit.modules)} alone takes {size(need)}"
            ) from None
        except (ValueError, KeyError) as error:
            raise CliError(f"{self.folder}: {error}") from None
        finally:
            self.model._weight_conversions = self.used_conversions
        problems = [*info.conversion_errors.values(), *sorted(info.mismatched_keys)]
        if problems:
            raise CliError(f"{self.folder}: transformers cannot load {problems[0]}")
        for target, source in self.copies.items():
            module, _, key = target.rpartition(".")
            if module in unit.modules:
                self.model.get_submodule(module)._parameters[key] = self.model.get_parameter(source)

    def fingerprint(self) -> list:
        """Of the input files: name, bytes and time of the last change."""
        return fingerprint([self.folder / "config.json", *self.files.paths])


def extra_files(folder: Path) -> list[Path]:
    """Tokenizer, generation settings, templates, licence: all but weights and config.json."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in NOT_COPIED
        and path.suffix not in WEIGHTS
        and not path.name.endswith(".index.json")
    ]


def fingerprint(paths: list[Path]) -> list:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
