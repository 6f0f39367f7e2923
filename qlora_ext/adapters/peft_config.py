"""Reads PEFT's adapter_config.json, and refuses adapters that are not plain LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from ..files import read_json
from ..models.patterns import bad_regex, is_regex
from ..nn.linear import linear_shape
from ..nn.stack import Stack4bit
from ..text import CheckpointError, shorten
from .config import check_value

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class NotPlainLora(ValueError):
    """A PEFT adapter computes something other than W + scaling B A. PEFT itself may load it."""


def read_adapter_config(path: Path) -> dict:
    file = path / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: {file} is missing, want a directory with {CONFIG}")
    try:
        config = read_json(file)
    except CheckpointError as error:
        raise CheckpointError(f"load_adapter: {error}") from error
    _check_values(file, config)
    if config.get("peft_type") != "LORA":
        raise NotPlainLora(
            f"load_adapter: {file} has peft_type {shorten(config.get('peft_type'))}, want 'LORA'"
        )
    check_plain(file, config)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        config[key] = {re.compile(rf"(.*\.)?({p})$"): value for p, value in patterns.items()}
    return config


# Initialisations that do not change the base weight. Others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ)
# change it and train A and B on top of the changed one.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Keys of PEFT's LoraConfig that do not change what the saved A and B compute.
HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "eva_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "runtime_config", "target_parameters"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
}


def check_plain(file: Path, config: dict) -> None:
    """Raises NotPlainLora if a key makes the adapter something other than W + scaling B A."""
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
        elif key not in HARMLESS and value not in (None, False, [], {}, ""):
            want = "False" if isinstance(value, bool) else "None"
            raise NotPlainLora(
                f"load_adapter: {file} has {shorten(key)[1:-1]}={shorten(value)}, want {want}; "
                f"{elsewhere}"
            )


def _check_values(file: Path, config: dict) -> None:
    """Raises ValueError for a value of the wrong type or out of range."""
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
            raise ValueError(f"{op} {key} is {shorten(patterns)}, want an object of names: values")
        if bad := bad_regex(patterns):
            raise ValueError(f"{op} {key} holds {shorten(bad[0])}, want {bad[1]}")
        for pattern, value in patterns.items():
            check_value(op, kind, value, f"{key}[{shorten(pattern)}]")
    if config.get("fan_in_fan_out") is not None:
        check_value(op, "fan_in_fan_out", config["fan_in_fan_out"])
    parameters = config.get("target_parameters")
    if parameters is not None and not (
        isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)
    ):
        raise ValueError(
            f"{op} target_parameters is {shorten(parameters)}, want names of parameters"
        )
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


def exactly(name: str) -> str:
    """A pattern that matches only this layer; without ^ it would match the end of other names."""
    return f"^{re.escape(name)}"


def per_layer(config: dict, key: str, name: str, default):
    """The value for this layer in config[key], which holds PEFT's patterns, else default. A pattern
    is a regular expression for the end of a layer's name, or of its weight's name if
    target_parameters names the weight."""
    weight = f"{name}.weight"
    targets = config.get("target_parameters") or ()
    if any(weight == target or weight.endswith(f".{target}") for target in targets):
        name = weight
    for pattern, value in config[key].items():
        if pattern.match(name):
            return value
    return default


def alpha_of(config: dict, name: str) -> float:
    """lora_alpha of one layer's adapter."""
    return per_layer(config, "alpha_pattern", name, config["lora_alpha"])


def rank_of(
    path: Path,
    config: dict,
    name: str,
    base: nn.Module,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
) -> int:
    """r of one layer's adapter. Raises ValueError unless lora_A and lora_B fit each other, the
    layer and config.

    Args:
        config: as read_adapter_config returns it.
        name: the layer's name; for a stack of experts, the name of its parameter.
        base: the layer of that name.
    """
    N, K = linear_shape(base)
    r = lora_A.shape[-2] if lora_A.ndim >= 2 else 0
    stack = base._shape[:-2] if isinstance(base, Stack4bit) else ()
    if r < 1 or lora_A.shape != (*stack, r, K) or lora_B.shape != (*stack, N, r):
        raise ValueError(
            f"load_adapter: {path}: {name} has lora_A {list(lora_A.shape)} and lora_B "
            f"{list(lora_B.shape)}, want [r, {K}] and [{N}, r] for a [{N}, {K}] weight: the "
            "adapter belongs to another model"
        )
    rank = per_layer(config, "rank_pattern", name, config.get("r", r))
    if rank != r:
        raise ValueError(
            f"load_adapter: {path}: {name} has lora_A {list(lora_A.shape)} and the config "
            f"says r = {rank}, want the same rank: take the config that belongs to these weights"
        )
    return r
