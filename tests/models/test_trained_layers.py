"""quantize_model leaves alone what is made to be trained: the adapters of other libraries, and
layers that require gradients in a model whose other layers do not."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_models as tiny
from qlora_ext import LoraConfig, add_lora, load_adapter, quantize_model, save_adapter
from qlora_ext.models.plan import ADAPTER, TRAINS
from qlora_ext.models.walk import stacked_names
from qlora_ext.nn import Embedding4bit, Linear4bit, LoraLinear4bit, PanelLinear
from qlora_ext.nn.stack import Stack4bit


def quantize(model, **settings):
    return quantize_model(model, progress_bar=False, **settings)


def quietly(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantize(model, **settings)


def packed(model):
    kinds = (Linear4bit, Stack4bit)
    return {name for name, m in model.named_modules() if isinstance(m, kinds)}


def trainable(model):
    return {name: id(p) for name, p in model.named_parameters() if p.requires_grad}


def reasons(model):
    return {layer.name: layer.reason for layer in model.quantization_report.unquantized}


class TorchtuneLinear(nn.Module):
    """torchtune.modules.peft.LoRALinear: a weight of its own, and two nn.Linear."""

    def __init__(self, K, N, r=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K) / 8)
        self.lora_a = nn.Linear(K, r, bias=False)
        self.lora_b = nn.Linear(r, N, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight) + self.lora_b(self.lora_a(x))


class Wrapped(nn.Module):
    """A frozen layer and an adapter around it, as kohya's and many projects' own have it."""

    def __init__(self, names, K=64, N=64, r=8):
        super().__init__()
        self.base = nn.Linear(K, N)
        self.down, self.up = names
        self.add_module(self.down, nn.Linear(K, r, bias=False))
        self.add_module(self.up, nn.Linear(r, N, bias=False))

    def forward(self, x):
        bypass = self.get_submodule(self.up)(self.get_submodule(self.down)(x))
        return self.base(x) + bypass


class BareFactors(nn.Module):
    """litgpt's LoRALinear and others: a layer beside two parameters."""

    def __init__(self, K=64, N=64, r=8):
        super().__init__()
        self.linear = nn.Linear(K, N)
        self.lora_A = nn.Parameter(torch.randn(r, K))
        self.lora_B = nn.Parameter(torch.randn(N, r))

    def forward(self, x):
        return self.linear(x) + x @ self.lora_A.T @ self.lora_B.T


class SubclassedLinear(nn.Linear):
    """loralib's Linear: a subclass with the factors in it."""

    def __init__(self, K=64, N=64, r=8):
        super().__init__(K, N)
        self.lora_A = nn.Parameter(torch.randn(r, K))
        self.lora_B = nn.Parameter(torch.randn(N, r))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.lora_A.T @ self.lora_B.T


def freeze_all_but(model, pattern):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(pattern, name)))
    return model


@pytest.mark.parametrize("marked", [False, True], ids=["all train", "base frozen"])
@pytest.mark.parametrize(
    "names", [("lora_a", "lora_b"), ("lora_A", "lora_B"), ("lora_down", "lora_up")]
)
def test_lora_factors_go_by_their_names(names, marked):
    model = nn.Sequential(Wrapped(names), nn.ReLU(), Wrapped(names))
    if marked:
        freeze_all_but(model, "lora_")
    before = {n: i for n, i in trainable(model).items() if "lora_" in n}
    x = torch.randn(3, 64)
    with pytest.warns(UserWarning, match=rf"them: \{{0,2\}}\.{names[0]} \(an adapter") as caught:
        quantize(model)
    assert len(caught) == 1
    assert packed(model) == {"0.base", "2.base"}
    after = trainable(model)
    assert {n: i for n, i in after.items() if "lora_" in n} == before and len(before) == 4
    assert reasons(model)[f"2.{names[1]}"] == ADAPTER
    model(x).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in before)


def test_factors_in_a_dict_of_adapters():
    """PEFT keeps the factors of each adapter in a ModuleDict."""
    layer = nn.ModuleDict(
        {
            "base": nn.Linear(64, 64),
            "lora_A": nn.ModuleDict({"default": nn.Linear(64, 8)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(8, 64)}),
        }
    )
    model = nn.ModuleDict({"q": layer})
    with pytest.warns(UserWarning, match=r"q\.lora_A\.default \(an adapter"):
        quantize(model)
    assert packed(model) == {"q.base"}


def test_a_model_with_nothing_but_adapters_to_pack_stays_and_that_is_said():
    model = freeze_all_but(nn.Sequential(TorchtuneLinear(64, 96), TorchtuneLinear(96, 64)), "lora_")
    before, x = trainable(model), torch.randn(3, 64)
    want = model(x)
    with pytest.warns(UserWarning) as caught:
        assert quantize(model) is model
    messages = [str(w.message) for w in caught]
    assert any("would freeze them" in m and "{0,1}.lora_b (an adapter" in m for m in messages)
    assert any("stay unquantized" in m and "{0,1} (not an nn.Linear)" in m for m in messages)
    assert trainable(model) == before and torch.equal(model(x), want)
    assert not packed(model) and not model.quantization_report.quantized


def test_bare_factors_and_subclasses():
    model = freeze_all_but(nn.ModuleDict({"a": BareFactors(), "b": SubclassedLinear()}), "lora_")
    before = trainable(model)
    with pytest.warns(UserWarning, match=r"b \(a subclass of nn.Linear"):
        quantize(model)
    assert packed(model) == {"a.linear"} and trainable(model) == before
    assert model["b"].weight.dtype == torch.float32


def blocks(**extra):
    def block():
        return nn.ModuleDict(
            {"fc": nn.Linear(64, 64), "norm": nn.LayerNorm(64), "extra": nn.Linear(64, 8)}
        )

    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), **extra})


def test_a_layer_that_trains_while_others_are_frozen_is_left_alone():
    model = freeze_all_but(blocks(), "extra|norm")
    before = trainable(model)
    with pytest.warns(UserWarning) as caught:
        quantize(model)
    assert [str(w.message) for w in caught] == [
        "quantize_model: these layers stay as they are, because packing would freeze them: "
        "layers.{0,1}.extra (trainable, while other weights of the model are frozen); to pack "
        "those that are not adapters, freeze them first (requires_grad_(False))"
    ]
    assert packed(model) == {"layers.0.fc", "layers.1.fc"} and trainable(model) == before
    assert reasons(model)["layers.1.extra"] == TRAINS


@pytest.mark.parametrize("trains", [True, False])
def test_a_model_in_one_state_is_packed_as_a_whole(trains):
    model = quietly(blocks().requires_grad_(trains))
    assert len(packed(model)) == 4


def test_the_advice_holds():
    model = freeze_all_but(blocks(), r"extra")
    quietly(model.requires_grad_(False))
    assert len(packed(model)) == 4


@pytest.mark.parametrize("frozen", ["table", "norm", "bias"])
def test_frozen_tables_norms_and_biases_say_nothing_about_layers(frozen):
    """Some classes freeze their table of positions, so a frozen table is no decision to train the
    layers."""
    model = blocks(table=nn.Embedding(9, 64))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert len(packed(quietly(model))) == 4


def test_biases_of_frozen_layers_go_on_training():
    model = quietly(freeze_all_but(blocks(), "bias"))
    assert len(packed(model)) == 4
    assert {n for n in trainable(model) if "fc" in n} == {"layers.0.fc.bias", "layers.1.fc.bias"}


def test_tables_that_train():
    def model():
        return blocks(table=nn.Embedding(9, 64))

    trained = freeze_all_but(model(), "table")
    with pytest.warns(UserWarning, match=r"would freeze them.*table \(trainable, while"):
        quantize(trained, quantize_embeddings=True)
    assert type(trained["table"]) is nn.Embedding and trained["table"].weight.requires_grad
    frozen = quietly(model(), quantize_embeddings=True)
    assert isinstance(frozen["table"], Embedding4bit)
    quietly(freeze_all_but(model(), "table"))  # tables stay anyway


def test_names_to_leave_alone_come_first():
    model = freeze_all_but(blocks(), "extra")
    quietly(model, modules_to_not_convert=["extra"])
    assert reasons(model)["layers.0.extra"] == "modules_to_not_convert='extra'"


def test_adapters_do_not_become_panels():
    model = nn.ModuleDict({"q": Wrapped(("lora_a", "lora_b")), "kept": nn.Linear(64, 64)})
    with pytest.warns(UserWarning, match="would freeze them"):
        quantize(model, modules_to_not_convert=["kept"], dense_panels=True)
    assert type(model["kept"]) is PanelLinear
    assert type(model["q"].lora_a) is nn.Linear and type(model["q"].lora_b) is nn.Linear


def test_experts_that_train():
    pytest.importorskip("transformers")
    model = freeze_all_but(tiny.make("mixtral"), r"layers\.1\.mlp\.experts")
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.experts \(trainable, while"):
        quantize(model)
    names = packed(model)
    assert any("layers.0.mlp.experts" in name for name in names)
    assert not any("layers.1.mlp.experts" in name for name in names)


def test_a_partly_frozen_model_of_transformers_takes_our_adapters():
    pytest.importorskip("transformers")
    model = freeze_all_but(tiny.make("llama"), r"layers\.1\.mlp")
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.down_proj \(trainable, while"):
        quantize(model)
    assert all("layers.1.mlp" not in name for name in packed(model)) and len(packed(model)) == 11
    message = r"froze model\.layers\.1\.mlp\.gate_proj.*left alone because they train"
    with pytest.warns(UserWarning, match=message):
        add_lora(model, LoraConfig(target_modules=["q_proj"]))
    assert all("lora_" in name for name in trainable(model))
    model(**tiny.inputs(model)).logits.sum().backward()


@pytest.mark.parametrize("kind", [Wrapped, BareFactors])
@pytest.mark.parametrize("op", ["add_lora", "load_adapter"])
def test_our_adapters_freeze_no_others(op, kind, tmp_path):
    def layer():
        return kind(("lora_a", "lora_b")) if kind is Wrapped else kind()

    model = freeze_all_but(nn.Sequential(layer(), nn.Linear(64, 64), layer()), "lora_")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize(model)
    before, config = trainable(model), LoraConfig(r=4, target_modules="all-linear")
    calls = {"add_lora": lambda: add_lora(model, config)}
    calls["load_adapter"] = lambda: load_adapter(model, tmp_path)
    if op == "load_adapter":
        save_adapter(add_lora(nn.Sequential(nn.Identity(), nn.Linear(64, 64)), config), tmp_path)
    with pytest.raises(ValueError, match=rf"{op}: \{{0,2\}}\.lora_.*, but {op} would freeze them"):
        calls[op]()
    assert trainable(model) == before and len(before) == 4
    model.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls[op]()
    said = [str(w.message) for w in caught]
    left = '"all-linear" leaves out 0.lora_a, 0.lora_b, 2.lora_a, 2.lora_b: adapters of another'
    assert any(left in message for message in said) == (op == "add_lora" and kind is Wrapped)
    # Loaded again over ours, and ours do not count as others'.
    load_adapter(model, save_adapter(model, tmp_path / "again"), trainable=True)
    ours = {n for n, m in model.named_modules() if isinstance(m, LoraLinear4bit)}
    base = "base" if kind is Wrapped else "linear"
    assert ours == ({"1"} if op == "load_adapter" else {f"0.{base}", "1", f"2.{base}"})
    assert set(trainable(model)) == {f"{name}.lora_{x}" for name in ours for x in "AB"}


def test_warnings_name_the_layers():
    """A name that is alone stays a name, a stack has its numbers, and if most layers stay dense
    that is said."""

    def said(frozen):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
        for i in frozen:
            model[i].requires_grad_(False)
        with pytest.warns(UserWarning) as caught:
            quantize(model)
        return str(caught[0].message)

    start = "quantize_model: these layers stay as they are, because packing would freeze them: "
    reason = " (trainable, while other weights of the model are frozen)"
    assert said([0, 2, 3, 4, 5]).startswith(f"{start}1{reason}; to pack")
    assert said([0, 2, 4]).startswith(f"{start}{{1,3,5}}{reason}; to pack")
    assert said([0]).startswith(f"{start}{{1..5}}{reason}; layers left alone: 5, packed: 1; to")


@pytest.mark.parametrize(
    "names, want",
    [
        (["a.1.b"], ["a.1.b"]),
        (["a.0.b", "a.1.b", "a.0.c"], ["a.{0,1}.b", "a.0.c"]),
        ([f"a.{i}.b.{j}" for i in (2, 3, 4, 9) for j in (0, 1)], ["a.{2..4,9}.b.{0,1}"]),
        (["a.0.b.0", "a.1.b.0", "a.1.b.1"], ["a.*.b.* x3"]),
        (["a.7.b.0", "a.7.b.1"], ["a.7.b.{0,1}"]),
        ([f"{i}" for i in range(0, 40, 2)], ["{0,2,4,6,8,10,12,14,...}"]),
        (["head", "layer1.x"], ["head", "layer1.x"]),
    ],
)
def test_stacked_names(names, want):
    assert stacked_names(names) == want
