"""Finds the layers of a model that a LoraConfig selects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

from torch import nn

from ..models.architectures import FAMILIES, Family
from ..models.plan import is_factor
from ..models.reads import read_past_forward
from ..models.walk import linear_names, output_embeddings, stacked_names
from ..nn.experts import is_fused_experts, parameter_names, up_name
from ..nn.linear import is_conv1d, is_plain_linear
from ..nn.packed import _Packed4bit
from ..nn.panel import PanelLinear
from ..nn.stack import Stack4bit


def _is_adaptable(module: nn.Module) -> bool:
    """Whether module can get an adapter: it is one of our layers, or a plain linear layer."""
    return isinstance(module, _Packed4bit) or type(module) is PanelLinear or is_plain_linear(module)


def _read_past_forward(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Name -> the method that reads the layer's weight and bypasses its forward, so that it would
    ignore an adapter. Only for dense layers, because quantizing leaves such layers dense."""
    dense = {name: layer for name, layer in layers.items() if not isinstance(layer, _Packed4bit)}
    found = read_past_forward(model, values_only=True) if dense else {}
    return {name: found[id(layer)] for name, layer in dense.items() if id(layer) in found}


def _warn_left_out(layers: list[str], why: str, setting: str = '"all-linear"') -> None:
    """Warns which layers a setting of LoraConfig leaves out, if there are any."""
    if layers:
        more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
        warnings.warn(
            f"add_lora: {setting} leaves out {', '.join(layers[:5])}{more}: {why}", stacklevel=5
        )


ATTENTION = ("query", "key", "value")
SWITCHES = (*ATTENTION, "projection", "mlp", "head")


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of model, and the stacks of its experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Stack4bit)) or is_conv1d(module)
    }


def _check_no_table(model: nn.Module, is_target: Callable[[str], bool]) -> None:
    """Raises ValueError if a target is an embedding, which needs another kind of adapter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and is_target(name):
            raise ValueError(
                f"add_lora: target_modules has {name}, a {type(module).__name__}, want linear "
                "layers; PEFT's LoRA adapts embeddings, packed ones too (peft.get_peft_model with "
                f"target_modules naming {name.rpartition('.')[2]!r})"
            )


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _dense_experts(model: nn.Module) -> dict[str, str]:
    """The experts in model that are not packed, and so get no adapter: the name of each parameter
    -> the name that its packed stack would have. Experts of a class without transformers' layout
    are known by their name or their class's."""
    found, linears = {}, linears_of(model)
    for holder, module in model.named_modules():
        called = f"{holder.rpartition('.')[2]} {type(module).__name__}".lower()
        own = {key: p for key, p in module._parameters.items() if p is not None}
        names = {}
        if is_fused_experts(module):
            names = {up_name(module): "up", "down_proj": "down"}
        elif "expert" in called and holder not in linears and not isinstance(module, nn.Embedding):
            names = {key: key for key, p in own.items() if p.ndim > 1 and "bias" not in key}
        start = f"{holder}." if holder else ""
        found |= {start + key: start + stack for key, stack in names.items()}
    return found


def _warn_of_dense_experts(model: nn.Module, config) -> None:
    """Warns which experts config asks for that get no adapter because they are not packed."""
    left: dict[str, list[str]] = {}
    targets = config.target_modules
    for name, stack in _dense_experts(model).items():
        if any(_ends_with(name, target) for target in config.target_parameters or ()):
            setting = "target_parameters"
        elif targets == "all-linear":
            setting = '"all-linear"'
        elif targets is None and config.mlp:
            setting = "mlp=True"
        elif targets is not None and _is_explicit_target(stack, targets):
            setting = "target_modules"
        else:
            continue
        left.setdefault(setting, []).append(name)
    for setting, names in left.items():
        _warn_left_out(
            stacked_names(names),
            "these experts are not packed, and add_lora adapts only packed ones. "
            "print(model.quantization_report) says why they stayed dense. PEFT's target_parameters "
            "can adapt them",
            setting,
        )


def layers_found(model: nn.Module) -> str:
    text = f"the linear layers of {type(model).__name__} are {linear_names(model)}"
    if experts := stacked_names(parameter_names(model).values()):
        text += f", and its packed experts (for target_parameters) {experts}"
    if experts := stacked_names(_dense_experts(model)):
        text += f"; add_lora does not adapt {experts}, because these experts are not packed"
    return text


def _family(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    kinds = [getattr(config, "model_type", None)]
    if hasattr(config, "get_text_config"):
        kinds.append(getattr(config.get_text_config(), "model_type", None))
    for kind in kinds:
        if kind in FAMILIES:
            return FAMILIES[kind]
    raise ValueError(
        f"add_lora: {type(model).__name__} has the architecture {kinds[0]!r}, want one of "
        f"{sorted(FAMILIES)}, or explicit target_modules; {layers_found(model)}"
    )


def _head_name(model: nn.Module) -> str:
    head = output_embeddings(model)
    for name, module in model.named_modules():
        if module is head and head is not None:
            return name
    raise ValueError(
        f"add_lora: head=True, but {type(model).__name__} has no output embeddings; "
        f"{layers_found(model)}"
    )


def target_names(model: nn.Module, config) -> list[str]:
    """Full names of the layers that config selects, in the model's order."""
    linears = linears_of(model)
    chosen = _parameter_targets(model, config.target_parameters, linears)
    if config.target_modules is None:
        chosen |= _switched_targets(model, config, linears)
    elif config.target_modules:
        chosen |= set(_explicit_targets(model, config.target_modules, linears))
    _warn_of_dense_experts(model, config)
    return [name for name in linears if name in chosen]


def _switched_targets(model, config, linears) -> set[str]:
    """The layers that the switches of config select."""
    chosen = set()
    switches = config.switches
    family = _family(model) if set(switches) - {"head"} else None
    attention = [switch for switch in switches if switch in ATTENTION]
    for switch in switches:
        if switch == "head":
            chosen.add(_head_name(model))
            continue
        endings = getattr(family, switch)
        if switch in ATTENTION and family.fused:
            fused = [name for name in linears if _ends_with(name, family.fused)]
            if fused and len(attention) < 3:
                raise ValueError(
                    f"add_lora: {', '.join(f'{name}=True' for name in attention)} selects a "
                    f"part of {fused[0]}, which computes query, key and value together; want "
                    "query=True, key=True and value=True to adapt the whole layer "
                    f'(target_modules=["{family.fused}"])'
                )
            endings = (family.fused,)
        found = {name for name in linears if any(_ends_with(name, end) for end in endings)}
        if switch == "mlp":
            found |= {name for name, layer in linears.items() if isinstance(layer, Stack4bit)}
        if not found:
            raise ValueError(
                f"add_lora: {switch}=True matches no layer (looked for {list(endings)}); "
                f"{layers_found(model)}"
            )
        chosen |= found
    return chosen


def _parameter_targets(model, targets, linears) -> set[str]:
    """The layers that PEFT's `target_parameters` name: ends of the dotted names of parameters."""
    names = {parameter: stack for stack, parameter in parameter_names(model).items()}
    names |= {f"{n}.weight": n for n, layer in linears.items() if n not in names.values()}
    chosen = set()
    for target in targets or ():
        found = {layer for parameter, layer in names.items() if _ends_with(parameter, target)}
        if not found:
            raise ValueError(
                f"add_lora: target_parameters has {target!r}, which names no weight of a linear "
                f"layer or of packed experts; {layers_found(model)}"
            )
        chosen |= found
    return chosen


def _explicit_targets(model, targets, linears) -> list[str]:
    if targets == "all-linear":
        head = output_embeddings(model)
        names = [name for name, module in linears.items() if module is not head]
        odd = [n for n in names if not _is_adaptable(linears[n])]
        read = _read_past_forward(model, {n: linears[n] for n in names if n not in odd})
        _warn_left_out(
            [f"{n} ({method})" for n, method in read.items()],
            "that method reads the layer's weight and bypasses its forward, so an adapter would "
            "have no effect",
        )
        _warn_left_out(
            [f"{n} ({type(linears[n]).__name__})" for n in odd],
            "a subclass of nn.Linear may compute something other than x W^T + b",
        )
        foreign = [n for n in names if n not in odd and n not in read and is_factor(n)]
        _warn_left_out(foreign, "adapters of another library")
        odd += [*read, *foreign]
        if len(odd) == len(names):
            raise ValueError(
                'add_lora: target_modules="all-linear" finds no layer to adapt; '
                f"{layers_found(model)}"
            )
        return [name for name in names if name not in odd]
    names = [name for name in linears if _is_explicit_target(name, targets)]
    if isinstance(targets, str) and not names:
        _check_no_table(model, lambda name: _is_explicit_target(name, targets))
        raise ValueError(
            f"add_lora: target_modules={targets!r} matches no layer; {layers_found(model)}"
        )
    for target in () if isinstance(targets, str) else targets:
        if not any(_ends_with(name, target) for name in linears):
            _check_no_table(model, lambda name, target=target: _ends_with(name, target))
            raise ValueError(
                f"add_lora: target_modules has {target!r}, which matches no layer; "
                f"{layers_found(model)}"
            )
    return names


def _is_explicit_target(name: str, targets) -> bool:
    """Whether target_modules, names or a regular expression, select the layer of that name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends_with(name, target) for target in targets)


def shorten_names(model: nn.Module, names: list[str]) -> list[str] | str:
    """target_modules for PEFT that match exactly these modules: ends of their names if possible,
    else the full names; a regular expression if a full name is also the end of another one."""
    if not names:
        return []
    everything = [name for name, _ in model.named_modules()]
    for parts in (1, 2):
        endings = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
        matched = [n for n in everything if any(_ends_with(n, ending) for ending in endings)]
        if sorted(matched) == sorted(names):
            return endings
    if any(_ends_with(n, name) for n in set(everything) - set(names) for name in names):
        return "|".join(re.escape(name) for name in names)
    return list(names)


# In a mixture with fused experts PEFT mistakes all layers of these names for parts of the experts
# (peft/utils/transformers_weight_conversion.py), also those of shared experts and dense layers.
_TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def names_as_parameters(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Which of these layers and stacks of experts must be in PEFT's target_parameters -> their
    names there. A layer's adapter has the same keys and shapes as if target_modules named it."""
    stacks = parameter_names(model)
    is_mixture = bool(stacks) or any(is_fused_experts(module) for module in model.modules())
    found = {}
    for name in names:
        if name in stacks:
            found[name] = stacks[name]
        elif is_mixture and name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS:
            found[name] = f"{name}.weight"
    return found


def peft_targets(model: nn.Module, names: list[str]) -> tuple[list[str] | str, list[str]]:
    """PEFT's target_modules and target_parameters for these layers and stacks of experts."""
    parameters = names_as_parameters(model, names)
    layers = [name for name in names if name not in parameters]
    adapted = list(parameters.values())
    # The last two parts of a name, and a layer's "weight".
    parts = [(name.split("."), 3 if name.endswith(".weight") else 2) for name in adapted]
    short = list(dict.fromkeys(".".join(name[-count:]) for name, count in parts))
    everything = [*parameter_names(model).values(), *(name for name, _ in model.named_parameters())]
    chosen = [p for p in everything if any(_ends_with(p, end) for end in short)]
    return shorten_names(model, layers), short if sorted(chosen) == sorted(adapted) else adapted


def task_type(model: nn.Module) -> str | None:
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    name = type(model).__name__
    return next((task for end, task in endings.items() if name.endswith(end)), None)
