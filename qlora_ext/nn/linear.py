"""Linear4bit, a linear layer with a packed weight, and the checks of layers to pack as one."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.compiler import is_compiling

from .. import ops
from ..checks import check_input, not_dense
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import to_autocast_dtype
from .packed import _Packed4bit


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether module computes x W^T + b and nothing else, so that a Linear4bit can replace it.

    True for nn.Linear and Conv1D themselves. A subclass may compute something else (a router, a
    fused layer), or its parent may read its weight. Falcon's subclass is known to be plain.
    """
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear" or is_conv1d(module)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a Conv1D, however its weight is stored."""
    if is_conv1d(linear):
        return linear.weight.shape[1], linear.weight.shape[0]
    return linear.out_features, linear.in_features


class Linear4bit(_Packed4bit, nn.Linear):
    """y = x W^T + b with W packed in 4 bits and frozen: [..., in_features] -> [..., out_features].

    x is float32, float16 or bfloat16. y has x's dtype, or autocast's if autocast is on; the bias (a
    plain parameter of `dtype`) may have another one. Sums are in fp32 and rounded once.

    The constructor packs random weights, drawn as nn.Linear draws them. On the meta device it
    allocates nothing and waits for a state dict. `from_linear` packs a trained layer. So does
    load_state_dict, if it is given a dense `weight` of the logical shape.

    Args:
        in_features, out_features: logical sizes K and N, whatever the packed tensors' shapes are.
        bias: whether there is a bias [out_features] of `dtype`.
        config: a QuantConfig; None is NF4, blocks of 64, double-quantized (4.127 bits per weight).
        device, dtype: as for nn.Linear. The bias and the dequantized weight have this dtype.

    Raises:
        TypeError: config is not a QuantConfig, or dtype is not float32, float16 or bfloat16.
        RuntimeError: from load_state_dict: a key's shape, dtype or codebook is wrong, or a dense
            weight has a NaN or Inf; the key is named, and the layer stays as it was.
    """

    from_conv1d = False  # whether it replaced a Conv1D; if so, merging gives a Conv1D back
    fused: str | None = None  # its name in the model, if that is one of FUSED

    def __init__(
        self, in_features, out_features, bias=True, *, config=None, device=None, dtype=None
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._init_packed((out_features, in_features), config, dtype)
        # Zeros, because a model may be built with nn.init switched off (Fabric.init_module can).
        draft = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        if draft.is_meta:
            self._set_empty("meta")
        else:
            nn.init.kaiming_uniform_(draft, a=math.sqrt(5))
            self._quantize(draft)
        self.register_parameter("bias", None)
        if bias:
            bound = 1 / math.sqrt(in_features) if in_features > 0 else 0
            self.bias = nn.Parameter(draft.new_empty(out_features).uniform_(-bound, bound))

    @classmethod
    def empty_like(cls, linear: nn.Module, config=None, *, device="meta", dtype=None):
        """An unfilled Linear4bit of an nn.Linear's or Conv1D's shape, to load a checkpoint into.

        Args:
            linear: the layer to replace; its weight is not read and may be on meta.
            device: where the packed tensors are allocated. dtype: None takes linear's dtype.
        """
        _check_source(cls.__name__, linear)
        N, K = linear_shape(linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = K, N
        self._init_packed((N, K), config, dtype or linear.weight.dtype)
        self._set_empty(device)
        self.register_parameter("bias", None)
        if linear.bias is not None:
            bias = torch.empty(N, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        self.from_conv1d = is_conv1d(linear)
        return self.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Module, config=None):
        """Packs an nn.Linear or transformers' Conv1D.

        Args:
            linear: the layer; it is not changed, and its bias is shared. A layer on the meta
                device gives a module on the meta device.
            config: a QuantConfig, or None for NF4 with blocks of 64.

        Raises:
            TypeError: linear is not a linear layer or is quantized already, or its weight is
                parametrized or not float32, float16 or bfloat16.
            RuntimeError: the weight has a NaN or Inf; the error names its index.
        """
        self = cls.empty_like(linear, config)
        if not linear.weight.is_meta:
            weight = linear.weight.detach()
            self._quantize(weight.T.contiguous() if self.from_conv1d else weight)
        if linear.bias is not None:
            self.bias = linear.bias
        return self

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype that the product runs in."""
        if x.dtype is torch.uint8:
            raise TypeError(
                f"{type(self).__name__}: x has dtype uint8, want float32, float16 or bfloat16. The "
                "caller cast its activations to this layer's weight.dtype, which is that of packed "
                "bytes (T5's feed-forward does so with `wo`): keep the layer unquantized, with "
                'modules_to_not_convert=["wo"]'
            )
        return to_autocast_dtype(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features] in x's (or autocast's) dtype."""
        bias = self._parameters["bias"]
        if is_compiling():
            return ops.gemm_4bit(self._input(x), self._w4(True), bias)
        try:
            return ops.gemm_4bit_eager(self._input(x), self._w4(False), bias)
        except Exception:
            check_input(type(self).__name__, x=x)
            raise

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._describe()}"
        )


def _check_source(name: str, linear: nn.Module) -> None:
    if isinstance(linear, _Packed4bit):
        raise TypeError(
            f"{name}: linear is a {type(linear).__name__}, want an nn.Linear with a dense weight; "
            "it is quantized already"
        )
    if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
        raise TypeError(
            f"{name}: linear is a {type(linear).__name__}, want an nn.Linear or "
            "transformers' Conv1D"
        )
    if torch.nn.utils.parametrize.is_parametrized(linear):
        raise TypeError(
            f"{name}: linear's weight is parametrized ({', '.join(linear.parametrizations)}), want "
            "a plain one; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    _check_own_weight(name, linear)
    if linear.weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: linear.weight has dtype {linear.weight.dtype}, want float32, float16 or "
            "bfloat16"
        )
    got = None if linear.bias is None else not_dense(linear.bias)
    if got is not None:
        raise TypeError(f"{name}: linear.bias is {got}, want a dense tensor")


def _check_own_weight(name: str, linear: nn.Module) -> None:
    if linear._parameters.get("weight") is None:
        raise TypeError(
            f"{name}: linear.weight is computed from other parameters "
            f"({', '.join(linear._parameters)}) by torch.nn.utils' weight_norm or spectral_norm, "
            "want a parameter; remove_weight_norm or remove_spectral_norm makes it one"
        )


def _share(source: nn.Module, target: nn.Module) -> None:
    """Gives target the attributes of source, with the same parameters, buffers and hooks."""
    for key, value in source.__dict__.items():
        if key not in ("forward", "_hf_hook", "_old_forward"):
            # Copy the containers of parameters and hooks, but share what they hold.
            container = isinstance(value, (dict, set))
            target.__dict__[key] = copy.copy(value) if container else value
