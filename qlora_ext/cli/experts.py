"""Reads, merges, packs and writes a layer's experts one after another: one is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ..integrations.transformers.checkpoint import Checkpoint
from ..integrations.transformers.conversions import saved_alone
from ..nn.dense import merged_expert
from ..nn.experts import Experts4bit, weight_names
from ..nn.stack import Stack4bit
from ..tensor.config import QuantConfig

Read = Callable[[int], torch.Tensor]


class ExpertError(RuntimeError):
    """One expert of the stack `key` of a module cannot be packed."""

    def __init__(self, key: str, expert: int, why: Exception):
        super().__init__(str(why))
        self.key, self.expert = key, expert


def read_experts(name: str, module: nn.Module, checkpoint: Checkpoint) -> dict[str, Read]:
    """Parameter of a module of fused experts -> a function that reads one expert's weight. Stacks
    on meta are read from the checkpoint."""
    stacks = {key: module._parameters[key] for key in weight_names(module)}
    return {
        key: checkpoint.expert_reader(f"{name}.{key}") if dense.is_meta else dense.__getitem__
        for key, dense in stacks.items()
    }


def unpack_experts(module: Experts4bit, pairs: dict | None = None) -> dict[str, Read]:
    """The same for packed experts: their weights in fp32, as the dense module stores them.

    Args:
        pairs: parameter -> its adapter, with lora_A [E, r, K], lora_B [E, N, r] and scaling.
    """

    def reader(key: str, stack: Stack4bit) -> Read:
        pair = (pairs or {}).get(key)
        adapter = None if pair is None else (pair.lora_A, pair.lora_B, pair.scaling)

        def read(e: int) -> torch.Tensor:
            weight = merged_expert(stack.quantized, adapter, e, torch.float32)
            return weight.T.contiguous() if module.is_transposed else weight

        return read

    return {key: reader(key, stack) for key, stack in module.stacks().items()}


def packed_experts(module: nn.Module, config: QuantConfig, readers: dict[str, Read]) -> Experts4bit:
    """Packs a module of fused experts, from functions that read one expert's weight each."""
    stacks = {}
    for key, read in readers.items():
        dense = module._parameters[key]
        shape = dense.mT.shape if module.is_transposed else dense.shape
        stack = Stack4bit.empty(
            shape, config, dtype=dense.dtype, device="cpu", is_transposed=module.is_transposed
        )
        for e in range(len(dense)):
            weight = read(e)
            try:
                stack.set_expert(e, weight)
            except RuntimeError as error:
                raise ExpertError(key, e, error) from error
        stacks[key] = stack
    return Experts4bit._in_place_of(module, stacks)


def written_alone(result: nn.Module, name: str) -> bool:
    """Whether the dense stack `name` of a model on meta can be written an expert at a time: as
    slices of one tensor, or as tensors of each expert."""
    if not saved_alone(name, result._weight_conversions):
        return False
    stack = result.get_parameter(name).detach()
    parts = {}
    for key, tensor in revert_weight_conversion(result, {name: stack[:1]}).items():
        if _is_slice(tensor):
            parts[key] = (len(stack), *tensor.shape[1:])
        else:
            parts |= {_numbered(key, e): tuple(tensor.shape) for e in range(len(stack))}
    whole = revert_weight_conversion(result, {name: stack})
    return parts == {key: tuple(tensor.shape) for key, tensor in whole.items()}


def tensors_of_expert(
    result: nn.Module, name: str, e: int, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(stored name, tensor, whether it is a slice [1, ...] of a stored stack) of one expert."""
    for key, tensor in revert_weight_conversion(result, {name: weight[None]}).items():
        yield key if _is_slice(tensor) else _numbered(key, e), tensor, _is_slice(tensor)


def _is_slice(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 3


def _numbered(key: str, e: int) -> str:
    """Expert e's name, from the first one's name `key`: `mlp.experts.0.w1.weight`."""
    before, _, after = key.rpartition(".0.")
    return f"{before}.{e}.{after}"
