"""Every class of transformers that holds fused experts: packed, it computes what it did."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import expert_families as families
from qlora_ext import QuantConfig
from qlora_ext.nn import Experts4bit
from qlora_ext.nn.dense import dense_layer


@pytest.mark.parametrize("family", families.classes(), ids="-".join)
def test_packed_experts_compute_what_their_class_does(family):
    layer = families.build(*family)
    packed = Experts4bit.from_experts(layer, QuantConfig(blocksize=32))
    dense = dense_layer(Experts4bit.from_experts(layer, QuantConfig(blocksize=32)), torch.float32)
    assert type(dense) is type(layer)
    x, index, weights = families.routed(layer)
    x.requires_grad_(), weights.requires_grad_()
    outputs, gradients = [], []
    for module in (packed, dense):
        y = module(x, index, weights)
        y.square().sum().backward()
        outputs.append(y), gradients.append((x.grad, weights.grad))
        x.grad = weights.grad = None
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4 * outputs[1].abs().max().item())
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_the_page_of_families_is_what_it_is_made_of():
    """docs/generated/experts.md; `python tests/support/expert_families.py --write` renews it."""
    page = families.PAGE.read_text(encoding="utf-8")
    assert len(families.classes()) > 60
    if f"transformers {transformers.__version__} " in page:
        assert page == families.page()
