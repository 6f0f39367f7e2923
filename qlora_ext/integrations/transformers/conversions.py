"""Converts tensors while transformers loads them: packs weights, reads bitsandbytes' bytes, and
stacks experts that an older version packed one by one."""

from __future__ import annotations

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from ...nn.experts import is_fused_experts, pack_stack, stack_names
from ...nn.linear import Linear4bit
from ...nn.packed import _PACKED_KEYS
from ...tensor.functions import quantize_tensor
from ...tensor.quantized import QuantizedTensor


class Quantize(ConversionOps):
    """Packs one weight that transformers has just read, on the weight's device."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, *args, model=None, **kwargs):
        """input_dict: full parameter name -> dense weight [out, in] (a Conv1D's is [in, out]).

        Returns the packed weight and its statistics under their names in the model.
        """
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, attribute = get_module_from_name(model, name)
            if is_fused_experts(module) and attribute in stack_names(module):
                result[name] = self._stack(name, module, value)
                continue
            if not isinstance(module, Linear4bit) or attribute != "weight":
                result[name] = value
                continue
            if module.from_conv1d:
                value = value.T.contiguous()
            want = (module.out_features, module.in_features)
            if tuple(value.shape) != want:
                raise ValueError(f"{name}: shape got {tuple(value.shape)}, want {want}")
            if value.is_meta:  # device_map="meta": only shapes are packed
                module._set_empty(value.device)
                packed = {key: module._parameters[key] for key in module._sizes()}
                packed["weight_codebook"] = module._parameters["weight_codebook"]
            else:
                try:
                    q = quantize_tensor(value, module.config)
                except RuntimeError:
                    if value.isfinite().all():
                        raise
                    # An error raised here would end in transformers' report, which names no file.
                    # So note it; the quantizer raises after loading.
                    self.hf_quantizer.not_finite.append((name, value.dtype))
                    q = quantize_tensor(torch.zeros_like(value), module.config)
                packed = module._as_parameters(q)
            prefix = name.removesuffix("weight")
            result.update({prefix + key: parameter for key, parameter in packed.items()})
        return result

    def _stack(self, name: str, experts, value: torch.Tensor) -> torch.Tensor:
        """Packs a stack of experts and leaves it with the quantizer, which puts both stacks of a
        layer into the model after loading. Returns what stands for the dense stack until then: a
        tensor of its shape that takes no memory."""
        quantizer = self.hf_quantizer
        attribute = name.rpartition(".")[2]
        if value.is_meta or value.shape != getattr(experts, attribute).shape:  # reported later
            return value
        try:
            stack = pack_stack(experts, attribute, quantizer.quant_config, value)
        except RuntimeError:
            if value.isfinite().all():
                raise
            quantizer.not_finite.append((name, value.dtype))
            return value
        quantizer.stacks[name] = stack
        return value.new_zeros(()).expand(value.shape)


class ReadBitsandbytes(ConversionOps):
    """Reads one weight of a checkpoint that bitsandbytes packed, with its statistics."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, *args, model=None, full_layer_name=None, **kwargs):
        """input_dict: `weight`, `weight.absmax`, ... -> the tensors of layer `full_layer_name`.

        Raises:
            ValueError, KeyError: statistics are missing or damaged, or have other settings than
                config.json.
        """
        tensors = {key: t[0] if isinstance(t, list) else t for key, t in input_dict.items()}
        layer, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, Linear4bit):
            # The weight is not packed (a norm, say). transformers does not cast what an op returns.
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


class StackSingles(ConversionOps):
    """Stacks one tensor of every expert of a layer. Of the codebook, which all share, one stays."""

    def convert(self, input_dict, *args, target_patterns=None, **kwargs):
        ((_, tensors),) = input_dict.items()
        (target,) = target_patterns
        return {target: tensors[0] if target.endswith("weight_codebook") else torch.stack(tensors)}


def singles_stacked() -> list[WeightConverter]:
    """Converters for checkpoints of the version that packed a mixture expert by expert, under
    `experts.packed.7.up.weight`. They give today's `experts.up.weight`."""
    return [
        WeightConverter(f"packed.*.{side}.{key}", f"{side}.{key}", [StackSingles()])
        for side in ("up", "down")
        for key in (*_PACKED_KEYS, "bias")
    ]


def reads_other_format(conversion) -> bool:
    """Whether a conversion reads another format of packed weights. Saving must not reverse it."""
    ops = getattr(conversion, "operations", ())
    return any(isinstance(op, (ReadBitsandbytes, StackSingles)) for op in ops)
