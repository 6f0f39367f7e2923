"""Stack4bit, the packed matrices of a layer's experts as one tensor, and the same with LoRA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .. import grouped_ops
from ..checks import check_input
from ..tensor.config import FLOAT_DTYPES
from ..tensor.functions import quantize_tensor
from .dense_state import dense_shape
from .linear import _share
from .lora import _Lora
from .packed import _PACKED_KEYS, _UNSEEN, _frozen, _Packed4bit, tensors_of

# A [E, r, K], B [E, N, r] and the scaling: a number, or a 0-d tensor as for ops.lora_shrink.
Adapter = tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]


class Stack4bit(_Packed4bit):
    """y_e = x_e W_e^T + b_e for the experts e of a layer: one packed [E, N, K], one product.

    The rows of x are sorted by expert, and `offsets` says where each expert's rows end. Parameters:
    weight uint8 [E, N, K / 2] and its statistics (see packed.py), each expert's as if it were
    packed alone; bias [E, N] of `dtype`, or None. `from_dense` packs a stack; state dicts take a
    dense `weight` too.
    """

    is_transposed: bool  # whether the dense stack is stored as [E, K, N]
    # An ExpertFetcher of expert_offload.py, which brings the packed tensors from host memory.
    fetcher: Any = None

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        config=None,
        *,
        is_transposed: bool = False,
    ):
        """Packs a dense stack; on the meta device, the result is on meta.

        Args:
            weight: [E, N, K], or [E, K, N] if is_transposed; float32, float16 or bfloat16, K even.
            bias: [E, N] or None; it is copied.
            config: a QuantConfig, or None for NF4 with blocks of 64.

        Raises:
            TypeError: weight has another dtype.
            ValueError: it is not such a stack, or K is odd.
            RuntimeError: a weight has a NaN or Inf; the error names the expert and the index.
        """
        name = cls.__name__
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: weight has dtype {weight.dtype}, want float32, float16 or bfloat16"
            )
        weight = weight.detach()
        values = weight.mT if is_transposed and weight.ndim == 3 else weight
        if values.ndim != 3 or 0 in values.shape or values.shape[2] % 2:
            want = "[E, K, N]" if is_transposed else "[E, N, K]"
            raise ValueError(
                f"{name}: weight has shape {list(weight.shape)}, want {want} with K even and no "
                "size 0"
            )
        self = cls.empty(
            values.shape, config, dtype=weight.dtype, device="meta", is_transposed=is_transposed
        )
        if not weight.is_meta:
            self._quantize(values)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return self

    @classmethod
    def empty(cls, shape, config=None, *, dtype, device=None, is_transposed: bool = False):
        """A stack of shape [E, N, K] without bias whose bytes are not set yet: set_expert packs
        one expert after another, so that no dense stack is ever held."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._init_packed(tuple(shape), config, dtype)
        self.num_experts, self.out_features, self.in_features = shape
        self.is_transposed = is_transposed
        self._set_empty(device)
        self.register_parameter("bias", None)
        return self

    @torch.no_grad()
    def set_expert(self, e: int, weight: torch.Tensor) -> None:
        """Packs weight, [N, K] or [K, N] if is_transposed, as expert e. Raises ValueError for
        another shape, IndexError for e, and RuntimeError for a NaN or Inf; the expert stays as it
        was."""
        want = dense_shape(self)[1:]
        if tuple(weight.shape) != want:
            raise ValueError(
                f"{type(self).__name__}: expert {e} has shape {list(weight.shape)}, want "
                f"{list(want)}"
            )
        q = quantize_tensor(weight.detach().T if self.is_transposed else weight, self.config)
        parts = tensors_of(q)
        for key in self._sizes():
            own = self._parameters[key][e]
            own.copy_(parts[key].view_as(own))
        self._unseal()

    def forward(
        self,
        x: torch.Tensor,
        offsets: torch.Tensor,
        rows: torch.Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> torch.Tensor:
        """x [T, in_features] -> [M, out_features] in x's dtype, sorted by expert.

        offsets: int32 [E], where each expert's rows end; rows past the last are zero in y. rows:
        int32 [M], which row of x each sorted row takes; None: x is sorted, and M = T. adapter: A
        [E, r, in_features], B [E, out_features, r] and scaling of a LoRA that another module holds.
        """
        try:
            if self.fetcher is not None:
                return self._fetched_product(x, offsets, rows, adapter)
            return self._product(x, offsets, rows, adapter)
        except Exception:
            if not torch.compiler.is_compiling():
                check_input(type(self).__name__, x=x, offsets=offsets)
            raise

    @property
    def device(self) -> torch.device:
        """Where the products are computed."""
        return self._parameters["weight"].device if self.fetcher is None else self.fetcher.device

    def _w4(self, is_traced: bool):
        w4 = super()._w4(is_traced)
        return w4 if self.fetcher is None else self.fetcher.fetch(self, w4)

    def _unseal(self) -> None:
        super()._unseal()
        if self.fetcher is not None:
            self.fetcher.forget(self)

    def __getstate__(self):
        return {**super().__getstate__(), "fetcher": None}  # a copy is not offloaded

    def _to_host(self, pinned: bool) -> None:
        """Moves the packed tensors to host memory."""
        for key in _PACKED_KEYS:
            parameter = self._parameters[key]
            if parameter is not None:
                value = parameter.detach().cpu()
                setattr(self, key, _frozen(value.pin_memory() if pinned else value))
        self.__dict__.update(_UNSEEN)

    def _apply(self, fn, recurse=True):
        if self.fetcher is None:
            return super()._apply(fn, recurse)
        # The packed bytes stay in host memory; bias and adapters move.
        return super()._apply(lambda t: t if t.dtype == torch.uint8 else fn(t), recurse)

    @torch.compiler.disable
    def _fetched_product(self, x, offsets, rows, adapter):
        # A graph would save what was fetched, and the next layers overwrite it.
        with self.fetcher.lock:
            return self._product(x, offsets, rows, adapter)

    def _product(self, x, offsets, rows, adapter):
        w4, bias = self._w4(torch.compiler.is_compiling()), self._parameters["bias"]
        if adapter is None:
            return grouped_ops.grouped_gemm_4bit(x, w4, offsets, rows, bias)
        return grouped_ops.grouped_lora_gemm_4bit(x, w4, *adapter, offsets, rows, bias)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self._parameters['bias'] is not None}, "
            f"{self._describe()}"
        )


class LoraStack4bit(_Lora, Stack4bit):
    """Stack4bit with a LoRA adapter for each expert: + scaling (x_e A_e^T) B_e^T.

    lora_A [E, r, in_features] and lora_B [E, out_features, r] are trainable. There is no dropout:
    PEFT has none for stacked parameters, and its files cannot store one.
    """

    @classmethod
    def from_stack(cls, stack: Stack4bit, *, r=8, lora_alpha=16, use_rslora=False,
                   lora_dtype=torch.float32, device=None):  # fmt: skip
        """Adds adapters to a Stack4bit and shares its bytes. Raises as LoraLinear4bit does."""
        if isinstance(stack, _Lora) or not isinstance(stack, Stack4bit):
            raise TypeError(
                f"{cls.__name__}: stack is a {type(stack).__name__}, want a Stack4bit without an "
                "adapter"
            )
        self = cls.__new__(cls)
        _share(stack, self)
        device = stack.device if device is None else device
        self._init_lora(r, lora_alpha, 0.0, use_rslora, device, lora_dtype)
        return self

    def _new_factors(self, r, device, lora_dtype) -> tuple[torch.Tensor, torch.Tensor]:
        E, N, K = self._shape
        lora_A = torch.empty(E, r, K, device=device, dtype=lora_dtype)
        nn.init.kaiming_uniform_(lora_A.view(E * r, K), a=math.sqrt(5))
        return lora_A, lora_A.new_zeros(E, N, r)

    def _product(self, x, offsets, rows, adapter):
        p = self._parameters
        own = p["lora_A"], p["lora_B"], self.scaling
        return super()._product(x, offsets, rows, own if adapter is None else adapter)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._lora_repr()
