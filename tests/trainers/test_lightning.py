"""The precision plug-ins for Lightning's Fabric and Trainer.

`make test-trainers TRAINERS=lightning` runs it.
"""

import pickle

import pytest
import torch
from torch import nn

from qlora_ext import QuantConfig, quantize_model
from qlora_ext.nn import Linear4bit

lightning = pytest.importorskip("lightning", reason="tests/trainers/lightning.txt is not installed")

from qlora_ext.integrations.lightning import FabricPrecision4bit, TrainerPrecision4bit

CONFIG = QuantConfig(quant_type="fp4", blocksize=32)


class Net(nn.Module):
    """A model that initialises its layers itself, as many projects' own do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        return self.down(self.norm(self.up(self.table(ids))).relu())


def fabric_of(**settings):
    plugin = FabricPrecision4bit(**settings)
    return lightning.Fabric(accelerator="cpu", devices=1, plugins=plugin)


def dense(seed=0):
    torch.manual_seed(seed)
    return Net()


def packed(model):
    return {name for name, module in model.named_modules() if type(module) is Linear4bit}


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("empty_init", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_built_under_fabric_packs_what_it_loads(dtype, empty_init):
    fabric, source = fabric_of(config=CONFIG, dtype=dtype), dense()
    original = nn.Linear
    with fabric.init_module(empty_init=empty_init):
        model = Net()
        assert torch.get_default_dtype() == dtype
    assert nn.Linear is original and torch.get_default_dtype() == torch.float32
    assert packed(model) == {"up", "down"} and model.up.config == CONFIG
    assert model.table.weight.dtype == model.up.bias.dtype == model.up.dtype == dtype
    model = fabric.setup_module(model)
    model.load_state_dict(source.state_dict())
    want = quantize_model(dense(), CONFIG, progress_bar=False).to(dtype)
    for key, tensor in want.state_dict().items():
        got = model.state_dict()[key]
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), key
    y = model(IDS)
    assert y.dtype == torch.float32 and torch.equal(y, want(IDS).float())
    pickle.loads(pickle.dumps(model.module.up))


def test_a_model_that_is_set_up_dense_is_packed_by_the_plan():
    fabric = fabric_of(dtype=torch.bfloat16, modules_to_not_convert=["down"])
    model = dense()
    model.lora_a = nn.Linear(64, 4)
    with pytest.warns(UserWarning, match="would freeze them.*lora_a"):
        model = fabric.setup(model)
    assert packed(model.module) == {"up"}
    assert model.down.weight.dtype == model.lora_a.weight.dtype == torch.bfloat16
    # The codes come from the fp32 weights.
    assert torch.equal(model.up.weight, Linear4bit.from_linear(dense().up).weight)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    again = fabric.setup_module(model.module)  # as it is
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())


def test_layers_under_other_names_are_named():
    """init_module replaces torch.nn.Linear, and not what other modules have imported before."""
    fabric, Linear = fabric_of(), nn.Linear

    def build():
        attention = nn.MultiheadAttention(64, 4)
        layers = {"up": nn.Linear(64, 64), "own": Linear(64, 64), "lora_a": Linear(64, 4)}
        return nn.ModuleDict({**layers, "attention": attention})

    with fabric.init_module():
        model = build()
    said = "own, attention, attention.out_proj stay dense, .* name torch.nn.Linear only, .* outside"
    with pytest.warns(UserWarning, match=f": {said} init_module"):
        fabric.setup_module(model)
    assert packed(model) == {"up"}
    with pytest.warns(UserWarning):  # the advice holds
        model = fabric.setup_module(build())
    assert packed(model.module) == {"up", "own"}


def test_floating_point_inputs_and_outputs_are_cast():
    plugin = FabricPrecision4bit(dtype=torch.float16)
    data = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.long), "other": [1.0, "a"]}
    cast = plugin.convert_input(data)
    assert cast["x"].dtype == torch.float16 and cast["ids"].dtype == torch.long
    assert cast["other"] == [1.0, "a"]
    assert plugin.convert_output(cast)["x"].dtype == torch.float32
    with plugin.forward_context():
        assert torch.ones(1).dtype == torch.float16
    with pytest.raises(KeyError), plugin.module_init_context():
        raise KeyError
    assert torch.get_default_dtype() == torch.float32 and type(nn.Linear(2, 2)) is nn.Linear


def test_bad_settings_are_refused():
    with pytest.raises(TypeError, match="FabricPrecision4bit: config is a str, want a QuantConfig"):
        FabricPrecision4bit("nf4")
    with pytest.raises(TypeError, match=r"TrainerPrecision4bit: dtype is torch.float64, want"):
        TrainerPrecision4bit(dtype=torch.float64)
    fabric = fabric_of(modules_to_not_convert=["down"])
    with pytest.raises(RuntimeError, match=r"init_module cannot leave .* modules_to_not_convert"):
        fabric.init_module()
    with pytest.raises(ValueError, match="no layer to pack"):
        fabric_of().setup(nn.Sequential(nn.LayerNorm(4)))


class Task(lightning.LightningModule):
    """Trains an adapter beside a frozen net. checkpoint: what the net loads when it is built."""

    def __init__(self, checkpoint=None):
        super().__init__()
        self.checkpoint, self.net = checkpoint, None
        if checkpoint is None:
            self.net = dense().requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        self.losses = []

    def configure_model(self):
        if self.net is None:
            self.net = Net().requires_grad_(False)
            self.net.load_state_dict(self.checkpoint)

    def training_step(self, batch, index):
        (x,) = batch
        assert torch.get_default_dtype() == torch.bfloat16
        y = self.net(x) + self.lora_b(self.lora_a(self.net.table(x)))
        loss = (y.float() - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        assert len(parameters) == 2
        return torch.optim.Adam(parameters, lr=3e-2)


def trainer(folder, steps, **settings):
    return lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=folder, **settings,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("built", ["before", "in configure_model"])
def test_trainer(built, tmp_path):
    def task():
        torch.manual_seed(1)
        return Task(None if built == "before" else dense().state_dict())

    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(IDS.repeat(8, 1)), batch_size=2
    )
    whole = task()
    plugin = TrainerPrecision4bit(dtype=torch.bfloat16)
    trainer(tmp_path, 8, plugins=plugin, enable_checkpointing=False).fit(whole, data)
    assert packed(whole) == {"net.up", "net.down"} and whole.lora_a.weight.requires_grad
    assert len(whole.losses) == 8 and whole.losses[-1] < 0.8 * whole.losses[0]
    assert torch.equal(whole.net.up.weight, Linear4bit.from_linear(dense().up).weight)

    # Interrupted after 4 steps, and resumed from Lightning's checkpoint.
    half = task()
    first = trainer(tmp_path, 4, plugins=TrainerPrecision4bit(dtype=torch.bfloat16))
    first.fit(half, data)
    resumed = task()
    if built == "before":  # Trainer loads a checkpoint before it sets the model up
        quantize_model(resumed, progress_bar=False)
    trainer(tmp_path, 8, plugins=TrainerPrecision4bit(dtype=torch.bfloat16)).fit(
        resumed, data, ckpt_path=first.checkpoint_callback.best_model_path
    )
    assert half.losses + resumed.losses == whole.losses
    assert torch.equal(resumed.lora_b.weight, whole.lora_b.weight)
