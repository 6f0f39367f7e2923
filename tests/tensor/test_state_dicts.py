"""State dicts of packed weights: corrupt, hostile and odd entries are refused by name."""

import json

import pytest
import torch

import qlora_ext
from cases import CONFIGS, random_weight
from qlora_ext import QuantizedTensor
from qlora_ext.nn import Linear4bit, LoraLinear4bit
from qlora_ext.tensor.functions import quantize_tensor


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
        r"is a tensor quantized by torch \(torch.quint8\)",
    ),
    "per-channel": (
        lambda t: torch.quantize_per_channel(
            t.float().reshape(1, -1), torch.ones(1), torch.zeros(1), 0, torch.qint8
        ),
        r"is a tensor quantized by torch \(torch.qint8\)",
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
    "freed": (freed, "is a tensor whose storage is too small"),
    "cut": (lambda t: freed(t, t.nbytes - 1), "is a tensor whose storage is too small"),
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


@pytest.mark.parametrize("key", ["weight", "weight_absmax", "weight_nested", "weight_codebook"])
def test_sparse_entries_of_a_module(key):
    layer = Linear4bit(64, 48, bias=False)
    d = layer.state_dict()
    d[key] = d[key].to_sparse()
    with pytest.raises(RuntimeError, match=f"Linear4bit: {key} has layout torch.sparse_coo, want"):
        layer.load_state_dict(d)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_round_trip(name):
    config = CONFIGS[name]
    for shape in [(48, 64), (5, 13), (3, 4, 32)]:
        q = quantize_tensor(random_weight(shape, torch.bfloat16), config)
        again = QuantizedTensor.from_state_dict(q.state_dict("a.b"), "a.b")
        assert again.op_args()[4:] == q.op_args()[4:] and again.dtype == q.dtype
        assert torch.equal(qlora_ext.dequantize_4bit(again), qlora_ext.dequantize_4bit(q))
