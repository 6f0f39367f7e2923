"""Walks a model: finds and replaces its layers, and refuses models that cannot be worked on."""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from ..nn.linear import Linear4bit, is_conv1d
from ..nn.offload import move_hook
from ..nn.panel import PanelLinear
from .architectures import FUSED


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits (lm_head), or None."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


Places = dict[int, list[tuple[nn.Module, str]]]


def places_of(model: nn.Module) -> Places:
    """id of a module -> the (parent, attribute) pairs that hold it, several if it is shared."""
    places: Places = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            places[id(child)].append((parent, key))
    return places


def replace_module(
    model: nn.Module, old: nn.Module, new: nn.Module, places: Places | None = None
) -> None:
    """Puts new in every place where model holds old. Hooks move to new, accelerate's too.

    A caller that replaces many modules can pass places_of(model) as `places`. It stays right for
    the modules that have not been replaced yet.
    """
    for parent, key in (places or places_of(model))[id(old)]:
        setattr(parent, key, new)
        if key in FUSED and isinstance(new, Linear4bit):
            new.fused = key
    move_hooks(old, new)
    move_hook(old, new)


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
    """Moves old's forward and backward hooks and pre-hooks to new, after new's own.

    State dict hooks stay, because they are about old's keys.
    """
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
        old._is_full_backward_hook = None
    for key in _HOOKS:
        hooks, own = getattr(old, key), getattr(new, key)
        if not hooks:
            continue
        # Move the dict itself if possible, because the hooks' handles remove them from that dict.
        setattr(old, key, type(hooks)())
        if own.keys() <= hooks.keys():  # new has no hooks, or copies of old's
            setattr(new, key, hooks)
        else:
            own.update(hooks)


def progress(items: list, what: str, enabled: bool) -> Iterator:
    """An iterator over items, with a tqdm bar if tqdm is installed and the bar is wanted."""
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
    """Raises TypeError unless model is a module that contains layers, none of them PEFT's.

    Args:
        one_layer: for the error, what to do with a single layer.
        peft: for the error, what is wanted instead of PEFT's layers.
        layers: classes that count as a single layer, besides Conv1D.
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
    """Raises ValueError if a parameter with `only` in its name is one process's share of a tensor:
    a DTensor, which FSDP2 and tensor parallelism make, or a tensor of DeepSpeed's ZeRO-3."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # without this import, no DTensor exists
    for name, parameter in model.named_parameters():
        if only not in name:
            continue
        if dtensor is not None and isinstance(parameter, dtensor.DTensor):
            raise ValueError(
                f"{op}: {name} is a DTensor, so this process holds only a part of it, want a whole "
                "model: gather its state as docs/sharding.md shows"
            )
        if parameter.numel() == 0 and getattr(parameter, "ds_numel", 0):
            raise ValueError(
                f"{op}: {name} is a tensor of DeepSpeed's ZeRO-3, so this process holds only a "
                "part of it, want it whole: call this within deepspeed.zero.GatheredParameters, as "
                "docs/sharding.md shows"
            )


def is_packed(module: nn.Module) -> bool:
    """Whether module is packed: its parameters weight... hold a weight of logical shape `_shape`.
    It is one of our layers, or one that tensor parallelism has split."""
    return getattr(type(module), "holds_packed_weight", False)


def _numel(module: nn.Module) -> int:
    return module._shape.numel() if is_packed(module) else module.weight.numel()


def linear_names(model: nn.Module) -> list[str]:
    """Names of a model's linear layers, with one pattern for a stack: layers.*.mlp.up_proj."""
    names = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m))
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def use_dense_panels(
    model: nn.Module, panels: bool | None = None, leave: Iterable[nn.Module] = ()
) -> None:
    """Turns a model's plain nn.Linear layers on a CPU into PanelLinear, in place. Parameters, ties
    and the state dict stay the same.

    Args:
        panels: True: always use panels for bf16 and fp16, whatever the layer's device is now. None:
            use them if torch's own product is slow on this machine; each call decides. False:
            change nothing.
        leave: layers to leave as they are.
    """
    if panels is False:
        return
    left = set(leave)
    for layer in [m for m in model.modules() if type(m) is nn.Linear and m not in left]:
        if panels or (layer.weight.device.type == "cpu" and layer.weight.is_floating_point()):
            replace_module(model, layer, PanelLinear.from_linear(layer, always=bool(panels)))


def stacked_names(names: Iterable[str]) -> list[str]:
    """Names of layers; those of a stack are joined to one, with the numbers as in a shell:
    layers.{0..3,7}.mlp.up_proj. Other names stay as they are."""
    stacks: dict[str, list[list[str]]] = defaultdict(list)
    for name in names:
        stacks[re.sub(r"\b\d+\b", "*", name)].append(re.findall(r"\b\d+\b", name))
    texts = []
    for pattern, numbers in stacks.items():
        places = [sorted(set(map(int, place))) for place in zip(*numbers)]
        whole = math.prod(map(len, places)) == len(numbers)
        parts = pattern.split("*")
        for i, place in enumerate(places):
            some = len(place) > 1
            parts[i] += "*" if some and not whole else _ranges(place)
        texts.append("".join(parts) + ("" if whole else f" x{len(numbers)}"))
    return texts


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as 3, or {0..3,7}; of many ranges only the first."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    if len(numbers) == 1:
        return str(numbers[0])
    texts = [f"{a}" if a == b else f"{a}{',' if b == a + 1 else '..'}{b}" for a, b in ranges]
    return "{" + ",".join(texts[:8] + ["..."] * (len(texts) > 8)) + "}"
