"""Mixture-of-experts layers: transformers' fused 3-D weights, each packed as one stack.

transformers stores the experts of a layer as two parameters, [E, N, K] each. Its decorator
`use_experts_implementation` sets attributes that describe their layout (transposed, with biases,
gated). Every class that has these attributes runs here; other classes are left alone.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..checks import check_finite, not_dense
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import to_autocast_dtype
from .dense_state import dense_shape, is_own, pre_hooks_first, read_lazy
from .linear import Linear4bit, _share
from .stack import Adapter, Stack4bit

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def up_name(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether module holds experts in the layout that transformers describes."""
    if not all(hasattr(module, attribute) for attribute in _LAYOUT):
        return False
    parts = (module._parameters.get(name) for name in (up_name(module), "down_proj"))
    return all(part is not None and part.ndim == 3 for part in parts)


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of module that packing replaces."""
    if is_fused_experts(module):
        return tuple(key for key, p in module._parameters.items() if p is not None and p.ndim == 3)
    return ("weight",)


class _Permute(torch.autograd.Function):
    """x[order]. `back` is the inverse permutation, so dx = dy[back], without any sums."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy.index_select(0, *ctx.saved_tensors), None, None


class Experts4bit(nn.Module):
    """Experts whose matrices are two packed stacks, `up` and `down`: each a Stack4bit.

    y = sum over a token's experts e of weight_e * down_e(gate(up_e(x))), with the gate, activation
    and norm of the class it was made from. Tokens are sorted by expert and multiplied in one
    product for each stack. The host never reads the routing back, so torch.compile and CUDA graphs
    take the whole layer. To adapt the experts, add adapters to the two stacks.
    """

    def __init__(self, template: nn.Module, up: Stack4bit, down: Stack4bit):
        super().__init__()
        self.template = template  # the original without its weights: gate, activation, norm
        self.up = up
        self.down = down
        self.names = (up_name(template), "down_proj")  # in the order of the original's parameters

    @classmethod
    def from_experts(cls, experts: nn.Module, config=None):
        """Packs a fused-experts module; its parameters are read, not changed.

        Args:
            experts: a module with transformers' layout attributes; on meta, the result is on meta.
            config: a QuantConfig, or None for NF4 with blocks of 64.

        Raises:
            TypeError: experts has no such layout, or is sharded over devices (expert parallel).
            ValueError: a matrix has an odd number of columns.
            RuntimeError: a weight has a NaN or Inf; the error names the expert and the index.
        """
        if not is_fused_experts(experts):
            raise TypeError(
                f"{cls.__name__}: experts is a {type(experts).__name__}, want a module with "
                "transformers' fused experts layout"
            )
        if getattr(experts, "_is_expert_parallel", False):
            raise TypeError(
                f"{cls.__name__}: experts are sharded over devices, want the whole layer on one"
            )
        names = (up_name(experts), "down_proj")
        return cls._in_place_of(experts, {name: _pack(experts, name, config) for name in names})

    @classmethod
    def _in_place_of(cls, experts: nn.Module, stacks: dict[str, Stack4bit]):
        """The stacks of a fused-experts module, by the names of its parameters, with its biases,
        gate, activation and norm."""
        names = (up_name(experts), "down_proj")
        if experts.has_bias:
            for name, stack in stacks.items():
                bias = getattr(experts, f"{name}_bias").detach().clone()
                stack.bias = nn.Parameter(bias, requires_grad=False)
        template = type(experts).__new__(type(experts))
        _share(experts, template)
        for name in names:
            template._parameters.pop(name, None)
            template._parameters.pop(f"{name}_bias", None)
        template._is_hf_initialized = True  # transformers would look for the weights to initialise
        self = cls(template, *(stacks[name] for name in names)).train(experts.training)
        self.names = tuple(key for key in experts._parameters if key in names)
        return self

    @property
    def is_transposed(self) -> bool:
        """Whether the class stores its stacks as [E, K, N]."""
        return self.template.is_transposed

    def stacks(self) -> dict[str, Stack4bit]:
        """The two stacks by the names that their weights have in the class they came from, and in
        its order."""
        return {name: self.down if name == "down_proj" else self.up for name in self.names}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "packed" in self._modules:  # pickled by a version that packed expert by expert
            layers = self._modules.pop("packed")
            self.names = (up_name(self.template), "down_proj")
            transposed = self.template.is_transposed
            self.up = _stack_of([expert.up for expert in layers], transposed)
            self.down = _stack_of([expert.down for expert in layers], transposed)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys)
        with pre_hooks_first(self, *args, error_msgs):
            self._stack_singles(state_dict, prefix)
            error_msgs += self._rename_dense(state_dict, prefix)
            super()._load_from_state_dict(*args, error_msgs)

    def _stack_singles(self, state_dict, prefix: str) -> None:
        """Stacks the entries of a version that packed expert by expert: packed.7.up.weight, ..."""
        for side in ("up", "down"):
            stack = getattr(self, side)
            for key in stack._parameters:
                names = [f"{prefix}packed.{e}.{side}.{key}" for e in range(stack.num_experts)]
                if all(name in state_dict for name in names):
                    values = [state_dict.pop(name) for name in names]
                    if key != "weight_codebook":
                        values = [torch.stack(values)]
                    state_dict[f"{prefix}{side}.{key}"] = values[0]

    def _rename_dense(self, state_dict, prefix: str) -> list[str]:
        """Renames the dense weights of the fused module to the stacks' entries, which pack them.
        Returns error messages; if there are any, it renames none."""
        name = type(self).__name__
        dense = {}  # key -> (its shape, the stack's own key)
        for key, stack in self.stacks().items():
            side = "down" if stack is self.down else "up"
            dense[prefix + key] = dense_shape(stack), f"{prefix}{side}.weight"
            if stack._parameters["bias"] is not None:
                shape = (stack.num_experts, stack.out_features)
                dense[f"{prefix}{key}_bias"] = shape, f"{prefix}{side}.bias"
        given = [key for key in dense if key in state_dict]
        read_lazy(state_dict, given)
        values = {key: state_dict.pop(key) for key in given}
        packed = [k for k in state_dict if k.startswith((f"{prefix}up.", f"{prefix}down."))]
        own = {prefix + key: p for key, p in self.named_parameters()} if given and packed else {}
        others = [key for key in packed if not is_own(own.get(key), state_dict[key])]
        errors = []
        if given and others:
            errors.append(
                f"{name}: the state dict has {given[0]}, which is dense, and {others[0]}, which is "
                "packed, want one of them"
            )
        for key, value in values.items():
            want = list(dense[key][0])
            got = not_dense(value)
            if got is None and (list(value.shape) != want or value.dtype not in FLOAT_DTYPES):
                got = f"{value.dtype} {list(value.shape)}"
            if got is not None:
                errors.append(
                    f"{name}: {key} is {got}, want float32, float16 or bfloat16 of shape {want}"
                )
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
            state_dict[dense[key][1]] = value
        return []

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: dict[str, Adapter] | None = None,
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H].

        An index below 0, or of E or more, marks a slot without an expert. adapters: LoRA that other
        modules hold, by the names of `stacks()`; see Stack4bit.forward.
        """
        up, down = None, None
        if adapters is not None:
            up, down = adapters.get(up_name(self.template)), adapters.get("down_proj")
        E = self.up.num_experts
        chosen = top_k_index.reshape(-1)
        is_none = (chosen < 0) | (chosen >= E)
        chosen, order = chosen.masked_fill(is_none, E).sort(stable=True)
        each = torch.arange(E, dtype=chosen.dtype, device=chosen.device)
        offsets = torch.searchsorted(chosen, each, right=True, out_int32=True)
        rows = (order // top_k_index.shape[-1]).to(torch.int32)

        h = self.up(to_autocast_dtype(hidden_states), offsets, rows, up)
        h = self.template._apply_gate(h) if self.template.has_gate else self.template.act_fn(h)
        y = self.down(h, offsets, None, down)
        if getattr(self.template, "has_post_expert_norm", False):  # transformers 5.20 has it
            y = self.template.post_expert_norm(y)

        # Back into the tokens' order, where a token's slots are neighbours.
        y = _Permute.apply(y, order.argsort(), order).view(*top_k_index.shape, y.shape[-1])
        weights = top_k_weights.masked_fill(is_none.view_as(top_k_index), 0)
        return (y * weights.unsqueeze(-1)).sum(-2).to(hidden_states.dtype)


def _pack(experts: nn.Module, name: str, config) -> Stack4bit:
    weight = getattr(experts, name)
    try:
        return Stack4bit.from_dense(weight, None, config, is_transposed=experts.is_transposed)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Name of each Stack4bit in model -> the name of the dense parameter that it was."""
    names = {}
    for holder, module in model.named_modules():
        if isinstance(module, Experts4bit):
            inside = {id(part): name for name, part in module.named_children()}
            for parameter, stack in module.stacks().items():
                start = f"{holder}." if holder else ""
                names[f"{start}{inside[id(stack)]}"] = f"{start}{parameter}"
    return names


# Pickles of whole models made by versions that packed expert by expert ------------------------


class _Expert(nn.Module):
    """One expert of such a pickle: the layers `up` and `down`."""


def _stack_of(layers: list[Linear4bit], is_transposed: bool) -> Stack4bit:
    first = layers[0]
    if type(first) is not Linear4bit:
        raise RuntimeError(
            f"Experts4bit: the pickled model has experts that are {type(first).__name__}, each "
            "with an adapter of its own; save the adapter with the version that wrote the pickle, "
            "and load it into the packed model"
        )
    stack = Stack4bit.empty(
        (len(layers), *first._shape),
        first.config,
        dtype=first.dtype,
        device="meta",
        is_transposed=is_transposed,
    )
    for key, parameter in first._parameters.items():
        value = None
        if parameter is not None:
            parts = [layer._parameters[key].detach() for layer in layers]
            value = parts[0] if key == "weight_codebook" else torch.stack(parts)
            value = nn.Parameter(value, requires_grad=False)
        stack.register_parameter(key, value)
    return stack.train(first.training)
