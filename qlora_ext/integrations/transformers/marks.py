"""Sets and removes the marks that tell transformers that a model's weights are packed.

These functions are hooks of qlora_ext.hosts. They leave models of other libraries alone.
"""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn

from ...tensor.config import QuantConfig
from .config import QLoraExtConfig
from .quantizer import QLoraExtHfQuantizer


def own_config(model: nn.Module) -> None:
    """Gives a transformers model a copy of its config, which other models may share."""
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) in copies:
            module.config = copies[id(config)]


def mark_packed(model: nn.Module, config: QuantConfig, kept: list[str]) -> None:
    """Marks a model as from_pretrained does when it packs one. It then saves and reloads as a
    quantized model, and its own code knows that its weights are packed."""
    inside: set[int] = set()
    for part in list(model.modules()):
        if isinstance(part, transformers.PreTrainedModel) and id(part) not in inside:
            inside.update(map(id, part.modules()))
            own_config(part)
            for each in part.modules():
                if isinstance(each, transformers.PreTrainedModel):
                    each.config._is_quantized = True
    if isinstance(model, transformers.PreTrainedModel):
        settings = QLoraExtConfig(modules_to_not_convert=kept, **config.to_dict())
        settings.set_format_version(model)
        model.hf_quantizer = QLoraExtHfQuantizer(settings, pre_quantized=True)
        model.config.quantization_config = model.hf_quantizer.quantization_config


def mark_adapted(model: nn.Module, trains: bool) -> None:
    """Tells the model's quantizer whether there is anything to train. Trainer asks it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.has_adapters = trains


def mark_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Removes the marks from a model that has no packed layer any more, and sets its dtype."""
    for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit"):
        model.__dict__.pop(attribute, None)
    if not isinstance(model, transformers.PreTrainedModel):
        return
    model.is_quantized = False
    own_config(model)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config.__dict__.pop("_is_quantized", None)
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("quantization_config", None)
        if dtype is not None:
            config.dtype = dtype


def mark_untied(model: nn.Module) -> None:
    """Tells transformers that the head no longer shares its weight."""
    if isinstance(model, transformers.PreTrainedModel):
        own_config(model)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
