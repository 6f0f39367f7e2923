"""Bad arguments of functions and ops: errors that say op, argument, got and want."""

import dataclasses

import pytest
import torch

import qlora_ext
from cases import CONFIGS, make_weight
from qlora_ext import QuantConfig, QuantizedTensor, ops
from qlora_ext.tensor.config import QUANT_TYPES

# quantize_4bit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, error, message",
    [
        ([1.0], TypeError, "weight is a list, want a torch.Tensor"),
        (
            torch.zeros(4, dtype=torch.int32),
            TypeError,
            "weight has dtype torch.int32, want float32",
        ),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "weight has dtype torch.complex64"),
        (
            torch.zeros(4, dtype=torch.float8_e4m3fn),
            TypeError,
            "weight has dtype torch.float8_e4m3fn",
        ),
        (torch.zeros(4, dtype=torch.float64), TypeError, "weight has dtype torch.float64"),
        (torch.zeros(4, device="meta"), ValueError, "weight is on the meta device"),
        (torch.eye(4).to_sparse(), TypeError, "weight has layout torch.sparse_coo"),
        (
            torch.tensor([0.0, float("nan")]),
            RuntimeError,
            r"weight has a NaN or an infinity at index \[1\]",
        ),
    ],
    ids=lambda v: str(v)[:24],
)
def test_quantize_refuses(weight, error, message):
    with pytest.raises(error, match="quantize_4bit: " + message):
        qlora_ext.quantize_4bit(weight)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_type": "nf3"}, "quant_type is 'nf3', want one of"),
        ({"blocksize": 48}, "blocksize is 48, want one of"),
        ({"blocksize": 8192}, "blocksize is 8192, want one of"),
        ({"blocksize": True}, "blocksize is True, want one of"),
        ({"blocksize": -64}, "blocksize is -64, want one of"),
        ({"normalization": "l2"}, "normalization is 'l2', want one of"),
        ({"companding": "mu-law"}, "companding is 'mu-law', want one of"),
        ({"companding": "logarithmic", "companding_k": 0.0}, "companding_k is 0, want a constant"),
        (
            {"companding": "exponential", "companding_k": float("nan")},
            "companding_k is nan, want a constant",
        ),
        ({"codebook": [0.0] * 16}, "codebook is .* want 16 values with quant_type 'custom'"),
        ({"quant_type": "custom"}, "codebook is None, want 16 values"),
        ({"quant_type": "custom", "codebook": [0.0] * 15}, "codebook has 15 values, want 16"),
        (
            {"quant_type": "custom", "codebook": [float("inf")] * 16},
            "codebook value 0 is inf, want a finite",
        ),
        ({"std_factor": 0.0}, "std_factor is 0.0, want a factor"),
        ({"std_factor": "x"}, "std_factor is 'x', want a number"),
        ({"companding_k": None}, "companding_k is None, want a number"),
        ({"companding_k": 10**400}, "companding_k is 1000.* want a number that fits a float"),
        ({"companding_k": -(10**400)}, "companding_k is -1000.* want a number that fits a float"),
        ({"companding_k": 10**5000}, "companding_k is an integer of 16610 bits, want a number"),
        ({"std_factor": 10**400}, "std_factor is 1000.* want a number that fits a float"),
        (
            {"quant_type": "custom", "codebook": [10**400] * 16},
            "codebook is .1000.* want a list of 16 numbers that fit a float",
        ),
        (
            {"quant_type": "custom", "codebook": [10**5000] * 16},
            "codebook is a list with integers of thousands of digits, want a list",
        ),
        ({"double_quant": "yes"}, "double_quant is 'yes', want True or False"),
        ({"quant_type": "custom", "codebook": 5}, "codebook is 5, want a list of 16 numbers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match="QuantConfig: " + message):
        QuantConfig(**settings)
    with pytest.raises(ValueError, match=message):
        qlora_ext.quantize_4bit(torch.zeros(4), **settings)


def test_scalars_and_empty_tensors():
    q = qlora_ext.quantize_4bit(torch.tensor(-2.0))
    assert q.shape == () and qlora_ext.dequantize_4bit(q).item() == -2.0
    for shape in [(0,), (0, 64), (3, 0)]:
        q = qlora_ext.quantize_4bit(torch.zeros(shape))
        assert qlora_ext.dequantize_4bit(q).shape == shape
        again = QuantizedTensor.from_state_dict(q.state_dict("w"), "w")
        assert again.shape == shape and qlora_ext.dequantize_4bit(again).shape == shape
    q = qlora_ext.quantize_4bit(torch.zeros(0, 64))
    assert qlora_ext.linear_4bit(torch.zeros(3, 64), q).shape == (3, 0)
    q = qlora_ext.quantize_4bit(torch.zeros(3, 0))
    assert torch.equal(qlora_ext.linear_4bit(torch.zeros(2, 0), q), torch.zeros(2, 3))


# Products -----------------------------------------------------------------------------------


def bad_call(**changes):
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    call = {
        "x": torch.randn(5, 64),
        "q": q,
        "A": torch.randn(4, 64),
        "B": torch.randn(48, 4),
        "bias": torch.randn(48),
        **changes,
    }
    return ops.lora_gemm_4bit(
        call["x"],
        call["q"].op_args(),
        call["A"],
        call["B"],
        1.0,
        call["bias"],
        call.get("lora_S"),
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": torch.randn(5, 63)},
            r"x has shape \[5, 63\], want \[..., 64\] for a weight of \[48, 64\]",
        ),
        ({"x": torch.tensor(1.0)}, "x is a scalar, want at least one dimension"),
        (
            {"x": torch.zeros(5, 64, dtype=torch.int64)},
            "x has dtype int64, want float32, float16 or bfloat16",
        ),
        ({"x": torch.zeros(5, 64, dtype=torch.float64)}, "x has dtype float64"),
        ({"A": torch.randn(4, 63)}, r"lora_A has shape \[4, 63\], want \[r, 64\]"),
        ({"A": torch.randn(64)}, r"lora_A has shape \[64\], want \[r, 64\]"),
        ({"A": torch.randn(0, 64), "B": torch.randn(48, 0)}, "lora_A has rank 0"),
        ({"B": torch.randn(48, 5)}, r"lora_B has shape \[48, 5\], want \[48, 4\]"),
        ({"B": torch.randn(48, 4).bfloat16()}, "lora_B has dtype bfloat16, want lora_A's float32"),
        ({"bias": torch.randn(47)}, r"bias has shape \[47\], want \[48\]"),
        ({"bias": torch.zeros(48, dtype=torch.int8)}, "bias has dtype int8"),
        ({"lora_S": torch.randn(5, 3)}, r"lora_S has shape \[5, 3\], want 5 rows of 4"),
        ({"lora_S": torch.randn(4, 4)}, r"lora_S has shape \[4, 4\], want 5 rows of 4"),
        ({"lora_S": torch.randn(5, 4).bfloat16()}, "lora_S has dtype bfloat16, want float32"),
    ],
    ids=lambda v: str(v if isinstance(v, str) else [*v])[:40],
)
def test_products_refuse(changes, message):
    with pytest.raises(RuntimeError, match=r"(lora_gemm_4bit|lora_shrink): " + message):
        bad_call(**changes)


def test_weights_that_do_not_fit_their_description():
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    packed, absmax, nested, mean, shape, blocksize, quant_type, codebook = q.op_args()
    x = torch.randn(2, 64)

    def call(*args):
        return torch.ops.qlora_ext.gemm_4bit(x, *args)

    for args, message in [
        (
            (packed.reshape(-1)[:-1], absmax, nested, mean, shape, blocksize, quant_type, codebook),
            "packed has 1535 bytes, want 1536",
        ),
        (
            (packed.float(), absmax, nested, mean, shape, blocksize, quant_type, codebook),
            "packed has dtype float32, want uint8",
        ),
        (
            (packed, absmax[:-1], nested, mean, shape, blocksize, quant_type, codebook),
            "absmax has 47 bytes, want 48",
        ),
        (
            (packed, absmax, None, mean, shape, blocksize, quant_type, codebook),
            "absmax has 48 bytes, want 192",
        ),
        (
            (packed, absmax, nested[:-4], mean, shape, blocksize, quant_type, codebook),
            "nested has 4 bytes, want 8",
        ),
        (
            (packed, absmax, nested, absmax, shape, blocksize, quant_type, codebook),
            "mean has 48 bytes, want 192",
        ),
        (
            (packed, absmax, nested, mean, [48, 64, 1], blocksize, quant_type, codebook),
            r"shape is \[48, 64, 1\], want \[N, K\]",
        ),
        (
            (packed, absmax, nested, mean, [-48, -64], blocksize, quant_type, codebook),
            "want sizes of 0 or more",
        ),
        (
            (packed, absmax, nested, mean, [2**40, 2**40], blocksize, quant_type, codebook),
            "want fewer than 2",
        ),
        (
            (packed, absmax, nested, mean, shape, 65, quant_type, codebook),
            "blocksize is 65, want a power of two",
        ),
        (
            (packed, absmax, nested, mean, shape, blocksize, "nf5", codebook),
            f"quant_type is 'nf5', want one of {repr(QUANT_TYPES)[1:-1]}",
        ),
        (
            (packed, absmax, nested, mean, shape, blocksize, "custom", None),
            "codebook has 0 values, want 16",
        ),
        (
            (packed, absmax, nested, mean, shape, blocksize, "nf4", [0.0] * 16),
            "codebook was given with quant_type 'nf4'",
        ),
    ]:
        with pytest.raises(RuntimeError, match="gemm_4bit: .*" + message):
            call(*args)


def test_out_and_dtype():
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    with pytest.raises(
        RuntimeError, match=r"dequantize_4bit: out has shape \[64, 48\], want \[48, 64\]"
    ):
        qlora_ext.dequantize_4bit(q, out=torch.empty(64, 48))
    with pytest.raises(RuntimeError, match="dequantize_4bit: out is not contiguous"):
        qlora_ext.dequantize_4bit(q, out=torch.empty(64, 48).T)
    with pytest.raises(RuntimeError, match="dequantize_4bit: out has dtype int32"):
        qlora_ext.dequantize_4bit(q, out=torch.empty(48, 64, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"dequantize_4bit: dtype is torch.float16, want out's torch.float32"
    ):
        qlora_ext.dequantize_4bit(q, torch.float16, out=torch.empty(48, 64))
    with pytest.raises(RuntimeError, match="dtype: the output has dtype float64"):
        qlora_ext.dequantize_4bit(q, torch.float64)
    with pytest.raises(TypeError, match=r"to: dtype is torch.float64"):
        q.to(torch.float64)


def test_a_dense_weight_where_a_quantized_one_is_wanted():
    dense = torch.randn(48, 64)
    x, A, B = torch.randn(2, 64), torch.randn(4, 64), torch.randn(48, 4)
    with pytest.raises(TypeError, match="linear_4bit: q is a Tensor, want a QuantizedTensor"):
        qlora_ext.linear_4bit(x, dense)
    with pytest.raises(TypeError, match="lora_linear_4bit: q is a Tensor"):
        qlora_ext.lora_linear_4bit(x, dense, A, B, 1.0)
    with pytest.raises(TypeError, match="merge_lora_4bit: q is a Tensor"):
        qlora_ext.merge_lora_4bit(dense, A, B, 1.0)
    with pytest.raises(TypeError, match="dequantize_4bit: q is a Tensor"):
        qlora_ext.dequantize_4bit(dense)
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    with pytest.raises(ValueError, match="dequantize_4bit: out requires grad"):
        qlora_ext.dequantize_4bit(q, out=torch.empty(48, 64, requires_grad=True))


def test_embedding_indices():
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    with pytest.raises(
        RuntimeError,
        match=r"embedding_4bit: indices has 48 at flat position 1, want values in \[0, 48\)",
    ):
        ops.embedding_4bit(torch.tensor([0, 48, -1]), q.op_args(), torch.float32)
    with pytest.raises(RuntimeError, match="embedding_4bit: indices has -1 at flat position 0"):
        ops.embedding_4bit(torch.tensor([-1]), q.op_args(), torch.float32)
    with pytest.raises(RuntimeError, match="embedding_4bit: indices has dtype float32"):
        ops.embedding_4bit(torch.zeros(2), q.op_args(), torch.float32)


def test_meta_tensors_give_shapes():
    q = make_weight((48, 64), CONFIGS["nf4"])[1].to("meta")
    assert qlora_ext.linear_4bit(torch.empty(2, 3, 64, device="meta"), q).shape == (2, 3, 48)


@pytest.mark.parametrize("argument", ["x", "absmax", "bias", "lora_A", "lora_B", "lora_S"])
def test_a_meta_tensor_among_others(argument):
    """The fake would run, and return memory that nothing wrote."""
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    call = {"x": torch.randn(5, 64), "bias": torch.randn(48)}
    call |= {"lora_A": torch.randn(4, 64), "lora_B": torch.randn(48, 4)}
    call |= {"lora_S": torch.randn(5, 4)}
    if argument == "absmax":
        q = dataclasses.replace(q, absmax=q.absmax.to("meta"))
        with pytest.raises(RuntimeError, match="dequantize_4bit: absmax is on meta, want cpu"):
            qlora_ext.dequantize_4bit(q)
    else:
        call[argument] = call[argument].to("meta")
    with pytest.raises(RuntimeError, match=r"(lora_gemm_4bit|lora_shrink): .* is on .*, want "):
        ops.lora_gemm_4bit(
            call["x"],
            q.op_args(),
            call["lora_A"],
            call["lora_B"],
            1.0,
            call["bias"],
            call["lora_S"],
        )


def test_twice_differentiating_is_an_error():
    q = make_weight((48, 64), CONFIGS["nf4"])[1]
    x = torch.randn(5, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(qlora_ext.linear_4bit(x, q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
