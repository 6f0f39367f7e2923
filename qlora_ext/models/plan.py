"""Decides which layers of a model are packed, and says why the others are not.

quantize_model, `from_pretrained` (for unquantized checkpoints and packed ones, ours and
bitsandbytes'), `qlora-ext quantize`, `merge` and `estimate` all use this decision.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..nn.experts import is_fused_experts, weight_names
from ..nn.linear import is_plain_linear
from ..nn.packed import _Packed4bit
from ..tensor.config import FLOAT_DTYPES
from .heads import heads_of
from .names import Names, literal, matches
from .reads import read_past_forward
from .report import LayerReport, QuantizationReport
from .walk import _numel, stacked_names

logger = logging.getLogger("qlora_ext")

ABSENT = "not in the checkpoint, so made anew"

# Reasons to leave a layer alone because it was made to be trained. Packing would freeze it.
ADAPTER = "an adapter of another library"
TRAINS = "trainable, while other weights of the model are frozen"
# What other libraries call the two factors of LoRA if these are layers (torchtune, PEFT, kohya).
_FACTORS = frozenset(("lora_a", "lora_b", "lora_down", "lora_up"))


def is_factor(name: str) -> bool:
    """Whether a module or parameter is a factor of LoRA, judged by its name. True for ours too."""
    return not _FACTORS.isdisjoint(name.lower().split("."))


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, under the names that the layers have in the model."""

    packed: Mapping[str, int]  # layer -> bytes of its packed weight
    dense: frozenset[str]  # layers whose weight is not packed
    same_class: bool  # whether the model's class wrote it: then nothing may be absent
    names: Mapping[str, str]  # layer -> its name in the checkpoint

    def has(self, name: str) -> bool:
        """Whether the checkpoint has the layer's weight, packed or not."""
        return name in self.packed or name in self.dense

    def lacks_one_of(self, name: str) -> bool:
        """Whether the absence of a layer means damage: the model's class wrote the checkpoint, or
        the same layer of other blocks of the stack is there."""
        if self.same_class:
            return True
        pattern = re.compile(re.sub(r"\\?\b\d+\b", r"\\d+", re.escape(name)))
        return any(pattern.fullmatch(other) for other in (*self.packed, *self.dense))


class Plan:
    """Which layers of a model are packed, and why the others are not.

    Args:
        model: the unpacked model, with values or on the meta device.
        keep: names of layers to leave alone (see names.py).
        embeddings: whether untied embedding tables are packed.
        stored: the checkpoint that the model will be read from, if its tensors are known.
        packed_checkpoint: whether that checkpoint is packed already; if so, it decides.
        other_names: mappings of layer -> its name in files of its class, besides those in `stored`.
        keep_trained: whether layers that train stay dense if other weights are frozen.

    Attributes:
        names: the modules to pack, in the model's order.
        trained: the modules that stay as they are because they are made to be trained.
        skipped: a LayerReport of every other weight, with its reason.

    Raises:
        ValueError: the checkpoint lacks layers that it should have.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: Iterable[str] = (),
        *,
        embeddings: bool = False,
        stored: Stored | None = None,
        packed_checkpoint: bool = False,
        other_names: Iterable[Mapping[str, str]] = (),
        keep_trained: bool = False,
    ):
        self.model = model
        self.keep = tuple(keep)
        self.embeddings = embeddings
        self.stored = stored
        self.packed_checkpoint = packed_checkpoint
        self.spelled = Names(model, stored.names if stored else {}, *other_names)
        self.protected = {
            pattern
            for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for pattern in getattr(model, attribute, None) or ()
        }
        self.heads = heads_of(model)
        self.read_past = read_past_forward(model)
        self.owners = defaultdict(list)  # id of a parameter -> names of the modules that hold it
        on_meta = False
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners[id(parameter)].append(name)
                    on_meta |= parameter.is_meta
        self.tied: dict[str, str] = {}  # parameter -> the one it will be tied to
        if on_meta:  # transformers ties weights only after it has read them
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            for one, other in tied.items():
                self.tied.setdefault(one, other)
                self.tied.setdefault(other, one)
        self.keep_trained = keep_trained and _some_are_frozen(model)
        self.trained: list[str] = []
        self.names: list[str] = []
        self.kinds: dict[str, str] = {}  # module to pack -> its class's name
        self.skipped: list[LayerReport] = []
        self.lacking: list[str] = []
        self.other_dtypes: set[torch.dtype] = set()  # dtypes of weights that cannot be packed
        for name, module in model.named_modules():
            self._consider(name, module)
        if self.lacking:
            raise ValueError(
                f"{type(model).__name__}: the checkpoint lacks "
                f"{', '.join(f'{name}.weight' for name in self.lacking[:8])}"
                f"{f' and {len(self.lacking) - 8} more' if len(self.lacking) > 8 else ''}, want "
                "every layer of the model; to train a layer from scratch, name it in "
                "modules_to_not_convert when you pack the unquantized model"
            )

    @property
    def kept(self) -> list[str]:
        """Full names of the linear layers that stay dense. A saved config records them."""
        packed = set(self.names)
        return [
            literal(name)
            for name, module in self.model.named_modules()
            if is_plain_linear(module) and name not in packed
        ]

    def bad_dtypes(self) -> str:
        """A message about weights whose dtype cannot be packed; empty if there are none."""
        if not self.other_dtypes:
            return ""
        dtypes = ", ".join(sorted(map(str, self.other_dtypes)))
        return (
            f"The weights of linear layers are {dtypes}, want float32, float16 or bfloat16: cast "
            "the model, or load it in one of these"
        )

    def unmatched(self, names: Iterable[str] | None = None) -> list[str]:
        """Those of `names` (None: of `keep`) that match no module. The usual name of the output
        head is left out, because the head stays dense whatever its name is."""
        unmatched = self.spelled.unmatched(self.keep if names is None else names)
        return [name for name in unmatched if name not in ("lm_head", "lm_head.weight")]

    def report(self, packed: Iterable[LayerReport] = ()) -> QuantizationReport:
        """The report of the model, given the layers that were packed."""
        return QuantizationReport((*packed, *self.skipped))

    def packed_layer(self, name: str, module: nn.Module) -> LayerReport:
        """The LayerReport of `module`, the packed form of the layer `name`."""
        layers = [part for part in module.modules() if isinstance(part, _Packed4bit)]
        return LayerReport(
            name=name,
            kind=self.kinds[name],
            numel=sum(_numel(layer) for layer in layers),
            nbytes=sum(layer.quantized.nbytes for layer in layers),
            reason=None,
        )

    def _consider(self, name: str, module: nn.Module) -> None:
        reason = self._reason(name, module)
        packed = ()
        if reason is None:
            self.names.append(name)
            self.kinds[name] = type(module).__name__
            packed = weight_names(module)
        rest = [p for key, p in module._parameters.items() if key not in packed]
        # A tied parameter is reported once, for the module where it first occurs.
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
        """Why module is not packed; None if it is packed."""
        if torch.nn.utils.parametrize.is_parametrized(module):
            return "its weight is parametrized"
        is_table = isinstance(module, nn.Embedding)
        if not is_plain_linear(module) and not is_table and not is_fused_experts(module):
            return _reason_not_linear(module)
        if self.packed_checkpoint and self.stored is not None:
            return self._reason_in_packed_checkpoint(name, module)
        if reason := self._reason_of_model(name, module):
            return reason
        if is_table and not self.embeddings:
            return "embedding (quantize_embeddings=True packs it)"
        if is_table and (type(module) is not nn.Embedding or module.max_norm is not None):
            return "embedding with a forward of its own"
        if reason := self._reason_trained(name, module):
            return reason
        if reason := self._reason_read(module):
            return reason
        for key in weight_names(module):
            if (dtype := module._parameters[key].dtype) not in FLOAT_DTYPES:
                self.other_dtypes.add(dtype)
                return f"its weight is {dtype}"
        if reason := _reason_of_shape(module):
            return reason
        if self.stored is not None and is_plain_linear(module) and not self.stored.has(name):
            return self._reason_absent(name)
        return None

    def _reason_of_model(self, name: str, module: nn.Module) -> str | None:
        if id(module) in self.heads:
            return self.heads[id(module)]
        if any(module._parameters.get(key) is None for key in weight_names(module)):
            return "its weight is not a parameter, but computed by a hook"
        for key in weight_names(module):
            others = [o for o in self.owners[id(module._parameters[key])] if o != name]
            if others:
                return f"tied to {others[0]}"
            if other := self.tied.get(f"{name}.{key}"):
                return f"tied to {other.removesuffix('.weight')}"
        if pattern := self.spelled.matches(name, self.keep):
            return f"modules_to_not_convert={pattern!r}"
        for key in weight_names(module):
            if pattern := matches(f"{name}.{key}", self.protected):
                return f"kept in fp32 by {type(self.model).__name__} ({pattern!r})"
        return None

    def _reason_trained(self, name: str, module: nn.Module) -> str | None:
        trains = any(module._parameters[key].requires_grad for key in weight_names(module))
        reason = None
        if is_factor(name):
            reason = ADAPTER
        elif trains and self.keep_trained:
            reason = TRAINS
        if reason is not None:
            self.trained.append(name)
        return reason

    def _reason_read(self, module: nn.Module) -> str | None:
        if reader := self.read_past.get(id(module)):
            return f"its weight is read by {reader}, which bypasses the layer's forward"
        return None

    def _reason_in_packed_checkpoint(self, name: str, module: nn.Module) -> str | None:
        """As _reason, decided by what the checkpoint holds. The model decides for layers that the
        checkpoint lacks."""
        if name in self.stored.packed:
            want = sum(-(-module._parameters[key].numel() // 2) for key in weight_names(module))
            if is_plain_linear(module) and self.stored.packed[name] != want:
                # transformers refuses it, or initialises it again with ignore_mismatched_sizes.
                return "packed in another size in the checkpoint"
            return None
        if not is_plain_linear(module):
            return "not packed in the checkpoint"
        reason = self._reason_of_model(name, module) or self._reason_read(module)
        if reason is None and name in self.stored.dense:
            return "dense in the checkpoint"
        return reason or self._reason_absent(name)

    def _reason_absent(self, name: str) -> str:
        if self.stored.lacks_one_of(name):
            self.lacking.append(name)
        return ABSENT


def _some_are_frozen(model: nn.Module) -> bool:
    """Whether a layer's weight requires no gradients. Tables do not count: some classes freeze
    their tables of positions."""
    return any(
        not parameter.requires_grad and parameter.ndim > 1 and parameter.is_floating_point()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for key, parameter in module._parameters.items()
        if parameter is not None and (key == "weight" or is_fused_experts(module))
    )


def _reason_of_shape(module: nn.Module) -> str | None:
    """Why the shapes of a module of fused experts rule out packed stacks; None if they do not."""
    if not is_fused_experts(module):
        return None
    for key in weight_names(module):
        shape = list(module._parameters[key].shape)
        if 0 in shape:
            return f"its {key} {shape} has no weights"
        if shape[1 if module.is_transposed else 2] % 2:
            return f"its {key} {shape} has an odd number of columns, and a packed stack needs even"
    return None


def _reason_not_linear(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "a subclass of nn.Linear with a forward of its own"
    dims = [p.ndim for p in module._parameters.values() if p is not None]
    if dims and max(dims) >= 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return "stacked weights in a layout of its own, not an nn.Linear"
    if dims and max(dims) >= 2:
        return "not an nn.Linear"
    return "norms and biases"


# Messages -----------------------------------------------------------------------------------------

_EXPECTED = (
    "output head",
    "task head",
    "tied to",
    "embedding",
    "norms and biases",
    "bias",
    "modules_to_not",
    ABSENT,
    ADAPTER,
    TRAINS,
)


def log_report(
    op: str, report: QuantizationReport, least: float = 0.01, stacklevel: int = 3
) -> None:
    """Logs a report, and warns if layers stay dense that one would expect to be packed.

    Args:
        op: the name of the function that reports.
        least: below this share of the model's weights (routers and the like) it does not warn.
            It always names the layers that stay because they are made to be trained.
        stacklevel: the warning's, counted from this function.
    """
    logger.info("%s", report)
    if trained := [part for part in report.unquantized if part.reason in (ADAPTER, TRAINS)]:
        advice = ""
        if stay := sum(part.reason == TRAINS for part in trained):
            if stay > (packed := len(report.quantized)):
                advice = f"; layers left alone: {stay}, packed: {packed}"
            advice += (
                "; to pack those that are not adapters, freeze them first (requires_grad_(False))"
            )
        warnings.warn(
            f"{op}: these layers stay as they are, because packing would freeze them: "
            f"{_named(trained)}{advice}",
            stacklevel=stacklevel,
        )
    unexpected = [part for part in report.unquantized if not part.reason.startswith(_EXPECTED)]
    share = sum(part.numel for part in unexpected) / max(report.numel, 1)
    if not unexpected or share < least:
        return
    warnings.warn(
        f"{op}: {share:.1%} of the weights stay unquantized in layers that you might expect to be "
        f"packed: {_named(unexpected)}. print(model.quantization_report) shows all layers",
        stacklevel=stacklevel,
    )


def _named(layers: list[LayerReport]) -> str:
    """The first names and reasons; the layers of a stack share one."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for part in layers:
        reasons[part.reason].append(part.name or "the model itself")
    texts = [f"{name} ({reason})" for reason in reasons for name in stacked_names(reasons[reason])]
    more = [f"and {len(texts) - 8} more"] if len(texts) > 8 else []
    return "; ".join(texts[:8] + more)


def warn_unmatched(
    op: str, model: nn.Module, names: list[str], argument: str = "modules_to_not_convert"
) -> None:
    """Warns about names to leave alone that match no module."""
    if names:
        warnings.warn(
            f"{op}: {argument} has {', '.join(map(repr, names))}, which matches no module of "
            f"{type(model).__name__} and has no effect; model.named_modules() has the names",
            stacklevel=3,
        )
