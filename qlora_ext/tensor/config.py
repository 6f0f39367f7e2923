"""QuantConfig: the settings for packing a weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import is_number
from ..ops import _C
from ..text import shorten

QUANT_TYPES = (*_C.codebooks(), "custom")
NORMALIZATIONS = ("absmax", "standard", "none")
COMPANDINGS = ("none", "logarithmic", "exponential")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT_DTYPES = tuple(_DTYPES.values())
_NESTED_BLOCKSIZE = 256
# The version of docs/format.md. It goes up when older releases would misread what a newer one
# writes. Version 2 stores the experts of a mixture as stacks; a release that knows only version 1
# would give them random weights. A checkpoint records the lowest version that can read it.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class QuantConfig:
    """How a weight becomes 4 bits. The default is QLoRA's: NF4, block 64, double quantization.

    quant_type: a codebook of docs/format.md ("nf4", "fp4", ...), or "custom" with `codebook`, any
        16 finite values.
    blocksize: elements per scale, a power of two from 32 to 4096. None: one scale for the whole
        tensor.
    double_quant: scales in 8 bits (4.127 bits per weight at block 64) instead of fp32 (4.5).
    normalization: "absmax" (w / max|w|), "standard" ((w - mean) / (std_factor * std), clipped to
        [-1, 1]; stores two statistics), or "none" (values taken as they are; no scales).
    companding: "none", "logarithmic" (sign(w) log(1 + k|w|)) or "exponential"
        (sign(w) (exp(k|w|) - 1)), both normalised to [-1, 1], with k = companding_k.

    Raises ValueError for any other value.
    """

    quant_type: str = "nf4"
    blocksize: int | None = 64
    double_quant: bool = True
    normalization: str = "absmax"
    codebook: tuple[float, ...] | None = None
    companding: str = "none"
    companding_k: float = 1.0
    std_factor: float = 3.0

    def __post_init__(self):
        def check(ok: bool, argument: str, want: str):
            if not ok:
                raise ValueError(
                    f"QuantConfig: {argument} is {shorten(getattr(self, argument))}, want {want}"
                )

        check(self.quant_type in QUANT_TYPES, "quant_type", f"one of {QUANT_TYPES}")
        check(isinstance(self.double_quant, bool), "double_quant", "True or False")
        check(is_number(self.companding_k), "companding_k", "a number that fits a float")
        check(is_number(self.std_factor), "std_factor", "a number that fits a float")
        check(
            self.blocksize is None
            or (type(self.blocksize) is int and self.blocksize in BLOCKSIZES),
            "blocksize",
            f"one of {BLOCKSIZES}, or None for one scale per tensor",
        )
        check(self.normalization in NORMALIZATIONS, "normalization", f"one of {NORMALIZATIONS}")
        check(self.companding in COMPANDINGS, "companding", f"one of {COMPANDINGS}")
        if self.codebook is not None:
            values = self.codebook.tolist() if hasattr(self.codebook, "tolist") else self.codebook
            check(
                isinstance(values, (list, tuple)) and all(is_number(v) for v in values),
                "codebook",
                "a list of 16 numbers that fit a float, or None",
            )
            object.__setattr__(self, "codebook", tuple(float(v) for v in values))
        check(
            (self.quant_type == "custom") == (self.codebook is not None),
            "codebook",
            "16 values with quant_type 'custom', and None with any other",
        )
        # The compiled library checks the values: that there are 16, finite, and companding_k fits.
        try:
            _C.resolve_codebook(
                self.quant_type, self.codebook, self.companding, float(self.companding_k)
            )
        except RuntimeError as error:
            raise ValueError(str(error).replace("quantize_4bit", "QuantConfig", 1)) from None
        check(0 < self.std_factor <= 1e6, "std_factor", "a factor in (0, 1e6]")

    def to_dict(self) -> dict[str, Any]:
        """The settings as values that JSON can hold."""
        fields = dataclasses.asdict(self)
        fields["codebook"] = None if self.codebook is None else list(self.codebook)
        return fields

    @property
    def stored_blocksize(self) -> int:
        """Elements per scale; 0 if the whole tensor has one scale."""
        return 0 if self.normalization == "none" else self.blocksize or 0

    @property
    def stores_nested(self) -> bool:
        """Whether scales are stored in 8 bits. Normalization "none" has one scale, exactly 1."""
        return self.double_quant and self.normalization != "none"

    @property
    def stores_mean(self) -> bool:
        """Whether each block's mean is stored."""
        return self.normalization == "standard"

    @property
    def stored_quant_type(self) -> str:
        """The quant_type that is stored. Companding turns a named codebook into a custom one."""
        return self.quant_type if self.companding == "none" else "custom"

    @property
    def stored_codebook(self) -> tuple[float, ...] | None:
        """The 16 values of a custom codebook after companding (fp32, by code), else None."""
        if self.stored_quant_type != "custom":
            return None
        values, _ = _C.resolve_codebook(
            self.quant_type, self.codebook, self.companding, float(self.companding_k)
        )
        return tuple(values)


def check_format_version(found: object) -> None:
    """Checks the `format_version` of a packed checkpoint. None: it records none, so it is 1.

    Raises:
        ValueError: it is newer than FORMAT_VERSION, or not an integer of 1 or more.
    """
    if found is None:
        return
    if type(found) is not int or found < 1:
        raise ValueError(
            f"format_version is {shorten(found)}, want an integer from 1 to {FORMAT_VERSION}"
        )
    if found > FORMAT_VERSION:
        raise ValueError(
            f"format_version is {shorten(found)}, want at most {FORMAT_VERSION}: a newer qlora_ext "
            "wrote this checkpoint; upgrade qlora_ext to read it"
        )
