"""Quantizing while loading: transformers' `from_pretrained(quantization_config=QLoraExtConfig())`.

transformers reads a checkpoint tensor by tensor into a model on the meta device. The quantizer here
swaps the linear layers of that model for `Linear4bit` and turns each of their weights into packed
bytes as it arrives, so the peak stays near one layer above the result. A saved model carries
`quant_method: qlora_ext` in its config and is read back without being told.

Sources: transformers/quantizers/base.py (the interface), quantizer_bnb_4bit.py (its closest peer).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..merge import _dense
from ..models import replace_module
from ..nn import Embedding4bit, Linear4bit, is_plain_linear
from ..quantized_tensor import QuantConfig, dequantize_4bit

QUANT_METHOD = "qlora_ext"


class QLoraExtConfig(QuantizationConfigMixin):
    """How `from_pretrained` packs the linear layers of a model into 4 bits.

    Args:
        quant_type: 'nf4', 'fp4', 'linear' or 'custom' (with `codebook`).
        blocksize: weights per scale, a power of two from 32 to 4096; None is one scale a weight.
        double_quant: store the scales in 8 bits (4.127 bits per weight at block 64, else 4.5).
        modules_to_not_convert: names (ends, starts or regular expressions, as transformers matches
            them) of layers to leave alone, besides the output head, tied weights and what the
            model class protects in fp32, which are always left alone.
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
        modules_to_not_convert: list[str] | None = None,
        **settings: Any,
    ):
        settings.pop("quant_method", None)  # config.json carries it
        known = {field.name for field in dataclasses.fields(QuantConfig)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"QLoraExtConfig: got unknown settings {unknown}")
        self.quant_method = QUANT_METHOD
        self.modules_to_not_convert = modules_to_not_convert
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
        dtype of the activations, and store bytes.

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
            linear = torch.nn.Linear(
                module.in_features, module.out_features, bias=False, device="meta"
            )
            linear.weight = torch.nn.Parameter(value, requires_grad=False)
            packed = Linear4bit.from_linear(linear, self.hf_quantizer.quant_config)
            prefix = name.removesuffix("weight")
            result.update({prefix + key: t for key, t in packed.named_parameters()})
            result.update({prefix + key: t for key, t in packed.named_buffers()})
        return result


class QLoraExtHfQuantizer(HfQuantizer):
    """transformers' interface to a quantization method, for `quant_method: qlora_ext`."""

    requires_calibration = False

    def __init__(self, quantization_config: QLoraExtConfig, **kwargs):
        # A copy: the list of kept layers is filled in per model, and the caller's object may be
        # meant for several models.
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

    def _process_model_before_weight_loading(
        self, model, dtype=None, checkpoint_files=None, **kwargs
    ):
        # As the checkpoint spells them: names can differ from the model's by a prefix.
        stored = _packed_layers(checkpoint_files) if self.pre_quantized else set()

        def is_stored(name: str) -> bool:
            return any(key == name or key.endswith(f".{name}") for key in stored)

        kept = set(self.quantization_config.modules_to_not_convert or [])
        by_default = set(get_keys_to_not_convert(model))
        if self.pre_quantized:
            # The saved list says what was kept. A class with another head (or none) than the one
            # that was saved has other defaults.
            kept |= {name for name in by_default if not is_stored(name)}
        else:
            kept |= by_default
            kept |= set(getattr(model, "_keep_in_fp32_modules", None) or [])
            kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
        self.quantization_config.modules_to_not_convert = sorted(kept)
        packed = 0
        for name, module in list(model.named_modules()):
            if is_plain_linear(module) and should_convert_module(name, kept):
                layer = Linear4bit.empty_like(module, self.quant_config, dtype=dtype)
            elif type(module) is torch.nn.Embedding and is_stored(name):
                layer = Embedding4bit.from_embedding(module, self.quant_config)
            else:
                continue
            layer.requires_grad_(False)
            # transformers initialises what it finds missing with normal_, which bytes do not have;
            # what is missing here is refused below.
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)
            packed += 1
        if packed == 0:
            raise ValueError(
                f"QLoraExtConfig: found no linear layer to pack in {type(model).__name__} "
                f"(kept as they are: {sorted(kept)})"
            )

    def _process_model_after_weight_loading(self, model, **kwargs):
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
            raise ValueError(
                f"{type(model).__name__}: the checkpoint lacks {', '.join(missing)}; put a layer "
                "that is to be trained from scratch in modules_to_not_convert"
            )
        damage = [
            sentence
            for name, layer in layers.items()
            for sentence in layer._check_state(layer.state_dict(prefix=f"{name}."), f"{name}.")
        ]
        if damage:
            raise ValueError("; ".join(damage))
        if not self.pre_quantized:
            packed = sum(layer.quantized.numel() for layer in layers.values())
            _warn_of_dense(model, packed, self.quantization_config.modules_to_not_convert)
        return model

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):  # what a saved config holds
            dtype = getattr(torch, dtype)
        if dtype is not None:
            model.to(dtype)
        leave_no_packed_layer(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


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


def leave_no_packed_layer(model: torch.nn.Module) -> None:
    """Makes every packed layer of a model dense, in the dtype the layer stands for, in place.

    The model is an ordinary one afterwards: saving it writes no quantization config.
    """
    for module in list(model.modules()):
        if isinstance(module, (Linear4bit, Embedding4bit)):
            replace_module(model, module, _dense(module, module.dtype).requires_grad_(False))
        elif getattr(module, "from_conv1d", False):
            replace_module(model, module, as_it_was(module))
    if isinstance(getattr(model, "hf_quantizer", None), QLoraExtHfQuantizer):
        model.hf_quantizer.remove_quantization_config(model)


def _packed_layers(checkpoint_files) -> set[str]:
    """Names of the layers that the checkpoint holds packed, as the checkpoint spells them."""
    suffix = ".weight_absmax"
    names = set()
    for file in checkpoint_files or []:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                keys = tensors.keys()
            names |= {key.removesuffix(suffix) for key in keys if key.endswith(suffix)}
    return names


def _warn_of_dense(model, packed: int, kept: list[str]) -> None:
    """Warns of matrices that are neither packed (`packed` weights are), nor kept on purpose, nor
    embeddings: the fused experts of a mixture, say."""
    embeddings = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
    }
    left = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        if parameter.ndim < 2 or not parameter.is_floating_point() or layer in embeddings:
            continue
        if should_convert_module(layer, kept):
            left[name] = parameter.numel()
    if left:
        share = sum(left.values()) / (packed + sum(left.values()))
        names = ", ".join(list(left)[:8]) + (", ..." if len(left) > 8 else "")
        warnings.warn(
            f"qlora_ext: {share:.1%} of the layer weights stay unpacked, in {len(left)} tensors: "
            f"{names}",
            stacklevel=2,
        )


def logical_surplus(module: torch.nn.Module) -> int:
    """How many weights `module` stands for beyond the elements of its parameters.

    A packed weight has two weights a byte, and its scale statistics are not weights.
    """
    surplus = 0
    for child in module.modules():
        if isinstance(child, (Linear4bit, Embedding4bit)):
            stored = sum(
                parameter.numel()
                for name, parameter in child.named_parameters(recurse=False)
                if name.startswith("weight")
            )
            surplus += child.quantized.numel() - stored
    return surplus


def _count_logical_weights(original):
    """Wraps `PreTrainedModel.num_parameters`."""

    @functools.wraps(original)
    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = original(self, only_trainable, exclude_embeddings)
        return count if only_trainable else count + logical_surplus(self)

    return num_parameters


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


attach()
