"""The GPUs, layers and numbers of rows that the model's table has."""

from __future__ import annotations

import dataclasses

RANK = 16
PACKED = 0.516  # bytes per weight: 4 bits, 8-bit scales of 64 weights, their own scales
ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
LAYERS = (  # (N, K): out_features, in_features
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (1024, 4096),
)
# A layer of Qwen3-30B-A3B: up (gate and up in one) and down of each expert.
EXPERTS, TOP = 128, 8
EXPERT_LAYERS = ((1536, 2048), (2048, 768))
TOKENS = (1, 16, 64, 512, 4096)
GROUPED = ("grouped_gemm_4bit", "grouped_gemm_4bit_backward")
PRODUCTS = ("gemm_4bit", "gemm_4bit_backward")
LORA = ("lora_shrink", "lora_shrink_backward", "lora_expand_backward")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. What it sustains is in assumptions.py."""

    name: str
    arch: int  # compute capability
    sms: int
    boost: float  # GHz
    binary: str  # the architecture whose SASS it runs here
    tensor: float  # dense bf16 TFLOP/s with fp32 sums
    memory: float  # TB/s
    threads: int  # that an SM holds
    shared: int  # bytes of an SM
    blocks: int  # that an SM holds
    l2: int  # MiB

    @property
    def flops_per_cycle(self):
        """Of one SM's tensor cores."""
        return self.tensor * 1e12 / (self.sms * self.boost * 1e9)


GPUS = (
    Gpu("A100", 80, 108, 1.41, "8.0", 312, 2.04, 2048, 167936, 32, 40),
    Gpu("H100", 90, 132, 1.83, "9.0a", 989, 3.35, 2048, 233472, 32, 50),
    Gpu("H200", 90, 132, 1.83, "9.0a", 989, 4.80, 2048, 233472, 32, 50),
    Gpu("4090", 89, 128, 2.52, "8.0", 165.2, 1.008, 1536, 102400, 24, 72),
)
# Only in the checks against Marlin's published figures.
A10 = Gpu("A10", 86, 72, 1.695, "8.0", 125, 0.60, 1536, 102400, 16, 6)
