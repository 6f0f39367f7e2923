"""PEFT on packed experts: the keys, shapes, dtypes, outputs and gradients of its own wrappers on
the dequantized model, through our grouped product."""

import copy
import json
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_models as tiny
from integration_helpers import peft_reads_mixtures

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

import qlora_ext
from qlora_ext import QuantConfig, grouped_ops, quantize_model
from qlora_ext.adapters.stacks import from_file, to_file
from qlora_ext.integrations import peft as plugin
from qlora_ext.integrations.peft import tuners, versions
from qlora_ext.integrations.peft.experts import ParamWrapper, named_stacks
from qlora_ext.nn import Experts4bit, Stack4bit
from qlora_ext.nn.dense import dense_layer
from qlora_ext.tensor.functions import dequantize_4bit, merge_lora_4bit, quantize_tensor

adapts_stacks = pytest.mark.skipif(
    not versions.ADAPTS_STACKS, reason="PEFT before 0.19.1 takes a stack the other way round"
)
reads_mixtures = pytest.mark.skipif(
    not peft_reads_mixtures(), reason="this PEFT fails under this transformers"
)
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")  # gpt_oss: transposed, with biases
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
E = 4


def dense_model(family, dtype=torch.float32, **settings):
    if family != "gpt_oss":
        return tiny.make(family, dtype, **settings)
    import transformers

    sizes = {"num_local_experts": E, "head_dim": 16, "sliding_window": 16, "layer_types": None}
    config = transformers.GptOssConfig(**{**tiny.EXPERTS, **sizes, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def packed_model(family="qwen3_moe", dtype=torch.float32, **settings):
    model = dense_model(family, dtype, **settings)
    return quantize_model(model, QuantConfig(blocksize=32), progress_bar=False)


def config(**settings):
    plain = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": STACKS}
    return peft.LoraConfig(**{**plain, **settings})


def randomize(model, seed=0):
    """Gives A and B of every adapter that requires gradients values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def both(family="qwen3_moe", dtype=torch.float32, autocast=True, **settings):
    """The same adapter on the packed model, and of stock PEFT on the dequantized one."""
    packed = packed_model(family, dtype)
    dense = copy.deepcopy(packed).dequantize()
    return [
        randomize(peft.get_peft_model(model, config(**settings), autocast_adapter_dtype=autocast))
        for model in (packed, dense)
    ]


def wrapper_of(model, layer=0):
    """The outer wrapper of a layer's experts: down_proj's."""
    return model.base_model.model.model.layers[layer].mlp.experts


def logits(model):
    return tiny.logits(model.eval())


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def adapters_in(model):
    return {k: v for k, v in model.named_parameters() if "lora_" in k}


def bytes_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if v.dtype == torch.uint8}


def gradients(model):
    model.train().zero_grad()
    batch = tiny.inputs(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class DenseStacks(TorchDispatchMode):
    """Finds floating tensors as large as a stack of experts."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
            if is_float and result.numel() in self.sizes:
                self.found.append((function, result.shape))
        return results


# Forward and backward -----------------------------------------------------------------------------


@adapts_stacks
@pytest.mark.parametrize("r", [3, E])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_those_of_the_dequantized_model(family, r):
    packed, dense = both(family, r=r)
    got, want = (peft.get_peft_model_state_dict(model) for model in (packed, dense))
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    assert any("experts.base_layer.lora_A" in key for key in got)
    assert packed.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    close(logits(packed), logits(dense))
    with packed.disable_adapter(), dense.disable_adapter():
        close(logits(packed), logits(dense))
        assert (logits(packed) - got_logits(packed)).abs().max() > 0.05
    got, want = gradients(packed), gradients(dense)
    assert got.keys() == want.keys() and len(got) == 12
    for name, gradient in want.items():
        close(got[name], gradient)
    delta = wrapper_of(packed).base_layer.get_delta_weight("default")
    close(delta, wrapper_of(dense).base_layer.get_delta_weight("default"))


def got_logits(model):
    """The logits with the adapters, though they are disabled outside."""
    again = copy.deepcopy(model)
    again.base_model.enable_adapter_layers()
    return logits(again)


@adapts_stacks
def test_neither_pass_makes_a_dense_stack():
    packed, dense = both("mixtral", r=5)
    sizes = {
        wrapper_of(dense).get_param().numel(),
        wrapper_of(dense).base_layer.get_param().numel(),
    }
    for model, is_found in ((packed, False), (dense, True)):
        batch = tiny.inputs(model)
        with DenseStacks(sizes) as mode:
            model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        assert bool(mode.found) == is_found
    name = "grouped_lora_gemm_4bit"
    with mock.patch.object(grouped_ops, name, wraps=getattr(grouped_ops, name)) as calls:
        logits(packed)
    assert calls.call_count == 4


@adapts_stacks
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["gate_up_proj"], "use_rslora": True},
        {"rank_pattern": {r".*layers\.1.*gate_up_proj": 5}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": "all-linear", "target_parameters": None},
        {"target_modules": ["w1", "w2", "w3", "q_proj"], "target_parameters": None},
        {"target_modules": r".*\.(q_proj|w1|w2|w3)", "target_parameters": None},
        {"target_modules": ["w2"], "target_parameters": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_same_targets_as_on_the_dense_model(family, targets):
    names = targets.get("target_modules")
    if isinstance(names, str) and versions.RELEASE < (0, 20):
        pytest.skip("for a mixture this PEFT takes the letters of a text as names")
    if family == "qwen3_moe" and names:  # there w1, w2, w3 have other names
        new = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        if isinstance(names, list):
            names = [new.get(name, name) for name in names]
        for old in new if isinstance(names, str) else ():
            names = names.replace(old, new[old])
        targets = {**targets, "target_modules": names}
    packed, dense = both(family, **targets)
    got, want = (model.peft_config["default"] for model in (packed, dense))
    for key in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        assert getattr(got, key) == getattr(want, key)
    got, want = (peft.get_peft_model_state_dict(model) for model in (packed, dense))
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    assert any(".experts." in key for key in got)
    close(logits(packed), logits(dense))


class Holder(torch.nn.Module):
    """A model of one layer of experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


@adapts_stacks
@pytest.mark.parametrize("is_down_first", [False, True])
@pytest.mark.parametrize("layout", tiny.EXPERT_LAYOUTS)
def test_every_layout_and_order_of_registration(layout, is_down_first):
    experts = tiny.experts(layout)
    if is_down_first:
        own = experts._parameters
        experts._parameters = {key: own[key] for key in sorted(own)}
    packed = Holder(Experts4bit.from_experts(experts, QuantConfig(blocksize=32)))
    dense = Holder(dense_layer(packed.experts, torch.float32).requires_grad_(False))
    names = list(packed.experts.stacks())
    assert (names[0] == "down_proj") == is_down_first
    adapter = config(target_modules=[], target_parameters=[f"experts.{name}" for name in names])
    packed, dense = (randomize(peft.get_peft_model(m, adapter)) for m in (packed, dense))
    got, want = (peft.get_peft_model_state_dict(model) for model in (packed, dense))
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 64, generator=generator)
    index = torch.randint(0, E, (7, 2), generator=generator)
    weights = torch.rand(7, 2, generator=generator)
    want = dense(x, index, weights)
    close(packed(x, index, weights), want, 1e-4)
    packed.merge_adapter()
    close(packed(x, index, weights), want, 1e-4)
    packed.unmerge_adapter()
    close(packed(x, index, weights), want, 1e-4)


@adapts_stacks
def test_one_expert():
    packed = packed_model(num_experts=1, num_experts_per_tok=1)
    dense = copy.deepcopy(packed).dequantize()
    packed, dense = (randomize(peft.get_peft_model(m, config())) for m in (packed, dense))
    want = logits(dense)
    close(logits(packed), want)
    packed.merge_adapter()
    close(logits(packed), want)


@adapts_stacks
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype, autocast):
    packed, dense = both("qwen3_moe", dtype, autocast)
    got, want = ({k: v.dtype for k, v in adapters_in(m).items()} for m in (packed, dense))
    assert got == want and set(got.values()) == {torch.float32 if autocast else dtype}
    close(logits(packed), logits(dense), 2e-2 if dtype == torch.bfloat16 else 2e-3)
    assert len(gradients(packed)) == 12


@adapts_stacks
def test_adapters_of_another_dtype_than_the_model():
    packed, _ = both()
    want = logits(packed)
    for wrapper in (wrapper_of(packed), wrapper_of(packed).base_layer):
        wrapper.lora_A.bfloat16()
        wrapper.lora_B.bfloat16()
    close(logits(packed), want, 1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(logits(packed), want, 0.1)


@adapts_stacks
def test_adapters_start_in_fp32():
    model = peft.get_peft_model(packed_model(dtype=torch.bfloat16), config())
    values = wrapper_of(model).lora_A["default"].weight
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


@adapts_stacks
@pytest.mark.skipif(versions.RELEASE < (0, 20), reason="PEFT allows one adapter of stacks")
def test_several_adapters():
    packed, dense = both()
    first = logits(packed)
    for model in (packed, dense):
        model.add_adapter("second", config(r=2, lora_alpha=3))
        model.set_adapter("second")
        randomize(model, seed=1)
    close(logits(packed), logits(dense))
    for model in (packed, dense):
        model.base_model.set_adapter(["default", "second"])
    together = logits(packed)
    close(together, logits(dense))
    packed.merge_adapter()
    close(logits(packed), together)
    packed.unmerge_adapter()
    assert torch.equal(logits(packed), together)
    packed.set_adapter("default")
    assert torch.equal(logits(packed), first)
    for model in (packed, dense):
        model.delete_adapter("default")
        model.set_adapter("second")
    close(logits(packed), logits(dense))
    with pytest.raises(ValueError, match="does not support targeting nn"):
        packed.add_weighted_adapter(["second"], [0.5], "half")
    with pytest.raises(ValueError, match=r"experts\.down_proj: scale is inf, want a finite"):
        wrapper_of(packed).set_scale("second", float("inf"))


@adapts_stacks
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    packed, _ = both()
    want = gradients(packed)
    packed = plugin.prepare_model_for_kbit_training(
        packed, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    for parameter in adapters_in(packed).values():
        parameter.requires_grad_(True)
    got = gradients(packed)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@adapts_stacks
def test_experts_compile_in_one_graph():
    packed, _ = both()
    wrapper = wrapper_of(packed)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 64, generator=generator)
    index = torch.randint(0, E, (7, 2), generator=generator)
    weights = torch.rand(7, 2, generator=generator)
    want = wrapper(x, index, weights)
    want.sum().backward()
    grads = {n: p.grad.clone() for n, p in wrapper.named_parameters() if p.grad is not None}
    wrapper.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    got = compiled(x, index, weights)
    got.sum().backward()
    assert torch.equal(got, want) and len(grads) == 4
    for name, parameter in wrapper.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, grads[name])


@pytest.fixture
def unset_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    yield
    torch.use_deterministic_algorithms(False)


@adapts_stacks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_turn_the_chosen_experts_alone(dtype, unset_memory_is_nan):
    """Without gradients. The product must not read B of the others, and later values count."""
    model = packed_model(dtype=dtype, num_experts=20)
    model = randomize(peft.get_peft_model(model, config(), autocast_adapter_dtype=False))
    wrapper = wrapper_of(model)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = torch.ones(2, 2, dtype=dtype)
    B = wrapper.lora_B["default"].weight
    for change in (lambda: None, B.data.neg_, lambda: setattr(B, "data", B * 3)):
        change()
        for index in ([[3, 7], [3, 19]], [[7, -1], [20, 0]]):
            given = torch.tensor(index), weights
            want = wrapper(x, *given)
            assert not wrapper._stacked(["default"], given[0])[1].isnan().any()
            with torch.no_grad():
                assert wrapper._stacked(["default"], given[0])[1].isnan().any()
                assert torch.equal(wrapper(x, *given), want)
                assert torch.equal(wrapper(x, top_k_index=given[0], top_k_weights=weights), want)
    with torch.no_grad():
        assert wrapper(x[:0], given[0][:0], weights[:0]).shape == (0, 64)


@adapts_stacks
def test_mixed_batches_are_refused():
    packed, _ = both()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        packed(**tiny.inputs(packed), adapter_names=["default", "default"])


# Files --------------------------------------------------------------------------------------------


@adapts_stacks
@reads_mixtures
@pytest.mark.parametrize("r", [3, E])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_go_both_ways(family, r, tmp_path):
    base = packed_model(family)
    packed, dense = both(family, r=r)
    want = logits(packed)
    packed.save_pretrained(tmp_path / "packed")
    dense.save_pretrained(tmp_path / "dense")
    adapter = qlora_ext.load_adapter(copy.deepcopy(base), tmp_path / "dense")
    assert torch.equal(logits(adapter), want)
    qlora_ext.save_adapter(adapter, tmp_path / "ours")
    states = [load_file(p / "adapter_model.safetensors") for p in tmp_path.iterdir()]
    assert len(states) == 3
    for state in states:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    for name in ("packed", "dense", "ours"):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(logits(again), want)
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(base).dequantize(), tmp_path / name)
        close(logits(stock), want)
    quick = {"low_cpu_mem_usage": True}
    again = peft.PeftModel.from_pretrained(base, tmp_path / "dense", **quick)
    assert torch.equal(logits(again), want)


@adapts_stacks
@pytest.mark.skipif(versions.RELEASE < (0, 21), reason="transformers wants a newer PEFT")
def test_transformers_loads_adapters(tmp_path):
    packed, dense = both()
    dense.save_pretrained(tmp_path)
    model = packed_model()
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), logits(packed))


def experts_apart(path: Path, release: str) -> None:
    """Writes an adapter of each expert's own layers, as PEFT did before transformers fused them."""
    generator = torch.Generator().manual_seed(3)
    layers = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    tensors = {}
    for layer in range(2):
        for expert in range(E):
            for name, (K, N) in layers.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                A, B = (
                    torch.randn(2, K, generator=generator),
                    torch.randn(N, 2, generator=generator),
                )
                tensors |= {f"{key}.lora_A.weight": A * 0.2, f"{key}.lora_B.weight": B * 0.2}
    settings = {"r": 2, "lora_alpha": 4, "target_modules": list(layers), "peft_version": release}
    peft.LoraConfig(**settings).save_pretrained(path)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


@adapts_stacks
@reads_mixtures
def test_adapters_of_experts_that_were_apart(tmp_path):
    experts_apart(tmp_path / "apart", "0.18.1")
    base = packed_model()
    dense = copy.deepcopy(base).dequantize()
    packed = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "apart")
    stock = peft.PeftModel.from_pretrained(dense, tmp_path / "apart")
    want = logits(packed)
    close(want, logits(stock))
    assert (want - logits(base)).abs().max() > 0.1
    # Both hold A and B as this release does now; stock PEFT goes on to say 0.18.1.
    packed.save_pretrained(tmp_path / "packed")
    stock.save_pretrained(tmp_path / "stock")
    for name, release in (("packed", peft.__version__), ("stock", "0.18.1")):
        text = (tmp_path / name / "adapter_config.json").read_text()
        assert json.loads(text)["peft_version"] == release
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(logits(again), want)
        again = qlora_ext.load_adapter(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(logits(again), want)


def turned(source: Path, path: Path, base, release: str) -> Path:
    """The adapter in source as a release before 0.19.1 wrote it."""
    tensors = load_file(source / "adapter_model.safetensors")
    for layer, block in enumerate(base.model.layers):
        for inner, stack in zip(
            (".base_layer", ""), block.mlp.experts.stacks().values(), strict=True
        ):
            start = f"base_model.model.model.layers.{layer}.mlp.experts{inner}"
            keys = [f"{start}.{factor}.weight" for factor in ("lora_A", "lora_B")]
            A, B = from_file(*(tensors[key] for key in keys), stack, False)
            pair = to_file(B.mT.contiguous(), A.mT.contiguous())
            tensors |= {key: t.contiguous() for key, t in zip(keys, pair, strict=True)}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "adapter_config.json").read_text())
    text = json.dumps({**settings, "peft_version": release})
    (path / "adapter_config.json").write_text(text)
    return path


@adapts_stacks
@reads_mixtures
def test_the_orientation_of_older_releases(tmp_path):
    packed, _ = both()
    base, want = packed_model(), logits(packed)
    packed.save_pretrained(tmp_path / "new")
    old = turned(tmp_path / "new", tmp_path / "old", base, "0.18.1")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), old)
    assert torch.equal(logits(again), want)
    assert again.peft_config["default"].peft_version == peft.__version__
    assert torch.equal(logits(qlora_ext.load_adapter(copy.deepcopy(base), old)), want)
    with pytest.raises(
        ValueError, match=r"PEFT 0\.18\.1 stored the new adapter of experts the oth"
    ):
        hotswap_adapter(packed, old, "default")
    assert torch.equal(logits(packed), want)
    middle = turned(tmp_path / "new", tmp_path / "middle", base, "0.19.0")
    with pytest.raises(ValueError, match=r"was written by PEFT 0\.19\.0"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), middle)


@adapts_stacks
def test_the_orientation_of_square_matrices(tmp_path):
    """Their shapes do not say whether a later release turned A and B."""
    settings = {"moe_intermediate_size": 64}
    base = packed_model(**settings)
    adapter = config(target_parameters=STACKS[1:])
    model = randomize(peft.get_peft_model(copy.deepcopy(base), adapter))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "0.18.1"}))
    with pytest.raises(ValueError, match="the matrices are square"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again = qlora_ext.load_adapter(copy.deepcopy(base), tmp_path)
    assert (logits(again) - logits(model)).abs().max() > 1e-3


@adapts_stacks
def test_experts_of_our_config(tmp_path):
    ours = qlora_ext.LoraConfig(r=3, lora_alpha=8, mlp=True)
    base = packed_model()
    asked = ours.to_peft(base)
    assert set(asked.target_parameters) == set(STACKS) and asked.lora_dropout == 0
    model = randomize(peft.get_peft_model(copy.deepcopy(base), asked))
    model.save_pretrained(tmp_path)
    qlora_ext.add_lora(base, ours)
    names = {n.replace(".default", "") for n in peft.get_peft_model_state_dict(model)}
    qlora_ext.save_adapter(base, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == names
    assert torch.equal(logits(qlora_ext.load_adapter(base, tmp_path)), logits(model))


def shared_experts():
    """A mixture with shared experts and a dense layer, whose layers have the names of experts'."""
    import transformers

    sizes = {"head_dim": 16, "n_routed_experts": E, "n_shared_experts": 1, "num_hidden_layers": 3}
    settings = transformers.Glm4MoeConfig(
        **{**tiny.EXPERTS, **sizes, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    return quantize_model(model, progress_bar=False)


@adapts_stacks
@reads_mixtures
@pytest.mark.parametrize("targets", ["all-linear", ("shared_experts.up_proj",)], ids=str)
def test_layers_that_peft_would_take_for_experts(targets, tmp_path):
    base = shared_experts()
    ours = qlora_ext.LoraConfig(r=3, lora_dropout=0, target_modules=targets)
    model = randomize(qlora_ext.add_lora(copy.deepcopy(base), ours))
    layer = model.model.layers[1].mlp.shared_experts.up_proj
    layer.set_scaling(5)
    want = logits(model)
    qlora_ext.save_adapter(model, tmp_path)
    for again in (base, copy.deepcopy(base).dequantize()):
        close(logits(peft.PeftModel.from_pretrained(copy.deepcopy(again), tmp_path)), want)
    assert torch.equal(logits(qlora_ext.load_adapter(copy.deepcopy(base), tmp_path)), want)
    state = load_file(tmp_path / "adapter_model.safetensors")
    adapted = peft.get_peft_model(base, ours.to_peft(base))
    assert peft.get_peft_model_state_dict(adapted).keys() == state.keys()


# Merging ------------------------------------------------------------------------------------------


@adapts_stacks
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unmerge(family, tmp_path):
    packed, dense = both(family)
    want, before = logits(packed), bytes_of(packed)
    packed.merge_adapter(safe_merge=True)
    close(logits(packed), want)
    assert type(wrapper_of(packed).get_base_layer()) is type(wrapper_of(dense).get_base_layer())
    assert not any(".experts." in key for key in bytes_of(packed))
    with pytest.raises(ValueError, match="are merged, and a dense layer stands in"):
        packed.unload()
    again = pickle.loads(pickle.dumps(packed))
    for model in (again, packed):
        model.unmerge_adapter()
        after = bytes_of(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert torch.equal(logits(model), want)

    merged = copy.deepcopy(packed).merge_and_unload()
    assert type(merged.model.layers[0].mlp.experts) is type(wrapper_of(dense).get_base_layer())
    assert not bytes_of(merged)
    close(logits(merged), want)
    merged.save_pretrained(tmp_path)
    close(logits(type(merged).from_pretrained(tmp_path)), want)

    plain = packed.unload()
    assert type(plain.model.layers[0].mlp.experts) is Experts4bit
    assert torch.equal(logits(plain), logits(packed_model(family)))


@adapts_stacks
def test_disabled_adapters_that_are_merged():
    packed, _ = both()
    packed.merge_adapter()
    with packed.disable_adapter():
        assert torch.equal(logits(packed), logits(packed_model()))


@adapts_stacks
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("first", [0, 1])
def test_each_stack_merges_alone(first, bits):
    packed, _ = both()
    want = logits(packed)
    one = wrapper_of(packed)
    one, other = (one, one.base_layer)[:: -1 if first else 1]
    kind = Experts4bit if bits == 4 else type(dense_model("qwen3_moe").model.layers[0].mlp.experts)

    def is_near():
        error = (logits(packed) - want).abs().max()
        return 0 < error < 0.3 if bits == 4 else error < 1e-5

    def merge(wrapper):
        if bits == 16:
            return wrapper.merge()
        with plugin.merging_to_4bit(), pytest.warns(UserWarning, match="requantizing keeps 5"):
            wrapper.merge()

    merge(one)
    assert is_near() and type(one.get_base_layer()) is kind
    merge(other)
    assert is_near() and one.merged and other.merged
    one.unmerge()
    assert is_near() and type(one.get_base_layer()) is kind
    other.unmerge()
    assert type(one.get_base_layer()) is Experts4bit and torch.equal(logits(packed), want)


@adapts_stacks
def test_merging_into_4_bits_and_16(tmp_path):
    packed, _ = both()
    outer, want = wrapper_of(packed), logits(packed)
    with plugin.merging_to_4bit(), pytest.warns(UserWarning):
        outer.merge()
    requantized = logits(packed)
    outer.base_layer.merge()  # into 16 bits, beside the other's 4
    close(logits(packed), requantized)
    outer.unmerge()
    with (
        plugin.merging_to_4bit(),
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="are merged into 16 bits; call unmerge_adapter"),
    ):
        outer.merge()
    outer.base_layer.unmerge()
    assert torch.equal(logits(packed), want)
    with plugin.merging_to_4bit(), pytest.warns(UserWarning):
        merged = packed.merge_and_unload()
    assert type(merged.model.layers[0].mlp.experts) is Experts4bit
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path)), logits(merged))


@adapts_stacks
def test_unmerging_follows_a_cast_and_the_mode():
    packed, _ = both()
    packed.eval().merge_adapter()
    packed.bfloat16().train()
    packed.unmerge_adapter()
    experts = wrapper_of(packed).get_base_layer()
    assert experts.up.dtype == experts.down.dtype == torch.bfloat16 and experts.up.training
    assert bytes_of(experts).keys() == bytes_of(packed_model().model.layers[0].mlp.experts).keys()


@adapts_stacks
@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_what_is_not_finite_is_not_merged(value):
    model = peft.get_peft_model(packed_model(dtype=torch.float16), config())
    wrapper_of(model).base_layer.lora_B["default"].weight.data[3, 2] = value
    before = bytes_of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"experts\.gate_up_proj holds .* torch\.float16 cannot"
        ):
            copy.deepcopy(merge)()
        with pytest.raises(ValueError, match="load the base in a wider dtype"):
            wrapper_of(model).base_layer.merge()
    assert all(torch.equal(value, before[key]) for key, value in bytes_of(model).items())
    assert type(wrapper_of(model).get_base_layer()) is Experts4bit


@adapts_stacks
def test_merging_refuses_an_unadapted_stack_that_does_not_fit():
    model = peft.get_peft_model(packed_model(), config(target_parameters=STACKS[:1]))
    model.half()
    nested = wrapper_of(model).get_base_layer().down.weight_nested
    nested.view(torch.float32)[:, 1:] = 1e9
    wrapper_of(model).get_base_layer().down._unseal()
    with pytest.raises(ValueError, match=r"down\.weight\[0\] holds .* torch\.float16 cannot hold"):
        model.merge_and_unload()


@adapts_stacks
def test_merging_into_4bit_packs_each_experts_own_sum():
    packed, _ = both()
    before = wrapper_of(packed).get_base_layer()
    sums = {}
    for wrapper in (wrapper_of(packed), wrapper_of(packed).base_layer):
        A, B, scaling = wrapper._stacked(["default"])
        sums[wrapper.parameter_name] = [
            merge_lora_4bit(wrapper.stack.quantized[e], A[e], B[e], scaling, torch.float32)
            for e in range(wrapper.num_experts)
        ]
    merged = qlora_ext.merge_into_4bit(packed, base=packed_model().dequantize(), progress_bar=False)
    experts = merged.model.layers[0].mlp.experts
    assert type(experts) is Experts4bit and not hasattr(experts, "base_layer")
    assert experts.names == before.names
    for name, stack in experts.stacks().items():
        assert type(stack) is Stack4bit
        for e, total in enumerate(sums[name]):
            want = quantize_tensor(total, stack.config)
            assert torch.equal(stack.quantized[e].packed, want.packed)
            assert torch.equal(stack.quantized[e].absmax, want.absmax)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@adapts_stacks
def test_merging_into_4bit_with_calibration_is_nearer():
    distances = []
    for calibrated in (True, False):
        base = packed_model(num_hidden_layers=1)
        dense = copy.deepcopy(base).dequantize()
        packed = randomize(peft.get_peft_model(base, config(target_modules=[])))
        want = logits(packed.base_model.model)
        batches = [tiny.inputs(base, batch=8)["input_ids"]]
        how = {"calibration": batches} if calibrated else {"base": dense}
        merged = qlora_ext.merge_into_4bit(packed, **how, progress_bar=False)
        distances.append((logits(merged) - want).norm().item())
    assert distances[0] < distances[1], distances


@adapts_stacks
@reads_mixtures
def test_offloaded_experts_are_adapted_and_not_merged(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    packed, _ = both()
    want = logits(packed)
    base = packed_model()
    accelerate.cpu_offload(base, execution_device="cpu")
    assert base.model.layers[0].mlp.experts.up.weight.is_meta
    model = randomize(peft.get_peft_model(base, config()))
    assert not any(p.is_meta for p in adapters_in(model).values())
    close(logits(model), want)
    assert len(gradients(model)) == 12
    for merge in (model.merge_adapter, model.merge_and_unload, wrapper_of(model).merge):
        with pytest.raises(ValueError, match="is offloaded"):
            merge()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed_model(), tmp_path)
    assert torch.equal(logits(again), want)


@adapts_stacks
def test_experts_in_host_memory():
    packed, _ = both()
    want, grads = logits(packed), gradients(packed)
    qlora_ext.offload_experts(packed, "cpu")
    assert wrapper_of(packed).stack.fetcher is not None
    assert torch.equal(logits(packed), want)
    got = gradients(packed)
    assert all(torch.equal(got[name], gradient) for name, gradient in grads.items())
    packed.merge_adapter()
    close(logits(packed), want)
    packed.unmerge_adapter()
    assert torch.equal(logits(packed), want)
    with plugin.merging_to_4bit(), pytest.raises(ValueError, match="in host memory, want it on"):
        wrapper_of(packed).merge()
    base = qlora_ext.offload_experts(packed_model(), "cpu")
    assert torch.equal(logits(randomize(peft.get_peft_model(base, config()))), want)


# Hot-swapping -------------------------------------------------------------------------------------


@adapts_stacks
def test_hot_swapping(tmp_path):
    """PEFT looks for the patterns in the keys, which do not name the parameter."""
    packed, _ = both(alpha_pattern={"gate_up_proj": 5})
    want = logits(packed)
    packed.save_pretrained(tmp_path)
    model = peft.get_peft_model(packed_model(), config(alpha_pattern={"gate_up_proj": 5}))
    randomize(model, seed=7)
    hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), want)
    model = peft.get_peft_model(packed_model(), config(r=2, alpha_pattern={"gate_up_proj": 5}))
    want = logits(model)
    with pytest.raises(
        ValueError, match=r"down_proj has A \[8, 32\] and the new adapter \[12, 32\]"
    ):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), want)


@adapts_stacks
@pytest.mark.skipif(versions.RELEASE < (0, 20), reason="PEFT's own swap compiles again, too")
def test_compiled_model_takes_another_adapter_without_compiling_again(tmp_path):
    from torch._dynamo.utils import counters

    other, _ = both(lora_alpha=3)
    want = logits(other)
    other.save_pretrained(tmp_path)
    packed, _ = both()
    before = logits(packed)
    prepare_model_for_compiled_hotswap(packed)
    assert isinstance(wrapper_of(packed).scaling["default"], torch.Tensor)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(packed.eval(), backend="aot_eager")
    close(tiny.logits(compiled), before)
    graphs = counters["stats"]["unique_graphs"]
    hotswap_adapter(compiled, tmp_path, "default")
    close(tiny.logits(compiled), want)
    assert counters["stats"]["unique_graphs"] == graphs > 0


# What is refused ----------------------------------------------------------------------------------


REFUSED = [
    ({"lora_dropout": 0.1}, "ParamWrapper does not work with lora_dropout"),
    ({"use_dora": True}, "ParamWrapper does not work with use_dora"),
    ({"lora_bias": True}, "ParamWrapper does not work with lora_bias"),
    ({"fan_in_fan_out": True}, "ParamWrapper does not work with fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "'pissa' needs the weights of .*experts.gate_up_proj, which"),
    ({"init_lora_weights": "olora"}, "'olora' needs the weights of .*experts.gate_up_proj, which"),
    ({"init_lora_weights": "orthogonal"}, "'orthogonal' needs the weights of"),
    ({"target_modules": ["experts"]}, "cannot train .*mlp.experts, a mixture's packed experts, as"),
    ({"target_modules": ["up"]}, r"experts.up: it is a packed stack of a mixture's experts"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, "names a Experts4bit, whose"),
]


@adapts_stacks
@pytest.mark.parametrize("settings, message", REFUSED, ids=str)
def test_what_peft_cannot_do_is_refused(settings, message):
    if not {"target_modules", "modules_to_save"} & settings.keys():
        settings = {**settings, "target_modules": []}
    else:
        settings = {**settings, "target_parameters": None}
    base = packed_model()
    want, names = logits(base), [name for name, _ in base.named_parameters()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, config(**settings))
    if "modules_to_save" not in settings:
        assert torch.equal(logits(base), want)
        assert [name for name, _ in base.named_parameters()] == names


@adapts_stacks
@pytest.mark.skipif(versions.RELEASE < (0, 20), reason="PEFT allows one adapter of stacks")
@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_a_second_adapter_is_checked_too(settings):
    packed, _ = both()
    with pytest.raises(ValueError, match="does not work with"):
        packed.add_adapter("second", config(target_modules=[], **settings))
    assert list(wrapper_of(packed).r) == list(wrapper_of(packed).lora_A) == ["default"]


@adapts_stacks
@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starts_that_need_no_weights(start):
    settings = {"eva_config": peft.EvaConfig()} if start == "eva" else {}
    base = packed_model()
    model = peft.get_peft_model(copy.deepcopy(base), config(init_lora_weights=start, **settings))
    assert torch.equal(logits(model), logits(base)) == (start is not False)
    assert all(p.isfinite().all() for p in adapters_in(model).values())


def test_other_tuners_are_refused():
    base = packed_model()
    want = logits(base)
    adalora = peft.AdaLoraConfig(
        total_step=10, target_modules=["q_proj"], target_parameters=STACKS[1:]
    )
    with pytest.raises(ValueError, match=r"ADALORA cannot train .*down_proj, a stack of packed"):
        peft.get_peft_model(base, adalora)
    with pytest.raises(ValueError, match=r"IA3 cannot train .*mlp\.experts, a mixture's packed"):
        peft.get_peft_model(
            base, peft.IA3Config(target_modules=["experts"], feedforward_modules=[])
        )
    assert torch.equal(logits(base), want)


def test_releases_that_take_a_stack_the_other_way_round_are_refused(monkeypatch):
    monkeypatch.setattr(tuners, "ADAPTS_STACKS", False)
    with pytest.raises(ValueError, match=r"cannot adapt .*gate_up_proj, .*; want PEFT 0\.19\.1"):
        peft.get_peft_model(packed_model(), config())


def test_experts_with_our_adapter_are_refused():
    base = qlora_ext.add_lora(packed_model(), qlora_ext.LoraConfig(target_parameters=STACKS))
    with pytest.raises(ValueError, match=r"it has an adapter of qlora_ext\.add_lora already"):
        peft.get_peft_model(base, config(target_modules=[]))


def test_biases_of_experts_are_not_trained():
    with pytest.raises(ValueError, match=r"would train .*experts\.up\.bias, the biases of packed"):
        peft.get_peft_model(packed_model("gpt_oss"), config(bias="all", target_parameters=None))


def test_nobody_gets_bytes_for_weights():
    """What PEFT sees of a stack has the dense one's shape and dtype, no memory, and NaN in it."""
    base = packed_model("gpt_oss", torch.bfloat16)
    dense = copy.deepcopy(base).dequantize()
    names = [name for name, _ in base.named_parameters()]
    with named_stacks(base), named_stacks(base):
        shown = dict(base.model.layers[0].mlp.experts.named_parameters(recurse=False))
        want = dict(dense.model.layers[0].mlp.experts.named_parameters(recurse=False))
        assert list(shown) == [name for name in want if not name.endswith("bias")]
        for name, parameter in shown.items():
            assert parameter.shape == want[name].shape and parameter.dtype == torch.bfloat16
            assert parameter.isnan().all() and not parameter.requires_grad
            assert parameter.untyped_storage().nbytes() == 2
    assert [name for name, _ in base.named_parameters()] == names


# LoftQ and KappaTune ------------------------------------------------------------------------------


@adapts_stacks
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_loftq_starts_nearer_to_the_unquantized_experts(family, tmp_path):
    dense = dense_model(family)
    dense.save_pretrained(tmp_path)
    model = peft.get_peft_model(packed_model(family), config(r=8))
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]

    def errors():
        found = []
        for wrapper in wrappers:
            weight = dequantize_4bit(wrapper.stack.quantized, torch.float32)
            weight = weight.mT if wrapper.stack.is_transposed else weight
            lost = dense.get_parameter(wrapper._name) - weight
            # One number for each expert.
            found += (lost - wrapper.get_delta_weight("default")).flatten(1).norm(dim=1).tolist()
        return found

    before, packed = errors(), bytes_of(model)
    assert len(before) == 2 * 2 * E
    peft.replace_lora_weights_loftq(model, tmp_path)
    after = errors()
    assert all(new < 0.95 * old for new, old in zip(after, before, strict=True))
    assert all(torch.equal(value, packed[key]) for key, value in bytes_of(model).items())
    peft.replace_lora_weights_loftq(model, tmp_path, callback=lambda model, name: False)
    assert errors() == after
    other = dense_model(family, intermediate_size=64)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"base \(.*, want float \[4, "):
        peft.replace_lora_weights_loftq(model, tmp_path / "other")


@pytest.mark.skipif(versions.KappaTuneSelector is None, reason="KappaTune wants PEFT 0.20")
def test_kappatune_reads_the_dequantized_experts():
    base = packed_model("gpt_oss")
    dense = copy.deepcopy(base).dequantize()
    got, want = (versions.KappaTuneSelector(m, show_progress=False) for m in (base, dense))
    names = got.get_best_target_parameters(top_p=0.5)
    assert names == want.get_best_target_parameters(top_p=0.5) and len(names) == 2
    kappas = got._parameter_condition_numbers
    assert kappas == pytest.approx(want._parameter_condition_numbers, rel=1e-3)
