"""Wraps functions of PEFT, so that its tuners train and merge on packed weights.

PEFT has no registry that outlives one config, so `attach()` wraps some of its functions, once.
These are the functions, and what the wrapped ones do:

    {Lora,AdaLora}Model._create_new_module   gives a packed layer `PeftLoraLinear4bit` or
                                             AdaLoRA's, a packed embedding `LoraEmbedding4bit`, a
                                             stack of packed experts experts.py's `ParamWrapper`
    {Hira,IA3,Pvera,RandLora,Road,Shira}Model._create_new_module   gives a packed layer
                                             `HiraLinear4bit`, ...
    resolve_quantization_backend    lets BOFT, MiSS, OFT, SHiRA, VeRA read and merge packed weights
    dequantize_module_weight        dequantizes packed weights, for DoRA's norms
    <tuner>._create_and_replace     refuses all other tuners
    <tuner>.inject_adapter          shows PEFT the stacks of packed experts as parameters; undoes
                                    its changes if it raises
    convert_peft_config_for_transformers     shows PEFT the stacks, too
    BaseTuner._unload_and_optionally_merge   merge_and_unload gives a model without packed layers
    BaseTuner._cast_adapter_dtype            autocast_adapter_dtype=False gives the layer's dtype
    BaseTuner.{merge,unmerge}_adapter        refuse a sharded or offloaded model
    PeftModel.save_pretrained                refuses a sharded model unless given a state_dict;
                                             fetches offloaded weights; refuses NaN and Inf
    LoraModel.add_weighted_adapter           refuses an adapter that is not finite
    {ModulesToSaveWrapper,TrainableTokensLayer}.__init__   refuse a packed layer
    {get,set}_peft_model_state_dict          write and read a packed embedding as a dense table;
                                             refuse to read NaN and Inf
    PeftModel.get_nb_trainable_parameters    counts weights, not bytes
    prepare_model_for_kbit_training          sets up checkpointing, without PEFT's fp32 copies
    hotswap_adapter_from_state_dict          refuses NaN and Inf, and another rank on packed experts
    replace_lora_weights_loftq               does LoftQ's start with our quantizer
    KappaTuneSelector._compute_kappas        dequantizes packed weights

Source: peft/tuners/lora/{model,layer,bnb}.py and peft/utils/quantization_utils.py of PEFT 0.21.
"""

from __future__ import annotations

import sys
import types

import peft
from peft.tuners import lora
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.ia3 import IA3Model
from peft.tuners.randlora import RandLoraModel
from peft.tuners.road import RoadModel
from peft.tuners.shira import ShiraModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap, loftq_utils, save_and_load
from peft.utils import other as peft_other
from peft.utils.integrations import dequantize_module_weight

from ... import hosts
from .creation import _create_as, _create_lora_module
from .experts import with_named_stacks
from .files import (
    _check_combined,
    _check_swapped,
    _get_state_dict,
    _save_pretrained,
    _set_state_dict,
)
from .helpers import _condition_numbers
from .merging import _merge_and_unload, _refuse_sharded, adapted_model
from .other_layers import (
    HiraLinear4bit,
    IA3Linear4bit,
    PveraLinear4bit,
    RandLoraLinear4bit,
    RoadLinear4bit,
    ShiraLinear4bit,
)
from .training import _count_logical_weights, _loftq, _prepare
from .tuners import (
    _all_or_nothing,
    _cast_adapters,
    _dequantize_module,
    _refuse_packed,
    _refuse_packed_layer,
    _resolve_backend,
)
from .versions import (
    HiraModel,
    KappaTuneSelector,
    PveraModel,
    convert_peft_config_for_transformers,
    resolve_quantization_backend,
)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))


def _replace_everywhere(function, wrap) -> None:
    """Puts wrap(function) wherever a module has imported `function` by name: PEFT's, and those of
    programs that import PEFT before qlora_ext."""
    wrapper = wrap(function)
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            # A copy: another thread may be importing the module.
            for attribute, value in list(vars(module).items()):
                if value is function:
                    setattr(module, attribute, wrapper)


def attach() -> None:
    """Wraps the functions of PEFT listed at the top of this file. Idempotent.

    Raises:
        AttributeError, ImportError: this PEFT lacks one of them.
    """
    if isinstance(vars(lora.LoraModel).get("_qlora_ext_attached"), bool):
        return
    hosts.adapted_models.append(adapted_model)
    for tuner in (lora.LoraModel, AdaLoraModel):
        tuner._create_new_module = staticmethod(_create_lora_module(tuner._create_new_module))
    for tuner, layer in (
        (HiraModel, HiraLinear4bit),
        (IA3Model, IA3Linear4bit),
        (PveraModel, PveraLinear4bit),
        (RandLoraModel, RandLoraLinear4bit),
        (RoadModel, RoadLinear4bit),
        (ShiraModel, ShiraLinear4bit),
    ):
        if tuner is not None:
            tuner._create_new_module = staticmethod(_create_as(layer)(tuner._create_new_module))
    BaseTuner._cast_adapter_dtype = _cast_adapters(BaseTuner._cast_adapter_dtype)
    for tuner in _subclasses(BaseTuner):
        if "_create_and_replace" in vars(tuner):
            tuner._create_and_replace = _refuse_packed(tuner._create_and_replace)
        if "inject_adapter" in vars(tuner):
            tuner.inject_adapter = _all_or_nothing(tuner.inject_adapter)
        if "_unload_and_optionally_merge" in vars(tuner):
            tuner._unload_and_optionally_merge = _merge_and_unload(
                tuner._unload_and_optionally_merge
            )
        for name in ("merge_adapter", "unmerge_adapter"):
            if name in vars(tuner):
                setattr(tuner, name, _refuse_sharded(vars(tuner)[name]))
    peft.PeftModel.save_pretrained = _save_pretrained(peft.PeftModel.save_pretrained)
    for wrapper, what in (
        (peft_other.ModulesToSaveWrapper, "modules_to_save"),
        (TrainableTokensLayer, "trainable tokens (trainable_token_indices)"),
    ):
        wrapper.__init__ = _refuse_packed_layer(wrapper.__init__, what)
    for model in (peft.PeftModel, peft.PeftMixedModel):
        if "get_nb_trainable_parameters" in vars(model):
            model.get_nb_trainable_parameters = _count_logical_weights(
                model.get_nb_trainable_parameters
            )
    if resolve_quantization_backend is not None:
        _replace_everywhere(resolve_quantization_backend, _resolve_backend)
    if KappaTuneSelector is not None:
        KappaTuneSelector._compute_kappas = _condition_numbers(KappaTuneSelector._compute_kappas)
    if convert_peft_config_for_transformers is not None:
        _replace_everywhere(convert_peft_config_for_transformers, with_named_stacks)
    _replace_everywhere(dequantize_module_weight, _dequantize_module)
    _replace_everywhere(save_and_load.get_peft_model_state_dict, _get_state_dict)
    _replace_everywhere(save_and_load.set_peft_model_state_dict, _set_state_dict)
    _replace_everywhere(hotswap.hotswap_adapter_from_state_dict, _check_swapped)
    _replace_everywhere(loftq_utils.replace_lora_weights_loftq, _loftq)
    _replace_everywhere(peft_other.prepare_model_for_kbit_training, _prepare)
    lora.LoraModel.add_weighted_adapter = _check_combined(lora.LoraModel.add_weighted_adapter)
    lora.LoraModel._qlora_ext_attached = True


attach()
