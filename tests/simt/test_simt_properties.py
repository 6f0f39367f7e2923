"""The CUDA quantizers on the emulated machine against the CPU's, byte for byte, over whatever
shapes, blocks, dtypes and values hypothesis thinks of."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qlora_ext  # noqa: F401  (the CPU's ops)
from cases import assert_same_bytes
from qlora_ext.ops import _C
from simt.build import load_simt

CPU = torch.ops.qlora_ext
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fill(kind, numel, seed):
    """fp32 values: normal ones, one value, signed zeros, subnormals, or a mixture of all."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator)
    sign = torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0)
    kinds = {
        "normal": normal * 0.05,
        "far apart": normal * torch.exp(4 * torch.randn(numel, generator=generator)),
        "constant": torch.full((numel,), 0.37),
        "zero": torch.zeros(numel),
        "minus zero": torch.full((numel,), -0.0),
        "zeros": sign * 0.0,
        "subnormal": normal * 1e-39,
        "subnormal in fp16": normal * 1e-6,
    }
    if kind != "mixture":
        return kinds[kind]
    which = torch.randint(len(kinds), (numel,), generator=generator)
    return torch.stack(list(kinds.values())).gather(0, which[None])[0]


KINDS = ["normal", "far apart", "constant", "zero", "minus zero", "zeros", "subnormal"]
KINDS += ["subnormal in fp16", "mixture"]


def same_bytes(shape, kind, seed, dtype, blocksize, quant_type, normalization):
    simt = load_simt()
    weight = fill(kind, shape[0] * shape[1], seed).clamp(-6e4, 6e4).reshape(shape).to(dtype)
    blocksize = 0 if normalization == "none" else blocksize
    arguments = (weight, blocksize, quant_type, None, normalization, 3.0, "none", 1.0)
    packed, absmax, mean = CPU.quantize_4bit(*arguments)
    got = simt.quantize_4bit(*arguments)
    names = ("packed", "absmax", "mean")[: 3 if normalization == "standard" else 2]
    for name, g, want in zip(names, got, (packed, absmax, mean), strict=False):
        assert_same_bytes(g, want, name)
    code, nested = CPU.quantize_absmax(absmax)
    got = simt.quantize_absmax(absmax)
    assert_same_bytes(got[0], code, "codes of the scales")
    assert_same_bytes(got[1], nested, "nested")
    assert_same_bytes(
        simt.dequantize_absmax(code, nested), CPU.dequantize_absmax(code, nested), "scales"
    )
    mean = mean if normalization == "standard" else None
    for scales in ((absmax, None), (code, nested)):
        w4 = (packed, *scales, mean, list(shape), blocksize, quant_type, None)
        for out in DTYPES:
            assert_same_bytes(
                simt.dequantize_4bit(*w4, out), CPU.dequantize_4bit(*w4, out), f"weights, {out}"
            )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 700))
    | st.sampled_from([(1, 256), (2, 256), (16, 256), (256, 256), (1, 4096), (3, 2049)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([0, 32, 64, 128, 256, 512, 1024, 4096]),
    quant_type=st.sampled_from([*_C.codebooks()]),
    normalization=st.sampled_from(["absmax", "standard", "none"]),
)
@example((1, 256), "minus zero", 0, torch.float32, 256, "nf4", "standard")
@example((1, 256), "minus zero", 0, torch.float32, 512, "nf4", "standard")
@example((2, 256), "minus zero", 0, torch.float32, 256, "nf4", "standard")
@example((1, 256), "minus zero", 0, torch.bfloat16, 0, "nf4", "standard")
@example((256, 256), "minus zero", 0, torch.float16, 0, "nf4", "standard")
def test_simt_gives_the_cpus_bytes(shape, kind, seed, dtype, blocksize, quant_type, normalization):
    same_bytes(shape, kind, seed, dtype, blocksize, quant_type, normalization)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 65536])
def test_simt_scales_of_minus_zero(n):
    """The sum of nothing but -0.0 is 0.0, also where every group is full."""
    absmax = torch.full((n,), -0.0).view(torch.uint8)
    for got, want in zip(
        load_simt().quantize_absmax(absmax), CPU.quantize_absmax(absmax), strict=True
    ):
        assert_same_bytes(got, want, "quantize_absmax")
    assert CPU.quantize_absmax(absmax)[1][:4].view(torch.float32).signbit().item() is False


def test_reference_agrees_with_simt_on_minus_zero():
    import reference

    for n in (1, 256, 65536):
        total = reference.tree_sum(torch.full((n,), -0.0).numpy())
        assert total == 0 and not torch.tensor(total).signbit().item()
