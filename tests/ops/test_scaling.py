"""A scaling that is no finite number is refused, by functions and by PEFT's layers."""

import pytest
import torch

import qlora_ext
from cases import make_weight
from qlora_ext.nn import Linear4bit, LoraLinear4bit

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
