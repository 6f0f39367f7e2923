"""Byte parity with bitsandbytes 0.50.2, both ways, and its state-dict keys in and out."""

import json

import pytest
import torch

import qlora_ext
from cases import DTYPES, assert_same_bytes, random_weight
from peers import assert_bitsandbytes_same
from qlora_ext import QuantizedTensor

F = pytest.importorskip("bitsandbytes.functional")


def bnb_quantize(weight, quant_type, blocksize, nested):
    return F.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )


def bnb_entries(packed, state, prefix):
    """What bitsandbytes' Linear4bit puts into a state dict."""
    return {prefix: packed, **{f"{prefix}.{k}": v for k, v in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_nf4_bytes(blocksize, dtype):
    weight = random_weight((64, 4096), dtype)
    packed, state = bnb_quantize(weight, "nf4", blocksize, nested=False)
    q = qlora_ext.quantize_4bit(weight, blocksize=blocksize, double_quant=False)
    assert_same_bytes(q.packed, packed, "packed")
    assert_same_bytes(q.absmax, state.absmax, "absmax")
    assert_same_bytes(qlora_ext.dequantize_4bit(q), F.dequantize_4bit(packed, state), "dequantized")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4_bytes_off_ties_and_away_from_zero(dtype):
    """bitsandbytes' CPU path breaks ties its own way, and gives +1e-5 code 8 and -1e-5 code 0."""
    weight = random_weight((64, 4096), dtype)
    packed, state = bnb_quantize(weight, "fp4", 64, nested=False)
    q = qlora_ext.quantize_4bit(weight, quant_type="fp4", double_quant=False)
    assert_same_bytes(q.absmax, state.absmax, "absmax")
    v = (weight.float().reshape(-1, 64) * (1 / q.absmax.view(torch.float32))[:, None]).reshape(-1)
    book = qlora_ext._C.resolve_codebook("fp4", None, "none", 1.0)[1]
    thresholds = torch.tensor([t for t in book if t != float("inf")])
    clear = ((v.abs()[:, None] - thresholds).abs().amin(1) > 1e-6) & (v.abs() > thresholds[0])
    codes = [
        torch.stack([p.reshape(-1) >> 4, p.reshape(-1) & 15], 1).reshape(-1)
        for p in (q.packed, packed)
    ]
    assert clear.float().mean() > 0.9
    assert_same_bytes(codes[0][clear], codes[1][clear], "codes")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_its_checkpoints(dtype, quant_type, nested):
    for shape, blocksize in [((96, 576), 64), ((64, 4096), 256), ((33, 65), 64)]:
        packed, state = bnb_quantize(random_weight(shape, dtype), quant_type, blocksize, nested)
        q = QuantizedTensor.from_state_dict(
            bnb_entries(packed, state, "layer.weight"), "layer.weight"
        )
        assert q.shape == shape and q.dtype == dtype and q.blocksize == blocksize
        theirs = F.dequantize_4bit(packed, state)
        assert_bitsandbytes_same(qlora_ext.dequantize_4bit(q), theirs, nested=nested)


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_reads_any_quant_storage(storage):
    weight = random_weight((64, 128))
    packed, state = F.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    q = QuantizedTensor.from_state_dict(bnb_entries(packed, state, "w"), "w")
    assert_same_bytes(qlora_ext.dequantize_4bit(q), F.dequantize_4bit(packed, state), "dequantized")


def test_reads_a_map_of_8_bit_scales_that_another_cpu_computed():
    """The last bits of bitsandbytes' map depend on the CPU that wrote the checkpoint."""
    packed, state = bnb_quantize(random_weight((64, 4096)), "nf4", 64, nested=True)
    entries = bnb_entries(packed, state, "w")
    table = entries["w.nested_quant_map"]
    up, down = (torch.nextafter(table, torch.tensor(end)) for end in (2.0, -2.0))
    other = torch.where(torch.arange(256) % 2 == 0, up, down)
    entries["w.nested_quant_map"] = torch.where(table == 0, table, other)
    state.state2.code = entries["w.nested_quant_map"]
    q = QuantizedTensor.from_state_dict(entries, "w")
    want = F.dequantize_4bit(packed, state)
    torch.testing.assert_close(qlora_ext.dequantize_4bit(q), want, rtol=5e-7, atol=0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_reads_ours(quant_type, nested):
    weight = random_weight((96, 576), torch.bfloat16)
    q = qlora_ext.quantize_4bit(weight, quant_type=quant_type, double_quant=nested)
    entries = q.state_dict("w")
    state = F.QuantState.from_dict(
        {k.removeprefix("w."): v for k, v in entries.items() if k != "w"},
        device=torch.device("cpu"),
    )
    assert entries["w"].shape == (96 * 576 // 2, 1)
    assert_bitsandbytes_same(qlora_ext.dequantize_4bit(q), F.dequantize_4bit(entries["w"], state))


def read_by_it(q):
    entries = q.state_dict("w")
    state = {k.removeprefix("w."): v for k, v in entries.items() if k != "w"}
    return F.dequantize_4bit(entries["w"], F.QuantState.from_dict(state, torch.device("cpu")))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_it_reads_our_block_sizes(blocksize):
    # With AVX-512 it decodes neither ours nor its own correctly if blocks cross rows.
    q = qlora_ext.quantize_4bit(random_weight((64, 4096)), blocksize=blocksize)
    assert_same_bytes(read_by_it(q), qlora_ext.dequantize_4bit(q), "dequantized")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_type": "linear"},
        {"quant_type": "custom", "codebook": [i / 15 for i in range(16)]},
        {"companding": "logarithmic"},
        {"normalization": "standard"},
        {"normalization": "none"},
        {"blocksize": None},
    ],
    ids=lambda settings: " ".join(map(str, settings.values()))[:20],
)
def test_it_refuses_what_it_does_not_have(settings):
    q = qlora_ext.quantize_4bit(random_weight((96, 576)) / 8, **settings)
    with pytest.raises((AssertionError, ValueError)):
        read_by_it(q)


def test_keys_are_the_same():
    weight = random_weight((64, 128), torch.bfloat16)
    packed, state = bnb_quantize(weight, "nf4", 64, nested=True)
    theirs = bnb_entries(packed, state, "w")
    ours = qlora_ext.quantize_4bit(weight).state_dict("w")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        if "quant_state" not in key:
            assert ours[key].shape == theirs[key].shape, key
    key = "w.quant_state.bitsandbytes__nf4"
    a, b = (json.loads(bytes(d[key].tolist())) for d in (ours, theirs))
    assert a.keys() == b.keys()


def test_nested_codes_are_exact_nearest_where_the_peers_cpu_path_is_approximate():
    weight = random_weight((512, 4096))
    _, state = bnb_quantize(weight, "nf4", 64, nested=True)
    q = qlora_ext.quantize_4bit(weight)
    nested = q.nested.view(torch.float32)
    torch.testing.assert_close(nested[0], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(nested[1:], state.state2.absmax, rtol=1e-5, atol=0)
    assert (q.absmax.int() - state.absmax.int()).abs().max() <= 2
    exact = qlora_ext.quantize_4bit(weight, double_quant=False).absmax.view(torch.float32)
    ours = torch.ops.qlora_ext.dequantize_absmax(q.absmax, q.nested).view(torch.float32)
    theirs = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    assert (ours - exact).square().sum() <= (theirs - exact).square().sum()
