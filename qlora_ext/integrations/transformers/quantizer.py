"""Packs a model while transformers' from_pretrained(quantization_config=QLoraExtConfig()) loads it.

transformers reads a checkpoint tensor by tensor into a model on the meta device. This quantizer
replaces that model's linear layers by `Linear4bit` and packs each weight as it arrives, so peak
memory is about that of the result and one layer. A saved model has `quant_method: qlora_ext` in its
config, so from_pretrained reads it back without other settings.

Sources: transformers/quantizers/base.py (the interface), quantizer_bnb_4bit.py (its closest peer).
"""

from __future__ import annotations

import copy
import warnings

import torch
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ... import hosts
from ...checks import check_finite, check_parameters
from ...files import FLOATS
from ...merging.dense import leave_no_packed_layer
from ...models.names import as_names
from ...models.plan import Plan, log_report, warn_unmatched
from ...models.raw_errors import explain_errors
from ...models.walk import check_whole, places_of, replace_module, use_dense_panels
from ...nn.embedding import Embedding4bit
from ...nn.experts import Experts4bit, weight_names
from ...nn.linear import Linear4bit, is_plain_linear
from ...nn.lora import _Lora
from ...nn.offload import device_of, is_offloaded, offload
from ...nn.packed import _Packed4bit
from ...nn.stack import Stack4bit
from ...text import CheckpointError, first_few
from .bitsandbytes_format import bitsandbytes_state_dict
from .config import QLoraExtConfig
from .conversions import (
    Quantize,
    ReadBitsandbytes,
    as_given,
    by_expert,
    reads_other_format,
    singles_stacked,
    with_those_of_packed,
)
from .files import (
    check_loaded,
    check_read,
    checkpoint_names,
    file_of,
    local_part,
    not_held,
    storage_dtype,
    stored_layers,
)
from .versions import casts_to_empty, keep_values

# The tensors that a bitsandbytes checkpoint has for each `weight`.
_BITSANDBYTES = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",  # last: an older transformers takes the first that fits the name
)


class QLoraExtHfQuantizer(HfQuantizer):
    """transformers' interface to a quantization method, for `quant_method: qlora_ext`."""

    requires_calibration = False
    # What messages call the config and its list of names.
    config_name = "QLoraExtConfig"
    names_argument = "modules_to_not_convert"
    saves_as = "qlora_ext"  # the format to write; qlora_ext.save_pretrained can change it
    given_state = None  # the state_dict that save_pretrained was given

    def __init__(self, quantization_config: QLoraExtConfig, **kwargs):
        # Copy the config: each model fills in its own list of kept layers, and the caller may use
        # the object for several models.
        # The names given for a packed checkpoint have no effect, so they are not saved.
        self.asked = quantization_config.__dict__.pop("_asked", [])
        self.settings = copy.deepcopy(quantization_config)
        super().__init__(self.settings, **kwargs)
        self.quant_config = self.settings.to_quant_config()
        self.stacks: dict[str, Stack4bit] = {}  # experts packed while loading, by parameter
        self.expert_names: frozenset[str] = frozenset()  # the modules whose experts are packed so

    def validate_environment(self, *args, device_map=None, **kwargs):
        if (
            not self.pre_quantized
            and isinstance(device_map, dict)
            and "disk" in [str(device) for device in device_map.values()]
        ):
            raise ValueError(
                f"{self.config_name}: device_map sends layers to disk, but a weight packed while "
                "loading exists only in memory. Load and save the 4-bit model once without "
                "'disk', then load that with this device_map."
            )

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        # False for a packed checkpoint; then transformers checks the tensors against the shapes.
        if self.pre_quantized:
            return False
        module, attribute = get_module_from_name(model, param_name)
        if param_name.rpartition(".")[0] in self.expert_names:
            return attribute in weight_names(module)
        return isinstance(module, Linear4bit) and attribute == "weight"

    def get_quantize_ops(self):
        return Quantize(self)

    def get_weight_conversions(self):
        if self.settings.checkpoint_format != "bitsandbytes":
            return singles_stacked() if self.pre_quantized else []
        return [WeightConverter(list(_BITSANDBYTES), "weight", [ReadBitsandbytes(self)])]

    def update_weight_conversions(self, weight_conversions, model=None):
        # The base class would also copy the model's own conversions for these names.
        if not self.pre_quantized:
            weight_conversions = [by_expert(conversion) for conversion in weight_conversions]
        return weight_conversions + self.get_weight_conversions()

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        # The empty weight may be floating until it is packed (versions.py).
        if self.param_needs_quantization(model, param_name):
            # An expert's weight has its dense shape: half a byte, and a scale for each block.
            is_expert = param_name.rpartition(".")[0] in self.expert_names
            return 0.5 + 4 / (self.settings.blocksize or 4096) if is_expert else 1
        return super().param_element_size(model, param_name, param)

    def get_state_dict_and_metadata(self, model):
        given = self.given_state
        floats = {k: t for k, t in (given or {}).items() if getattr(t, "dtype", None) in FLOATS}
        for name, tensor in floats.items():
            if ".lora_" not in name:
                check_finite(f"save_pretrained: {name}", local_part(tensor.detach()), tensor.dtype)
        # With a distributed_config, transformers gathers the tensors that it sharded itself.
        is_whole = given is not None and not any(hasattr(t, "to_local") for t in given.values())
        if self.saves_as == "bitsandbytes":
            is_whole = False  # this format is made from the model, whatever state is given
        if not is_whole and getattr(model.config, "distributed_config", None) is None:
            check_whole("save_pretrained", model)
            # Adapters are not checked, so that a checkpoint of a training run is never refused.
            adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
            check_parameters("save_pretrained", model, skipped=adapters)
        if self.saves_as == "bitsandbytes":
            return bitsandbytes_state_dict(model), {}
        if any(isinstance(module, _Lora) for module in model.modules()):
            # Adapters stay in the file, because Trainer resumes from it.
            warnings.warn(
                "save_pretrained: the file holds the quantized base and the adapters of add_lora, "
                "but from_pretrained reads only the base. To save the adapters for load_adapter or "
                "PEFT, call qlora_ext.save_adapter(model, path)",
                stacklevel=4,
            )
        return given, {}

    def _process_model_before_weight_loading(
        self, model, dtype=None, checkpoint_files=None, **kwargs
    ):
        self._check_distribution(getattr(model.config, "distributed_config", None))
        self.checkpoint_files = checkpoint_files
        self.not_finite = []  # (parameter, dtype) of the weights that could not be packed
        self.other_shapes = {}  # parameter -> (got, want) of stacks of experts
        config = self.settings
        keep = as_names(config.modules_to_not_convert, self.config_name, self.names_argument)
        self.plan = plan = Plan(
            model,
            keep,
            stored=stored_layers(model, checkpoint_files, packed=self.pre_quantized),
            packed_checkpoint=self.pre_quantized,
            other_names=checkpoint_names(model) if keep or self.asked else (),
        )
        self._warn_packed(model, plan)
        if not self.pre_quantized:
            self._warn_unmatched(model, plan)
        config.modules_to_not_convert = plan.kept
        packed = 0
        casts = casts_to_empty(packed=self.pre_quantized)
        storage = storage_dtype(checkpoint_files) if casts and self.pre_quantized else None
        places = places_of(model)
        for name in plan.names:
            module = model.get_submodule(name)
            if is_plain_linear(module):
                layer = Linear4bit.empty_like(module, self.quant_config, dtype=dtype)
            elif isinstance(module, torch.nn.Embedding):
                layer = Embedding4bit.from_embedding(module, self.quant_config)
            elif self.pre_quantized:
                layer = Experts4bit.from_experts(module, self.quant_config)
            else:
                packed += 1  # Quantize packs their stacks, and _place_experts places them
                self.expert_names |= {name}
                continue
            layer.requires_grad_(False)
            # transformers initialises missing tensors with normal_, which uint8 lacks. Missing
            # tensors are refused after loading.
            for part in layer.modules():
                part._is_hf_initialized = True
            if casts and isinstance(layer, Linear4bit):
                keep_values(layer, storage or layer.dtype)
            replace_module(model, module, layer, places)
            packed += 1
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if packed == 0:
            message = f"{self.config_name}: found no linear layer to pack in"
            advice = f"shorten {self.names_argument}, or load it without {self.config_name}"
            if self.pre_quantized:
                message = f"{self.config_name}: found no packed layer in the checkpoint of"
                advice = "remove quantization_config from its config.json"
            why = plan.bad_dtypes() or f"Kept as they are: {plan.kept}; {advice}"
            raise ValueError(f"{message} {type(model).__name__}, want at least one. {why}")

    def _warn_unmatched(self, model, plan: Plan) -> None:
        warn_unmatched(self.config_name, model, plan.unmatched())

    def _warn_packed(self, model, plan: Plan) -> None:
        """Warns about layers that the caller wanted dense but a packed checkpoint has packed."""
        packed = [name for name in plan.names if plan.spelled.matches(name, self.asked)]
        if packed:
            warnings.warn(
                "QLoraExtConfig: modules_to_not_convert has no effect on a checkpoint that is "
                f"packed already: {first_few(packed, 8)} of {type(model).__name__} stay packed. To "
                "keep them dense, load the unquantized checkpoint with this list",
                stacklevel=2,
            )
        warn_unmatched("QLoraExtConfig", model, plan.unmatched(self.asked))

    def _check_distribution(self, config) -> None:
        """Raises ValueError for a `DistributedConfig` that would cut packed weights into pieces."""
        if config is None:
            return
        sizes = {
            name: getattr(config, name, None) or 1 for name in ("tp_size", "ep_size", "pp_size")
        }
        cut = [name for name, size in sizes.items() if size > 1]
        if cut:
            raise ValueError(
                f"{self.config_name}: distributed_config with {', '.join(cut)} > 1 is not "
                "supported on 4-bit layers; shard the loaded model with FSDP2, or cut its layers "
                "with qlora_ext.integrations.tensor_parallel"
            )
        if not self.pre_quantized:
            raise ValueError(
                f"{self.config_name}: distributed_config reads pieces of a weight, but packing "
                "needs whole ones; pack and save the model once without it, then load that"
            )

    def _place_experts(self, model) -> list[str]:
        """Replaces fused experts by Experts4bit of the stacks that were packed while loading.
        Returns the names of stacks that the checkpoint lacks."""
        missing = []
        for name in sorted(self.expert_names):
            module = model.get_submodule(name)
            # With "cpu" in the device map, accelerate has offloaded what stands for the stacks.
            device = device_of(module) if is_offloaded(module) else None
            if device is not None:
                hosts.accelerate_hooks().remove_hook_from_module(module)
            stacks = {}
            for key in weight_names(module):
                stack = self.stacks.pop(f"{name}.{key}", None)
                if stack is None:  # a dry run on meta, or missing in the checkpoint
                    if not module._parameters[key].is_meta:
                        missing.append(f"{name}.{key}")
                    stack = Stack4bit.from_dense(
                        module._parameters[key],
                        config=self.quant_config,
                        is_transposed=module.is_transposed,
                    )
                if module.has_bias:
                    bias = module._parameters[f"{key}_bias"].detach()
                    if not bias.is_meta:
                        values = local_part(bias)
                        check_read(model, f"{name}.{key}_bias", values, self.checkpoint_files)
                stacks[key] = stack
            experts = Experts4bit._in_place_of(module, stacks)
            for stack in stacks.values():
                if stack.bias is not None:
                    stack.bias._is_hf_initialized = True  # read, or initialised by transformers
            replace_module(model, module, experts)
            if device is not None:
                offload(experts, device)
                for parameter in experts.parameters():  # accelerate has made new ones
                    parameter._is_hf_initialized = True
        self.expert_names = frozenset()
        return missing

    def _check_shapes(self, model) -> None:
        """Raises CheckpointError if a parameter has another shape than before loading. With a
        quantizer, transformers before 5.23 takes any shape."""
        for name, parameter in model.named_parameters():
            got, want = parameter.shape, self.shapes.get(name, parameter.shape)
            if got != want:
                self._refuse_shape(model, name, got, want)
        del self.shapes

    def _refuse_shape(self, model, name: str, got, want) -> None:
        where = file_of(model, name, self.checkpoint_files)
        raise CheckpointError(
            f"{where and f'{where}: '}{name}: shape got {list(got)}, want {list(want)} by "
            "config.json; the weights or config.json are from another model"
        )

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, (got, want) in self.other_shapes.items():
            self._refuse_shape(model, name, got, want)
        if self.not_finite:
            name, dtype = self.not_finite[0]
            error = f"{name} has a NaN or an infinity in {dtype}"
            raise not_held(model, name, dtype, error, self.checkpoint_files)
        missing = self._place_experts(model)
        self._check_shapes(model)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _Packed4bit)
        }
        # transformers assigns tensors without load_state_dict and its checks.
        missing += [
            f"{name}.{key}"
            for name, layer in layers.items()
            for key, parameter in layer.named_parameters()
            if (key.startswith("weight") or (key == "bias" and not parameter.is_meta))
            and not getattr(parameter, "_is_hf_initialized", False)
        ]
        if missing:
            advice = "download it again, or keep layers to train from scratch dense with "
            advice += self.names_argument
            if self.pre_quantized:
                advice = "it is damaged: save the packed model again, or pack the unquantized one"
            layer, _, key = missing[0].rpartition(".")
            key = "weight" if key.startswith("weight") else key
            where = file_of(model, f"{layer}.{key}", self.checkpoint_files)
            raise CheckpointError(
                f"{type(model).__name__}: the checkpoint{where and f' ({where})'} lacks "
                f"{first_few(missing, 8)}; {advice}"
            )
        if self.settings.checkpoint_format == "bitsandbytes":
            self.settings.checkpoint_format = "qlora_ext"
        self.settings.set_format_version(model)
        # From here on the model is in our format, so saving must not convert it back.
        model._weight_conversions = [
            as_given(conversion)
            for conversion in model._weight_conversions
            if not reads_other_format(conversion)
        ]
        if self.pre_quantized:
            model._weight_conversions = with_those_of_packed(model, model._weight_conversions)
            for name, layer in layers.items():
                damage = layer._check_state(layer.state_dict(prefix=f"{name}."), f"{name}.")
                if damage:
                    where = file_of(model, f"{name}.weight", self.checkpoint_files)
                    raise CheckpointError(f"{where}: " * bool(where) + "; ".join(damage))
        check_loaded(model, self.checkpoint_files)
        del self.checkpoint_files
        model.quantization_report = self.plan.report(
            self.plan.packed_layer(name, model.get_submodule(name)) for name in self.plan.names
        )
        if not self.pre_quantized:
            log_report(self.config_name, model.quantization_report, least=0.0)
        del self.plan  # it holds the unpacked model's layers
        use_dense_panels(model)
        explain_errors(model)
        return model

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):  # from a saved config
            dtype = getattr(torch, dtype)
        leave_no_packed_layer(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    has_adapters = False  # whether adapters of add_lora are trained; Trainer finds PEFT's itself

    @property
    def is_qat_trainable(self) -> bool:
        # With it Trainer asks whether a quantized model without PEFT has weights to train.
        return self.has_adapters

    @property
    def is_compileable(self) -> bool:
        return True
