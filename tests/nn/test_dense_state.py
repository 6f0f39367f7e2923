"""Packed layers load the dense state dict of the layer that they replace, and pack it."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import tiny_models as tiny
from qlora_ext import QuantConfig, quantize_model
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, LoraLinear4bit

CONFIG = QuantConfig(quant_type="fp4", blocksize=32, double_quant=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(N=16, K=64, seed=1, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(K, N, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return layer


def snapshot(module):
    return {key: (id(t), t.clone()) for key, t in module.state_dict(keep_vars=True).items()}


def assert_unchanged(module, before):
    for key, tensor in module.state_dict(keep_vars=True).items():
        assert id(tensor) == before[key][0] and torch.equal(tensor, before[key][1]), key


def assert_same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]), key


# One layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, CONFIG], ids=["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(16, 64), (7, 33), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("how", ["copy", "assign", "meta"])
def test_a_dense_weight_is_packed_as_from_linear_packs_it(how, shape, config):
    source = dense(*shape)
    layer = Linear4bit(*shape[::-1], config=config, device="meta" if how == "meta" else None)
    parameters = dict(layer.named_parameters())
    result = layer.load_state_dict(source.state_dict(), assign=how != "copy")
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_state(layer, Linear4bit.from_linear(source, config))
    assert not layer.weight.requires_grad and layer.weight.device.type == "cpu"
    if how == "copy":  # into the same parameters, which optimizers and wrappers may hold
        assert all(parameters[n] is p for n, p in layer.named_parameters())
    x = torch.randn(3, shape[1])
    assert torch.equal(layer(x), Linear4bit.from_linear(source, config)(x))


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("own", DTYPES, ids=str)
def test_dtypes(own, stored):
    """The codes come from the stored values, which the layer's dtype does not round. As in
    nn.Linear, assign takes the stored dtype and a copy keeps the layer's."""
    source = dense(dtype=stored)
    want = Linear4bit.from_linear(source)
    for assign in (False, True):
        layer, plain = Linear4bit(64, 16, dtype=own), nn.Linear(64, 16, dtype=own)
        for module in (layer, plain):
            module.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(layer.weight, want.weight)
        assert layer.dtype == plain.weight.dtype and layer.bias.dtype == plain.bias.dtype


def test_packed_state_loads_byte_for_byte():
    source = Linear4bit.from_linear(dense(dtype=torch.bfloat16), CONFIG)
    for assign in (False, True):
        layer = Linear4bit(64, 16, config=CONFIG)
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert all(
            torch.equal(t, layer.state_dict()[key]) and t.dtype == layer.state_dict()[key].dtype
            for key, t in source.state_dict().items()
            if key != "bias"
        )
        assert layer.dtype == torch.float32  # packed bytes tell no dtype


def test_strided_views_and_parameters():
    source = dense()
    state = {
        "weight": nn.Parameter(source.weight.detach().T.contiguous()).T,
        "bias": torch.stack([source.bias.detach()] * 2, -1)[:, 0],
    }
    assert not state["weight"].is_contiguous()
    layer = Linear4bit(64, 16)
    layer.load_state_dict(state)
    assert_same_state(layer, Linear4bit.from_linear(source))
    assert not layer.weight.requires_grad


def test_adapters_stay():
    layer = LoraLinear4bit(64, 16, r=4)
    nn.init.normal_(layer.lora_B)
    lora = layer.lora_A.clone(), layer.lora_B.clone()
    result = layer.load_state_dict(dense().state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B"]
    assert torch.equal(layer.lora_A, lora[0]) and torch.equal(layer.lora_B, lora[1])
    assert torch.equal(layer.weight, Linear4bit.from_linear(dense()).weight)
    with pytest.raises(RuntimeError, match="lora_A"):
        layer.load_state_dict(dense().state_dict())


def test_embedding():
    source = nn.Embedding(12, 64, padding_idx=3)
    for device, assign in ((None, False), ("meta", True)):
        table = Embedding4bit(12, 64, padding_idx=3, config=CONFIG, device=device)
        table.load_state_dict(source.state_dict(), assign=assign)
        assert_same_state(table, Embedding4bit.from_embedding(source, CONFIG))
        assert not table(torch.tensor([3])).any()


@pytest.mark.parametrize("width", [64, 16])
def test_conv1d_weights_are_stored_the_other_way_round(width):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    source = Conv1D(16, width)
    for assign in (False, True):
        layer = Linear4bit.empty_like(source, device="meta" if assign else "cpu")
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert_same_state(layer, Linear4bit.from_linear(source))
    if width != 16:
        with pytest.raises(RuntimeError, match=r"want a dense weight \[64, 16\] to pack"):
            layer.load_state_dict(dense().state_dict())


@pytest.mark.parametrize("own", ["cpu", "cuda"], ids=["host", "cuda"])
@pytest.mark.parametrize("stored", ["cpu", "cuda"], ids=["from-host", "from-cuda"])
def test_devices(own, stored):
    """A copy lands where the layer is; with assign, where the state dict is."""
    if "cuda" in (own, stored) and not torch.cuda.is_available():
        pytest.skip("no GPU")
    state = dense().to(stored).state_dict()
    for assign in (False, True):
        layer = Linear4bit(64, 16, device=own)
        layer.load_state_dict(state, assign=assign)
        want = stored if assign else own
        assert {p.device.type for p in layer.parameters()} == {want}
        assert_same_state(layer.cpu(), Linear4bit.from_linear(dense()))


def test_without_assign_a_layer_on_meta_stays_there():
    layer = Linear4bit(64, 16, device="meta")
    with pytest.warns(UserWarning, match="assign=True"):
        layer.load_state_dict(dense().state_dict())
    assert all(p.is_meta for p in layer.parameters())


def test_a_dry_run_loads_shapes():
    layer = Linear4bit(64, 16, device="meta")
    layer.load_state_dict(dense().to("meta").state_dict(), assign=True)
    assert layer.weight.is_meta and layer.weight.shape == (16, 32)
    with FakeTensorMode():
        layer, source = Linear4bit(64, 16), nn.Linear(64, 16)
        layer.load_state_dict(source.state_dict())
        assert layer(torch.randn(2, 64)).shape == (2, 16)


class Lazy:
    """A tensor that is read from its file when a function of torch gets it, as Lightning's are."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tensor.shape

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.tensor if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


def test_lazy_tensors():
    for source in (dense(), Linear4bit.from_linear(dense())):
        layer = Linear4bit(64, 16)
        layer.load_state_dict({key: Lazy(t) for key, t in source.state_dict().items()})
        assert_same_state(layer, Linear4bit.from_linear(dense()))


def test_loading_again_and_training_after():
    layer = LoraLinear4bit(64, 16, r=4)
    x = torch.randn(3, 64)
    layer(x)
    for seed in (1, 2):
        layer.load_state_dict(dense(seed=seed).state_dict(), strict=False)
        assert torch.equal(layer(x), Linear4bit.from_linear(dense(seed=seed))(x))
    copy.deepcopy(layer)(x).sum().backward()


# Hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["layer", "parent"])
def test_pre_hooks_change_the_state_before_the_checks(owner):
    layer, calls = Linear4bit(64, 16), []
    model = nn.ModuleDict({"proj": layer})

    def rename(module, state_dict, prefix, *args):
        assert module is (layer if owner == "layer" else model)
        calls.append(prefix)
        prefix = "proj."
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel").T
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}offset")

    hooked = layer if owner == "layer" else model
    handle = hooked.register_load_state_dict_pre_hook(rename)
    source = dense()
    state = {"proj.kernel": source.weight.detach().T, "proj.offset": source.bias.detach()}
    model.load_state_dict(state)
    assert calls == ["proj." if owner == "layer" else ""]  # once
    assert_same_state(layer, Linear4bit.from_linear(source))
    model.load_state_dict(state)
    assert len(calls) == 2  # also the second time
    handle.remove()
    model.load_state_dict({f"proj.{key}": t for key, t in source.state_dict().items()})
    assert len(calls) == 2


def test_a_pre_hook_may_pack_the_weight_itself():
    source = dense(bias=False)
    layer = Linear4bit(64, 16, bias=False)

    def pack(module, state_dict, prefix, *args):
        linear = nn.Linear(64, 16, bias=False)
        linear.weight = nn.Parameter(state_dict.pop(prefix + "weight"))
        state_dict.update(Linear4bit.from_linear(linear).state_dict(prefix=prefix))

    layer.register_load_state_dict_pre_hook(pack)
    layer.load_state_dict(source.state_dict())
    assert_same_state(layer, Linear4bit.from_linear(source))


def test_a_pre_hook_that_raises_leaves_the_hooks():
    layer, calls = Linear4bit(64, 16), []

    def fail(*args):
        calls.append(args)
        raise KeyError("no such key")

    layer.register_load_state_dict_pre_hook(fail)
    for count in (1, 2):
        with pytest.raises(KeyError):
            layer.load_state_dict(dense().state_dict())
        assert len(calls) == count


def test_parents_that_rename_keys_as_they_load():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = Linear4bit(64, 16)

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for key in ("weight", "bias"):
                if prefix + key in state_dict:
                    state_dict[f"{prefix}linear.{key}"] = state_dict.pop(prefix + key)
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.Sequential(Parent(), Parent())
    sources = [dense(seed=1), dense(seed=2)]
    model.load_state_dict(
        {f"{i}.{key}": t for i, s in enumerate(sources) for key, t in s.state_dict().items()}
    )
    for parent, source in zip(model, sources):
        assert_same_state(parent.linear, Linear4bit.from_linear(source))


# A model ------------------------------------------------------------------------------------------


def model_of(make):
    return nn.ModuleDict(
        {"a": make(64, 32), "inner": nn.Sequential(make(32, 48), nn.LayerNorm(48), make(48, 16))}
    )


def test_a_model_built_packed_loads_a_dense_checkpoint_in_shards():
    source = model_of(nn.Linear)
    state = source.state_dict()
    keys = list(state)
    shards = [keys[0::3], keys[1::3], keys[2::3]]  # a layer's bias is not beside its weight
    want = model_of(Linear4bit)
    want.load_state_dict(state)
    assert torch.equal(want["inner"][2].weight, Linear4bit.from_linear(source["inner"][2]).weight)
    for assign in (False, True):
        with torch.device("meta" if assign else "cpu"):
            model = model_of(Linear4bit)
        seen = set()
        for shard in shards:
            result = model.load_state_dict(
                {key: state[key] for key in shard}, strict=False, assign=assign
            )
            assert not result.unexpected_keys
            assert not set(shard) & set(result.missing_keys)
            seen.update(shard)
        assert seen == set(keys)
        assert_same_state(model, want)


def test_strict_reports_what_nn_linear_reports():
    for strict, extra in ((True, "x"), (True, "weight_scale")):
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{extra}"):
            Linear4bit(64, 16).load_state_dict(
                {**dense().state_dict(), extra: torch.zeros(1)}, strict=strict
            )
    layer = Linear4bit(64, 16)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict({"weight": dense().weight})
    result = layer.load_state_dict({"weight": dense().weight}, strict=False)
    assert result.missing_keys == ["bias"]
    result = layer.load_state_dict({"bias": dense().bias}, strict=False)
    assert "weight" in result.missing_keys
    assert_same_state(layer, Linear4bit.from_linear(dense()))


@pytest.mark.filterwarnings("ignore:.*stay unquantized in layers that you might expect")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_packed_model_of_transformers_takes_another_dense_checkpoint(family, assign):
    pytest.importorskip("transformers")
    other, source = tiny.make(family, seed=1), tiny.make(family, seed=2)
    model = quantize_model(other.to("meta") if assign else other, progress_bar=False)
    state = source.state_dict()
    model.load_state_dict(state, assign=assign)
    assert_same_state(model, quantize_model(source, progress_bar=False))


@pytest.mark.filterwarnings("ignore:.*stay unquantized in layers that you might expect")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_tools_that_fill_up_a_state_dict_with_the_models_own(family, tmp_path):
    """set_model_state_dict gives load_state_dict the model's own packed entries beside the dense
    weight. accelerate calls it for each shard."""
    pytest.importorskip("transformers")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    source = tiny.make(family, seed=2)
    want = quantize_model(copy.deepcopy(source), progress_bar=False)
    model = quantize_model(tiny.make(family, seed=1), progress_bar=False)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(source.state_dict()), options=options)
    assert_same_state(model, want)
    set_model_state_dict(model, dict(model.state_dict()), options=options)  # its own, packed
    assert_same_state(model, want)

    accelerate = pytest.importorskip("accelerate")
    source.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if family == "mixtral":
        return  # transformers writes experts one by one, under names of their own
    model = quantize_model(tiny.make(family, seed=1), progress_bar=False)
    accelerate.load_checkpoint_in_model(model, str(tmp_path))
    assert_same_state(model, want)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layers_own_packed_entries_do_not_count(device):
    for kind in (dict, lambda pairs: {key: value.detach() for key, value in pairs}):
        layer = Linear4bit(64, 16, device=device)
        own = kind(layer.named_parameters())
        layer.load_state_dict({**own, **dense().state_dict()}, assign=device == "meta")
        assert_same_state(layer, Linear4bit.from_linear(dense()))


def test_below_an_adapter_of_peft():
    peft = pytest.importorskip("peft")
    source = tiny.make("llama", seed=2)
    model = quantize_model(tiny.make("llama", seed=1), progress_bar=False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    state = {
        f"base_model.model.{key}".replace("q_proj.", "q_proj.base_layer."): tensor
        for key, tensor in source.state_dict().items()
    }
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all("lora_" in key for key in result.missing_keys)
    want = quantize_model(source, progress_bar=False)
    ids = tiny.inputs(want)
    assert torch.equal(model(**ids).logits, want(**ids).logits)


# What is refused ----------------------------------------------------------------------------------


def refused(layer, state, message, assign=False):
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False, assign=assign)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("assign", [False, True])
def test_bad_dense_weights_change_nothing(assign):
    state = dense().state_dict()

    def changed(**entries):
        return {**state, **entries}

    layer = Linear4bit(64, 16)
    weight = state["weight"].clone()
    weight[3, 5] = torch.nan
    refused(layer, changed(weight=weight), r"Linear4bit: weight: quantize_4bit.*\[3, 5\]", assign)
    refused(
        layer,
        changed(weight=weight.T),
        r"weight is torch.float32 \[64, 16\], want a dense weight \[16, 64\] to pack, or the pack",
        assign,
    )
    refused(
        layer,
        changed(weight=torch.zeros(16, 32)),
        r"weight is torch.float32 \[16, 32\], want .*if it is an average of packed bytes",
        assign,
    )
    refused(layer, changed(weight=weight.double()), "weight has dtype torch.float64, want", assign)
    refused(layer, changed(weight=weight.long()), "weight is torch.int64", assign)
    refused(layer, changed(weight=weight.to_sparse()), "weight is torch.float32|layout", assign)
    refused(layer, changed(weight=weight.to("meta")), "weight is a tensor without data", assign)
    # The weight is good, but the bias is not: neither is taken.
    refused(layer, changed(bias=torch.zeros(15)), r"bias has shape \[15\], want \[16\]", assign)
    lora = LoraLinear4bit(64, 16, r=4)
    refused(lora, changed(lora_A=torch.zeros(3, 64)), r"lora_A has shape \[3, 64\]", assign)


def test_a_dense_weight_beside_packed_entries_is_refused():
    packed, layer = Linear4bit(64, 16).state_dict(), Linear4bit(64, 16)
    for key in ("weight_absmax", "weight_nested", "weight_codebook"):
        state = {"weight": dense().weight, key: packed[key]}
        refused(
            Linear4bit(64, 16), state, r"\[16, 64\], want uint8 .*only if the layer's other entries"
        )
        with pytest.raises(RuntimeError, match="only if the layer's other entries"):
            Linear4bit(64, 16, device="meta").load_state_dict(state, strict=False)
        copied = {k: t.clone() for k, t in layer.state_dict().items() if k == key}
        refused(layer, {**state, **copied}, "only if the layer's other entries")
    average = {key: t.float() for key, t in Linear4bit(1, 1).state_dict().items()}
    refused(Linear4bit(1, 1), average, "average of packed bytes")


def test_a_sharded_layer_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = Linear4bit(64, 16)
        weight = distribute_tensor(dense().weight.detach(), mesh, [Replicate()])
        refused(layer, {"weight": weight}, "weight is a dense DTensor, want a plain tensor")
        with torch.no_grad():
            layer.weight = nn.Parameter(
                distribute_tensor(layer.weight, mesh, [Replicate()]), requires_grad=False
            )
        with pytest.raises(RuntimeError, match="this layer is sharded, want packed entries"):
            layer.load_state_dict(dense().state_dict())
    finally:
        torch.distributed.destroy_process_group()


def test_other_layers_of_a_model_load_although_one_is_refused():
    """As nn.Module does it: the error comes at the end, and names the layer."""
    model, source = model_of(Linear4bit), model_of(nn.Linear)
    state = source.state_dict()
    state["inner.0.weight"] = torch.full((48, 32), torch.inf)
    before = snapshot(model["inner"][0])
    with pytest.raises(RuntimeError, match=r"inner.0.weight: quantize_4bit"):
        model.load_state_dict(state)
    assert_unchanged(model["inner"][0], before)
    assert_same_state(model["a"], Linear4bit.from_linear(source["a"]))


# Models with nn.init switched off -----------------------------------------------------------------


def test_layers_are_built_while_initialisation_is_off(monkeypatch):
    """Fabric.init_module(empty_init=True) and transformers' loader turn nn.init off."""
    for function in ("kaiming_uniform_", "normal_"):
        monkeypatch.setattr(nn.init, function, lambda tensor, *args, **kwargs: tensor)
    assert not Linear4bit(64, 16, bias=False)(torch.randn(2, 64)).any()
    assert not Embedding4bit(8, 64)(torch.arange(8)).any()


# Experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", tiny.EXPERT_LAYOUTS)
def test_experts_take_the_fused_weights(layout, assign):
    pytest.importorskip("transformers")
    source, other = tiny.experts(layout, seed=1), tiny.experts(layout, seed=2)
    experts = Experts4bit.from_experts(other.to("meta") if assign else other, CONFIG)
    model = nn.ModuleDict({"moe": experts})
    model.load_state_dict(
        {f"moe.{key}": t for key, t in source.state_dict().items()}, assign=assign
    )
    assert_same_state(experts, Experts4bit.from_experts(source, CONFIG))


def test_bad_fused_weights_change_no_expert():
    pytest.importorskip("transformers")
    source = tiny.experts("gpt_oss", seed=1).state_dict()
    experts = Experts4bit.from_experts(tiny.experts("gpt_oss", seed=2))

    def changed(key, value):
        return {**source, key: value}

    bad = source["down_proj"].clone()
    bad[2, 3, 5] = torch.inf
    refused(experts, changed("down_proj", bad), r"Experts4bit: down_proj holds 1 value of")
    short = source["gate_up_proj"][:3]
    refused(experts, changed("gate_up_proj", short), r"gate_up_proj is torch.float32 \[3, 64, 192")
    refused(
        experts, changed("down_proj_bias", source["down_proj_bias"].long()), "down_proj_bias is t"
    )
    refused(experts, changed("down_proj", None), "down_proj is NoneType, want float")
    packed = experts.state_dict(prefix="")
    mixed = {**source, "up.weight": packed["up.weight"].clone()}
    refused(
        experts, mixed, "gate_up_proj, which is dense, and up.weight, which is packed, want one"
    )
    with pytest.raises(RuntimeError, match=r"Missing key.*down.weight"):
        experts.load_state_dict({k: v for k, v in source.items() if k != "down_proj"})
