"""Packed embeddings with PEFT and transformers: adapters, merging, files, resizing, refusals."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny
from integration_helpers import run_python

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers

import qlora_ext
from qlora_ext.integrations import peft as plugin
from qlora_ext.integrations.peft import stand_in
from qlora_ext.nn import Embedding4bit, Linear4bit

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
TARGETS = {"llama": ["embed_tokens", "q_proj"], "gpt2": ["wte", "c_attn"]}


def unquantized(family="llama", **settings):
    return tiny.make(family, tie_word_embeddings=False, **settings)


def packed(family="llama", **settings):
    return qlora_ext.quantize_model(
        unquantized(family, **settings), quantize_embeddings=True, progress_bar=False
    )


def dequantized(model):
    """The same model with the table that the packed embedding stands for."""
    model = copy.deepcopy(model)
    for name, table in list(model.named_modules()):
        if isinstance(table, Embedding4bit):
            model.set_submodule(name, stand_in._dense(table, table.dtype))
    return model


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data += noise.to(parameter.dtype)
    return model


def adapted(model, seed=0, **settings):
    config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS["llama"], **settings})
    return randomize(peft.get_peft_model(model, config), seed)


def packed_bytes(model):
    return {k: v.clone() for k, v in model.state_dict().items() if v.dtype == torch.uint8}


def gradients(model):
    model.zero_grad()
    model(**tiny.inputs(model), labels=tiny.inputs(model)["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# LoRA ---------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_computes_and_learns_as_on_the_dequantized_table(family, variant):
    base = packed(family)
    settings = {"target_modules": TARGETS[family], **VARIANTS[variant]}
    torch.manual_seed(5)
    model = adapted(copy.deepcopy(base), **settings)
    torch.manual_seed(5)
    twin = adapted(dequantized(base), **settings)
    assert any(isinstance(m, plugin.LoraEmbedding4bit) for m in model.modules())
    torch.testing.assert_close(tiny.logits(model), tiny.logits(twin), rtol=1e-5, atol=1e-5)
    got, want = gradients(model), gradients(twin)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_merge_and_exact_unmerge(dtype, variant, adapters):
    model = adapted(packed(dtype=dtype), **VARIANTS[variant])
    if adapters == 2:
        second = {"r": 2, "target_modules": ["embed_tokens"], **VARIANTS[variant]}
        model.add_adapter("second", peft.LoraConfig(**second))
        model.base_model.set_adapter(["default", "second"])
        randomize(model, seed=1)
    before = packed_bytes(model)
    want = tiny.logits(model)
    # Merged, the sum is rounded once to the table's dtype; apart, each adapter's rows are.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), want, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    after = packed_bytes(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(tiny.logits(model), want)
    merged = model.merge_and_unload()
    table = merged.get_input_embeddings()
    assert type(table) is torch.nn.Embedding and table.weight.dtype == dtype
    assert table.padding_idx == 0
    assert not any(parameter.dtype == torch.uint8 for parameter in merged.parameters())
    torch.testing.assert_close(tiny.logits(merged), want, rtol=tolerance, atol=tolerance)


def test_merging_follows_the_dtype_that_was_asked_for():
    model = adapted(packed())
    want = tiny.logits(model)
    model.to(torch.bfloat16)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(tiny.logits(merged), want, rtol=0.1, atol=0.1)


def test_unloading_while_merged_is_refused_and_without_gives_the_packed_table():
    model = adapted(packed())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unload: the adapters of model\.embed_tokens are merged"):
        model.unload()
    model.unmerge_adapter()
    assert isinstance(model.unload().get_input_embeddings(), Embedding4bit)


def test_merging_to_4_bits_packs_the_table_again():
    model = adapted(packed(), target_modules=["embed_tokens"])
    with plugin.merging_to_4bit(), pytest.warns(UserWarning, match="keeps 5 to 10%"):
        merged = model.merge_and_unload()
    assert isinstance(merged.get_input_embeddings(), Embedding4bit)
    assert tiny.logits(merged).isfinite().all()


def test_merge_into_4bit_names_the_adapted_table(tmp_path):
    unquantized().save_pretrained(tmp_path)
    model = adapted(packed())
    with pytest.raises(ValueError, match="is a packed embedding with an adapter, want"):
        qlora_ext.merge_into_4bit(model, base=tmp_path)


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e300])
def test_a_scale_that_is_not_finite_is_refused(scale):
    lora = peft.LoraConfig(r=2, target_modules=["embed_tokens"], lora_alpha=scale)
    with pytest.raises(ValueError, match=r"embed_tokens: lora_alpha is .*, want a finite number"):
        peft.get_peft_model(packed(), lora)
    ada = peft.AdaLoraConfig(init_r=2, total_step=9, target_modules=["q_proj"], lora_alpha=scale)
    with pytest.raises(ValueError, match=r"^LoraConfig: .*lora_alpha is .*, want a fini"):
        peft.get_peft_model(packed(), ada)
    model = peft.get_peft_model(packed(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    layer = model.base_model.model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"^set_scale: model.embed_tokens: scale is .*, want a fi"):
        layer.set_scale("default", scale)
    assert layer.scaling["default"] == 4.0


def test_a_merge_that_is_not_finite_changes_nothing():
    model = adapted(packed(dtype=torch.float16), target_modules=["embed_tokens"])
    layer = model.base_model.model.model.embed_tokens
    layer.lora_embedding_A["default"].data.fill_(1e5)
    before = packed_bytes(model)
    with pytest.raises(
        ValueError, match=r"merge: .*embed_tokens.weight holds .* that torch.float16 cannot hold"
    ):
        model.merge_adapter()
    assert isinstance(layer.base_layer, Embedding4bit)
    assert all(torch.equal(packed_bytes(model)[key], value) for key, value in before.items())


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]], ids=str)
@pytest.mark.parametrize("how", [True, "auto"])
def test_table_beside_an_adapter_is_dense_and_stock_peft_reads_it(tmp_path, how, targets):
    unquantized().save_pretrained(tmp_path / "base")
    model = packed()
    table = qlora_ext.dequantize_4bit(model.get_input_embeddings().quantized)
    model = adapted(model, target_modules=targets)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=how)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [key for key, value in stored.items() if value.dtype == torch.uint8]
    kept = [k for k in stored if "embed_tokens" in k and "lora" not in k]
    if how == "auto" and targets == ["q_proj"]:
        assert kept == []  # PEFT stores it where it was adapted or resized
        return
    middle = ".base_layer" if targets == ["embed_tokens"] else ""
    assert kept == [f"base_model.model.model.embed_tokens{middle}.weight"]
    assert torch.equal(stored[kept[0]], table)
    again = peft.PeftModel.from_pretrained(packed(), tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert all(torch.equal(packed_bytes(again)[k], v) for k, v in packed_bytes(model).items())
    if how == "auto":
        return
    out = run_python(
        f"""
        import torch, peft, transformers
        base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
        model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
        table = model.get_input_embeddings()
        table = getattr(table, "base_layer", table).weight
        torch.save(table.detach(), {str(tmp_path / "table.pt")!r})
        print("read")
        """,
        without=("qlora_ext",),
    )
    assert "read" in out
    assert torch.equal(torch.load(tmp_path / "table.pt"), table)


def test_table_of_a_bf16_model_is_stored_in_bf16(tmp_path):
    model = adapted(packed(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert load_file(tmp_path / "adapter_model.safetensors")[key].dtype == torch.bfloat16


def test_another_table_beside_an_adapter_is_packed_on_loading(tmp_path):
    dense = adapted(unquantized(), target_modules=["q_proj"])
    dense.get_input_embeddings().weight.data.mul_(1.5)
    dense.save_pretrained(tmp_path, save_embedding_layers=True)
    model = peft.PeftModel.from_pretrained(packed(), tmp_path)
    want = Embedding4bit.from_embedding(dense.get_input_embeddings())
    got = model.get_input_embeddings()
    for key in ("weight", "weight_absmax", "weight_nested"):
        assert torch.equal(getattr(got, key), getattr(want, key))


def test_a_table_of_another_size_says_to_resize_before_packing(tmp_path):
    dense = unquantized()
    dense.resize_token_embeddings(100)
    adapted(dense, target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"shape \[100, 64\], want \[96, 64\] .* before it is p"):
        peft.PeftModel.from_pretrained(packed(), tmp_path)


def test_load_adapter_takes_the_models_own_table_and_no_other(tmp_path):
    model = adapted(packed(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "own", save_embedding_layers=True)
    got = qlora_ext.load_adapter(packed(), tmp_path / "own")
    torch.testing.assert_close(tiny.logits(got), tiny.logits(model))
    dense = adapted(unquantized(), target_modules=["q_proj"])
    dense.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    with pytest.raises(ValueError, match="want lora_A and lora_B of linear layers only"):
        qlora_ext.load_adapter(packed(), tmp_path / "other")


# Resizing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, {"new_num_tokens": 96}, {"pad_to_multiple_of": 32}], ids=str
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_resizing_to_the_same_size_changes_nothing(arguments, with_adapter):
    model = packed()
    want = tiny.logits(model)
    outer = adapted(model) if with_adapter else model
    with outer.disable_adapter() if with_adapter else torch.no_grad():
        outer.resize_token_embeddings(**arguments)
        assert model.config.vocab_size == 96
        assert torch.equal(tiny.logits(outer), want)


@pytest.mark.parametrize(
    "arguments", [{"new_num_tokens": 100}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}]
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_resizing_a_packed_table_says_to_resize_before_packing(arguments, with_adapter):
    model = packed()
    want = tiny.logits(model)
    outer = adapted(model) if with_adapter else model
    with pytest.raises(ValueError, match=r"the 96 of \w+'s Embedding4bit; .* before it is p"):
        outer.resize_token_embeddings(**arguments)
    if not with_adapter:
        assert torch.equal(tiny.logits(model), want)


def test_a_packed_head_is_seen_before_the_dense_table_is_resized():
    model = unquantized()
    model.lm_head = Linear4bit.from_linear(model.lm_head)
    with pytest.raises(
        ValueError, match=r"got 100 rows, want the 96 .*Linear4bit; .*_to_not_convert"
    ):
        model.resize_token_embeddings(100)
    assert model.get_input_embeddings().weight.shape[0] == 96


def test_what_the_error_says_works():
    dense = unquantized()
    dense.resize_token_embeddings(100)
    model = qlora_ext.quantize_model(dense, quantize_embeddings=True, progress_bar=False)
    assert model.get_input_embeddings().num_embeddings == 100
    model = qlora_ext.quantize_model(unquantized(), progress_bar=False)
    assert model.resize_token_embeddings(100).weight.shape == (100, 64)
    assert tiny.logits(model).shape[-1] == 100


# What trains rows or whole tables -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 6]},
        {"trainable_token_indices": {"embed_tokens": [5]}, "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_settings_that_train_the_table_say_to_keep_it_dense(settings):
    settings = {"target_modules": ["q_proj"], **settings}
    with pytest.raises(ValueError, match=r"names a Embedding4bit, .* quantize_embeddings=True"):
        adapted(packed(), **settings)
    model = adapted(qlora_ext.quantize_model(unquantized(), progress_bar=False), **settings)
    assert tiny.logits(model).isfinite().all()


@pytest.mark.parametrize("tuner", ["TrainableTokensConfig", "OFTConfig", "IA3Config", "LoHaConfig"])
def test_other_tuners_of_peft_say_to_keep_it_dense(tuner):
    settings = {"target_modules": ["embed_tokens"]}
    if tuner == "TrainableTokensConfig":
        settings["token_indices"] = [5, 6]
    if tuner == "IA3Config":
        settings["feedforward_modules"] = []
    model = packed()
    with pytest.raises(ValueError, match=r"cannot train model\.embed_tokens, an embedding that is"):
        peft.get_peft_model(model, getattr(peft, tuner)(**settings))
    assert isinstance(model.get_input_embeddings(), Embedding4bit)


def test_a_tied_table_is_not_packed_and_is_pefts_own_matter():
    model = qlora_ext.quantize_model(
        tiny.make("llama", tie_word_embeddings=True), quantize_embeddings=True, progress_bar=False
    )
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    tuned = adapted(model, ensure_weight_tying=True)
    assert type(tuned.base_model.model.model.embed_tokens) is peft.tuners.lora.Embedding
    assert tiny.logits(tuned).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        ("PromptTuningConfig", {}),
        ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
        ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
        ("PrefixTuningConfig", {}),
    ],
    ids=str,
)
def test_prompt_methods_compute_as_on_the_dequantized_table(config):
    name, settings = config

    def loss_and_gradients(base):
        torch.manual_seed(0)
        settings_ = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **settings}
        model = peft.get_peft_model(base, getattr(peft, name)(**settings_)).eval()
        batch = tiny.inputs(base)
        mask = torch.ones_like(batch["input_ids"])
        loss = model(**batch, attention_mask=mask, labels=batch["input_ids"]).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    base = packed()
    got, want = loss_and_gradients(base), loss_and_gradients(dequantized(base))
    assert len(want[1]) > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_another_table_in_its_place_is_used_and_saved(tmp_path):
    model = packed()
    model.set_input_embeddings(torch.nn.Embedding(96, 64))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_own_adapters_are_for_linear_layers():
    for targets in (["q_proj", "embed_tokens"], r".*\.embed_tokens"):
        with pytest.raises(ValueError, match="embed_tokens, a Embedding4bit, want linear layers"):
            qlora_ext.add_lora(packed(), qlora_ext.LoraConfig(target_modules=targets))


def test_a_head_tied_to_a_packed_table():
    model = packed()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(RuntimeError, match="PanelLinear: weight is uint8, the packed table that"):
        model(input_ids=torch.arange(4)[None])
