"""`qlora-ext quantize`: turns an unquantized checkpoint into a 4-bit one."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from ..integrations.transformers.building import stored_method
from ..integrations.transformers.checkpoint import Checkpoint
from ..models.quantize import quantize_model
from ..nn.embedding import Embedding4bit
from ..nn.experts import Experts4bit
from ..nn.linear import Linear4bit
from ..tensor.config import QuantConfig
from .errors import CliError, as_cli_error
from .experts import Read, packed_experts, read_experts
from .stream import Job


def pack_like(result: nn.Module, config: QuantConfig, checkpoint: Checkpoint):
    """A transform that packs the modules that are packed in `result`, a model on meta."""

    def transform(name: str, module: nn.Module) -> nn.Module:
        target = result.get_submodule(name)
        if isinstance(target, Experts4bit):
            return packed_experts(module, config, read_experts(name, module, checkpoint))
        if isinstance(target, Embedding4bit):
            return Embedding4bit.from_embedding(module, config)
        if isinstance(target, Linear4bit):
            return Linear4bit.from_linear(module, config)
        return module

    return transform


def quantized_result(
    model: nn.Module, config: QuantConfig, keep: list[str], embeddings: bool
) -> nn.Module:
    """The model on meta, where packing only changes shapes: the plan for the real weights."""
    with warnings.catch_warnings():
        # quantize_model warns about layers that stay dense; the command prints a report instead.
        warnings.simplefilter("ignore")
        with as_cli_error(ValueError, TypeError, RuntimeError):
            return quantize_model(
                model,
                config,
                modules_to_not_convert=keep or None,
                quantize_embeddings=embeddings,
                progress_bar=False,
            )


def plan(
    folder: Path, config: QuantConfig, keep: list[str], embeddings: bool, max_shard_bytes: int
) -> Job:
    """The job that quantizes a checkpoint. Nothing is written yet."""
    checkpoint = Checkpoint(folder)
    if checkpoint.quantizer is not None:
        raise CliError(
            f"{folder} is quantized already, by {stored_method(checkpoint.config)}, want an "
            "unquantized checkpoint"
        )
    try:
        result = quantized_result(checkpoint.same_model(), config, keep, embeddings)
    except CliError as error:
        if keep:  # a name that matches nothing
            raise
        raise CliError(f"{folder}: {error}") from None
    transform = pack_like(result, config, checkpoint)

    def stacks(name: str, module: nn.Module) -> dict[str, Read]:
        return read_experts(name, module, checkpoint)

    return Job(checkpoint, result, transform, stacks, max_shard_bytes=max_shard_bytes)
