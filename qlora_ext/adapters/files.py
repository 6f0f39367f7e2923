"""Saves and loads adapters in PEFT's file format."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from ..checks import check_finite
from ..files import SafetensorsFiles
from ..models.walk import check_whole, stacked_names
from ..nn.embedding import Embedding4bit
from ..nn.experts import parameter_names
from ..nn.linear import Linear4bit
from ..nn.offload import keep_adapter, loaded, value_of
from ..nn.stack import LoraStack4bit, Stack4bit
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import dequantize_4bit
from ..text import CheckpointError, shorten
from .add import (
    adapters_of,
    allow_training,
    check_adaptable,
    check_foreign,
    check_trainable,
    install,
)
from .peft_config import (
    CONFIG,
    WEIGHTS,
    NotPlainLora,
    alpha_of,
    exactly,
    rank_of,
    read_adapter_config,
)
from .stacks import (
    LAYOUT_OF,
    from_file,
    is_swapped,
    keys_in_file,
    to_file,
)
from .targets import (
    _ends_with,
    layers_found,
    linears_of,
    names_as_parameters,
    peft_targets,
    task_type,
)

_PREFIX = "base_model.model."


def _write_aside(path: Path, write) -> None:
    """Writes a temporary file next to path and renames it, so that a full disk does not damage the
    old file. The umask sets its permissions; safetensors would let only the owner read it."""
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

    peft.PeftModel.from_pretrained(unquantized_base, path) and `load_adapter` read them. Each file
    is written under a temporary name and then renamed.

    Args:
        model: a model that went through add_lora or load_adapter.
        path: a directory; it and its parents are made if needed.

    Returns:
        The directory.

    Raises:
        ValueError: the model has no adapters (merged already?), or they are sharded over processes
            (DTensors), or on the meta device without a hook that fetches them.
        TypeError: the adapters are PEFT's; use its save_pretrained.
        OverflowError: an adapter has a NaN or an infinity, which no reader accepts; nothing is
            written.
        OSError: the directory cannot be made or written.
    """
    from safetensors.torch import save_file

    if "\0" in os.fsdecode(path):
        raise ValueError(f"save_adapter: path is {shorten(path)}, want one without NUL")
    check_adaptable("save_adapter", model)
    check_whole("save_adapter", model, only="lora_")
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError(
            "save_adapter: model has no adapters, want a model to which add_lora or load_adapter "
            "added some"
        )
    first = next(iter(adapters.values()))
    modules, parameters = peft_targets(model, list(adapters))
    names = parameter_names(model)
    in_config = {name: name for name in adapters} | names_as_parameters(model, list(adapters))
    in_file = keys_in_file([names[name] for name in adapters if name in names])
    conv1d = {isinstance(m, Linear4bit) and m.from_conv1d for m in adapters.values()}
    config = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        # PEFT refuses a dropout with target_parameters.
        "lora_dropout": 0.0 if parameters else first.lora_dropout,
        "use_rslora": first.use_rslora,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "peft_version": LAYOUT_OF,
        "rank_pattern": {exactly(in_config[n]): m.r for n, m in adapters.items() if m.r != first.r},
        "alpha_pattern": {
            exactly(in_config[n]): m.lora_alpha
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
        pair = {}
        for key in ("lora_A", "lora_B"):
            tensor = value_of(module, key).detach()
            if tensor.is_meta:
                raise ValueError(
                    f"save_adapter: {name}.{key} is on the meta device and has no values, want it "
                    "in memory; accelerate.hooks.remove_hook_from_submodules(model) fetches what "
                    "was offloaded"
                )
            check_finite(f"save_adapter: {name}.{key}", tensor, tensor.dtype)
            pair[key] = tensor
        if isinstance(module, LoraStack4bit):
            pair = dict(zip(pair, to_file(*pair.values())))
            name = in_file[names[name]]
        for key, tensor in pair.items():
            tensors[f"{_PREFIX}{name}.{key}.weight"] = tensor.to("cpu").contiguous()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2)
    _write_aside(path / WEIGHTS, lambda draft: save_file(tensors, draft, metadata={"format": "pt"}))
    _write_aside(path / CONFIG, lambda draft: draft.write_text(text, encoding="utf-8"))
    return path


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    trainable: bool = False,
    lora_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Loads a LoRA adapter, written by save_adapter or PEFT, into a model, in place.

    Args:
        model: quantized or not, without adapters, or with adapters of the same shapes on the same
            layers (to continue a run), which are overwritten. Its other weights are frozen.
        path: a directory with adapter_config.json and adapter_model.safetensors.
        trainable: whether the adapter can be trained further; False by default, as in PEFT.
        lora_dtype: dtype of A and B.

    Returns:
        model.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: the model has PEFT's adapters, or lora_dtype is not a float dtype.
        ValueError: the adapter is not plain LoRA (DoRA, PiSSA, trained biases or whole modules, an
            unknown setting), or has a value out of range, a regular expression that could take long
            to match, a layer that the model lacks, an A without its B or a shape that does not
            fit; a file is damaged; or trainable is set for a model that was loaded under
            torch.inference_mode. The model then stays as it was.
    """
    check_adaptable("load_adapter", model)
    if lora_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"load_adapter: lora_dtype is {lora_dtype}, want float32, float16 or bfloat16"
        )
    if trainable:
        check_trainable("load_adapter", model)
    check_foreign("load_adapter", model)
    path = Path(path)
    config = read_adapter_config(path)
    present = adapters_of(model)
    pairs = read_pairs(
        model,
        path,
        config,
        lambda name: present[name].lora_A.dtype if name in present else lora_dtype,
    )
    if present and set(present) != set(pairs):
        odd = sorted(set(present) ^ set(pairs))[0]
        raise ValueError(
            f"load_adapter: model has adapters on other layers than {path} ({odd} differs), want "
            "the same layers, or a model without adapters"
        )
    settings = {}
    names = parameter_names(model)
    for name, (lora_A, lora_B) in pairs.items():
        base = model.get_submodule(name)
        r = rank_of(path, config, names.get(name, name), base, lora_A, lora_B)
        if name in present and present[name].r != r:
            raise ValueError(
                f"load_adapter: {name} has an adapter of rank {present[name].r} and {path} has one "
                f"of rank {r}, want the same rank, or a model without adapters"
            )
        settings[name] = {
            "r": r,
            "lora_alpha": alpha_of(config, names.get(name, name)),
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


def _check_tensor(file: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"load_adapter: {file} has {tensor.dtype} in {name}, want a float dtype")
    if not tensor.double().isfinite().all():
        raise ValueError(
            f"load_adapter: {file} has a NaN or Inf in {name}, want finite values: the file is "
            "damaged, or training diverged"
        )
    if not tensor.to(dtype).isfinite().all():
        raise ValueError(
            f"load_adapter: {file} has {tensor.double().abs().max().item():g} in {name}, want "
            f"values that {dtype} can hold"
        )


def read_pairs(model: nn.Module, path: Path, config: dict, dtype_of) -> dict[str, tuple]:
    """Layer name -> (lora_A, lora_B) from an adapter file.

    Args:
        config: as read_adapter_config returns it.
        dtype_of: gives the later dtype of a layer's factors from its name.
    """
    file = path / WEIGHTS
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: {file} is missing, want the adapter's weights")
    try:
        tensors = SafetensorsFiles([file])
    except CheckpointError as error:
        raise CheckpointError(f"load_adapter: {error}") from error
    linears = linears_of(model)
    stacks = _stacks_in_file(model, file, config)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors:
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B)\.weight", key)
        if match is None:
            _check_extra(model, file, key, tensors)
            continue
        halves.setdefault(stacks.get(match[1], match[1]), {})[match[2]] = tensors[key]
    _stack_singles(linears, file, config, halves)
    for name, half in halves.items():
        if name not in linears:
            raise ValueError(
                f"load_adapter: {file} adapts {name}, which the model does not have; "
                f"{layers_found(model)}"
            )
        for key in ("lora_A", "lora_B"):
            if key not in half:
                raise ValueError(f"load_adapter: {file} has no {key} for {name}, want A and B")
            _check_tensor(file, f"{name}.{key}", half[key], dtype_of(name))
    if not halves:
        raise ValueError(
            f"load_adapter: {file} holds no LoRA weights, want {_PREFIX}*.lora_A.weight"
        )
    pairs = {name: (half["lora_A"], half["lora_B"]) for name, half in halves.items()}
    adapted = {name: (*pairs[name], linears[name]) for name in stacks.values() if name in pairs}
    swapped = adapted and is_swapped("load_adapter", path / CONFIG, config, list(adapted.values()))
    for name, (A, B, stack) in adapted.items():
        pair = from_file(A, B, stack, swapped)
        if pair is None:
            E, N, K = stack._shape
            raise ValueError(
                f"load_adapter: {file}: {name} has lora_A {list(A.shape)} and lora_B "
                f"{list(B.shape)}, want [{E} r, {K}] and [{N}, {E} r] for {E} experts of "
                f"[{N}, {K}]: the adapter belongs to another model"
            )
        pairs[name] = pair
    return pairs


def _stack_singles(
    linears: dict, file: Path, config: dict, halves: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Stacks, in place, the adapters that an older version wrote separately for each expert: those
    of experts.packed.7.up become experts.up."""
    patterns = [*config["rank_pattern"], *config["alpha_pattern"]]
    for old in [name for name in halves if ".packed.0." in name]:
        holder, side = old.split(".packed.0.")
        stack = linears.get(f"{holder}.{side}")
        if not isinstance(stack, Stack4bit):
            continue
        names = [f"{holder}.packed.{e}.{side}" for e in range(stack.num_experts)]
        for key in ("lora_A", "lora_B"):
            parts = [halves.get(name, {}).get(key) for name in names]
            shapes = {None if part is None else part.shape for part in parts}
            if (
                len(shapes) > 1
                or None in shapes
                or any(p.match(n) for p in patterns for n in names)
            ):
                raise ValueError(
                    f"load_adapter: {file} adapts the experts of {holder} one by one, but not all "
                    f"{len(names)} in the same way, want one rank and lora_alpha for all"
                )
            halves.setdefault(f"{holder}.{side}", {})[key] = torch.stack(parts)
        for name in names:
            del halves[name]


def _stacks_in_file(model: nn.Module, file: Path, config: dict) -> dict[str, str]:
    """The start of a key in an adapter's file -> the stack of experts that it adapts. Raises
    NotPlainLora if one of the config's target_parameters names no weight of the model."""
    adapted = []
    names = {parameter: stack for stack, parameter in parameter_names(model).items()}
    for target in config.get("target_parameters") or ():
        found = [parameter for parameter in names if _ends_with(parameter, target)]
        is_linear = target.endswith(".weight")  # its keys are those of an adapted layer
        if not found and not is_linear:
            raise NotPlainLora(
                f"load_adapter: {file} adapts the parameter {target}, want packed experts of the "
                f"model ({', '.join(stacked_names(names)) or 'it has none'}); "
                "peft.PeftModel.from_pretrained loads this adapter"
            )
        adapted += found
    keys = keys_in_file([parameter for parameter in names if parameter in adapted])
    return {key: names[parameter] for parameter, key in keys.items()}


def _check_extra(model: nn.Module, file: Path, key: str, tensors: SafetensorsFiles) -> None:
    """Checks a tensor that is not LoRA's. PEFT also stores the embeddings if the head is a target;
    they must equal the model's own."""
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
