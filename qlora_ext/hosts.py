"""The core's only connection to other libraries: lists of hooks that integrations fill.

The core (ops, tensor, nn, models, adapters, merging) does not import transformers, PEFT or
accelerate, and does not check whether they are there. It calls the functions in the lists below. An
integration adds its functions when its library is imported; otherwise the lists are empty. The
functions at the end import a library, for something that only this library has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# hook(model, config, kept): the layers of model were packed with config (a QuantConfig), except
# those named in kept.
on_packed: list[Callable[[nn.Module, Any, list[str]], None]] = []

# hook(model, trains): model got adapters, and trains says whether they require gradients.
on_adapted: list[Callable[[nn.Module, bool], None]] = []

# hook(model, dtype): no layer of model is packed any more. It was cast to dtype, or not if None.
on_dense: list[Callable[[nn.Module, Any], None]] = []

# hook(model): the head of model no longer shares its weight with the embedding.
on_untied: list[Callable[[nn.Module], None]] = []

# hook(model) -> a dict {layer: its name in a file} for each kind of file of the model.
names_in_files: list[Callable[[nn.Module], list[dict[str, str]]]] = []

# hook(folder, model) -> a Mapping of the parameters of an unquantized checkpoint, under the names
# that model has for them; None if it does not know the model. May raise CheckpointError.
original_weights: list[Callable[[Any, nn.Module], Any]] = []

# hook(model) -> its adapters as a merging.adapted.AdaptedModel; None if they are another library's.
adapted_models: list[Callable[[nn.Module], Any]] = []


def tell(hooks: list[Callable[..., None]], *args) -> None:
    """Calls every hook."""
    for hook in hooks:
        hook(*args)


def first(hooks: list[Callable], *args) -> Any:
    """The answer of the first hook that does not return None; None if there is none."""
    return next((answer for hook in hooks if (answer := hook(*args)) is not None), None)


def conv1d_class() -> type[nn.Module]:
    """transformers' Conv1D, a linear layer whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def accelerate_hooks():
    """accelerate.hooks. Used only for a module with such a hook, so accelerate is installed."""
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
