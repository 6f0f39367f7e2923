"""Whole models: packing them layer by layer, and what they weigh afterwards."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..experts import Experts4bit, is_fused_experts
from ..nn import (
    FLOAT_DTYPES,
    FUSED,
    Embedding4bit,
    Linear4bit,
    PanelLinear,
    _Lora,
    _Packed4bit,
    is_conv1d,
    is_plain_linear,
)
from ..quantized_tensor import QuantConfig

__all__ = [
    "LayerReport",
    "MemoryReport",
    "QuantizationReport",
    "memory_report",
    "num_parameters",
    "quantize_model",
]

logger = logging.getLogger("qlora_ext")


# Reports ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer's (or one bare parameter's) weights."""

    name: str
    kind: str  # class of the module that holds it
    numel: int  # logical weights, without biases where the weight was packed
    nbytes: int  # bytes after quantizing
    reason: str | None  # why it is unquantized; None where it was packed


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Every weight of a model, packed or not. `str()` is a table of what was left out and why."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were packed."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def unquantized(self) -> tuple[LayerReport, ...]:
        """The layers that were not, largest first."""
        rest = [layer for layer in self.layers if layer.reason is not None]
        return tuple(sorted(rest, key=lambda layer: -layer.numel))

    @property
    def quantized_share(self) -> float:
        """Share of the model's weights that are packed, 0 to 1."""
        return sum(layer.numel for layer in self.quantized) / max(self.numel, 1)

    @property
    def numel(self) -> int:
        """Logical weights of the model."""
        return sum(layer.numel for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per packed weight, statistics included."""
        numel = sum(layer.numel for layer in self.quantized)
        return 8 * sum(layer.nbytes for layer in self.quantized) / max(numel, 1)

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} layers in {self.bits_per_weight:.3f} bits per weight: "
            f"{self.quantized_share:.1%} of {self.numel:,} weights. Unquantized:"
        ]
        grouped: dict[tuple[str, str, str], list[LayerReport]] = defaultdict(list)
        for layer in self.unquantized:
            # Layers of a stack share a row: layers.0.norm and layers.7.norm are layers.*.norm.
            pattern = re.sub(r"\b\d+\b", "*", layer.name)
            grouped[pattern, layer.kind, layer.reason].append(layer)
        rows = sorted(grouped.items(), key=lambda item: -sum(part.numel for part in item[1]))
        for (pattern, kind, reason), parts in rows:
            numel = sum(layer.numel for layer in parts)
            times = f" x{len(parts)}" if len(parts) > 1 else ""
            share = numel / max(self.numel, 1)
            lines.append(f"  {share:7.2%}  {pattern}{times} ({kind}, {numel:,}): {reason}")
        return "\n".join(lines if rows else [lines[0].replace(" Unquantized:", "")])


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a model by part; every tensor is counted once, however often it is shared."""

    parts: dict[str, int]  # part -> bytes
    quantized_numel: int  # logical weights that are packed
    num_parameters: int  # logical weights of the model

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per packed weight: codes, scales and means; 0 if nothing is packed."""
        packed = self.parts["4-bit weights"] + self.parts["4-bit statistics"]
        return 8 * packed / self.quantized_numel if self.quantized_numel else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.total / 2**20:,.2f} MiB, {self.num_parameters:,} weights, "
            f"{self.bits_per_weight:.3f} bits per packed weight"
        ]
        for part, nbytes in self.parts.items():
            if nbytes:
                lines.append(f"  {nbytes / 2**20:10,.2f} MiB  {part}")
        return "\n".join(lines)


# Walking a model ----------------------------------------------------------------------------------


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that is a run of name's dotted parts: "mlp.gate" of "h.0.mlp.gate"."""
    for pattern in patterns:
        if f".{pattern}." in f".{name}.":
            return pattern
    return None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits (lm_head), or None."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


Places = dict[int, list[tuple[nn.Module, str]]]


def places_of(model: nn.Module) -> Places:
    """id of a module -> where model holds it: (parent, attribute), as often as it is shared."""
    places: Places = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            places[id(child)].append((parent, key))
    return places


def replace_module(
    model: nn.Module, old: nn.Module, new: nn.Module, places: Places | None = None
) -> None:
    """Puts new wherever model holds old, maybe in several places; hooks move, accelerate's too.

    `places` is places_of(model), for a caller that replaces many modules: it stays right for those
    that were not replaced yet.
    """
    for parent, key in (places or places_of(model))[id(old)]:
        setattr(parent, key, new)
        if key in FUSED and isinstance(new, Linear4bit):
            new.fused = key
    move_hooks(old, new)
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves old's forward and backward hooks, and those before them, to new, behind new's own.

    State dict hooks stay: they are about old's keys.
    """
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
        old._is_full_backward_hook = None
    for key in _HOOKS:
        hooks, own = getattr(old, key), getattr(new, key)
        if not hooks:
            continue
        # The very dict where that is possible: it is what the hooks' handles remove them from.
        setattr(old, key, type(hooks)())
        if own.keys() <= hooks.keys():  # none, or copies of them
            setattr(new, key, hooks)
        else:
            own.update(hooks)


def read_by_parent(model: nn.Module) -> set[int]:
    """ids of linear layers whose weight torch's own modules read past the layer's forward, as the
    fast path of nn.TransformerEncoderLayer does."""
    found = set()
    for module in model.modules():
        for kind, keys in (
            (nn.TransformerEncoderLayer, ("linear1", "linear2")),
            (nn.MultiheadAttention, ("out_proj",)),
        ):
            if isinstance(module, kind):
                found |= {id(module._modules.get(key)) for key in keys}
    return found - {id(None)}


def progress(items: list, what: str, enabled: bool) -> Iterator:
    """items behind a tqdm bar, where tqdm is installed and the bar is wanted."""
    if not enabled:
        return iter(items)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=what, unit="layer"))


def check_model(
    op: str,
    model: nn.Module,
    *,
    one_layer: str,
    peft: str,
    layers: tuple[type, ...] = (nn.Linear, nn.Embedding),
) -> None:
    """TypeError unless model is a module that contains layers, none of which is PEFT's.

    Args:
        one_layer, peft: what to do with a single layer, and what is wanted instead of PEFT's.
        layers: classes of a single layer, besides Conv1D.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}, want an nn.Module")
    if isinstance(model, layers) or is_conv1d(model):
        raise TypeError(
            f"{op}: model is a single {type(model).__name__}, want a model that contains layers; "
            f"{one_layer}"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise TypeError(
                f"{op}: {name or 'model'} is PEFT's {type(module).__name__}, want {peft}"
            )


def check_whole(op: str, model: nn.Module, only: str = "") -> None:
    """ValueError if a parameter, of those with `only` in their names, is one process's share of a
    tensor: a DTensor, as FSDP2 and tensor parallelism make them, or one of DeepSpeed's ZeRO-3."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # there are none before it is imported
    for name, parameter in model.named_parameters():
        if only not in name:
            continue
        if dtensor is not None and isinstance(parameter, dtensor.DTensor):
            raise ValueError(
                f"{op}: {name} is a DTensor, of which this process holds a share, want a whole "
                "model: gather the state into one, as docs/sharding.md does"
            )
        if parameter.numel() == 0 and getattr(parameter, "ds_numel", 0):
            raise ValueError(
                f"{op}: {name} is a tensor of DeepSpeed's ZeRO-3, of which this process holds a "
                "share, want it whole: within deepspeed.zero.GatheredParameters, as "
                "docs/sharding.md does"
            )


def is_packed(module: nn.Module) -> bool:
    """Whether the parameters weight... of module are a packed weight of shape `_shape`: a layer of
    ours, or what tensor parallelism made of one."""
    parallel = sys.modules.get("qlora_ext.integrations.tensor_parallel")
    return isinstance(module, _Packed4bit) or (
        parallel is not None and isinstance(module, parallel.ParallelLinear4bit)
    )


def _numel(module: nn.Module) -> int:
    return module._shape.numel() if is_packed(module) else module.weight.numel()


def num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Logical weights of a model: a packed weight counts in_features * out_features.

    Args:
        only_trainable: count parameters with requires_grad, so none that is packed.
        exclude_embeddings: leave the weights of embedding tables out.

    Shared parameters count once.
    """
    count, seen = 0, set()
    for module in model.modules():
        packed = is_packed(module)
        if exclude_embeddings and isinstance(module, nn.Embedding):
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if only_trainable and not parameter.requires_grad:
                continue
            if packed and key.startswith("weight"):
                count += _numel(module) if key == "weight" else 0
            else:
                count += parameter.numel()
    return count


def memory_report(model: nn.Module) -> MemoryReport:
    """Bytes by part: 4-bit weights and statistics, LoRA adapters, embeddings, unquantized layers,
    other parameters (norms, biases) and buffers. Gradients and optimizer states are not the
    model's and are not counted."""
    parts = dict.fromkeys(
        (
            "4-bit weights",
            "4-bit statistics",
            "LoRA adapters",
            "embeddings",
            "unquantized layers",
            "other parameters",
            "buffers",
        ),
        0,
    )
    quantized, seen = 0, set()
    for name, module in model.named_modules():
        packed = is_packed(module)
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for key, tensor in tensors:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if packed and key == "weight":
                part = "4-bit weights"
                quantized += _numel(module)
            elif packed and key in ("weight_absmax", "weight_nested", "weight_mean"):
                part = "4-bit statistics"
            elif "lora_" in f"{name}.{key}":
                part = "LoRA adapters"
            elif key in module._buffers:
                part = "buffers"
            elif isinstance(module, nn.Embedding):
                part = "embeddings"
            elif tensor.ndim > 1:
                part = "unquantized layers"
            else:
                part = "other parameters"
            parts[part] += tensor.nbytes
    return MemoryReport(parts, quantized, num_parameters(model))


# Quantizing ---------------------------------------------------------------------------------------


class _Plan:
    """Which layers of a model are packed, and why the others are not."""

    def __init__(self, model: nn.Module, keep: tuple[str, ...], embeddings: bool):
        self.model = model
        self.keep = keep
        self.embeddings = embeddings
        self.protected = {
            pattern
            for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for pattern in getattr(model, attribute, None) or ()
        }
        head = output_embeddings(model)
        self.head = {id(head)} if head is not None else self._task_head()
        self.read_by_parent = read_by_parent(model)
        self.owners = defaultdict(list)  # id of a parameter -> names of the modules that hold it
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners[id(parameter)].append(name)
        self.names: list[str] = []  # of the modules to pack
        self.skipped: list[LayerReport] = []
        for name, module in model.named_modules():
            self._consider(name, module)

    def _task_head(self) -> set[int]:
        """The layers of a transformers model outside its backbone: a classifier's `score`."""
        prefix = getattr(self.model, "base_model_prefix", "")
        if not prefix or not hasattr(self.model, prefix):
            return set()
        return {
            id(module)
            for name, module in self.model.named_modules()
            if not name.startswith(f"{prefix}.") and isinstance(module, nn.Linear)
        }

    def _consider(self, name: str, module: nn.Module) -> None:
        reason = self._reason(name, module)
        packed = ()
        if reason is None:
            self.names.append(name)
            packed = _weight_names(module)
        rest = [p for key, p in module._parameters.items() if key not in packed]
        # A tied parameter is reported once, where it first occurs.
        rest = [p for p in rest if p is not None and self.owners[id(p)][0] == name]
        if rest:
            self.skipped.append(
                LayerReport(
                    name=name,
                    kind=type(module).__name__,
                    numel=sum(p.numel() for p in rest),
                    nbytes=sum(p.nbytes for p in rest),
                    reason=reason or "bias",
                )
            )

    def _reason(self, name: str, module: nn.Module) -> str | None:
        """Why module is not packed, or None if it is to be."""
        is_table = isinstance(module, nn.Embedding)
        if torch.nn.utils.parametrize.is_parametrized(module):
            return "its weight is parametrized"
        if not is_plain_linear(module) and not is_table and not is_fused_experts(module):
            return self._reason_not_linear(module)
        if id(module) in self.head:
            return "output head"
        if id(module) in self.read_by_parent:
            return "its weight is read by a torch module around it"
        if any(module._parameters.get(key) is None for key in _weight_names(module)):
            return "its weight is not a parameter, but computed by a hook"
        weights = {key: module._parameters[key] for key in _weight_names(module)}
        for weight in weights.values():
            others = [other for other in self.owners[id(weight)] if other != name]
            if others:
                return f"tied to {others[0]}"
        if pattern := matches(name, self.keep):
            return f"modules_to_not_convert={pattern!r}"
        for key in weights:
            if pattern := matches(f"{name}.{key}", self.protected):
                return f"kept in fp32 by {type(self.model).__name__} ({pattern!r})"
        if is_table and not self.embeddings:
            return "embedding (quantize_embeddings=True packs it)"
        if is_table and (type(module) is not nn.Embedding or module.max_norm is not None):
            return "embedding with a forward of its own"
        for weight in weights.values():
            if weight.dtype not in FLOAT_DTYPES:
                return f"its weight is {weight.dtype}"
        return None

    def _reason_not_linear(self, module: nn.Module) -> str:
        if isinstance(module, nn.Linear):
            return "a subclass of nn.Linear with a forward of its own"
        dims = [p.ndim for p in module._parameters.values() if p is not None]
        if dims and max(dims) >= 3 and not isinstance(module, nn.modules.conv._ConvNd):
            return "stacked weights in a layout of its own, not an nn.Linear"
        if dims and max(dims) >= 2:
            return "not an nn.Linear"
        return "norms and biases"


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of module that quantizing packs."""
    if is_fused_experts(module):
        return tuple(key for key, p in module._parameters.items() if p is not None and p.ndim == 3)
    return ("weight",)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: model is a {type(model).__name__}, want an nn.Module")
    if is_plain_linear(model):
        raise TypeError(
            f"quantize_model: model is a single {type(model).__name__}, want a model that contains "
            "layers; Linear4bit.from_linear packs one layer"
        )
    for name, module in model.named_modules():
        if isinstance(module, _Packed4bit):
            raise ValueError(
                f"quantize_model: {name or 'model'} is a {type(module).__name__}, want an "
                "unquantized model; this one is quantized already"
            )
        source = type(module).__module__
        if isinstance(module, _Lora) or source.startswith("peft."):
            raise ValueError(
                f"quantize_model: {name or 'model'} is a {type(module).__name__}, want a model "
                "without adapters; quantize first, then add them"
            )
        if source.startswith("bitsandbytes."):
            raise ValueError(
                f"quantize_model: {name} is a {type(module).__name__} of bitsandbytes, want an "
                "unquantized model"
            )
    devices = {p.device.type for p in model.parameters()}
    if "meta" in devices and len(devices) > 1:
        name = next(name for name, p in model.named_parameters() if p.is_meta)
        raise ValueError(
            f"quantize_model: {name} is on the meta device (offloaded?) and has no values, want "
            "all weights in memory, or the whole model on meta"
        )


def quantize_model(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    modules_to_not_convert: Iterable[str] | None = None,
    quantize_embeddings: bool = False,
    dense_panels: bool | None = None,
    progress_bar: bool = True,
) -> nn.Module:
    """Packs a model's linear layers in 4 bits, in place, one layer after another.

    Each dense weight is released before the next is read, so the peak stays near one layer above
    the result. Left alone, with a reason each in `model.quantization_report`: the output head and
    task heads, tied weights, what the model class protects in fp32, `modules_to_not_convert`,
    embeddings, and everything that is not a linear layer. A warning names what that leaves
    unquantized beyond the usual (a router, say). Experts that transformers stacks in one parameter
    are packed one by one, as Experts4bit.

    Args:
        model: any nn.Module with nn.Linear or transformers' Conv1D layers; one that is wholly on
            the meta device stays there, packed in shape only.
        config: a QuantConfig; None is NF4 with blocks of 64, double-quantized.
        modules_to_not_convert: names, or dotted parts of names, of layers to leave alone.
        quantize_embeddings: pack untied nn.Embedding tables too.
        dense_panels: make the nn.Linear layers that stay dense PanelLinear, which compute in fp32
            panels: True always, False never, None where this CPU has no instructions for the dtype.
        progress_bar: show a tqdm bar.

    Returns:
        model. `print(model.quantization_report)` says what was packed and what was not.

    Raises:
        TypeError: model is not a module, or is a single layer; config is not a QuantConfig.
        ValueError: quantized already; has adapters; partly on the meta device; a name in
            modules_to_not_convert that matches nothing; no layer to pack.
        RuntimeError: a NaN or Inf in a weight, naming the layer and the index. The layers before
            it are packed.
    """
    if config is not None and not isinstance(config, QuantConfig):
        raise TypeError(f"quantize_model: config is a {type(config).__name__}, want a QuantConfig")
    config = config or QuantConfig()
    _check_model(model)
    if isinstance(modules_to_not_convert, str):
        modules_to_not_convert = [modules_to_not_convert]
    keep = tuple(modules_to_not_convert or ())
    for pattern in keep:
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            raise ValueError(
                f"quantize_model: modules_to_not_convert has {pattern!r}, which matches no module, "
                f"want names among {linear_names(model)}"
            )
    plan = _Plan(model, keep, quantize_embeddings)
    if not plan.names:
        reasons = QuantizationReport(tuple(plan.skipped))
        raise ValueError(
            f"quantize_model: {type(model).__name__} has no layer to pack, want at least one "
            f"nn.Linear or Conv1D. {reasons}"
        )
    packed = []
    places = places_of(model)
    for name in progress(plan.names, "quantize", progress_bar):
        old = model.get_submodule(name)
        try:
            if isinstance(old, nn.Embedding):
                new = Embedding4bit.from_embedding(old, config)
            elif is_fused_experts(old):
                new = Experts4bit.from_experts(old, config)
            else:
                new = Linear4bit.from_linear(old, config)
        except RuntimeError as error:
            raise RuntimeError(f"quantize_model: {name}: {error}") from error
        layers = [m for m in new.modules() if isinstance(m, _Packed4bit)]
        packed.append(
            LayerReport(
                name=name,
                kind=type(old).__name__,
                numel=sum(_numel(layer) for layer in layers),
                nbytes=sum(layer.quantized.nbytes for layer in layers),
                reason=None,
            )
        )
        replace_module(model, old, new, places)
        del old, new
    model.quantization_report = QuantizationReport((*packed, *plan.skipped))
    _tell(model.quantization_report)
    _tell_transformers(model, config)
    use_dense_panels(model, dense_panels)
    return model


def use_dense_panels(model: nn.Module, panels: bool | None = None) -> None:
    """Makes a model's plain nn.Linear layers on a CPU PanelLinear, in place.

    Args:
        panels: True: they use panels for bf16 and fp16 always; None: where torch's own product is
            slow on this machine, which each call decides; False changes nothing. Parameters, ties
            and the state dict stay what they are.
    """
    if panels is False:
        return
    for layer in [m for m in model.modules() if type(m) is nn.Linear]:
        if panels or (layer.weight.device.type == "cpu" and layer.weight.is_floating_point()):
            replace_module(model, layer, PanelLinear.from_linear(layer, always=bool(panels)))


def linear_names(model: nn.Module) -> list[str]:
    """The linear layers of a model by pattern, those of a stack as one: layers.*.mlp.up_proj."""
    names = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m))
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


_EXPECTED = ("output head", "tied to", "embedding", "norms and biases", "bias", "modules_to_not")


def _tell(report: QuantizationReport) -> None:
    logger.info("%s", report)
    unexpected = [part for part in report.unquantized if not part.reason.startswith(_EXPECTED)]
    share = sum(part.numel for part in unexpected) / max(report.numel, 1)
    if share < 0.01:  # routers and the like; the report has them
        return
    patterns = {re.sub(r"\b\d+\b", "*", part.name): part.reason for part in unexpected}
    named = "; ".join(f"{name} ({reason})" for name, reason in list(patterns.items())[:8])
    warnings.warn(
        f"quantize_model: {share:.1%} of the weights stay unquantized in layers one might expect "
        f"to be packed: {named}. model.quantization_report has the rest",
        stacklevel=3,
    )


def _tell_transformers(model: nn.Module, config: QuantConfig) -> None:
    """Makes a transformers model save, and so reload, as a quantized one."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    from ..integrations.transformers import QLoraExtConfig, QLoraExtHfQuantizer

    kept = [
        name
        for name, module in model.named_modules()
        if is_plain_linear(module) and not isinstance(module, _Packed4bit)
    ]
    settings = QLoraExtConfig(modules_to_not_convert=kept, **config.to_dict())
    own_config(model)
    model.hf_quantizer = QLoraExtHfQuantizer(settings, pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config


def own_config(model: nn.Module) -> None:
    """Gives a transformers model a config of its own, where other models were made from it too."""
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) in copies:
            module.config = copies[id(config)]
