"""The input nobody thought of: a sentence with op, argument, got and want; never a crash, never a
silently wrong number."""

import dataclasses
import json

import pytest
import torch

import qlora_ext
from cases import CONFIGS, make_weight, random_weight
from qlora_ext import QuantConfig, QuantizedTensor, ops
from qlora_ext.models import patterns
from qlora_ext.nn import Linear4bit, LoraLinear4bit
from qlora_ext.tensor.functions import quantize_tensor

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
            "quant_type is 'nf5', want one of 'nf4', 'fp4', 'linear', 'custom'",
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


# State dicts --------------------------------------------------------------------------------


def entries():
    return qlora_ext.quantize_4bit(random_weight((48, 64))).state_dict("w")


def with_meta(**changes):
    d = entries()
    key = "w.quant_state.bitsandbytes__nf4"
    meta = {**json.loads(bytes(d[key].tolist())), **changes}
    d[key] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return d


def changed(key, value):
    d = entries()
    d[key] = value(d[key])
    return d


@pytest.mark.parametrize(
    "key",
    [
        "w",
        "w.absmax",
        "w.quant_map",
        "w.nested_absmax",
        "w.nested_quant_map",
        "w.quant_state.bitsandbytes__nf4",
    ],
)
def test_missing_key(key):
    d = entries()
    del d[key]
    with pytest.raises(KeyError, match="from_state_dict: .*" + key.split("__")[0]):
        QuantizedTensor.from_state_dict(d, "w")


@pytest.mark.parametrize(
    "d, message",
    [
        (changed("w", lambda t: t[:-1]), "packed has 1535 bytes, want 1536"),
        (changed("w.absmax", lambda t: t[:-1]), "absmax is torch.uint8 .47., want 48"),
        (changed("w.absmax", lambda t: t.float()), "absmax is torch.float32 .48., want 48 uint8"),
        (changed("w.nested_absmax", lambda t: t.half()), "nested_absmax is torch.float16"),
        (changed("w.quant_map", lambda t: t.flip(0)), "quant_map differs from the nf4 table"),
        (changed("w.nested_quant_map", lambda t: t[:-1]), "nested_quant_map is torch.float32"),
        (changed("w.nested_quant_map", lambda t: t.double()), "want 256 float32 values"),
        (changed("w.nested_quant_map", lambda t: t * 1.0001), "nested_quant_map differs"),
        (changed("w.nested_quant_map", lambda t: t * torch.nan), "nested_quant_map differs"),
        (changed("w.quant_state.bitsandbytes__nf4", lambda t: t[:-1]), "is not JSON"),
        (
            changed(
                "w.quant_state.bitsandbytes__nf4",
                lambda t: torch.full((9,), 255, dtype=torch.uint8),
            ),
            "is not JSON",
        ),
        (
            changed(
                "w.quant_state.bitsandbytes__nf4",
                lambda t: torch.tensor(list(b"[" * 100000), dtype=torch.uint8),
            ),
            "is not JSON",
        ),
        (
            changed(
                "w.quant_state.bitsandbytes__nf4",
                lambda t: torch.tensor(list(b"[]"), dtype=torch.uint8),
            ),
            "holds a list",
        ),
        (with_meta(shape=[-48, -64]), "shape is .* want at most 8 sizes of 0 or more"),
        (with_meta(shape=[2**62, 2**62]), "shape is .* want at most 8 sizes"),
        (with_meta(shape=[48, 65]), "packed has 1536 bytes, want 1560"),
        (with_meta(shape="64"), "shape is 64, want"),
        (with_meta(shape=[48.0, 64]), "shape is .* want"),
        (with_meta(quant_type="nf5"), "quant_type is 'nf5', want one of"),
        (with_meta(quant_type=["nf4"]), "quant_type is .* want one of"),
        (with_meta(quant_type="fp4"), "quant_map differs from the fp4 table"),
        (with_meta(blocksize=0), "blocksize is 0, want one of"),
        (with_meta(blocksize=2**80), "blocksize is .* want one of"),
        (with_meta(blocksize=128), "absmax is torch.uint8 .48., want 24"),
        (with_meta(nested_blocksize=64), "nested_blocksize is 64, want 256"),
        (with_meta(nested_offset="0"), "nested_offset is 0, want a finite float32"),
        (with_meta(nested_offset=float("nan")), "nested_offset is nan, want a finite float32"),
        (with_meta(nested_offset=10**400), "nested_offset is 1000.* want a finite float32"),
        (with_meta(nested_offset=1e300), "nested_offset is 1e.300, want a finite float32"),
        (changed("w.nested_absmax", lambda t: t * torch.inf), "nested_absmax holds a NaN"),
        (changed("w.absmax", lambda t: t.tolist()), "w.absmax is list, want a tensor"),
        (changed("w", lambda t: t.to("meta")), "w is a tensor without data"),
        (changed("w.quant_map", lambda t: None), "w.quant_map is NoneType, want a tensor"),
        (
            changed("w.quant_state.bitsandbytes__nf4", lambda t: t.to("meta")),
            "is a tensor without data",
        ),
        (with_meta(dtype="float64"), "dtype is 'float64', want one of"),
        (with_meta(dtype=["float32"]), "dtype is .* want one of"),
        (with_meta(shape="\ud800"), r"shape is \\ud800, want"),
        (with_meta(nested_offset="\ud800"), r"nested_offset is \\ud800, want"),
        (with_meta(blocksize="\udfff"), r"blocksize is \\udfff, want"),
        (changed("w", lambda t: t.to_sparse()), "w has layout torch.sparse_coo, want torch.strid"),
        (changed("w.absmax", lambda t: t.to_sparse()), "w.absmax has layout torch.sparse_coo"),
        (changed("w.nested_absmax", lambda t: t.to_sparse()), "nested_absmax has layout"),
        (changed("w.quant_map", lambda t: t.to_sparse()), "quant_map has layout"),
        (
            changed("w.quant_state.bitsandbytes__nf4", lambda t: t.to_sparse()),
            "bitsandbytes__nf4 has layout torch.sparse_coo",
        ),
    ],
    ids=range(44),
)
def test_corrupt_or_hostile_state_dict(d, message):
    with pytest.raises(ValueError, match="from_state_dict: w: .*" + message) as error:
        QuantizedTensor.from_state_dict(d, "w")
    str(error.value).encode()  # can be printed


def test_strided_entries():
    """A tensor of one element counts as contiguous whatever its stride is."""
    d = entries()
    want = QuantizedTensor.from_state_dict(d, "w")
    for key in ("w", "w.absmax", "w.nested_absmax", "w.quant_map", "w.nested_quant_map"):
        d[key] = torch.stack([d[key], d[key]], -1)[..., 0]
    assert d["w.nested_absmax"].numel() == 1 and d["w.nested_absmax"].stride() == (2,)
    got = QuantizedTensor.from_state_dict(d, "w")
    assert torch.equal(qlora_ext.dequantize_4bit(got), qlora_ext.dequantize_4bit(want))


def negative(t):
    return torch.complex(t.float(), -t.float()).conj().imag  # the values of t, negated in memory


def freed(tensor, nbytes=0):
    """As FSDP1 and offloaders leave one behind; reading it would end the process."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


# Tensors whose memory does not hold their values, or that have none; and what is no tensor.
ODD = {
    "quantized": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        r"is a quantized tensor of torch \(torch.quint8\)",
    ),
    "per-channel": (
        lambda t: torch.quantize_per_channel(
            t.float().reshape(1, -1), torch.ones(1), torch.zeros(1), 0, torch.qint8
        ),
        r"is a quantized tensor of torch \(torch.qint8\)",
    ),
    "nested": (
        lambda t: torch.nested.nested_tensor([t.reshape(-1)]),
        "is a nested tensor",
    ),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t.reshape(-1)], layout=torch.jagged),
        "is a nested tensor",
    ),
    "conjugate": (lambda t: t.to(torch.complex64).conj(), "is a conjugate view"),
    "negative": (negative, "is a view with the negative bit"),
    "negative-bytes": (lambda t: torch._neg_view(t.clone()), "is a view with the negative bit"),
    "functional": (torch._to_functional_tensor, "is a functional tensor"),
    "freed": (freed, "is a tensor whose storage was freed"),
    "cut": (lambda t: freed(t, t.nbytes - 1), "is a tensor whose storage was freed or cut"),
    "none": (lambda t: None, "is NoneType, want a"),
    "text": (lambda t: "0", "is str, want a"),
    "number": (lambda t: 0, "is int, want a"),
    "list": (lambda t: t.tolist(), "is list, want a"),
    "array": (lambda t: t.numpy(), "is ndarray, want a"),
}


@pytest.mark.parametrize("key", entries())
@pytest.mark.parametrize("kind", ODD)
def test_odd_entries(kind, key):
    odd, message = ODD[kind]
    with pytest.raises(ValueError, match=f"from_state_dict: w: {key} {message}"):
        QuantizedTensor.from_state_dict(changed(key, odd), "w")


@pytest.mark.parametrize("key", entries())
def test_fake_entries(key):
    d = entries()
    d[key] = torch._subclasses.FakeTensorMode().from_tensor(d[key])
    with pytest.raises(ValueError, match=f"from_state_dict: w: {key} is a tensor without data"):
        QuantizedTensor.from_state_dict(d, "w")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_odd_entries_of_a_module(kind, assign):
    odd, message = ODD[kind]
    layer = LoraLinear4bit(64, 48)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for key in before:
        d = layer.state_dict()
        d[key] = odd(d[key])
        with pytest.raises(RuntimeError, match=f"LoraLinear4bit: {key} {message}"):
            layer.load_state_dict(d, assign=assign)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_odd_names():
    d = entries()
    with pytest.raises(TypeError, match="from_state_dict: d is a list, want a mapping"):
        QuantizedTensor.from_state_dict([d], "w")
    with pytest.raises(TypeError, match="from_state_dict: prefix is a NoneType, want a str"):
        QuantizedTensor.from_state_dict(d, None)
    with pytest.raises(ValueError, match=r"from_state_dict: prefix is 'w.x00', want one without"):
        QuantizedTensor.from_state_dict(d, "w\0")
    q = QuantizedTensor.from_state_dict({**d, 1: torch.zeros(1), None: None}, "w")
    with pytest.raises(ValueError, match=r"state_dict: prefix is 'w.x00', want one without NUL"):
        q.state_dict("w\0")
    key = "w.quant_state.bitsandbytes__nf4"
    d[f"{key}\0"] = d.pop(key)
    with pytest.raises(ValueError, match=r"has the key '.*nf4.x00', want one without NUL"):
        QuantizedTensor.from_state_dict(d, "w")


# Scaling ------------------------------------------------------------------------------------------

NO_SCALING = [
    *(float("inf"), -float("inf"), float("nan"), 1e300, -1e39, 10**400, 10**5000, "2", None, True),
    *(torch.tensor(float("nan")), torch.tensor(1e300, dtype=torch.float64), torch.ones(2)),
]


@pytest.mark.parametrize("value", NO_SCALING, ids=range(len(NO_SCALING)))
def test_scaling_that_is_no_finite_number(value):
    q, x = make_weight((48, 64))[1], torch.randn(2, 64)
    A, B = torch.randn(4, 64), torch.randn(48, 4)
    for dropout in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"lora_linear_4bit: scaling is .* want a finite num"):
            qlora_ext.lora_linear_4bit(x, q, A, B, value, dropout=dropout)
    with pytest.raises(ValueError, match=r"merge_lora_4bit: scaling is .* want a finite number"):
        qlora_ext.merge_lora_4bit(q, A, B, value)
    with pytest.raises(ValueError, match=r"LoraConfig: lora_alpha is .* want a positive number"):
        qlora_ext.LoraConfig(lora_alpha=value)
    with pytest.raises(ValueError, match=r"LoraLinear4bit: lora_alpha is .* want a finite number"):
        LoraLinear4bit(64, 48, r=4, lora_alpha=value)
    layer = LoraLinear4bit(64, 48, r=4)
    with pytest.raises(ValueError, match=r"LoraLinear4bit: lora_alpha is .* want a finite number"):
        layer.set_scaling(value)
    assert layer.scaling == 4 and layer.lora_alpha == 16


@pytest.mark.parametrize("value", NO_SCALING, ids=range(len(NO_SCALING)))
def test_scaling_of_peft_that_is_no_finite_number(value):
    peft = pytest.importorskip("peft")
    config = {"r": 4, "target_modules": ["0"]}
    net = torch.nn.Sequential(Linear4bit(64, 48))
    layer = peft.get_peft_model(net, peft.LoraConfig(**config)).base_model.model[0]
    for call in (
        lambda: layer.set_scale("default", value),
        lambda: layer.scale_layer(value),
        lambda: layer.unscale_layer([] if value is None else value),  # None is the first scale
    ):
        with pytest.raises(ValueError, match=r"scale.*: 0: scale is .* want a finite number"):
            call()
    with pytest.raises(ValueError, match=r"unscale_layer: 0: 1 / scale is inf, want a finite num"):
        layer.unscale_layer(0)
    assert layer.scaling == {"default": 2}
    net = torch.nn.Sequential(Linear4bit(64, 48))
    with pytest.raises(ValueError, match=r"LoraConfig: 0: lora_alpha is .* want a finite number"):
        peft.get_peft_model(net, peft.LoraConfig(**config, lora_alpha=value))


@pytest.mark.parametrize("key", ["weight", "weight_absmax", "weight_nested", "weight_codebook"])
def test_sparse_entries_of_a_module(key):
    layer = Linear4bit(64, 48, bias=False)
    d = layer.state_dict()
    d[key] = d[key].to_sparse()
    with pytest.raises(RuntimeError, match=f"Linear4bit: {key} has layout torch.sparse_coo, want"):
        layer.load_state_dict(d)


# Regular expressions from a file --------------------------------------------------------------

QUICK = [
    *("q_proj", "model.layers.0.self_attn.q_proj", r"^model\.layers\.0\.mlp", "^(?:a|b)", "h.1?0"),
    *(r"model\.layers\.\d+\..*_proj", "(q|k|v)_proj", r".*\.(gate|up)_proj", "layers.[0-2].q_proj"),
    *(r"layers\.(?!0\.)", "|".join(map(str, range(100))), r"[\]*+(]+x", "[]+*]a", r"\(\)*", ""),
]
SLOW = [
    *("([a-z_]+)+!", "(a|a)*!", "(.*){9}!", "((a?)+)x", "(a)(b)*", "(?:a+)+!", ".*.*.*.*.*.*!"),
    *("(.|.)" * 30, ".?" * 30 + "!", "(?x:#[\n(a+)+!#]\n)", "(?#[)(a+)+!(?#])", "(?P<n>a+)+!"),
    *("a)+(b", "(?i)UP_PROJ", "(?=.*)" * 4, "(" + "a|" * 1000 + ")" + "(" + "b|" * 1000 + ")"),
]


@pytest.mark.parametrize("pattern", QUICK)
def test_regular_expressions_that_are_quick_to_match(pattern):
    assert patterns.bad_regex([pattern] * 3) is None


@pytest.mark.parametrize("pattern", SLOW, ids=lambda p: p[:20])
def test_regular_expressions_that_could_take_years(pattern):
    got, want = patterns.bad_regex(["q_proj", pattern])
    assert got == pattern and want.startswith("a name, or a regular expression that is quick to m")


def test_regular_expressions_share_one_budget():
    assert patterns.bad_regex(["model.layers.7.mlp.up_proj"] * 10000) is None
    assert patterns.bad_regex([".*a.*b.*c"] * 10000)[0] == ".*a.*b.*c"
    for pattern in ["(", "a)", "[a", "*", "(" * 100000]:
        assert patterns.bad_regex([pattern]) == (pattern, "a regular expression")


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_round_trip(name):
    config = CONFIGS[name]
    for shape in [(48, 64), (5, 13), (3, 4, 32)]:
        q = quantize_tensor(random_weight(shape, torch.bfloat16), config)
        again = QuantizedTensor.from_state_dict(q.state_dict("a.b"), "a.b")
        assert again.op_args()[4:] == q.op_args()[4:] and again.dtype == q.dtype
        assert torch.equal(qlora_ext.dequantize_4bit(again), qlora_ext.dequantize_4bit(q))
