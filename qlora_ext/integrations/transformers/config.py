"""QLoraExtConfig: the settings for packing, as transformers stores them in config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...models.names import as_names
from ...nn.stack import Stack4bit
from ...tensor.config import FORMAT_VERSION, QuantConfig, check_format_version
from .bitsandbytes_config import our_settings

QUANT_METHOD = "qlora_ext"
CHECKPOINT_FORMATS = ("qlora_ext", "bitsandbytes")


class QLoraExtConfig(QuantizationConfigMixin):
    """How `from_pretrained` packs the linear layers of a model into 4 bits.

    Args:
        quant_type: as in QuantConfig: 'nf4', 'fp4', ... or 'custom' (with `codebook`).
        blocksize: elements per scale, a power of two from 32 to 4096. None: one scale for each
            whole weight.
        double_quant: store the scales in 8 bits (4.127 bits per weight at block 64, else 4.5).
        modules_to_not_convert: names of layers to leave alone, or one such name: full names,
            dotted parts of them ("lm_head", "layers.0.mlp"), containers ("vision_tower"), or
            regular expressions for these. Layers that quantize_model always leaves alone need no
            name: heads, tied weights, layers that the model class keeps in fp32. A warning lists
            names that match nothing.
        checkpoint_format: 'bitsandbytes' for a checkpoint that bitsandbytes packed;
            `qlora_ext.from_pretrained` sets it. What we save is in 'qlora_ext'.
        format_version: the version of a packed checkpoint's format, from its config.json. None
            means 1: the first releases did not write it.
        settings: the other fields of `QuantConfig`: normalization, codebook, companding,
            companding_k, std_factor.

    Raises:
        ValueError: a setting is unknown or out of range; the error names it. Or a newer qlora_ext
            wrote the checkpoint, in a format that this one does not know.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int | None = 64,
        double_quant: bool = True,
        modules_to_not_convert: list[str] | str | None = None,
        checkpoint_format: str = "qlora_ext",
        format_version: int | None = None,
        **settings: Any,
    ):
        check_format_version(format_version)  # first: a newer format may have other settings
        settings.pop("quant_method", None)  # from config.json
        known = {field.name for field in dataclasses.fields(QuantConfig)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"QLoraExtConfig: got unknown settings {unknown}, want modules_to_not_convert or "
                f"one of {sorted(known)}; QLoraExtConfig.from_bnb reads bitsandbytes' names"
            )
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise ValueError(
                f"QLoraExtConfig: checkpoint_format got {checkpoint_format!r}, want one of "
                f"{CHECKPOINT_FORMATS}"
            )
        self.quant_method = QUANT_METHOD
        self.checkpoint_format = checkpoint_format
        self.format_version = 1  # the version to write; set_format_version sets it for a model
        names = as_names(modules_to_not_convert, "QLoraExtConfig")
        self.modules_to_not_convert = None if modules_to_not_convert is None else names
        config = QuantConfig(quant_type, blocksize, double_quant, **settings)
        vars(self).update(config.to_dict())

    def set_format_version(self, model: nn.Module) -> None:
        """Sets format_version to the lowest version that has what this packed model needs."""
        has_stacks = any(isinstance(module, Stack4bit) for module in model.modules())
        self.format_version = FORMAT_VERSION if has_stacks else 1

    def to_quant_config(self) -> QuantConfig:
        """The same settings as a `QuantConfig`, which `Linear4bit` takes.

        Raises:
            ValueError: an attribute was set to a value out of range.
        """
        names = [field.name for field in dataclasses.fields(QuantConfig)]
        return QuantConfig(**{name: getattr(self, name) for name in names})

    @classmethod
    def from_bnb(cls, config: Any) -> QLoraExtConfig:
        """The settings of a `BitsAndBytesConfig` (or the dict in a config.json) as ours.

        `bnb_4bit_compute_dtype` and `bnb_4bit_quant_storage` are ignored, because we compute in the
        activations' dtype and store bytes. The block size is 64, as in transformers' bitsandbytes,
        unless the config has our own key for it.

        Raises:
            ValueError: the config does not ask for 4 bits, or asks for something we don't support.
        """
        return cls(**our_settings(config))
