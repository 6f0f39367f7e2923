"""Registers our config and quantizer, sets the hooks, and wraps methods of transformers."""

from __future__ import annotations

import functools

import torch
import transformers
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)

from ... import hosts
from ...models.names import as_names
from ...models.report import logical_surplus
from ...models.walk import output_embeddings
from ...nn.embedding import Embedding4bit
from ...nn.linear import Linear4bit
from .bitsandbytes_config import BLOCKSIZE
from .config import QUANT_METHOD, QLoraExtConfig
from .conversions import saving_packed
from .files import checkpoint_names
from .marks import mark_adapted, mark_dense, mark_packed, mark_untied
from .original_parameters import original_parameters
from .quantizer import QLoraExtHfQuantizer


def _count_logical_weights(original):
    """Wraps `PreTrainedModel.num_parameters`."""

    @functools.wraps(original)
    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = original(self, only_trainable, exclude_embeddings)
        return count if only_trainable else count + logical_surplus(self)

    return num_parameters


def _write_what_is_given(original):
    """Wraps `PreTrainedModel.save_pretrained`, so that it writes the `state_dict` it is given. For
    a quantized model, transformers would ignore it and write the model's own. Packed weights are
    written without the class's conversions, which may fuse q, k and v, for example."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kw):
        # It may have packed layers and no quantizer of ours: a part of a quantized model.
        quantizer = getattr(self, "hf_quantizer", None)
        ours = isinstance(quantizer, QLoraExtHfQuantizer)
        if ours:
            quantizer.given_state = state_dict
        try:
            with saving_packed(self):
                return original(self, save_directory, is_main_process, state_dict, *args, **kw)
        finally:
            if ours:
                quantizer.given_state = None

    return save_pretrained


def _refuse_packed_resize(original):
    """Wraps `PreTrainedModel._get_resized_embeddings` and `_get_resized_lm_head`, which would copy
    rows of bytes. It checks the head together with the embedding, before that is replaced."""

    @functools.wraps(original)
    def get_resized(self, old, new_num_tokens=None, *args, **kwargs):
        layers = [old]
        if old is self.get_input_embeddings():
            layers.append(output_embeddings(self))
        # A PEFT layer holds the model's own layer.
        bases = [x.get_base_layer() if hasattr(x, "get_base_layer") else x for x in layers]
        # Only for embeddings is the next positional argument pad_to_multiple_of.
        given = args[0] if args and isinstance(bases[0], torch.nn.Embedding) else None
        multiple = kwargs.get("pad_to_multiple_of", given)
        for packed in bases:
            if not isinstance(packed, (Embedding4bit, Linear4bit)):
                continue
            has = packed._shape[0]
            want = has if new_num_tokens is None else new_num_tokens
            if type(multiple) is int and multiple > 0:
                want = -(-want // multiple) * multiple
            if want == has:
                continue
            setting = "modules_to_not_convert naming it"
            if isinstance(packed, Embedding4bit):
                setting = "quantize_embeddings=False"
            raise ValueError(
                f"resize_token_embeddings: got {want} rows, want the {has} of "
                f"{type(self).__name__}'s {type(packed).__name__}; packed rows cannot be added or "
                "dropped: resize the unquantized model before it is packed, or pack it with "
                f"{setting}"
            )
        return original(self, old, new_num_tokens, *args, **kwargs)

    return get_resized


def _keep_what_was_asked(original):
    """Wraps `AutoHfQuantizer.merge_quantization_configs`, which drops keys that it does not know,
    and the caller's config if the checkpoint has one. This keeps the names that the caller wanted
    dense, for a warning, and the block size in a checkpoint of bitsandbytes' format."""

    @functools.wraps(original)
    def merge_quantization_configs(cls, quantization_config, quantization_config_from_args):
        merged = original(quantization_config, quantization_config_from_args)
        asked = quantization_config_from_args
        if isinstance(merged, QLoraExtConfig) and isinstance(asked, QLoraExtConfig):
            merged._asked = as_names(asked.modules_to_not_convert, "QLoraExtConfig")
        ours = issubclass(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"], QLoraExtHfQuantizer)
        if ours and isinstance(quantization_config, dict) and BLOCKSIZE in quantization_config:
            # BitsAndBytesConfig drops it.
            setattr(merged, BLOCKSIZE, quantization_config[BLOCKSIZE])
        return merged

    return classmethod(merge_quantization_configs)


def attach() -> None:
    """Registers the config and the quantizer with transformers. Idempotent.

    Raises:
        AttributeError, ImportError: this transformers lacks something that is wrapped.
    """
    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    hosts.on_packed.append(mark_packed)
    hosts.on_adapted.append(mark_adapted)
    hosts.on_dense.append(mark_dense)
    hosts.on_untied.append(mark_untied)
    hosts.names_in_files.append(checkpoint_names)
    hosts.original_weights.append(original_parameters)
    register_quantization_config(QUANT_METHOD)(QLoraExtConfig)
    register_quantizer(QUANT_METHOD)(QLoraExtHfQuantizer)
    owner = next(
        cls for cls in transformers.PreTrainedModel.__mro__ if "num_parameters" in vars(cls)
    )
    owner.num_parameters = _count_logical_weights(owner.num_parameters)
    transformers.PreTrainedModel.save_pretrained = _write_what_is_given(
        transformers.PreTrainedModel.save_pretrained
    )
    AutoHfQuantizer.merge_quantization_configs = _keep_what_was_asked(
        AutoHfQuantizer.merge_quantization_configs
    )
    for name in ("_get_resized_embeddings", "_get_resized_lm_head"):
        resize = getattr(transformers.PreTrainedModel, name)
        setattr(transformers.PreTrainedModel, name, _refuse_packed_resize(resize))


attach()
