"""Converts tensors while transformers loads them: packs weights, reads bitsandbytes' bytes, and
stacks experts that an older version packed one by one."""

from __future__ import annotations

import contextlib
import copy
import ctypes
from collections import defaultdict
from collections.abc import Iterable

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.quantizers.quantizers_utils import get_module_from_name

from ...nn.experts import Experts4bit, is_fused_experts
from ...nn.linear import Linear4bit
from ...nn.packed import _PACKED_KEYS, _Packed4bit
from ...nn.stack import Stack4bit
from ...tensor.functions import quantize_tensor
from ...tensor.quantized import QuantizedTensor
from .versions import saved_key


class Quantize(ConversionOps):
    """Packs one weight that transformers has just read, on the weight's device."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, *args, model=None, **kwargs):
        """input_dict: full parameter name -> dense weight [out, in] (a Conv1D's is [in, out]).

        Returns the packed weight and its statistics under their names in the model. A stack of
        experts goes into the quantizer's `stacks`; what is returned for it holds no values.
        """
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, attribute = get_module_from_name(model, name)
            if is_fused_experts(module):
                for e, expert in enumerate(value):
                    self.add_expert(model, name, e, len(value), expert)
                result[name] = self.in_its_place(model, name, value)
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
                    # transformers would only report an error that is raised here, without the file.
                    # So note it; the quantizer raises after loading.
                    self.hf_quantizer.not_finite.append((name, value.dtype))
                    q = quantize_tensor(torch.zeros_like(value), module.config)
                packed = module._as_parameters(q)
            prefix = name.removesuffix("weight")
            result.update({prefix + key: parameter for key, parameter in packed.items()})
        return result

    def add_expert(self, model, name: str, e: int, count: int, value: torch.Tensor) -> None:
        """Packs expert e of `count` into the stack that becomes the model's parameter `name`.

        A shape or value that does not fit is noted, for an error after loading that names the file.
        """
        quantizer = self.hf_quantizer
        module, attribute = get_module_from_name(model, name)
        got, want = (count, *value.shape), tuple(module._parameters[attribute].shape)
        if got != want:
            quantizer.other_shapes[name] = got, want
            return
        if value.is_meta:
            return
        if name not in quantizer.stacks:
            shape = (count, *(value.T if module.is_transposed else value).shape)
            quantizer.stacks[name] = Stack4bit.empty(
                shape,
                quantizer.quant_config,
                dtype=value.dtype,
                device=value.device,
                is_transposed=module.is_transposed,
            )
        try:
            quantizer.stacks[name].set_expert(e, value)
        except RuntimeError:
            if value.isfinite().all():
                raise
            quantizer.not_finite.append((name, value.dtype))

    @staticmethod
    def in_its_place(model, name: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter for transformers to set: an empty one, or on meta the model's own."""
        return model.get_parameter(name) if value.is_meta else value.new_empty(0, 0, 0)


class ByExpert(WeightConverter):
    """A converter that makes a stack of experts from one or two tensors of each expert. If the
    stack is packed on loading, it reads and packs the experts one after another."""

    __slots__ = ()

    def convert(self, layer_name, model=None, **kwargs):
        packing, readers = self.quantization_operation, dict(self.collected_tensors)
        counts = {len(each) for each in readers.values()}
        complete = len(readers) == len(self.source_patterns) and len(counts) == 1
        if not isinstance(packing, Quantize) or not complete:
            return super().convert(layer_name, model=model, **kwargs)
        self.quantization_operation = None
        (count,) = counts
        result, freed = {}, 0
        for e in range(count):
            for pattern, each in readers.items():
                self.collected_tensors[pattern], each[e] = [each[e]], None
            for name, value in super().convert(layer_name, model=model, **kwargs).items():
                packing.add_expert(model, name, e, count, value[0])
                result[name] = packing.in_its_place(model, name, value)
                freed += value.nbytes
            if freed > 2**26 or e == count - 1:
                _return_freed_memory()
                freed = 0
        return result


def _return_freed_memory() -> None:
    """Makes glibc return freed memory to the system. Without this it kept half of the dense experts
    that were read and dropped: 400 MB of 770."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def by_expert(conversion):
    """A conversion for loading as a ByExpert, if it treats each expert alone; else unchanged."""
    first, *rest = getattr(conversion, "operations", None) or [None]
    if (
        type(first) is not MergeModulelist
        or first.dim != 0
        or type(conversion) is not WeightConverter
    ):
        return conversion
    if any(type(op) is not Concatenate or op.dim < 1 for op in rest):
        return conversion
    conversion = copy.copy(conversion)
    conversion.__class__ = ByExpert
    return conversion


def as_given(conversion):
    """Undoes `by_expert`, for saving."""
    if type(conversion) is ByExpert:
        conversion = copy.copy(conversion)
        conversion.__class__ = WeightConverter
    return conversion


def with_those_of_packed(model, conversions: list) -> list:
    """`conversions`, which read a packed checkpoint, and those of the class for its packed layers.
    The packed checkpoint did not need these, but saving does once the layers are made dense."""
    dense, packed = [], []
    for name, module in model.named_modules():
        if isinstance(module, Experts4bit):
            dense += [f"{name}.{key}" for key in module.stacks()]
            packed += [f"{name}.{key}" for key, _ in module.named_parameters()]
    made = {tuple(c.target_patterns) for c in conversions}
    added = []
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        if tuple(conversion.target_patterns) in made:
            continue
        if type(conversion) is WeightRenaming:
            back = [conversion.reverse_transform()]
            renames = [any(saved_key(n, back, [])[0] != n for n in ns) for ns in (dense, packed)]
            if renames == [True, False]:
                added.append(conversion)
        elif by_expert(conversion) is not conversion or _saves_packed(conversion, model):
            added.append(conversion)
    return conversions + added


def without_those_of_packed(model, conversions: list) -> list:
    """`conversions` without those that would fuse, cut or permute packed weights when transformers
    reverses them to save the model. Our files have packed layers under their names in the model."""
    return [conversion for conversion in conversions if not _saves_packed(conversion, model)]


def _saves_packed(conversion, model) -> bool:
    """Whether a conversion changes a tensor of a packed layer when it is reversed."""
    if not isinstance(conversion, WeightConverter):
        return False
    try:
        back = conversion.reverse_transform()
    except (ValueError, NotImplementedError):  # it cannot be reversed, and saving says so
        return False
    return any(
        saved_key(f"{name}.weight", [], [back])[1] is not None
        for name, module in model.named_modules()
        if isinstance(module, _Packed4bit)
    )


def saved_together(names: Iterable[str], conversions: list) -> dict[str, list[str]]:
    """Parameter -> earlier ones that saving with these conversions puts into the same tensor."""
    back = [c.reverse_transform() for c in conversions if isinstance(c, WeightConverter)]
    found, groups = {}, defaultdict(list)
    for name in names if back else ():
        key, pattern = saved_key(name, [], back)
        if pattern is not None:
            found[name] = list(groups[key])
            groups[key].append(name)
    return found


def saved_alone(name: str, conversions: list) -> bool:
    """Whether saving with these conversions treats each expert of the stack `name` alone."""
    return all(
        by_expert(conversion) is not conversion
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        and saved_key(name, [], [conversion.reverse_transform()])[1] is not None
    )


@contextlib.contextmanager
def saving_packed(model):
    """A context in which transformers saves the model without a conversion of packed weights."""
    if not any(isinstance(module, _Packed4bit) for module in model.modules()):
        yield
        return
    before = model._weight_conversions if hasattr(model, "_weight_conversions") else None
    conversions = before
    if before is None:  # take those that transformers would: the class's, without PrefixChange
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if type(c).__name__ != "PrefixChange"]
    kept = without_those_of_packed(model, conversions)
    if len(kept) == len(conversions):
        yield
        return
    model._weight_conversions = kept
    try:
        yield
    finally:
        if before is None:
            del model._weight_conversions
        else:
            model._weight_conversions = before


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
                f"{want} by config.json"
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
    """Stacks one tensor of every expert of a layer. It keeps one codebook, which all share."""

    def convert(self, input_dict, *args, target_patterns=None, **kwargs):
        ((_, tensors),) = input_dict.items()
        (target,) = target_patterns
        return {target: tensors[0] if target.endswith("weight_codebook") else torch.stack(tensors)}


def singles_stacked() -> list[WeightConverter]:
    """Converters for checkpoints of the version that packed a mixture expert by expert. They make
    today's `experts.up.weight` from `experts.packed.7.up.weight` and the others."""
    # Longer keys first: in older releases `weight` matches the start of `weight_absmax`, too.
    return [
        WeightConverter(f"packed.*.{side}.{key}", f"{side}.{key}", [StackSingles()])
        for side in ("up", "down")
        for key in (*_PACKED_KEYS[:0:-1], "weight", "bias")
    ]


def reads_other_format(conversion) -> bool:
    """Whether a conversion reads another format of packed weights. Saving must not reverse it."""
    ops = getattr(conversion, "operations", ())
    return any(isinstance(op, (ReadBitsandbytes, StackSingles)) for op in ops)
