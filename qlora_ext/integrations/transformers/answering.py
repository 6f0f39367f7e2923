"""Answers transformers' BitsAndBytesConfig(load_in_4bit=True) with our layers.

Trainers build that config themselves, and then read what loading leaves on the model: the config,
`quantization_method`, `is_loaded_in_4bit`. So all these stay bitsandbytes', and so does the format
of checkpoints. Only the layers and the kernels are ours. QLORA_EXT_ENABLE=layers turns it on
(qlora_ext_enable.py). 8-bit configs go to bitsandbytes.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.quantizers_utils import should_convert_module

import qlora_ext_enable

from ...models.names import matches
from ...models.plan import Plan, warn_unmatched
from ...nn.experts import is_fused_experts
from ...nn.linear import Linear4bit, is_plain_linear
from . import bitsandbytes_config
from .bitsandbytes_format import skip_modules
from .config import QLoraExtConfig
from .quantizer import QLoraExtHfQuantizer


class _NoQuantState:
    """Stands in for bitsandbytes' `weight.quant_state`, and raises an error when it is read.
    Without it, a trainer's kernels would take the packed bytes for the weight."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # what copy and pickle look for
            raise AttributeError(name)
        raise RuntimeError(
            f"weight.quant_state.{name}: the layer is qlora_ext's Linear4bit, whose packed weight "
            "has no QuantState of bitsandbytes. Call the layer, turn off the trainer's own LoRA "
            "kernels (axolotl: lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel), or use "
            "QLORA_EXT_ENABLE=1, which keeps bitsandbytes' layers"
        )


class AnsweringQuantizer(QLoraExtHfQuantizer):
    """Takes the place of transformers' Bnb4BitHfQuantizer."""

    config_name = bitsandbytes_config.NAME
    names_argument = bitsandbytes_config.SKIPPED
    saves_as = "bitsandbytes"

    def __init__(self, quantization_config, **kwargs):
        packed = kwargs.get("pre_quantized", True)
        settings = QLoraExtConfig.from_bnb(
            quantization_config.to_dict() if packed else quantization_config
        )
        if packed:
            settings.checkpoint_format = "bitsandbytes"
        super().__init__(settings, **kwargs)
        # Loading writes the list of dense layers into it, and the caller may use it again.
        self.quantization_config = copy.deepcopy(quantization_config)
        qlora_ext_enable.tell("BitsAndBytesConfig(load_in_4bit=True) gives qlora_ext's layers")

    def update_device_map(self, device_map):
        """As with bitsandbytes: without a device map the model goes to the current GPU."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def _process_model_before_weight_loading(self, model, **kwargs):
        names = self.settings.modules_to_not_convert or []
        if not self.pre_quantized:
            names = [*names, *_left_by_bitsandbytes(model, names)]
        self.settings.modules_to_not_convert = names
        super()._process_model_before_weight_loading(model, **kwargs)

    def _warn_unmatched(self, model, plan: Plan) -> None:
        asked = self.quantization_config.llm_int8_skip_modules or []
        # A name may match by transformers' rules alone.
        names = [name for name, _ in model.named_modules() if name]
        ours = [name for name in plan.unmatched() if name in asked]
        missed = [one for one in ours if all(should_convert_module(n, [one]) for n in names)]
        warn_unmatched(self.config_name, model, missed, self.names_argument)

    def _process_model_after_weight_loading(self, model, **kwargs):
        model = super()._process_model_after_weight_loading(model, **kwargs)
        model.is_loaded_in_4bit = True
        kept = skip_modules(model, self.settings.modules_to_not_convert or [])
        self.quantization_config.llm_int8_skip_modules = kept
        model.config.quantization_config = self.quantization_config
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.weight_marks = {"quant_state": _NoQuantState()}
                # The dtype for adapters that PEFT doesn't cast to fp32.
                module.adapter_dtype = self.quantization_config.bnb_4bit_compute_dtype
        return model


def _left_by_bitsandbytes(model: nn.Module, skipped: list[str]) -> list[str]:
    """Patterns for the layers that we would pack and transformers leaves dense for bitsandbytes.
    There, names in `skipped` also match in the middle of a word ("proj"), and fused experts and
    subclasses of nn.Linear are not packed."""
    left = []
    for name, module in model.named_modules():
        is_linear = is_plain_linear(module)
        if is_fused_experts(module) or (
            is_linear
            and (
                type(module) not in (nn.Linear, Conv1D)
                or not (should_convert_module(name, skipped) or matches(name, skipped))
            )
        ):
            left.append(f"^{re.escape(name)}$")
    return left


def answer_bitsandbytes() -> None:
    """Makes BitsAndBytesConfig(load_in_4bit=True) give our layers, in this process."""
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = AnsweringQuantizer


def attach() -> None:
    """Calls answer_bitsandbytes if QLORA_EXT_ENABLE=layers, unless it is too late for that."""
    if qlora_ext_enable.layers_wanted():
        answer_bitsandbytes()
