"""Tensor parallelism for packed layers: styles for torch's `parallelize_module`.

    plan = {
        "model.layers.*.self_attn.q_proj": ColwiseParallel4bit(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel4bit(), ...
    }
    parallelize_module(model, mesh, plan)

A column-parallel layer holds N / world rows of W [N, K] and computes these columns of y. A
row-parallel layer holds K / world columns of W, takes the same part of x, and sums y over the
processes. Packed bytes are cut between blocks, so the weights stay exactly the same. Cutting
double-quantized scales would cut through their groups of 256, so scales are kept in fp32. That is
4.5 bits per weight at blocks of 64 instead of 4.127.

Parameters become DTensors, so an optimizer, `clip_grad_norm_` and torch.distributed.checkpoint see
whole tensors.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .. import ops
from ..checks import check_input
from ..nn.experts import Experts4bit
from ..nn.linear import Linear4bit
from ..nn.lora import LoraLinear4bit
from ..nn.marked import MarkedWeight
from ..nn.stack import Stack4bit

__all__ = ["ColwiseParallel4bit", "ParallelLinear4bit", "RowwiseParallel4bit"]


def _sum(x: torch.Tensor, group) -> torch.Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


class _Copied(torch.autograd.Function):
    """Returns x in every process. Its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return _sum(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """Returns x summed over the processes. Each term gets the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, group):
        return _sum(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class ParallelLinear4bit(MarkedWeight):
    """A Linear4bit or LoraLinear4bit that one of the styles below has cut, in place.

    Parameters, all DTensors over the mesh: `weight` uint8 [N, K / 2]; `weight_absmax` (and
    `weight_mean`) uint8 [N, 4 K / blocksize], bytes of fp32; `bias` [N]; `lora_A` [r, K] and
    `lora_B` [N, r]. Column-parallel: x [..., K] -> [..., N / world]. Row-parallel:
    x [..., K / world] -> [..., N], the sum.
    """

    holds_packed_weight = True
    _input = Linear4bit._input

    @staticmethod
    def convert(layer: Linear4bit, mesh, rowwise: bool) -> None:
        """Turns layer into a ParallelLinear4bit that holds this process's part.

        Raises:
            TypeError: layer is not a Linear4bit or LoraLinear4bit.
            ValueError: the layer cannot be cut between blocks; a layer that holds several
                (`qkv_proj`) would be cut by rows; the mesh has more than one dimension.
        After an error the layer is as it was.
        """
        if mesh.ndim != 1:
            raise ValueError(
                f"tensor parallel: the mesh has {mesh.ndim} dimensions, want 1; give that of "
                'the processes that share a layer, such as mesh["tp"]'
            )
        if isinstance(layer, (Stack4bit, Experts4bit)):
            raise TypeError(
                f"tensor parallel: the layer is a {type(layer).__name__}, which holds a mixture's "
                "experts, want a Linear4bit or a LoraLinear4bit; leave the experts out of the plan "
                "and shard them with FSDP2, which gives each process some of them"
            )
        if type(layer) not in (Linear4bit, LoraLinear4bit):
            whose, advice = "a ", "pack the layer, or leave it out of the plan"
            if hasattr(layer, "base_layer"):
                whose, advice = "PEFT's ", "PEFT's adapters cannot be cut: use add_lora"
            raise TypeError(
                f"tensor parallel: the layer is {whose}{type(layer).__name__}, want a Linear4bit "
                f"or a LoraLinear4bit of add_lora; {advice}"
            )
        if layer.fused and not rowwise:
            raise ValueError(
                f"tensor parallel: {layer.fused} holds several layers, one after the other, and "
                "cutting its rows would not give each process a part of every one; leave it out of "
                "the plan"
            )
        q, world = layer.quantized, mesh.size()
        N, K = q.shape
        step = q.blocksize * (world if rowwise else 1)  # 0: one scale for the whole weight
        if not step or K % step or (not rowwise and N % world):
            want = (
                f"K a multiple of blocksize x {world}"
                if rowwise
                else f"K a multiple of blocksize and N of {world}"
            )
            raise ValueError(
                f"tensor parallel: a [{N}, {K}] weight with blocksize={q.blocksize or None} cannot "
                f"be cut into {world} parts by {'columns' if rowwise else 'rows'}, want {want}; "
                "use another number of processes, or leave the layer out of the plan"
            )
        absmax = q.absmax
        if q.nested is not None:
            absmax = torch.ops.qlora_ext.dequantize_absmax(absmax, q.nested).view(torch.uint8)
        along = Shard(1) if rowwise else Shard(0)
        parts = {
            "weight": (q.packed.reshape(N, K // 2), along),
            "weight_absmax": (absmax.reshape(N, -1), along),
            "weight_mean": (None if q.mean is None else q.mean.reshape(N, -1), along),
            "bias": (layer.bias, Replicate() if rowwise else along),
        }
        if isinstance(layer, LoraLinear4bit):
            parts["lora_A"] = (layer.lora_A, along if rowwise else Replicate())
            parts["lora_B"] = (layer.lora_B, Replicate() if rowwise else along)
        trained = {name: p.requires_grad for name, p in layer.named_parameters()}
        parameters = {
            name: None
            if tensor is None
            else nn.Parameter(
                distribute_tensor(tensor.detach(), mesh, [placement]), trained.get(name, False)
            )
            for name, (tensor, placement) in parts.items()
        }
        layer._parameters.clear()
        layer.__class__ = ParallelLinear4bit
        layer.rowwise, layer.mesh = rowwise, mesh
        shape = (N, K // world) if rowwise else (N // world, K)
        layer.format = (None, shape, q.blocksize, q.quant_type, q.codebook)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)

    def _own(self, name: str, copied: bool = False) -> torch.Tensor | None:
        """This process's part of a parameter. copied: every process has the whole parameter and
        computes a part of its gradient, so the gradients are summed."""
        parameter: DTensor | None = self._parameters.get(name)
        if parameter is None:
            return None
        own = parameter.to_local()
        return _Copied.apply(own, self.mesh) if copied else own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] or this process's part of it; see the class. Raises TypeError if x
        is a DTensor."""
        if isinstance(x, DTensor):
            want = "this process's part, x.to_local()" if self.rowwise else "x.full_tensor()"
            raise TypeError(f"tensor parallel: x is a DTensor, want a plain tensor: {want}")
        # Other layers check only after an error. Here the communication would fail first.
        check_input(type(self).__name__, x=x)
        x = self._input(x)
        if not self.rowwise:
            x = _Copied.apply(x, self.mesh)
        nested, *format = self.format
        w4 = (self._own("weight"), self._own("weight_absmax"), nested, self._own("weight_mean"))
        bias = self._own("bias")
        w4, added = (*w4, *format), None if self.rowwise else bias
        if "lora_A" in self._parameters:
            A = self._own("lora_A", copied=not self.rowwise)
            B = self._own("lora_B", copied=self.rowwise)
            dropout = self.lora_dropout if self.training else 0.0
            y = ops.lora_linear(x, w4, A, B, self.scaling, added, dropout)
        else:
            y = ops.gemm_4bit(x, w4, added)
        if not self.rowwise:
            return y
        y = _Summed.apply(y, self.mesh)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        cut = "columns" if self.rowwise else "rows"
        return f"in_features={self.in_features}, out_features={self.out_features}, {cut} of W cut"


class ColwiseParallel4bit(ParallelStyle):
    """Cuts a packed layer's outputs. N must be a multiple of the number of processes, and K of the
    block size. Layers that hold several (Phi-3's `qkv_proj` and `gate_up_proj`) are refused."""

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        ParallelLinear4bit.convert(module, device_mesh, rowwise=False)
        return module


class RowwiseParallel4bit(ParallelStyle):
    """Cuts a packed layer's inputs. K / processes must be a multiple of the block size."""

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        ParallelLinear4bit.convert(module, device_mesh, rowwise=True)
        return module
