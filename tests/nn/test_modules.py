"""nn.Linear4bit, LoraLinear4bit, LoraLinear and Embedding4bit."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import qlora_ext
import reference as R
from cases import as_array
from qlora_ext import QuantConfig
from qlora_ext.nn import Embedding4bit, Linear4bit, LoraLinear, LoraLinear4bit, PanelLinear

CONFIGS = {
    "default": QuantConfig(),
    "fp4": QuantConfig(quant_type="fp4", blocksize=128),
    "single": QuantConfig(double_quant=False),
    "standard": QuantConfig(normalization="standard", blocksize=32),
    "none": QuantConfig(quant_type="linear", normalization="none", blocksize=None),
    "tensor": QuantConfig(blocksize=None),
    "companded": QuantConfig(quant_type="linear", companding="logarithmic", companding_k=15.0),
    "custom": QuantConfig(quant_type="custom", codebook=tuple(np.linspace(-1, 1, 16))),
}
SHAPES = [(16, 64), (7, 33), (5, 96), (1, 1), (3, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def dense_layer(N, K, bias=True, dtype=torch.float32):
    layer = nn.Linear(K, N, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(seeded(N, K, seed=N + K, dtype=dtype) / 8)
    return layer


def packed_bytes(module):
    return {
        key: tensor.clone()
        for key, tensor in module.state_dict().items()
        if tensor.dtype == torch.uint8
    }


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == torch.uint8
        assert torch.equal(got[key], want[key]), key


# Forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_references(config, shape):
    N, K = shape
    dense = dense_layer(N, K)
    layer = Linear4bit.from_linear(dense, config)
    want = R.quantize_4bit(
        dense.weight.detach().numpy(),
        config.blocksize or 0,
        R.make_codebook(config.quant_type, config.codebook, config.companding, config.companding_k),
        config.double_quant,
        config.normalization,
        config.std_factor,
    )
    got = as_array(layer.quantized, config)
    np.testing.assert_array_equal(got.packed, want.packed)
    np.testing.assert_array_equal(got.absmax, want.absmax)
    np.testing.assert_array_equal(got.codebook.values, want.codebook.values)
    if want.nested is not None:
        np.testing.assert_array_equal(got.nested, want.nested)
    if want.mean is not None:
        np.testing.assert_array_equal(got.mean, want.mean)
    x = seeded(2, 3, K)
    y = R.linear_4bit(x.numpy(), want, dense.bias.detach().numpy())
    np.testing.assert_allclose(layer(x).detach().numpy(), y, rtol=1e-4, atol=1e-5)
    assert layer(x).shape == (2, 3, N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtype_follows_x_and_autocast(dtype):
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    assert layer(seeded(2, 64, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(seeded(2, 64, dtype=torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_autocast_does_not_take_what_torchs_own_leaves_alone(dtype):
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    adapted = LoraLinear4bit.from_linear(layer, r=2)
    x = torch.ones(2, 64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for module in (layer, adapted):
            with pytest.raises(RuntimeError, match=f"x has dtype {str(dtype)[6:]}, want float32"):
                module(x)
        with pytest.raises(RuntimeError, match=f"x has dtype {str(dtype)[6:]}, want float32"):
            qlora_ext.linear_4bit(x, layer.quantized)


def test_empty_batch_and_no_bias():
    layer = Linear4bit.from_linear(dense_layer(16, 64, bias=False))
    assert layer.bias is None
    assert layer(torch.zeros(0, 64)).shape == (0, 16)


def test_non_contiguous_input():
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    x = seeded(64, 6).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_gradient_reaches_x_and_bias_but_not_the_bytes():
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    x = seeded(4, 64).requires_grad_()
    dY = seeded(4, 16, seed=1)
    layer(x).backward(dY)
    want, dbias = R.linear_4bit_backward(dY.numpy(), as_array(layer.quantized, layer.config))
    np.testing.assert_allclose(x.grad.numpy(), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.bias.grad.numpy(), dbias, rtol=1e-5)
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias")


def test_packed_tensors_are_frozen_bytes():
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    parameters = dict(layer.named_parameters())
    statistics = {"weight_absmax", "weight_nested", "weight_codebook"}
    assert set(parameters) == {"weight", "bias"} | statistics
    assert parameters["weight"].shape == (16, 32)
    assert not any(p.requires_grad for n, p in parameters.items() if n != "bias")
    # accelerate's FSDP2 plug-in wants every entry of a state dict to be a parameter.
    assert set(layer.state_dict()) == set(parameters)
    assert isinstance(layer, nn.Linear)
    assert "nf4" in repr(layer)


def test_fresh_layer_works_like_nn_linear():
    layer = Linear4bit(64, 16)
    assert layer(seeded(2, 64)).std() > 0.1
    bound = 1 / math.sqrt(64)
    assert layer.quantized.shape == (16, 64)
    assert layer.bias.abs().max() <= bound


# Moving, copying, saving --------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.device("cpu"), torch.float16).float(),
    ],
    ids=["half", "bfloat16", "float", "to", "type", "there_and_back"],
)
def test_casting_leaves_bytes_alone(config, move):
    layer = Linear4bit.from_linear(dense_layer(7, 33), config)
    want = packed_bytes(layer)
    parent = move(nn.Sequential(layer))
    assert_same_bytes(packed_bytes(parent[0]), want)
    assert layer.dtype == layer.bias.dtype == layer.quantized.dtype
    assert layer(seeded(2, 33, dtype=layer.dtype)).dtype == layer.dtype


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: _torch_save_and_load(m),
        lambda m: _through_state_dict(m, assign=False),
        lambda m: _through_state_dict(m, assign=True),
    ],
    ids=["deepcopy", "pickle", "torch_save", "state_dict", "state_dict_to_meta"],
)
def test_copies_are_equal(config, duplicate):
    layer = Linear4bit.from_linear(dense_layer(7, 33), config)
    other = duplicate(layer)
    assert_same_bytes(packed_bytes(other), packed_bytes(layer))
    x = seeded(2, 33)
    assert torch.equal(other(x), layer(x))
    assert not other.weight.requires_grad


def _torch_save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def _through_state_dict(module, assign):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other = Linear4bit(33, 7, config=module.config, device="meta" if assign else None)
    other.load_state_dict(state, assign=assign)
    return other


def test_safetensors_round_trip(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    layer = LoraLinear4bit.from_linear(dense_layer(7, 33), r=2)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = LoraLinear4bit(33, 7, r=2, device="meta")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    # Memory-mapped tensors start anywhere; the ops would copy such a weight on every call.
    assert other.weight.data_ptr() % 16 == 0
    x = seeded(3, 33)
    assert torch.equal(other(x), layer(x))


def test_meta_device():
    dense = nn.Linear(64, 16, device="meta", dtype=torch.bfloat16)
    for layer in (Linear4bit.from_linear(dense), Linear4bit.empty_like(dense)):
        assert all(t.is_meta for t in layer.state_dict().values())
        assert layer.weight.shape == (16, 32) and layer.dtype == torch.bfloat16
    with torch.device("meta"):
        assert Linear4bit(64, 16).weight.is_meta
    filled = Linear4bit.empty_like(dense, device="cpu", dtype=torch.float32)
    filled.load_state_dict(Linear4bit(64, 16).state_dict())
    assert filled(seeded(1, 64)).isfinite().all()
    assert Embedding4bit(10, 64, device="meta").weight.is_meta


def test_initialisers_leave_the_bytes():
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    want = packed_bytes(layer)
    layer.reset_parameters()
    transformers_init = pytest.importorskip("transformers.initialization")
    transformers_init.normal_(layer.weight, mean=0.0, std=0.02)
    assert_same_bytes(packed_bytes(layer), want)


# Bad state dicts ----------------------------------------------------------------------------------


def load_error(state, config=None):
    layer = Linear4bit(64, 16, config=config)
    with pytest.raises(RuntimeError) as error:
        nn.ModuleDict({"q": layer}).load_state_dict({f"q.{k}": v for k, v in state.items()})
    return str(error.value)


def good_state(config=None):
    return dict(Linear4bit(64, 16, config=config).state_dict())


def test_missing_statistics_are_named_even_when_not_strict():
    state = good_state()
    del state["weight_nested"]
    assert "q.weight_nested is missing, want uint8 [8] in addition to q.weight" in load_error(state)
    with pytest.raises(RuntimeError, match="weight_nested is missing"):
        Linear4bit(64, 16).load_state_dict(state, strict=False)


def test_wrong_shape_is_named():
    state = good_state()
    state["weight"] = state["weight"][:, :-1]
    assert "q.weight has shape [16, 31], want [16, 32] for [16, 64] weights" in load_error(state)


def test_other_config_is_refused():
    message = load_error(good_state(QuantConfig(quant_type="fp4")))
    assert "q.weight_codebook holds [0.0, 0.0052" in message and "quant_type=nf4" in message
    message = load_error(good_state(), QuantConfig(double_quant=False))
    assert "q.weight_nested is unexpected" in message or "q.weight_absmax has shape" in message
    assert "weight_absmax has shape [16], want [8]" in load_error(
        good_state(), QuantConfig(blocksize=128)
    )


def test_damaged_statistics_are_refused():
    state = good_state()
    state["weight_nested"] = torch.full((2,), math.nan).view(torch.uint8)
    assert "q.weight_nested holds a NaN or an infinity" in load_error(state)


def test_scales_beyond_float32_are_refused():
    state = good_state()
    state["weight_nested"] = torch.full((2,), 3e38).view(torch.uint8)
    assert "q.weight_nested gives scales that float32 cannot hold" in load_error(state)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("key", ["weight", "weight_absmax", "weight_nested", "weight_codebook"])
def test_a_layer_with_data_takes_no_tensor_without(key, kind, assign):
    layer = Linear4bit(64, 16)
    want = packed_bytes(layer)
    state = dict(layer.state_dict())
    with FakeTensorMode():
        fake = torch.zeros(state[key].shape, dtype=torch.uint8)
    state[key] = fake if kind == "fake" else state[key].to("meta")
    with pytest.raises(RuntimeError, match=f"Linear4bit: {key} is a tensor without data"):
        layer.load_state_dict(state, assign=assign)
    assert packed_bytes(layer).keys() == want.keys()
    assert all(torch.equal(packed_bytes(layer)[name], want[name]) for name in want)


def test_packing_under_a_fake_mode_is_a_dry_run():
    net = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64))
    real = qlora_ext.quantize_model(copy.deepcopy(net), progress_bar=False)
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64))
        qlora_ext.quantize_model(fake, progress_bar=False)
        assert fake(torch.randn(2, 64)).shape == (2, 64)
    sizes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (real, fake)]
    assert sizes[0] == sizes[1]
    assert fake.quantization_report == real.quantization_report


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", ["linear", "small", "lora"])
@torch.no_grad()
def test_transforms_of_torch_func(kind, called):
    """Without a gradient vmap calls the op for each entry; with one torch refuses."""
    make = {
        "linear": lambda: Linear4bit(64, 48),
        "small": lambda: Linear4bit(4, 48),
        "lora": lambda: LoraLinear4bit(64, 48, r=4),
    }[kind]
    layer, other = make(), make()
    x = torch.randn(3, 2, layer.in_features)
    want = layer(x), torch.stack([layer(x[0]), other(x[0])])
    layer = copy.deepcopy(layer)
    if called:
        layer(x)
    stacked, _ = torch.func.stack_module_state([layer, other])
    got = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x[0],)))(stacked)
    torch.testing.assert_close(got, want[1])
    for transformed in (
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.func.grad(lambda x: layer(x).sum())(x),
    ):
        with torch.enable_grad(), pytest.raises(RuntimeError, match="setup_context"):
            transformed()
    torch.testing.assert_close(layer(x), want[0])


def test_a_layer_without_data_may_be_given_none():
    layer = Linear4bit(64, 16, device="meta")
    layer.load_state_dict(layer.state_dict(), assign=True)
    assert layer.weight.is_meta


def test_failed_load_changes_nothing():
    layer = Linear4bit(64, 16)
    want = packed_bytes(layer)
    state = good_state()
    state["weight_absmax"] = state["weight_absmax"][:-1]
    with pytest.raises(RuntimeError):
        layer.load_state_dict(state)
    assert_same_bytes(packed_bytes(layer), want)


# Bad arguments ------------------------------------------------------------------------------------


def test_bad_sources_are_refused():
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    with pytest.raises(TypeError, match="it is quantized already"):
        Linear4bit.from_linear(layer)
    with pytest.raises(TypeError, match="linear is a LayerNorm"):
        Linear4bit.from_linear(nn.LayerNorm(4))
    with pytest.raises(TypeError, match=r"dtype torch\.float64, want float32"):
        Linear4bit.from_linear(nn.Linear(4, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="parametrized"):
        Linear4bit.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="config is a str, want a QuantConfig"):
        Linear4bit(4, 4, config="nf4")
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        Linear4bit(4, 4, dtype=torch.int8)
    broken = dense_layer(16, 64)
    broken.weight.data[3, 5] = math.nan
    with pytest.raises(RuntimeError, match=r"NaN.*\[3, 5\]"):
        Linear4bit.from_linear(broken)


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel is not supported; .*torchrun"):
        Linear4bit(64, 16)._replicate_for_data_parallel()


def test_bad_inputs_are_refused():
    layer = Linear4bit.from_linear(dense_layer(16, 64))
    with pytest.raises(RuntimeError, match=r"x has shape \[2, 63\], want \[\.\.\., 64\]"):
        layer(torch.zeros(2, 63))
    with pytest.raises(TypeError, match=r'T5.*modules_to_not_convert=\["wo"\]'):
        layer(torch.zeros(2, 64).to(layer.weight.dtype))
    with pytest.raises(RuntimeError, match="x has dtype int64"):
        layer(torch.zeros(2, 64, dtype=torch.int64))


@pytest.mark.parametrize("r", [0, -1, True, 2.0])
def test_bad_rank_is_refused(r):
    with pytest.raises(ValueError, match=r"r is .*, want an integer of 1 or more"):
        LoraLinear4bit(64, 16, r=r)
    with pytest.raises(ValueError, match="want an integer of 1 or more"):
        LoraLinear.from_linear(dense_layer(16, 64), r=r)


def test_bad_lora_arguments_are_refused():
    base = Linear4bit.from_linear(dense_layer(16, 64))
    with pytest.raises(ValueError, match="lora_dropout is 1"):
        LoraLinear4bit.from_linear(base, lora_dropout=1)
    for alpha in (0, -1, float("nan"), float("inf"), "16", True):
        with pytest.raises(ValueError, match=r"lora_alpha is .*, want a finite number above 0"):
            LoraLinear4bit.from_linear(base, lora_alpha=alpha)
    with pytest.raises(TypeError, match=r"lora_dtype is torch\.float64"):
        LoraLinear4bit.from_linear(base, lora_dtype=torch.float64)
    with pytest.raises(TypeError, match="config is given for a layer that is quantized already"):
        LoraLinear4bit.from_linear(base, QuantConfig(blocksize=32))
    with pytest.raises(TypeError, match="want a layer without an adapter"):
        LoraLinear4bit.from_linear(LoraLinear4bit.from_linear(base))
    with pytest.raises(TypeError, match="with a dense weight"):
        LoraLinear.from_linear(base)


# LoRA ---------------------------------------------------------------------------------------------


def adapted(N=16, K=64, r=4, dtype=torch.float32, lora_dtype=torch.float32, **settings):
    base = Linear4bit.from_linear(dense_layer(N, K, dtype=dtype))
    layer = LoraLinear4bit.from_linear(base, r=r, lora_dtype=lora_dtype, **settings)
    with torch.no_grad():
        layer.lora_B.copy_(seeded(N, r, seed=5) / 4)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "low"])
def test_lora_forward_and_gradients_are_the_references(dtype, low):
    layer = adapted(dtype=dtype, lora_dtype=dtype if low else torch.float32)
    x = seeded(2, 3, 64, dtype=dtype).requires_grad_()
    dY = seeded(2, 3, 16, seed=9, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dY)
    q = as_array(layer.quantized, layer.config)
    x64, dY64, A, B = (t.detach().double().numpy() for t in (x, dY, layer.lora_A, layer.lora_B))
    assert layer.scaling == 4
    want = R.linear_4bit(x64, q, layer.bias.detach().double().numpy(), A, B, layer.scaling)
    gradients = R.lora_linear_4bit_backward(dY64, x64, q, A, B, layer.scaling)
    eps = torch.finfo(dtype).eps
    for got, expected in zip((y, x.grad, layer.lora_A.grad, layer.lora_B.grad), (want, *gradients)):
        error = np.abs(got.detach().double().numpy() - expected).max()
        assert error <= 4 * eps * np.abs(expected).max() + 1e-5


def test_fresh_adapter_changes_nothing():
    base = Linear4bit.from_linear(dense_layer(16, 64))
    layer = LoraLinear4bit.from_linear(base)
    x = seeded(3, 64)
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight and layer.bias is base.bias
    assert "lora_A" not in dict(base.named_parameters())
    assert layer.lora_A.std() > 0 and not layer.lora_B.any()
    assert layer.lora_A.dtype == torch.float32 and layer.lora_A.requires_grad


def test_adapted_layer_takes_hooks_of_its_own():
    base = Linear4bit.from_linear(dense_layer(16, 64))
    calls = []
    base.register_forward_hook(lambda *_: calls.append("base"))
    layer = LoraLinear4bit.from_linear(base)
    layer.register_forward_hook(lambda *_: calls.append("lora"))
    base(seeded(1, 64))
    assert calls == ["base"]
    layer(seeded(1, 64))
    assert calls == ["base", "base", "lora"]


def test_rslora_and_alpha_scale():
    assert adapted(r=4, lora_alpha=8).scaling == 2
    assert adapted(r=4, lora_alpha=8, use_rslora=True).scaling == 4
    layer = adapted(r=4, lora_alpha=8)
    for bad in (float("inf"), float("nan"), 1e300, "2", None, True, torch.tensor(float("inf"))):
        with pytest.raises(ValueError, match=r"LoraLinear4bit: scaling is .*, want a finite"):
            layer.scaling = bad
    assert layer.scaling == 2


def test_dropout_acts_on_the_bypass_input_only():
    layer = adapted(lora_dropout=0.5)
    x = torch.ones(1, 64)
    base = super(LoraLinear4bit, layer).forward(x)
    layer.eval()
    full = layer(x) - base
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x) - base for _ in range(400)])
    assert draws.std(0).min() > 0
    torch.testing.assert_close(draws.mean(0), full, atol=0.25, rtol=0.1)
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), base)


def test_dropout_gradient():
    layer = adapted(lora_dropout=0.3)
    x = seeded(5, 64).requires_grad_()
    torch.manual_seed(3)
    layer(x).sum().backward()
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x.detach(), 0.3)
    mask = dropped / x.detach()
    W = torch.from_numpy(R.dequantize_4bit(as_array(layer.quantized, layer.config)))
    ones = torch.ones(5, 16)
    dS = layer.scaling * ones @ layer.lora_B.detach()
    torch.testing.assert_close(
        x.grad, ones @ W + (dS @ layer.lora_A.detach()) * mask, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(layer.lora_A.grad, dS.T @ dropped, rtol=1e-4, atol=1e-4)


def test_lora_on_a_dense_layer():
    dense = dense_layer(16, 64)
    layer = LoraLinear.from_linear(dense, r=4, lora_alpha=8)
    with torch.no_grad():
        layer.lora_B.copy_(seeded(16, 4))
    x = seeded(3, 64)
    want = dense(x) + 2 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)
    assert layer.weight is dense.weight
    half = copy.deepcopy(layer)
    half.weight.data, half.bias.data = half.weight.bfloat16(), half.bias.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


# Embedding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_embedding_rows_are_the_references(config):
    table = nn.Embedding(50, 33)
    layer = Embedding4bit.from_embedding(table, config)
    dense = R.dequantize_4bit(as_array(layer.quantized, config))
    indices = torch.tensor([[0, 49], [7, 7]])
    np.testing.assert_array_equal(layer(indices).numpy(), dense[indices.numpy()])
    assert layer(indices).shape == (2, 2, 33)
    assert layer.to(torch.bfloat16)(indices).dtype == torch.bfloat16


def test_embedding_keeps_padding_idx():
    layer = Embedding4bit.from_embedding(nn.Embedding(50, 64, padding_idx=-1))
    assert layer.padding_idx == 49
    assert not layer(torch.tensor([49])).any()
    assert "padding_idx=49" in repr(layer)
    assert isinstance(copy.deepcopy(layer), nn.Embedding)


def test_bad_embeddings_are_refused():
    with pytest.raises(TypeError, match="max_norm is 1"):
        Embedding4bit.from_embedding(nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(TypeError, match="with a dense table"):
        Embedding4bit.from_embedding(Embedding4bit(4, 4))
    with pytest.raises(ValueError, match="padding_idx is 4, want within num_embeddings = 4"):
        Embedding4bit(4, 4, padding_idx=4)
    with pytest.raises(RuntimeError, match=r"indices has 4 .* want values in \[0, 4\)"):
        Embedding4bit(4, 4)(torch.tensor([4]))


# torch's own machinery ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_offload(use_reentrant):
    layer = adapted()
    x = seeded(4, 64).requires_grad_()
    layer(x).square().sum().backward()
    want = [x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
    x.grad = None
    layer.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for got, expected in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), want):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["base", "lora", "dropout", "embedding"])
def test_compiles_as_one_graph(kind):
    layer = {
        "base": lambda: Linear4bit.from_linear(dense_layer(16, 64)),
        "lora": adapted,
        "dropout": lambda: adapted(lora_dropout=1e-9),
        "embedding": lambda: Embedding4bit(16, 64),
    }[kind]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if kind == "embedding":
        indices = torch.tensor([3, 1])
        assert torch.equal(compiled(indices), layer(indices))
        return
    x = seeded(4, 64).requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    got = x.grad.clone()
    x.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(got, x.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_exports():
    layer = adapted().eval()
    exported = torch.export.export(layer, (seeded(4, 64),))
    x = seeded(4, 64, seed=2)
    torch.testing.assert_close(exported.module()(x), layer(x))


# Unquantized layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_panel_linear_is_nn_linear(dtype, rows):
    dense = dense_layer(16, 64, dtype=dtype)
    layer = PanelLinear.from_linear(dense, always=True)
    assert layer.weight is dense.weight and layer.bias is dense.bias
    assert layer.state_dict().keys() == dense.state_dict().keys()
    dY = seeded(rows, 16, seed=2, dtype=dtype)
    gradients = []
    for module in (layer, dense):
        x = seeded(rows, 64, dtype=dtype).requires_grad_()
        module.zero_grad()
        y = module(x)
        assert y.dtype == dtype
        y.backward(dY)
        gradients.append((y.detach(), x.grad, module.weight.grad, module.bias.grad))
    eps = 4 * torch.finfo(dtype).eps
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=eps, atol=eps * float(want.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=eps, atol=eps)


def test_panel_linear_under_autocast_and_with_an_adapter():
    layer = PanelLinear.from_linear(dense_layer(16, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(seeded(5, 64)).dtype == torch.bfloat16
    low = PanelLinear.from_linear(dense_layer(16, 64, dtype=torch.bfloat16), always=True)
    adapted_head = LoraLinear.from_linear(low, r=2)
    assert adapted_head.always_panels and adapted_head.weight is low.weight
    x = seeded(5, 64, dtype=torch.bfloat16).requires_grad_()
    assert torch.equal(adapted_head(x), low(x))
    with pytest.raises(TypeError, match="linear is a PanelLinear, want a plain"):
        PanelLinear.from_linear(low)


@pytest.mark.parametrize("slow", [False, True])
def test_panel_linear_decides_at_each_call(slow, monkeypatch):
    slow_dtypes = frozenset([torch.float16] if slow else [])
    monkeypatch.setattr("qlora_ext.nn.panel.SLOW_ON_CPU", slow_dtypes)
    layer = PanelLinear.from_linear(dense_layer(16, 64))
    adapted = LoraLinear.from_linear(layer, r=2)
    calls = []
    monkeypatch.setattr("qlora_ext.nn.panel.ops.linear", lambda *args: calls.append(1) or args[0])
    for module in (layer, adapted):
        assert module(seeded(5, 64)).shape == (5, 16)
    assert not calls
    layer.half()(seeded(5, 64, dtype=torch.float16))
    layer.bfloat16()(seeded(5, 64, dtype=torch.bfloat16))
    assert len(calls) == slow


def test_panel_linear_under_autocast_answers_as_nn_linear():
    dense = dense_layer(16, 64, dtype=torch.float16)
    layer = PanelLinear.from_linear(dense, always=True)
    for rows in (1, 5):
        x = seeded(rows, 64, dtype=torch.float16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == dense(x).dtype == torch.bfloat16


def test_panel_linear_takes_a_vector_and_trains_its_weight():
    layer = PanelLinear.from_linear(dense_layer(16, 64, dtype=torch.bfloat16), always=True)
    x = seeded(64, dtype=torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().expand(16, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panel_linear_exports_for_any_number_of_rows(dtype):
    layer = PanelLinear.from_linear(dense_layer(16, 64, dtype=dtype), always=True)
    rows = torch.export.Dim("rows", min=1, max=60)
    example = (seeded(8, 64, dtype=dtype),)
    exported = torch.export.export(layer, example, dynamic_shapes=({0: rows},)).module()
    for count in (1, 3, 50):
        x = seeded(count, 64, dtype=dtype)
        torch.testing.assert_close(exported(x), layer(x), rtol=2e-2, atol=2e-2)


def test_part_of_a_packed_state_is_refused_loosely_too():
    layer = Linear4bit(64, 32)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    part = {"weight_nested": torch.full_like(layer.weight_nested, 255)}
    with pytest.raises(RuntimeError, match="weight is missing, want uint8"):
        layer.load_state_dict(part, strict=False)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    layer.load_state_dict({}, strict=False)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_weight_that_a_hook_computes_is_refused(norm):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = getattr(torch.nn.utils, norm)(nn.Linear(64, 32))
    for make in (Linear4bit.from_linear, LoraLinear.from_linear):
        with pytest.raises(TypeError, match=r"linear\.weight is computed from other parameters"):
            make(layer)


# Pruning and parametrizing -----------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("kind", [Linear4bit, LoraLinear4bit, Embedding4bit])
def test_packed_weights_are_not_pruned(kind):
    from torch.nn.utils import prune

    layer = kind(64, 64)
    x = torch.arange(4) if kind is Embedding4bit else torch.randn(4, 64)
    want = layer(x)
    for pruned in (
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
        lambda: prune.random_structured(layer, "weight", 0.5, dim=0),
        lambda: prune.identity(layer, "weight_absmax"),
    ):
        with pytest.raises(RuntimeError, match=rf"{kind.__name__}: weight\w* is packed, so it can"):
            pruned()
    assert torch.equal(layer(x), want)
    if kind is LoraLinear4bit:  # what is dense may be
        prune.l1_unstructured(layer, "lora_A", 0.5)
        assert (layer.lora_A == 0).sum() == layer.lora_A.numel() // 2


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("kind", [Linear4bit, LoraLinear4bit, Embedding4bit])
def test_packed_weights_are_not_parametrized(kind):
    from torch.nn.utils import parametrize

    layer = kind(64, 64)
    x = torch.arange(4) if kind is Embedding4bit else torch.randn(4, 64)
    want = layer(x)
    utils, new = torch.nn.utils, torch.nn.utils.parametrizations
    for apply in (
        lambda: parametrize.register_parametrization(layer, "weight", Doubled()),
        lambda: new.orthogonal(layer),
        lambda: new.weight_norm(layer),
        lambda: new.spectral_norm(layer),
        lambda: utils.weight_norm(layer),
        lambda: utils.spectral_norm(layer),
    ):
        with pytest.raises(RuntimeError, match="weight is packed, so it cannot be pruned, paramet"):
            apply()
        assert not parametrize.is_parametrized(layer) and not layer._forward_pre_hooks
    assert torch.equal(layer(x), want)
