"""Turns a packed or adapted layer into the plain dense layer that computes the same.

Everything that merges or unpacks uses this: merging to 16 bits, PEFT's merges, the commands.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import hosts, ops
from ..checks import check_finite
from ..tensor.functions import dequantize_4bit
from ..tensor.quantized import QuantizedTensor
from .embedding import Embedding4bit
from .experts import Experts4bit
from .linear import _share
from .lora import LoraLinear, _Lora
from .packed import _Packed4bit
from .panel import PanelLinear
from .stack import Adapter, LoraStack4bit, Stack4bit

_PART = 2**20  # weights added at a time


def adapted_weight(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    transposed: bool = False,
) -> torch.Tensor:
    """W + scaling B A in fp32.

    weight: dense [N, K], or [K, N] if transposed, of any float dtype; A [r, K]; B [N, r].
    """
    total = B.float() @ A.float()
    if transposed:
        total = total.T.contiguous()
    # Add W to the product in place, a part at a time, so that W is never in fp32 as a whole.
    flat, weight = total.view(-1), weight.reshape(-1)
    for start in range(0, flat.numel(), _PART):
        part = flat[start : start + _PART]
        torch.add(weight[start : start + _PART].float(), part, alpha=scaling, out=part)
    return total


def merged_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [N, K] of a packed or adapted layer, or [E, N, K] of a stack, in dtype."""
    if isinstance(module, LoraLinear):
        A, B = module.lora_A.detach(), module.lora_B.detach()
        return adapted_weight(module.weight.detach(), A, B, module.scaling).to(dtype)
    if isinstance(module, LoraStack4bit):
        return merged_stack(module.quantized, _adapter_of(module), dtype)
    if isinstance(module, _Lora):
        # The op needs A and B in one dtype; fp32 holds both exactly.
        A, B = module.lora_A.detach().float(), module.lora_B.detach().float()
        return ops.merge_lora_4bit(module.quantized.op_args(), A, B, module.scaling, dtype)
    if not isinstance(module, _Packed4bit):
        return module.weight.detach().to(dtype)
    return dequantize_4bit(module.quantized, dtype)


def merged_stack(q: QuantizedTensor, adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    """The dense stack [E, N, K] of q plus its adapter, in dtype, computed expert by expert."""
    stack = q.packed.new_empty(q.shape, dtype=dtype)
    for e, expert in enumerate(stack):
        expert.copy_(merged_expert(q, adapter, e, dtype))
    return stack


def _adapter_of(stack: Stack4bit) -> Adapter | None:
    if not isinstance(stack, LoraStack4bit):
        return None
    return stack.lora_A.detach(), stack.lora_B.detach(), stack.scaling


def merged_expert(
    q: QuantizedTensor, adapter: Adapter | None, e: int, dtype: torch.dtype
) -> torch.Tensor:
    """The dense weight [N, K] of one expert of a stack, with its adapter."""
    if adapter is None:
        return dequantize_4bit(q[e], dtype)
    A, B, scaling = adapter
    # The op needs A and B in one dtype (fp32 holds both exactly) and on q's device, which is the
    # CPU under offload_experts.
    pair = (factor[e].float().contiguous().to(q.packed.device) for factor in (A, B))
    return ops.merge_lora_4bit(q[e].op_args(), *pair, scaling, dtype)


def dense_linear(layer: nn.Module, weight: torch.Tensor) -> nn.Linear:
    """A frozen nn.Linear with this weight [out, in] and the bias of layer, in the weight's dtype.

    If layer replaced a Conv1D, the result has from_conv1d set; restore_conv1d makes it a Conv1D.
    """
    bias = layer.bias
    linear = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    if getattr(layer, "from_conv1d", False):
        linear.from_conv1d = True
    return linear.train(layer.training)


def restore_conv1d(linear: nn.Linear) -> nn.Module:
    """The layer in its class before packing. GPT-2's layers are Conv1D, with weight [in, out]."""
    if not getattr(linear, "from_conv1d", False):
        return linear
    with torch.device("meta"):
        conv1d = hosts.conv1d_class()(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    if linear.bias is not None:
        conv1d.bias = linear.bias
    return conv1d.train(linear.training)


def dense_embedding(layer: Embedding4bit, weight: torch.Tensor) -> nn.Embedding:
    """A frozen nn.Embedding with this weight [rows, width]."""
    table = nn.Embedding(*weight.shape, layer.padding_idx, device="meta")
    table.weight = nn.Parameter(weight, requires_grad=False)
    return table.train(layer.training)


def dense_layer(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen plain layer that computes what module computes, its adapter included."""
    if isinstance(module, Experts4bit):
        return dense_experts(module, dtype)
    if type(module) is PanelLinear:
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        # The same parameter objects: they may be tied, and are cast with the rest of the model.
        linear.weight, linear.bias = module.weight, module.bias
        return linear.train(module.training)
    weight = merged_weight(module, dtype)
    if isinstance(module, Embedding4bit):
        return dense_embedding(module, weight)
    return restore_conv1d(dense_linear(module, weight))


def dense_experts(
    module: Experts4bit, dtype: torch.dtype, merged: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """The fused module that `module` was made from; its weights include the stacks' adapters.

    merged: weights [E, N, K], by the names in `stacks()`, to use instead of the module's own.
    """
    experts = type(module.template).__new__(type(module.template))
    _share(module.template, experts)
    for name, stack in module.stacks().items():
        given = None if merged is None else merged.get(name)
        weight = merged_weight(stack, dtype) if given is None else given
        if experts.is_transposed:
            weight = weight.mT.contiguous()
        experts.register_parameter(name, nn.Parameter(weight))
        if stack.bias is not None:
            # The bias may be on another device: offload_experts keeps only weights in host memory.
            bias = nn.Parameter(stack.bias.detach().to(weight.device, dtype))
            experts.register_parameter(f"{name}_bias", bias)
    return experts.train(module.training)


# Range --------------------------------------------------------------------------------------------


def _weight_bound(q: QuantizedTensor) -> float:
    """An upper bound on |dequantized weight|, computed from the statistics alone."""
    values = max(abs(v) for v in q.values)
    if q.nested is None:
        scale = q.absmax.clone().view(torch.float32).abs().max().item()
    else:
        nested = q.nested.clone().view(torch.float32).abs()
        scale = (nested[..., 0] + nested[..., 1:].amax(-1)).max().item()
    mean = 0.0 if q.mean is None else q.mean.clone().view(torch.float32).abs().max().item()
    return values * scale + mean


WIDER = "merge to torch.bfloat16 or torch.float32"


def check_weight(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Raises OverflowError, which names the layer, if its dense weight does not fit dtype. In a
    stack it names the expert: `name[7]`.

    The weight itself is computed only if a bound from its statistics cannot rule that out.
    """
    weight = module._parameters["weight"]
    if weight.is_meta:
        return
    packed = isinstance(module, _Packed4bit)
    bound = _weight_bound(module.quantized) if packed else weight.abs().max().item()
    if isinstance(module, _Lora):
        A, B = module.lora_A.detach().float(), module.lora_B.detach().float()
        # |B A| <= (row norms of B) * (column norms of A), by Cauchy-Schwarz.
        norms = B.norm(dim=-1).amax(-1) * A.norm(dim=-2).amax(-1)
        bound += abs(module.scaling) * norms.max().item()
    if not bound < torch.finfo(dtype).max / 2:
        advice = WIDER if dtype == torch.float16 else ""
        if isinstance(module, Stack4bit):
            q, adapter = module.quantized, _adapter_of(module)
            for e in range(module.num_experts):
                values = merged_expert(q, adapter, e, torch.float32)
                check_finite(f"{name}[{e}]", values, dtype, advice=advice)
        else:
            check_finite(name, merged_weight(module, torch.float32), dtype, advice=advice)
