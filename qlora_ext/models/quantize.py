"""quantize_model: packs a whole model in place, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .. import hosts
from ..checks import check_parameters
from ..nn.embedding import Embedding4bit
from ..nn.experts import Experts4bit, is_fused_experts, weight_names
from ..nn.linear import Linear4bit, is_plain_linear
from ..nn.lora import _Lora
from ..nn.offload import check_in_memory
from ..nn.packed import _Packed4bit
from ..tensor.config import QuantConfig
from .names import as_names
from .plan import Plan, log_report
from .raw_errors import explain_errors
from .walk import (
    linear_names,
    places_of,
    progress,
    replace_module,
    use_dense_panels,
)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: model is a {type(model).__name__}, want an nn.Module")
    if is_plain_linear(model):
        raise TypeError(
            f"quantize_model: model is a single {type(model).__name__}, want a model that contains "
            "layers; Linear4bit.from_linear packs one layer"
        )
    for name, module in model.named_modules():
        if isinstance(module, _Packed4bit):
            raise ValueError(
                f"quantize_model: {name or 'model'} is a {type(module).__name__}, want an "
                "unquantized model; this one is quantized already"
            )
        source = type(module).__module__
        if isinstance(module, _Lora) or source.startswith("peft."):
            raise ValueError(
                f"quantize_model: {name or 'model'} is a {type(module).__name__}, want a model "
                "without adapters; quantize first, then add them"
            )
        if source.startswith("bitsandbytes."):
            raise ValueError(
                f"quantize_model: {name} is a {type(module).__name__} of bitsandbytes, want an "
                "unquantized model"
            )
    check_in_memory(
        "quantize_model",
        model,
        "quantize the model before it is offloaded; or load it without 'cpu' and 'disk' in "
        "device_map, save the 4-bit model, and load that with them",
    )
    devices = {p.device.type for p in model.parameters()}
    if "meta" in devices and len(devices) > 1:
        name = next(name for name, p in model.named_parameters() if p.is_meta)
        raise ValueError(
            f"quantize_model: {name} is on the meta device (offloaded?) and has no values, want "
            "all weights in memory; or the whole model on meta"
        )


def quantize_model(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    modules_to_not_convert: Iterable[str] | None = None,
    quantize_embeddings: bool = False,
    dense_panels: bool | None = None,
    progress_bar: bool = True,
) -> nn.Module:
    """Packs a model's linear layers in 4 bits, in place, one layer after another.

    Each dense weight is released before the next is read, so peak memory is about that of the
    result and one layer. These stay dense, and `model.quantization_report` says why: the output
    head and task heads, tied weights, layers whose weight the model's code reads past their
    forward, layers that the model class keeps in fp32, `modules_to_not_convert`, embeddings, and
    everything that is not a linear layer. So do layers that are made to be trained: another
    library's LoRA factors (lora_a, lora_B), and layers that require gradients if other layers do
    not. A warning names them, and layers that one would expect to be packed but are not (a router,
    say). Experts that transformers stacks in one parameter stay a stack, in Experts4bit.

    Args:
        model: any nn.Module with nn.Linear or transformers' Conv1D layers. A model that is wholly
            on the meta device or under FakeTensorMode stays there; only its shapes are packed.
        config: a QuantConfig; None is NF4 with blocks of 64, double-quantized.
        modules_to_not_convert: names of layers to leave alone: full names, dotted parts
            ("layers.0.mlp"), containers ("vision_tower"), or regular expressions for these.
        quantize_embeddings: pack untied nn.Embedding tables too.
        dense_panels: turn the nn.Linear layers that stay dense into PanelLinear, which computes in
            fp32 panels. True: always; False: never; None: if this CPU has no instructions for the
            dtype.
        progress_bar: show a tqdm bar.

    Returns:
        model. `print(model.quantization_report)` says what was packed and what was not.

    Raises:
        TypeError: model is not a module or is a single layer, or config is not a QuantConfig.
        ValueError: the model is quantized already, has adapters, is partly on the meta device, or
            has neither a layer to pack nor one that trains; modules_to_not_convert has a name that
            matches nothing, or something that is not a name.
        RuntimeError: a weight to pack has a NaN or Inf: the error names the layer and the index,
            and the layers before it are packed. Or a parameter that stays dense has one: the error
            names it, and nothing is packed.
    """
    if config is not None and not isinstance(config, QuantConfig):
        raise TypeError(f"quantize_model: config is a {type(config).__name__}, want a QuantConfig")
    config = config or QuantConfig()
    _check_model(model)
    keep = as_names(modules_to_not_convert, "quantize_model")
    plan = Plan(
        model,
        keep,
        embeddings=quantize_embeddings,
        other_names=_names_in_files(model, keep),
        keep_trained=True,
    )
    if unmatched := plan.unmatched():
        raise ValueError(
            f"quantize_model: modules_to_not_convert has {unmatched[0]!r}, which matches no "
            f"module, want names among {linear_names(model)}"
        )
    if not plan.names and not plan.trained:
        raise ValueError(
            f"quantize_model: {type(model).__name__} has no layer to pack, want at least one "
            f"nn.Linear or Conv1D. {plan.bad_dtypes() or plan.report()}"
        )
    _check_dense(model, plan)
    packed, kept = [], plan.kept
    places = places_of(model)
    for name in progress(plan.names, "quantize", progress_bar):
        old = model.get_submodule(name)
        try:
            if isinstance(old, nn.Embedding):
                new = Embedding4bit.from_embedding(old, config)
            elif is_fused_experts(old):
                new = Experts4bit.from_experts(old, config)
            else:
                new = Linear4bit.from_linear(old, config)
        except RuntimeError as error:
            raise RuntimeError(f"quantize_model: {name}: {error}") from error
        packed.append(plan.packed_layer(name, new))
        replace_module(model, old, new, places)
        del old, new
    model.quantization_report = plan.report(packed)
    log_report("quantize_model", model.quantization_report)
    if not packed:
        return model
    hosts.tell(hosts.on_packed, model, config, kept)
    use_dense_panels(model, dense_panels, leave=map(model.get_submodule, plan.trained))
    explain_errors(model)
    return model


def _check_dense(model: nn.Module, plan: Plan) -> None:
    """Raises RuntimeError for a NaN or Inf in weights that stay dense; packing checks the rest."""
    packed = {
        f"{name}.{key}" for name in plan.names for key in weight_names(model.get_submodule(name))
    }
    try:
        check_parameters("quantize_model", model, skipped=packed)
    except OverflowError as error:
        raise RuntimeError(str(error)) from None


def _names_in_files(model: nn.Module, keep: list[str]) -> list[dict[str, str]]:
    """Mappings of layer -> its name in the model's files; needed only to match `keep`."""
    return [names for hook in hosts.names_in_files for names in hook(model)] if keep else []
