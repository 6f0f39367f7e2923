"""PEFT's HiRA, IA3, PVeRA, RandLoRA, RoAd and SHiRA, its target_parameters and the dtype of
adapters, on packed layers: the same keys, shapes, dtypes and outputs as PEFT's own layers on the
dequantized model."""

import copy
import pickle
import warnings

import pytest
import torch

from integration_helpers import ids, logits, randomize, run_python, tiny_llama

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import qlora_ext
from qlora_ext.integrations import peft as plugin
from qlora_ext.integrations.peft import versions
from qlora_ext.nn import Linear4bit
from qlora_ext.nn.packed import _Packed4bit

PROJECTIONS = ["q_proj", "up_proj", "down_proj"]  # square, wide and tall
GPT2 = ["c_attn", "mlp.c_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of an unquantized tiny model, whose attention has biases that are not 0."""
    folder = tmp_path_factory.mktemp("unquantized")
    return with_biases(tiny_llama(folder, attention_bias=True))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The folder of an unquantized GPT-2, whose layers are Conv1D with biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return with_biases(folder)


def with_biases(folder):
    """Gives the biases of the model in folder values that matter."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def packed_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=qlora_ext.QLoraExtConfig()
    )


def packed_with_table(folder, dtype):
    """A model whose embedding is packed, too."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return qlora_ext.quantize_model(dense, quantize_embeddings=True, progress_bar=False)


def ia3(names=PROJECTIONS, inputs=("down_proj",)):
    return peft.IA3Config(target_modules=names, feedforward_modules=list(inputs))


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings})


def by_parameters(**settings):
    names = ["q_proj.weight", "mlp.up_proj.weight"]
    return lora(**{"target_modules": [], "target_parameters": names, **settings})


CONFIGS = {
    "ia3": ia3,
    "randlora": lambda: peft.RandLoraConfig(r=5, target_modules=PROJECTIONS),
    "randlora-sparse": lambda: peft.RandLoraConfig(
        r=4, sparse=True, save_projection=False, target_modules=PROJECTIONS
    ),
    "road_1": lambda: peft.RoadConfig(group_size=8, target_modules=PROJECTIONS),
    "road_2": lambda: peft.RoadConfig(variant="road_2", group_size=8, target_modules=PROJECTIONS),
    "road_4": lambda: peft.RoadConfig(variant="road_4", group_size=8, target_modules=PROJECTIONS),
    "target_parameters": by_parameters,
}
if "HIRA" in versions.SUPPORTED:
    CONFIGS["hira"] = lambda: peft.HiraConfig(r=4, target_modules=PROJECTIONS)
    CONFIGS["pvera"] = lambda: peft.PveraConfig(r=4, target_modules=PROJECTIONS)
TUNERS = [name for name in CONFIGS if name != "target_parameters"]
# Before 0.19 PEFT gives adapters on bitsandbytes' layers no other dtype than fp32.
KEPT = torch.bfloat16 if versions.RELEASE >= (0, 19) else torch.float32
AUTOCAST = {
    **CONFIGS,
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "lora-dropout": lambda: lora(lora_dropout=0.1),
    "adalora": lambda: peft.AdaLoraConfig(
        target_r=2, init_r=4, total_step=10, target_modules=["q_proj"]
    ),
}
if "OFT" in versions.SUPPORTED:
    AUTOCAST["oft"] = lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"])
if "VERA" in versions.SUPPORTED:
    AUTOCAST["shira"] = lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"])
    AUTOCAST["vera"] = lambda: peft.VeraConfig(r=4, target_modules=["q_proj"])

OURS = (
    plugin.HiraLinear4bit,
    plugin.PveraLinear4bit,
    plugin.IA3Linear4bit,
    plugin.RandLoraLinear4bit,
    plugin.RoadLinear4bit,
    plugin.PeftLoraLinear4bit,
)


def bytes_of(model):
    """The packed tensors and the biases."""
    state = model.state_dict().items()
    return {k: v.clone() for k, v in state if v.dtype == torch.uint8 or k.endswith("layer.bias")}


def assert_same(got, want):
    assert got.keys() == want.keys() and len(got) > 0
    assert all(torch.equal(got[key], want[key]) for key in got)


def assert_exchanges(base, config, path, kind=OURS):
    """An adapter trained on the packed model is read by PEFT's own layers on the dequantized one,
    and the other way round, and gives the same logits."""
    dense = copy.deepcopy(base).dequantize()
    plain = logits(dense)
    for trained, other, seed in ((base, dense, 1), (dense, base, 2)):
        source = randomize(peft.get_peft_model(copy.deepcopy(trained), config()), seed)
        source.save_pretrained(path / str(seed))
        reader = peft.PeftModel.from_pretrained(copy.deepcopy(other), path / str(seed))
        ours = source if trained is base else reader
        assert any(isinstance(module, kind) for module in ours.modules())
        assert not torch.allclose(logits(source), plain, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits(reader), logits(source), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_go_to_the_dequantized_model_and_back(folder, tmp_path, name):
    assert_exchanges(packed_model(folder), CONFIGS[name], tmp_path)


CONV1D = {
    "ia3": lambda: peft.IA3Config(
        target_modules=GPT2, feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=GPT2, fan_in_fan_out=True),
}


@pytest.mark.parametrize("name", CONV1D)
def test_gpt2s_layers(gpt2, tmp_path, name):
    from transformers.pytorch_utils import Conv1D

    base = packed_model(gpt2)
    kinds = (plugin.IA3Linear4bit, plugin.RandLoraLinear4bit)
    assert_exchanges(base, CONV1D[name], tmp_path, kinds)
    model = randomize(peft.get_peft_model(base, CONV1D[name]()))
    before = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


# PVeRA draws its outputs while it trains: a few steps show nothing.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "pvera"])
def test_training_lowers_the_loss_and_goes_on_after_reloading(folder, tmp_path, name):
    model = peft.get_peft_model(packed_model(folder), CONFIGS[name]()).train()

    def train(model, steps: int = 6):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(steps):
            loss = model(input_ids=ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses = train(model)
    assert losses[-1] < losses[0] - 1e-3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed_model(folder), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert train(again.train())[-1] < losses[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_dequantized_model(folder, name):
    base = packed_model(folder)

    def gradients(base):
        torch.manual_seed(4)
        model = randomize(peft.get_peft_model(base, CONFIGS[name]())).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    want = gradients(copy.deepcopy(base).dequantize())
    got = gradients(base)
    assert got.keys() == want.keys()
    for key in got:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(folder, name, dtype):
    model = randomize(peft.get_peft_model(packed_model(folder, dtype), AUTOCAST[name]()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    before = logits(model)
    assert before.dtype == dtype
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    torch.testing.assert_close(logits(merged), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", TUNERS)
def test_a_merge_rounds_once(folder, name):
    """In bf16 the merged weight is the one of fp32, rounded, also when adapters come one by one."""
    wide = packed_model(folder)
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    models = []
    for base in (wide, narrow):
        torch.manual_seed(5)  # HiRA's adapters start from random values
        model = randomize(peft.get_peft_model(base, CONFIGS[name]()))
        model.add_adapter("second", CONFIGS[name]())
        model.set_adapter("second")
        randomize(model, seed=1)
        models.append(model)
    models[0].merge_adapter(["default", "second"])
    models[1].merge_adapter(["default"])
    models[1].merge_adapter(["second"])
    layers = [[m for m in model.modules() if isinstance(m, OURS)] for model in models]
    assert len(layers[0]) == 6
    for exact, rounded in zip(*layers, strict=True):
        want = exact.get_base_layer().weight.to(torch.bfloat16)
        assert torch.equal(rounded.get_base_layer().weight, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_and_unmerging_two_adapters(folder, name):
    if name == "target_parameters" and versions.RELEASE < (0, 20):
        pytest.skip("PEFT takes one adapter with target_parameters per model before 0.20")
    model = randomize(peft.get_peft_model(packed_model(folder), CONFIGS[name]()))
    first = logits(model)
    model.add_adapter("second", CONFIGS[name]())
    model.set_adapter("second")
    randomize(model, seed=1)
    second, bytes_before = logits(model), bytes_of(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first) and not torch.allclose(both, second)
    kept = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(kept), both)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for merged in (model, copied):
        merged.unmerge_adapter()
        assert_same(bytes_of(merged), bytes_before)
        assert torch.equal(logits(merged), both)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    merged = model.merge_and_unload()
    assert not any(isinstance(module, _Packed4bit) for module in merged.modules())
    torch.testing.assert_close(logits(merged), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_disabled_adapter_is_the_base_also_while_merged(folder, name):
    base = packed_model(folder)
    plain = logits(base)
    model = randomize(peft.get_peft_model(base, CONFIGS[name]()))
    before = logits(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert not any_merged(model)  # a forward with adapters disabled unmerges, as in PEFT
        assert torch.equal(logits(model), before)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def any_merged(model):
    return any(getattr(module, "merged", False) is True for module in model.modules())


@pytest.mark.parametrize("name", TUNERS)
def test_what_is_not_finite_is_not_merged(folder, name):
    model = randomize(peft.get_peft_model(packed_model(folder, torch.float16), CONFIGS[name]()))
    before = bytes_of(model)
    first = next(module for module in model.modules() if isinstance(module, OURS))
    owns = (getattr(first, name) for name in reversed(first.adapter_layer_names))
    own = next(own["default"] for own in owns if "default" in own)
    for value in (float("nan"), 3e38):
        own.data.view(-1)[0] = value
        with pytest.raises(ValueError, match=r"merge: with adapters \['default'\], .*q_proj"):
            model.merge_adapter()
        assert not any_merged(model)
        assert_same(bytes_of(model), before)


def test_a_bias_that_overflows_is_not_merged(folder):
    config = ia3(["q_proj"], ())
    model = peft.get_peft_model(packed_model(folder, torch.float16), config)
    layer = next(module for module in model.modules() if isinstance(module, OURS))
    with torch.no_grad():
        layer.base_layer.bias[0] = 60000
        layer.ia3_l["default"][0] = 4
    with pytest.raises(ValueError, match=r"q_proj\.bias holds"):
        model.merge_adapter()
    assert not layer.merged and isinstance(layer.base_layer, Linear4bit)


def test_merging_into_4_bits(folder):
    model = randomize(peft.get_peft_model(packed_model(folder), ia3()))
    bytes_before = bytes_of(model)
    with plugin.merging_to_4bit(), pytest.warns(UserWarning, match="keeps 5 to 10%"):
        model.merge_adapter()
    layer = next(module for module in model.modules() if isinstance(module, OURS))
    assert isinstance(layer.base_layer, Linear4bit)
    model.unmerge_adapter()
    assert_same(bytes_of(model), bytes_before)


def test_ia3_merges_and_unloads_where_bitsandbytes_is_answered_for(folder):
    """With QLORA_EXT_ENABLE=layers a model says that it is loaded in 4 bits."""
    base = packed_model(folder)
    base.is_loaded_in_4bit = True
    plain = logits(base)
    model = randomize(peft.get_peft_model(base, ia3()))
    assert any(isinstance(module, plugin.IA3Linear4bit) for module in model.modules())
    before = logits(model)
    again = copy.deepcopy(model).unload()
    assert again.is_loaded_in_4bit and torch.equal(logits(again), plain)
    merged = model.merge_and_unload()
    assert not getattr(merged, "is_loaded_in_4bit", False)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("SHIRA" not in versions.SUPPORTED, reason="SHiRA wants PEFT 0.20")
def test_two_shira_adapters_are_those_of_the_dequantized_model(folder):
    base = packed_model(folder)
    got = []
    for model in (base, copy.deepcopy(base).dequantize()):
        model = randomize(peft.get_peft_model(model, AUTOCAST["shira"]()))
        model.add_adapter("second", peft.ShiraConfig(r=3, target_modules=["q_proj", "up_proj"]))
        model.set_adapter("second")
        randomize(model, seed=1)
        model.base_model.set_adapter(["default", "second"])
        model.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        got.append((logits(model), gradients))
    torch.testing.assert_close(got[0], got[1], rtol=1e-4, atol=1e-5)


def test_weighted_ia3_adapters(folder):
    model = randomize(peft.get_peft_model(packed_model(folder), ia3()))
    model.add_adapter("second", ia3())
    model.set_adapter("second")
    randomize(model, seed=1)
    model.base_model.add_weighted_adapter(["default", "second"], [0.25, 0.75], "mixed")
    for layer in model.modules():
        if isinstance(layer, OURS):
            want = 0.25 * layer.ia3_l["default"] + 0.75 * layer.ia3_l["second"]
            torch.testing.assert_close(layer.ia3_l["mixed"], want)


# target_parameters -------------------------------------------------------------------------------


def test_target_parameters_takes_the_fused_op(folder):
    model = randomize(peft.get_peft_model(packed_model(folder), by_parameters()))
    layers = [module for module in model.modules() if isinstance(module, plugin.PeftLoraLinear4bit)]
    assert len(layers) == 4 and all(layer._fused_adapters() for layer in layers)
    assert layers[0]._name.endswith("layers.0.self_attn.q_proj")
    named = peft.get_peft_model(
        packed_model(folder), lora(target_modules=["q_proj", "up_proj"])
    ).state_dict()
    assert model.state_dict().keys() == named.keys()


def test_target_parameters_beside_target_modules(folder):
    config = by_parameters(target_modules=["v_proj"], rank_pattern={"up_proj.weight": 2})
    model = randomize(peft.get_peft_model(packed_model(folder), config))
    block = model.base_model.model.model.layers[0]
    assert isinstance(block.self_attn.v_proj, plugin.PeftLoraLinear4bit)
    assert (block.self_attn.q_proj.r, block.mlp.up_proj.r) == ({"default": 4}, {"default": 2})
    assert block.mlp.up_proj.lora_A["default"].weight.shape == (2, 64)
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_dropout": 0.1}, "q_proj.weight does not work with lora_dropout"),
        ({"lora_bias": True}, "q_proj.weight does not work with lora_bias"),
        ({"use_dora": True}, "q_proj.weight does not work with DoRA or another variant"),
        ({"fan_in_fan_out": True}, "q_proj.weight does not work with fan_in_fan_out"),
        ({"target_parameters": ["q_proj.bias"]}, "q_proj.bias of a 4-bit layer, want the weight"),
    ],
    ids=str,
)
def test_what_peft_refuses_of_a_parameter_is_refused(folder, settings, message):
    base = packed_model(folder)
    before = logits(base)
    dense = copy.deepcopy(base).dequantize()
    # For a bias, PEFT before 0.21 has no sentence.
    with pytest.raises((ValueError, IndexError), match=r"does not work|only 2d and 3d|index out"):
        peft.get_peft_model(dense, by_parameters(**settings))
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, by_parameters(**settings))
    assert torch.equal(logits(base), before)


def test_a_second_adapter_is_checked_too(folder):
    model = peft.get_peft_model(packed_model(folder), by_parameters())
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        model.add_adapter("second", lora(lora_dropout=0.1))
    assert all(
        list(module.r) == ["default"] for module in model.modules() if isinstance(module, OURS)
    )


def test_weights_that_are_the_other_way_round_are_refused(gpt2, folder):
    with pytest.raises(ValueError, match=r"got .*c_attn\.weight of a 4-bit layer, want the weigh"):
        peft.get_peft_model(packed_model(gpt2), by_parameters(target_parameters=["c_attn.weight"]))
    model = packed_with_table(folder, torch.float32)
    with pytest.raises(ValueError, match=r"got .*embed_tokens\.weight of a 4-bit layer, want"):
        config = by_parameters(target_parameters=["embed_tokens.weight"])
        peft.get_peft_model(model, config)


# autocast_adapter_dtype --------------------------------------------------------------------------


def adapter_dtypes(model):
    return {n: p.dtype for n, p in model.named_parameters() if ".default" in n}


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", AUTOCAST)
def test_adapters_keep_the_dtype_that_is_asked_for(folder, tmp_path, name):
    base, config = packed_model(folder, torch.bfloat16), AUTOCAST[name]
    model = peft.get_peft_model(copy.deepcopy(base), config(), autocast_adapter_dtype=False)
    assert set(adapter_dtypes(model).values()) == {KEPT}
    randomize(model).train()(input_ids=ids(), labels=ids()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for _, p in trainable(model))
    assert all(p.grad is None or p.grad.dtype == KEPT for _, p in trainable(model))
    before, bytes_before = logits(model), bytes_of(model)
    assert before.dtype == torch.bfloat16
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    assert_same(bytes_of(model), bytes_before)
    model.save_pretrained(tmp_path)
    ways = [{}, {"low_cpu_mem_usage": True}]
    if name == "adalora" and versions.RELEASE < (0, 20):
        del ways[1]  # PEFT leaves AdaLoRA on meta there, whatever the base
    for settings in ways:
        again = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False, **settings
        )
        assert not trainable(again)
        assert torch.equal(logits(again), before)
        assert set(adapter_dtypes(again).values()) == {KEPT}
    wide = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert set(adapter_dtypes(wide).values()) == {torch.float32}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", AUTOCAST)
def test_dtypes_are_those_on_a_layer_of_bitsandbytes(folder, name, autocast):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    ours = packed_model(folder, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, want = (
            adapter_dtypes(
                peft.get_peft_model(base, AUTOCAST[name](), autocast_adapter_dtype=autocast)
            )
            for base in (ours, theirs)
        )
    assert got == want


def test_adapters_start_in_fp32_unless_asked_otherwise(folder):
    """They are not rounded to the layer's dtype on the way, as on bitsandbytes' layers."""
    torch.manual_seed(3)
    model = peft.get_peft_model(packed_model(folder, torch.bfloat16), lora())
    A = next(p for n, p in trainable(model) if "lora_A" in n)
    assert not torch.equal(A, A.to(torch.bfloat16).float())


def test_a_packed_embeddings_adapter_keeps_the_dtype(folder):
    model = peft.get_peft_model(
        packed_with_table(folder, torch.bfloat16),
        lora(target_modules=["embed_tokens"]),
        autocast_adapter_dtype=False,
    )
    assert any(isinstance(module, plugin.LoraEmbedding4bit) for module in model.modules())
    assert set(adapter_dtypes(model).values()) == {KEPT}
    before = logits(randomize(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=0.1, atol=0.1)


def test_a_second_adapter_leaves_the_first_ones_dtype(folder, tmp_path):
    model = peft.get_peft_model(packed_model(folder, torch.bfloat16), lora())
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second", autocast_adapter_dtype=False)
    layer = next(module for module in model.modules() if isinstance(module, OURS))
    dtypes = {name: A.weight.dtype for name, A in layer.lora_A.items()}
    assert dtypes == {"default": torch.float32, "second": KEPT}
    model.base_model.set_adapter(["default", "second"])
    before = logits(randomize(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=0.1, atol=0.1)


# What PEFT's own 4-bit tests found ----------------------------------------------------------------


def test_arrow_routes_over_adapters_on_packed_layers(folder, tmp_path):
    base = packed_model(folder)
    paths = []
    for seed in range(3):
        model = randomize(peft.get_peft_model(copy.deepcopy(base), lora()), seed)
        model.save_pretrained(tmp_path / str(seed))
        paths.append(str(tmp_path / str(seed)))
    dense = copy.deepcopy(base).dequantize()
    got, want = (
        logits(peft.create_arrow_model(model, paths, peft.ArrowConfig(top_k=2, rng_seed=1)).eval())
        for model in (base, dense)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, logits(packed_model(folder)), atol=1e-3)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router adapter"):
        peft.create_arrow_model(packed_model(folder), paths, peft.ArrowConfig()).merge_adapter()


@pytest.mark.skipif(versions.KappaTuneSelector is None, reason="KappaTune wants PEFT 0.20")
def test_kappatune_reads_the_dequantized_weights(folder):
    base = packed_model(folder)
    dense = copy.deepcopy(base).dequantize()
    got, want = (versions.KappaTuneSelector(m, show_progress=False) for m in (base, dense))
    assert got.get_best_targets(top_p=0.5) == want.get_best_targets(top_p=0.5)
    assert got._condition_numbers == pytest.approx(want._condition_numbers, rel=1e-3)
    assert got.model is base


def test_names_imported_before_us_are_ours():
    """A program may take functions from PEFT by name and import qlora_ext after."""
    run_python(
        """
        from peft import prepare_model_for_kbit_training, replace_lora_weights_loftq
        import qlora_ext
        for function in (prepare_model_for_kbit_training, replace_lora_weights_loftq):
            assert "qlora_ext" in function.__code__.co_filename, function
        """
    )
