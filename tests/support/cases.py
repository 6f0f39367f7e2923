"""The shapes, dtypes and settings that every op is tried on, and how results are compared."""

import dataclasses

import numpy as np
import torch

import reference as R
from qlora_ext import QuantConfig, QuantizedTensor
from qlora_ext.ops import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Weight shapes: full blocks; SmolLM2's K = 576 (not a multiple of 128); tails; an odd K; an odd
# number of elements; smaller than a block; one element; empty.
WEIGHT_SHAPES = [
    (64, 128),
    (96, 576),
    (48, 1536),
    (7, 40),
    (33, 65),
    (5, 13),
    (1, 1),
    (0, 64),
    (3, 0),
]
# (M, N, K) for products: M on both sides of every kernel's boundary, tails in N and K.
GEMM_SHAPES = [
    (1, 64, 128),
    (2, 96, 576),
    (5, 33, 65),
    (16, 48, 1536),
    (17, 64, 256),
    (40, 100, 192),
    (130, 72, 320),
    (0, 32, 64),
    (3, 1, 7),
]

CONFIGS = {
    **{name: QuantConfig(name) for name in _C.codebooks()},
    "nf4-plain-scales": QuantConfig(double_quant=False),
    "linear-32": QuantConfig("linear", blocksize=32),
    "nf4-4096": QuantConfig(blocksize=4096),
    "nf4-per-tensor": QuantConfig(blocksize=None),
    "standard": QuantConfig(normalization="standard"),
    "standard-plain-scales": QuantConfig(
        normalization="standard", double_quant=False, blocksize=256
    ),
    "none": QuantConfig("linear", normalization="none"),
    "logarithmic": QuantConfig(companding="logarithmic", companding_k=15.0),
    "exponential": QuantConfig("linear", companding="exponential", companding_k=2.0),
    "custom-unsorted": QuantConfig(
        "custom", codebook=[((7 * i) % 16 - 7.5) / 8 for i in range(16)]
    ),
}


def reference_quantize(weight: torch.Tensor, config: QuantConfig) -> R.QuantizedArray:
    book = R.make_codebook(
        config.quant_type, config.codebook, config.companding, config.companding_k
    )
    return R.quantize_4bit(
        weight.detach().float().cpu().numpy(),
        config.blocksize or 0,
        book,
        config.double_quant,
        config.normalization,
        config.std_factor,
    )


def to_tensor(array: R.QuantizedArray, config: QuantConfig, device="cpu") -> QuantizedTensor:
    """The reference's bytes as a QuantizedTensor: products are tried on weights no kernel made."""

    def as_bytes(a):
        return None if a is None else torch.from_numpy(a.view(np.uint8).copy()).to(device)

    return QuantizedTensor(
        as_bytes(array.packed),
        as_bytes(array.absmax),
        as_bytes(array.nested),
        as_bytes(array.mean),
        torch.Size(array.shape),
        blocksize=array.blocksize,
        quant_type=config.stored_quant_type,
        codebook=config.stored_codebook,
    )


def as_array(q, config):
    """A module's bytes as the reference's QuantizedArray."""

    def floats(t):
        return None if t is None else t.numpy().view(np.float32)

    absmax = q.absmax.numpy() if q.nested is not None else floats(q.absmax)
    book = R.make_codebook(
        config.quant_type, config.codebook, config.companding, config.companding_k
    )
    return R.QuantizedArray(
        q.packed.reshape(-1).numpy(),
        absmax,
        floats(q.nested),
        floats(q.mean),
        tuple(q.shape),
        q.blocksize,
        book,
    )


def random_weight(shape, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * 0.05).to(dtype)


def make_weight(
    shape, config=CONFIGS["nf4"], device="cpu"
) -> tuple[R.QuantizedArray, QuantizedTensor]:
    array = reference_quantize(random_weight(shape), config)
    return array, to_tensor(array, config, device)


def make_stack(
    shape, config=CONFIGS["nf4"], device="cpu"
) -> tuple[list[R.QuantizedArray], QuantizedTensor]:
    """The reference's bytes of each expert, and all of them as one stack."""
    E, N, K = shape
    arrays, experts = zip(*(make_weight((N, K), config, device) for _ in range(E)), strict=True)

    def stacked(name):
        parts = [getattr(q, name) for q in experts]
        return None if parts[0] is None else torch.stack(parts)

    stack = dataclasses.replace(
        experts[0],
        packed=stacked("packed").reshape(E, N, K // 2),
        absmax=stacked("absmax"),
        nested=stacked("nested"),
        mean=stacked("mean"),
        shape=torch.Size(shape),
    )
    return list(arrays), stack


def quantize(backend, weight: torch.Tensor, config: QuantConfig):
    """A backend's quantizers in turn: (packed, absmax, nested | None, mean | None)."""
    packed, absmax, mean = backend.ops.quantize_4bit(
        weight.to(backend.device),
        config.stored_blocksize,
        config.quant_type,
        config.codebook,
        config.normalization,
        config.std_factor,
        config.companding,
        config.companding_k,
    )
    nested = None
    if config.stores_nested:
        absmax, nested = backend.ops.quantize_absmax(absmax)
    return packed, absmax, nested, mean if config.stores_mean else None


def assert_same_bytes(got: torch.Tensor, want, what: str):
    """Exact equality of the raw bytes; `want` is a tensor or an array."""

    def raw(values):
        if isinstance(values, np.ndarray):
            return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    got, want = raw(got), raw(want)
    assert got.shape == want.shape, f"{what}: {got.size} bytes, want {want.size}"
    wrong = np.flatnonzero(got != want)
    assert wrong.size == 0, (
        f"{what}: {wrong.size} of {got.size} bytes differ, first at {wrong[0]}: "
        f"{got[wrong[0]]}, want {want[wrong[0]]}"
    )


@dataclasses.dataclass
class Tolerance:
    """err(kernel) <= factor * err(torch, same dtype) + atol, against an fp64 reference."""

    factor: float = 2.0
    atol: float = 1e-6


CALIBRATED = Tolerance()


def assert_close(
    got: torch.Tensor, torch_result: torch.Tensor, want, what: str, tolerance=CALIBRATED
):
    """The largest error may be twice torch's own in the same dtype. NaN never passes."""
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, want {list(want.shape)}"
    if want.numel() == 0:
        return
    assert not got.isnan().any(), f"{what}: {int(got.isnan().sum())} NaN"
    error = (got.detach().cpu().double() - want).abs()
    scale = want.abs().max().item()
    allowed = tolerance.factor * (torch_result.detach().cpu().double() - want).abs().max().item()
    allowed += tolerance.atol * max(scale, 1.0)
    worst = int(error.argmax())
    assert error.max().item() <= allowed, (
        f"{what}: error {error.max().item():.3g} at {np.unravel_index(worst, error.shape)}, "
        f"allowed {allowed:.3g}: "
        f"got {got.reshape(-1)[worst].item()}, want {want.reshape(-1)[worst].item()}"
    )
