"""PanelLinear: an unquantized bf16 or fp16 linear layer, fast on CPUs where torch's is slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from .. import ops
from .linear import _share


def _slow_on_cpu() -> frozenset[torch.dtype]:
    """The dtypes that this CPU has no instructions for, so that torch's own products are slow. (One
    core, 1536 x 576 and 8192 x 576, 192 rows: forward 5x slower than through fp32 panels, backward
    40x; with avx512_bf16, bf16 is 2x faster. 2026-11.) If ATEN_CPU_CAPABILITY limits torch to AVX2,
    the CPU's other instructions do not count."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return frozenset((torch.bfloat16, torch.float16))
    bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    float16 = torch.cpu._is_amx_fp16_supported()
    slow = {torch.bfloat16: not bfloat16, torch.float16: not float16}
    return frozenset(dtype for dtype, is_slow in slow.items() if is_slow)


SLOW_ON_CPU = _slow_on_cpu()


def _panel_product(x: torch.Tensor, weight: torch.Tensor, bias, always: bool) -> torch.Tensor:
    """x W^T + b, through fp32 panels if they are faster than torch's own product, or always."""
    if weight.dtype is torch.uint8:
        raise RuntimeError(
            "PanelLinear: weight is uint8, the packed table that the layer was tied to "
            "(tie_weights): only a dense table can be tied; tie before packing, which leaves tied "
            "tables dense, or set config.tie_word_embeddings=False and load the layer anew"
        )
    low = weight.dtype in (SLOW_ON_CPU if not always else (torch.bfloat16, torch.float16))
    if not low or x.dtype is not weight.dtype or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if x.is_nested or x.layout is not torch.strided:  # torch's product takes these
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):  # autocast chooses the dtype of torch's product
        return F.linear(x, weight, bias)
    # Use panels if a backward follows, which gains most from them, or in a compiled graph, which
    # serves any number of rows; otherwise only for enough rows.
    backward = x.requires_grad and torch.is_grad_enabled()
    if backward or is_compiling() or x.numel() >= 4 * weight.shape[1]:
        return ops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


class PanelLinear(nn.Linear):
    """An unquantized nn.Linear (a language model's head) that is fast in bf16 and fp16 on any CPU.

    If the CPU has no instructions for the dtype, forward and backward cast panels of the weight to
    fp32 and multiply those. Each call decides, because the weight may be cast or moved. Parameters
    and state dict are nn.Linear's own, so a tied weight stays tied.
    x: [..., in_features] -> [..., out_features] in x's dtype.
    """

    always_panels = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, always: bool = False):
        """The same layer with the same parameters. always: use panels even if torch is fast.

        Raises TypeError for anything but a plain nn.Linear.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"{cls.__name__}: linear is a {type(linear).__name__}, want a plain nn.Linear"
            )
        self = cls.__new__(cls)
        _share(linear, self)
        self.always_panels = always  # on the instance, so that an adapted layer takes it over
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features]."""
        return _panel_product(x, self.weight, self.bias, self.always_panels)
