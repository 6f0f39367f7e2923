"""Merging adapters back into 4-bit weights, without losing what was learnt.

An adapter moves a weight by far less than the distance of two 4-bit levels, so requantizing the sum
gives nearly the old codes back, and the fine-tune is gone. Two routes keep it:

    base         the unquantized model is at hand: quantize(W + s B A), whose rounding errors are
                 as independent of the fine-tune as those of W were
    calibration  the 4-bit model and some text are: codes and scales descend from where they are
                 to where the layer's outputs are nearest to the adapted ones (descent.py)

Where there is no text, the model writes some (calibration_text.py). docs/merging.md has what each
keeps.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..checks import check_finite, is_integer, is_number
from ..models.walk import progress, replace_module
from ..nn.linear import Linear4bit
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
    """Merges a model's adapters into its 4-bit weights, in place: Linear4bit layers at the end.

    With `base`, each adapted layer becomes quantize(W + s B A). With `calibration`, each becomes
    the packed weight whose outputs on the calibration text are nearest to the adapted layer's. With
    neither, a warning says what requantizing would lose,
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
        ValueError: base and calibration together; no adapters (merged already?); a kind of PEFT
            adapter other than plain LoRA; a sharded model, whose parameters are DTensors; a
            calibration without tokens, with ids that are not integers of the model's vocabulary, or
            with a batch that the model's forward cannot take, by its number; a damping below 0 or
            not finite; hessian_bytes that is not an int of at least 1; a base that is not there, is
            not safetensors, lacks a layer, has another shape, or is not what was packed.
        OverflowError: a weight of base with a NaN or an infinity, a sum W + s B A that is not
            finite, or one beyond the dtype of a dense layer, naming the layer.

    KeyboardInterrupt or an error midway leaves the model as it was, except where a PeftModel is
    given neither base nor calibration: that merge is PEFT's own.

    Warns:
        UserWarning: neither base nor calibration, or less than 512 tokens of it.
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
            f"merge_into_4bit: hessian_bytes is {shorten(hessian_bytes)}, want an int of at "
            "least 1: "
            "bytes of memory, 2**30 by default"
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
            "about as much as both did (docs/merging.md)"
        )
    adapted = adapted_model(model)
    layers = adapted.layers
    if base is None and calibration is None:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"merge_into_4bit: base and calibration are None, and requantizing without them {_LOSS}"
            f"; merging into {name} instead. Give the unquantized model as base, or some text as "
            "calibration: write_calibration makes some",
            stacklevel=2,
        )
        return adapted.merge_dense(dtype, progress_bar)
    source = None if base is None else OriginalWeights(base, model)
    batches = None if calibration is None else as_batches(calibration, model)
    if source is not None:
        for layer in layers:
            source.check(layer)
    swaps = []  # (new, old), to take back
    modes = [(module, module.training) for module in model.modules()]

    def swap(layer: AdaptedLayer, q: QuantizedTensor) -> None:
        """Puts a merged layer in an adapted one's place."""
        new = _with_weight(layer.packed, q)
        replace_module(model, layer.module, new)
        swaps.append((new, layer.module))

    def target_of(layer: AdaptedLayer) -> Tensor:
        target = layer.target() if source is None else source.target(layer)
        check_finite(f"merge_into_4bit: {layer.name}.weight", target, torch.float32)
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
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for new, old in swaps:
            new.training = old.training


def _start(layer: AdaptedLayer, target: Tensor, hessian: Tensor) -> QuantizedTensor:
    """Where the descent starts: at the codes there are, which a short fine-tune hardly leaves, or
    at the requantized target, whichever is nearer to it."""
    starts = [layer.packed.quantized, quantize_tensor(target, layer.packed.config)]
    dense = (dequantize_4bit(q, torch.float32) for q in starts)
    errors = [hessian_error(weight, target, hessian) for weight in dense]
    return starts[errors[1] < errors[0]]


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
