"""Adapters on a mixture's experts, and PEFT's `target_parameters` files both ways."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models as tiny
from qlora_ext import (
    LoraConfig,
    add_lora,
    load_adapter,
    merge_and_unload,
    quantize_model,
    save_adapter,
)
from qlora_ext.merging.dense import leave_no_packed_layer
from qlora_ext.nn import LoraLinear4bit, LoraStack4bit
from qlora_ext.nn.experts import is_fused_experts

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from integration_helpers import peft_reads_mixtures

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model")
reads_mixtures = pytest.mark.skipif(
    not peft_reads_mixtures(), reason="this PEFT fails under this transformers"
)
HOLDER = "model.layers.0.mlp.experts"
KEY = "base_model.model." + HOLDER
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
NO_SWITCH = {"query": False, "value": False}


def quantized(family="qwen3_moe"):
    return quantize_model(tiny.make(family), progress_bar=False)


def dequantized(model):
    """The dense model of the same weights."""
    model = copy.deepcopy(model)
    leave_no_packed_layer(model)
    return model


def adapted(model, parameters=BOTH, **settings):
    config = LoraConfig(**{**NO_SWITCH, "target_parameters": parameters, **settings})
    return tiny.randomize(add_lora(model, config))


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Which layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, want",
    [
        ({"mlp": True}, ["up", "down"]),
        ({"target_parameters": ["experts.down_proj"]}, ["down"]),
        ({"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}, ["up"]),
        ({"target_modules": ["experts.up"]}, ["up"]),
        ({"target_modules": ["q_proj"], "target_parameters": BOTH}, ["up", "down", "q_proj"]),
        ({"target_parameters": ["v_proj.weight"]}, ["v_proj"]),
        ({"target_modules": [], "target_parameters": ["down_proj"]}, ["down"]),
    ],
    ids=str,
)
def test_targets(config, want):
    model = add_lora(quantized(), LoraConfig(**{**NO_SWITCH, **config}))
    kinds = (LoraLinear4bit, LoraStack4bit)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    assert {name.rpartition(".")[2] for name in names} == set(want)
    once = config.get("target_parameters") == ["layers.1.mlp.experts.gate_up_proj"]
    assert len(names) == (1 if once else 2 * len(want))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(f"{n}.{key}" for n in names for key in ("lora_A", "lora_B"))


def test_all_linear_adapts_experts():
    model = add_lora(quantized(), LoraConfig(target_modules="all-linear"))
    assert isinstance(model.model.layers[1].mlp.experts.down, LoraStack4bit)


@reads_mixtures
def test_a_rank_above_a_weights_smaller_side(tmp_path):
    """As in PEFT: the gate of a shared expert is one row, a projection of an expert has 32."""
    import transformers

    config = transformers.Qwen2MoeConfig(
        **tiny.EXPERTS, num_experts=4, shared_expert_intermediate_size=48
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    quantize_model(model, progress_bar=False)
    dense = dequantized(model)
    targets = ["q_proj", "shared_expert_gate"]
    config = peft.LoraConfig(r=40, target_modules=targets, target_parameters=BOTH)
    stock = tiny.randomize(peft.get_peft_model(copy.deepcopy(dense), config)).eval()
    want = tiny.logits(stock.base_model.model)
    assert (want - tiny.logits(model)).abs().max() > 0.05
    stock.save_pretrained(tmp_path / "stock")
    ours = load_adapter(copy.deepcopy(model), tmp_path / "stock")
    torch.testing.assert_close(tiny.logits(ours), want, rtol=1e-4, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(dense, tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(again.base_model.model), want, rtol=1e-4, atol=1e-5)
    merge_and_unload(ours, torch.float32, progress_bar=False)
    torch.testing.assert_close(tiny.logits(ours), want, rtol=1e-4, atol=1e-5)

    add_lora(model, LoraConfig(r=40, target_modules="all-linear"))
    block = model.model.layers[1].mlp
    assert block.shared_expert_gate.r == block.shared_expert.down_proj.r == block.experts.down.r
    first, last = tiny.train(model, steps=3)
    assert last < first


@pytest.mark.parametrize(
    "config, setting",
    [
        ({"target_modules": "all-linear"}, '"all-linear"'),
        ({"mlp": True}, "mlp=True"),
        ({"target_parameters": BOTH}, "target_parameters"),
        ({"target_modules": ["experts.up", "experts.down"]}, "target_modules"),
        ({"target_modules": r".*experts\.(up|down)"}, "target_modules"),
    ],
    ids=str,
)
def test_experts_that_stayed_dense_are_named(config, setting):
    """They get no adapter, and whoever asks for one must know."""
    model = tiny.make("qwen3_moe", num_hidden_layers=3)
    keep = ["layers.1.mlp.experts", "layers.2.mlp.experts"]
    quantize_model(model, modules_to_not_convert=keep, progress_bar=False)
    with pytest.warns(UserWarning, match="leaves out") as seen:
        add_lora(model, LoraConfig(**{**NO_SWITCH, **config}))
    (text,) = [str(w.message) for w in seen if "leaves out" in str(w.message)]
    gone = "model.layers.{1,2}.mlp.experts.gate_up_proj, model.layers.{1,2}.mlp.experts.down_proj"
    assert text.startswith(f"add_lora: {setting} leaves out {gone}: these experts are not packed")
    assert seen[0].filename == __file__
    names = [name for name, m in model.named_modules() if isinstance(m, LoraStack4bit)]
    assert names == [f"{HOLDER}.up", f"{HOLDER}.down"]


class Experts(torch.nn.Module):
    """Experts in a layout of their own, as Llama 4 has them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 64, 32))
        self.bias = torch.nn.Parameter(torch.zeros(4, 32))


def test_experts_of_an_unknown_class_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), Experts())
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out 1.gate_up_proj: these experts'):
        add_lora(model, LoraConfig(target_modules="all-linear"))
    config = LoraConfig(**NO_SWITCH, target_parameters=["gate_up_proj"])
    message = r"'gate_up_proj', which names no weight .* does not adapt \['1.gate_up_proj'\], bec"
    with pytest.raises(ValueError, match=message):
        add_lora(torch.nn.Sequential(torch.nn.Linear(64, 64), Experts()), config)


@pytest.mark.filterwarnings("error:add_lora")
def test_no_warning_where_experts_are_packed_or_not_asked_for():
    add_lora(quantized(), LoraConfig(target_modules="all-linear"))
    add_lora(tiny.make("qwen3_moe"))  # query and value


@pytest.mark.parametrize("kind", ["GptOss", "Olmoe", "GraniteMoe", "Ernie4_5_Moe"])
def test_switches_know_the_mixtures(kind):
    """mlp and the attention's switches need no names of layers."""
    import transformers

    settings = {**tiny.EXPERTS, "num_local_experts": 4, "num_experts": 4, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if not any(map(is_fused_experts, model.modules())):
        pytest.skip("this release of transformers holds these experts in layers of their own")
    add_lora(quantize_model(model, progress_bar=False), LoraConfig(mlp=True, projection=True))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert names >= {"q_proj", "v_proj", "o_proj", "up", "down"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_parameters": ["gate"]}, "target_parameters has 'gate', which names no weight"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj', want a list"),
        ({"target_parameters": [3]}, "target_parameters holds 3, want names"),
        ({"target_modules": [], "target_parameters": []}, "target_modules is empty"),
        ({"target_modules": ["down_proj"]}, r"\(for target_parameters\) .*experts\.down_proj"),
    ],
    ids=str,
)
def test_bad_targets(settings, message):
    model = quantized()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraConfig(**{**NO_SWITCH, **settings}))
    assert not any(isinstance(m, LoraStack4bit) for m in model.modules())


def test_to_peft_names_the_same():
    model = quantized()
    config = LoraConfig(r=3, mlp=True, lora_dropout=0.1).to_peft(model)
    assert sorted(config.target_parameters) == sorted(BOTH)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.lora_dropout == 0.0  # PEFT refuses another one
    assert LoraConfig(target_parameters=BOTH).to_peft().target_parameters == BOTH


# Files --------------------------------------------------------------------------------------------


@reads_mixtures
@pytest.mark.parametrize("r", [3, 4])  # of 4 experts
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stock_peft_loads_ours_and_we_load_stock_pefts(family, parameters, r, tmp_path):
    model = quantized(family)
    dense = dequantized(model)
    ours = adapted(copy.deepcopy(model), parameters, r=r, lora_alpha=7, use_rslora=r == 3)
    want = tiny.logits(ours)
    assert (want - tiny.logits(model)).abs().max() > 0.05
    save_adapter(ours, tmp_path / "ours")
    stock = peft.PeftModel.from_pretrained(dense, tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(stock.base_model.model), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny.logits(load_adapter(copy.deepcopy(model), tmp_path / "ours")), want)

    stock.save_pretrained(tmp_path / "stock")
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    again = load_adapter(model, tmp_path / "stock")
    assert torch.equal(tiny.logits(again), want)


def test_the_layout_bit_for_bit(tmp_path):
    """Row e r + k of A, and column k E + e of B, are those of expert e."""
    model = adapted(quantized(), r=3)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    experts = model.model.layers[0].mlp.experts
    for stack, key in ((experts.up, f"{KEY}.base_layer"), (experts.down, KEY)):
        A, B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        for e in range(4):
            for k in range(3):
                assert torch.equal(A[e * 3 + k], stack.lora_A[e, k])
                assert torch.equal(B[:, k * 4 + e], stack.lora_B[e, :, k])


@reads_mixtures
def test_layers_of_other_ranks(tmp_path):
    """rank_pattern and alpha_pattern go by the parameter's name, as PEFT's."""
    model = quantized()
    dense = dequantized(model)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        target_parameters=BOTH,
        rank_pattern={r".*\.gate_up_proj": 4},
        alpha_pattern={r".*\.gate_up_proj": 16},
    )
    stock = tiny.randomize(peft.get_peft_model(dense, config)).eval()
    want = tiny.logits(stock.base_model.model)
    stock.save_pretrained(tmp_path / "stock")
    ours = load_adapter(model, tmp_path / "stock")
    torch.testing.assert_close(tiny.logits(ours), want, rtol=1e-4, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(dequantized(quantized()), tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(again.base_model.model), want, rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_a_file(tmp_path):
    model = adapted(quantized(), r=2)
    first, last = tiny.train(model, steps=8)
    assert last < first
    save_adapter(model, tmp_path)
    again = load_adapter(quantized(), tmp_path, trainable=True)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    first, last = tiny.train(again, steps=8)
    assert last < first
    load_adapter(again, tmp_path)  # over the adapters that are there
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def swap(folder):
    """The file as PEFT before 0.19.1 wrote it: A and B of W^T."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in [key for key in tensors if ".experts." in key and "lora_A" in key]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        A, B = A.view(4, -1, A.shape[1]), B.view(B.shape[0], -1, 4).permute(2, 0, 1)
        A, B = B.mT, A.mT
        tensors[key] = A.flatten(0, 1).contiguous()
        swapped = B.permute(1, 2, 0).flatten(1).contiguous()
        tensors[key.replace("lora_A", "lora_B")] = swapped
    save_file(tensors, path)


@pytest.mark.parametrize("version", ["0.18.1", None])
def test_files_of_older_pefts_are_converted(version, tmp_path):
    model = quantized()
    ours = adapted(copy.deepcopy(model), r=3)
    want = tiny.logits(ours)
    save_adapter(ours, tmp_path)
    swap(tmp_path)
    edit(tmp_path, peft_version=version)
    torch.testing.assert_close(tiny.logits(load_adapter(model, tmp_path)), want)


def test_adapters_of_single_experts_load(tmp_path):
    """As a version before wrote them: experts.packed.3.up.lora_A."""
    model = adapted(quantized(), r=3)
    want = tiny.logits(model)
    save_adapter(model, tmp_path)
    tensors = {}
    for i, layer in enumerate(model.model.layers):
        for side in ("up", "down"):
            stack = getattr(layer.mlp.experts, side)
            for e in range(4):
                start = f"base_model.model.model.layers.{i}.mlp.experts.packed.{e}.{side}"
                tensors[f"{start}.lora_A.weight"] = stack.lora_A[e].detach().clone()
                tensors[f"{start}.lora_B.weight"] = stack.lora_B[e].detach().clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    names = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors})
    edit(tmp_path, target_parameters=None, target_modules=names)
    assert torch.equal(tiny.logits(load_adapter(quantized(), tmp_path)), want)
    del tensors[f"{KEY}.packed.2.up.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="one by one, but not all 4 in the same"):
        load_adapter(quantized(), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_version": "0.19.0"}, "written by PEFT 0.19.0, which stored them in a layout of"),
        ({"peft_version": "x"}, "peft_version 'x', want x.y.z"),
        ({"target_parameters": ["experts.up_proj"]}, "adapts the parameter experts.up_proj, want"),
        (
            {"target_parameters": ["experts.down_proj"]},
            "experts.base_layer, which the model does not have",
        ),
        ({"target_parameters": "w"}, "target_parameters is 'w', want names"),
        ({"r": 5}, "the config says r = 5"),
    ],
    ids=str,
)
def test_bad_files(changes, message, tmp_path):
    save_adapter(adapted(quantized(), r=3), tmp_path)
    edit(tmp_path, **changes)
    model = quantized()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not any(isinstance(m, LoraStack4bit) for m in model.modules())


def test_factors_of_another_model(tmp_path):
    save_adapter(adapted(quantized(), r=3), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{KEY}.lora_B.weight"] = tensors[f"{KEY}.lora_B.weight"][:, :-1].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"experts.down has lora_A \[12, 32\] and .*want \[4 r"):
        load_adapter(quantized(), tmp_path)
    with pytest.raises(ValueError, match="it has none"):
        load_adapter(tiny.make("qwen3_moe"), tmp_path)
