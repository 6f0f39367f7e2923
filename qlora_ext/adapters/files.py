"""Saving and loading adapters, in PEFT's files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from ..checks import check_finite
from ..files import SafetensorsFiles, read_json
from ..models.patterns import bad_regex, is_regex
from ..models.walk import check_whole
from ..nn.embedding import Embedding4bit
from ..nn.linear import Linear4bit
from ..nn.linear import linear_shape as _linear_shape
from ..nn.offload import keep_adapter, loaded, value_of
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import dequantize_4bit
from ..text import CheckpointError, shorten
from .add import adapters_of, allow_training, check_adaptable, check_trainable, install
from .config import check_value
from .targets import layers_found, linears_of, shorten_names, task_type

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class NotPlainLora(ValueError):
    """An adapter of PEFT's that is more than W + scaling B A; PEFT itself may load it."""


_PREFIX = "base_model.model."


def _write_aside(path: Path, write) -> None:
    """Writes beside path and moves into place, so that a full disk leaves the old file whole. The
    umask decides who may read it: safetensors alone would let only the owner."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def save_adapter(model: nn.Module, path: str | os.PathLike) -> Path:
    """Writes a model's adapters as PEFT does: adapter_config.json and adapter_model.safetensors.

    peft.PeftModel.from_pretrained(unquantized_base, path) and `load_adapter` read them. Files are
    written aside and moved into place.

    Args:
        model: a model that went through add_lora or load_adapter.
        path: a directory; it and its parents are made.

    Returns:
        The directory.

    Raises:
        ValueError: no adapters (merged already?), or adapters that are sharded over processes
            (DTensors), or on the meta device without a hook that fetches them. TypeError: PEFT's
            adapters; use its own save_pretrained. OverflowError: an adapter with a NaN or an
            infinity, which no reader takes; nothing is written. OSError: the directory cannot be
            made or written.
    """
    from safetensors.torch import save_file

    if "\0" in os.fsdecode(path):
        raise ValueError(f"save_adapter: path is {shorten(path)}, want one without NUL")
    check_adaptable("save_adapter", model)
    check_whole("save_adapter", model, only="lora_")
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("save_adapter: model has no adapters, want one that add_lora was given")
    first = next(iter(adapters.values()))
    conv1d = {isinstance(m, Linear4bit) and m.from_conv1d for m in adapters.values()}
    config = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "bias": "none",
        "target_modules": shorten_names(model, list(adapters)),
        "rank_pattern": {_exactly(n): m.r for n, m in adapters.items() if m.r != first.r},
        "alpha_pattern": {
            _exactly(n): m.lora_alpha
            for n, m in adapters.items()
            if m.lora_alpha != first.lora_alpha
        },
        "fan_in_fan_out": conv1d == {True},
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    tensors = {}
    for name, module in adapters.items():
        for key in ("lora_A", "lora_B"):
            tensor = value_of(module, key).detach()
            if tensor.is_meta:
                raise ValueError(
                    f"save_adapter: {name}.{key} is on the meta device and has no values, want it "
                    "in memory; accelerate.hooks.remove_hook_from_submodules(model) fetches what "
                    "was offloaded"
                )
            check_finite(f"save_adapter: {name}.{key}", tensor, tensor.dtype)
            tensors[f"{_PREFIX}{name}.{key}.weight"] = tensor.to("cpu").contiguous()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2)
    _write_aside(
        path / _WEIGHTS, lambda draft: save_file(tensors, draft, metadata={"format": "pt"})
    )
    _write_aside(path / _CONFIG, lambda draft: draft.write_text(text, encoding="utf-8"))
    return path


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    trainable: bool = False,
    lora_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Reads a LoRA adapter that save_adapter or PEFT wrote onto a model, in place.

    Args:
        model: quantized or not, without adapters, or with adapters of the same shapes on the same
            layers (a run that goes on), which are overwritten. Its other weights are frozen.
        path: a directory with adapter_config.json and adapter_model.safetensors.
        trainable: whether the adapter goes on training; as in PEFT, not by default.
        lora_dtype: dtype of A and B.

    Returns:
        model.

    Raises:
        FileNotFoundError: a file is missing. TypeError: the model carries PEFT's adapters.
        ValueError: not a plain LoRA adapter (DoRA, PiSSA, trained biases or whole modules, a
            setting that this module does not know), a value out of range, a regular expression
            that could take long to match, a layer the model lacks, an A without its B, a shape that
            does not fit, a file that is damaged; trainable on a model that was loaded under
            torch.inference_mode. The model is then as it was.
    """
    check_adaptable("load_adapter", model)
    if lora_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"load_adapter: lora_dtype is {lora_dtype}, want float32, float16 or bfloat16"
        )
    if trainable:
        check_trainable("load_adapter", model)
    path = Path(path)
    config = _read_config(path)
    present = adapters_of(model)
    pairs = _read_pairs(
        model, path, lambda name: present[name].lora_A.dtype if name in present else lora_dtype
    )
    if present and set(present) != set(pairs):
        odd = sorted(set(present) ^ set(pairs))[0]
        raise ValueError(
            f"load_adapter: model has adapters on other layers than {path} ({odd} differs), want "
            "the same layers, or a model without adapters"
        )
    settings = {}
    for name, (lora_A, lora_B) in pairs.items():
        r = _rank(path, config, name, model.get_submodule(name), lora_A, lora_B)
        if name in present and present[name].r != r:
            raise ValueError(
                f"load_adapter: {name} has an adapter of rank {present[name].r} and {path} has one "
                f"of rank {r}, want the same rank, or a model without adapters"
            )
        settings[name] = {
            "r": r,
            "lora_alpha": _per_layer(config, "alpha_pattern", name, config["lora_alpha"]),
            "lora_dropout": config.get("lora_dropout", 0.0),
            "use_rslora": config.get("use_rslora", False),
            "lora_dtype": lora_dtype,
        }
    if present:
        for name, keywords in settings.items():
            present[name].set_scaling(keywords["lora_alpha"], keywords["use_rslora"])
            keep_adapter(present[name])
    else:
        install(model, settings)
    model.requires_grad_(False)
    for name, module in adapters_of(model).items():
        with torch.no_grad():
            module.lora_A.copy_(pairs[name][0])
            module.lora_B.copy_(pairs[name][1])
        module.lora_A.requires_grad_(trainable)
        module.lora_B.requires_grad_(trainable)
    allow_training(model)
    return model


def _read_config(path: Path) -> dict:
    file = path / _CONFIG
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: {file} is missing, want a directory with {_CONFIG}")
    try:
        config = read_json(file)
    except CheckpointError as error:
        raise CheckpointError(f"load_adapter: {error}") from error
    _check_values(file, config)
    if config.get("peft_type") != "LORA":
        raise NotPlainLora(
            f"load_adapter: {file} has peft_type {shorten(config.get('peft_type'))}, want 'LORA'"
        )
    _check_plain(file, config)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        config[key] = {re.compile(rf"(.*\.)?({p})$"): value for p, value in patterns.items()}
    return config


# Initialisations that leave the base weight as it is; another trains A and B against a base that it
# changed (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Keys of PEFT's LoraConfig that do not change what a saved A and B compute.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "eva_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "runtime_config"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
}


def _check_plain(file: Path, config: dict) -> None:
    """NotPlainLora for a key that makes the adapter something else than W + scaling B A."""
    elsewhere = "peft.PeftModel.from_pretrained loads this adapter"
    for key, value in config.items():
        if key == "bias":
            if value not in ("none", None):
                raise NotPlainLora(
                    f"load_adapter: {file} has bias={shorten(value)}, want 'none'; {elsewhere}"
                )
        elif key == "init_lora_weights":
            if value is not None and not any(value == start for start in _PLAIN_STARTS):
                raise NotPlainLora(
                    f"load_adapter: {file} has init_lora_weights={shorten(value)}, which changes "
                    "the base weights, want a plain LoRA adapter; PEFT's save_pretrained with "
                    "path_initial_model_for_weight_conversion writes one (not for loftq)"
                )
        elif key not in _HARMLESS and value not in (None, False, [], {}, ""):
            want = "False" if isinstance(value, bool) else "None"
            raise NotPlainLora(
                f"load_adapter: {file} has {shorten(key)[1:-1]}={shorten(value)}, want {want}; "
                f"{elsewhere}"
            )


def _check_values(file: Path, config: dict) -> None:
    """ValueError for a value of the wrong kind or out of range."""
    op = f"load_adapter: {file}:"
    check_value(op, "lora_alpha", config.get("lora_alpha"))
    for key in ("r", "lora_dropout", "use_rslora"):
        if key in config:
            check_value(op, key, config[key])
    for key, kind in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(key)
        if patterns is None:
            continue
        if not isinstance(patterns, dict):
            raise ValueError(f"{op} {key} is {shorten(patterns)}, want names and values, {{}}")
        if bad := bad_regex(patterns):
            raise ValueError(f"{op} {key} holds {shorten(bad[0])}, want {bad[1]}")
        for pattern, value in patterns.items():
            check_value(op, kind, value, f"{key}[{shorten(pattern)}]")
    if config.get("fan_in_fan_out") is not None:
        check_value(op, "fan_in_fan_out", config["fan_in_fan_out"])
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if not is_regex(targets):
            raise ValueError(
                f"{op} target_modules is {shorten(targets)}, want a regular expression"
            )
    elif targets is not None and not (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    ):
        raise ValueError(
            f"{op} target_modules is {shorten(targets)}, want names of layers, or a regular "
            "expression"
        )


def _exactly(name: str) -> str:
    """A pattern for this layer alone: without ^ it would match the end of other names too."""
    return f"^{re.escape(name)}"


def _per_layer(config: dict, key: str, name: str, default):
    """PEFT's patterns: a regular expression for the end of a layer's name, then its value."""
    for pattern, value in config[key].items():
        if pattern.match(name):
            return value
    return default


def _rank(
    path: Path,
    config: dict,
    name: str,
    base: nn.Module,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
) -> int:
    """r of one layer's adapter; ValueError unless its shapes fit each other, the layer and config.

    Args:
        config: of `_read_config`.
        base: the layer of that name.
    """
    N, K = _linear_shape(base)
    r = lora_A.shape[0] if lora_A.ndim == 2 else 0
    if r < 1 or tuple(lora_A.shape) != (r, K) or tuple(lora_B.shape) != (N, r):
        raise ValueError(
            f"load_adapter: {path}: {name} has lora_A {list(lora_A.shape)} and lora_B "
            f"{list(lora_B.shape)}, want [r, {K}] and [{N}, r] for a [{N}, {K}] weight: the "
            "adapter is another model's"
        )
    rank = _per_layer(config, "rank_pattern", name, config.get("r", r))
    if rank != r:
        raise ValueError(
            f"load_adapter: {path}: {name} has lora_A {list(lora_A.shape)} and the config "
            f"says r = {rank}, want the same"
        )
    return r


def _check_tensor(file: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"load_adapter: {file} has {tensor.dtype} in {name}, want floating values")
    if not tensor.double().isfinite().all():
        raise ValueError(f"load_adapter: {file} has a NaN or Inf in {name}")
    if not tensor.to(dtype).isfinite().all():
        raise ValueError(
            f"load_adapter: {file} has {tensor.double().abs().max().item():g} in {name}, want "
            f"values that {dtype} can hold"
        )


def _read_pairs(model: nn.Module, path: Path, dtype_of) -> dict[str, tuple]:
    """Layer name -> (lora_A, lora_B) of an adapter file; dtype_of: name -> dtype they will have."""
    file = path / _WEIGHTS
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: {file} is missing, want the adapter's weights")
    try:
        tensors = SafetensorsFiles([file])
    except CheckpointError as error:
        raise CheckpointError(f"load_adapter: {error}") from error
    linears = linears_of(model)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors:
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B)\.weight", key)
        if match is None:
            _check_extra(model, file, key, tensors)
            continue
        name = match[1]
        if name not in linears:
            raise ValueError(f"load_adapter: {file} adapts {name}, no layer; {layers_found(model)}")
        halves.setdefault(name, {})[match[2]] = tensors[key]
    for name, half in halves.items():
        for key in ("lora_A", "lora_B"):
            if key not in half:
                raise ValueError(f"load_adapter: {file} has no {key} for {name}, want A and B")
            _check_tensor(file, f"{name}.{key}", half[key], dtype_of(name))
    if not halves:
        raise ValueError(
            f"load_adapter: {file} holds no LoRA weights, want {_PREFIX}*.lora_A.weight"
        )
    return {name: (half["lora_A"], half["lora_B"]) for name, half in halves.items()}


def _check_extra(model: nn.Module, file: Path, key: str, tensors: SafetensorsFiles) -> None:
    """PEFT stores the embeddings too where the head is a target; they must be the model's own."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    layer, _, attribute = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(layer)
    own = None
    if module is not None and module._parameters.get(attribute) is not None:
        own = value_of(module, attribute)
    if isinstance(module, Embedding4bit) and attribute == "weight":
        with loaded(module):
            own = dequantize_4bit(module.quantized, module.dtype)
    if own is not None and own.shape == tensors.shapes[key] and own.is_floating_point():
        tensor = tensors[key]
        dtype = min((own.dtype, tensor.dtype), key=lambda d: d.itemsize)
        if torch.equal(own.detach().to("cpu", dtype), tensor.to(dtype)):
            return
    raise NotPlainLora(
        f"load_adapter: {file} holds {key} {list(tensors.shapes[key])}, want lora_A and lora_B of "
        "linear layers only; peft.PeftModel.from_pretrained loads this adapter"
    )
