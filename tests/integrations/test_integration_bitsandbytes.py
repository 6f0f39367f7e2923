"""Checkpoints from and for the real bitsandbytes, and its layers on our kernels."""

import json
import types

import pytest
import torch

from integration_helpers import ids, logits, run_python, tiny_llama
from peers import assert_bitsandbytes_same, bitsandbytes_sees

pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

import bitsandbytes as bnb

import qlora_ext
from qlora_ext.integrations import bitsandbytes as plugin
from qlora_ext.nn import Linear4bit


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def dense_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


SETTINGS = {
    "nf4-nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4-nested": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "fp4-fp32-storage": {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": torch.float32,
    },
    "nf4-bf16-storage": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def theirs(request, llama, tmp_path_factory):
    """A folder that transformers + bitsandbytes wrote, their fp32 weights and their logits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, **SETTINGS[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=torch.float32
    )
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    # In this order: on some CPUs bitsandbytes repacks a layer's weight when it is evaluated.
    weights = dequantized(model)
    return path, weights, logits(model)


def dequantized(model) -> dict[str, torch.Tensor]:
    """The fp32 weights of every packed layer, ours or bitsandbytes'."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            weights[name] = bnb.functional.dequantize_4bit(module.weight.data, state).float()
        elif isinstance(module, Linear4bit):
            weights[name] = qlora_ext.dequantize_4bit(module.quantized, torch.float32)
    return weights


def assert_same_weights(got: dict, want: dict):
    assert got.keys() == want.keys() and len(got) == 14
    for name in want:
        assert_bitsandbytes_same(got[name], want[name], nested=True)


def reference_logits(llama, weights: dict) -> torch.Tensor:
    """Logits of the unquantized model with these weights, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return logits(model)


# Checkpoints ---------------------------------------------------------------------------------


def test_their_checkpoint_loads_and_is_saved_as_ours(theirs, llama, tmp_path):
    path, weights, their_logits = theirs
    ours = qlora_ext.from_pretrained(path)
    assert_same_weights(dequantized(ours), weights)
    want = reference_logits(llama, weights)
    their_error = (their_logits - want).abs().max()
    assert (logits(ours) - want).abs().max() <= 2 * their_error + 1e-5
    torch.testing.assert_close(logits(ours), want, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["checkpoint_format"]) == ("qlora_ext", "qlora_ext")
    again = qlora_ext.from_pretrained(tmp_path)
    assert_same_weights(dequantized(again), weights)
    assert torch.equal(logits(again), logits(ours))


def test_ours_loads_with_stock_transformers(theirs, tmp_path):
    from transformers import AutoModelForCausalLM

    path, weights, their_logits = theirs
    ours = qlora_ext.from_pretrained(path)
    qlora_ext.save_pretrained(ours, tmp_path, format="bitsandbytes")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    assert_same_weights(dequantized(stock), weights)
    # Evaluated in bf16 on some CPUs, whatever the dtype.
    torch.testing.assert_close(logits(stock), their_logits, rtol=5e-2, atol=5e-2)
    # Saving in their format leaves the model in ours.
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(qlora_ext.from_pretrained(tmp_path / "again")), logits(ours))


@pytest.mark.parametrize(
    "settings", [{"quant_type": "fp4"}, {"blocksize": 32}, {"double_quant": False}], ids=str
)
def test_a_model_we_packed_goes_there_and_back(llama, tmp_path, settings):
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=qlora_ext.QLoraExtConfig(**settings)
    )
    qlora_ext.save_pretrained(ours, tmp_path, format="bitsandbytes", max_shard_size="40KB")
    weights = dequantized(ours)
    assert_same_weights(dequantized(AutoModelForCausalLM.from_pretrained(tmp_path)), weights)
    back = qlora_ext.from_pretrained(tmp_path)
    assert_same_weights(dequantized(back), weights)
    assert torch.equal(logits(back), logits(ours))


def test_without_bitsandbytes_installed(llama, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    model.save_pretrained(tmp_path / "theirs")
    torch.save(dequantized(model), tmp_path / "weights.pt")
    run_python(
        f"""
        import torch, qlora_ext
        model = qlora_ext.from_pretrained({str(tmp_path / "theirs")!r}, dtype=torch.bfloat16)
        assert model.model.norm.weight.dtype == torch.bfloat16
        for name, want in torch.load({str(tmp_path / "weights.pt")!r}).items():
            layer = model.get_submodule(name)
            assert torch.equal(qlora_ext.dequantize_4bit(layer.quantized, torch.float32), want)
        qlora_ext.save_pretrained(model, {str(tmp_path / "back")!r}, format="bitsandbytes")
        """,
        without=("bitsandbytes",),
    )
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    # They dequantize in the dtype that the model was saved in.
    rounded = {name: weight.bfloat16().float() for name, weight in dequantized(model).items()}
    assert_same_weights(dequantized(back), rounded)


def test_base_and_adapter_load_without_us(llama, tmp_path):
    """What docs/serving.md promises: stock transformers, bitsandbytes and PEFT in a new process."""
    pytest.importorskip("peft")
    model = qlora_ext.quantize_model(dense_model(llama), progress_bar=False)
    qlora_ext.save_pretrained(model, tmp_path / "base", format="bitsandbytes")
    model = qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=4, lora_alpha=8)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    qlora_ext.save_adapter(model, tmp_path / "adapter")
    torch.save({"ids": ids(), "want": logits(model)}, tmp_path / "logits.pt")
    qlora_ext.merge_and_unload(model, torch.float32).save_pretrained(tmp_path / "merged")
    run_python(
        f"""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        folder = {str(tmp_path)!r}
        stored = torch.load(f"{{folder}}/logits.pt")
        def check(model, tolerance):
            with torch.no_grad():
                got = model.eval()(input_ids=stored["ids"]).logits
            torch.testing.assert_close(got, stored["want"], rtol=0, atol=tolerance)
        merged = AutoModelForCausalLM.from_pretrained(f"{{folder}}/merged")
        assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
        check(merged, 1e-3)
        base = AutoModelForCausalLM.from_pretrained(f"{{folder}}/base")
        with torch.no_grad():
            plain = base.eval()(input_ids=stored["ids"]).logits
        assert (plain - stored["want"]).abs().max() > 0.5
        assert "bitsandbytes" in type(base.model.layers[0].mlp.up_proj).__module__
        check(PeftModel.from_pretrained(base, f"{{folder}}/adapter"), 5e-2)
        """,
        without=("qlora_ext",),
    )


def test_settings_of_a_bitsandbytes_config():
    from transformers import BitsAndBytesConfig

    config = qlora_ext.QLoraExtConfig.from_bnb(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "q_proj"],
        )
    )
    assert (config.quant_type, config.double_quant, config.blocksize) == ("nf4", True, 64)
    assert config.modules_to_not_convert == ["lm_head", "q_proj"]
    assert not qlora_ext.QLoraExtConfig.from_bnb(BitsAndBytesConfig(load_in_4bit=True)).double_quant
    with pytest.raises(ValueError, match="load_in_4bit got False"):
        qlora_ext.QLoraExtConfig.from_bnb(BitsAndBytesConfig(load_in_8bit=True))


def test_layers_that_they_leave_unpacked(tmp_path):
    """What the model class protects (T5's wo) is not in the list that bitsandbytes' config keeps;
    Falcon's layers are no nn.Linear to transformers."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        BitsAndBytesConfig,
        FalconForCausalLM,
    )

    import tiny_models as tiny

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tiny.make("t5", d_ff=128).save_pretrained(tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "t5", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "theirs")
    want = dequantized(model)
    ours = qlora_ext.from_pretrained(tmp_path / "theirs", model_class=AutoModelForSeq2SeqLM)
    got = dequantized(ours)
    assert got.keys() == want.keys() and not any(name.endswith("wo") for name in got)
    assert all(torch.equal(got[name], want[name]) for name in want)
    qlora_ext.save_pretrained(ours, tmp_path / "back", format="bitsandbytes")
    stock = dequantized(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back"))
    assert got.keys() == stock.keys()
    assert all(torch.equal(got[name], stock[name]) for name in got)

    tiny.make("falcon").save_pretrained(tmp_path / "falcon")
    model = FalconForCausalLM.from_pretrained(tmp_path / "falcon", quantization_config=config)
    model.save_pretrained(tmp_path / "unpacked")
    with pytest.raises(ValueError, match="found no packed layer in the checkpoint of Falcon"):
        qlora_ext.from_pretrained(tmp_path / "unpacked")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "falcon", quantization_config=qlora_ext.QLoraExtConfig()
    )
    with pytest.raises(ValueError, match="is a FalconLinear in FalconForCausalLM, which stock"):
        qlora_ext.save_pretrained(model, tmp_path / "no", format="bitsandbytes")
    assert not (tmp_path / "no").exists()


def test_what_their_format_cannot_hold_is_refused(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    def load(**settings):
        return AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=qlora_ext.QLoraExtConfig(**settings)
        )

    for settings in [{"quant_type": "linear"}, {"blocksize": None}]:
        with pytest.raises(ValueError, match="bitsandbytes has only nf4 and fp4, linear layers"):
            qlora_ext.save_pretrained(load(**settings), tmp_path, format="bitsandbytes")
    with pytest.raises(ValueError, match="format got 'gguf'"):
        qlora_ext.save_pretrained(load(), tmp_path, format="gguf")
    dense = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(ValueError, match="not quantized by qlora_ext"):
        qlora_ext.save_pretrained(dense, tmp_path, format="bitsandbytes")
    import peft

    tuned = load()
    peft.get_peft_model(tuned, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters of PEFT"):
        qlora_ext.save_pretrained(tuned, tmp_path, format="bitsandbytes")
    with pytest.raises(ValueError, match="is not quantized, want a 4-bit"):
        qlora_ext.from_pretrained(llama)


def test_damaged_statistics_are_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=qlora_ext.QLoraExtConfig()
    )
    qlora_ext.save_pretrained(ours, tmp_path, format="bitsandbytes")
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    text = json.loads(bytes(tensors[key].tolist()))
    text["shape"] = [10**9, -1]
    tensors[key] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight cannot be loaded \(QuantizedTensor"):
        qlora_ext.from_pretrained(tmp_path)


# Their layers on our kernels -----------------------------------------------------------------


@pytest.fixture
def enabled():
    plugin.enable()
    yield
    plugin.disable()


def theirs_and_ours(run):
    """run() on bitsandbytes' kernels, and on ours."""
    theirs = run()
    plugin.enable()
    try:
        assert plugin.is_enabled()
        return theirs, run()
    finally:
        plugin.disable()


def layer(quant_type="nf4", nested=True, storage=torch.uint8, bias=True):
    torch.manual_seed(0)
    dense = torch.nn.Linear(128, 96, bias=bias)
    linear = bnb.nn.Linear4bit(
        128, 96, bias=bias, compute_dtype=torch.float32, compress_statistics=nested,
        quant_type=quant_type, quant_storage=storage,
    )  # fmt: skip
    linear.load_state_dict(dense.state_dict())
    return linear.to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_linear4bit_gives_the_same(quant_type, nested, storage):
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def run():
        linear = layer(quant_type, nested, storage).train()
        y = linear(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        state = linear.weight.quant_state
        weight = bnb.functional.dequantize_4bit(linear.weight.data, state)
        with torch.no_grad():
            evaluated = linear.eval()(x)
        return y.detach(), gradient, evaluated, weight, linear.weight.data

    want, got = theirs_and_ours(run)
    assert torch.equal(got[4].view(torch.uint8), want[4].view(torch.uint8))
    torch.testing.assert_close(got[3], want[3], rtol=0, atol=0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2], want[0], rtol=1e-4, atol=1e-5)
    again = run()
    for a, b in zip(again[:2], want[:2], strict=True):
        assert torch.equal(a, b)


def test_our_kernel_is_what_runs(enabled):
    linear = layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(torch.randn(3, 128, requires_grad=True)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "qlora_ext::gemm_4bit" in names
    assert "qlora_ext::dequantize_4bit" in names


def test_blocks_that_straddle_rows(enabled):
    # bitsandbytes 0.50.2 takes other blocks' scales there, on CPUs with AVX-512.
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    got = bnb.functional.dequantize_4bit(packed, state)
    want = qlora_ext.dequantize_4bit(qlora_ext.quantize_4bit(weight, double_quant=False))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 1280), (5000,), (63,), (1,), (2, 2), (33, 17), (5, 7, 64)])
def test_packs_the_same_bytes_and_gives_them_back(shape, quant_type, dtype):
    """Integers lie halfway between two levels now and then; blocks that are not full, values near
    zero and both zeros are there, and weights of any number of dimensions."""

    def run():
        results = []
        for weight in weights:
            for blocksize in (32, 64, 4096):
                packed, state = bnb.functional.quantize_4bit(
                    weight, blocksize=blocksize, quant_type=quant_type
                )
                results += [packed, state.absmax]
                if weight.dim() == 1 or weight.shape[-1] % blocksize == 0:
                    results.append(bnb.functional.dequantize_4bit(packed, state))
        return results

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator)
    halves = torch.randint(-12, 13, shape, generator=generator).float()
    halves.view(-1)[:4] = torch.tensor([-1e-5, 1e-5, 0.0, -0.0])[: halves.numel()]
    weights = [normal.to(dtype), halves.to(dtype), torch.zeros(shape, dtype=dtype)]
    with torch.compiler.set_stance("force_eager"):  # theirs compiles a kernel for each odd shape
        want, got = theirs_and_ours(run)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype and torch.equal(g, w)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_tiny_blocks_to_the_same_bytes(dtype, quant_type):
    """bitsandbytes divides no block by less than 1e-38; fp32 and bf16 have smaller values."""

    def run():
        return [
            bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
            for weight in weights
            for blocksize in (32, 64, 4096)
        ]

    normal = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    normal[100:300] = 0.0  # blocks of zeros among them
    normal[300] = -0.0
    normal /= normal.abs().max()
    largest = (1e-37, 1.1e-38, 1.0001e-38, 1e-38, 9.99e-39, 5e-39, 1e-39, 1e-41, 1.5e-45)
    weights = [(normal * value).to(dtype) for value in largest]
    mixed = normal.clone()
    mixed[1024:2048] *= 1e-39
    weights.append(mixed.to(dtype))
    want, got = theirs_and_ours(run)
    for (packed, state), (their_packed, their_state) in zip(got, want, strict=True):
        assert torch.equal(packed, their_packed)
        assert torch.equal(state.absmax, their_state.absmax)


def test_differences_that_the_page_names():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))

    def run(weight):
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return bnb.functional.dequantize_4bit(packed, state)

    theirs = run(weight)
    run(weight * torch.nan)
    plugin.enable()
    try:
        ours = run(weight)
        with pytest.raises(RuntimeError, match="weight has a NaN or an infinity"):
            run(weight * torch.nan)
    finally:
        plugin.disable()
    errors = [(w - weight).norm() / weight.norm() for w in (ours, theirs)]
    assert errors[0] < 0.1  # rows of 96 in blocks of 64
    assert errors[1] > 0.15 if bitsandbytes_sees("avx512f") else errors[1] == errors[0]


def test_enabling_twice_and_disabling_twice():
    plugin.enable()
    plugin.enable()
    plugin.disable()
    plugin.disable()
    assert not plugin.is_enabled()
    layer()(torch.randn(2, 128))


@pytest.mark.parametrize("name", ["gemm_4bit", "_convert_weight_packed_for_cpu"])
def test_a_release_that_lacks_what_we_replace_is_refused_whole(monkeypatch, name):
    """As 0.48 and 0.49, which have no op for the product."""
    if name == "gemm_4bit":
        monkeypatch.setattr(torch.ops, "bitsandbytes", types.SimpleNamespace())
    else:
        monkeypatch.delattr(bnb.nn.modules, name)
    with pytest.raises(RuntimeError, match=rf"found bitsandbytes .* has no {name}, want 0\.50"):
        plugin.enable()
    assert not plugin.is_enabled()
    assert "qlora_ext" not in torch._C._dispatch_dump("bitsandbytes::quantize_4bit")


def test_peft_on_bitsandbytes_layers(llama, enabled):
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        llama,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    )
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
