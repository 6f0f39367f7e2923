"""Quantizing while loading: transformers' `from_pretrained(quantization_config=QLoraExtConfig())`.

transformers reads a checkpoint tensor by tensor into a model on the meta device. The quantizer here
swaps the linear layers of that model for `Linear4bit` and turns each of their weights into packed
bytes as it arrives, so the peak stays near one layer above the result. A saved model carries
`quant_method: qlora_ext` in its config and is read back without being told.

Sources: transformers/quantizers/base.py (the interface), quantizer_bnb_4bit.py (its closest peer).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checks import CheckpointError, check_finite, check_parameters, lacks_data, without_mask
from ..experts import Experts4bit, is_fused_experts
from ..files import FLOATS, SafetensorsFiles, reading, safetensors_files
from ..merge import check_weight, dense_layer
from ..models import (
    check_whole,
    is_packed,
    output_embeddings,
    places_of,
    replace_module,
    use_dense_panels,
)
from ..models.names import as_names
from ..models.plan import Plan, Stored, tell, tell_unmatched, weight_names
from ..models.raw_errors import explain_errors, unwatch
from ..nn import (
    _PACKED_KEYS,
    Embedding4bit,
    Linear4bit,
    PanelLinear,
    _Lora,
    is_plain_linear,
)
from ..offload import check_in_memory
from ..quantized_tensor import QuantConfig, QuantizedTensor, dequantize_4bit, quantize_with

QUANT_METHOD = "qlora_ext"
CHECKPOINT_FORMATS = ("qlora_ext", "bitsandbytes")
_ALWAYS = ("weight", "weight_absmax", "weight_codebook")  # of every packed layer


class QLoraExtConfig(QuantizationConfigMixin):
    """How `from_pretrained` packs the linear layers of a model into 4 bits.

    Args:
        quant_type: 'nf4', 'fp4', 'linear' or 'custom' (with `codebook`).
        blocksize: weights per scale, a power of two from 32 to 4096; None is one scale a weight.
        double_quant: store the scales in 8 bits (4.127 bits per weight at block 64, else 4.5).
        modules_to_not_convert: names of layers to leave alone, or one such name: full names,
            dotted parts of them ("lm_head", "layers.0.mlp"), containers ("vision_tower"), or
            regular expressions for these. What quantize_model always leaves alone need not be
            named: heads, tied weights, what the model class protects in fp32. One that matches
            nothing is named in a warning.
        checkpoint_format: 'bitsandbytes' for a checkpoint that bitsandbytes packed, which
            `qlora_ext.from_pretrained` sets by itself; what we save is in 'qlora_ext'.
        settings: the other fields of `QuantConfig`: normalization, codebook, companding,
            companding_k, std_factor.

    Raises:
        ValueError: a setting that is unknown or out of range, named.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int | None = 64,
        double_quant: bool = True,
        modules_to_not_convert: list[str] | str | None = None,
        checkpoint_format: str = "qlora_ext",
        **settings: Any,
    ):
        settings.pop("quant_method", None)  # config.json carries it
        known = {field.name for field in dataclasses.fields(QuantConfig)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"QLoraExtConfig: got unknown settings {unknown}")
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise ValueError(
                f"QLoraExtConfig: checkpoint_format got {checkpoint_format!r}, want one of "
                f"{CHECKPOINT_FORMATS}"
            )
        self.quant_method = QUANT_METHOD
        self.checkpoint_format = checkpoint_format
        names = as_names(modules_to_not_convert, "QLoraExtConfig")
        self.modules_to_not_convert = None if modules_to_not_convert is None else names
        config = QuantConfig(quant_type, blocksize, double_quant, **settings)
        vars(self).update(config.to_dict())

    def to_quant_config(self) -> QuantConfig:
        """The same settings as the `QuantConfig` that `Linear4bit` takes.

        Raises:
            ValueError: an attribute that was set to a value out of range.
        """
        names = [field.name for field in dataclasses.fields(QuantConfig)]
        return QuantConfig(**{name: getattr(self, name) for name in names})

    @classmethod
    def from_bnb(cls, config: Any) -> QLoraExtConfig:
        """The settings of a `BitsAndBytesConfig` (or the dict in a config.json) as ours.

        `bnb_4bit_compute_dtype` and `bnb_4bit_quant_storage` have no counterpart: we compute in the
        dtype of the activations, and store bytes. transformers' bitsandbytes packs blocks of 64.

        Raises:
            ValueError: a config that does not ask for 4 bits.
        """
        settings = config if isinstance(config, dict) else config.to_dict()
        four_bit = settings.get("load_in_4bit", settings.get("_load_in_4bit", False))
        if not four_bit:
            raise ValueError("QLoraExtConfig.from_bnb: load_in_4bit got False, want True")
        return cls(
            # The defaults are BitsAndBytesConfig's, for keys that an old config.json lacks.
            quant_type=settings.get("bnb_4bit_quant_type", "fp4"),
            # Not bitsandbytes' key: `save_pretrained` adds it, stock transformers ignores it.
            blocksize=settings.get("bnb_4bit_blocksize", 64),
            double_quant=settings.get("bnb_4bit_use_double_quant", False),
            modules_to_not_convert=settings.get("llm_int8_skip_modules"),
        )


class Quantize(ConversionOps):
    """Packs one weight that transformers has just read, on the device it was read to."""

    def __init__(self, hf_quantizer: QLoraExtHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, *args, model=None, **kwargs):
        """input_dict: full parameter name -> dense weight [out, in] (or [in, out] of a Conv1D).

        Returns the packed weight and its statistics under the names they have in the model.
        """
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, attribute = get_module_from_name(model, name)
            if not isinstance(module, Linear4bit) or attribute != "weight":
                result[name] = value
                continue
            if module.from_conv1d:
                value = value.T.contiguous()
            want = (module.out_features, module.in_features)
            if tuple(value.shape) != want:
                raise ValueError(f"{name}: shape got {tuple(value.shape)}, want {want}")
            if value.is_meta:  # device_map="meta": packed in shape only
                module._set_empty(value.device)
                packed = {key: module._parameters[key] for key in module._sizes()}
                packed["weight_codebook"] = module._parameters["weight_codebook"]
            else:
                try:
                    q = quantize_with(value, module.config)
                except RuntimeError:
                    if value.isfinite().all():
                        raise
                    # What is raised here ends in a report of transformers' that names no file.
                    self.hf_quantizer.not_finite.append((name, value.dtype))
                    q = quantize_with(torch.zeros_like(value), module.config)
                packed = module._as_parameters(q)
            prefix = name.removesuffix("weight")
            result.update({prefix + key: parameter for key, parameter in packed.items()})
        return result


class ReadBitsandbytes(ConversionOps):
    """Reads one weight of a checkpoint that bitsandbytes packed, with its statistics."""

    def __init__(self, hf_quantizer: QLoraExtHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, *args, model=None, full_layer_name=None, **kwargs):
        """input_dict: `weight`, `weight.absmax`, ... -> tensors of the layer of `full_layer_name`.

        Raises:
            ValueError, KeyError: statistics that are missing, damaged, or of other settings than
                config.json says.
        """
        tensors = {key: t[0] if isinstance(t, list) else t for key, t in input_dict.items()}
        layer, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, Linear4bit):
            # An unpacked weight, of a norm say. transformers does not cast what goes through an op.
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype
            return {full_layer_name: tensors["weight"].to(dtype)}
        q = QuantizedTensor.from_state_dict(tensors, "weight")
        config = layer.config
        got = (tuple(q.shape), q.quant_type, q.blocksize, q.nested is not None)
        want = (
            (layer.out_features, layer.in_features),
            config.quant_type,
            config.blocksize,
            config.double_quant,
        )
        if got != want:
            raise ValueError(
                f"{full_layer_name}: (shape, quant_type, blocksize, double_quant) got {got}, want "
                f"{want}"
            )
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias=False, config=config, device="meta"
        )
        packed._set_quantized(q)
        prefix = full_layer_name.removesuffix("weight")
        return {
            prefix + key: tensor
            for key, tensor in [*packed.named_parameters(), *packed.named_buffers()]
        }


class QLoraExtHfQuantizer(HfQuantizer):
    """transformers' interface to a quantization method, for `quant_method: qlora_ext`."""

    requires_calibration = False
    saves_as = "qlora_ext"  # what save_pretrained writes; `save_pretrained` below changes it
    given_state = None  # the state_dict that save_pretrained was given

    def __init__(self, quantization_config: QLoraExtConfig, **kwargs):
        # A copy: the list of kept layers is filled in per model, and the caller's object may be
        # meant for several models.
        # Names given for a packed checkpoint are no setting of the model: they are not saved.
        self.asked = quantization_config.__dict__.pop("_asked", [])
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.quant_config = self.quantization_config.to_quant_config()

    def validate_environment(self, *args, device_map=None, **kwargs):
        if (
            not self.pre_quantized
            and isinstance(device_map, dict)
            and "disk" in [str(device) for device in device_map.values()]
        ):
            raise ValueError(
                "QLoraExtConfig: device_map sends layers to disk, but a weight packed while "
                "loading exists only in memory. Load and save the 4-bit model once without "
                "'disk', then load that with this device_map."
            )

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        # False for a packed checkpoint: transformers then checks the tensors against the shapes.
        module, attribute = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, Linear4bit) and attribute == "weight"

    def get_quantize_ops(self):
        return Quantize(self)

    # The tensors under each `weight` of a bitsandbytes checkpoint.
    serialized_names: ClassVar = {
        "weight": [
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
        ]
    }

    def get_load_operations(self):
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            return {"deserialize": ReadBitsandbytes}
        return {}

    def update_weight_conversions(self, weight_conversions, model):
        # The base class would also copy the model's own conversions for the names above.
        return weight_conversions + self.get_weight_conversions()

    def get_state_dict_and_metadata(self, model):
        given = self.given_state
        floats = {k: t for k, t in (given or {}).items() if getattr(t, "dtype", None) in FLOATS}
        for name, tensor in floats.items():
            if ".lora_" not in name:
                check_finite(f"save_pretrained: {name}", local_part(tensor.detach()), tensor.dtype)
        # With a distributed_config transformers gathers what it sharded itself.
        is_whole = given is not None and not any(hasattr(t, "to_local") for t in given.values())
        if not is_whole and getattr(model.config, "distributed_config", None) is None:
            check_whole("save_pretrained", model)
            # Adapters are for the one who trains them; a checkpoint of a run is not refused.
            adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
            check_parameters("save_pretrained", model, skipped=adapters)
        if self.saves_as == "bitsandbytes":
            return _bitsandbytes_state_dict(model), {}
        if any(isinstance(module, _Lora) for module in model.modules()):
            # They are kept: a checkpoint of Trainer's is resumed from this file.
            warnings.warn(
                "save_pretrained: the file holds the quantized base and the adapters of add_lora; "
                "from_pretrained reads the base of it alone. qlora_ext.save_adapter(model, path) "
                "writes what load_adapter and PEFT read",
                stacklevel=4,
            )
        return given, {}

    def _process_model_before_weight_loading(
        self, model, dtype=None, checkpoint_files=None, **kwargs
    ):
        self._check_distribution(getattr(model.config, "distributed_config", None))
        self.checkpoint_files = checkpoint_files
        self.not_finite = []  # (parameter, dtype) of the weights that could not be packed
        config = self.quantization_config
        keep = as_names(config.modules_to_not_convert, "QLoraExtConfig")
        self.plan = plan = Plan(
            model,
            keep,
            stored=stored_layers(model, checkpoint_files, packed=self.pre_quantized),
            packed_checkpoint=self.pre_quantized,
            other_names=checkpoint_names(model) if keep or self.asked else (),
        )
        self._tell_packed(model, plan)
        if not self.pre_quantized:
            tell_unmatched("QLoraExtConfig", model, plan.unmatched())
        config.modules_to_not_convert = plan.kept
        packed = 0
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
                packed += 1  # when their values are there
                continue
            layer.requires_grad_(False)
            # transformers initialises what it finds missing with normal_, which bytes do not have;
            # what is missing here is refused below.
            for part in layer.modules():
                part._is_hf_initialized = True
            replace_module(model, module, layer, places)
            packed += 1
        if packed == 0:
            sentence = "QLoraExtConfig: found no linear layer to pack in"
            if self.pre_quantized:
                sentence = "QLoraExtConfig: found no packed layer in the checkpoint of"
            why = plan.bad_dtypes() or f"Kept as they are: {plan.kept}"
            raise ValueError(f"{sentence} {type(model).__name__}. {why}")

    def _tell_packed(self, model, plan: Plan) -> None:
        """Warns of layers that the caller wanted dense and a packed checkpoint has packed."""
        packed = [name for name in plan.names if plan.spelled.matches(name, self.asked)]
        if packed:
            rest = f" and {len(packed) - 8} more" if len(packed) > 8 else ""
            warnings.warn(
                f"QLoraExtConfig: modules_to_not_convert has no effect on a checkpoint that is "
                f"packed already, which decides: {', '.join(packed[:8])}{rest} of "
                f"{type(model).__name__} stay packed; to keep them dense, load the unquantized "
                "checkpoint with this list",
                stacklevel=2,
            )
        tell_unmatched("QLoraExtConfig", model, plan.unmatched(self.asked))

    def _check_distribution(self, config) -> None:
        """ValueError for a `DistributedConfig` that would cut packed weights into pieces."""
        if config is None:
            return
        sizes = {
            name: getattr(config, name, None) or 1 for name in ("tp_size", "ep_size", "pp_size")
        }
        cut = [name for name, size in sizes.items() if size > 1]
        if cut:
            raise ValueError(
                f"QLoraExtConfig: distributed_config with {', '.join(cut)} > 1 is not supported on "
                "4-bit layers; shard the loaded model with FSDP2, or cut its layers with "
                "qlora_ext.integrations.tensor_parallel"
            )
        if not self.pre_quantized:
            raise ValueError(
                "QLoraExtConfig: distributed_config reads pieces of a weight, and packing needs "
                "the whole; pack and save the model once without it"
            )

    def _pack_experts(self, model) -> None:
        """Packs the fused experts of a checkpoint that was not packed, one layer after another.

        transformers assembles them from several tensors of a checkpoint, so they are packed when
        the model is complete: until then they are in memory as they were stored.
        """
        dry_run = all(p.is_meta for p in model.parameters())  # device_map="meta"
        for name in self.plan.names:
            module = model.get_submodule(name)
            if not is_fused_experts(module):
                continue
            on_meta = any(p.is_meta for p in module.parameters())
            if not on_meta:
                for key, parameter in module.named_parameters():
                    values = local_part(parameter.detach())
                    check_read(model, f"{name}.{key}", values, self.checkpoint_files)
            if dry_run or not on_meta:
                replace_module(model, module, Experts4bit.from_experts(module, self.quant_config))

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.not_finite:
            name, dtype = self.not_finite[0]
            error = f"{name} has a NaN or an infinity in {dtype}"
            raise not_held(model, name, dtype, error, self.checkpoint_files)
        if not self.pre_quantized:
            self._pack_experts(model)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (Linear4bit, Embedding4bit))
        }
        # transformers assigns what it reads, past load_state_dict and its checks.
        missing = [
            f"{name}.{key}"
            for name, layer in layers.items()
            for key, parameter in layer.named_parameters()
            if key.startswith("weight") and not getattr(parameter, "_is_hf_initialized", False)
        ]
        if missing:
            advice = "put a layer that is to be trained from scratch in modules_to_not_convert"
            if self.pre_quantized:
                advice = "it is damaged: save the packed model again, or pack the unquantized one"
            layer = missing[0].rpartition(".")[0]
            where = file_of(model, f"{layer}.weight", self.checkpoint_files)
            raise CheckpointError(
                f"{type(model).__name__}: the checkpoint{where and f' ({where})'} lacks "
                f"{', '.join(missing)}; {advice}"
            )
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            # From here on the model is in our layout, and saving has nothing to convert back.
            self.quantization_config.checkpoint_format = "qlora_ext"
            model._weight_conversions = [
                conversion
                for conversion in model._weight_conversions
                if not any(
                    isinstance(op, ReadBitsandbytes) for op in getattr(conversion, "operations", [])
                )
            ]
        if self.pre_quantized:
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
            tell("QLoraExtConfig", model.quantization_report, least=0.0)
        del self.plan  # it holds the unpacked model's layers
        use_dense_panels(model)
        explain_errors(model)
        return model

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):  # what a saved config holds
            dtype = getattr(torch, dtype)
        leave_no_packed_layer(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    has_adapters = False  # add_lora's; Trainer knows PEFT's by itself

    @property
    def is_qat_trainable(self) -> bool:
        # Trainer's question whether a quantized model that is no PeftModel has weights to train.
        return self.has_adapters

    @property
    def is_compileable(self) -> bool:
        return True


# Checkpoints ---------------------------------------------------------------------------------


def from_pretrained(path: str | Path, *, model_class: Any = None, **kwargs: Any):
    """Loads a 4-bit model, ours or one that transformers and bitsandbytes saved.

    bitsandbytes itself is not needed. Its packed bytes are used as they are, so the dequantized
    weights are the same bit for bit.

    Args:
        path: folder or hub name.
        model_class: an Auto class or model class; None is AutoModelForCausalLM.
        kwargs: for its from_pretrained: dtype, device_map, ...; or settings of the model's config
            that are to be others than the checkpoint's: num_labels, use_cache, ...

    Raises:
        TypeError: a keyword that neither knows.
        ValueError: a checkpoint in neither format, or 8 bits; a folder whose files are damaged,
            hold a NaN or an infinity, or say what no model can be made of (CheckpointError, which
            names the file).
    """
    from ..checkpoint import check_nothing_anew, loading, read_config, stored_method

    hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    hub_kwargs = {key: kwargs[key] for key in (*hub, "trust_remote_code") if key in kwargs}
    config = kwargs.pop("config", None)
    elsewhere = {"subfolder", "variant", "gguf_file"} & kwargs.keys()
    local = os.path.isdir(path) and not elsewhere and not kwargs.get("trust_remote_code")
    files = stored_config = None
    if config is None and local:
        files = SafetensorsFiles(safetensors_files(Path(path)), any_dtype=True)
        # Its errors are the file's; those below, the keywords'.
        stored_config = read_config(Path(path), files)
    if config is None:
        # What the model's from_pretrained sets itself, and would not find any more.
        own = ("dtype", "torch_dtype", "quantization_config", "attn_implementation")
        own = {key: kwargs.pop(key) for key in own if key in kwargs}
        config, unused = transformers.AutoConfig.from_pretrained(
            path, return_unused_kwargs=True, **{**kwargs, **hub_kwargs}
        )
        kwargs = {**unused, **own, **hub_kwargs}
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    method = stored_method(config)
    source = f"{Path(path) / 'config.json'}: quantization_config"
    if method == QUANT_METHOD and local:
        with reading(source):
            QLoraExtConfig(**stored)
    if method == "bitsandbytes":
        with reading(source):
            ours = QLoraExtConfig.from_bnb(stored)
        ours.checkpoint_format = "bitsandbytes"
        config.quantization_config = ours.to_dict()
    elif method != QUANT_METHOD:
        raise ValueError(
            f"from_pretrained: {path} is quantized by {method}, want qlora_ext or bitsandbytes; "
            "to pack an unquantized model pass quantization_config=QLoraExtConfig() to "
            "transformers' from_pretrained"
        )
    model_class = model_class or transformers.AutoModelForCausalLM
    want_info = kwargs.pop("output_loading_info", False)
    kwargs["output_loading_info"] = True
    with loading(path, files, stored_config, kwargs) if local else contextlib.nullcontext():
        model, info = model_class.from_pretrained(path, config=config, **kwargs)
        # Another class than the saved one may have a head of its own, made anew to be trained.
        if type(model).__name__ in (config.architectures or ()):
            check_nothing_anew(path, model, info["missing_keys"])
    return (model, info) if want_info else model


def save_pretrained(
    model: torch.nn.Module, path: str | Path, *, format: str = "qlora_ext", **kwargs: Any
) -> None:
    """Saves a 4-bit transformers model in our layout or in bitsandbytes'.

    Args:
        model: a model with `Linear4bit` layers.
        path: folder.
        format: 'qlora_ext', or 'bitsandbytes' for stock transformers + bitsandbytes.
        kwargs: for `model.save_pretrained`: max_shard_size, ...

    Raises:
        ValueError: an unknown format, a model that is not packed, or settings that bitsandbytes
            has no name for (another codebook, one scale a weight, means, packed embeddings), or
            layers that transformers does not pack for it (Falcon's).
    """
    if format not in CHECKPOINT_FORMATS:
        raise ValueError(
            f"save_pretrained: format got {format!r}, want one of {CHECKPOINT_FORMATS}"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QLoraExtHfQuantizer):
        raise ValueError(f"save_pretrained: {type(model).__name__} is not quantized by qlora_ext")
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            "save_pretrained: the model has adapters of PEFT; save those with the PEFT model's own "
            "save_pretrained, and here what its unload() returns"
        )
    if format == "qlora_ext":
        model.save_pretrained(path, **kwargs)
        return
    if kwargs.get("state_dict") is not None:
        raise ValueError(
            "save_pretrained: state_dict holds our layout, want it with format='qlora_ext' only"
        )
    check_in_memory("save_pretrained", model, "load it without 'cpu' and 'disk' in device_map")
    ours = model.config.quantization_config
    model.config.quantization_config = _bitsandbytes_config(model, quantizer.quantization_config)
    quantizer.saves_as = format
    try:
        model.save_pretrained(path, **kwargs)
    finally:
        quantizer.saves_as = "qlora_ext"
        model.config.quantization_config = ours


def _bitsandbytes_config(model, config: QLoraExtConfig) -> dict[str, Any]:
    """What BitsAndBytesConfig writes into config.json, for these settings."""
    unknown_there = (
        config.quant_type not in ("nf4", "fp4")
        or config.normalization != "absmax"
        or config.companding != "none"
        or config.blocksize is None
        or any(isinstance(module, (Embedding4bit, Experts4bit)) for module in model.modules())
    )
    if unknown_there:
        raise ValueError(
            "save_pretrained: bitsandbytes has only nf4 and fp4, linear layers, one scale per "
            f"block; the model has {config.to_quant_config()}"
        )
    from ..checkpoint import build, unquantized

    dense = dict(build(unquantized(model.config), model.dtype, type(model)).named_modules())
    for name, module in model.named_modules():
        kind = type(dense.get(name)) if isinstance(module, Linear4bit) else torch.nn.Linear
        if kind not in (torch.nn.Linear, Conv1D):
            raise ValueError(
                f"save_pretrained: {name} is a {kind.__name__} in {type(model).__name__}, which "
                "stock transformers leaves unpacked for bitsandbytes; want format='qlora_ext'"
            )
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_blocksize": config.blocksize,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _skip_modules(model, config.modules_to_not_convert or []),
        "llm_int8_threshold": 6.0,
    }


def _skip_modules(model, kept: list[str]) -> list[str]:
    """The names that keep `kept` and no other layer dense in stock transformers, which takes a
    name for every layer whose own name ends with it, in the midst of a word too."""
    packed = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    # With "$" it is a regular expression there, for the whole name.
    return [
        f"{name}$" if any(not should_convert_module(p, [name]) for p in packed) else name
        for name in kept
    ]


def _bitsandbytes_state_dict(model) -> dict[str, torch.Tensor]:
    """The model's state dict with packed weights under bitsandbytes' keys."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            for key in [*module._sizes(), "weight_codebook"]:
                del state[f"{name}.{key}"]
            state.update(module.quantized.state_dict(f"{name}.weight"))
    return state


# Dense again ---------------------------------------------------------------------------------


def dense_linear(layer: Linear4bit, dtype: torch.dtype, weight=None) -> torch.nn.Linear:
    """`layer` as an `nn.Linear` in `dtype`, frozen; `as_it_was` makes a Conv1D of it again.

    Args:
        layer: the packed layer [out, in].
        dtype: of weight and bias.
        weight: [out, in]; None dequantizes the layer's own.
    """
    if weight is None:
        weight = dequantize_4bit(layer.quantized, dtype)
    linear = torch.nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = torch.nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    linear.from_conv1d = layer.from_conv1d
    return linear.train(layer.training)


def as_it_was(linear: torch.nn.Linear) -> torch.nn.Module:
    """A dense layer in the class it had before packing: GPT-2's are Conv1D, [in, out]."""
    if not getattr(linear, "from_conv1d", False):
        return linear
    conv1d = Conv1D(linear.out_features, linear.in_features)
    conv1d.weight = torch.nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
    if linear.bias is not None:
        conv1d.bias = linear.bias
    return conv1d.train(linear.training)


def leave_no_packed_layer(model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes every packed layer of a model dense, in place.

    The model is an ordinary one afterwards: saving it writes no quantization config.

    Args:
        dtype: of the result; None keeps that of each parameter, and of each packed layer the one
            that it stands for.

    Raises:
        OverflowError: that dtype cannot hold a weight. ValueError: weights are offloaded. The model
            is then as it was.
    """
    check_in_memory("dequantize", model, "load it without 'cpu' and 'disk' in device_map")
    check_parameters("dequantize", model, dtype)
    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Embedding4bit)):
            check_weight(f"dequantize: {name}.weight", module, dtype or module.dtype)
    if dtype is not None:
        model.to(dtype)
    done = set()  # experts become one dense module with the layer that holds them
    for module in list(model.modules()):
        if module in done:
            continue
        if isinstance(module, Experts4bit):
            done.update(module.modules())
            first = module.packed[0].up
            dtype = getattr(first, "dtype", first.weight.dtype)
            replace_module(model, module, dense_layer(module, dtype).requires_grad_(False))
        elif type(module) is PanelLinear:
            replace_module(model, module, dense_layer(module, module.weight.dtype))
        elif isinstance(module, (Linear4bit, Embedding4bit)):
            replace_module(model, module, dense_layer(module, module.dtype).requires_grad_(False))
        elif getattr(module, "from_conv1d", False):
            replace_module(model, module, as_it_was(module))
    unwatch(model)
    mark_quantized(model, False)
    model.__dict__.pop("quantization_report", None)
    if isinstance(getattr(model, "hf_quantizer", None), QLoraExtHfQuantizer):
        model.hf_quantizer.remove_quantization_config(model)


def _headers(checkpoint_files) -> dict[str, tuple[str, int, Path]]:
    """Key -> dtype as safetensors names it, bytes and file, of every tensor of a checkpoint.

    Raises:
        CheckpointError: a safetensors file that is damaged. Of another file that cannot be read
            transformers' loader says what is wrong.
    """
    paths = [Path(file) for file in checkpoint_files or []]
    others = [path for path in paths if path.suffix != ".safetensors"]
    tensors = SafetensorsFiles([path for path in paths if path not in others], any_dtype=True)
    found = {
        key: (dtype, tensors.nbytes(key), tensors.where[key])
        for key, dtype in tensors.stored.items()
    }
    for path in others:
        try:
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception:
            return {}
        for key, tensor in state.items():
            dtype = "U8" if tensor.dtype == torch.uint8 else str(tensor.dtype)
            found[key] = dtype, tensor.nbytes, path
    return found


def check_loaded(model, checkpoint_files) -> None:
    """Checks the dense weights and saved buffers of a model that was just read: norms, biases,
    embeddings, heads. Packed statistics are checked by their layers.

    Args:
        checkpoint_files: the paths it was read from, or None; for the error.

    Raises:
        CheckpointError: one holds a NaN or an infinity, in the file or after the cast to the
            model's dtype; names file and tensor. Infinities of a buffer's mask are none.
    """
    buffers = {
        f"{name}.{key}".lstrip("."): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        if tensor.dtype not in FLOATS or lacks_data(tensor):
            continue
        values = local_part(tensor.detach())
        if name in buffers:
            values = without_mask(values)
        check_read(model, name, values, checkpoint_files)


def check_read(model, name: str, values: torch.Tensor, checkpoint_files) -> None:
    """CheckpointError, as `not_held`, for values of a tensor of a model that are not finite."""
    try:
        check_finite(name, values, values.dtype)
    except OverflowError as error:
        raise not_held(model, name, values.dtype, error, checkpoint_files) from None


def not_held(model, name: str, dtype: torch.dtype, error, checkpoint_files) -> CheckpointError:
    """The error for a tensor of a model that was read in a dtype and is not finite there: it names
    file and tensor, and says whether another dtype helps or the file itself is damaged.

    Args:
        error: what is said where the file's tensor is not known.
    """
    files, keys = sources_of(model, name, checkpoint_files)
    for key in keys:
        if files.dtypes.get(key) not in FLOATS:
            continue
        values = files[key]
        is_damaged = not values.isfinite().all()
        try:
            check_finite(key, values, dtype)
        except OverflowError as found:
            stored = values.dtype
            advice = f"it is stored in {stored}: load it with that dtype"
            if is_damaged:
                advice = "the file itself holds that: it is damaged, download or save it again"
            return CheckpointError(f"{files.where[key]}: {found}; {advice}")
    where, key = (f"{files.where[keys[0]]}: ", keys[0]) if keys else ("", name)
    return CheckpointError(f"{where}{str(error).replace(name, key, 1)}")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sources_of(model, name: str, checkpoint_files) -> tuple[SafetensorsFiles, list[str]]:
    """The files of a model, and the names there of what makes one of its tensors; no names where
    they are not known."""
    paths = [Path(file) for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
    files = SafetensorsFiles([])
    try:
        files = SafetensorsFiles(paths, any_dtype=True)
        conversions = get_model_conversion_mapping(model, None, None)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        return files, [
            key
            for key in files
            if rename_source_key(key, renamings, converters, prefix, state)[0] == name
        ]
    except Exception:  # an error is being reported, which says more than this one
        return files, []


def file_of(model, name: str, checkpoint_files) -> str:
    """The file that a tensor of a model comes from, "" where it is not known."""
    files, keys = sources_of(model, name, checkpoint_files)
    return str(files.where[keys[0]]) if keys else ""


def stored_layers(model, checkpoint_files, packed: bool) -> Stored | None:
    """What a checkpoint holds of a model's layers, under the names that they have in the model;
    None where its tensors cannot be told.

    Args:
        model: the unpacked model, on meta.
        packed: whether the checkpoint's config says that it is packed.

    Raises:
        ValueError: a tensor of a packed layer that is not bytes. transformers would cast it.
        CheckpointError: a layer of which some packed tensors are there and others are not.
    """
    headers = _headers(checkpoint_files)
    if not headers:
        return None
    ours, all_packed = set(), set()
    if packed:
        owner = {key: key.rpartition(".")[::2] for key in headers}
        ours = {layer for layer, kind in owner.values() if kind in _PACKED_KEYS[1:]}
        for key, (layer, kind) in owner.items():
            if layer in ours and kind in _PACKED_KEYS and headers[key][0] != "U8":
                raise ValueError(
                    f"{key}: dtype got {headers[key][0]}, want U8, packed bytes; the checkpoint "
                    "was changed after it was saved"
                )
        for key, (layer, kind) in owner.items():
            lacks = [k for k in _ALWAYS if f"{layer}.{k}" not in headers] if layer in ours else []
            if lacks and kind in _PACKED_KEYS:
                raise CheckpointError(
                    f"{headers[key][2]}: {key} is there, and the checkpoint lacks "
                    f"{', '.join(f'{layer}.{k}' for k in lacks)}; it is damaged: save the packed "
                    "model again, or pack the unquantized one"
                )
        theirs = {key.rpartition(".weight.")[0] for key in headers if ".weight." in key}
        alone = {
            key.removesuffix(".weight")
            for key, (dtype, _, _) in headers.items()
            if key.endswith(".weight") and dtype == "U8"
        }
        all_packed = ours | theirs | alone
    sizes: dict[str, int] = {}
    dense, names, unknown = set(), {}, set()
    for key, targets in _targets(model, headers).items():
        stored_as = key.removesuffix(".weight")
        if not targets and key.endswith(".weight"):
            unknown.add(stored_as)
        for target in targets:
            layer = target.removesuffix(".weight")
            if stored_as in all_packed:
                sizes[layer] = headers[key][1]
            else:
                dense.add(layer)
            names[layer] = stored_as
    for name, module in model.named_modules():
        if is_fused_experts(module):
            if _holds_experts(ours, name):
                sizes[name] = 0
        elif name not in sizes and name not in dense and is_plain_linear(module):
            # A name that transformers' renaming does not know (`key_mapping`): by its end.
            ends = [one for one in unknown if _same_end(one, name)]
            if ends and ends[0] in all_packed:
                sizes[name] = headers[f"{ends[0]}.weight"][1]
            elif ends:
                dense.add(name)
    saved = getattr(model.config, "architectures", None) or []
    return Stored(
        packed=sizes,
        dense=frozenset(dense),
        same_class=type(model).__name__ in saved and not unknown,
        names=names,
    )


def _same_end(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _targets(model, keys) -> dict[str, list[str]]:
    """Tensor of a checkpoint -> the weights of model that transformers' loader makes of it."""
    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        targets = [name]
        if pattern is not None:  # one tensor may become several
            first, *others = by_pattern[pattern].target_patterns
            targets += [name.replace(first, other, 1) for other in others]
        found[key] = [t for t in targets if t.endswith(".weight") and t in state]
    return found


def checkpoint_names(model) -> list[dict[str, str]]:
    """Layer of a transformers model -> its name in the files that the class is saved in, where
    that is another one: LLaVA's files say `language_model.model` for `model.language_model`. A
    model that was loaded has a second mapping, for the file that it was read from."""
    of_file = getattr(model, "_weight_conversions", None)
    of_class = get_model_conversion_mapping(model, add_legacy=False)
    found = [_saved_names(model, c) for c in (of_class, of_file) if c is not None]
    return [names for names in found if names]


def _saved_names(model, conversions: list) -> dict[str, str]:
    back = []
    for conversion in conversions[::-1]:
        try:
            back.append(conversion.reverse_transform())
        except (ValueError, NotImplementedError):  # one that has no way back
            continue
    renamings = [c for c in back if isinstance(c, WeightRenaming)]
    converters = [c for c in back if isinstance(c, WeightConverter)]
    found = {}
    for name, module in model.named_modules():
        if is_plain_linear(module):
            key, pattern = rename_source_key(f"{name}.weight", renamings, converters, reverse=True)
            if pattern is None and key != f"{name}.weight":
                found[name] = key.removesuffix(".weight")
        elif is_fused_experts(module):
            # A file has a tensor per expert and name: `block_sparse_moe.experts.*.w1.weight`.
            own = f"{name}.{weight_names(module)[0]}"
            key, _ = rename_source_key(own, renamings, converters, reverse=True)
            stored = key.partition(".*")[0] if ".*" in key else key.rpartition(".")[0]
            if stored != name:
                found[name] = stored
    return found


def _holds_experts(stored: set[str], name: str) -> bool:
    """Whether packed experts are among the `stored` layers under the end of `name`, in the same
    layer of the stack: a checkpoint may spell what is before it in another way (Mixtral's
    `block_sparse_moe.experts`)."""
    first = f"{name.rpartition('.')[2]}.packed.0.up"
    places = (key.removesuffix(first) for key in stored if f".{key}".endswith(f".{first}"))
    return any(_numbers(place) == _numbers(name) for place in places)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def mark_quantized(model, quantized: bool = True) -> None:
    """Sets or removes what tells transformers' own code that weights of a model are packed."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            if quantized:
                part.config._is_quantized = True
            else:
                part.config.__dict__.pop("_is_quantized", None)


def logical_surplus(module: torch.nn.Module) -> int:
    """How many weights `module` stands for beyond the elements of its parameters.

    A packed weight has two weights a byte, and its scale statistics are not weights.
    """
    surplus = 0
    for child in module.modules():
        if is_packed(child):
            stored = sum(
                parameter.numel()
                for name, parameter in child.named_parameters(recurse=False)
                if name.startswith("weight")
            )
            surplus += child._shape.numel() - stored
    return surplus


def _count_logical_weights(original):
    """Wraps `PreTrainedModel.num_parameters`."""

    @functools.wraps(original)
    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = original(self, only_trainable, exclude_embeddings)
        return count if only_trainable else count + logical_surplus(self)

    return num_parameters


def _write_what_is_given(original):
    """Wraps `PreTrainedModel.save_pretrained`, which for a quantized model drops the `state_dict`
    that it is given, and writes the model's."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kw):
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, QLoraExtHfQuantizer):
            return original(self, save_directory, is_main_process, state_dict, *args, **kw)
        quantizer.given_state = state_dict
        try:
            return original(self, save_directory, is_main_process, state_dict, *args, **kw)
        finally:
            quantizer.given_state = None

    return save_pretrained


def _refuse_packed_resize(original):
    """Wraps `PreTrainedModel._get_resized_embeddings` and `_get_resized_lm_head`, which would copy
    rows of bytes. The head is looked at with the embedding, before that is replaced."""

    @functools.wraps(original)
    def get_resized(self, old, new_num_tokens=None, *args, **kwargs):
        layers = [old]
        if old is self.get_input_embeddings():
            layers.append(output_embeddings(self))
        # PEFT's layers hold the model's own.
        bases = [x.get_base_layer() if hasattr(x, "get_base_layer") else x for x in layers]
        # The second positional argument is the multiple of embeddings only.
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
                f"resize_token_embeddings: {type(self).__name__} has {packed._shape[0]} rows in "
                f"its {type(packed).__name__}, and {want} are wanted; packed rows cannot be added "
                "or dropped: resize the unquantized model before it is packed, or pack it with "
                f"{setting}"
            )
        return original(self, old, new_num_tokens, *args, **kwargs)

    return get_resized


def _keep_what_was_asked(original):
    """Wraps `AutoHfQuantizer.merge_quantization_configs`, which drops the caller's config where
    the checkpoint has one."""

    @functools.wraps(original)
    def merge_quantization_configs(cls, quantization_config, quantization_config_from_args):
        merged = original(quantization_config, quantization_config_from_args)
        asked = quantization_config_from_args
        if isinstance(merged, QLoraExtConfig) and isinstance(asked, QLoraExtConfig):
            merged._asked = as_names(asked.modules_to_not_convert, "QLoraExtConfig")
        return merged

    return classmethod(merge_quantization_configs)


def attach() -> None:
    """Registers the config and the quantizer with transformers. Idempotent.

    Raises:
        AttributeError, ImportError: a transformers that lacks what is hooked.
    """
    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
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
