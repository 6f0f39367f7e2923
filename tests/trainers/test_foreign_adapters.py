"""quantize_model on models that carry torchtune's and loralib's own adapters.

`make test-trainers TRAINERS=torchtune` runs it. tests/models/test_trained_layers.py has the same
layouts without the libraries.
"""

import pytest
import torch
from torch import nn

from qlora_ext import quantize_model
from qlora_ext.nn import Linear4bit


def before_and_after(model, x):
    """Trainable parameters, and the output, before and after quantize_model."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        want = model(x)
    with pytest.warns(UserWarning):
        quantize_model(model, progress_bar=False)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == after.keys() and all(after[name] is p for name, p in named.items())
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in after.values())
    return want, y.detach()


@pytest.mark.parametrize("name", ["LoRALinear", "DoRALinear"])
def test_torchtunes_layers(name):
    pytest.importorskip("torchtune", reason="tests/trainers/torchtune.txt is not installed")
    from torchtune.modules import peft

    torch.manual_seed(0)
    layers = [getattr(peft, name)(64, 64, rank=4, alpha=8) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Linear(64, 64), layers[1])
    if name == "DoRALinear":
        for layer in layers:
            layer.initialize_dora_magnitude()
    peft.set_trainable_params(model, peft.get_adapter_params(model))
    want, got = before_and_after(model, torch.randn(3, 64))
    assert type(model[1]) is Linear4bit
    assert all(type(layer.lora_a) is type(layer.lora_b) is nn.Linear for layer in layers)
    assert (got - want).norm() < 0.2 * want.norm()


def test_loralibs_layers():
    loralib = pytest.importorskip("loralib", reason="tests/trainers/torchtune.txt is not installed")
    model = nn.Sequential(
        loralib.Linear(64, 64, r=4),
        nn.Linear(64, 64),
        loralib.MergedLinear(64, 192, r=4, enable_lora=[True, False, True]),
    )
    loralib.mark_only_lora_as_trainable(model)
    want, got = before_and_after(model, torch.randn(2, 3, 64))
    assert type(model[0]) is loralib.Linear and type(model[1]) is Linear4bit
    assert (got - want).norm() < 0.2 * want.norm()
