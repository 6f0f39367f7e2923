"""Merging adapters back into 4-bit weights, without losing what was learnt.

An adapter moves a weight by far less than the distance of two 4-bit levels, so requantizing the sum
gives nearly the old codes back, and the fine-tune is gone. Two routes keep it:

    base         the unquantized model is at hand: quantize(W + s B A), whose rounding errors are
                 as independent of the fine-tune as those of W were
    calibration  the 4-bit model and some text are: codes and scales descend from where they are
                 to where the layer's outputs are nearest to the adapted ones (fit_4bit.py)

With both, the descent goes to W + s B A. Where there is no text, the model writes some
(own_text.py).
docs/merging.md has what each keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .checks import (
    CheckpointError,
    check_finite,
    check_parameters,
    first_line,
    is_integer,
    is_number,
    not_readable,
    out_of_memory,
    short,
)
from .experts import Experts4bit, _up_name
from .files import SafetensorsFiles
from .fit_4bit import fit_4bit, hessian_error
from .merge import IN_MEMORY, _tied_head, check_weight, dense_layer, merge_and_unload
from .models import check_whole, progress, replace_module
from .nn import FLOAT_DTYPES, Embedding4bit, Linear4bit, LoraLinear, LoraLinear4bit
from .offload import check_in_memory
from .quantized_tensor import QuantizedTensor, dequantize_4bit, merge_lora_4bit, quantize_with

__all__ = ["merge_into_4bit"]

# Measured on SmolLM2-135M (docs/merging.md).
_LOSS = "keeps 5 to 10% of a short fine-tune's gain"
_FEW_TOKENS = 512


def merge_into_4bit(
    model: nn.Module,
    *,
    base: nn.Module | Mapping[str, Tensor] | str | os.PathLike | None = None,
    calibration: Iterable | None = None,
    dtype: torch.dtype = torch.float16,
    damping: float = 0.01,
    hessian_bytes: int = 2**30,
    progress_bar: bool = True,
) -> nn.Module:
    """Merges a model's adapters into its 4-bit weights, in place: Linear4bit layers at the end.

    With `base`, each adapted layer becomes quantize(W + s B A). With `calibration`, each becomes
    the packed weight whose outputs on the calibration text are nearest to the adapted layer's; with
    both, nearest to those of W + s B A. With neither, a warning says what requantizing would lose,
    and the model is merged into 16 bits instead, as merge_and_unload does.

    Layers without adapter keep their bytes. An adapted dense layer (a head) stays dense and is
    untied if it was tied. The format of each layer (block size, codebook, double quantization) is
    kept, and the model saves and loads as a quantized one.

    Args:
        model: one that went through add_lora or load_adapter, or a PeftModel with LoRA on our
            layers, whose active adapters are merged.
        base: the unquantized model that was packed: a module, a state dict, or a folder (or file)
            of safetensors, read layer by layer. A folder's tensors are renamed and stacked as
            transformers does when it loads them.
        calibration: batches of text like that which the model is for; 5,000 tokens do. Where there
            is none, write_calibration makes some. A batch is an int64 (or int32) tensor of token
            ids [batch, tokens], or the keyword arguments of the model's forward (what a tokenizer
            returns); padding is left out by its attention_mask.
        dtype: of the 16-bit model, where neither is given.
        damping: see fit_4bit; 0 or more.
        hessian_bytes: memory for the input statistics of layers at a time, [K, K] fp32 for each
            input width K; 1 or more, and one layer's are always held. Less memory takes more
            passes over the calibration text; each pass sees the layers before it as they were
            merged.
        progress_bar: show a tqdm bar.

    Returns:
        model; of a PeftModel, the model that it wrapped.

    Raises:
        TypeError: model is not a module, dtype is not a float dtype, progress_bar is not a bool,
            or base, calibration or a batch is of another kind.
        ValueError: no adapters (merged already?); a kind of PEFT adapter other than plain LoRA; a
            sharded model, whose parameters are DTensors; a calibration without tokens, with ids
            that are not integers of the model's vocabulary, or with a batch that the model's
            forward cannot take, by its number; a damping
            below 0 or not finite; hessian_bytes that is not an int of at least 1; a base that is
            not there, is not safetensors, lacks a layer, has another shape, or is not what was
            packed.
        OverflowError: a weight of base with a NaN or an infinity, a sum W + s B A that is not
            finite, or one beyond the dtype of a dense layer, naming the layer.

    KeyboardInterrupt or an error midway leaves the model as it was, except where a PeftModel is
    given neither base nor calibration: that merge is PEFT's own.

    Warns:
        UserWarning: neither base nor calibration, or less than 512 tokens of it.
    """
    if not is_number(damping) or not 0 <= damping < math.inf:
        raise ValueError(
            f"merge_into_4bit: damping is {short(damping)}, want a finite number of at least 0"
        )
    if not isinstance(hessian_bytes, bool):
        with contextlib.suppress(TypeError):
            hessian_bytes = operator.index(hessian_bytes)  # NumPy's integers
    if not is_integer(hessian_bytes) or hessian_bytes < 1:
        raise ValueError(
            f"merge_into_4bit: hessian_bytes is {short(hessian_bytes)}, want an int of at least 1: "
            "bytes of memory, 2**30 by default"
        )
    if not isinstance(progress_bar, bool):
        raise TypeError(f"merge_into_4bit: progress_bar is {short(progress_bar)}, want a bool")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"merge_into_4bit: dtype is {short(dtype)}, want torch.float16, torch.bfloat16 or "
            "torch.float32"
        )
    layers, peft_model = _adapted_layers(model)
    if base is None and calibration is None:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"merge_into_4bit: base and calibration are None, and requantizing without them {_LOSS}"
            f"; merging into {name} instead. Give the unquantized model as base, or some text as "
            "calibration: write_calibration makes some",
            stacklevel=2,
        )
        if peft_model:
            merged = model.merge_and_unload()
            check_parameters("merge_into_4bit", merged, dtype)
            return merged.to(dtype)
        return merge_and_unload(model, dtype, progress_bar=progress_bar)
    source = None if base is None else UnquantizedWeights(base, model)
    batches = None if calibration is None else _batches(calibration, model)
    if source is not None:
        for layer in layers:
            source.check(layer)
    swaps = []  # (new, old), to take back
    modes = [(module, module.training) for module in model.modules()]

    def swap(layer: _Adapted, q: QuantizedTensor) -> None:
        """Puts a merged layer in an adapted one's place."""
        new = _with_weight(layer.packed, q)
        replace_module(model, layer.module, new)
        swaps.append((new, layer.module))

    def target_of(layer: _Adapted) -> Tensor:
        target = layer.target() if source is None else source.target(layer)
        check_finite(f"merge_into_4bit: {layer.name}.weight", target, torch.float32)
        return target

    try:
        with torch.no_grad():
            if batches is None:
                for layer in progress(layers, "merge", progress_bar):
                    swap(layer, quantize_with(target_of(layer), layer.packed.config))
            else:
                model.eval()
                inputs = _Inputs(model, layers, batches, hessian_bytes)
                for group, hessian in progress(inputs, "merge", progress_bar):
                    targets = [target_of(layer) for layer in group]
                    fitted = fit_4bit(
                        [_start(*pair, hessian) for pair in zip(group, targets, strict=True)],
                        targets,
                        hessian,
                        changes=[layer.change() for layer in group],
                        damping=damping,
                        fit_scales=group[0].packed.config.normalization != "none",
                    )
                    for layer, q in zip(group, fitted, strict=True):
                        swap(layer, q)
            return _unload(model, peft_model, swaps)
    except BaseException:
        for new, old in reversed(swaps):
            replace_module(model, new, old)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for new, old in swaps:
            new.training = old.training


def _start(layer: _Adapted, target: Tensor, hessian: Tensor) -> QuantizedTensor:
    """Where the descent starts: at the codes there are, which a short fine-tune hardly leaves, or
    at the requantized target, whichever is nearer to it."""
    starts = [layer.packed.quantized, quantize_with(target, layer.packed.config)]
    dense = (dequantize_4bit(q, torch.float32) for q in starts)
    errors = [hessian_error(weight, target, hessian) for weight in dense]
    return starts[errors[1] < errors[0]]


# What is adapted ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Adapted:
    """A packed layer with an adapter, ours or PEFT's."""

    name: str
    module: nn.Module  # what the model calls
    packed: Linear4bit
    lora: tuple[Tensor, Tensor, float]  # A [r, K], B [N, r], scaling

    def target(self) -> Tensor:
        """dequantize(W) + s B A, fp32 [N, K]."""
        A, B, scaling = self.lora
        return merge_lora_4bit(self.packed.quantized, A, B, scaling, torch.float32)

    def change(self) -> Tensor:
        """s B A, fp32 [N, K]."""
        A, B, scaling = self.lora
        return (B @ A).mul_(scaling)


def _adapted_layers(model: nn.Module) -> tuple[list[_Adapted], bool]:
    """The packed layers with adapters, and whether the model is PEFT's."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"merge_into_4bit: model is a {type(model).__name__}, want an nn.Module")
    check_whole("merge_into_4bit", model)
    check_in_memory("merge_into_4bit", model, IN_MEMORY)
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    peft_model = tuners is not None and any(
        isinstance(m, tuners.BaseTunerLayer) for m in model.modules()
    )
    layers = _peft_layers(model) if peft_model else _own_layers(model)
    if layers:
        return layers, peft_model
    modules = list(model.modules())
    if any(isinstance(m, LoraLinear) for m in modules):
        why = "its only adapters are on unquantized layers: merge_and_unload merges those"
    elif any(isinstance(m, Linear4bit) for m in modules):
        why = "it was merged already, or none were added"
    else:
        why = "it has no 4-bit layers either"
    raise ValueError(
        f"merge_into_4bit: model has no adapters on 4-bit layers ({why}), want one that add_lora, "
        "load_adapter or PEFT gave adapters to"
    )


def _own_layers(model: nn.Module) -> list[_Adapted]:
    return [
        _Adapted(
            name,
            module,
            module,
            (module.lora_A.detach().float(), module.lora_B.detach().float(), module.scaling),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear4bit)
    ]


def _peft_layers(model: nn.Module) -> list[_Adapted]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .integrations.peft import LoraLinear4bit as PeftLora4bit

    if not hasattr(model, "unload") or not hasattr(model, "get_base_model"):
        raise ValueError(
            f"merge_into_4bit: model is a {type(model).__name__} with PEFT's layers inside, want "
            "the PeftModel itself"
        )
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise ValueError(
                f"merge_into_4bit: {name} has adapters merged ({module.merged_adapters}), want "
                "them unmerged; model.unmerge_adapter() does it"
            )
        if isinstance(module.get_base_layer(), Embedding4bit) and any(
            name in module.r for name in module.active_adapters
        ):
            raise ValueError(
                f"merge_into_4bit: {name} is a packed embedding with an adapter, want adapters on "
                "linear layers only; model.merge_and_unload() merges it into 16 bits"
            )
        if not isinstance(module.get_base_layer(), Linear4bit):
            continue
        active = [a for a in module.active_adapters if a in getattr(module, "lora_A", {})]
        plain = isinstance(module, PeftLora4bit) and not any(
            a in module.lora_variant or module.lora_bias[a] for a in active
        )
        if not plain:
            raise ValueError(
                f"merge_into_4bit: {name} is PEFT's {type(module).__name__} with more than plain "
                "LoRA, want plain LoRA; model.merge_and_unload() merges it into 16 bits"
            )
        if active:
            A, B, scaling = module._stacked(active)
            # A number, also where PEFT's hot-swapping made it a tensor.
            lora = (A.detach().float(), B.detach().float(), float(scaling))
            layers.append(_Adapted(name, module, module.get_base_layer(), lora))
    return layers


def _with_weight(packed: Linear4bit, q: QuantizedTensor) -> Linear4bit:
    """A Linear4bit as `packed` is, without adapter and with another weight; the bias is shared."""
    new = Linear4bit.__new__(Linear4bit)
    nn.Module.__init__(new)
    new.in_features, new.out_features = packed.in_features, packed.out_features
    new._init_packed(packed.out_features, packed.in_features, packed.config, packed.dtype)
    new._set_quantized(q)
    new.register_parameter("bias", packed._parameters["bias"])
    new.from_conv1d = packed.from_conv1d
    return new.train(packed.training)


def _unload(model: nn.Module, peft_model: bool, swaps: list) -> nn.Module:
    """What is left once the packed layers are merged: dense ones, and PEFT's wrapping."""
    if peft_model:
        return _unload_peft(model)
    tied = _tied_head(model)
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]:
        check_weight(f"merge_into_4bit: {name}.weight", module, module.weight.dtype)
        new = dense_layer(module, module.weight.dtype)
        new.requires_grad_(False)
        replace_module(model, module, new)
        swaps.append((new, module))
    if tied:
        _forget_tie(model)
    return model


def _unload_peft(model: nn.Module) -> nn.Module:
    """The model that a PeftModel wraps, with the adapters of its dense layers merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    dense = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module.get_base_layer(), Linear4bit)
    ]
    before = []  # safe_merge puts new tensors into the parameters: the old ones stay what they are
    try:
        for module in dense:
            weights = [(p, p.data) for p in module.get_base_layer().parameters()]
            before.append((module, list(module.merged_adapters), weights))
            module.merge(safe_merge=True)
        return model.unload()
    except BaseException:
        for module, merged, weights in reversed(before):
            module.merged_adapters = merged
            for parameter, data in weights:
                parameter.data = data
        raise


def _forget_tie(model: nn.Module) -> None:
    """Tells transformers that the head has a weight of its own now."""
    config = getattr(model, "config", None)
    for settings in (config, config.get_text_config() if config is not None else None):
        if settings is not None:
            settings.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


# The unquantized model ----------------------------------------------------------------------------


class UnquantizedWeights:
    """The weights that the packed layers of a model were made from, by the layers' names.

    Args:
        base: the unquantized model, its state dict, or a folder or file of safetensors.
        model: the packed one, PEFT's or not.
        op: who asks, for the sentences of errors.
    """

    def __init__(self, base, model: nn.Module, op: str = "merge_into_4bit"):
        self.op = op
        is_path = isinstance(base, (str, os.PathLike))
        self.called = f"base ({os.fspath(base)})" if is_path else "base"
        self.reason = ""  # why transformers' names of a folder's tensors are not known
        self.experts = {n: m for n, m in model.named_modules() if isinstance(m, Experts4bit)}
        if isinstance(base, nn.Module):
            self.tensors = dict(base.named_parameters(remove_duplicate=False))
        elif isinstance(base, Mapping):
            self.tensors = base
        elif isinstance(base, (str, os.PathLike)) and isinstance(os.fspath(base), str) and base:
            self.tensors = self._read(Path(base), model)
        else:
            raise TypeError(
                f"{self.op}: base is {short(base)}, want the unquantized model, its state dict, or "
                "a folder or file of safetensors"
            )

    def _read(self, path: Path, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors of a folder as transformers would name, stack and turn them for this model;
        of a file, of another model and where it cannot, as they are."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        transformers = sys.modules.get("transformers")
        if os.path.isdir(path) and transformers and isinstance(model, transformers.PreTrainedModel):
            try:
                from .checkpoint import Weights

                return Weights(path, model)
            except (CheckpointError, ImportError, AttributeError) as error:
                self.reason = str(error)
        is_file = os.path.lexists(path) and not os.path.isdir(path)
        files = [path] if is_file else sorted(path.glob("*.safetensors"))
        want = (
            "want the folder of the unquantized model, with its safetensors files, or one such "
            "file; a model on the hub must be downloaded first"
        )
        if not files:
            lacks = "has no safetensors files" if os.path.isdir(path) else "does not exist"
            raise ValueError(f"{self.op}: base is {short(str(path))}, which {lacks}, {want}")
        try:
            return SafetensorsFiles(files, any_dtype=True)
        except CheckpointError as error:
            raise CheckpointError(f"{self.op}: {self.called}: {error}") from error

    def weight(self, full_name: str, packed: Linear4bit) -> Tensor:
        """The unquantized weight of a packed layer, fp32 [N, K].

        Raises:
            ValueError: there is none of that name, or it has another shape, or no float values.
        """
        name = full_name.removeprefix("base_model.model.")
        key, pick = f"{name}.weight", None
        match = re.fullmatch(r"(.+)\.packed\.(\d+)\.(up|down)", name)
        holder = full_name[: -len(name)] + match[1] if match else None
        if holder in self.experts:
            experts = self.experts[holder].template
            key = f"{match[1]}.{_up_name(experts) if match[3] == 'up' else 'down_proj'}"
            pick = int(match[2])
        if key not in self.tensors:
            end = name.rpartition(".")[2] + ".weight"
            near = [k for k in self.tensors if isinstance(k, str) and k.endswith(end)]
            raise ValueError(
                f"{self.op}: {self.called} has no {key}, want the unquantized model that was "
                f"packed; it has {near[:3] or list(self.tensors)[:3]}"
                + (f"; as a model's folder it cannot be read: {self.reason}" if self.reason else "")
            )
        weight = self.tensors[key]
        got = not_readable(weight)
        if got is None and weight.dtype not in FLOAT_DTYPES:
            got = f"a tensor of {weight.dtype}"
        if got is not None:
            raise ValueError(
                f"{self.op}: {self.called} has {key} as {got}, want float values: the model as it "
                "was before it was packed"
            )
        flip = packed.from_conv1d
        if pick is not None:
            weight, flip = self._expert(key, weight, pick), experts.is_transposed
        weight = weight.T if flip else weight
        want = (packed.out_features, packed.in_features)
        if tuple(weight.shape) != want:
            raise ValueError(
                f"{self.op}: {self.called} has {key} of shape {list(weight.shape)}, want "
                f"{list(want)}: it must be the unquantized model that was packed"
            )
        check_finite(f"{self.op}: {self.called}: {key}", weight, weight.dtype)
        return weight.detach().to(packed.weight.device, torch.float32)

    def _expert(self, key: str, stack: Tensor, number: int) -> Tensor:
        """One expert's weight of a stack [experts, ...]."""
        if stack.ndim != 3 or len(stack) <= number:
            raise ValueError(
                f"{self.op}: {self.called} has {key} of shape {list(stack.shape)}, want a stack of "
                f"more than {number} matrices: it must be the unquantized model that was packed"
            )
        return stack[number]

    def check(self, layer: _Adapted) -> None:
        """ValueError unless the weight packs to nearly the codes that the layer has."""
        again = quantize_with(
            self.weight(layer.name, layer.packed), layer.packed.config
        ).packed.reshape(-1)
        now = layer.packed.quantized.packed.reshape(-1)
        same = (again >> 4 == now >> 4).float().mean() + (again & 15 == now & 15).float().mean()
        # Stored in another dtype, a weight in a hundred changes its code.
        if now.numel() and same / 2 < 0.9:
            raise ValueError(
                f"{self.op}: {self.called} is not what was packed: {same / 2:.0%} of the codes of "
                f"{layer.name} agree, want nearly all. An adapter that was initialised by changing "
                "the packed weight (PiSSA, OLoRA) needs calibration instead"
            )

    def target(self, layer: _Adapted) -> Tensor:
        """W + s B A, fp32 [N, K]."""
        A, B, scaling = layer.lora
        return self.weight(layer.name, layer.packed).addmm(B, A, alpha=scaling)


# What the layers see ------------------------------------------------------------------------------


def _batches(calibration: Iterable, model: nn.Module) -> list:
    """The calibration batches, as a list, since they are read more than once."""
    if isinstance(calibration, (str, bytes, Tensor, Mapping)):
        raise TypeError(
            f"merge_into_4bit: calibration is a {type(calibration).__name__}, want a list of "
            "batches: token ids [batch, tokens], or what tokenizer(text, return_tensors='pt') gives"
        )
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"merge_into_4bit: calibration is {short(calibration)}, want a list of batches: token "
            "ids [batch, tokens], or what tokenizer(text, return_tensors='pt') gives"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError(
            "merge_into_4bit: calibration is empty, want batches of text; 5,000 tokens do"
        )
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, Mapping)):
            raise TypeError(
                f"merge_into_4bit: calibration[{number}] is a {type(batch).__name__}, want token "
                "ids [batch, tokens], or what tokenizer(text, return_tensors='pt') gives"
            )
        _check_batch(f"merge_into_4bit: calibration[{number}]", batch, model)
    tokens = sum(map(_tokens, batches))
    if not tokens:
        raise ValueError(
            "merge_into_4bit: calibration has no tokens (is its attention_mask all zeros?), want "
            "batches of text; 5,000 tokens do"
        )
    if tokens < _FEW_TOKENS:
        warnings.warn(
            f"merge_into_4bit: calibration has {tokens} tokens, want at least {_FEW_TOKENS}; "
            "5,000 were measured to do",
            stacklevel=3,
        )
    return batches


def _mask(batch) -> Tensor | None:
    """Which tokens of a batch are no padding, bool [batch * tokens]; None where it does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.reshape(-1).bool() if mask is not None and mask.ndim == 2 else None


def _tokens(batch) -> float:
    """How many tokens a batch has that are no padding; infinity where it does not say."""
    mask = _mask(batch)
    if mask is not None:
        return int(mask.sum())
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else math.inf


# Of text alone. With other arguments, an image's say, an id may stand for what is not a token.
_TEXT_ARGUMENTS = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"),
    *("special_tokens_mask", "length"),
}


def _check_batch(called: str, batch, model: nn.Module) -> None:
    """ValueError unless a batch can be text for the model; `called` names it. What else the model's
    forward refuses is said where it runs."""
    if isinstance(batch, Tensor):
        _check_ids(called, batch, _vocabulary(model))
        return
    if names := [name for name in batch if not isinstance(name, str)]:
        raise ValueError(f"{called} has the key {short(names[0])}, want names of arguments")
    if not batch:
        raise ValueError(f"{called} is empty, want input_ids, token ids [batch, tokens]")
    for name, value in batch.items():
        got = not_readable(value) if isinstance(value, Tensor) else None
        if got is not None:
            raise ValueError(f"{called}[{name!r}] is {got}, want a dense tensor")
    mask = batch.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"{called}['attention_mask'] is {short(mask)}, want a tensor")
    ids = batch.get("input_ids")
    if ids is None and batch.keys() <= _TEXT_ARGUMENTS:
        raise ValueError(f"{called} has no input_ids, want token ids [batch, tokens]")
    if ids is None:  # embeddings, sound
        return
    rows = _vocabulary(model) if batch.keys() <= _TEXT_ARGUMENTS else None
    _check_ids(f"{called}['input_ids']", ids, rows)
    if mask is not None and mask.ndim == 2 and mask.shape != ids.shape:
        raise ValueError(
            f"{called}['attention_mask'] has shape {list(mask.shape)}, want input_ids' "
            f"{list(ids.shape)}"
        )


def _check_ids(called: str, ids, rows: int | None) -> None:
    """ValueError unless these are token ids; of a vocabulary of `rows`, where that is known."""
    got = not_readable(ids)
    if got is None and ids.dtype not in (torch.int64, torch.int32):
        got = f"a tensor of {ids.dtype}"
    if got is None and ids.ndim != 2:
        got = f"of shape {list(ids.shape)}"
    if got is not None:
        raise ValueError(f"{called} is {got}, want int64 token ids [batch, tokens]")
    if rows is None or not ids.numel():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= rows:
        raise ValueError(
            f"{called} has token {least if least < 0 else most}, want ids from 0 to {rows - 1:,}, "
            "which the model knows: is this the tokenizer of another model?"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model knows, if that can be told."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


class _Enough(Exception):
    """Stops a forward pass behind the last layer that it was made for."""


class _Inputs:
    """Iterates over (layers that share an input, H = X^T X / n of that input), in the order of the
    forward pass. As many H as fit in hessian_bytes are gathered in one pass over the batches."""

    def __init__(self, model: nn.Module, layers: list[_Adapted], batches: list, hessian_bytes: int):
        self.model, self.batches = model, batches
        self.hessian_bytes = hessian_bytes
        self.groups = self._order(layers)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self):
        rest = self.groups
        while rest:
            count, nbytes = 0, 0
            while count < len(rest):
                nbytes += 4 * rest[count][0].packed.in_features ** 2
                if count and nbytes > self.hessian_bytes:
                    break
                count += 1
            hessians = self._gather(rest[:count])
            for group in rest[:count]:
                yield group, hessians.pop(id(group[0].module))
            rest = rest[count:]

    def _order(self, layers: list[_Adapted]) -> list[list[_Adapted]]:
        """The layers as the first batch meets them; neighbours that are given the same tensor make
        one group."""
        calls: list[tuple[_Adapted, bool]] = []
        before = None

        def note(layer: _Adapted, x: Tensor) -> None:
            nonlocal before
            calls.append((layer, x is before))
            before = x

        hooks = [
            layer.module.register_forward_pre_hook(
                lambda module, args, layer=layer: note(layer, args[0])
            )
            for layer in layers
        ]
        self._forward(0, hooks)
        counts = {id(layer): 0 for layer in layers}
        for layer, _ in calls:
            counts[id(layer)] += 1
        # Where a layer runs twice, or not for every input (an expert), no pass may end early.
        self.can_stop = all(count == 1 for count in counts.values())
        if not self.can_stop:
            seen = dict.fromkeys(id(layer) for layer, _ in calls)
            by_id = {id(layer): layer for layer in layers}
            return [[by_id[i]] for i in (*seen, *(set(by_id) - set(seen)))]
        groups: list[list[_Adapted]] = []
        for layer, same_input in calls:
            if same_input and self._alike(groups[-1][0], layer):
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups

    @staticmethod
    def _alike(a: _Adapted, b: _Adapted) -> bool:
        same_device = a.packed.weight.device == b.packed.weight.device
        return same_device and a.packed.config == b.packed.config

    def _gather(self, groups: list[list[_Adapted]]) -> dict[int, Tensor]:
        """H for the first module of each group."""
        sums, counts = {}, {}
        mask = None
        last = groups[-1][0].module

        def see(module, args):
            x = args[0].detach()
            key = id(module)
            rows = x.reshape(-1, x.shape[-1])
            if mask is not None and mask.numel() == len(rows):
                rows = rows[mask.to(rows.device)]
            rows = rows.float()
            if key not in sums:
                sums[key] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
                counts[key] = 0
            sums[key].addmm_(rows.T, rows)
            counts[key] += len(rows)
            if module is last and self.can_stop:
                raise _Enough

        hooks = [group[0].module.register_forward_pre_hook(see) for group in groups]
        try:
            for number, batch in enumerate(self.batches):
                mask = _mask(batch)
                self._forward(number, [])
        finally:
            for hook in hooks:
                hook.remove()
        for group in groups:
            key, K = id(group[0].module), group[0].packed.in_features
            if not counts.get(key):  # an expert that no token chose
                sums[key] = torch.zeros(K, K, device=group[0].packed.weight.device)
            else:
                sums[key] /= counts[key]
            if not math.isfinite(sums[key].diagonal().sum().item()):
                raise ValueError(
                    f"merge_into_4bit: {group[0].name} is given a NaN or an infinity on the "
                    "calibration text, want finite activations (another dtype?)"
                )
        return sums

    def _forward(self, number: int, hooks: list) -> None:
        """Runs the model on a batch, and removes the hooks. ValueError for whatever it raises."""
        batch = self.batches[number]
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        try:
            if isinstance(batch, Tensor):
                self.model(batch.to(device))
            else:
                self.model(
                    **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                )
        except _Enough:
            pass
        except Exception as error:  # an architecture's forward may raise anything
            if out_of_memory(error):
                raise
            raise ValueError(
                f"merge_into_4bit: the model's forward fails on calibration[{number}]: "
                f"{first_line(error, with_type=True)}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
