"""merge_into_4bit: merging into 4 bits keeps the fine-tune (issue 5, point 6)."""

import copy
import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import EVERYTHING, trained
from torch import nn
from torch._subclasses import FakeTensorMode

import qlora_ext
import tiny_models as tiny
from qlora_ext import (
    LoraConfig,
    QuantConfig,
    QuantizedTensor,
    add_lora,
    dequantize_4bit,
    merge_and_unload,
    merge_into_4bit,
    quantize_model,
)
from qlora_ext.merging import adapted, into_4bit
from qlora_ext.merging import descent as fitting
from qlora_ext.merging.adapted import adapted_model
from qlora_ext.merging.descent import damped, fit_4bit, hessian_error
from qlora_ext.merging.layer_inputs import LayerInputs, as_batches
from qlora_ext.nn import Linear4bit, LoraLinear, LoraLinear4bit
from qlora_ext.nn.dense import adapted_weight
from qlora_ext.nn.stack import LoraStack4bit, Stack4bit
from qlora_ext.tensor.functions import quantize_tensor

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:quantize_model"),
    pytest.mark.filterwarnings("ignore:merge_into_4bit. calibration has"),
]
FORMATS = {
    "nf4": QuantConfig(),
    "nf4-fp32-scales": QuantConfig(double_quant=False),
    "fp4-128": QuantConfig(quant_type="fp4", blocksize=128),  # a block spans two rows of 96
    "linear-32": QuantConfig(quant_type="linear", blocksize=32),
    "standard": QuantConfig(normalization="standard"),
    "none": QuantConfig(normalization="none"),
    "per-tensor": QuantConfig(blocksize=None, double_quant=False),
    "custom": QuantConfig("custom", 64, codebook=tuple((-1) ** i * i / 15 for i in range(16))),
}


def problem(N=40, K=96, seed=0):
    """A weight, a small low-rank change of it, and the H of inputs that lie near a subspace, as a
    language model's do."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=g) / 4
    change = torch.randn(N, 2, generator=g) @ torch.randn(2, K, generator=g) / 60
    X = torch.randn(400, 12, generator=g) @ torch.randn(12, K, generator=g)
    X += 0.3 * torch.randn(400, K, generator=g)
    return weight, change, X.T @ X / len(X)


# The descent on one weight ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("K", [96, 128, 37])
def test_fit_is_far_nearer_than_requantizing(name, K):
    config = FORMATS[name]
    weight, change, H = problem(K=K)
    q = quantize_tensor(weight, config)
    target = dequantize_4bit(q) + change
    requantized = hessian_error(dequantize_4bit(quantize_tensor(target, config)), target, H)
    unmerged = hessian_error(dequantize_4bit(q), target, H)
    (fitted,) = fit_4bit([q], [target], H, fit_scales=config.normalization != "none")
    error = hessian_error(dequantize_4bit(fitted), target, H)
    assert error < 0.5 * min(requantized, unmerged)
    # A tensor like any other: same format, and the same bytes after saving and loading.
    for field in ("shape", "dtype", "blocksize", "quant_type", "codebook"):
        assert getattr(fitted, field) == getattr(q, field)
    loaded = QuantizedTensor.from_state_dict(fitted.state_dict())
    for field in ("packed", "absmax", "nested", "mean"):
        a, b, start = (getattr(t, field) for t in (loaded, fitted, q))
        assert (a is None and b is None and start is None) or torch.equal(a, b)
        assert b is None or (b.shape == start.shape and b.dtype == torch.uint8)
    assert torch.equal(dequantize_4bit(loaded), dequantize_4bit(fitted))
    x = torch.randn(3, K)
    torch.testing.assert_close(
        qlora_ext.linear_4bit(x, fitted), x @ dequantize_4bit(fitted).T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_sweep_lowers_the_error_and_knows_the_stored_weight(name):
    config = FORMATS[name]
    weight, change, H = problem()
    q = quantize_tensor(weight, config)
    target = dequantize_4bit(q) + change
    H = damped(H, 0.01)
    fit = fitting._Fit([q], [target], H)
    before = hessian_error(dequantize_4bit(q), target, H)
    for sweep in (fit.sweep_codes, fit.sweep_scales, fit.sweep_codes, fit.sweep_scales):
        sweep()
        (now,) = fit.packed()
        assert torch.equal(dequantize_4bit(now), fit.W.T)
        error = hessian_error(fit.W.T, target, H)
        assert error <= before * (1 + 1e-5)
        before = error
        gradient = H @ (fit.W - target.T)
        torch.testing.assert_close(fit.G, gradient, rtol=1e-3, atol=1e-4)


def small_problem(seed=0):
    """A change that is small beside the distance of two levels, so that not all of it arrives."""
    weight, change, H = problem(N=96, K=128, seed=seed)
    q = quantize_tensor(weight, QuantConfig())
    return q, change / 6, H


def arrived(q, fitted, change, H):
    """The share of a change that a fit has made."""
    made = dequantize_4bit(fitted) - dequantize_4bit(q)
    return (((made @ H) * change).sum() / ((change @ H) * change).sum()).item()


def test_pushes_bring_the_whole_change():
    q, change, H = small_problem()
    target = dequantize_4bit(q) + change
    (short,) = fit_4bit([q], [target], H)
    (whole,) = fit_4bit([q], [target], H, changes=[change])
    assert arrived(q, short, change, H) < 0.92
    assert 0.97 < arrived(q, whole, change, H) < 1.03
    # On inputs that the text varied less, too.
    other = damped(0.8 * H, 0.25)
    assert arrived(q, whole, change, other) > arrived(q, short, change, other) + 0.05
    # It costs little of what the descent gains.
    errors = [hessian_error(dequantize_4bit(t), target, H) for t in (q, short, whole)]
    assert errors[2] < 1.2 * errors[1] < 0.5 * errors[0]


def test_pushes_of_weights_side_by_side_are_their_own():
    q, change, H = small_problem()
    target = dequantize_4bit(q) + change
    zero = torch.zeros_like(change)  # an adapter that was not trained: nothing is pushed
    alone, plain = (
        fit_4bit([q], [t], H, changes=[c])[0]
        for t, c in ((target, change), (dequantize_4bit(q), zero))
    )
    pair = fit_4bit([q, q], [target, dequantize_4bit(q)], H, changes=[change, zero])
    for got, want in zip(pair, (alone, plain), strict=True):
        assert (got.packed == want.packed).float().mean() > 0.99
    assert torch.equal(plain.packed, q.packed)


def test_a_push_knows_what_is_missing_after_another():
    """What was pushed before does not count as arrived."""
    q, change, H = small_problem()
    H = damped(H, 0.01)
    target = dequantize_4bit(q) + change
    fit = fitting._Fit([q], [target], H, [change])
    total = 0.0
    for _ in range(3):
        fit.sweep_codes()
        missing = 1 - arrived(q, fit.packed()[0], change, H)
        fit.push()
        total += fitting._PUSH * missing
        assert fit.parts[0].pushed == pytest.approx(total, rel=1e-3, abs=1e-4)
        gradient = H @ (fit.W - (target + total * change).T)
        torch.testing.assert_close(fit.G, gradient, rtol=1e-3, atol=1e-4)


def test_weights_that_share_an_input_come_out_as_alone():
    problems = [problem(N=24, seed=1), problem(N=8, seed=2)]
    H = problems[0][2]
    packed = [quantize_tensor(weight, QuantConfig()) for weight, _, _ in problems]
    targets = [
        dequantize_4bit(q) + change for q, (_, change, _) in zip(packed, problems, strict=True)
    ]
    together = fit_4bit(packed, targets, H)
    for q, target, fitted in zip(packed, targets, together, strict=True):
        (alone,) = fit_4bit([q], [target], H)
        same = (alone.packed == fitted.packed).float().mean()
        assert same > 0.99  # sums of another order may tip a tie


def test_zero_blocks_and_unseen_inputs():
    weight, change, H = problem()
    weight[:8] = 0  # scale 0
    q = quantize_tensor(weight, QuantConfig(double_quant=False, blocksize=32))
    target = dequantize_4bit(q) + change
    for hessian in (H, torch.zeros_like(H)):
        (fitted,) = fit_4bit([q], [target], hessian)
        assert dequantize_4bit(fitted).isfinite().all()
    # Without inputs H is the identity: no worse than it was.
    identity = torch.eye(len(H))
    assert hessian_error(dequantize_4bit(fitted), target, identity) <= hessian_error(
        dequantize_4bit(q), target, identity
    )


def test_fit_4bit_says_what_does_not_fit():
    weight, _, H = problem()
    q = quantize_tensor(weight, QuantConfig())
    with pytest.raises(ValueError, match="weights has 1 entries and targets has 0"):
        fit_4bit([q], [], H)
    with pytest.raises(ValueError, match=r"targets \[40, 95\], want \[N, 96\]"):
        fit_4bit([q], [weight[:, 1:]], H)
    with pytest.raises(ValueError, match="weights has 1 entries and changes has 2"):
        fit_4bit([q], [weight], H, changes=[weight, weight])
    other = quantize_tensor(weight, QuantConfig(quant_type="fp4"))
    with pytest.raises(ValueError, match="differ in codebook"):
        fit_4bit([q, other], [weight, weight], H)


# Whole models -------------------------------------------------------------------------------------


def text(batches=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 32)
    return [torch.randint(3, tiny.VOCAB, shape, generator=generator) for _ in range(batches)]


def small(model, factor=30):
    """Makes the adapters' change small beside the distance of two levels, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter /= factor
    return model.eval()


def distance(model, want):
    return (tiny.logits(model) - want).norm().item()


def without_adapter(model):
    return small(copy.deepcopy(model), float("inf"))


def adapted_names(model):
    kinds = (LoraLinear4bit, LoraStack4bit)
    return [name for name, m in model.named_modules() if isinstance(m, kinds)]


def run(model, **arguments):
    return merge_into_4bit(model, **{"progress_bar": False, **arguments})


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("hessian_bytes", [2**30, 1], ids=["one pass", "pass per layer"])
def test_calibration_keeps_what_was_learnt(family, hessian_bytes):
    model = small(trained(family))
    want = tiny.logits(model)
    unmerged = distance(without_adapter(model), want)
    requantized = quantize_model(
        merge_and_unload(copy.deepcopy(model), torch.float32, progress_bar=False),
        progress_bar=False,
    )
    names = adapted_names(model)
    assert run(model, calibration=text(), hessian_bytes=hessian_bytes) is model
    kinds = {Linear4bit, Stack4bit} if family == "mixtral" else {Linear4bit}
    assert {type(model.get_submodule(name)) for name in names} == kinds
    assert distance(model, want) < 0.8 * min(unmerged, distance(requantized, want))


def test_result_saves_and_reloads_bit_equal(tmp_path):
    model = small(trained(config=LoraConfig(r=4, query=True, mlp=True, head=True)))
    before = {
        name: m.weight.clone()
        for name, m in model.named_modules()
        if type(m) is Linear4bit  # those without adapter
    }
    embedding = model.get_input_embeddings().weight.clone()
    head = model.lm_head
    merged_head = head.weight + head.scaling * head.lora_B @ head.lora_A
    run(model, calibration=text())
    assert before and all(torch.equal(model.get_submodule(n).weight, w) for n, w in before.items())
    assert not any(isinstance(m, (LoraLinear, LoraLinear4bit)) for m in model.modules())
    torch.testing.assert_close(model.lm_head.weight, merged_head)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # It can be fine-tuned again.
    add_lora(other, LoraConfig(r=4, **EVERYTHING))


def test_tied_head_is_untied(tmp_path):
    model = small(trained(config=LoraConfig(r=4, query=True, head=True), tie_word_embeddings=True))
    run(model, calibration=text())
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path)), tiny.logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["module", "state dict", "folder"])
def test_base_gives_the_quantized_sum(family, how, tmp_path):
    base, model = tiny.make(family), small(trained(family))
    sums = {}
    for name in adapted_names(model):
        layer, dense = model.get_submodule(name), base.get_submodule(name)
        weight = dense.weight.T if layer.from_conv1d else dense.weight
        total = (weight.detach() + layer.scaling * layer.lora_B @ layer.lora_A).detach()
        sums[name] = quantize_tensor(total, layer.config)
    if how == "state dict":
        base = base.state_dict()
    elif how == "folder":
        base.save_pretrained(tmp_path)
        base = tmp_path
    run(model, base=base)
    for name, q in sums.items():
        got = model.get_submodule(name)
        assert type(got) is Linear4bit
        # addmm and the sum above may round a value to two sides of a threshold.
        assert (got.weight == q.packed).float().mean() > 0.999


EXPERTS = LoraConfig(r=3, target_modules=(), target_parameters=("gate_up_proj", "down_proj"))


@pytest.mark.parametrize("normalization", ["absmax", "standard"])
def test_base_gives_each_expert_its_quantized_sum(normalization):
    """Bit for bit what packing the expert's own sum gives, in one stack that runs as before."""
    base, config = tiny.make("qwen3_moe"), QuantConfig(normalization=normalization)
    model = small(trained("qwen3_moe", config=EXPERTS, quant=config))
    names = adapted_names(model)
    assert [name.rpartition("experts.")[2] for name in names] == ["up", "down"] * 2
    sums = {}
    for name in names:
        layer = model.get_submodule(name)
        holder = base.get_submodule(name.rpartition(".")[0])
        dense = holder.gate_up_proj if name.endswith("up") else holder.down_proj
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        sums[name] = [
            quantize_tensor(adapted_weight(dense[e].detach(), A[e], B[e], layer.scaling), config)
            for e in range(4)
        ]
    want = without_adapter(model)
    run(model, base=base)
    for name, parts in sums.items():
        stack = model.get_submodule(name)
        assert type(stack) is Stack4bit and stack.config == config
        for e, q in enumerate(parts):
            got = stack.quantized[e]
            for key in ("packed", "absmax", "nested", "mean"):
                one, other = getattr(got, key), getattr(q, key)
                assert one is other is None or torch.equal(one, other), (name, e, key)
    assert 0 < distance(model, tiny.logits(want)) < 0.5 * tiny.logits(want).norm()
    assert torch.equal(tiny.logits(copy.deepcopy(model)), tiny.logits(model))


def test_experts_in_host_memory_are_refused():
    """Their adapters are on another device."""
    model = qlora_ext.offload_experts(trained("qwen3_moe", config=EXPERTS), "cpu")
    with pytest.raises(ValueError, match=r"experts\.up in host memory, want it on its adapter"):
        run(model, base=tiny.make("qwen3_moe"))
    assert len(adapted_names(model)) == 4


@pytest.mark.parametrize("layers", [("up", "down"), ("down",)])
def test_an_experts_statistics_are_of_the_tokens_that_chose_it(layers):
    """Without padding, and zero for an expert that no token chose."""
    names = {"up": "gate_up_proj", "down": "down_proj"}
    config = LoraConfig(r=2, target_modules=(), target_parameters=[names[n] for n in layers])
    model = small(trained("qwen3_moe", config=config))

    def never_2(module, args, output):
        logits, weights, index = output
        return logits, weights, index.masked_fill(index == 2, 3)

    ids = text(1)[0]
    mask = torch.ones_like(ids)
    mask[:2, 20:] = 0
    seen = {}

    def note(module, args, experts):
        hidden, index, _ = args
        for e in range(4):
            token, _ = torch.where(index == e)
            h = hidden[token[mask.view(-1)[token].bool()]]
            dense = dequantize_4bit(experts.up.quantized)[e]
            gated = experts.template._apply_gate(h @ dense.T)
            seen.setdefault(id(experts.up), []).append(h)
            seen.setdefault(id(experts.down), []).append(gated)

    if "up" in layers:  # so that `up` computes what its packed weight alone does
        model = without_adapter(model)
    for block in model.model.layers:
        experts = block.mlp.experts
        block.mlp.gate.register_forward_hook(never_2)
        experts.register_forward_pre_hook(functools.partial(note, experts=experts))
    found = adapted_model(model).layers
    assert len(found) == 2 * 4 * len(layers)
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        inputs = LayerInputs(model, found, [batch], 2**30)
        assert inputs.can_stop and all(len(group) == 1 for group in inputs.groups)
        seen.clear()
        got = list(inputs)
        for (layer,), H in got:
            rows = seen[id(layer.module)][layer.expert]
            want = rows.T @ rows / max(len(rows), 1)
            torch.testing.assert_close(H, want, rtol=1e-3, atol=1e-6)
            assert H.any() == (layer.expert != 2)
    assert len(got) == len(found)


@pytest.mark.parametrize("how", ["base", "calibration"])
def test_an_error_names_the_expert_and_leaves_the_stack(how):
    model = small(trained("qwen3_moe", config=EXPERTS))
    stack = model.model.layers[1].mlp.experts.down
    with torch.no_grad():
        stack.lora_B[3] = 3e38
    base = {"base": tiny.make("qwen3_moe")} if how == "base" else {"calibration": text()}
    with pytest.raises((OverflowError, ValueError), match=r"experts\.down\[3\]"):
        run(model, **base)
    assert model.model.layers[1].mlp.experts.down is stack and len(adapted_names(model)) == 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "llama"])
def test_base_folder_is_read_under_the_names_of_the_model(family, tmp_path):
    """Mixtral's files hold an expert a tensor, and other names than the model."""
    base, model = tiny.make(family, dtype=torch.bfloat16), small(trained(family))
    base.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert (family in ("mixtral", "qwen3_moe")) == any("experts.3" in key for key in files)
    if family == "gpt2":  # as GPT2Model saves it: without the prefix
        files = {key.removeprefix("transformer."): tensor for key, tensor in files.items()}
    files["model.norm.weight" if family != "gpt2" else "ln_f.weight"] = torch.ones(64)  # fp32
    save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want = run(copy.deepcopy(model), base=base)
    got = run(model, base=tmp_path)
    assert {type(m) for m in got.modules()} == {type(m) for m in want.modules()}
    for (name, a), (_, b) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_base_folder_that_transformers_cannot_read_says_why(tmp_path):
    base, model = tiny.make("mixtral"), small(trained("mixtral"))
    base.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    key = next(key for key in files if "experts.3.w1" in key)
    files[key] = files[key][:, :-1].contiguous()
    save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"base \(.*\) has no model.*; transformers cannot read the folder"
    ):
        run(model, base=tmp_path)


def test_base_and_calibration_together_are_refused():
    base, model = tiny.make("llama"), small(trained())
    want = tiny.logits(model)
    with pytest.raises(ValueError, match=r"merge_into_4bit: got base and calibration, want one"):
        run(model, base=base, calibration=text())
    assert torch.equal(tiny.logits(model), want)


def test_neither_warns_with_the_loss_and_merges_into_16_bits():
    model = small(trained())
    want = tiny.logits(model)
    with pytest.warns(UserWarning, match=r"5 to 10% of a short .* merging into bfloat16 instead"):
        merged = run(model, dtype=torch.bfloat16)
    assert not any(isinstance(m, Linear4bit) for m in merged.modules())
    assert next(merged.parameters()).dtype == torch.bfloat16
    assert distance(merged.float(), want) < 0.05 * want.norm()


def test_layers_with_one_input_share_a_hessian_without_padding():
    model = small(trained())
    layers = adapted_model(model).layers
    ids = text(1)[0]
    batches = [ids[:2], {"input_ids": ids[2:], "attention_mask": torch.ones_like(ids[2:])}]
    padded = torch.full((2, 48), 7)
    padded[:, :32] = ids[2:]
    mask = torch.zeros_like(padded)
    mask[:, :32] = 1
    with torch.no_grad():
        plain = LayerInputs(model, layers, batches, 2**30)
        wanted = list(plain)
        batches[1] = {"input_ids": padded, "attention_mask": mask}
        got = list(LayerInputs(model, layers, batches, 2**30))
    assert plain.can_stop
    names = [[layer.name.rpartition(".")[2] for layer in group] for group, _ in got]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == block * 2
    for (_, a), (_, b) in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_error_midway_leaves_the_model_as_it_was(monkeypatch):
    model = small(trained())
    want, names = tiny.logits(model), adapted_names(model)
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit_4bit(*args, **kwargs)

    monkeypatch.setattr(into_4bit, "fit_4bit", failing)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        run(model, calibration=text())
    assert adapted_names(model) == names and model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(tiny.logits(model.eval()), want)


@pytest.mark.parametrize("failing", [False, True])
def test_modes_of_submodules_stay(failing, monkeypatch):
    model = small(trained(config=LoraConfig(r=4, query=True, mlp=True, head=True))).train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert not all(modes.values()) and modes["model.layers.1.mlp.up_proj"] and modes["lm_head"]
    if failing:
        monkeypatch.setattr(adapted, "dense_layer", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, calibration=text(1))
    else:
        run(model, calibration=text(1))
    after = {name: module.training for name, module in model.named_modules()}
    assert all(modes[name] == mode for name, mode in after.items())
    assert failing == (type(model.lm_head) is LoraLinear)


def test_memory_is_one_group_of_hessians(monkeypatch):
    model = small(trained())
    most = []
    gather = LayerInputs._gather

    def counted(self, groups):
        hessians = gather(self, groups)
        most.append(sum(h.nbytes for h in hessians.values()))
        return hessians

    monkeypatch.setattr(LayerInputs, "_gather", counted)
    run(model, calibration=text(1), hessian_bytes=np.int64(4 * (64**2 + 96**2)))
    assert max(most) <= 4 * (64**2 + 96**2) and len(most) > 2


@pytest.mark.filterwarnings("ignore:merge_into_4bit")
def test_snippets_of_the_page_run(tmp_path, monkeypatch):
    from integration_helpers import REPOSITORY, tiny_llama, tiny_tokenizer

    page = (REPOSITORY / "docs" / "merging.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_tokenizer(tiny_llama(base))
    monkeypatch.chdir(tmp_path)
    model = type(tiny.make("llama")).from_pretrained(base)
    qlora_ext.save_adapter(add_lora(quantize_model(model), LoraConfig(r=4)), adapter)
    names = {"base": base, "adapter": adapter, "out": tmp_path}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/merging.md, block {number}", "exec"), names)
        assert isinstance(names["model"].model.layers[0].self_attn.q_proj, Linear4bit)
    assert (tmp_path / "merged-4bit" / "config.json").exists()


def test_a_large_change_is_no_worse_than_requantizing():
    model = small(trained(), 2)
    dense = merge_and_unload(copy.deepcopy(model), torch.float32, progress_bar=False)
    inputs = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name in adapted_names(model):
            inputs[name] = module.weight.detach().clone()
    requantized = quantize_model(dense, progress_bar=False)
    layers = adapted_model(model).layers
    with torch.no_grad():
        hessians = {
            layer.name: hessian
            for group, hessian in LayerInputs(model, layers, text(), 2**30)
            for layer in group
        }
    merged = run(model, calibration=text())
    for name, target in inputs.items():
        ours, plain = (
            hessian_error(dequantize_4bit(m.get_submodule(name).quantized), target, hessians[name])
            for m in (merged, requantized)
        )
        assert ours < 0.7 * plain


# PEFT ---------------------------------------------------------------------------------------------


def peft_model(modules_to_not_convert=(), **settings):
    peft = pytest.importorskip("peft")
    model = quantize_model(
        tiny.make("llama"), modules_to_not_convert=modules_to_not_convert, progress_bar=False
    )
    config = peft.LoraConfig(r=4, target_modules="all-linear", **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 40)
    return model.eval()


def test_peft_model_merges_and_unwraps():
    model = peft_model()
    want = tiny.logits(model)
    with model.disable_adapter():
        unmerged = distance(model, want)
    via_base = run(copy.deepcopy(model), base=tiny.make("llama"))
    merged = run(model, calibration=text())
    for result in (via_base, merged):
        assert type(result).__name__ == "LlamaForCausalLM"
        assert not any(type(m).__module__.startswith("peft.") for m in result.modules())
        assert isinstance(result.model.layers[0].mlp.up_proj, Linear4bit)
    assert distance(merged, want) < 0.8 * unmerged
    with pytest.raises(ValueError, match="merged already"):
        run(merged, calibration=text())


def test_peft_error_midway_leaves_dense_layers_as_they_were():
    model = peft_model(modules_to_not_convert=["gate_proj"])
    layers = [layer.mlp.gate_proj for layer in model.get_base_model().model.layers]
    assert not any(isinstance(layer.get_base_layer(), Linear4bit) for layer in layers)
    last = layers[-1].lora_B["default"].weight
    saved = last.detach().clone()
    with torch.no_grad():
        last[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        run(model, base=tiny.make("llama"))
    assert not any(layer.merged for layer in layers)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        last.copy_(saved)
    wanted = [layer.get_base_layer().weight + layer.get_delta_weight("default") for layer in layers]
    merged = run(model, base=tiny.make("llama"))
    for layer, want in zip(merged.model.layers, wanted, strict=True):
        torch.testing.assert_close(layer.mlp.gate_proj.weight, want)


def test_peft_kinds_that_are_refused():
    with pytest.raises(ValueError, match="more than plain LoRA, want plain LoRA"):
        run(peft_model(use_dora=True), calibration=text())
    model = peft_model()
    with pytest.raises(ValueError, match="want the PeftModel itself"):
        run(model.get_base_model().model, calibration=text())
    model.merge_adapter()
    with pytest.raises(ValueError, match="want them unmerged"):
        run(model, calibration=text())


# Sentences ----------------------------------------------------------------------------------------

MASKED = {"input_ids": text(1)[0], "attention_mask": torch.zeros(4, 32).long()}


@pytest.mark.parametrize(
    "arguments, error, sentence",
    [
        ({"calibration": []}, ValueError, "calibration is empty, want batches of text"),
        ({"calibration": "some text"}, TypeError, "calibration is a str, want a list of batches"),
        ({"calibration": text(1)[0]}, TypeError, "calibration is a Tensor, want a list"),
        ({"calibration": ["some text"]}, TypeError, r"calibration\[0\] is a str, want token ids"),
        ({"calibration": [MASKED, MASKED]}, ValueError, "has no tokens .is its attention_mask all"),
        ({"calibration": [torch.zeros(0, 8).long()]}, ValueError, "calibration has no tokens"),
        *(
            ({"calibration": text(), "damping": d}, ValueError, f"damping is {d!r}, want a finite")
            for d in (-1, float("nan"), float("inf"), True, "0.1")
        ),
        ({"calibration": 7}, TypeError, "calibration is 7, want a list of batches"),
        *(
            (
                {"calibration": text(), "hessian_bytes": n},
                ValueError,
                f"hessian_bytes is {n!r}, wan",
            )
            for n in (None, 0, -1, True, 1e9, "1GB", float("nan"))
        ),
        ({"progress_bar": None}, TypeError, "progress_bar is None, want a bool"),
        ({"base": 7}, TypeError, "base is 7, want the unquantized model"),
        ({"base": b"folder"}, TypeError, "base is b'folder', want the unquantized model"),
        ({"base": ""}, TypeError, "base is '', want the unquantized model"),
        ({"base": "no/such"}, ValueError, "base is 'no/such', which does not exist, want the fold"),
        ({"base": {}, "dtype": "fp16"}, TypeError, "dtype is 'fp16', want torch.float16"),
        ({"base": {}}, ValueError, "base has no model.layers.0.self_attn.q_proj.weight"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_arguments_that_are_refused(arguments, error, sentence):
    model = small(trained())
    want = tiny.logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=sentence):
            run(model, **arguments)
    assert torch.equal(tiny.logits(model), want)


@pytest.mark.parametrize("own", [True, False], ids=["transformers model", "module"])
def test_a_base_that_is_not_a_checkpoint_is_refused(tmp_path, own):
    """A folder of transformers' model is read by its config first, another's is not."""
    model = small(trained())
    if not own:
        model = nn.Sequential(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    for name, content in [("text", b"some text"), ("cut", b"\x08"), ("none", b"")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content)
    for path, says in [
        (tmp_path / "empty", "has no safetensors files, want the folder of the unquantized model"),
        (tmp_path / "pickle", "has no safetensors files, want the folder"),
        (tmp_path / "missing", "which does not exist, want the folder"),
        (tmp_path / "pickle" / "pytorch_model.bin", "may be a pickle, .* want a safetensors file"),
        *(
            (tmp_path / n, "model.safetensors is damaged or not a safetensors file")
            for n in ("text", "cut", "none")
        ),
    ]:
        for base in (path, str(path)):
            with pytest.raises(ValueError, match=f"merge_into_4bit: base .*{says}"):
                merge_into_4bit(model, base=base, progress_bar=False)


def test_few_tokens_warn():
    half = {**MASKED, "attention_mask": torch.ones(4, 32).tril(15).bool().int()}
    real = int(half["attention_mask"].sum())
    assert 0 < real < 128
    with pytest.warns(
        UserWarning, match=rf"calibration has {384 + real} tokens, want at least 512"
    ):
        as_batches([*text(3), half], nn.Module())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_batches(text(4), nn.Module())
        # Inputs whose tokens cannot be counted.
        as_batches([{"inputs_embeds": torch.ones(1, 1, 64)}], nn.Module())


BATCHES = {
    "none": ({"input_ids": None}, r"\[0\] has no input_ids, want token ids"),
    "empty": ({}, r"\[0\] is empty, want input_ids"),
    "key": ({1: text(1)[0]}, r"\[0\] has the key 1, want names of arguments"),
    "float": (torch.rand(4, 32), r"\[0\] is a tensor of torch.float32, want int64 token ids"),
    "float in a dict": (
        {"input_ids": torch.rand(4, 32)},
        r"\['input_ids'\] is a tensor of torch.f",
    ),
    "list": ({"input_ids": [[1, 2]]}, r"\['input_ids'\] is list, want int64 token ids"),
    "one dimension": (
        torch.arange(9),
        r"\[0\] is of shape \[9\], want int64 token ids \[batch, to",
    ),
    "three": (torch.zeros(1, 2, 3).long(), r"\[0\] is of shape \[1, 2, 3\], want int64"),
    "beyond": (torch.full((4, 32), 10**6), r"\[0\] has token 1000000, want ids from 0 to"),
    "negative": ({"input_ids": torch.full((4, 32), -1)}, r"\['input_ids'\] has token -1, want ids"),
    "meta": (torch.zeros(4, 32, device="meta").long(), r"\[0\] is a tensor without data"),
    "sparse": (torch.zeros(4, 32).long().to_sparse(), r"\[0\] is a tensor of layout torch.sparse_"),
    "mask": (
        {"input_ids": text(1)[0], "attention_mask": "x"},
        r"\['attention_mask'\] is 'x', want",
    ),
    "other mask": (
        {"input_ids": text(1)[0], "attention_mask": torch.ones(4, 7)},
        r"\['attention_mask'\] has shape \[4, 7\], want input_ids' \[4, 32\]",
    ),
    "labels": (
        {"input_ids": text(1)[0], "labels": torch.ones(3).long()},
        r"the model's forward fails on calibration\[0\]: ValueError: ",
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.filterwarnings("ignore:merge_into_4bit. calibration has")
def test_batches_that_are_no_text_are_refused_by_number_and_name(kind):
    batch, message = BATCHES[kind]
    model = small(trained())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="^merge_into_4bit: .*" + message):
        qlora_ext.merge_into_4bit(model, calibration=[batch], progress_bar=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_later_batch_is_refused_before_anything_runs():
    model = small(trained())
    batches = [*text(4), torch.full((4, 32), 10**6)]
    with pytest.raises(ValueError, match=r"calibration\[4\] has token 1000000"):
        qlora_ext.merge_into_4bit(model, calibration=batches, progress_bar=False)


@pytest.mark.parametrize("kind", ["none", "meta", "fake", "sparse", "nan", "complex", "key"])
def test_weights_of_a_base_that_are_none_are_refused_by_name(kind):
    model = small(trained())
    name = next(n for n, m in model.named_modules() if isinstance(m, Linear4bit))
    packed = model.get_submodule(name)
    weight = torch.zeros(packed.out_features, packed.in_features)
    with FakeTensorMode():
        fake = torch.zeros(4, 4)
    value = {
        "none": None,
        "meta": weight.to("meta"),
        "fake": fake,
        "sparse": weight.to_sparse(),
        "nan": weight.fill_(math.nan),
        "complex": weight.to(torch.complex64),
        "key": None,
    }[kind]
    key = 5 if kind == "key" else f"{name}.weight"
    with pytest.raises((ValueError, OverflowError)) as error:
        qlora_ext.merge_into_4bit(model, base={key: value}, progress_bar=False)
    said = str(error.value)
    assert said.startswith("merge_into_4bit: base") and f"{name}.weight" in said
    want = {"nan": "NaNs among them", "key": "want the unquantized model", "none": "as NoneType"}
    assert want.get(kind, "want float values") in said


def test_bases_that_are_refused(tmp_path):
    model = small(trained())
    want = tiny.logits(model)
    with pytest.raises(ValueError, match=r"q_proj.weight of shape \[32, 32\], want \[64, 64\]"):
        run(model, base=tiny.make("llama", hidden_size=32))
    other = tiny.make("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.normal_()
    with pytest.raises(
        ValueError, match=r"base is not the model that was packed: \d+% of the codes of"
    ):
        run(model, base=other)
    with pytest.raises(ValueError, match="which has no safetensors files, want the folder"):
        run(model, base=tmp_path)
    with pytest.raises(ValueError, match="want float"):
        run(model, base=quantize_model(tiny.make("llama"), progress_bar=False))
    assert torch.equal(tiny.logits(model), want)


def test_models_that_are_refused():
    with pytest.raises(TypeError, match=r"model is a int, want an nn.Module"):
        run(7)
    model = small(trained())
    run(model, calibration=text(1))
    with pytest.raises(ValueError, match="merged already, or none were added"):
        run(model, calibration=text(1))
    with pytest.raises(ValueError, match="it has no 4-bit layers either"):
        run(nn.Linear(4, 4))
    dense = add_lora(tiny.make("llama"), LoraConfig(r=4))
    with pytest.raises(ValueError, match="only adapters are on unquantized layers"):
        run(dense, calibration=text(1))


def test_activations_that_are_not_finite_are_refused():
    model = small(trained())
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
        model.model.layers[0].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="gets a NaN or an infinity as input"):
        run(model, calibration=text(1))
