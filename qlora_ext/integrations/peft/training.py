"""PEFT's preparation for training, and LoftQ's initialisation, for packed layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import loftq_utils

from ...adapters.stacks import to_file
from ...checks import check_finite
from ...merging.original_weights import OriginalWeights
from ...models.report import logical_surplus
from ...models.walk import check_whole
from ...nn.packed import _Packed4bit
from ...tensor.config import FLOAT_DTYPES
from ...tensor.functions import dequantize_4bit
from ..transformers.versions import checkpoint_activations
from .experts import ParamWrapper
from .lora import PeftLoraLinear4bit
from .stand_in import _packed_base, dequantize


def _count_logical_weights(original):
    """Wraps `PeftModel.get_nb_trainable_parameters`."""

    @functools.wraps(original)
    def get_nb_trainable_parameters(self):
        trainable, total = original(self)
        return trainable, total + logical_surplus(self)

    return get_nb_trainable_parameters


def prepare_model_for_kbit_training(
    model: torch.nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """Freezes a packed model, and turns on gradient checkpointing and gradients of the inputs.

    PEFT's function of this name also makes fp32 copies of norms, embeddings and head. Ours leaves
    dtypes alone, because adapters are fp32 and every op accumulates in fp32.

    Args:
        model: a transformers model with `Linear4bit` layers; changed in place and returned.
        use_gradient_checkpointing: recompute activations in the backward.
        gradient_checkpointing_kwargs: for torch.utils.checkpoint; the default is
            {"use_reentrant": False}.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        # Reentrant checkpointing drops the gradients of a block whose inputs need none. The first
        # block's inputs come from a frozen embedding.
        model.enable_input_require_grads()
        checkpoint_activations(model, gradient_checkpointing_kwargs or {"use_reentrant": False})
    return model


def _prepare(original):
    """Wraps `prepare_model_for_kbit_training`."""

    @functools.wraps(original)
    def prepare(
        model,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs=None,
        *args,
        **kwargs,
    ):
        ours = any(isinstance(module, _Packed4bit) for module in model.modules())
        if ours:
            return prepare_model_for_kbit_training(
                model, use_gradient_checkpointing, gradient_checkpointing_kwargs
            )
        return original(
            model, use_gradient_checkpointing, gradient_checkpointing_kwargs, *args, **kwargs
        )

    return prepare


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: torch.nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[torch.nn.Module, str], bool] | None = None,
) -> None:
    """Starts LoRA from the quantization error: B A is nearest to W - dequantize(W4), by SVD.

    The packed weights do not change, so the adapter fits any copy of the 4-bit model. Source:
    LoftQ (arXiv 2310.08659), one step of its iteration, as PEFT does for bitsandbytes.

    Args:
        peft_model: a `PeftModel` with LoRA on packed layers.
        model_path: folder or file with the unquantized weights in safetensors; None takes the
            folder that the base was loaded from.
        adapter_name: the adapter to write.
        callback: called with (peft_model, layer name) after each layer. If it returns False, that
            layer's change is undone.

    Raises:
        ValueError: the model has no LoRA on a packed layer or is sharded, or the file does not hold
            a layer's weight.
        FileNotFoundError: there is no safetensors file.
    """
    check_whole("replace_lora_weights_loftq", peft_model)
    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): module
        for name, module in peft_model.named_modules()
        if isinstance(module, (PeftLoraLinear4bit, ParamWrapper)) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"replace_lora_weights_loftq: no packed layer with LoRA named {adapter_name!r}, want a "
            "PeftModel with LoRA on packed layers, and the name of one of its adapters"
        )
    model_path = model_path or peft_model.get_base_model().config._name_or_path
    if not any(Path(model_path).glob("*.safetensors")) and not Path(model_path).is_file():
        # It is a sharded model on the hub.
        loader = loftq_utils._SafetensorLoader(peft_model, str(model_path))
        model_path = Path(next(iter(loader.weight_map.values()))).parent
    unquantized = OriginalWeights(model_path, peft_model, "replace_lora_weights_loftq")
    for name, layer in layers.items():
        lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        before = lora_A.clone(), lora_B.clone()
        r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
        if isinstance(layer, ParamWrapper):
            name = layer._name
            start = _start_of_stack(unquantized, layer, r, scaling)
        else:
            packed = _packed_base(layer)
            lost = unquantized.weight(prefix + name, packed) - dequantize(packed)
            start = _nearest(lost, r, scaling)
        lora_A.copy_(start[0])
        lora_B.copy_(start[1])
        if callback is not None and not callback(peft_model, name):
            lora_A.copy_(before[0])
            lora_B.copy_(before[1])


def _nearest(lost: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K] and B [N, r] with scaling B A nearest to lost [N, K]."""
    # Fix the seed of svd_lowrank's random projection, so that every run starts the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(lost, q=min(2 * r + 8, *lost.shape), niter=4)
    root = (S[:r] / abs(scaling)).sqrt()
    return (V[:, :r] * root).T, U[:, :r] * root


def _start_of_stack(unquantized: OriginalWeights, layer: ParamWrapper, r: int, scaling: float):
    """LoftQ's A [E r, K] and B [N, r E] for a stack of packed experts, one expert at a time."""
    key, experts = layer._name, _packed_base(layer)
    stack = experts.stacks()[layer.parameter_name]
    weight = unquantized.tensors.get(key)
    shape = (stack._shape[0], *stack._shape[1:][:: -1 if experts.is_transposed else 1])
    if weight is None or tuple(weight.shape) != shape or weight.dtype not in FLOAT_DTYPES:
        got = f"no {key}"
        if weight is not None:
            got = f"{key} as {weight.dtype} {list(weight.shape)}"
        raise ValueError(
            f"replace_lora_weights_loftq: {unquantized.called} has {got}, want float "
            f"{list(shape)}; give the folder of the unquantized model that was packed"
            + (f"; its folder cannot be read: {unquantized.reason}" if unquantized.reason else "")
        )
    q, pairs = stack.quantized, []
    for e, expert in enumerate(weight.detach()):
        check_finite(f"replace_lora_weights_loftq: {key}[{e}]", expert, expert.dtype)
        expert = expert.T if experts.is_transposed else expert
        lost = expert.to(q.packed.device, torch.float32) - dequantize_4bit(q[e], torch.float32)
        pairs.append(_nearest(lost, r, scaling))
    return to_file(*(torch.stack(factors) for factors in zip(*pairs, strict=True)))


def _loftq(original):
    """Wraps `replace_lora_weights_loftq`."""

    @functools.wraps(original)
    def replace(peft_model, *args, **kwargs):
        own = (PeftLoraLinear4bit, ParamWrapper)
        ours = any(isinstance(module, own) for module in peft_model.modules())
        return (replace_lora_weights_loftq if ours else original)(peft_model, *args, **kwargs)

    return replace
