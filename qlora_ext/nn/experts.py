"""Mixture-of-experts layers: transformers' fused 3-D weights, packed expert by expert.

transformers stores the experts of a layer as two parameters, [E, N, K] each. Its decorator
`use_experts_implementation` sets attributes that describe their layout (transposed, with biases,
gated). Every class that has these attributes runs here; other classes are left alone.
"""

from __future__ import annotations

import torch
from torch import nn

from .linear import Linear4bit, _share

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")


def up_name(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether module holds experts in the layout that transformers describes."""
    if not all(hasattr(module, attribute) for attribute in _LAYOUT):
        return False
    parts = (module._parameters.get(name) for name in (up_name(module), "down_proj"))
    return all(part is not None and part.ndim == 3 for part in parts)


class _Expert(nn.Module):
    # PEFT's "all-linear" goes by the last part of a name, so that part must not be a number.
    # transformers would stack tensors named like `experts.0.down_proj`, hence "up" and "down".
    def __init__(self, up: Linear4bit, down: Linear4bit):
        super().__init__()
        self.up = up
        self.down = down


class Experts4bit(nn.Module):
    """Experts whose matrices are packed one by one: `packed[e].up`, `packed[e].down`: Linear4bit.

    y = sum over a token's experts e of weight_e * down_e(gate(up_e(x))), with the gate, activation
    and norm of the class it was made from. To adapt an expert, add adapters to these layers. As in
    transformers' own loop, the host reads the chosen experts back from the device.
    """

    def __init__(self, template: nn.Module, packed: nn.ModuleList):
        super().__init__()
        self.template = template  # the original without its weights: gate, activation, norm
        self.packed = packed

    @classmethod
    def from_experts(cls, experts: nn.Module, config=None):
        """Packs a fused-experts module; its parameters are read, not changed.

        Args:
            experts: a module with transformers' layout attributes; on meta, the result is on meta.
            config: a QuantConfig, or None for NF4 with blocks of 64.

        Raises:
            TypeError: experts has no such layout, or is sharded over devices (expert parallel).
            RuntimeError: a weight has a NaN or Inf; the error names the expert and the index.
        """
        if not is_fused_experts(experts):
            raise TypeError(
                f"{cls.__name__}: experts is a {type(experts).__name__}, want a module with "
                "transformers' fused experts layout"
            )
        if getattr(experts, "_is_expert_parallel", False):
            raise TypeError(
                f"{cls.__name__}: experts are sharded over devices, want the whole layer in one"
            )
        names = (up_name(experts), "down_proj")
        packed = nn.ModuleList(
            _Expert(*(_pack(experts, name, e, config) for name in names))
            for e in range(len(experts.down_proj))
        )
        template = type(experts).__new__(type(experts))
        _share(experts, template)
        for name in names:
            template._parameters.pop(name, None)
            template._parameters.pop(f"{name}_bias", None)
        template._is_hf_initialized = True  # transformers would look for the weights to initialise
        return cls(template, packed).train(experts.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H].

        An index of E or more marks a slot without an expert.
        """
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for e in top_k_index.unique().tolist():
            if e >= len(self.packed):
                continue
            expert = self.packed[e]
            token, slot = torch.where(top_k_index == e)
            h = expert.up(hidden_states[token])
            h = self.template._apply_gate(h) if self.template.has_gate else self.template.act_fn(h)
            y = expert.down(h)
            if self.template.has_post_expert_norm:
                y = self.template.post_expert_norm(y)
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).float())
        return out.to(hidden_states.dtype)


def _pack(experts: nn.Module, name: str, e: int, config) -> Linear4bit:
    weight = getattr(experts, name).detach()[e]
    if experts.is_transposed:
        weight = weight.T.contiguous()
    N, K = weight.shape
    linear = nn.Linear(K, N, bias=experts.has_bias, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if experts.has_bias:
        linear.bias = nn.Parameter(getattr(experts, f"{name}_bias").detach()[e].clone())
    try:
        return Linear4bit.from_linear(linear, config)
    except RuntimeError as error:
        raise RuntimeError(f"{name}[{e}]: {error}") from error
