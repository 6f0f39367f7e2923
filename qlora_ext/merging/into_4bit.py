"""Merges adapters back into 4-bit weights without losing the fine-tune.

An adapter moves a weight by far less than the distance between two 4-bit levels. So requantizing
the sum gives nearly the old codes, and the fine-tune is lost. Two ways keep it:

    base         needs the unquantized model W: each layer becomes quantize(W + s B A). Its
                 rounding errors depend on the fine-tune as little as those of W did
    calibration  needs the 4-bit model and some text: codes and scales move from their present
                 values to those whose layer outputs are nearest to the adapted ones (descent.py)

If there is no text, the model can write some (calibration_text.py). docs/merging.md says how much
each way keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..checks import check_finite, is_integer, is_number
from ..models.walk import progress, replace_module
from ..nn.expert_offload import check_not_in_host
from ..nn.linear import Linear4bit
from ..nn.stack import Stack4bit
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import dequantize_4bit, quantize_tensor
from ..tensor.quantized import QuantizedTensor
from ..text import shorten
from .adapted import AdaptedLayer, adapted_model
from .descent import fit_4bit, hessian_error
from .layer_inputs import LayerInputs, as_batches
from .original_weights import OriginalWeights

# Measured on SmolLM2-135M (docs/merging.md).
_LOSS = "keeps 5 to 10% of a short fine-tune's gain"


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
    """Merges a model's adapters into its 4-bit weights, in place. The result has Linear4bit layers
    and, in a mixture of experts, Stack4bit.

    With `base`, each adapted layer becomes quantize(W + s B A). With `calibration`, it becomes the
    packed weight whose outputs on the calibration text are nearest to the adapted layer's. Each
    expert counts as a layer; its inputs are the tokens that chose it. With neither, it warns what
    requantizing would lose, and merges the model into 16 bits instead, as merge_and_unload does.

    Layers without an adapter keep their bytes. An adapted dense layer (a head) stays dense and is
    untied if it was tied. Each layer keeps its format (block size, codebook, double quantization),
    and the model saves and loads as a quantized one.

    Args:
        model: one that went through add_lora or load_adapter, or a PeftModel with LoRA on our
            layers, whose active adapters are merged.
        base: the unquantized model that was packed: a module, a state dict, or a folder (or file)
            of safetensors, read layer by layer. A folder's tensors are renamed and stacked as
            transformers does when it loads them.
        calibration: batches of text like the text that the model is for; 5,000 tokens are enough.
            write_calibration makes some if you have none. A batch is an int64 (or int32) tensor of
            token ids [batch, tokens], or the keyword arguments of the model's forward (what a
            tokenizer returns); its attention_mask leaves out padding.
        dtype: of the 16-bit model, if neither base nor calibration is given.
        damping: see fit_4bit; 0 or more.
        hessian_bytes: memory for the input statistics of the layers in one pass, [K, K] fp32 for
            each input width K. It is 1 or more; one layer's statistics are always held. Less memory
            takes more passes over the calibration text. Each pass runs with the layers that are
            merged already.
        progress_bar: show a tqdm bar.

    Returns:
        model, or the wrapped model if it was a PeftModel.

    Raises:
        TypeError: model is not a module, dtype is not a float dtype, progress_bar is not a bool, or
            base, calibration or a batch has the wrong type.
        ValueError: both base and calibration are given; the model has no adapters (merged
            already?), has PEFT adapters that are not plain LoRA, or is sharded (its parameters are
            DTensors); calibration has no tokens, ids that are not integers of the model's
            vocabulary, or a batch that the model's forward cannot take (the error gives its
            number); damping is below 0 or not finite; hessian_bytes is not an int of at least 1;
            base does not exist, is not safetensors, lacks a layer, has another shape, or is not the
            model that was packed; offload_experts keeps adapted experts in host memory.
        OverflowError: a weight of base has a NaN or an infinity, or a sum W + s B A is not finite
            or does not fit a dense layer's dtype; the error names the layer.

    After KeyboardInterrupt or an error the model is as it was, except for a PeftModel with neither
    base nor calibration, because PEFT itself does that merge.

    Warns:
        UserWarning: neither base nor calibration is given, or calibration has less than 512 tokens.
    """
    if not is_number(damping) or not 0 <= damping < math.inf:
        raise ValueError(
            f"merge_into_4bit: damping is {shorten(damping)}, want a finite number of at least 0"
        )
    if not isinstance(hessian_bytes, bool):
        with contextlib.suppress(TypeError):
            hessian_bytes = operator.index(hessian_bytes)  # NumPy's integers
    if not is_integer(hessian_bytes) or hessian_bytes < 1:
        raise ValueError(
            f"merge_into_4bit: hessian_bytes is {shorten(hessian_bytes)}, want an int of at least "
            "1: bytes of memory, 2**30 by default"
        )
    if not isinstance(progress_bar, bool):
        raise TypeError(f"merge_into_4bit: progress_bar is {shorten(progress_bar)}, want a bool")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"merge_into_4bit: dtype is {shorten(dtype)}, want torch.float16, torch.bfloat16 or "
            "torch.float32"
        )
    if base is not None and calibration is not None:
        raise ValueError(
            "merge_into_4bit: got base and calibration, want one of them: calibration alone keeps "
            "about as much as both (docs/merging.md)"
        )
    adapted = adapted_model(model)
    layers = adapted.layers
    if base is None and calibration is None:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"merge_into_4bit: base and calibration are None, and requantizing without them {_LOSS}"
            f"; merging into {name} instead. To merge into 4 bits, give the unquantized model as "
            "base, or some text as calibration (write_calibration makes some)",
            stacklevel=2,
        )
        return adapted.merge_dense(dtype, progress_bar)
    for layer in layers:
        if layer.expert is not None:
            check_not_in_host("merge_into_4bit", layer.name, layer.packed)
    source = None if base is None else OriginalWeights(base, model)
    batches = None if calibration is None else as_batches(calibration, model)
    if source is not None:
        for layer in layers:
            source.check(layer)
    swaps = []  # (new, old), to undo after an error
    experts: dict[int, dict[int, QuantizedTensor]] = {}  # id of a stack -> its merged experts
    modes = [(module, module.training) for module in model.modules()]

    def swap(layer: AdaptedLayer, q: QuantizedTensor) -> None:
        """Replaces an adapted layer by the merged one, and a stack when it has its last expert."""
        if layer.expert is not None:
            merged = experts.setdefault(id(layer.module), {})
            merged[layer.expert] = q
            if len(merged) < layer.packed.num_experts:
                return
            q = _stacked([merged[e] for e in sorted(merged)])
            del experts[id(layer.module)]
        new = _with_weight(layer.packed, q)
        replace_module(model, layer.module, new)
        swaps.append((new, layer.module))
        if layer.switch is not None:
            layer.switch(False)

    def target_of(layer: AdaptedLayer) -> Tensor:
        target = layer.target() if source is None else source.target(layer)
        check_finite(f"merge_into_4bit: {layer.called}.weight", target, torch.float32)
        return target

    try:
        with torch.no_grad():
            if batches is None:
                for layer in progress(layers, "merge", progress_bar):
                    swap(layer, quantize_tensor(target_of(layer), layer.packed.config))
            else:
                model.eval()
                inputs = LayerInputs(model, layers, batches, hessian_bytes)
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
            return adapted.unload(swaps)
    except BaseException:
        for new, old in reversed(swaps):
            replace_module(model, new, old)
        for layer in layers:
            if layer.switch is not None:
                layer.switch(True)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for new, old in swaps:
            new.training = old.training


def _start(layer: AdaptedLayer, target: Tensor, hessian: Tensor) -> QuantizedTensor:
    """Where the descent starts: at the present codes, which a short fine-tune hardly changes, or at
    the requantized target, whichever is nearer to the target."""
    starts = [layer.quantized, quantize_tensor(target, layer.packed.config)]
    dense = (dequantize_4bit(q, torch.float32) for q in starts)
    errors = [hessian_error(weight, target, hessian) for weight in dense]
    return starts[errors[1] < errors[0]]


def _stacked(experts: list[QuantizedTensor]) -> QuantizedTensor:
    """The stack of these experts."""

    def stack(name: str) -> Tensor | None:
        parts = [getattr(q, name) for q in experts]
        return None if parts[0] is None else torch.stack(parts)

    tensors = {name: stack(name) for name in ("packed", "absmax", "nested", "mean")}
    shape = torch.Size((len(experts), *experts[0].shape))
    return dataclasses.replace(experts[0], shape=shape, **tensors)


def _with_weight(packed: Linear4bit | Stack4bit, q: QuantizedTensor) -> Linear4bit | Stack4bit:
    """A layer like `packed`, but without an adapter and with weight q. The bias is shared."""
    if isinstance(packed, Stack4bit):
        new = Stack4bit.empty(
            packed._shape,
            packed.config,
            dtype=packed.dtype,
            device="meta",
            is_transposed=packed.is_transposed,
        )
    else:
        new = Linear4bit.__new__(Linear4bit)
        nn.Module.__init__(new)
        new.in_features, new.out_features = packed.in_features, packed.out_features
        new._init_packed(packed._shape, packed.config, packed.dtype)
        new.from_conv1d = packed.from_conv1d
    new._set_quantized(q)
    new.register_parameter("bias", packed._parameters["bias"])
    return new._in_place_of(packed).train(packed.training)
