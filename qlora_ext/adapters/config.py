"""LoraConfig: the settings of LoRA adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from torch import nn

from .. import hosts
from ..checks import FLOAT_MAX, is_number
from ..models.architectures import FAMILIES
from ..models.patterns import is_regex
from ..text import shorten
from .targets import ATTENTION, SWITCHES, peft_targets, target_names, task_type

# key -> (whether a value is valid, what is wanted)
WANTED = {
    "r": (lambda v: type(v) is int and v >= 1, "an integer of 1 or more"),
    "lora_alpha": (lambda v: is_number(v) and 0 < v <= FLOAT_MAX, "a positive number"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a probability in [0, 1)"),
    **dict.fromkeys(("use_rslora", *SWITCHES), (lambda v: isinstance(v, bool), "True or False")),
}
WANTED_IN_FILES = {**WANTED, "fan_in_fan_out": WANTED["use_rslora"]}


def check_value(op: str, key: str, value, shown: str | None = None) -> None:
    """Raises ValueError unless value is valid for key. The error calls the key `shown` if given."""
    is_good, want = WANTED_IN_FILES[key]
    if not is_good(value):
        raise ValueError(f"{op} {shown or key} is {shorten(value)}, want {want}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and its rank: W' = W + (lora_alpha / r) B A.

    Args:
        r: rank, 1 or more. A rank above a weight's smaller side works, as in PEFT, but has no
            benefit.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout on the bypass's input, a probability in [0, 1).
        bias: only "none", because biases are not trained.
        query, key, value, projection, mlp, head: switches for the layers: the attention's inputs,
            its output, the feed-forward layers, lm_head. A layer that fuses query, key and value
            needs all three switches, since its adapter changes all three.
        target_modules: used instead of the switches: ends of dotted names, a regular expression
            for whole names (a str), or "all-linear" (every linear layer except the head).
        use_rslora: scaling is lora_alpha / sqrt(r) (arXiv 2312.03732).
        target_parameters: ends of the names of other weights to adapt, as in PEFT: for the experts
            of a mixture, "experts.gate_up_proj" and "experts.down_proj". The switch mlp adapts them
            too. lora_dropout does not act on experts, since PEFT's files cannot store that.

    Raises:
        ValueError: a value is out of range, or no switch is on.
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
    target_parameters: tuple[str, ...] | None = None

    def __post_init__(self):
        for key in WANTED:
            check_value("LoraConfig:", key, getattr(self, key))
        if self.bias != "none":
            raise ValueError(
                f'LoraConfig: bias is {self.bias!r}, want "none": packed layers do not train biases'
            )
        if isinstance(self.target_modules, Iterable) and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.target_parameters, str):
            raise ValueError(
                f"LoraConfig: target_parameters is {shorten(self.target_parameters)}, want a list "
                "of names"
            )
        if self.target_parameters is not None:
            object.__setattr__(self, "target_parameters", tuple(self.target_parameters))
            check_targets(self.target_parameters, "target_parameters")
        if self.target_modules is not None and not (self.target_modules or self.target_parameters):
            raise ValueError("LoraConfig: target_modules is empty, want names of layers, or None")
        check_targets(self.target_modules)
        if self.target_modules is None and not self.switches and not self.target_parameters:
            raise ValueError(
                "LoraConfig: every switch is off, want at least one of query, key, value, "
                "projection, mlp, head"
            )

    @property
    def switches(self) -> tuple[str, ...]:
        """The switches that are on."""
        return tuple(name for name in SWITCHES if getattr(self, name))

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_peft(self, model: nn.Module | None = None):
        """The same settings as a peft.LoraConfig (needs peft).

        Args:
            model: the model it is for; PEFT then adapts the layers that add_lora would adapt.
                Without a model, the switches become the layer names of every architecture in
                FAMILIES, and PEFT adapts those it finds. Layers that fuse query, key and value are
                included if all three switches are on.

        The stacks of a mixture's experts become target_parameters, and so do other linear layers
        that PEFT would mistake for parts of experts (shared_experts.up_proj). With
        target_parameters PEFT has no dropout on any layer, so lora_dropout is then 0.

        Raises:
            ValueError: as for add_lora, if a model is given.
        """
        parameters = list(self.target_parameters or ())
        if model is not None:
            targets, parameters = peft_targets(model, target_names(model, self))
        elif self.target_modules is not None:
            targets = self.target_modules
            targets = targets if isinstance(targets, str) else list(targets)
        else:
            targets = self._names_anywhere()
        return hosts.peft_lora_config(
            r=self.r,
            lora_alpha=self.lora_alpha,
            # PEFT refuses a dropout with target_parameters.
            lora_dropout=0.0 if parameters else self.lora_dropout,
            bias=self.bias,
            target_modules=targets,
            use_rslora=self.use_rslora,
            task_type=None if model is None else task_type(model),
            **({"target_parameters": parameters} if parameters else {}),
        )

    def _names_anywhere(self) -> list[str]:
        names: dict[str, None] = {}
        for family in FAMILIES.values():
            for switch in self.switches:
                if switch != "head":
                    names.update(dict.fromkeys(getattr(family, switch)))
            if family.fused and set(ATTENTION) <= set(self.switches):
                names[family.fused] = None
        if self.head:
            names.update({"lm_head": None, "embed_out": None})
        return list(names)


def check_targets(targets, called: str = "target_modules") -> None:
    """Raises ValueError unless targets is None, a regular expression, or names."""
    if isinstance(targets, str) and not is_regex(targets):
        raise ValueError(
            f"LoraConfig: target_modules is {shorten(targets)}, want a regular expression; names "
            "of layers go in a list"
        )
    names = [targets] if targets is None or isinstance(targets, str) else targets
    for name in names if isinstance(names, (list, tuple)) else [names]:
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(f"LoraConfig: {called} holds {shorten(name)}, want names (str)")
