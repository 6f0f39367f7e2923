"""Mixture-of-experts layers: transformers' fused 3-D weights, packed expert by expert.

transformers stores the experts of a layer as two parameters, [E, N, K] each. Its decorator
`use_experts_implementation` sets attributes that describe their layout (transposed, with biases,
gated). Every class that has these attributes runs here; other classes are left alone.
"""

from __future__ import annotations

import torch
from torch import nn

from ..checks import check_finite, not_dense
from ..tensor.config import FLOAT_DTYPES
from .dense_state import is_own, pre_hooks_first, read_lazy
from .linear import Linear4bit, _share

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


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


def _base(expert: _Expert, side: str) -> tuple[str, nn.Module]:
    """Name and layer of an expert's matrix, which PEFT's adapters may hold as their base_layer."""
    name, layer = side, getattr(expert, side)
    while hasattr(layer, "base_layer"):
        name, layer = f"{name}.base_layer", layer.base_layer
    return name, layer


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

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys)
        with pre_hooks_first(self, *args, error_msgs):
            error_msgs += self._unstack(state_dict, prefix)
            super()._load_from_state_dict(*args, error_msgs)

    def _unstack(self, state_dict, prefix: str) -> list[str]:
        """Gives the dense weights of the fused module to the experts' layers, which pack them.
        Returns error messages; if there are some, no expert is given any."""
        experts, name = self.template, type(self).__name__
        stacks = {}  # key -> (the shape of one expert's part, that part's layer and key)
        for stack, side in ((up_name(experts), "up"), ("down_proj", "down")):
            _, layer = _base(self.packed[0], side)
            N, K = layer.out_features, layer.in_features
            shape = (K, N) if experts.is_transposed else (N, K)
            stacks[prefix + stack] = shape, side, "weight"
            if experts.has_bias:
                stacks[f"{prefix}{stack}_bias"] = (N,), side, "bias"
        given = [key for key in stacks if key in state_dict]
        read_lazy(state_dict, given)
        values = {key: state_dict.pop(key) for key in given}
        packed = [key for key in state_dict if key.startswith(f"{prefix}packed.")]
        own = {prefix + key: p for key, p in self.named_parameters()} if given and packed else {}
        others = [key for key in packed if not is_own(own.get(key), state_dict[key])]
        errors = []
        if given and others:
            errors.append(f"{name}: {given[0]} is beside {others[0]}, want one of them")
        for key, value in values.items():
            want = [len(self.packed), *stacks[key][0]]
            got = not_dense(value)
            if got is None and (list(value.shape) != want or value.dtype not in FLOAT_DTYPES):
                got = f"{value.dtype} {list(value.shape)}"
            if got is not None:
                errors.append(f"{name}: {key} is {got}, want float {want}")
                continue
            try:
                check_finite(f"{name}: {key}", value, value.dtype)
            except OverflowError as error:
                errors.append(str(error))
        if errors:
            for key in packed:
                del state_dict[key]
            return errors
        for key, value in values.items():
            _, side, kind = stacks[key]
            for e, (expert, part) in enumerate(zip(self.packed, value.unbind())):
                flip = experts.is_transposed and part.ndim == 2
                place, _ = _base(expert, side)
                state_dict[f"{prefix}packed.{e}.{place}.{kind}"] = part.T if flip else part
        return []

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
            if getattr(self.template, "has_post_expert_norm", False):  # transformers 5.20 has it
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
