"""Models that accelerate offloads: adapters before and after, and what needs weights in memory."""

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import accelerate
import transformers

import qlora_ext

WAYS = ["cpu_offload", "disk_offload", "dispatch_model", "device_map"]
CONFIG = qlora_ext.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def packed(**settings):
    model = tiny.make("llama", tie_word_embeddings=False)
    return qlora_ext.quantize_model(model, progress_bar=False, **settings)


def offload(model, way, folder):
    """The model, offloaded; "device_map" saves it and loads it again."""
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if way == "disk_offload":
        return accelerate.disk_offload(model, folder / "disk", execution_device="cpu")
    if way == "dispatch_model":
        return accelerate.dispatch_model(model, MAP, main_device="cpu", offload_dir=folder / "part")
    model.save_pretrained(folder / "saved")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=MAP, offload_folder=folder / "part"
    )


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    return model


def with_adapter(model, config=CONFIG, seed=7):
    torch.manual_seed(seed)
    return randomize(qlora_ext.add_lora(model, config))


def on_meta(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return qlora_ext.save_adapter(with_adapter(packed()), tmp_path_factory.mktemp("adapter"))


# Ours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", [False, True])
def test_adapters_on_an_offloaded_model_compute_train_and_save(way, head, tmp_path):
    config = CONFIG
    if head:
        config = qlora_ext.LoraConfig(r=4, mlp=True, head=True, lora_dropout=0.0)
    whole = with_adapter(packed(), config)
    model = with_adapter(offload(packed(), way, tmp_path), config)
    names = on_meta(model)
    assert names and not [name for name in names if "lora_" in name]
    assert torch.equal(tiny.logits(model), tiny.logits(whole))
    assert tiny.train(model, 3) == tiny.train(whole, 3)
    assert on_meta(model) == names
    assert torch.equal(tiny.logits(model), tiny.logits(whole))
    paths = [qlora_ext.save_adapter(m, tmp_path / n) for m, n in ((model, "a"), (whole, "b"))]
    got, want = (load_file(path / "adapter_model.safetensors") for path in paths)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.parametrize("way", WAYS)
def test_load_adapter_onto_an_offloaded_model(way, adapter, tmp_path):
    model = qlora_ext.load_adapter(offload(packed(), way, tmp_path), adapter, trainable=True)
    whole = qlora_ext.load_adapter(packed(), adapter, trainable=True)
    assert torch.equal(tiny.logits(model), tiny.logits(whole))
    assert tiny.train(model, 3) == tiny.train(whole, 3)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_adapters_that_are_offloaded_themselves_save_and_are_overwritten(way, adapter, tmp_path):
    model = offload(qlora_ext.load_adapter(packed(), adapter), way, tmp_path)
    want = tiny.logits(qlora_ext.load_adapter(packed(), adapter))
    assert torch.equal(tiny.logits(model), want)
    again = qlora_ext.save_adapter(model, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (adapter / name).read_bytes()
    # An adapter that is fetched for each forward would not take the new values, nor train.
    other = offload(with_adapter(packed(), seed=8), way, tmp_path / "other")
    qlora_ext.load_adapter(other, adapter, trainable=True)
    assert torch.equal(tiny.logits(other), want)
    first, last = tiny.train(other, 4)
    assert last < first


def test_hooks_come_off_and_the_model_merges(adapter, tmp_path):
    model = offload(packed(), "disk_offload", tmp_path)
    model = qlora_ext.load_adapter(model, adapter)
    want = tiny.logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert on_meta(model) == []
    assert torch.equal(tiny.logits(model), want)
    merged = qlora_ext.merge_and_unload(model, torch.float32, progress_bar=False)
    torch.testing.assert_close(tiny.logits(merged), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offloaded_first", [True, False])
def test_merging_an_offloaded_model_says_what_to_do(way, offloaded_first, adapter, tmp_path):
    if offloaded_first:
        model = qlora_ext.load_adapter(offload(packed(), way, tmp_path), adapter)
    elif way == "device_map":
        return  # which loads the base alone
    else:
        model = offload(qlora_ext.load_adapter(packed(), adapter), way, tmp_path)
    want = tiny.logits(model)
    for op in ("merge_and_unload", "merge_into_4bit"):
        with pytest.raises(ValueError, match=rf"{op}: .* is offloaded .* without 'cpu' and 'disk'"):
            getattr(qlora_ext, op)(model)
    assert torch.equal(tiny.logits(model), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantizing_an_offloaded_model_changes_nothing(way, dtype, tmp_path):
    (tmp_path / "first").mkdir()
    model = offload(packed(), "device_map", tmp_path / "first")
    if way != "device_map":  # which gives a model its `dequantize`
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first/saved")
        model = offload(model, way, tmp_path)
    want = tiny.logits(model)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"dequantize: .* is offloaded .* without 'cpu' and 'disk'"
    ):
        model.dequantize(dtype)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert torch.equal(tiny.logits(model), want)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_quantizing_an_offloaded_model_says_what_to_do(way, tmp_path):
    model = offload(tiny.make("llama", tie_word_embeddings=False), way, tmp_path)
    want = tiny.logits(model)
    with pytest.raises(ValueError, match=r"quantize_model: .* is offloaded .* before it is offl"):
        qlora_ext.quantize_model(model)
    assert torch.equal(tiny.logits(model), want)


def test_layers_that_are_offloaded_as_a_block_are_refused(adapter):
    def blocks():
        return accelerate.cpu_offload(
            packed(), execution_device="cpu", preload_module_classes=["LlamaAttention"]
        )

    message = r"the weights of model\.layers\.0\.self_attn are offloaded together .* the adapters"
    with pytest.raises(ValueError, match=message):
        qlora_ext.add_lora(blocks(), CONFIG)
    with pytest.raises(ValueError, match=message):
        qlora_ext.load_adapter(blocks(), adapter)
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(blocks(), peft.LoraConfig(target_modules=["q_proj"]))


# PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_pefts_adapters_on_an_offloaded_model(way, settings, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **settings)

    def tuned(model):
        torch.manual_seed(3)
        return randomize(peft.get_peft_model(model, config))

    whole = tuned(packed(quantize_embeddings=True))
    model = tuned(offload(packed(quantize_embeddings=True), way, tmp_path))
    assert not [name for name in on_meta(model) if "lora_" in name]
    torch.testing.assert_close(tiny.logits(model), tiny.logits(whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiny.train(model, 3), tiny.train(whole, 3), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "tuned")
    again = peft.PeftModel.from_pretrained(packed(quantize_embeddings=True), tmp_path / "tuned")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model), rtol=1e-5, atol=1e-5)
    for op in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ValueError, match=rf"{op}: .* is offloaded .* without 'cpu' and 'disk'"):
            getattr(model, op)()
    with pytest.raises(ValueError, match=r"merge: .*q_proj: base_layer\.weight is offloaded"):
        model.base_model.model.model.layers[1].self_attn.q_proj.merge()


def test_dora_reads_the_bias_of_an_offloaded_layer():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)

    def tuned(model):
        torch.manual_seed(3)
        return randomize(peft.get_peft_model(model, config))

    def with_bias():
        return qlora_ext.quantize_model(tiny.make("qwen2"), progress_bar=False)

    whole = tuned(with_bias())
    model = tuned(accelerate.cpu_offload(with_bias(), execution_device="cpu"))
    names = on_meta(model)
    assert whole.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias is not None
    torch.testing.assert_close(tiny.logits(model), tiny.logits(whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiny.train(model, 3), tiny.train(whole, 3), rtol=1e-4, atol=1e-5)
    assert on_meta(model) == names


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_peft_loads_onto_an_offloaded_model_and_saves_what_is_offloaded(way, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    whole = randomize(peft.get_peft_model(packed(), config))
    want = tiny.logits(whole)
    whole.save_pretrained(tmp_path / "tuned")
    base = offload(packed(), way, tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "tuned")
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-5, atol=1e-5)
    offload(whole, way, tmp_path)
    whole.save_pretrained(tmp_path / "again")
    stored = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("tuned", "again")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[1][key], value) for key, value in stored[0].items())


def test_a_layer_of_another_tuner_is_not_merged_while_it_is_offloaded(tmp_path):
    """Its bias would have stayed on meta."""
    peft = pytest.importorskip("peft")
    model = tiny.make("qwen2", tie_word_embeddings=False)
    model = accelerate.cpu_offload(
        qlora_ext.quantize_model(model, progress_bar=False), execution_device="cpu"
    )
    config = peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])
    model = peft.get_peft_model(model, config)
    want = tiny.logits(model)
    with pytest.raises(ValueError, match=r"merge: .*q_proj: base_layer\.weight is offloaded"):
        model.base_model.model.model.layers[1].self_attn.q_proj.merge()
    assert torch.equal(tiny.logits(model), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tuner", ["IA3", "RandLora", "Road"])
def test_pefts_other_layers_on_an_offloaded_model(way, tuner, tmp_path):
    peft = pytest.importorskip("peft")
    settings = {
        "IA3": {"feedforward_modules": ["down_proj"]},
        "RandLora": {"r": 4},
        "Road": {"group_size": 4},
    }[tuner]
    config = getattr(peft, f"{tuner}Config")(target_modules=["q_proj", "down_proj"], **settings)

    def tuned(model):
        return peft.get_peft_model(model, config)

    whole, model = tuned(packed()), tuned(offload(packed(), way, tmp_path))
    torch.testing.assert_close(tiny.train(model, 3), tiny.train(whole, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(whole), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"merge_and_unload: .* is offloaded"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"merge: .*q_proj: base_layer\.weight is offloaded"):
        model.base_model.model.model.layers[1].self_attn.q_proj.merge()


@pytest.mark.parametrize("way", WAYS)
def test_pefts_adapters_on_an_offloaded_model_keep_the_dtype_asked_for(way, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])

    def tuned(model):
        torch.manual_seed(3)
        return randomize(peft.get_peft_model(model, config, autocast_adapter_dtype=False))

    whole = tuned(packed().to(torch.bfloat16))
    model = tuned(offload(packed().to(torch.bfloat16), way, tmp_path))
    assert not [name for name in on_meta(model) if "lora_" in name]
    dtypes = [
        {p.dtype for name, p in tuned.named_parameters() if "lora_" in name}
        for tuned in (model, whole)
    ]
    assert dtypes[0] == dtypes[1] and len(dtypes[0]) == 1
    torch.testing.assert_close(tiny.logits(model), tiny.logits(whole), rtol=1e-2, atol=1e-2)
