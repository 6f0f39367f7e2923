"""The one door to other libraries.

The core (ops, tensor, nn, models, adapters, merging) imports neither transformers nor PEFT nor
accelerate, and does not look for them. It calls the functions in the lists below; an integration
puts its functions there when its library is imported, so where that is not used they are empty.
The functions at the end import a library for a class that only it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# hook(model, config, kept): the layers of model were packed by config (a QuantConfig), and those
# named in kept were left dense.
on_packed: list[Callable[[nn.Module, Any, list[str]], None]] = []

# hook(model, trains): model got adapters, and trains says whether they require gradients.
on_adapted: list[Callable[[nn.Module, bool], None]] = []

# hook(model, dtype): no layer of model is packed any more; it was cast to dtype, or to none (None).
on_dense: list[Callable[[nn.Module, Any], None]] = []

# hook(model): the head of model no longer shares its weight with the embedding.
on_untied: list[Callable[[nn.Module], None]] = []

# hook(model) -> the names of layers in the files of model, {layer: name} for each kind of file.
names_in_files: list[Callable[[nn.Module], list[dict[str, str]]]] = []

# hook(folder, model) -> the parameters of an unquantized checkpoint under the names of model, a
# Mapping; None if it does not know the model. May raise CheckpointError.
original_weights: list[Callable[[Any, nn.Module], Any]] = []

# hook(model) -> its adapters as a merging.adapted.AdaptedModel; None if they are not the hook's.
adapted_models: list[Callable[[nn.Module], Any]] = []


def first(hooks: list[Callable], *args) -> Any:
    """What the first hook that has an answer says; None if none has."""
    return next((answer for hook in hooks if (answer := hook(*args)) is not None), None)


def conv1d_class() -> type[nn.Module]:
    """transformers' Conv1D, a linear layer whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def accelerate_hooks():
    """accelerate.hooks. Wanted only for a module that has one, so accelerate is there."""
    import accelerate.hooks

    return accelerate.hooks


def peft_lora_config(**settings):
    """A peft.LoraConfig."""
    import peft

    return peft.LoraConfig(**settings)


def knows_quant_method(method: str) -> bool:
    """Whether transformers has a quantizer of that name; True if it is not installed."""
    try:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    except ImportError:
        return True
    return method in AUTO_QUANTIZATION_CONFIG_MAPPING
