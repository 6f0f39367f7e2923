"""The ops of a mixture of experts: wrappers, fakes and autograd formulas, as in ops.py.

`w4` describes a stack of shape [E, N, K] (`QuantizedTensor.op_args()` of a stack). The rows of a
product are sorted by expert: `offsets` int32 [E] is where each expert's rows end, and rows past the
last one are zero in every result and gradient. `rows` int32 [M] says which row of x [T, K] each of
the M sorted rows takes; None: x is sorted, and T = M. Both are on x's device, and the host never
reads them there.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import (
    W4,
    _below_autograd,
    _direct_apply,
    _empty_like,
    _ops,
    _register_autograd,
    _register_fake,
    _scaled,
)


def _sorted_rows(a) -> int:
    return a.x.shape[0] if a.rows is None else a.rows.shape[0]


# grouped_gemm_4bit --------------------------------------------------------------------------


@_register_fake("qlora_ext::grouped_gemm_4bit")
def _(a):
    return a.x.new_empty((_sorted_rows(a), a.shape[1]))


@_register_fake("qlora_ext::grouped_gemm_4bit_backward")
def _(a):
    return a.dY.new_empty((a.dY.shape[0], a.shape[2]))


@_register_fake("qlora_ext::sum_rows")
def _(a):
    return a.values.new_empty((a.ends.shape[0], a.values.shape[1]))


def _sum_to_x(dX: Tensor, rows: Tensor | None, T: int) -> Tensor:
    """The gradient of x [T, K] from dX, that of its sorted rows: the gradients of a row of x are
    added in the order in which they were sorted."""
    if rows is None:
        return dX
    row, order = rows.sort(stable=True)
    each = torch.arange(T, dtype=rows.dtype, device=rows.device)
    ends = torch.searchsorted(row, each, right=True, out_int32=True)
    return _ops.sum_rows.default(dX, order.to(torch.int32), ends)


def _bias_gradient(dY: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N]: the sums of each expert's rows of dY, in their order."""
    order = torch.arange(dY.shape[0], dtype=torch.int32, device=dY.device)
    return _ops.sum_rows.default(dY.float(), order, offsets).to(dtype)


def _saved(ctx, w4: W4) -> Sequence[Tensor | None]:
    """The tensors of a weight to save for the backward pass. None of them if the weight is kept in
    host memory and can be fetched again (nn/expert_offload.py)."""
    ctx.static, ctx.again = w4[4:], getattr(w4, "again", None)
    return w4[:4] if ctx.again is None else ()


@contextlib.contextmanager
def _restored(ctx, tensors: Sequence[Tensor | None]) -> Iterator[W4]:
    """A context with the weight whose tensors `_saved` saved."""
    if ctx.again is None:
        yield (*tensors, *ctx.static)
    else:
        with ctx.again() as w4:
            yield w4


class _GroupedGemm4bit(torch.autograd.Function):
    op = "grouped_gemm_4bit"

    @staticmethod
    def forward(ctx, x, w4, offsets, rows, bias, lora_S, lora_B):
        ctx.save_for_backward(*_saved(ctx, w4), offsets, rows, lora_S, lora_B)
        ctx.T = x.shape[0]
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _below_autograd():
            return _ops.grouped_gemm_4bit.default(x, *w4, offsets, rows, bias, lora_S, lora_B)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        *weight, offsets, rows, lora_S, lora_B = ctx.saved_tensors
        need = ctx.needs_input_grad
        dX = dbias = dS = dB = None
        if need[0]:
            with _restored(ctx, weight) as w4:
                dX = _ops.grouped_gemm_4bit_backward.default(dY, *w4, offsets)
            dX = _sum_to_x(dX, rows, ctx.T)
        if need[4]:
            dbias = _bias_gradient(dY, offsets, ctx.bias_dtype)
        if need[5] or need[6]:
            dS, dB = _ops.grouped_lora_expand_backward.default(dY, lora_S, lora_B, offsets)
        return dX, None, None, None, dbias, dS, dB


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _grouped_gemm_4bit_eager(x, w4, offsets, rows=None, bias=None, lora_S=None, lora_B=None):
    if _requires_grad(x, bias, lora_S, lora_B):
        return _grouped_gemm_4bit_apply(x, w4, offsets, rows, bias, lora_S, lora_B)
    with _below_autograd():
        return _ops.grouped_gemm_4bit.default(x, *w4, offsets, rows, bias, lora_S, lora_B)


_grouped_gemm_4bit_apply = _direct_apply(_GroupedGemm4bit)
_register_autograd("grouped_gemm_4bit", _grouped_gemm_4bit_eager)


def grouped_gemm_4bit(
    x: Tensor,
    w4: W4,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    lora_S: Tensor | None = None,
    lora_B: Tensor | None = None,
) -> Tensor:
    """y [M, N]: expert e's rows of x times W_e^T, + bias[e] + S lora_B[e]^T.

    x [T, K] fp32, bf16 or fp16; bias [E, N]; lora_S fp32 [M, r] from `grouped_lora_shrink`; lora_B
    [E, N, r]. An expert's rows of y are those of one `gemm_4bit` call with all its rows of x, on
    the CPU bit for bit. Raises RuntimeError for shapes and dtypes that do not fit; on the CPU also
    for offsets that decrease or exceed M, and for rows that x does not have. A GPU cuts such
    offsets to valid ones and takes zeros for such rows.
    """
    if torch.compiler.is_compiling():
        return _ops.grouped_gemm_4bit.default(x, *w4, offsets, rows, bias, lora_S, lora_B)
    return _grouped_gemm_4bit_eager(x, w4, offsets, rows, bias, lora_S, lora_B)


# grouped_lora_shrink, grouped_lora_expand_backward ------------------------------------------


@_register_fake("qlora_ext::grouped_lora_shrink")
def _(a):
    return a.x.new_empty((_sorted_rows(a), a.lora_A.shape[1]), dtype=torch.float32)


@_register_fake("qlora_ext::grouped_lora_shrink_backward")
def _(a):
    dx = (_sorted_rows(a), a.x.shape[1]) if a.need_dx else (0,)
    return a.x.new_empty(dx), _empty_like(a.lora_A)


@_register_fake("qlora_ext::grouped_lora_expand_backward")
def _(a):
    dS = a.dY.new_empty((a.dY.shape[0], a.lora_B.shape[2]), dtype=torch.float32)
    return dS, _empty_like(a.lora_B)


class _GroupedLoraShrink(torch.autograd.Function):
    op = "grouped_lora_shrink"

    @staticmethod
    def forward(ctx, x, lora_A, scaling, offsets, rows):
        ctx.save_for_backward(x, lora_A, offsets, rows)
        ctx.scaling = scaling
        with _below_autograd():
            return _ops.grouped_lora_shrink.default(x, lora_A, scaling, offsets, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dS):
        x, lora_A, offsets, rows = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        dx, dA = _ops.grouped_lora_shrink_backward.default(
            dS, x, lora_A, ctx.scaling, offsets, rows, need_dx
        )
        return _sum_to_x(dx, rows, x.shape[0]) if need_dx else None, dA, None, None, None


def _grouped_lora_shrink_eager(x, lora_A, scaling, offsets, rows=None):
    if _requires_grad(x, lora_A):
        return _grouped_lora_shrink_apply(x, lora_A, scaling, offsets, rows)
    with _below_autograd():
        return _ops.grouped_lora_shrink.default(x, lora_A, scaling, offsets, rows)


_grouped_lora_shrink_apply = _direct_apply(_GroupedLoraShrink)
_register_autograd("grouped_lora_shrink", _grouped_lora_shrink_eager)


def grouped_lora_shrink(
    x: Tensor, lora_A: Tensor, scaling: float | Tensor, offsets: Tensor, rows: Tensor | None = None
) -> Tensor:
    """S fp32 [M, r]: expert e's rows of x times scaling lora_A[e]^T; x [T, K], lora_A [E, r, K].

    scaling: a number, or a 0-d tensor as for `lora_shrink`.
    """
    if isinstance(scaling, Tensor):
        return _scaled(grouped_lora_shrink(x, lora_A, 1.0, offsets, rows), scaling)
    if torch.compiler.is_compiling():
        return _ops.grouped_lora_shrink.default(x, lora_A, scaling, offsets, rows)
    return _grouped_lora_shrink_eager(x, lora_A, scaling, offsets, rows)


# grouped_lora_gemm_4bit ---------------------------------------------------------------------


@_register_fake("qlora_ext::grouped_lora_gemm_4bit")
def _(a):
    M = _sorted_rows(a)
    S = a.x.new_empty((M, a.lora_A.shape[1]), dtype=torch.float32)
    return a.x.new_empty((M, a.shape[1])), S


@_register_fake("qlora_ext::grouped_lora_gemm_4bit_backward")
def _(a):
    dX = a.dY.new_empty((a.dY.shape[0], a.shape[2]) if a.need_dx else (0,))
    return dX, _empty_like(a.lora_A), _empty_like(a.lora_B)


class _GroupedLoraGemm4bit(torch.autograd.Function):
    """One node for the experts and their bypass: dX = [dY | dS] [W; A] is one product."""

    op = "grouped_lora_gemm_4bit"

    @staticmethod
    def forward(ctx, x, w4, lora_A, lora_B, scaling, offsets, rows, bias):
        with _below_autograd():
            y, S = _ops.grouped_lora_gemm_4bit.default(
                x, *w4, lora_A, lora_B, scaling, offsets, rows, bias
            )
        ctx.save_for_backward(x, S, lora_A, lora_B, offsets, rows, *_saved(ctx, w4))
        ctx.scaling = scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(S)
        return y, S

    @staticmethod
    @once_differentiable
    def backward(ctx, dY, _dS):
        x, S, A, B, offsets, rows, *weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        dX = dA = dB = dbias = None
        if need[2] or need[3]:
            with _restored(ctx, weight) as w4:
                dX, dA, dB = _ops.grouped_lora_gemm_4bit_backward.default(
                    dY, x, S, *w4, A, B, ctx.scaling, offsets, rows, need[0]
                )
        elif need[0]:  # the adapter is frozen
            dS, _ = _ops.grouped_lora_expand_backward.default(dY, S, B, offsets)
            dS = dS * ctx.scaling
            with _restored(ctx, weight) as w4:
                dX = _ops.grouped_gemm_4bit_backward.default(dY, *w4, offsets, dS, A)
        if need[7]:
            dbias = _bias_gradient(dY, offsets, ctx.bias_dtype)
        dX = _sum_to_x(dX, rows, x.shape[0]) if need[0] else None
        return dX, None, dA, dB, None, None, None, dbias


def _grouped_lora_gemm_4bit_eager(x, w4, lora_A, lora_B, scaling, offsets, rows=None, bias=None):
    if _requires_grad(x, lora_A, lora_B, bias):
        return _grouped_lora_gemm_4bit_apply(x, w4, lora_A, lora_B, scaling, offsets, rows, bias)
    with _below_autograd():
        return _ops.grouped_lora_gemm_4bit.default(
            x, *w4, lora_A, lora_B, scaling, offsets, rows, bias
        )


_grouped_lora_gemm_4bit_apply = _direct_apply(_GroupedLoraGemm4bit)
_register_autograd("grouped_lora_gemm_4bit", _grouped_lora_gemm_4bit_eager)


def grouped_lora_gemm_4bit(
    x: Tensor,
    w4: W4,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y [M, N]: expert e's rows of x times W_e^T, + bias[e] + scaling (x lora_A[e]^T) lora_B[e]^T.

    lora_A [E, r, K] and lora_B [E, N, r] of one dtype (use fp32 for fine-tuning). The rest is as in
    `grouped_gemm_4bit`; differentiable in x, lora_A, lora_B and bias. scaling: a number, or a 0-d
    tensor as for `lora_gemm_4bit`.
    """
    if isinstance(scaling, Tensor):
        lora_S = grouped_lora_shrink(x, lora_A, scaling, offsets, rows)
        return grouped_gemm_4bit(x, w4, offsets, rows, bias, lora_S, lora_B)
    if torch.compiler.is_compiling():
        return _ops.grouped_lora_gemm_4bit.default(
            x, *w4, lora_A, lora_B, scaling, offsets, rows, bias
        )[0]
    return _grouped_lora_gemm_4bit_eager(x, w4, lora_A, lora_B, scaling, offsets, rows, bias)[0]
