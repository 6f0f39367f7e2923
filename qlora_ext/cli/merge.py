"""`qlora-ext merge`: merges a LoRA adapter into a checkpoint; the result is dense or in 4 bits."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from ..adapters.add import with_adapter
from ..adapters.config import LoraConfig
from ..adapters.files import read_pairs
from ..adapters.peft_config import alpha_of, rank_of, read_adapter_config
from ..checks import check_finite
from ..files import SafetensorsFiles, fingerprint
from ..integrations.transformers.building import unquantized
from ..integrations.transformers.checkpoint import Checkpoint
from ..models.quantize import quantize_model
from ..models.walk import replace_module
from ..nn.dense import WIDER, adapted_weight, check_weight, dense_experts, dense_layer
from ..nn.experts import (
    Experts4bit,
    is_fused_experts,
    parameter_names,
    up_name,
    weight_names,
)
from ..nn.linear import is_conv1d
from ..nn.packed import _Packed4bit
from ..tensor.config import QuantConfig
from .errors import CliError, as_cli_error
from .experts import Read, packed_experts, read_experts, unpack_experts
from .quantize import pack_like, quantized_result
from .stream import PACKED, Job

# Measured on a short fine-tune of SmolLM2-135M; docs/merging.md compares the ways to merge.
REQUANTIZING = (
    "{base} is in 4 bits. Packing its merged weights again would keep only 5 to 10% of what a "
    "short fine-tune gained, so the result is dense. To keep nearly all of it in 4 bits, give text "
    "of the kind that the model is for (--calibration), or let the model write some (--own-text)"
)
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The adapter of one layer: W + scaling B A. For a stack both matrices start with E."""

    lora_A: torch.Tensor  # [r, K]
    lora_B: torch.Tensor  # [N, r]
    lora_alpha: float
    use_rslora: bool

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    def of_expert(self, e: int) -> Pair:
        return dataclasses.replace(self, lora_A=self.lora_A[e], lora_B=self.lora_B[e])

    @property
    def scaling(self) -> float:
        return LoraConfig(r=self.r, lora_alpha=self.lora_alpha, use_rslora=self.use_rslora).scaling

    def added_to(self, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
        """weight + scaling B A in fp32; weight is [N, K], or [K, N] if transposed."""
        return adapted_weight(weight, self.lora_A, self.lora_B, self.scaling, transposed)


def read_adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, Pair]:
    """Layer name -> its adapter. For experts it is the name that their stack has when it is packed.

    Raises:
        CliError: in the cases of `load_adapter`: files are missing or damaged; it is not a plain
            LoRA adapter; the model lacks its layers or shapes; its config contradicts its weights.
    """
    names = checkpoint.model
    if checkpoint.quantizer is None:
        # Only in a packed model are the stacks of experts layers with names.
        try:
            names = quantize_model(checkpoint.same_model(), progress_bar=False)
        except ValueError:  # there is nothing to pack, so there are no experts either
            names = checkpoint.model
    try:
        with as_cli_error(ValueError, OSError, TypeError):
            config = read_adapter_config(folder)
            # fp32, because they are added in fp32.
            pairs = read_pairs(names, folder, config, lambda name: torch.float32)
            parameters = parameter_names(names)
            for name, pair in pairs.items():
                base = names.get_submodule(name)
                rank_of(folder, config, parameters.get(name, name), base, *pair)
    except NotImplementedError:  # it asked for values of the model, which is on meta
        raise CliError(
            f"{folder} holds embeddings besides LoRA weights, want LoRA weights alone; merge it "
            "with qlora_ext.load_adapter and merge_and_unload"
        ) from None
    adapter = {}
    for name, (lora_A, lora_B) in pairs.items():
        alpha = alpha_of(config, parameters.get(name, name))
        adapter[name] = Pair(lora_A, lora_B, alpha, bool(config.get("use_rslora", False)))
    return adapter


def adapted_layers(folder: Path) -> set[str]:
    """Names of the layers that an adapter file changes, as the file spells them."""
    path = folder / FILES[1]
    if not os.path.lexists(path):
        raise CliError(f"{path} is missing, want an adapter's folder, with {' and '.join(FILES)}")
    return {
        key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for key in SafetensorsFiles([path])
        if ".lora_" in key
    }


# Modules ------------------------------------------------------------------------------------------


def _pairs_inside(adapter: dict[str, Pair], name: str) -> dict[str, Pair]:
    return {layer: pair for layer, pair in adapter.items() if layer.startswith(f"{name}.")}


def _pairs_of_stacks(name: str, module: nn.Module, adapter: dict[str, Pair]) -> dict[str, Pair]:
    """Parameter of a module of fused experts -> the adapter of its stack."""
    inside = _pairs_inside(adapter, name)
    fused = module.template if isinstance(module, Experts4bit) else module
    sides = {up_name(fused): f"{name}.up", "down_proj": f"{name}.down"}
    pairs = {key: inside.pop(side) for key, side in sides.items() if side in inside}
    if inside:
        raise CliError(
            f"the adapter changes {sorted(inside)[0]}, which the model's {name} does not have, "
            "want an adapter of this model"
        )
    return pairs


def _merged_stacks(
    name: str,
    module: nn.Module,
    adapter: dict[str, Pair],
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
) -> dict[str, Read]:
    """Parameter of a module of experts -> a function that reads one expert's weight and adds its
    adapter in fp32. It raises CliError unless the sum fits dtype, which None leaves as it is."""
    pairs = _pairs_of_stacks(name, module, adapter)
    packed = isinstance(module, Experts4bit)
    readers = unpack_experts(module, pairs) if packed else read_experts(name, module, checkpoint)

    def reader(key: str, read: Read) -> Read:
        def merged(e: int) -> torch.Tensor:
            total = read(e)
            if key in pairs and not packed:
                total = pairs[key].of_expert(e).added_to(total, module.is_transposed)
            want = dtype or module._parameters[key].dtype
            if key in pairs or torch.finfo(want).max < torch.finfo(total.dtype).max:
                _check(f"{name}.{key}[{e}]", total, want)
            return total

        return merged

    return {key: reader(key, read) for key, read in readers.items()}


def _merge_packed(name: str, module: nn.Module, adapter: dict, dtype: torch.dtype) -> nn.Module:
    """Turns a packed module and its adapters into a dense one. Sums are rounded once. Stacks of
    experts stay on meta: _merged_stacks reads them."""
    if isinstance(module, Experts4bit):
        stacks = module.stacks()
        shapes = {key: stack.quantized.shape for key, stack in stacks.items()}
        empty = {key: torch.empty(s, dtype=dtype, device="meta") for key, s in shapes.items()}
        experts = dense_experts(module, dtype, empty)
        for key, stack in stacks.items():
            if stack.bias is not None:
                _check(f"{name}.{key}_bias", stack.bias, dtype)
                bias = nn.Parameter(stack.bias.detach().to(dtype), requires_grad=False)
                experts._parameters[f"{key}_bias"] = bias
        return experts
    layers = _pairs_inside(adapter, name)
    if name in adapter:
        layers[name] = adapter[name]
    for layer, pair in layers.items():
        base = module if layer == name else module.get_submodule(layer[len(name) + 1 :])
        new = with_adapter(
            layer,
            base,
            r=pair.r,
            lora_alpha=pair.lora_alpha,
            lora_dropout=0.0,
            use_rslora=pair.use_rslora,
            lora_dtype=torch.float32,
        )
        new.lora_A.data.copy_(pair.lora_A)
        new.lora_B.data.copy_(pair.lora_B)
        if layer == name:
            module = new
        else:
            replace_module(module, base, new)
    for layer, part in module.named_modules():
        full = ".".join(filter(None, (name, layer)))
        if isinstance(part, _Packed4bit):
            _as_cli_error(check_weight, f"{full}.weight", part, dtype)
            if part._parameters.get("bias") is not None:
                _check(f"{full}.bias", part.bias, dtype)
    new = dense_layer(module, dtype)
    for key, parameter in new.named_parameters():
        _check(f"{name}.{key}", parameter, dtype)
    return new


def _merge_dense(
    name: str, module: nn.Module, adapter: dict, dtype: torch.dtype | None
) -> nn.Module:
    """A copy of a dense module with its adapter added in fp32 and everything rounded once to
    dtype. With None the sums stay in fp32, and all else keeps its dtype. Stacks of experts stay as
    they are: _merged_stacks reads them."""
    merged = {}
    if name in adapter:
        merged["weight"] = adapter[name].added_to(module.weight, is_conv1d(module))
    stacks = weight_names(module) if is_fused_experts(module) else ()

    def cast(key, tensor, values):
        if tensor is None or not tensor.is_floating_point():
            return tensor
        _check(f"{name}.{key}".lstrip("."), values, dtype or tensor.dtype)
        return tensor if dtype is None else tensor.to(dtype)

    new = copy.copy(module)
    new._parameters = dict(module._parameters)
    for key, parameter in module._parameters.items():
        if parameter is not None and key not in stacks:
            value = merged.get(key, parameter.detach())
            new._parameters[key] = nn.Parameter(cast(key, value, value), requires_grad=False)
    new._buffers = {
        # A mask may hold infinities.
        key: cast(
            key, buffer, buffer if buffer is None or buffer.is_meta else buffer[buffer.isfinite()]
        )
        for key, buffer in module._buffers.items()
    }
    return new


def _check(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises CliError unless the values fit dtype."""
    advice = WIDER if dtype == torch.float16 else ""
    _as_cli_error(check_finite, name, values, dtype, None, advice)


def _as_cli_error(check, *arguments) -> None:
    try:
        check(*arguments)
    except OverflowError as error:
        said = str(error).replace(WIDER, "merge with --dtype bfloat16 or float32")
        raise CliError(said) from None


# Jobs ---------------------------------------------------------------------------------------------


def plan(
    base: Path,
    adapter_folder: Path,
    *,
    dtype: torch.dtype | None,
    four_bit: QuantConfig | None,
    keep: list[str],
    embeddings: bool,
    max_shard_bytes: int,
) -> tuple[Job, dict[str, Pair]]:
    """The job that merges, and the adapter. Nothing is written yet.

    Args:
        dtype: of a dense result; None is the base's dtype if that has 16 bits, else float16.
        four_bit: pack W + scaling B A with these settings. A 4-bit base gives a dense result.
        keep, embeddings: for a 4-bit result, as in quantize_model.
    """
    layers = adapted_layers(adapter_folder)
    checkpoint = Checkpoint(base, untie=tuple(f"{layer}.weight" for layer in layers))
    if checkpoint.quantizer is not None:
        four_bit = None  # the command prints REQUANTIZING
    adapter = read_adapter(adapter_folder, checkpoint)
    config = copy.deepcopy(checkpoint.config)
    if checkpoint.copies:
        if checkpoint.tied:
            raise CliError(
                f"{base} ties several weights, and the adapter changes one of them: merge with "
                "qlora_ext.merge_and_unload instead"
            )
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    if checkpoint.quantizer is not None:
        config = unquantized(config)
    job = _four_bit_job if four_bit is not None else _dense_job
    settings = (four_bit, keep, embeddings) if four_bit is not None else (dtype,)
    return job(checkpoint, config, adapter, max_shard_bytes, *settings), adapter


def _dense_job(checkpoint, config, adapter, max_shard_bytes, dtype) -> Job:
    half = checkpoint.dtype in (torch.float16, torch.bfloat16)
    dtype = dtype or (checkpoint.dtype if half else torch.float16)
    config.dtype = dtype
    result = checkpoint.same_model(config)
    for module in result.modules():
        for p in module._parameters.values():
            if p is not None and p.is_floating_point():
                p.data = p.data.to(dtype)
        for key, b in module._buffers.items():
            if b is not None and b.is_floating_point() and key not in (
                module._non_persistent_buffers_set
            ):  # fmt: skip
                module._buffers[key] = b.to(dtype)

    def transform(name: str, module: nn.Module) -> nn.Module:
        merge = _merge_packed if isinstance(module, PACKED) else _merge_dense
        return merge(name, module, adapter, dtype)

    def stacks(name: str, module: nn.Module) -> dict[str, Read]:
        return _merged_stacks(name, module, adapter, checkpoint, dtype)

    return Job(checkpoint, result, transform, stacks, max_shard_bytes=max_shard_bytes)


def _four_bit_job(checkpoint, config, adapter, max_shard_bytes, settings, keep, embeddings) -> Job:
    result = quantized_result(checkpoint.same_model(config), settings, keep, embeddings)
    pack = pack_like(result, settings, checkpoint)

    def transform(name: str, module: nn.Module) -> nn.Module:
        # Pack the fp32 sum itself; rounding it to 16 bits first would gain nothing.
        packed = isinstance(result.get_submodule(name), PACKED)
        if packed and is_fused_experts(module):
            sums = _merged_stacks(name, module, adapter, checkpoint, torch.float32)
            return packed_experts(module, settings, sums)
        if name in adapter:
            dtype = None if packed else next(module.parameters()).dtype
            module = _merge_dense(name, module, adapter, dtype)
        return pack(name, module)

    def stacks(name: str, module: nn.Module) -> dict[str, Read]:
        return _merged_stacks(name, module, adapter, checkpoint)

    return Job(checkpoint, result, transform, stacks, max_shard_bytes=max_shard_bytes)


def adapter_fingerprint(folder: Path) -> list:
    return fingerprint([folder / name for name in FILES])
