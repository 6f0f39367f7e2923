"""Functions that make a QuantizedTensor, decode it and multiply by it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import ops
from ..checks import check_input, check_scaling
from .config import FLOAT_DTYPES, QuantConfig
from .quantized import QuantizedTensor, view_matrix


def _check_weight(weight: Tensor, op: str = "quantize_4bit") -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight is a {type(weight).__name__}, want a torch.Tensor")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: weight has dtype {weight.dtype}, want float32, float16 or bfloat16")
    if weight.device.type == "meta":
        raise ValueError(f"{op}: weight is on the meta device and has no values, want cpu or cuda")
    if weight.is_nested:
        raise TypeError(f"{op}: weight is a nested tensor, want a dense tensor")
    if weight.layout != torch.strided:
        raise TypeError(f"{op}: weight has layout {weight.layout}, want torch.strided")


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int | None = 64,
    double_quant: bool = True,
    normalization: str = "absmax",
    codebook=None,
    companding: str = "none",
    companding_k: float = 1.0,
    std_factor: float = 3.0,
) -> QuantizedTensor:
    """Quantizes a tensor to 4 bits (QLoRA, arXiv 2305.14314; settings: see QuantConfig).

    weight: any shape and strides, float32, float16 or bfloat16, on the CPU or a CUDA device.
    Returns a QuantizedTensor on the same device, with the same bytes on every backend.

    On a GPU this waits for the device to read one flag back, so a graph cannot capture it.

    Raises ValueError if a setting is out of range or weight has no data, TypeError for a dtype or
    layout it cannot take, and RuntimeError for a NaN or Inf weight, with its index.
    """
    return quantize_tensor(
        weight,
        QuantConfig(
            quant_type,
            blocksize,
            double_quant,
            normalization,
            codebook,
            companding,
            companding_k,
            std_factor,
        ),
    )


def quantize_tensor(weight: Tensor, config: QuantConfig) -> QuantizedTensor:
    """As `quantize_4bit`, with the settings in a QuantConfig."""
    _check_weight(weight)
    packed, absmax, mean = torch.ops.qlora_ext.quantize_4bit.default(
        weight.detach(),
        config.stored_blocksize,
        config.quant_type,
        config.codebook,
        config.normalization,
        config.std_factor,
        config.companding,
        float(config.companding_k),
    )
    nested = None
    if config.stores_nested:
        absmax, nested = torch.ops.qlora_ext.quantize_absmax.default(absmax)
    return QuantizedTensor(
        view_matrix(packed, weight.shape),
        absmax,
        nested,
        mean if config.stores_mean else None,
        weight.shape,
        weight.dtype,
        config.stored_blocksize,
        config.stored_quant_type,
        config.stored_codebook,
    )


def quantize_stack_4bit(weight: Tensor, config: QuantConfig | None = None) -> QuantizedTensor:
    """Packs a stack of experts [E, N, K]: each has the bytes that packing it alone gives.

    weight: float32, float16 or bfloat16, K even; it is read one expert at a time. config: the
    settings; None is NF4 with blocks of 64. Returns a QuantizedTensor of the same shape, whose
    tensors all have E as their first size.

    Raises ValueError for another number of dimensions, an odd K or no experts, and as
    `quantize_4bit` does; the error names the expert.
    """
    _check_weight(weight, "quantize_stack_4bit")
    if weight.dim() != 3 or weight.shape[0] == 0 or weight.shape[2] % 2:
        raise ValueError(
            f"quantize_stack_4bit: weight has shape {list(weight.shape)}, want [E, N, K] with at "
            "least one expert and an even K"
        )
    config = config or QuantConfig()
    stack: list[Tensor | None] = []
    for e, expert in enumerate(weight.detach()):
        try:
            q = quantize_tensor(expert, config)
        except RuntimeError as error:
            raise RuntimeError(f"expert {e}: {error}") from error
        parts = (q.packed, q.absmax, q.nested, q.mean)
        if e == 0:
            stack = [t if t is None else t.new_empty((len(weight), *t.shape)) for t in parts]
        for whole, part in zip(stack, parts, strict=True):
            if whole is not None:
                whole[e] = part
    packed, absmax, nested, mean = stack
    return dataclasses.replace(
        q, packed=packed, absmax=absmax, nested=nested, mean=mean, shape=weight.shape
    )


def dequantize_4bit(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The dense tensor: codebook[code] * scale (+ mean), computed in fp32 and rounded once.

    dtype: float32, float16 or bfloat16; None takes out's, else q.dtype. out: a contiguous tensor
    of q.shape to write into. A value beyond dtype's range (65,504 for float16) becomes an infinity,
    as in torch's own `.to(dtype)`: this op checks no values. The functions that put dense weights
    into a model or file (merge_and_unload, model.dequantize) raise an error instead.

    Raises RuntimeError if the statistics or `out` do not fit the shape, and ValueError if `dtype`
    contradicts `out` or `out` requires grad.
    """
    if out is not None and out.requires_grad:
        raise ValueError("dequantize_4bit: out requires grad, want a tensor that does not")
    if out is not None and dtype is not None and dtype != out.dtype:
        raise ValueError(f"dequantize_4bit: dtype is {dtype}, want out's {out.dtype} (or None)")
    args = _op_args("dequantize_4bit", q)
    if not q.is_stack:
        return ops.dequantize_4bit(args, dtype or q.dtype, out)
    if out is None:
        out = q.packed.new_empty(q.shape, dtype=dtype or q.dtype)
    elif out.shape != q.shape:
        raise RuntimeError(
            f"dequantize_4bit: out has shape {list(out.shape)}, want {list(q.shape)}"
        )
    for e, part in enumerate(out):
        ops.dequantize_4bit(q[e].op_args(), part.dtype, part)
    return out


def _op_args(function: str, q: QuantizedTensor) -> ops.W4:
    if not isinstance(q, QuantizedTensor):
        raise TypeError(
            f"{function}: q is a {type(q).__name__}, want a QuantizedTensor (see quantize_4bit)"
        )
    return q.op_args()


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype if autocast is on, as torch's own linear casts it."""
    # Ask without a device first: asking for one takes a tenth of a small layer's time. autocast
    # does not know the device "meta".
    if (
        torch._C._is_any_autocast_enabled()
        and x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype in FLOAT_DTYPES  # autocast leaves integers and float64 alone
    ):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def linear_4bit(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; W is decoded inside the multiplication.

    x [..., K] float32, bfloat16 or float16; q.shape [N, K]; bias [N] or None. Returns [..., N] in
    x's dtype (autocast's, if it is on), accumulated in fp32 and rounded once. Differentiable in x
    and bias; for the backward only the packed bytes are saved. Raises RuntimeError, which names the
    shape, dtype or device that does not fit.
    """
    check_input("linear_4bit", x=x)
    return ops.gemm_4bit(to_autocast_dtype(x), _op_args("linear_4bit", q), bias)


def lora_linear_4bit(
    x: Tensor,
    q: QuantizedTensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + bias + scaling (dropout(x) A^T) B^T: a 4-bit layer with its LoRA bypass fused in.

    lora_A [r, K] and lora_B [N, r] have one dtype (use float32 for fine-tuning, even if x is
    bfloat16 or float16); scaling = alpha / r (LoRA, arXiv 2106.09685). `dropout` is the probability
    of zeroing an element of the bypass's input. It is applied whenever it is > 0, so pass 0 for
    evaluation. The rest is as in `linear_4bit`; differentiable in x, lora_A, lora_B, bias.
    Raises ValueError for a scaling that is not finite or does not fit float32.
    """
    check_input("lora_linear_4bit", x=x, lora_A=lora_A, lora_B=lora_B)
    scaling = check_scaling("lora_linear_4bit", scaling)
    args = _op_args("lora_linear_4bit", q)
    return ops.lora_linear(to_autocast_dtype(x), args, lora_A, lora_B, scaling, bias, dropout)


def merge_lora_4bit(
    q: QuantizedTensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """dequantize(W) + scaling B A, summed in fp32 and rounded once to `dtype`: a dense [N, K].

    lora_A [r, K] and lora_B [N, r] have one dtype. Raises RuntimeError for shapes that do not fit,
    ValueError for a scaling that is not finite or does not fit float32. A sum beyond dtype's range
    becomes an infinity here; merge_and_unload raises an error that names the layer instead.
    """
    check_input("merge_lora_4bit", lora_A=lora_A, lora_B=lora_B)
    scaling = check_scaling("merge_lora_4bit", scaling)
    return ops.merge_lora_4bit(_op_args("merge_lora_4bit", q), lora_A, lora_B, scaling, dtype)
