"""Reads a transformers checkpoint module by module.

transformers decides what a tensor in a file means: it renames tensors and fuses experts on loading
(its `conversion_mapping`). So this file runs transformers' own loader on the tensors of one module
at a time, with the rest of the model on the meta device. The result is what `from_pretrained` would
have read, and the same model class decides which layers are packed.

This file is longer than others because its one class shares what it finds in the files.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, _get_dtype

from ...checks import check_finite, narrower, out_of_memory
from ...files import FLOATS, SafetensorsFiles, check_file, fingerprint, reading, safetensors_files
from ...text import CheckpointError, first_few, format_bytes, plural
from .building import (
    build,
    build_folder,
    problems_of,
    read_config,
    reading_in_order,
    stored_method,
    unquantized,
)
from .config import QLoraExtConfig
from .conversions import (
    ByExpert,
    ReadBitsandbytes,
    by_expert,
    reads_other_format,
    saved_together,
    with_those_of_packed,
)
from .quantizer import QLoraExtHfQuantizer


class Unit:
    """Modules that must be read together, because they are made from the same stored tensors."""

    def __init__(self):
        self.modules: list[str] = []  # names in the model
        self.sources: list[str] = []  # names in the files

    def __repr__(self) -> str:
        return f"Unit({self.modules}, {self.sources})"


class Checkpoint:
    """A model on the meta device, and the stored tensors that each of its modules needs.

    Args:
        folder: has config.json and safetensors files.
        untie: names of parameters to read as copies if the config ties them.
        like: a transformers model whose class and config are used instead of the folder's; it may
            be packed. Then `sources` leaves out tensors that the folder lacks.
    """

    def __init__(self, folder: Path, *, untie: tuple[str, ...] = (), like: nn.Module | None = None):
        self.folder = folder
        self.cls = None if like is None else type(like)
        self.may_lack = like is not None
        path = folder / "config.json"
        if like is None:
            check_file(path)  # before the weights: a folder without it is not a checkpoint
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
        # From here on, errors mean that the files do not fit the model in config.json.
        with reading(folder):
            self._match(paths, untie)

    def _match(self, paths: list[str], untie: tuple[str, ...]) -> None:
        """Finds which stored tensors make which parameters, and ties the model."""
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
        self.of_experts: dict[str, dict[str, list[str]]] = {}  # what _lists_of_experts found
        self._find_sources()
        self._tie(untie)

    # 4-bit checkpoints

    def _unpacker(self, method: str) -> None:
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
                    f"{self.folder} is quantized by {method}, want an unquantized checkpoint, or a "
                    "4-bit one of qlora_ext or bitsandbytes"
                )
        self.quantizer = QLoraExtHfQuantizer(settings, pre_quantized=True)

    def _pack(self, paths: list[str]) -> None:
        with torch.device("meta"):
            self.quantizer._process_model_before_weight_loading(
                self.model, dtype=self.dtype, checkpoint_files=paths
            )

    # names

    def _find_sources(self) -> None:
        """Finds which stored tensors make which parameters of the model."""
        state = self.model.state_dict()
        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, list[str]] = defaultdict(list)
        self.patterns: dict[str, str | None] = {}  # stored tensor -> the pattern that names it
        self.converters: dict[str, WeightConverter] = {}  # parameter -> what makes it
        for key in sorted(self.files.where, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                self.unexpected.append(key)
                continue
            groups[name].append(key)
            self.patterns[key] = pattern
            if pattern is not None:
                self.converters[name] = by_pattern[pattern]
        # model parameter -> names of the stored tensors
        self.sources: dict[str, list[str]] = {}
        for name, keys in groups.items():
            for target in self._targets(name, keys, self.converters.get(name)):
                self.sources[target] = keys
        ignored = self.model._keys_to_ignore_on_load_unexpected or []
        self.unexpected = [
            key for key in self.unexpected if not any(re.search(p, key) for p in ignored)
        ]

    def _targets(self, name: str, keys: list[str], converter) -> list[str]:
        """The parameters that transformers' loader makes from some tensors."""
        if converter is None:
            self._check_shape(name, keys)
            return [name]
        if any(isinstance(op, ReadBitsandbytes) for op in converter.operations):
            stem = f"{name}_"
            return [name, *(other for other in self.names if other.startswith(stem))]
        if type(by_expert(converter)) is ByExpert:
            self._check_experts(name, keys, converter)
        config = LoadStateDictConfig(
            dtype=self.dtype, weight_mapping=self.conversions, device_map={"": "meta"}
        )
        meta = {key: self.files.meta(key) for key in keys}
        with reading_in_order():
            info, _ = convert_and_load_state_dict_in_model(self.model, meta, config, None)
        if problems := problems_of(info):
            why = next(iter(problems.values()))
            raise CheckpointError(
                f"{self.folder}: transformers cannot make {name} from {first_few(keys)} ({why}); "
                "the weights or config.json are from another model"
            )
        return [other for other in self.names if other not in info.missing_keys]

    def _check_experts(self, name: str, keys: list[str], converter) -> None:
        """Raises CheckpointError unless a stack has all tensors that each of its experts has."""
        found = Counter(self.patterns[key] for key in keys)
        count = len(self.model.get_parameter_or_buffer(name))
        for pattern in converter.source_patterns:
            if found[pattern] != count:
                stored_as = re.sub(r"\\(.)", r"\1", pattern)
                raise CheckpointError(
                    f"{self.folder} has {plural(found[pattern], 'tensor')} {stored_as} of "
                    f"{name}, want {count}, one for each expert in config.json; download it again, "
                    "or save the model again"
                )

    def _check_shape(self, name: str, keys: list[str]) -> None:
        want, got = tuple(self.model.state_dict()[name].shape), self.files.shapes[keys[0]]
        if len(keys) > 1:
            raise CheckpointError(
                f"{self.folder}: {first_few(keys)} are all {name} in the model, want one of them; "
                "remove the others"
            )
        if want != got:
            raise CheckpointError(
                f"{self.files.where[keys[0]]}: {keys[0]} has shape {list(got)}, want {list(want)} "
                "by config.json; the weights or config.json are from another model"
            )

    def _tie(self, untie: tuple[str, ...]) -> None:
        """Ties the model as from_pretrained does: by the config, unless both are stored and differ.

        It sets `copies`: parameter -> the parameter that it is a copy of.
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
                f"{self.folder} lacks {plural(len(missing), 'tensor')} of "
                f"{type(self.model).__name__}: {first_few(missing)}: download it again, or save "
                "the model again"
            )
        self.tied = dict(tied)

    def same_model(self, config=None, dtype: torch.dtype | None = None) -> nn.Module:
        """Another dense model on meta, tied like this one."""
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
        """The conversions that this checkpoint needed, which transformers reverses when it saves.
        Those that read another format of packed weights are left out."""
        used = [c for c in self.conversions if c.was_used() and not reads_other_format(c)]
        return used if self.quantizer is None else with_those_of_packed(self.model, used)

    # reading

    def units(self, wholes: set[str], conversions: Sequence = ()) -> list[Unit]:
        """The model in pieces to read one after another, in the model's order.

        Args:
            wholes: names of modules to read with everything inside them.
            conversions: of the model that will be written. Parameters that saving joins into one
                tensor are in one piece.
        """
        self.wholes = wholes
        together = saved_together(self.names, conversions)

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
                continue  # tied to a parameter that is read
            module = owner(name)
            others = [unit_of.get(owner(other)) for other in together.get(name, ())]
            known = [unit_of.get(module), unit_of_source.get(keys[0]), *others]
            known = list({id(unit): unit for unit in known if unit is not None}.values())
            if not known:
                known = [Unit()]
                units += known
            found = known[0]
            for other in known[1:]:
                found = self._join(units, unit_of, unit_of_source, found, other)
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
    def loaded(self, unit: Unit, without: Collection[str] = ()):
        """A context with the modules of a unit and their values, by name. Afterwards they are on
        meta again.

        Args:
            without: stacks of experts that stay on meta; expert_reader reads them.
        """
        modules = {name: self.model.get_submodule(name) for name in unit.modules}
        before = [
            (part, dict(part._parameters), dict(part._buffers))
            for name, module in modules.items()
            for part in (module.modules() if name in self.wholes else [module])
        ]
        try:
            self._read(unit, without)
            yield modules
        finally:
            for part, parameters, buffers in before:
                part._parameters.update(parameters)
                part._buffers.update(buffers)

    def expert_keys(self, name: str, e: int) -> list[str]:
        """The stored tensors from which expert e of the model's stack `name` is made."""
        lists = self._lists_of_experts(name)
        return self.sources.get(name, []) if lists is None else [k[e] for k in lists.values()]

    def _lists_of_experts(self, name: str) -> dict[str, list[str]] | None:
        """Pattern -> a stored tensor for each expert of a stack; None if it is not stored so."""
        converter = self.converters.get(name)
        if converter is None or type(by_expert(converter)) is not ByExpert:
            return None
        if name not in self.of_experts:
            self.of_experts[name] = lists = defaultdict(list)
            for key in self.sources[name]:
                lists[self.patterns[key]].append(key)
        return self.of_experts[name]

    def expert_reader(self, name: str) -> Callable[[int], torch.Tensor] | None:
        """A function that reads one expert of the model's stack `name`, as it would be in the whole
        stack. None if the stored tensors can only be read together."""
        keys, empty = self.sources[name], self.model.get_parameter(name)
        converter, lists = self.converters.get(name), self._lists_of_experts(name)
        if converter is None:

            def stored(e: int) -> torch.Tensor:
                return self.files.slice(keys[0])[e : e + 1][0]
        elif lists is None:
            return None
        else:

            def stored(e: int) -> torch.Tensor:
                one = copy.deepcopy(converter)
                for pattern, each in lists.items():
                    one.collected_tensors[pattern] = [self.files.slice(each[e])[...]]
                (value,) = one.convert(name, model=self.model, config=self.model.config).values()
                return value[0]

        def read(e: int) -> torch.Tensor:
            with reading(self.folder / first_few({self.files.where[key].name for key in keys})):
                exact = stored(e)
            value = exact.to(empty.dtype)
            if narrower(value.dtype, exact.dtype):
                self._refuse_not_held(f"{name}[{e}]", value, keys, lambda: exact)
            return value

        return read

    def _read(self, unit: Unit, without: Collection[str] = ()) -> None:
        left = {key for name in without for key in self.sources[name]}
        sources = [key for key in unit.sources if key not in left]
        if not sources:
            return
        paths = first_few({self.files.where[key].name for key in sources})
        try:
            with reading(self.folder / paths):
                tensors = {key: self.files.slice(key) for key in sources}
                with reading_in_order():
                    info, _ = convert_and_load_state_dict_in_model(
                        self.model, tensors, self.load_config, None
                    )
        except CheckpointError as error:
            if error.__cause__ is None or not out_of_memory(error.__cause__):
                raise
            need = sum(self.files.nbytes(key) for key in sources)
            raise CheckpointError(
                f"memory is used up: {first_few(unit.modules)} alone takes {format_bytes(need)}; "
                "use a machine with more memory"
            ) from None
        finally:
            self.model._weight_conversions = self.used_conversions
        for key, why in problems_of(info).items():
            where = self.files.where.get(key, self.folder)
            raise CheckpointError(f"{where}: {key} cannot be loaded ({why})")
        for target, source in self.copies.items():
            module, _, key = target.rpartition(".")
            if module in unit.modules:
                self.model.get_submodule(module)._parameters[key] = self.model.get_parameter(source)
        self._check_cast(unit)

    def _check_cast(self, unit: Unit) -> None:
        """Raises CheckpointError if config.json names a narrower dtype than the files have, and a
        value does not fit it."""
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
                self._refuse_not_held(full, parameter.detach(), sources, exact)

    def _refuse_not_held(self, name: str, values: torch.Tensor, sources, exact) -> None:
        """Raises CheckpointError if values, which were cast to their dtype, are not all finite."""
        try:
            check_finite(name, values, values.dtype, exact)
        except OverflowError as error:
            for source in sources:
                if not self.files[source].isfinite().all():
                    raise CheckpointError(
                        f"{self.files.where[source]}: {source} holds a NaN or an infinity: "
                        "the file is damaged, download or save it again"
                    ) from None
            raise CheckpointError(
                f"{self.folder}: config.json has dtype {values.dtype}, but {error}; set the files' "
                "own dtype there"
            ) from None

    def fingerprint(self) -> list:
        """Name, bytes and time of the last change of each input file."""
        return fingerprint([self.folder / "config.json", *self.files.paths])
