"""How PEFT stores the adapters of a mixture's experts: as those of `target_parameters`.

PEFT adapts a parameter [E, N, K] with one A and one B for all experts. Row e r + k of A [E r, K] is
row k of expert e, and column k E + e of B [N, r E] is column k of expert e (peft/tuners/lora/
layer.py, ParamWrapper). It wraps the module once for each parameter, in the order in which the
module registered them. So a parameter's keys have one `base_layer` for each parameter after it.

Before 0.19.1 PEFT mistook [E, N, K] for [E, K, N], so A and B in its files are those of W^T.
"""

from __future__ import annotations

import re

import torch

from ..nn.stack import Stack4bit
from ..text import shorten

# The release that stores A and B as above; written into our files.
LAYOUT_OF = "0.19.1"


def keys_in_file(parameters: list[str]) -> dict[str, str]:
    """Parameter -> the start of its keys in a file that adapts exactly these parameters, which are
    in the order of their modules' registration."""
    keys = {}
    for parameter in parameters:
        holder = parameter.rpartition(".")[0]
        siblings = [other for other in parameters if other.rpartition(".")[0] == holder]
        wraps = len(siblings) - 1 - siblings.index(parameter)
        keys[parameter] = holder + ".base_layer" * wraps
    return keys


def to_file(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E r, K] and B [N, r E] of a file, from lora_A [E, r, K] and lora_B [E, N, r]."""
    return lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)


def from_file(
    A: torch.Tensor, B: torch.Tensor, stack: Stack4bit, is_swapped: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """lora_A [E, r, K] and lora_B [E, N, r] of a file's A and B; None if the shapes do not fit.

    is_swapped: whether A and B are those of W^T.
    """
    E, N, K = stack._shape
    if is_swapped:
        N, K = K, N
    r = len(A) // E
    if r < 1 or tuple(A.shape) != (E * r, K) or tuple(B.shape) != (N, r * E):
        return None
    lora_A, lora_B = A.view(E, r, K), B.reshape(N, r, E).permute(2, 0, 1)
    if is_swapped:
        lora_A, lora_B = lora_B.mT, lora_A.mT
    return lora_A.contiguous(), lora_B.contiguous()


def is_swapped(op: str, file, config: dict, adapters: list[tuple]) -> bool:
    """Whether the A and B of a file are those of W^T, because PEFT mistook [E, N, K] for [E, K, N].

    The config names the release that made the adapter. A later release that loads the adapter (from
    experts stored one by one) and saves it keeps that name. So the answer is no if the shapes fit
    only [E, N, K].

    Args:
        op, file: for errors.
        adapters: (A, B, stack) of each adapted stack.

    Raises:
        ValueError: the release cannot be read.
    """
    version = config.get("peft_version") or "0.17.0"  # stored from 0.18.0 on
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"{op}: {file} has peft_version {shorten(version)}, want x.y.z")
    release = tuple(map(int, match.groups()))
    if release == (0, 19, 0):
        raise ValueError(
            f"{op}: {file} adapts experts and was written by PEFT 0.19.0, which stored "
            "them in a layout of its own, want a file that another release of PEFT wrote"
        )
    if release >= (0, 19, 1) or any(stack.is_transposed for *_, stack in adapters):
        return False
    fits_now = all(from_file(*adapter, False) is not None for adapter in adapters)
    return not fits_now or all(from_file(*adapter, True) is not None for adapter in adapters)
