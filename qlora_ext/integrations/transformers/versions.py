"""What differs between the releases of transformers that this plug-in works with: 5.6 and newer.

Nothing else in this package asks for transformers' version.

    5.8     the loader calls `HfQuantizer.update_weight_conversions(conversions)`; before, it
            appended `get_weight_conversions()`. From 5.21 the call also passes the model
    5.15    saving renames by the converters first (`rename_source_key(reverse=True)`); before, by
            the renamings first, as loading does
    5.21    bitsandbytes' packed bytes are read in the dtype that they are stored in
    5.23    a weight that is packed on loading is read in the model's dtype; before these two, both
            were first cast to the dtype of the empty parameter. Shapes are checked with a
            quantizer, too. `gradient_checkpointing_enable` became `activation_checkpointing_enable`
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.core_model_loading import rename_source_key

RELEASE = Version(transformers.__version__).release

_SAVING: dict[str, Any] = {"reverse": True} if RELEASE >= (5, 15) else {}


def casts_to_empty(packed: bool) -> bool:
    """Whether the loader casts what it reads for a packed layer to its empty weight's dtype.

    Args:
        packed: whether the checkpoint is packed already.
    """
    return RELEASE < (5, 21) or (not packed and RELEASE < (5, 23))


def keep_values(layer: nn.Module, dtype: torch.dtype) -> None:
    """Gives the empty weight of a layer the dtype of the values that will be read for it, so that
    a loader that casts does not turn them into uint8.

    Args:
        layer: a Linear4bit on the meta device. Its weight keeps the packed shape.
        dtype: of the values.
    """
    weight = torch.empty_like(layer.weight, dtype=dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight._is_hf_initialized = True  # as it was for the weight that this replaces


def saved_key(name: str, renamings: list, converters: list) -> tuple[str, str | None]:
    """The name that save_pretrained gives a parameter, and the converter pattern that matched.

    Args:
        renamings, converters: transformers' conversions for loading, reversed.
    """
    return rename_source_key(name, renamings, converters, **_SAVING)


def checkpoint_activations(model: nn.Module, settings: dict[str, Any]) -> None:
    """Turns on activation checkpointing.

    Args:
        settings: for torch.utils.checkpoint, such as {"use_reentrant": False}.
    """
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)(settings)
