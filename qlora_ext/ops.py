"""torch.ops.qlora_ext.*: each op's Python wrapper, fake and autograd formula.

`w4` is the argument tuple of a 4-bit weight, `QuantizedTensor.op_args()`: (packed, absmax, nested,
mean, shape, blocksize, quant_type, codebook); csrc/schemas.h documents each. Sizes below: x
[..., K], weight [N, K], y [..., N], lora_A [r, K], lora_B [N, r], S [..., r].

There are two ways to the same kernels. torch.compile and torch.export trace the public ops, whose
autograd formula is registered with the dispatcher. In eager mode the dispatcher's way through
Python would take longer than a small layer. So the wrappers here call an autograd.Function directly
if a gradient is needed, and the op below autograd if not.

This file is longer than others, so that everything about an op is in one place.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .build_info import _C  # noqa: F401  (importing it registers the schemas and the CPU kernels)

_ops = torch.ops.qlora_ext
_lib = torch.library.Library("qlora_ext", "IMPL")
_below_autograd = torch._C._AutoDispatchBelowAutograd
W4 = tuple[Any, ...]


def _register_fake(name: str) -> Callable[..., Any]:
    """torch.library.register_fake for a function that computes shapes from the op's arguments,
    named as in its schema. It refuses tensors on several devices: a single one on meta would bring
    the call here, and the caller would get uninitialized memory."""
    op, _, overload = name.removeprefix("qlora_ext::").partition(".")
    arguments = getattr(getattr(_ops, op), overload or "default")._schema.arguments
    names = [a.name for a in arguments]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    required = {a.name for a in arguments if str(a.type) == "Tensor"}

    def register(fake: Callable[[SimpleNamespace], Any]) -> None:
        def checked(*args, **kwargs):
            given = {**dict(zip(names, args)), **kwargs}
            for key, value in given.items():
                if value is None and key in required:
                    raise RuntimeError(f"{op}: {key} is None, want a tensor")
            tensors = [(key, value) for key, value in given.items() if isinstance(value, Tensor)]
            for key, tensor in tensors[1:]:
                if tensor.device != tensors[0][1].device:
                    raise RuntimeError(
                        f"{op}: {key} is on {tensor.device}, want {tensors[0][1].device} like "
                        f"{tensors[0][0]} (every tensor of a call on one device)"
                    )
            return fake(SimpleNamespace(**{**defaults, **given}))

        torch.library.register_fake(name, checked)

    return register


def _empty_like(t: Tensor) -> Tensor:
    """An uninitialized tensor of t's shape and dtype, contiguous as all results are."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _register_autograd(name: str, eager: Callable[..., Any]) -> None:
    """Registers `eager` for the op's Autograd key. It gets the weight's eight arguments as one w4
    tuple. (torch.library.register_autograd would cost 50 us a call; csrc/schemas.h has the argument
    order.)"""
    arguments = getattr(_ops, name).default._schema.arguments
    defaults = [a.default_value for a in arguments]
    names = [a.name for a in arguments]
    required = [i for i, a in enumerate(arguments) if str(a.type) == "Tensor"]
    first = names.index("packed") if "packed" in names else None  # lora_shrink has no 4-bit weight

    def autograd(*args):
        for i in required:
            if args[i] is None:  # the dispatcher would pass it on as an undefined tensor
                raise RuntimeError(f"{name}: {names[i]} is None, want a tensor")
        args = (*args, *defaults[len(args) :])
        if first is None:
            return eager(*args)
        return eager(*args[:first], args[first : first + 8], *args[first + 8 :])

    _lib.impl(name, autograd, "Autograd")


def _direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without its Python wrapper. The wrapper looks for functorch's tensors, which
    takes 3 us of a tiny layer's 15. Under functorch's transforms (vmap, torch.func.grad), which
    these functions do not support, it calls the wrapper, which raises."""
    direct = super(torch.autograd.Function, function).apply

    def apply(*args):
        try:
            if torch._C._are_functorch_transforms_active():
                return function.apply(*args)
            return direct(*args)
        except RuntimeError as error:
            if "map::at" in str(error) and torch._C._get_tracing_state() is not None:
                raise RuntimeError(
                    f"{function.op}: torch.jit.trace cannot record its gradient; trace under "
                    "torch.no_grad(), or export the model with torch.export"
                ) from error
            # torch saves tensors after forward has returned, so its error names neither the op nor
            # the cause.
            if not str(error).startswith("Inference tensors cannot be saved"):
                raise
            raise RuntimeError(
                f"{function.op}: one of its tensors was made under torch.inference_mode, and "
                "autograd cannot save it for the backward pass; load the model and make its input "
                "outside of inference_mode, or under torch.no_grad()"
            ) from error

    return apply


# quantize_4bit ------------------------------------------------------------------------------


@_register_fake("qlora_ext::quantize_4bit")
def _(a):
    numel = a.weight.numel()
    num_blocks = 1 if a.blocksize == 0 else (numel + a.blocksize - 1) // a.blocksize
    mean_blocks = num_blocks if a.normalization == "standard" else 0
    return (
        a.weight.new_empty((numel + 1) // 2, dtype=torch.uint8),
        a.weight.new_empty(4 * num_blocks, dtype=torch.uint8),
        a.weight.new_empty(4 * mean_blocks, dtype=torch.uint8),
    )


# quantize_absmax, dequantize_absmax ---------------------------------------------------------


@_register_fake("qlora_ext::quantize_absmax")
def _(a):
    num_blocks = a.absmax.numel() // 4
    return (
        a.absmax.new_empty(num_blocks),
        a.absmax.new_empty(4 * (1 + (num_blocks + 255) // 256)),
    )


@_register_fake("qlora_ext::dequantize_absmax")
def _(a):
    return a.code.new_empty(4 * a.code.numel())


# dequantize_4bit ----------------------------------------------------------------------------


@_register_fake("qlora_ext::dequantize_4bit")
def _(a):
    return a.packed.new_empty(a.shape, dtype=a.dtype)


@_register_fake("qlora_ext::dequantize_4bit.out")
def _(a):
    return None


def dequantize_4bit(w4: W4, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor of its logical shape and `dtype`, in `out` if that is given."""
    if out is None:
        return _ops.dequantize_4bit.default(*w4, dtype)
    _ops.dequantize_4bit.out(*w4, out=out)
    return out


# gemm_4bit ----------------------------------------------------------------------------------


@_register_fake("qlora_ext::gemm_4bit")
def _(a):
    return a.x.new_empty((*a.x.shape[:-1], a.shape[0]))


@_register_fake("qlora_ext::gemm_4bit_backward")
def _(a):
    return a.dY.new_empty((*a.dY.shape[:-1], a.shape[1]))


class _Gemm4bit(torch.autograd.Function):
    """y = x W^T + bias + S B^T. It saves the packed weight and its statistics (so that
    checkpointing with offload sees them), S and B. w4 is one argument because each argument takes
    time at M = 1."""

    op = "gemm_4bit"

    @staticmethod
    def forward(ctx, x, w4, bias, lora_S, lora_B):
        ctx.save_for_backward(*w4[:4], lora_S, lora_B)
        ctx.static = w4[4:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _below_autograd():
            return _ops.gemm_4bit.default(x, *w4, bias, lora_S, lora_B)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        packed, absmax, nested, mean, lora_S, lora_B = ctx.saved_tensors
        need = ctx.needs_input_grad
        dX = dbias = dS = dB = None
        if need[0]:
            dX = _ops.gemm_4bit_backward.default(dY, packed, absmax, nested, mean, *ctx.static)
        if need[2]:
            dbias = _bias_gradient(dY, ctx.bias_dtype)
        if need[3] or need[4]:
            dS, dB = _ops.lora_expand_backward.default(dY, lora_S, lora_B)
        return dX, None, dbias, dS, dB


def _bias_gradient(dY: Tensor, dtype: torch.dtype) -> Tensor:
    return dY.reshape(-1, dY.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


def gemm_4bit_eager(x, w4, bias=None, lora_S=None, lora_B=None):
    """gemm_4bit for a caller that knows that no graph is traced. Asking takes time at M = 1."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (lora_S is not None and lora_S.requires_grad)
        or (lora_B is not None and lora_B.requires_grad)
    ):
        return _gemm_4bit_apply(x, w4, bias, lora_S, lora_B)
    with _below_autograd():
        return _gemm_4bit_op(x, *w4, bias, lora_S, lora_B)


_gemm_4bit_apply = _direct_apply(_Gemm4bit)
_gemm_4bit_op = _ops.gemm_4bit.default
_register_autograd("gemm_4bit", gemm_4bit_eager)


def gemm_4bit(
    x: Tensor,
    w4: W4,
    bias: Tensor | None = None,
    lora_S: Tensor | None = None,
    lora_B: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + S B^T, accumulated in fp32 and rounded once to x's dtype.

    x [..., K] fp32, bf16 or fp16; bias [N]; lora_S [..., r] fp32 from `lora_shrink` (it includes
    the scaling; a slice of columns is read in place); lora_B [N, r].
    """
    if torch.compiler.is_compiling():
        return _ops.gemm_4bit.default(x, *w4, bias, lora_S, lora_B)
    return gemm_4bit_eager(x, w4, bias, lora_S, lora_B)


# lora_shrink, lora_expand_backward ----------------------------------------------------------


@_register_fake("qlora_ext::lora_shrink")
def _(a):
    return a.x.new_empty((*a.x.shape[:-1], a.lora_A.shape[0]), dtype=torch.float32)


@_register_fake("qlora_ext::lora_shrink_backward")
def _(a):
    return _empty_like(a.x) if a.need_dx else a.x.new_empty(0), _empty_like(a.lora_A)


@_register_fake("qlora_ext::lora_expand_backward")
def _(a):
    return (
        a.dY.new_empty((*a.dY.shape[:-1], a.lora_B.shape[1]), dtype=torch.float32),
        _empty_like(a.lora_B),
    )


class _LoraShrink(torch.autograd.Function):
    op = "lora_shrink"

    @staticmethod
    def forward(ctx, x, lora_A, scaling):
        ctx.save_for_backward(x, lora_A)
        ctx.scaling = scaling
        with _below_autograd():
            return _ops.lora_shrink.default(x, lora_A, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, dS):
        x, lora_A = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        dx, dA = _ops.lora_shrink_backward.default(dS, x, lora_A, ctx.scaling, need_dx)
        return dx if need_dx else None, dA, None


def _lora_shrink_eager(x, lora_A, scaling):
    if torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad):
        return _lora_shrink_apply(x, lora_A, scaling)
    with _below_autograd():
        return _ops.lora_shrink.default(x, lora_A, scaling)


_lora_shrink_apply = _direct_apply(_LoraShrink)
_register_autograd("lora_shrink", _lora_shrink_eager)


def _scaled(S: Tensor, scaling: Tensor) -> Tensor:
    if scaling.dim() != 0:
        raise ValueError(
            f"lora_shrink: scaling has shape {list(scaling.shape)}, want a number or a 0-d tensor"
        )
    return S * scaling


def lora_shrink(x: Tensor, lora_A: Tensor, scaling: float | Tensor) -> Tensor:
    """S = scaling x A^T in fp32. Layers that share x can stack their A's for one call.

    scaling: a number, or a 0-d tensor, which a compiled graph reads again at each call (PEFT's
    hot-swapping writes into it). The op takes only numbers, so S is multiplied by a tensor after
    the op.
    """
    if isinstance(scaling, Tensor):
        return _scaled(lora_shrink(x, lora_A, 1.0), scaling)
    if torch.compiler.is_compiling():
        return _ops.lora_shrink.default(x, lora_A, scaling)
    return _lora_shrink_eager(x, lora_A, scaling)


# lora_gemm_4bit -----------------------------------------------------------------------------


@_register_fake("qlora_ext::lora_gemm_4bit")
def _(a):
    S_shape = (*a.x.shape[:-1], a.lora_A.shape[0]) if a.lora_S is None else (0,)
    return a.x.new_empty((*a.x.shape[:-1], a.shape[0])), a.x.new_empty(S_shape, dtype=torch.float32)


@_register_fake("qlora_ext::lora_gemm_4bit_backward")
def _(a):
    dX = a.dY.new_empty((*a.dY.shape[:-1], a.shape[1])) if a.need_dx else a.dY.new_empty(0)
    return (
        dX,
        _empty_like(a.lora_A),
        _empty_like(a.lora_B),
    )


class _LoraGemm4bit(torch.autograd.Function):
    """One autograd node for the layer and its bypass, so that the backward can compute the fused
    dX = [dY | dS] [W; A], together with dB = dY^T S and dA = dS^T x."""

    op = "lora_gemm_4bit"

    @staticmethod
    def forward(ctx, x, w4, lora_A, lora_B, scaling, bias, lora_S):
        with _below_autograd():
            y, S = _ops.lora_gemm_4bit.default(x, *w4, lora_A, lora_B, scaling, bias, lora_S)
        given = S if lora_S is None else lora_S
        ctx.save_for_backward(x, given, *w4[:4], lora_A, lora_B)
        ctx.static = w4[4:]
        ctx.scaling = scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(S)
        return y, S

    @staticmethod
    @once_differentiable
    def backward(ctx, dY, _dS):
        x, S, packed, absmax, nested, mean, A, B = ctx.saved_tensors
        need = ctx.needs_input_grad
        w4 = (packed, absmax, nested, mean, *ctx.static)
        dX = dA = dB = dbias = None
        if need[2] or need[3]:
            dX, dA, dB = _ops.lora_gemm_4bit_backward.default(
                dY, x, S, *w4, A, B, ctx.scaling, need[0]
            )
        elif need[0]:  # the adapter is frozen
            dS, _ = _ops.lora_expand_backward.default(dY, S, B)
            dX = _ops.gemm_4bit_backward.default(dY, *w4, dS * ctx.scaling, A)
        if need[5]:
            dbias = _bias_gradient(dY, ctx.bias_dtype)
        return dX if need[0] else None, None, dA, dB, None, dbias, None


def _lora_gemm_4bit_eager(x, w4, lora_A, lora_B, scaling, bias, lora_S=None):
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _lora_gemm_4bit_apply(x, w4, lora_A, lora_B, scaling, bias, lora_S)
    with _below_autograd():
        return _ops.lora_gemm_4bit.default(x, *w4, lora_A, lora_B, scaling, bias, lora_S)


_lora_gemm_4bit_apply = _direct_apply(_LoraGemm4bit)
_register_autograd("lora_gemm_4bit", _lora_gemm_4bit_eager)


def lora_gemm_4bit(
    x: Tensor,
    w4: W4,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    lora_S: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling (x A^T) B^T, with the bypass as extra K of the same accumulator.

    x [..., K] fp32, bf16 or fp16; lora_A [r, K] and lora_B [N, r] of one dtype (use fp32 for
    fine-tuning). The bypass is accumulated and kept in fp32. lora_S is scaling x A^T, if the caller
    has it already (fp32 [..., r]; columns of one `lora_shrink` over several layers' A's are read in
    place). It must have exactly this value. It gets no gradient; x and A get the same gradients as
    without it, and with another value these would be wrong.

    scaling: a number, or a 0-d tensor as for `lora_shrink`. With a tensor, x A^T and its backward
    are separate products, and lora_S is not used.
    """
    if isinstance(scaling, Tensor):
        return gemm_4bit(x, w4, bias, lora_shrink(x, lora_A, scaling), lora_B)
    if torch.compiler.is_compiling():
        return _ops.lora_gemm_4bit.default(x, *w4, lora_A, lora_B, scaling, bias, lora_S)[0]
    return _lora_gemm_4bit_eager(x, w4, lora_A, lora_B, scaling, bias, lora_S)[0]


def lora_linear(
    x: Tensor,
    w4: W4,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    lora_S: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling (dropout(x) A^T) B^T. Every layer with an adapter calls this.

    The arguments are lora_gemm_4bit's and dropout, the probability of a zero in the bypass's input.
    With dropout, the bypass and the weight get different inputs, so x A^T is a separate product.
    """
    if not dropout:
        return lora_gemm_4bit(x, w4, lora_A, lora_B, scaling, bias, lora_S)
    dropped = torch.nn.functional.dropout(x, dropout)
    return gemm_4bit(x, w4, bias, lora_shrink(dropped, lora_A, scaling), lora_B)


# merge_lora_4bit ----------------------------------------------------------------------------


@_register_fake("qlora_ext::merge_lora_4bit")
def _(a):
    return a.packed.new_empty(a.shape, dtype=a.dtype)


def merge_lora_4bit(
    w4: W4, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """dequantize(W) + scaling B A in fp32, rounded once to `dtype`: a dense [N, K]."""
    if isinstance(scaling, Tensor):
        scaling = scaling.item()
    with torch.no_grad():
        return _ops.merge_lora_4bit.default(*w4, lora_A.detach(), lora_B.detach(), scaling, dtype)


# embedding_4bit -----------------------------------------------------------------------------


@_register_fake("qlora_ext::embedding_4bit")
def _(a):
    return a.indices.new_empty((*a.indices.shape, a.shape[1]), dtype=a.dtype)


def embedding_4bit(indices: Tensor, w4: W4, dtype: torch.dtype) -> Tensor:
    """Rows of the weight: indices [...] int64 or int32 -> [..., K] in `dtype`."""
    return _ops.embedding_4bit.default(indices, *w4, dtype)


# linear -------------------------------------------------------------------------------------


@_register_fake("qlora_ext::linear")
def _(a):
    return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]))


@_register_fake("qlora_ext::linear_backward")
def _(a):
    return a.dY.new_empty((*a.dY.shape[:-1], a.weight.shape[1]))


class _Linear(torch.autograd.Function):
    """y = x W^T + bias with a dense W. W is usually frozen; torch computes its gradient if not."""

    op = "linear"

    @staticmethod
    def forward(ctx, x, weight, bias):
        need_dW = weight.requires_grad
        ctx.save_for_backward(weight, x if need_dW else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _below_autograd():
            return _ops.linear.default(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        weight, x = ctx.saved_tensors
        dX = dW = dbias = None
        if ctx.needs_input_grad[0]:
            dX = _ops.linear_backward.default(dY, weight)
        if ctx.needs_input_grad[1]:
            N, K = weight.shape
            dW = (dY.reshape(-1, N).float().T @ x.reshape(-1, K).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = _bias_gradient(dY, ctx.bias_dtype)
        return dX, dW, dbias


def _linear_eager(x, weight, bias=None):
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _linear_apply(x, weight, bias)
    with _below_autograd():
        return _ops.linear.default(x, weight, bias)


_linear_apply = _direct_apply(_Linear)
_register_autograd("linear", _linear_eager)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a dense weight [N, K] on the CPU, accumulated in fp32 and rounded once.

    x [..., K] and weight may each be fp32, bf16 or fp16; y has x's dtype. It is for CPUs without
    bf16 or fp16 instructions, on which torch's products of these dtypes are much slower than fp32.
    """
    if torch.compiler.is_compiling():
        return _ops.linear.default(x, weight, bias)
    return _linear_eager(x, weight, bias)
