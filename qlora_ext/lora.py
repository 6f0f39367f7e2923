"""LoRA on a model: which layers get an adapter, and PEFT's file format in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from .checks import (
    FLOAT_MAX,
    CheckpointError,
    bad_regex,
    check_finite,
    is_number,
    is_regex,
    short,
    some,
)
from .experts import Experts4bit
from .files import SafetensorsFiles, read_json
from .models import (
    check_model,
    check_whole,
    linear_names,
    num_parameters,
    output_embeddings,
    places_of,
    replace_module,
)
from .models.raw_errors import explain_errors
from .models.reads import read_past_forward
from .nn import (
    FLOAT_DTYPES,
    Embedding4bit,
    Linear4bit,
    LoraLinear,
    LoraLinear4bit,
    PanelLinear,
    _Lora,
    _Packed4bit,
    check_lora_rank,
    is_conv1d,
    is_plain_linear,
)
from .nn import linear_shape as _linear_shape
from .offload import check_can_adapt, keep_adapter, loaded, value_of
from .quantized_tensor import dequantize_4bit
from .shared_input import SAME_INPUT, SharedInput, same_input

__all__ = [
    "LoraConfig",
    "add_lora",
    "load_adapter",
    "print_trainable_parameters",
    "save_adapter",
]


# Architectures ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of an architecture's layers, as ends of their dotted paths.

    Where one layer makes query, key and value, it is `fused` and those three are empty.
    """

    projection: tuple[str, ...]  # attention output
    mlp: tuple[str, ...]
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    fused: str | None = None


_QKV = {"query": ("q_proj",), "key": ("k_proj",), "value": ("v_proj",)}
LLAMA = Family(("o_proj",), ("gate_proj", "up_proj", "down_proj"), **_QKV)
PHI = Family(("self_attn.dense",), ("fc1", "fc2"), **_QKV)
PHI3 = Family(("o_proj",), ("gate_up_proj", "down_proj"), fused="qkv_proj")
GPT2 = Family(("attn.c_proj",), ("mlp.c_fc", "mlp.c_proj"), fused="c_attn")
GPT_NEOX = Family(("attention.dense",), ("dense_h_to_4h", "dense_4h_to_h"), fused="query_key_value")
OPT = Family(("out_proj",), ("fc1", "fc2"), **_QKV)
BLOOM = Family(
    ("self_attention.dense",), ("dense_h_to_4h", "dense_4h_to_h"), fused="query_key_value"
)
STARCODER2 = Family(("o_proj",), ("mlp.c_fc", "mlp.c_proj"), **_QKV)
NEMOTRON = Family(("o_proj",), ("up_proj", "down_proj"), **_QKV)
T5 = Family(("o",), ("wi", "wi_0", "wi_1", "wo"), query=("q",), key=("k",), value=("v",))

# config.model_type -> family. A new architecture goes here: one line. No name may be the end of
# another family's name for another switch: LoraConfig.to_peft() without a model takes them all.
FAMILIES = {
    **dict.fromkeys(["llama", "mistral", "ministral", "mixtral", "smollm3", "stablelm"], LLAMA),
    **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite", "cohere"], LLAMA),
    **dict.fromkeys(["gemma", "gemma2", "gemma3", "gemma3_text", "cohere2"], LLAMA),
    **dict.fromkeys(["olmo", "olmo2", "olmo3"], LLAMA),
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "bloom": BLOOM,
    "falcon": BLOOM,
    "starcoder2": STARCODER2,
    "nemotron": NEMOTRON,
    **dict.fromkeys(["t5", "mt5", "umt5"], T5),
}

_ATTENTION = ("query", "key", "value")
_SWITCHES = (*_ATTENTION, "projection", "mlp", "head")


# Configuration ------------------------------------------------------------------------------------


# key -> (whether a value will do, what is wanted)
_WANTED = {
    "r": (lambda v: type(v) is int and v >= 1, "an integer of 1 or more"),
    "lora_alpha": (lambda v: is_number(v) and 0 < v <= FLOAT_MAX, "a positive number"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a probability in [0, 1)"),
    **dict.fromkeys(("use_rslora", *_SWITCHES), (lambda v: isinstance(v, bool), "True or False")),
}
_WANTED_IN_FILES = {**_WANTED, "fan_in_fan_out": _WANTED["use_rslora"]}


def _check_value(op: str, key: str, value, shown: str | None = None) -> None:
    """ValueError unless value will do for key; shown is how the sentence calls the key."""
    is_good, want = _WANTED_IN_FILES[key]
    if not is_good(value):
        raise ValueError(f"{op} {shown or key} is {short(value)}, want {want}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what rank: W' = W + (lora_alpha / r) B A.

    Args:
        r: rank, from 1 to the smaller side of each adapted weight.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout on the bypass's input, a probability in [0, 1).
        bias: "none"; biases are not trained.
        query, key, value, projection, mlp, head: which layers: the attention's inputs, its output,
            the feed-forward layers, lm_head. A layer that fuses query, key and value needs all
            three switches, since its adapter changes all three.
        target_modules: instead of the switches: ends of dotted names, a regular expression that
            matches whole names (a str), or "all-linear" (every linear layer but the head).
        use_rslora: scaling is lora_alpha / sqrt(r) (arXiv 2312.03732).

    Raises:
        ValueError: a value out of range, or nothing switched on.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    bias: str = "none"
    query: bool = True
    key: bool = False
    value: bool = True
    projection: bool = False
    mlp: bool = False
    head: bool = False
    target_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False

    def __post_init__(self):
        for key in _WANTED:
            _check_value("LoraConfig:", key, getattr(self, key))
        if self.bias != "none":
            raise ValueError(
                f'LoraConfig: bias is {self.bias!r}, want "none": packed layers do not train biases'
            )
        if isinstance(self.target_modules, Iterable) and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("LoraConfig: target_modules is empty, want names of layers, or None")
        _check_targets(self.target_modules)
        if self.target_modules is None and not self.switches:
            raise ValueError(
                "LoraConfig: every switch is off, want at least one of query, key, value, "
                "projection, mlp, head"
            )

    @property
    def switches(self) -> tuple[str, ...]:
        """The switches that are on."""
        return tuple(name for name in _SWITCHES if getattr(self, name))

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_peft(self, model: nn.Module | None = None):
        """The same as a peft.LoraConfig (needs peft).

        Args:
            model: the model it is for; PEFT then adapts the layers that add_lora would. Without
                one, the switches become the layer names of every architecture this module knows,
                of which PEFT adapts those it finds; a layer that fuses query, key and value is
                among them where all three are on.

        Raises:
            ValueError: as add_lora, with a model.
        """
        import peft

        if model is not None:
            targets = _shorten(model, _target_names(model, self))
        elif self.target_modules is not None:
            targets = self.target_modules
            targets = targets if isinstance(targets, str) else list(targets)
        else:
            targets = self._names_anywhere()
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            target_modules=targets,
            use_rslora=self.use_rslora,
            task_type=None if model is None else _task_type(model),
        )

    def _names_anywhere(self) -> list[str]:
        names: dict[str, None] = {}
        for family in FAMILIES.values():
            for switch in self.switches:
                if switch != "head":
                    names.update(dict.fromkeys(getattr(family, switch)))
            if family.fused and set(_ATTENTION) <= set(self.switches):
                names[family.fused] = None
        if self.head:
            names.update({"lm_head": None, "embed_out": None})
        return list(names)


def _check_targets(targets) -> None:
    """ValueError unless targets is None, a regular expression, or names."""
    if isinstance(targets, str) and not is_regex(targets):
        raise ValueError(
            f"LoraConfig: target_modules is {short(targets)}, want a regular expression; names "
            "go in a list"
        )
    names = [targets] if targets is None or isinstance(targets, str) else targets
    for name in names if isinstance(names, (list, tuple)) else [names]:
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(
                f"LoraConfig: target_modules holds {short(name)}, want names of layers (str)"
            )


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def _check_no_table(model: nn.Module, is_target: Callable[[str], bool]) -> None:
    """ValueError if a target is an embedding: another adapter than a linear layer's."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and is_target(name):
            raise ValueError(
                f"add_lora: target_modules has {name}, a {type(module).__name__}, want linear "
                "layers; PEFT's LoRA adapts embeddings, packed ones too (peft.get_peft_model with "
                f"target_modules naming {name.rpartition('.')[2]!r})"
            )


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _found(model: nn.Module) -> str:
    return f"the linear layers of {type(model).__name__} are {linear_names(model)}"


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
        f"{sorted(FAMILIES)}, or explicit target_modules; {_found(model)}"
    )


def _head_name(model: nn.Module) -> str:
    head = output_embeddings(model)
    for name, module in model.named_modules():
        if module is head and head is not None:
            return name
    raise ValueError(
        f"add_lora: head=True, and {type(model).__name__} has no output embeddings; {_found(model)}"
    )


def _target_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the layers that config selects, in the model's order."""
    linears = _linears(model)
    if config.target_modules is not None:
        return _explicit_targets(model, config.target_modules, linears)
    chosen: set[str] = set()
    switches = config.switches
    family = _family(model) if set(switches) - {"head"} else None
    experts = {name for name, m in model.named_modules() if isinstance(m, Experts4bit)}
    attention = [switch for switch in switches if switch in _ATTENTION]
    for switch in switches:
        if switch == "head":
            chosen.add(_head_name(model))
            continue
        endings = getattr(family, switch)
        if switch in _ATTENTION and family.fused:
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
            found |= {name for name in linears if name.rsplit(".", 3)[0] in experts}
        if not found:
            raise ValueError(
                f"add_lora: {switch}=True matches no layer (looked for {list(endings)}); "
                f"{_found(model)}"
            )
        chosen |= found
    return [name for name in linears if name in chosen]


def _is_adaptable(module: nn.Module) -> bool:
    """Whether an adapter can stand in for module: a layer of ours, or a plain one."""
    return isinstance(module, _Packed4bit) or type(module) is PanelLinear or is_plain_linear(module)


def _read_past_forward(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Name -> the method that reads the layer's weight past its forward, and would leave an adapter
    out. Only dense layers are looked at: quantizing has left such layers dense."""
    dense = {name: layer for name, layer in layers.items() if not isinstance(layer, _Packed4bit)}
    found = read_past_forward(model, values_only=True) if dense else {}
    return {name: found[id(layer)] for name, layer in dense.items() if id(layer) in found}


def _warn_left_out(layers: list[str], why: str) -> None:
    """Says which layers "all-linear" leaves out, if there are any."""
    if layers:
        more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
        warnings.warn(
            f'add_lora: "all-linear" leaves out {", ".join(layers[:5])}{more}: {why}', stacklevel=5
        )


def _explicit_targets(model, targets, linears) -> list[str]:
    if targets == "all-linear":
        head = output_embeddings(model)
        names = [name for name, module in linears.items() if module is not head]
        odd = [n for n in names if not _is_adaptable(linears[n])]
        read = _read_past_forward(model, {n: linears[n] for n in names if n not in odd})
        _warn_left_out(
            [f"{n} ({method})" for n, method in read.items()],
            "that method reads the layer's weight past its forward, and would leave an adapter out",
        )
        _warn_left_out(
            [f"{n} ({type(linears[n]).__name__})" for n in odd],
            "a subclass of nn.Linear may compute something else than x W^T + b",
        )
        odd += read
        if len(odd) == len(names):
            raise ValueError(
                f'add_lora: target_modules="all-linear" finds no layer to adapt; {_found(model)}'
            )
        return [name for name in names if name not in odd]
    if isinstance(targets, str):
        names = [name for name in linears if re.fullmatch(targets, name)]
        if not names:
            _check_no_table(model, lambda name: re.fullmatch(targets, name) is not None)
            raise ValueError(f"add_lora: target_modules={targets!r} matches none; {_found(model)}")
        return names
    for target in targets:
        if not any(_ends_with(name, target) for name in linears):
            _check_no_table(model, lambda name, target=target: _ends_with(name, target))
            raise ValueError(f"add_lora: target_modules has {target!r}, no layer; {_found(model)}")
    return [name for name in linears if any(_ends_with(name, target) for target in targets)]


def _shorten(model: nn.Module, names: list[str]) -> list[str] | str:
    """Ends of names that match exactly these of all modules' names, the full names, or, where one
    of them is also the end of another module's name, a regular expression."""
    everything = [name for name, _ in model.named_modules()]
    for parts in (1, 2):
        endings = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
        matched = [n for n in everything if any(_ends_with(n, ending) for ending in endings)]
        if sorted(matched) == sorted(names):
            return endings
    if any(_ends_with(n, name) for n in set(everything) - set(names) for name in names):
        return "|".join(re.escape(name) for name in names)
    return list(names)


# Adapters -----------------------------------------------------------------------------------------


def _adapters(model: nn.Module) -> dict[str, _Lora]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Lora)}


def _check_model(op: str, model: nn.Module) -> None:
    check_model(
        op,
        model,
        one_layer="LoraLinear4bit.from_linear adapts one layer",
        peft="a model whose adapters are ours; a PeftModel has methods of its own for this",
    )


def check_trainable(op: str, model: nn.Module) -> None:
    """ValueError if a parameter was made under torch.inference_mode: autograd cannot save it for a
    backward pass. (Buffers of that kind, rotary frequencies say, are seldom saved.)"""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{op}: {name} was made under torch.inference_mode, and autograd cannot train "
                "through it; load the model outside of inference_mode, or under torch.no_grad()"
            )


def _with_adapter(name: str, base: nn.Module, **settings) -> _Lora:
    if isinstance(base, Linear4bit):
        return LoraLinear4bit.from_linear(base, **settings)
    if is_conv1d(base):
        raise TypeError(
            f"add_lora: {name} is an unquantized Conv1D, want a 4-bit layer or an nn.Linear; "
            "quantize_model packs it"
        )
    try:
        return LoraLinear.from_linear(base, **settings)
    except TypeError as error:
        raise TypeError(f"add_lora: {name}: {error}") from None


def _input_groups(model: nn.Module, names: list[str]) -> list[list[str]]:
    """The named layers that may share an input, in groups. ValueError if there are none."""
    packed = [name for name in names if isinstance(model.get_submodule(name), Linear4bit)]
    groups = same_input(packed)
    if not groups:
        looked_for = "; ".join(", ".join(siblings) for siblings in SAME_INPUT)
        raise ValueError(
            "add_lora: share_inputs=True, but no two of the layers to adapt are packed siblings "
            f"that read the same input (looked for {looked_for}); these get adapters: {some(names)}"
        )
    return groups


def add_lora(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    lora_dtype: torch.dtype = torch.float32,
    share_inputs: bool = False,
) -> nn.Module:
    """Freezes a model and puts a trainable adapter on the layers that config selects, in place.

    Packed layers become LoraLinear4bit, unquantized ones (a head) LoraLinear; their weights are
    shared, not copied, and the model computes what it did before until it is trained. A head whose
    weight is tied to the embedding gets its adapter alone; the embedding stays as it is. Where
    accelerate offloads a layer, its adapter stays on the device that the layer computes on.

    Args:
        model: quantized with quantize_model or from_pretrained, or not quantized.
        config: a LoraConfig; None is its defaults (query and value, r = 8).
        lora_dtype: dtype of A and B; float32 trains best, whatever the activations are.
        share_inputs: packed siblings that read the same x (query, key and value; gate and up)
            compute x A^T once for all of them. Outputs and gradients are the same. Each layer
            computes its own while it drops part of its input (lora_dropout, in training), under
            torch.compile and under torch.inference_mode.

    Returns:
        model.

    Raises:
        TypeError: config is not a LoraConfig; model is a single layer or carries PEFT's adapters; a
            target is an unquantized Conv1D, or a subclass of nn.Linear whose forward may compute
            something else ("all-linear" leaves those out and warns).
        ValueError: the model has adapters; r is larger than a weight's smaller side; an unknown
            architecture, or a switch or name that matches nothing, with the linear layers found; a
            part of a fused query-key-value layer; a model that was loaded under
            torch.inference_mode; share_inputs=True if no two layers can share. The model is then
            as it was.
    """
    config = LoraConfig() if config is None else config
    if not isinstance(config, LoraConfig):
        raise TypeError(f"add_lora: config is a {type(config).__name__}, want qlora_ext.LoraConfig")
    if not isinstance(share_inputs, bool):
        raise TypeError(f"add_lora: share_inputs is {short(share_inputs)}, want a bool")
    _check_model("add_lora", model)
    check_trainable("add_lora", model)
    if present := _adapters(model):
        raise ValueError(
            f"add_lora: {next(iter(present))} has an adapter already, want a model without; "
            "merge_and_unload merges them"
        )
    names = _target_names(model, config)
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "lora_dtype": lora_dtype,
    }
    groups = _input_groups(model, names) if share_inputs else []
    _install(model, {name: settings for name in names})
    for group in groups:
        SharedInput([model.get_submodule(name) for name in group])
    model.requires_grad_(False)
    for module in _adapters(model).values():
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
    _tell_trainer(model)
    return model


def _tell_trainer(model: nn.Module) -> None:
    """transformers' Trainer asks the model's quantizer whether there is anything to train."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.has_adapters = any(m.lora_A.requires_grad for m in _adapters(model).values())


def _install(model: nn.Module, settings: dict[str, dict]) -> None:
    """Replaces the named layers by ones with an adapter; all or none of them."""
    new = {}
    bases = {name: model.get_submodule(name) for name in settings}
    read = _read_past_forward(model, bases)
    for name, keywords in settings.items():
        base = bases[name]
        if name in read:
            raise ValueError(
                f"add_lora: {read[name]} reads the weight of {name} past its forward, "
                "and would leave the adapter out; want target_modules without it"
            )
        check_can_adapt("add_lora", base, model)
        N, K = _linear_shape(base)
        check_lora_rank(f"add_lora: {name}", keywords["r"], K, N)
        new[name] = (base, _with_adapter(name, base, **keywords))
    places = places_of(model)
    for base, module in new.values():
        replace_module(model, base, module, places)
    explain_errors(model)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the trainable share in PEFT's words, counting logical weights, not bytes."""
    trainable = num_parameters(model, only_trainable=True)
    total = num_parameters(model)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(total, 1):.4f}"
    )


# PEFT's files -------------------------------------------------------------------------------------


class NotPlainLora(ValueError):
    """An adapter of PEFT's that is more than W + scaling B A; PEFT itself may load it."""


_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _task_type(model: nn.Module) -> str | None:
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

    _check_model("save_adapter", model)
    check_whole("save_adapter", model, only="lora_")
    adapters = _adapters(model)
    if not adapters:
        raise ValueError("save_adapter: model has no adapters, want one that add_lora was given")
    first = next(iter(adapters.values()))
    conv1d = {isinstance(m, Linear4bit) and m.from_conv1d for m in adapters.values()}
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "bias": "none",
        "target_modules": _shorten(model, list(adapters)),
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
    _check_model("load_adapter", model)
    if lora_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"load_adapter: lora_dtype is {lora_dtype}, want float32, float16 or bfloat16"
        )
    if trainable:
        check_trainable("load_adapter", model)
    path = Path(path)
    config = _read_config(path)
    present = _adapters(model)
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
        _install(model, settings)
    model.requires_grad_(False)
    for name, module in _adapters(model).items():
        with torch.no_grad():
            module.lora_A.copy_(pairs[name][0])
            module.lora_B.copy_(pairs[name][1])
        module.lora_A.requires_grad_(trainable)
        module.lora_B.requires_grad_(trainable)
    _tell_trainer(model)
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
            f"load_adapter: {file} has peft_type {short(config.get('peft_type'))}, want 'LORA'"
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
                    f"load_adapter: {file} has bias={short(value)}, want 'none'; {elsewhere}"
                )
        elif key == "init_lora_weights":
            if value is not None and not any(value == start for start in _PLAIN_STARTS):
                raise NotPlainLora(
                    f"load_adapter: {file} has init_lora_weights={short(value)}, which changes "
                    "the base weights, want a plain LoRA adapter; PEFT's save_pretrained with "
                    "path_initial_model_for_weight_conversion writes one (not for loftq)"
                )
        elif key not in _HARMLESS and value not in (None, False, [], {}, ""):
            want = "False" if isinstance(value, bool) else "None"
            raise NotPlainLora(
                f"load_adapter: {file} has {short(key)[1:-1]}={short(value)}, want {want}; "
                f"{elsewhere}"
            )


def _check_values(file: Path, config: dict) -> None:
    """ValueError for a value of the wrong kind or out of range."""
    op = f"load_adapter: {file}:"
    _check_value(op, "lora_alpha", config.get("lora_alpha"))
    for key in ("r", "lora_dropout", "use_rslora"):
        if key in config:
            _check_value(op, key, config[key])
    for key, kind in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(key)
        if patterns is None:
            continue
        if not isinstance(patterns, dict):
            raise ValueError(f"{op} {key} is {short(patterns)}, want names and values, {{}}")
        if bad := bad_regex(patterns):
            raise ValueError(f"{op} {key} holds {short(bad[0])}, want {bad[1]}")
        for pattern, value in patterns.items():
            _check_value(op, kind, value, f"{key}[{short(pattern)}]")
    if config.get("fan_in_fan_out") is not None:
        _check_value(op, "fan_in_fan_out", config["fan_in_fan_out"])
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if not is_regex(targets):
            raise ValueError(f"{op} target_modules is {short(targets)}, want a regular expression")
    elif targets is not None and not (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    ):
        raise ValueError(
            f"{op} target_modules is {short(targets)}, want names of layers, or a regular "
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
    linears = _linears(model)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors:
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B)\.weight", key)
        if match is None:
            _check_extra(model, file, key, tensors)
            continue
        name = match[1]
        if name not in linears:
            raise ValueError(f"load_adapter: {file} adapts {name}, no layer; {_found(model)}")
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
