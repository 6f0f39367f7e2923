"""A numpy reference of the 4-bit format, written from its specification and from nothing else.

Tests compare every backend with this file, so it shares no code and no table with them: NF4, FP4,
the linear codebook and the 8-bit scale map are derived here from their definitions. The quantizer
works in fp32, step by step as the format prescribes, and its bytes are exact; products, gradients
and merges are fp64. It is written to be read and is slow.

Arrays are numpy: weights fp32 (a bf16 or fp16 weight is passed as its exact fp32 values), packed
bytes and codes uint8, statistics fp32.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np

__all__ = [
    "Codebook",
    "QuantizedArray",
    "dequantize_4bit",
    "dequantize_absmax",
    "dynamic_map",
    "linear_4bit",
    "linear_4bit_backward",
    "lora_linear_4bit_backward",
    "make_codebook",
    "merge_lora_4bit",
    "quantize_4bit",
    "quantize_absmax",
    "round_to",
    "tree_sum",
]

NESTED_BLOCKSIZE = 256  # scales per absmax2


# Tables -------------------------------------------------------------------------------------------


def _linspace(start: float, stop: float, steps: int) -> np.ndarray:
    """fp32 points as torch.linspace computes them, from both ends; the tables' bits are its."""
    start32, stop32 = np.float32(start), np.float32(stop)
    step = (stop32 - start32) / np.float32(steps - 1)
    i = np.arange(steps, dtype=np.float32)
    # One rounding per point: torch's kernels contract start + step * i into an FMA.
    up = (start32.astype(np.float64) + step.astype(np.float64) * i).astype(np.float32)
    down = (stop32.astype(np.float64) - step.astype(np.float64) * i[::-1]).astype(np.float32)
    return np.where(i < steps // 2, up, down).astype(np.float32)


def nf4_levels() -> np.ndarray:
    """NF4: quantiles of N(0, 1) scaled to [-1, 1], 8 above and 7 below an exact zero.

    Source: QLoRA (arXiv 2305.14314), appendix E, with the offset its authors' code uses. [16] fp32.
    """
    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(p)) for p in _linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(float(p)) for p in _linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*positive, 0.0, *negative])).astype(np.float32)
    return levels / levels.max()


def fp4_levels() -> np.ndarray:
    """FP4 by code: bit 3 is the sign; the magnitudes in twelfths are an E2M1 float's. [16] fp32."""
    twelfths = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3])
    return np.concatenate([twelfths / 12, 0.0 - twelfths / 12]).astype(np.float32)


def linear_levels() -> np.ndarray:
    """16 evenly spaced levels in [-1, 1], to two decimals; zero is not one of them. [16] fp64."""
    return np.round(np.linspace(-1, 1, 16), 2)


def dynamic_map() -> np.ndarray:
    """The 8-bit map for scales: [256] fp32, sorted; 0 at index 127.

    For i = 0..6 the midpoints of linspace(0.1, 1, 2^i + 1) times 10^(i - 6), both signs, plus 0
    and 1. Source: 8-bit optimizers (arXiv 2110.02861), section 2.2.
    """
    positive: list[float] = []
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2**i + 1)
        midpoints = (edges[:-1] + edges[1:]) / np.float32(2)
        positive += (np.float32(10.0 ** (i - 6)) * midpoints).tolist()
    return np.sort(np.array([*positive, *(-v for v in positive), 0.0, 1.0], dtype=np.float32))


# Codebooks ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Codebook:
    """16 values and the rule that picks one: code = order[number of thresholds below v].

    With sign_magnitude (FP4), v is |x| and code 8 is added for x < 0; the order then has 8 entries.
    """

    values: np.ndarray  # [16] fp32, by code
    thresholds: np.ndarray  # [15] fp32 ascending, or [7] with sign_magnitude
    order: np.ndarray  # [16] uint8, or [8]
    sign_magnitude: bool = False


def _inverse_companding(level, companding: str, k: float):
    """The f^-1 of f(w) = sign(w) log(1 + k|w|)/log(1 + k) ("logarithmic"), or of
    f(w) = sign(w) (exp(k|w|) - 1)/(exp(k) - 1) ("exponential"); fp64, odd, [-1, 1] to itself."""
    magnitude = abs(level)
    if companding == "logarithmic":
        magnitude = math.expm1(magnitude * math.log1p(k)) / k
    elif companding == "exponential":
        magnitude = math.log1p(magnitude * math.expm1(k)) / k
    elif companding != "none":
        raise ValueError(
            f"make_codebook: companding is {companding!r}, want none|logarithmic|exponential"
        )
    return math.copysign(magnitude, level)


# A codebook is added here and in csrc/codebook.h; the two share no table.
CODEBOOKS = {"nf4": nf4_levels, "fp4": fp4_levels, "linear": linear_levels}


def make_codebook(
    quant_type: str = "nf4",
    levels: np.ndarray | None = None,
    companding: str = "none",
    companding_k: float = 1.0,
) -> Codebook:
    """The codebook called nf4, fp4, linear, or custom with 16 `levels` in any order.

    Thresholds are midpoints of neighbouring levels, in the companded domain and mapped back where
    there is companding. A midpoint that fp32 cannot hold is rounded to nearest where all levels are
    fp32 numbers (nf4, fp4: bitsandbytes' rule). Where they are decimals (linear) it is rounded
    down, so that v > t decides for an fp32 v as v > midpoint does exactly: 0.8 in fp32 lies above
    (0.73 + 0.87) / 2, as the format's worked example has it.
    """
    base = np.asarray(levels if quant_type == "custom" else CODEBOOKS[quant_type](), np.float64)
    sign_magnitude = quant_type == "fp4"
    ranks = 8 if sign_magnitude else 16
    order = np.argsort(base[:ranks], kind="stable").astype(np.uint8)
    ordered = base[order]

    def back(points):
        points = [_inverse_companding(float(p), companding, companding_k) for p in points]
        return np.array(points, dtype=np.float64)

    midpoints = back((ordered[:-1] + ordered[1:]) / 2)
    thresholds = midpoints.astype(np.float32)
    if (base != base.astype(np.float32)).any():
        below = np.nextafter(thresholds, np.float32(-np.inf))
        thresholds = np.where(thresholds > midpoints, below, thresholds)
    return Codebook(back(base).astype(np.float32), thresholds, order, sign_magnitude)


# Quantizing ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A packed weight. value(i) = codebook.values[code i] * scale[i // blocksize] (+ mean)."""

    packed: np.ndarray  # uint8 [ceil(numel / 2)], flat row-major, high nibble = even element
    absmax: np.ndarray  # fp32 [num_blocks]; or, if nested is given, uint8 codes [num_blocks]
    nested: np.ndarray | None  # fp32 [1 + ceil(num_blocks / 256)]: offset, then absmax2
    mean: np.ndarray | None  # fp32 [num_blocks], normalization "standard" only
    shape: tuple[int, ...]
    blocksize: int  # 0: one scale for the whole tensor
    codebook: Codebook

    @property
    def codes(self) -> np.ndarray:
        """The 4-bit codes, uint8 in 0..15, in the weight's shape."""
        numel = math.prod(self.shape)
        both = np.stack([self.packed >> 4, self.packed & 15], axis=1).reshape(-1)
        return both[:numel].reshape(self.shape)

    @property
    def scale(self) -> np.ndarray:
        """The scales as they are used, fp32 [num_blocks]."""
        return self.absmax if self.nested is None else dequantize_absmax(self.absmax, self.nested)


def tree_sum(values: np.ndarray) -> np.float64:
    """The one reduction for means: fp64, zero-padded to groups of 256, each summed by halving
    (v[i] += v[i + 128], then 64, ... 1); the group sums are the next level's values."""
    values = np.asarray(values, np.float64).reshape(-1)
    while True:
        pad = -len(values) % 256 if len(values) else 256
        groups = np.concatenate([values, np.zeros(pad)]).reshape(-1, 256)
        while groups.shape[1] > 1:
            half = groups.shape[1] // 2
            groups = groups[:, :half] + groups[:, half:]
        values = groups[:, 0]
        if len(values) == 1:
            return values[0] + 0.0  # every backend ends by adding 0.0: never -0.0


def _reciprocal(scale: np.float32) -> np.float32:
    """1 / scale in fp32; 0 where scale is 0 or so small that the reciprocal overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / np.float32(scale)
    return inverse if np.isfinite(inverse) else np.float32(0)


def _encode(v: np.ndarray, codebook: Codebook) -> np.ndarray:
    magnitude = np.abs(v) if codebook.sign_magnitude else v
    # side="left" counts the thresholds strictly below v: a tie takes the lower rank.
    code = codebook.order[np.searchsorted(codebook.thresholds, magnitude, side="left")]
    return code | np.where(v < 0, 8, 0).astype(np.uint8) if codebook.sign_magnitude else code


def quantize_4bit(
    weight: np.ndarray,
    blocksize: int = 64,
    codebook: Codebook | None = None,
    double_quant: bool = True,
    normalization: str = "absmax",
    std_factor: float = 3.0,
) -> QuantizedArray:
    """Packs a finite fp32 array of any shape; normalization is absmax, standard or none.

    none keeps the values as they are, in one block whose scale is 1, stored as fp32. A NaN or Inf
    is a ValueError.
    """
    weight = np.asarray(weight, np.float32)
    codebook = codebook or make_codebook()
    flat = weight.reshape(-1)
    if not np.isfinite(flat).all():
        index = int(np.argmin(np.isfinite(flat)))
        raise ValueError(f"quantize_4bit: weight[{index}] is {flat[index]}, want finite values")
    if normalization == "none":
        blocksize = 0
    block = blocksize or max(flat.size, 1)
    num_blocks = -(-flat.size // block)
    codes = np.zeros(flat.size, np.uint8)
    absmax = np.zeros(num_blocks, np.float32)
    mean = np.zeros(num_blocks, np.float32) if normalization == "standard" else None
    for b in range(num_blocks):
        x = flat[b * block : (b + 1) * block]
        if normalization == "absmax":
            absmax[b] = np.abs(x).max()
            v = x * _reciprocal(absmax[b])
        elif normalization == "standard":
            mean[b] = tree_sum(x) / x.size
            deviation = x.astype(np.float64) - np.float64(mean[b])
            std = np.sqrt(tree_sum(deviation * deviation) / x.size)
            absmax[b] = np.float64(np.float32(std_factor)) * std
            v = np.clip((x - mean[b]) * _reciprocal(absmax[b]), np.float32(-1), np.float32(1))
        elif normalization == "none":
            absmax[b] = 1
            v = x
        else:
            raise ValueError(f"quantize_4bit: normalization is {normalization!r}")
        codes[b * block : b * block + x.size] = _encode(v, codebook)
    padded = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    packed = (padded[0::2] << 4) | padded[1::2]
    nested = None
    if double_quant and normalization != "none":
        absmax, nested = quantize_absmax(absmax)
    return QuantizedArray(packed, absmax, nested, mean, weight.shape, blocksize, codebook)


def quantize_absmax(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [n] scales to uint8 codes [n] and fp32 [1 + ceil(n / 256)]: offset, then absmax2."""
    absmax = np.asarray(absmax, np.float32)
    table = dynamic_map().astype(np.float64)
    thresholds = ((table[:-1] + table[1:]) / 2).astype(np.float32)
    groups = -(-absmax.size // NESTED_BLOCKSIZE)
    nested = np.zeros(1 + groups, np.float32)
    nested[0] = tree_sum(absmax) / max(absmax.size, 1)
    centred = absmax - nested[0]
    code = np.zeros(absmax.size, np.uint8)
    for g in range(groups):
        part = slice(g * NESTED_BLOCKSIZE, (g + 1) * NESTED_BLOCKSIZE)
        nested[1 + g] = np.abs(centred[part]).max()
        v = centred[part] * _reciprocal(nested[1 + g])
        code[part] = np.searchsorted(thresholds, v, side="left")
    return code, nested


# Reading ------------------------------------------------------------------------------------------


def dequantize_absmax(code: np.ndarray, nested: np.ndarray) -> np.ndarray:
    """The fp32 scales of uint8 codes: a product, then a sum, each rounded to fp32."""
    absmax2 = nested[1:][np.arange(code.size) // NESTED_BLOCKSIZE]
    return dynamic_map()[code] * absmax2 + nested[0]


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded once, to nearest even, to float32, float16 or bfloat16; returned as fp32.

    A value too large for the dtype becomes an infinity.
    """
    x64 = np.asarray(x, np.float64)
    with np.errstate(over="ignore"):
        if dtype == "float16":
            return x64.astype(np.float16).astype(np.float32)
        if dtype == "float32":
            return x64.astype(np.float32)
    if dtype != "bfloat16":
        raise ValueError(f"round_to: dtype is {dtype!r}, want float32, float16 or bfloat16")
    # 8 bits of significand; subnormals share the exponent -126.
    exponent = np.maximum(np.frexp(x64)[1] - 1, -126)
    ulp = np.ldexp(1.0, exponent - 7)
    rounded = np.where(np.isfinite(x64), np.rint(x64 / ulp) * ulp, x64)
    with np.errstate(over="ignore"):
        return rounded.astype(np.float32)


def dequantize_4bit(q: QuantizedArray, dtype: str = "float32") -> np.ndarray:
    """The weight in its shape: table value * scale, then + mean, in fp32; then rounded to dtype."""
    flat = q.codebook.values[q.codes.reshape(-1)]
    block = np.arange(flat.size) // (q.blocksize or max(flat.size, 1))
    with np.errstate(over="ignore"):
        flat = flat * q.scale[block]
        if q.mean is not None:
            flat = flat + q.mean[block]
    return round_to(flat, dtype).reshape(q.shape)


# Linear layers, in fp64 ---------------------------------------------------------------------------


def linear_4bit(x, q: QuantizedArray, bias=None, lora_A=None, lora_B=None, scaling=1.0):
    """y = x W^T + bias + scaling (x A^T) B^T: x [..., K], W [N, K], A [R, K], B [N, R]; fp64."""
    x = np.asarray(x, np.float64)
    y = x @ dequantize_4bit(q).astype(np.float64).T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    if lora_A is not None:
        y = y + scaling * (x @ np.asarray(lora_A, np.float64).T) @ np.asarray(lora_B, np.float64).T
    return y


def linear_4bit_backward(dY, q: QuantizedArray):
    """dX = dY W, fp64 [..., K], and dbias = dY summed over all but its last axis, fp64 [N]."""
    dY = np.asarray(dY, np.float64)
    dX = dY @ dequantize_4bit(q).astype(np.float64)
    return dX, dY.reshape(-1, dY.shape[-1]).sum(0)


def lora_linear_4bit_backward(dY, x, q: QuantizedArray, lora_A, lora_B, scaling):
    """dX [..., K], dA [R, K], dB [N, R] of `linear_4bit` with a bypass, fp64."""
    dX, _ = linear_4bit_backward(dY, q)
    A, B = np.asarray(lora_A, np.float64), np.asarray(lora_B, np.float64)
    rows = np.asarray(dY, np.float64).reshape(-1, B.shape[0])
    x = np.asarray(x, np.float64)
    flat_x = x.reshape(-1, A.shape[1])
    dS = scaling * rows @ B
    dX = dX + (dS @ A).reshape(x.shape)
    return dX, dS.T @ flat_x, scaling * rows.T @ (flat_x @ A.T)


def merge_lora_4bit(q: QuantizedArray, lora_A, lora_B, scaling, dtype: str = "float16"):
    """W + scaling B A in fp64, rounded once to dtype; returned as fp32 [N, K]."""
    delta = scaling * np.asarray(lora_B, np.float64) @ np.asarray(lora_A, np.float64)
    return round_to(dequantize_4bit(q).astype(np.float64) + delta, dtype)
