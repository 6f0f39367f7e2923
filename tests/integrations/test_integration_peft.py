"""PEFT's own code on packed layers: train, merge, unmerge, save, reload, and what is refused."""

import copy
import json
import pickle
import warnings
from unittest import mock

import pytest
import torch

from integration_helpers import ids, logits, randomize, run_python, tiny_llama

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from packaging.version import Version

import qlora_ext
from qlora_ext import ops
from qlora_ext.integrations import peft as plugin
from qlora_ext.integrations.peft import tuners, versions
from qlora_ext.integrations.peft.attach import _subclasses
from qlora_ext.nn import Linear4bit

ATTENTION = ["q_proj", "v_proj"]
PEFT = versions.RELEASE


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of an unquantized tiny model and of the same model in 4 bits."""
    from transformers import AutoModelForCausalLM

    dense = tiny_llama(tmp_path_factory.mktemp("dense"))
    packed = tmp_path_factory.mktemp("packed")
    AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=qlora_ext.QLoraExtConfig()
    ).save_pretrained(packed)
    return dense, packed


def base_model(folders, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folders[1], **kwargs)


def lora_config(**kwargs):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **kwargs}
    )


def adapted(folders, seed: int = 0, **kwargs):
    return randomize(peft.get_peft_model(base_model(folders), lora_config(**kwargs)), seed)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, plugin.PeftLoraLinear4bit)]


def packed_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if v.dtype == torch.uint8}


def count_calls(name: str, model, **inputs):
    """How often a forward calls the op wrapper `ops.<name>`."""
    with mock.patch.object(ops, name, wraps=getattr(ops, name)) as wrapper:
        model(**(inputs or {"input_ids": ids()}))
    return wrapper.call_count


# Forward -------------------------------------------------------------------------------------


def test_plain_adapter_takes_the_fused_op(folders):
    model = adapted(folders)
    assert len(lora_layers(model)) == 4
    assert count_calls("lora_gemm_4bit", model) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_and_general_path_agree(folders, dtype):
    model = randomize(
        peft.get_peft_model(
            base_model(folders, dtype=dtype), lora_config(target_modules="all-linear")
        )
    )
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    fused = logits(model)
    with mock.patch.object(plugin.PeftLoraLinear4bit, "_fused_adapters", lambda self: None):
        general = logits(model)
    assert fused.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(fused, general, rtol=tolerance, atol=tolerance)


def test_gradients_of_the_fused_path(folders):
    model = adapted(folders).train()

    def gradients():
        model.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    fused = gradients()
    with mock.patch.object(plugin.PeftLoraLinear4bit, "_fused_adapters", lambda self: None):
        general = gradients()
    assert len(fused) == 8
    for name, want in general.items():
        torch.testing.assert_close(fused[name], want, rtol=1e-4, atol=1e-6)


def test_dropout_is_applied_in_training_only(folders):
    model = adapted(folders, lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(ids()).logits, model(ids()).logits)
    assert count_calls("lora_shrink", model) == 4


def test_autocast(folders):
    model = adapted(folders)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model)
        assert count_calls("lora_gemm_4bit", model) == 4
    torch.testing.assert_close(got.float(), logits(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "kwargs",
    [{"use_dora": True}, {"alora_invocation_tokens": [7, 9]}, {"lora_bias": True}],
    ids=str,
)
def test_variants_are_those_of_the_dequantized_model(tmp_path, kwargs):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        tiny_llama(tmp_path, attention_bias=True), quantization_config=qlora_ext.QLoraExtConfig()
    )
    dense = copy.deepcopy(base).dequantize()
    model = randomize(peft.get_peft_model(base, lora_config(**kwargs)))
    want = peft.get_peft_model(dense, lora_config(**kwargs))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            want.get_parameter(name).data = parameter.data.clone()
    tokens = torch.cat([ids(2, 6), torch.tensor([[7, 9]] * 2), ids(2, 3)], dim=1)
    torch.testing.assert_close(logits(model, tokens), logits(want, tokens), rtol=1e-4, atol=1e-5)
    if "alora_invocation_tokens" not in kwargs:  # aLoRA cannot be merged, whatever the base
        before, bytes_before = logits(model), packed_state(model)
        bias = lora_layers(model)[0].base_layer.bias.clone()
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        after = packed_state(model)
        assert all(torch.equal(after[name], bytes_before[name]) for name in bytes_before)
        assert torch.equal(lora_layers(model)[0].base_layer.bias, bias)


def test_unsupported_initialisations_say_so(folders):
    mica = "unsupported variant" if PEFT >= (0, 20) else "Unknown initialization"
    for init, message in [
        ("pissa", "PiSSA under float32"),
        ("mica", mica),
        ("loftq", "replace_lora_weights_loftq"),
    ]:
        config = lora_config()
        config.init_lora_weights = init  # LoraConfig itself wants scipy for loftq
        with pytest.raises((TypeError, ValueError), match=message):
            peft.get_peft_model(base_model(folders), config)


def test_disabled_adapter_is_the_base(folders):
    model = adapted(folders)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(folders)))


def test_hooks_on_the_base_layer_are_run(folders):
    model = adapted(folders)
    seen = []
    lora_layers(model)[0].base_layer.register_forward_hook(lambda *args: seen.append(args))
    logits(model)
    assert seen


def test_two_active_adapters(folders):
    model = adapted(folders)
    model.add_adapter("second", lora_config(r=2))
    model.base_model.set_adapter(["default", "second"])
    randomize(model, seed=2)
    assert count_calls("lora_gemm_4bit", model.eval()) == 4
    fused = logits(model)
    with mock.patch.object(plugin.PeftLoraLinear4bit, "_fused_adapters", lambda self: None):
        torch.testing.assert_close(fused, logits(model), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), fused, rtol=1e-4, atol=1e-5)


def test_mixed_batch(folders):
    model = adapted(folders)
    model.add_adapter("second", lora_config(r=2))
    model.set_adapter("second")
    randomize(model, seed=2)
    alone = {}
    for name in ["default", "second"]:
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    tokens = ids(3)
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        mixed = model(tokens, adapter_names=names).logits
    for row, name in enumerate(names):
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    want = model(tokens).logits[row]
            else:
                model.set_adapter(name)
                want = model(tokens).logits[row]
        torch.testing.assert_close(mixed[row], want, rtol=1e-4, atol=1e-5)


# Merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_merge_and_unmerge(folders, kwargs):
    model = adapted(folders, **kwargs)
    before, bytes_before = logits(model), packed_state(model)
    model.merge_adapter()
    layer = lora_layers(model)[0]
    assert layer.merged and type(layer.base_layer) is torch.nn.Linear
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    after = packed_state(model)
    assert after.keys() == bytes_before.keys()
    assert all(torch.equal(after[name], bytes_before[name]) for name in after)


def test_unmerging_follows_a_cast(folders):
    model = adapted(folders)
    bytes_before = packed_state(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert all(layer.base_layer.dtype == torch.bfloat16 for layer in lora_layers(model))
    after = packed_state(model)
    assert all(torch.equal(after[name], bytes_before[name]) for name in bytes_before)
    assert logits(model).dtype == torch.bfloat16


def test_two_dora_adapters_merge_one_after_another(folders):
    model = adapted(folders, use_dora=True)
    model.add_adapter("second", lora_config(use_dora=True))
    model.set_adapter("second")
    randomize(model, seed=2)
    dense = peft.get_peft_model(base_model(folders).dequantize(), lora_config(use_dora=True))
    dense.add_adapter("second", lora_config(use_dora=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            dense.get_parameter(name).data = parameter.data.clone()
    for m in (model, dense):
        m.merge_adapter(adapter_names=["default"])
        m.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)


def test_merging_twice_says_so(folders):
    model = adapted(folders)
    model.merge_adapter()
    merged = logits(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged)


def test_merge_into_4_bits_is_asked_for_and_warned_of(folders):
    model = adapted(folders)
    before = logits(model)
    with pytest.warns(UserWarning, match="merging into 4 bits"), plugin.merging_to_4bit():
        model.merge_adapter()
    assert isinstance(lora_layers(model)[0].base_layer, Linear4bit)
    assert not torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_merge_and_unload_gives_an_ordinary_model(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(folders)
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))


def test_merge_and_unload_in_4_bits_can_be_saved(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(folders)
    with warnings.catch_warnings(), plugin.merging_to_4bit():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, Linear4bit) for module in again.modules())
    assert torch.equal(logits(again), logits(merged))


def test_unload_gives_the_packed_model_back(folders):
    model = adapted(folders).unload()
    assert torch.equal(logits(model), logits(base_model(folders)))
    assert not lora_layers(model)


def test_merge_of_a_conv1d_model_gives_conv1d(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gpt2", quantization_config=qlora_ext.QLoraExtConfig()
    )
    model = randomize(
        peft.get_peft_model(base, lora_config(target_modules=["c_attn"], fan_in_fan_out=True))
    )
    before = logits(model)
    merged = model.merge_and_unload()
    block = merged.transformer.h[0]
    assert type(block.attn.c_attn) is Conv1D and type(block.mlp.c_fc) is Conv1D
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_broken_adapter_is_not_merged(folders):
    model = adapted(folders)
    lora_layers(model)[0].lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight holds .* NaN"):
        model.merge_adapter(safe_merge=True)
    assert not lora_layers(model)[0].merged
    assert isinstance(lora_layers(model)[0].base_layer, Linear4bit)


def test_merge_beyond_float16_is_refused(folders):
    base = base_model(folders, dtype=torch.float16)
    model = peft.get_peft_model(base, lora_config())
    lora_layers(model)[0].lora_B["default"].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"that torch\.float16 cannot hold"):
        model.merge_adapter()


# Saving --------------------------------------------------------------------------------------


def test_save_and_reload_in_a_fresh_process(folders, tmp_path):
    model = adapted(folders)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    run_python(
        f"""
        sys.path.insert(0, "tests")
        import torch, qlora_ext
        from integration_helpers import logits
        from qlora_ext.integrations.peft import load_adapters
        model = load_adapters({str(tmp_path / "adapter")!r})
        want = torch.load({str(tmp_path / "logits.pt")!r})
        assert torch.equal(logits(model), want)
        """
    )


def test_adapter_loads_on_an_unquantized_base(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(folders)
    model.save_pretrained(tmp_path)
    names = {n.split(".default")[0] for n, _ in model.named_parameters() if "lora_" in n}
    dense = AutoModelForCausalLM.from_pretrained(folders[0], torch_dtype=torch.float16)
    again = peft.PeftModel.from_pretrained(dense, tmp_path)
    for name in names:
        assert torch.equal(
            again.get_parameter(f"{name}.default.weight"),
            model.get_parameter(f"{name}.default.weight"),
        )
    assert logits(again.merge_and_unload()).isfinite().all()


@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_pefts_own_ways_to_load(folders, tmp_path, kwargs):
    from transformers import AutoModelForCausalLM

    model = adapted(folders)
    model.save_pretrained(tmp_path)
    want = logits(model)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)), want)
    again = peft.PeftModel.from_pretrained(base_model(folders), tmp_path, **kwargs)
    assert torch.equal(logits(again), want)
    if PEFT < (0, 19):  # transformers wants "a version >= 0.18.2", which was never released
        return
    # transformers reads an adapter's folder too, base and all.
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), want)


def test_adapter_through_transformers(folders, tmp_path):
    wanted = transformers.integrations.peft.MIN_PEFT_VERSION  # 5.24 wants 0.22, not released yet
    if Version(peft.__version__) < Version(wanted):
        pytest.skip(f"transformers {transformers.__version__} wants PEFT {wanted} for add_adapter")
    base = base_model(folders)
    base.add_adapter(lora_config())
    randomize(base)
    assert count_calls("lora_gemm_4bit", base) == 4
    base.save_pretrained(tmp_path)
    again = plugin.load_adapters(tmp_path, base_model(folders))
    assert torch.equal(logits(again), logits(base))
    base.disable_adapters()
    assert torch.equal(logits(base), logits(base_model(folders)))


def test_training_goes_on_after_reloading(folders, tmp_path):
    adapted(folders).save_pretrained(tmp_path)
    model = plugin.load_adapters(tmp_path, base_model(folders), is_trainable=True)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert lora_layers(model)[0].lora_A["default"].weight.grad is not None


def test_load_adapters_without_a_base(folders, tmp_path):
    model = adapted(folders)
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace(str(folders[1]), ""))
    with pytest.raises(ValueError, match="base got None"):
        plugin.load_adapters(tmp_path)


def test_parameters_are_counted_as_weights(folders, capsys):
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(folders[0])
    want = peft.get_peft_model(dense, lora_config()).get_nb_trainable_parameters()
    model = adapted(folders)
    assert model.get_nb_trainable_parameters() == want
    model.print_trainable_parameters()
    assert f"all params: {want[1]:,}" in capsys.readouterr().out


# Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ours", "peft"])
def test_checkpointing_gives_the_same_gradients(folders, name):
    torch.manual_seed(0)
    plain = adapted(folders).train()
    prepare = {
        "ours": plugin.prepare_model_for_kbit_training,
        "peft": peft.prepare_model_for_kbit_training,
    }[name]
    base = prepare(base_model(folders, dtype=torch.float32))
    assert base.model.layers[0].gradient_checkpointing
    torch.manual_seed(0)
    model = randomize(peft.get_peft_model(base, lora_config())).train()
    for m in (plain, model):
        m(input_ids=ids(), labels=ids()).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_modules_to_save(folders, tmp_path):
    model = adapted(folders, modules_to_save=["lm_head"])
    model(input_ids=ids(), labels=ids()).loss.backward()
    model.save_pretrained(tmp_path)
    again = plugin.load_adapters(tmp_path, base_model(folders))
    assert torch.equal(logits(again), logits(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", False])
def test_initialisations_that_leave_the_base_alone(folders, init):
    model = peft.get_peft_model(base_model(folders), lora_config(init_lora_weights=init))
    assert isinstance(lora_layers(model)[0].base_layer, Linear4bit)
    assert lora_layers(model)[0].lora_A["default"].weight.dtype == torch.float32
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(folders)))
    model(input_ids=ids(), labels=ids()).loss.backward()


def test_olora_changes_the_base_it_starts_from(folders):
    model = peft.get_peft_model(base_model(folders), lora_config(init_lora_weights="olora"))
    assert isinstance(lora_layers(model)[0].base_layer, Linear4bit)
    # B A takes the leading part and the rest is packed again: the sum stays near the base.
    difference = (logits(model) - logits(base_model(folders))).std()
    assert 0 < difference < 0.5 * logits(base_model(folders)).std()


@pytest.mark.parametrize("through", ["ours", "peft"])
def test_loftq_starts_nearer_to_the_unquantized_model(folders, through):
    from transformers import AutoModelForCausalLM

    want = logits(AutoModelForCausalLM.from_pretrained(folders[0]))
    model = peft.get_peft_model(
        base_model(folders), lora_config(r=16, target_modules="all-linear", lora_alpha=8)
    )
    before = (logits(model) - want).std()
    bytes_before = packed_state(model)
    start = {
        "ours": plugin.replace_lora_weights_loftq,
        "peft": peft.replace_lora_weights_loftq,
    }[through]
    start(model, str(folders[0]))
    assert (logits(model) - want).std() < 0.8 * before
    after = packed_state(model)
    assert all(torch.equal(after[name], bytes_before[name]) for name in after)


def test_loftq_needs_the_unquantized_weights(folders):
    model = adapted(folders)
    with pytest.raises(
        ValueError, match=r"loftq: .* as a tensor of torch\.uint8, want float values"
    ):
        plugin.replace_lora_weights_loftq(model, folders[1])
    with pytest.raises(ValueError, match="no packed layer with LoRA named 'other'"):
        plugin.replace_lora_weights_loftq(model, folders[0], adapter_name="other")


def test_loftq_reads_what_transformers_turned(tmp_path):
    """GPT-2's layers are Conv1D, [in, out]. test_integration_peft_experts.py has a mixture's."""
    import tiny_models as tiny

    dense = tiny.make("gpt2")
    dense.save_pretrained(tmp_path)
    model = qlora_ext.quantize_model(tiny.make("gpt2"), progress_bar=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))

    def errors():
        found = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, plugin.PeftLoraLinear4bit):
                continue
            name = name.removeprefix("base_model.model.")
            weight = dense.get_submodule(name).weight
            weight = weight.T if layer.base_layer.from_conv1d else weight
            lost = weight - plugin.dequantize(layer.base_layer) - layer.get_delta_weight("default")
            found[name] = lost.norm().item()
        return found

    before = errors()
    assert before
    peft.replace_lora_weights_loftq(model, tmp_path)
    assert all(error < 0.9 * before[name] for name, error in errors().items())


def test_loftq_callback_takes_a_layer_back(folders):
    model = adapted(folders)
    before = logits(model)
    plugin.replace_lora_weights_loftq(model, folders[0], callback=lambda model, name: False)
    assert torch.equal(logits(model), before)


def test_weighted_adapters(folders):
    model = adapted(folders)
    model.add_adapter("second", lora_config())
    model.set_adapter("second")
    randomize(model, seed=3)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    assert count_calls("lora_gemm_4bit", model.eval()) == 4


# Copying, compiling, optimizers ---------------------------------------------------------------


def test_deepcopy_and_pickle(folders, tmp_path):
    model = adapted(folders)
    model.merge_adapter()
    for again in [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]:
        assert torch.equal(logits(again), logits(model))
        again.unmerge_adapter()
        assert isinstance(lora_layers(again)[0].base_layer, Linear4bit)
    model.unmerge_adapter()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(model))


def test_layer_compiles_in_one_graph(folders):
    layer = lora_layers(adapted(folders))[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got, want = compiled(x), layer(x)
    torch.testing.assert_close(got, want)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for a, b in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_optimizers(folders, name):
    optim = pytest.importorskip("bitsandbytes").optim
    model = adapted(folders).train()
    try:
        optimizer = getattr(optim, name)(
            (p for p in model.parameters() if p.requires_grad), lr=1e-2
        )
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no {name} here: {error}")
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_config_is_json_for_loggers(folders):
    # TensorBoard's and other callbacks write the config's JSON.
    assert '"quant_method": "qlora_ext"' in adapted(folders).config.to_json_string()


# Other tuners --------------------------------------------------------------------------------

SUPPORTED = {
    "ADALORA": lambda: peft.AdaLoraConfig(
        target_r=2, init_r=4, total_step=10, target_modules=ATTENTION
    ),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=ATTENTION),
    "HIRA": lambda: peft.HiraConfig(r=4, target_modules=ATTENTION),
    "IA3": lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=["v_proj"]),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=ATTENTION),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    "PVERA": lambda: peft.PveraConfig(r=4, target_modules=ATTENTION),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=ATTENTION),
    "ROAD": lambda: peft.RoadConfig(group_size=8, target_modules=ATTENTION),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=ATTENTION),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=ATTENTION),
}

# Before 0.20 PEFT asks nobody to read the weight for these.
OLD = {name: SUPPORTED.pop(name) for name in list(SUPPORTED) if name not in versions.SUPPORTED}
OFT = {**SUPPORTED, **OLD}["OFT"]
OLD = {name: make for name, make in OLD.items() if hasattr(peft.PeftType, name)}

REFUSED = {
    **OLD,
    "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=ATTENTION),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=ATTENTION),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=ATTENTION),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=8, target_modules=ATTENTION),
    "VBLORA": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=8, vector_length=8, target_modules=ATTENTION
    ),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=ATTENTION),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_tuner_trains_and_merges_right(folders, name):
    model = randomize(peft.get_peft_model(base_model(folders), SUPPORTED[name]()))
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    before, bytes_before = logits(model), packed_state(model)
    assert not torch.equal(before, logits(base_model(folders)))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    after = packed_state(model)
    assert after.keys() == bytes_before.keys()
    assert all(torch.equal(after[key], bytes_before[key]) for key in after)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    torch.testing.assert_close(logits(merged), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_other_tuner_is_refused_with_a_sentence(folders, name):
    base = base_model(folders)
    before = logits(base)
    with pytest.raises(ValueError, match=f"PEFT's {name} cannot train a 4-bit layer"):
        peft.get_peft_model(base, REFUSED[name]())
    assert torch.equal(logits(base), before)


def test_no_tuner_of_peft_slips_through(folders):
    """Whatever tuner PEFT has, it is supported, refused, or leaves packed layers alone."""
    from peft.tuners.tuners_utils import BaseTuner

    for tuner in _subclasses(BaseTuner):
        if "_create_and_replace" in vars(tuner):
            assert hasattr(vars(tuner)["_create_and_replace"], "__wrapped__"), tuner


def test_adalora_allocates_ranks(folders):
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, tinit=1, tfinal=1, deltaT=1, total_step=6, target_modules=ATTENTION
    )
    model = randomize(peft.get_peft_model(base_model(folders), config)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(5):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_two_kinds_of_tuner_on_one_layer_are_refused(folders):
    model = peft.PeftMixedModel(base_model(folders), lora_config(), "default")
    said = "on .*: this 4-bit layer has LORA already" if "OFT" in SUPPORTED else "cannot train"
    with pytest.raises(ValueError, match=f"OFT {said}"):
        model.add_adapter("second", OFT())


def test_other_tuners_still_work_on_dense_models(folders):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folders[0])
    model = peft.get_peft_model(base, SUPPORTED["IA3"]())
    assert logits(model.merge_and_unload()).isfinite().all()


# What loses adapters or leaves half a model ---------------------------------------------------


@pytest.mark.parametrize("method", ["LORA", "OFT"])
def test_layers_with_our_adapter_are_refused(folders, method):
    model = base_model(folders)
    qlora_ext.add_lora(model)
    config = lora_config() if method == "LORA" else peft.OFTConfig(target_modules=ATTENTION)
    with pytest.raises(ValueError, match=rf"PEFT's {method} on model.*_proj: it has an adapter of"):
        peft.get_peft_model(model, config)


def test_our_adapter_on_a_dense_layer_is_refused(folders):
    model = base_model(folders)
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(query=False, value=False, head=True))
    with pytest.raises(ValueError, match=r"on lm_head: it has an adapter of qlora_ext\.add"):
        peft.get_peft_model(model, lora_config(target_modules=["lm_head"]))


def test_unload_while_merged_is_refused(folders):
    model = adapted(folders)
    before = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unload: the adapters of .*q_proj are merged"):
        model.unload()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    packed = sum(isinstance(m, Linear4bit) for m in model.unload().modules())
    assert packed == sum(isinstance(m, Linear4bit) for m in base_model(folders).modules())


@pytest.mark.parametrize("how", ["first", "second"])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"modules_to_save": ["o_proj"]}, "modules_to_save names a Linear4bit, whose packed weig"),
        (
            {"target_parameters": ["o_proj.weight_absmax"]},
            "target_parameters got .*o_proj.weight_absmax of a 4-bit layer",
        ),
    ],
)
def test_a_refused_setting_leaves_the_model_as_it_was(folders, how, settings, message):
    """Layers that PEFT wrapped before the one that is refused are put back, and train as before."""
    model = base_model(folders)
    if how == "second":
        wrapped = peft.get_peft_model(model, lora_config())

    def look():
        layers = [(name, type(module)) for name, module in model.named_modules()]
        ranks = [dict(m.r) for m in model.modules() if hasattr(m, "lora_A")]
        return layers, ranks, {n: p.requires_grad for n, p in model.named_parameters()}

    before = look()
    with pytest.raises(ValueError, match=message):
        if how == "first":
            peft.get_peft_model(model, lora_config(**settings))
        else:
            wrapped.add_adapter("other", lora_config(**settings))
    assert look() == before
    if how == "second":
        wrapped.add_adapter("other", lora_config())
    else:
        peft.get_peft_model(model, lora_config())


def test_merging_refuses_a_value_outside_the_adapted_layers_and_changes_nothing(folders):
    model = adapted(folders)
    with torch.no_grad():
        model.base_model.model.model.norm.weight[0] = float("inf")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"merge_and_unload: .*model.norm.weight holds 1 value of"):
        model.merge_and_unload()
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_model_of_inference_mode_is_refused_before_it_trains(folders):
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(folders[0])
    with torch.inference_mode():
        model = qlora_ext.quantize_model(dense, progress_bar=False)
    with pytest.raises(ValueError, match=r"PEFT's LORA on model\.layers\.0.* under torch"):
        peft.get_peft_model(model, lora_config())
    model = peft.get_peft_model(model, lora_config(inference_mode=True))
    torch.testing.assert_close(logits(model), logits(base_model(folders)))


def test_a_refusal_in_inference_mode_is_what_is_said(folders):
    """Undoing it must not set `requires_grad` of tensors that take no setting."""
    with torch.inference_mode():
        model = base_model(folders)
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone(), False)
        layer = model.model.layers[0].self_attn.q_proj
        layer.weight = torch.nn.Parameter(layer.weight.clone(), False)
    for parameter in model.parameters():
        if not parameter.is_inference() and parameter.is_floating_point():
            parameter.requires_grad_(True)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"was made under torch\.inference_mode"):
        peft.get_peft_model(model, lora_config())
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_an_undo_that_fails_leaves_the_first_error_and_the_rest_goes_on(folders, monkeypatch):
    model = base_model(folders)
    names = [name for name, _ in model.named_modules()]
    put_back = tuners._put_back

    def fails_once(module, attributes):
        put_back(module, attributes)
        if module is model:
            raise RuntimeError("undo")

    monkeypatch.setattr(tuners, "_put_back", fails_once)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(ValueError, match="modules_to_save names a Linear4bit"):
        peft.get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


def test_attributes_are_put_back_whatever_they_hold():
    module = torch.nn.Linear(2, 2)
    module.notes, module.marks = {"a": torch.ones(2)}, {1}
    weight, notes = module.weight, module.notes
    before = tuners._attributes(module)
    module.weight = torch.nn.Parameter(torch.zeros(2, 2))
    module.notes["a"], module.notes["b"] = torch.zeros(2), 1
    module.marks.add(2)
    tuners._put_back(module, before)
    assert module.weight is weight and module.marks == {1}
    assert module.notes is notes and list(notes) == ["a"] and notes["a"].sum() == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite_are_neither_written_nor_read(folders, tmp_path, value):
    model = adapted(folders)
    model.add_adapter("other", lora_config())
    good = lora_layers(model)[0].lora_B["default"].weight
    kept = good.detach().clone()
    with torch.no_grad():
        good[0, 0] = value
    model.save_pretrained(tmp_path / "other", selected_adapters=["other"])
    for settings in ({}, {"state_dict": model.state_dict()}):
        with pytest.raises(OverflowError, match=r"save_pretrained: .*q_proj\.lora_B\.default\.we"):
            model.save_pretrained(tmp_path / "bad", **settings)
    assert not (tmp_path / "bad").exists()
    with torch.no_grad():
        good.copy_(kept)
    model.save_pretrained(tmp_path / "good")
    file = tmp_path / "good" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    key = next(iter(state))
    state[key].view(-1)[0] = value
    save_file(state, file)
    with pytest.raises(ValueError, match=rf"{key} has a NaN or Inf, want finite values"):
        peft.PeftModel.from_pretrained(base_model(folders), tmp_path / "good")


def test_adapters_beyond_the_dtype_after_a_cast_are_not_written(folders, tmp_path):
    model = adapted(folders)
    lora_layers(model)[0].lora_B["default"].weight.data.fill_(1e5)
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(OverflowError, match=r"save_pretrained: .* that torch\.float16 cannot hold"):
        model.half().save_pretrained(tmp_path / "half")


def test_a_weighted_adapter_that_is_not_finite_is_taken_away(folders):
    model = adapted(folders)
    model.add_adapter("other", lora_config())
    lora_layers(model)[0].lora_B["default"].weight.data.fill_(1e30)
    settings = {"combination_type": "linear"}
    with pytest.raises(ValueError, match=r"add_weighted_adapter: with weights .* holds 256 v"):
        model.add_weighted_adapter(["default", "other"], [1e30, 1e30], "sum", **settings)
    assert list(model.peft_config) == ["default", "other"]
    assert "sum" not in lora_layers(model)[0].lora_A
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", **settings)
    assert lora_layers(model)[0].lora_B["sum"].weight.isfinite().all()


# Hot-swapping --------------------------------------------------------------------------------


def saved_adapters(folders, tmp_path, *settings):
    """Folders of adapters with these settings, and the logits of each."""
    found = []
    for seed, kwargs in enumerate(settings):
        model = adapted(folders, seed=seed, **kwargs)
        model.save_pretrained(tmp_path / str(seed))
        found.append((tmp_path / str(seed), logits(model)))
    return found


@pytest.mark.skipif(PEFT < (0, 20), reason="PEFT's own swap compiles a dense model again, too")
def test_compiled_model_takes_other_adapters_without_compiling_again(folders, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    adapters = saved_adapters(
        folders,
        tmp_path,
        {"r": 4, "lora_alpha": 8},
        {"r": 8, "lora_alpha": 4},
        {"r": 2, "lora_alpha": 3, "use_rslora": False},
    )
    model = peft.PeftModel.from_pretrained(base_model(folders), adapters[0][0]).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    scalings = [s for layer in lora_layers(model) for s in layer.scaling.values()]
    assert scalings and all(isinstance(scaling, torch.Tensor) for scaling in scalings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for number, (path, want) in enumerate(adapters):
            if number:
                hotswap_adapter(model, str(path), adapter_name="default", torch_device="cpu")
            got = compiled(input_ids=ids()).logits
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 1e300])
def test_nothing_is_swapped_in_that_is_not_finite(folders, tmp_path, alpha):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from safetensors.torch import load_file, save_file

    ((path, want),) = saved_adapters(folders, tmp_path, {"r": 4})
    model = peft.PeftModel.from_pretrained(base_model(folders), path).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    with pytest.raises(ValueError, match=r"hotswap_adapter: lora_alpha is .*want a finite number"):
        hotswap_adapter(model, str(path), adapter_name="default", torch_device="cpu")
    (path / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(path / "adapter_model.safetensors")
    key = next(iter(weights))
    save_file({**weights, key: weights[key] * alpha}, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"hotswap_adapter: .* has a NaN or Inf"):
        hotswap_adapter(model, str(path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), want)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_tensor_as_scaling_gives_the_gradients_of_the_number(folders, dropout, compiled):
    model = adapted(folders, lora_dropout=dropout, target_modules="all-linear").train()

    def loss_and_gradients(run):
        model.zero_grad()
        torch.manual_seed(3)
        loss = run(input_ids=ids(), labels=ids()).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        return [loss.detach(), *gradients]

    want = loss_and_gradients(model)
    for layer in lora_layers(model):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    got = loss_and_gradients(run)
    assert len(got) == 1 + 2 * len(lora_layers(model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_tensors_as_scalings_merge_and_stack(folders):
    model = adapted(folders)
    model.add_adapter("second", lora_config(r=2, lora_alpha=6, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    want = logits(model)
    for layer in lora_layers(model):
        for name, scaling in layer.scaling.items():
            layer.scaling[name] = torch.tensor(scaling)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    before = packed_state(model)
    for names in (["second"], ["default", "second"]):
        model.merge_adapter(names)
        model.unmerge_adapter()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-4)


def test_scaling_that_is_a_vector_is_refused(folders):
    model = adapted(folders)
    lora_layers(model)[0].scaling["default"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"scaling has shape \[4\], want a number or a 0-d tensor"):
        logits(model)
