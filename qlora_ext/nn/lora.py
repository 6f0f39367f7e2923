"""Linear layers with a LoRA adapter, on a packed or a dense weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from .. import ops
from ..checks import FLOAT_MAX, check_input, check_scaling, is_number
from ..tensor.config import FLOAT_DTYPES
from ..text import shorten
from .linear import Linear4bit, _check_own_weight, _share, is_conv1d, is_plain_linear
from .offload import device_of
from .panel import PanelLinear, _panel_product
from .shared_input import SharedInput


class _Lora(nn.Module):
    """The bypass that our layers with an adapter add: scaling * dropout(x) A^T B^T.

    Source: LoRA (arXiv 2106.09685). A starts Kaiming-uniform with a = sqrt(5), as in PEFT; B starts
    at zero.
    """

    def _init_lora(self, r, lora_alpha, lora_dropout, use_rslora, device, lora_dtype) -> None:
        name = type(self).__name__
        if type(r) is not int or r < 1:
            raise ValueError(f"{name}: r is {r!r}, want an integer of 1 or more")
        if not isinstance(lora_dropout, (int, float)) or not 0 <= lora_dropout < 1:
            raise ValueError(
                f"{name}: lora_dropout is {lora_dropout!r}, want a probability in [0, 1)"
            )
        if lora_dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: lora_dtype is {lora_dtype}, want float32, float16 or bfloat16"
            )
        self.r = r
        self.lora_dropout = float(lora_dropout)
        self.set_scaling(lora_alpha, use_rslora)
        lora_A, lora_B = self._new_factors(r, device, lora_dtype)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

    def _new_factors(self, r, device, lora_dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they start: the bypass adds nothing yet."""
        lora_A = torch.empty(r, self.in_features, device=device, dtype=lora_dtype)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        return lora_A, lora_A.new_zeros(self.out_features, r)

    def __setattr__(self, name: str, value) -> None:
        if name == "scaling":
            value = check_scaling(type(self).__name__, value)
        super().__setattr__(name, value)

    def set_scaling(self, lora_alpha: float, use_rslora: bool = False) -> None:
        """Sets the bypass's factor to lora_alpha / r, or to lora_alpha / sqrt(r) with use_rslora.

        ValueError unless lora_alpha is a positive number that fits float32, as in LoraConfig.
        """
        if not is_number(lora_alpha) or not 0 < lora_alpha <= FLOAT_MAX:
            raise ValueError(
                f"{type(self).__name__}: lora_alpha is {shorten(lora_alpha)}, want a finite number "
                "above 0 that fits float32"
            )
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    def _lora_repr(self) -> str:
        return f", r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


class LoraLinear4bit(_Lora, Linear4bit):
    """Linear4bit with one LoRA adapter: y = x W^T + b + scaling * dropout(x) A^T B^T.

    lora_A [r, in_features] and lora_B [out_features, r] are trainable and have lora_dtype (float32
    by default), whatever x's dtype is; scaling = lora_alpha / r. Dropout acts only in training and
    only on the bypass's input. One op computes product and bypass, without an [M, N] temporary.
    add_lora(..., share_inputs=True) sets `shared_input`, a group of layers that read the same x.

    Args:
        in_features, out_features, bias, config, device, dtype: as for Linear4bit.
        r: rank, 1 or more. A rank above min(in_features, out_features) works, as in PEFT, but has
            no benefit.
        lora_alpha, lora_dropout: as in PEFT. use_rslora: scaling = lora_alpha / sqrt(r).
        lora_dtype: dtype of lora_A and lora_B.

    Raises:
        ValueError: r or lora_dropout is out of range.
        TypeError: as for Linear4bit, or lora_dtype is not float32, float16 or bfloat16.
    """

    shared_input: SharedInput | None = None

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        lora_dtype=torch.float32,
        config=None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, config=config, device=device, dtype=dtype)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora, self.weight.device, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config=None,
        *,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        lora_dtype=torch.float32,
    ):
        """Adds an adapter to a Linear4bit and shares its bytes. A dense layer is packed first.

        Raises as the constructor and Linear4bit.from_linear do; also TypeError if linear has an
        adapter already, or if it is packed already with another config than the given one.
        """
        name = cls.__name__
        if isinstance(linear, _Lora):
            raise TypeError(
                f"{name}: linear is a {type(linear).__name__}, want a layer without an adapter"
            )
        if not isinstance(linear, Linear4bit):
            linear = Linear4bit.from_linear(linear, config)
        elif config is not None and config != linear.config:
            raise TypeError(
                f"{name}: config is given for a layer that is quantized already "
                f"({linear._describe()}), want None"
            )
        self = cls.__new__(cls)
        _share(linear, self)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora, device_of(linear), lora_dtype)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features] in x's (or autocast's) dtype."""
        if is_compiling():
            return self._product(x, True)
        try:
            return self._product(x, False)
        except Exception:
            check_input(type(self).__name__, x=x)
            raise

    def _product(self, x: torch.Tensor, is_traced: bool) -> torch.Tensor:
        p = self._parameters
        lora_A = p["lora_A"]
        dropout = self.lora_dropout if self.training else 0.0
        group = None if is_traced or dropout else self.shared_input
        given, x = x, self._input(x)
        S = None if group is None else group.take(self, given, x)
        args = (self._w4(is_traced), lora_A, p["lora_B"], self.scaling, p["bias"])
        return ops.lora_linear(x, *args, dropout, S)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._lora_repr()


class LoraLinear(_Lora, nn.Linear):
    """An unquantized nn.Linear (a language model's head) with one LoRA adapter.

    The dense weight and bias are frozen and shared with the layer it was made from, so a weight
    tied to an embedding stays tied. lora_A [r, in_features] and lora_B [out_features, r] are as in
    LoraLinear4bit; x: [..., in_features] -> [..., out_features].
    """

    always_panels = None  # the PanelLinear's value if it was made from one

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        lora_dtype=torch.float32,
    ):
        """Adds an adapter to a plain nn.Linear or a PanelLinear.

        Raises:
            TypeError: linear is another module, or a subclass of nn.Linear: that may compute
                something else.
            ValueError: r or lora_dropout is out of range.
        """
        is_plain = is_plain_linear(linear) and not is_conv1d(linear)
        if not is_plain and type(linear) is not PanelLinear:
            raise TypeError(
                f"{cls.__name__}: linear is a {type(linear).__name__}, want a plain nn.Linear with "
                "a dense weight and no adapter"
            )
        _check_own_weight(cls.__name__, linear)
        self = cls.__new__(cls)
        _share(linear, self)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora, device_of(linear), lora_dtype)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features]."""
        if self.always_panels is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = _panel_product(x, self.weight, self.bias, self.always_panels)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        S = F.linear(dropped.to(self.lora_A.dtype), self.lora_A)
        return y + (F.linear(S, self.lora_B) * self.scaling).to(y.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._lora_repr()
