"""Averages of models (EMA, SWA, soups): adapters are averaged, and packed bytes are not."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import qlora_ext
from paths import REPOSITORY
from qlora_ext import QuantConfig
from qlora_ext.nn import Embedding4bit, Linear4bit, packed

DECAY = 0.9  # its truncation changes most of the values that a byte can have


class Net(nn.Module):
    """Packed layers in several formats, adapters, and buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.table = Embedding4bit(16, 64)
        self.up = Linear4bit(64, 128, config=QuantConfig(normalization="standard", blocksize=32))
        self.norm = nn.BatchNorm1d(128)
        self.down = Linear4bit(128, 48, config=QuantConfig("fp4", double_quant=False))
        self.register_buffer("position_ids", torch.arange(16))
        self.register_buffer("mask", torch.arange(16) % 3 == 0)

    def forward(self, rows):
        x = self.table(self.position_ids[rows]) * self.mask[rows, None]
        return self.down(self.norm(self.up(x)))


def make_net():
    config = qlora_ext.LoraConfig(r=4, target_modules=["up", "down"])
    return qlora_ext.add_lora(Net(), config).eval()


def integers(model):
    entries = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in entries if not t.is_floating_point()}


def train_a_step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def of_all_steps(values, is_ema):
    """The average of what a parameter was after each step, the first one taken as it is."""
    average = values[0].double()
    for n, value in enumerate(values[1:], 1):
        weight = 1 - DECAY if is_ema else 1 / (n + 1)
        average = average + weight * (value.double() - average)
    return average


# torch's AveragedModel ------------------------------------------------------------------------

FUNCTIONS = {
    "default": dict,
    "ema": lambda: {"avg_fn": get_ema_avg_fn(DECAY)},
    "multi_ema": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "swa": lambda: {"avg_fn": get_swa_avg_fn()},
    "multi_swa": lambda: {"multi_avg_fn": get_swa_multi_avg_fn()},
    "own ema": lambda: {"avg_fn": lambda mean, p, n: torch.lerp(mean, p, 1 - DECAY)},
    "own multi_ema": lambda: {
        "multi_avg_fn": lambda means, ps, n: torch._foreach_lerp_(means, ps, 1 - DECAY)
    },
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_buffers", [False, True], ids=["", "buffers"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_averaged_model(function, use_buffers, compiled):
    net = make_net()
    model = torch.compile(net, backend="eager") if compiled else net
    rows = torch.arange(16)
    model(rows)
    before = integers(net)
    averaged = AveragedModel(model, use_buffers=use_buffers, **FUNCTIONS[function]())
    trained = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    for _ in range(4):
        train_a_step(model)
        averaged.update_parameters(model)
        for name, values in trained.items():
            values.append(model.get_parameter(name).detach().clone())

    for name, tensor in integers(averaged.module).items():
        assert torch.equal(tensor, before[name.removeprefix("_orig_mod.")]), name
    want = copy.deepcopy(net).eval()
    for name, values in trained.items():
        average = of_all_steps(values, "ema" in function)
        got = averaged.module.get_parameter(name)
        torch.testing.assert_close(got.double(), average, rtol=1e-5, atol=1e-6)
        want.get_parameter(name.removeprefix("_orig_mod.")).data.copy_(got)
    # Not bit for bit: torch averages the norm's statistics too, rounding in between.
    torch.testing.assert_close(averaged.eval()(rows), want(rows), rtol=1e-5, atol=1e-5)


def test_a_model_that_was_packed_anew_is_copied():
    """As AveragedModel does with buffers."""
    net, rows = make_net(), torch.arange(16)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).eval()
    averaged.update_parameters(net)
    net.down.load_state_dict(make_net().down.state_dict())
    averaged.update_parameters(net)
    assert torch.equal(averaged.module.down.weight, net.down.weight)
    averaged(rows)


def test_statistics_of_the_average_are_measured_anew():
    net, rows = make_net(), torch.arange(16)
    net.up.lora_dropout = 0.0
    averaged = AveragedModel(net)
    for _ in range(2):
        train_a_step(net)
        averaged.update_parameters(net)
    before = integers(net)
    update_bn([rows, rows.flip(0)], averaged)
    x = averaged.module.up(averaged.module.table(rows) * net.mask[rows, None])
    torch.testing.assert_close(averaged.module.norm.running_mean, x.mean(0))
    after = {n: t for n, t in integers(averaged.module).items() if "batches" not in n}
    assert after.keys() == before.keys() - {"norm.num_batches_tracked"}
    assert all(torch.equal(t, before[n]) for n, t in after.items())


def test_only_what_was_written_is_copied_again():
    net = make_net()
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    version = averaged.module.down.weight._version
    averaged.update_parameters(net)
    assert averaged.module.down.weight._version == version


def test_a_failed_update_leaves_the_models_whole():
    def fail(averaged, model, n):
        raise ArithmeticError

    net = make_net()
    averaged = AveragedModel(net, avg_fn=fail)
    averaged.update_parameters(net)
    with pytest.raises(ArithmeticError):
        averaged.update_parameters(net)
    assert integers(net).keys() == integers(averaged.module).keys() == integers(make_net()).keys()
    assert torch.equal(net(torch.arange(16)), averaged.eval()(torch.arange(16)))


def dense_layer(net):
    net.down = nn.Linear(128, 48)
    return net


def dense(net):
    return qlora_ext.merge_and_unload(net, progress_bar=False)


CHANGED = {
    "other": lambda net: nn.Sequential(net, Linear4bit(64, 64)),
    "one layer merged": dense_layer,
    "merged": dense,
    "another rank": lambda net: qlora_ext.add_lora(
        Net(), qlora_ext.LoraConfig(r=2, target_modules=["up", "down"])
    ),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("way", ["model", "average"])
def test_another_model_than_the_average_was_made_from(change, way):
    net, other = make_net(), CHANGED[change](make_net())
    average, model = (net, other) if way == "model" else (other, net)
    averaged = AveragedModel(average)
    before = copy.deepcopy(averaged.state_dict())
    with pytest.raises(ValueError, match="AveragedModel: the model's parameters have other names"):
        averaged.update_parameters(model)
    assert all(torch.equal(t, before[key]) for key, t in averaged.state_dict().items())


def test_integers_of_models_without_packed_weights_are_left_to_torch():
    class Plain(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            counts = nn.Parameter(torch.arange(3), requires_grad=False)
            self.register_parameter(name, counts)

    updated = []
    for update in (AveragedModel.update_parameters, AveragedModel.update_parameters.__wrapped__):
        torch.manual_seed(0)
        averaged = AveragedModel(Plain("one"))
        for _ in range(2):
            model = Plain("other")  # torch pairs parameters by their order
            model.other.data += 3
            update(averaged, model)
        updated.append(averaged.state_dict())
    assert all(torch.equal(t, updated[1][name]) for name, t in updated[0].items())


def test_models_without_packed_weights_are_left_to_torch():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ours, theirs = (AveragedModel(net, use_buffers=True) for _ in range(2))
    for step in range(3):
        net[1].num_batches_tracked.fill_(5 * step)
        ours.update_parameters(net)
        AveragedModel.update_parameters.__wrapped__(theirs, net)
    assert ours.module[1].num_batches_tracked == theirs.module[1].num_batches_tracked != 10


# Tools that know nothing of packed bytes --------------------------------------------------------


def by_parameters(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.copy_(DECAY * own + (1 - DECAY) * theirs)


def by_detached(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.detach().copy_(DECAY * own.detach() + (1 - DECAY) * theirs.detach())


def by_state_dict(average, model):  # timm's ModelEmaV2
    own, theirs = average.state_dict(), model.state_dict()
    for key in own:
        own[key].copy_(DECAY * own[key] + (1 - DECAY) * theirs[key])


def by_foreach(average, model):
    own, theirs = list(average.parameters()), list(model.parameters())
    parts = torch._foreach_mul(own, DECAY), torch._foreach_mul(theirs, 1 - DECAY)
    torch._foreach_copy_(own, torch._foreach_add(*parts))


def by_half(average, model):  # uint8 sums wrap around
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.copy_((own + theirs) / 2)


@pytest.mark.parametrize(
    "average", [by_parameters, by_detached, by_state_dict, by_foreach, by_half]
)
@pytest.mark.parametrize("layer", ["linear", "adapted", "embedding"])
@torch.no_grad()
def test_the_next_forward_pass_refuses(average, layer):
    module = Embedding4bit(32, 64) if layer == "embedding" else Linear4bit(64, 32)
    if layer == "adapted":
        module = qlora_ext.nn.LoraLinear4bit.from_linear(module, r=4)
    x = torch.arange(4) if layer == "embedding" else torch.randn(4, 64)
    module(x)
    mean = copy.deepcopy(module)
    average(mean, module)
    message = "the packed bytes of this .32, 64. weight were changed in place .* requires_grad"
    for _ in range(2):  # and goes on refusing
        with pytest.raises(RuntimeError, match=message):
            mean(x)
    module(x)


def by_data(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.data.copy_(DECAY * own.data + (1 - DECAY) * theirs.data)


def by_new_data(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.data = (DECAY * own.data + (1 - DECAY) * theirs.data).to(own.dtype)


def by_numpy(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        array = own.detach().numpy()
        array[...] = np.float32(DECAY) * array + np.float32(1 - DECAY) * theirs.detach().numpy()


def by_set(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.set_((DECAY * own + (1 - DECAY) * theirs).to(own.dtype))


def by_new_parameters(average, model):
    for own, theirs in zip(average.modules(), model.modules(), strict=True):
        for key, p in own._parameters.items():
            if p is not None:
                mean = (DECAY * p + (1 - DECAY) * theirs._parameters[key]).to(p.dtype)
                setattr(own, key, nn.Parameter(mean, requires_grad=False))


BY_HAND = [by_parameters, by_detached, by_state_dict, by_foreach, by_half, by_data, by_new_data]
BY_HAND += [by_numpy, by_set, by_new_parameters]


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


CALLS = {
    "eager": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
}


@pytest.mark.parametrize("average", BY_HAND)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_next_call_of_a_model_in_eval_refuses(average, call, mode):
    """An average is made once, set to eval() once, and used after each update."""
    net, rows = make_net(), torch.arange(16)
    own = copy.deepcopy(net)
    mean = CALLS[call](own)
    with torch.no_grad():
        want = mean(rows)
        assert torch.equal(mean(rows), want)
    with mode():
        average(own, net)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="the packed bytes of this"):
            mean(rows)


@pytest.mark.parametrize("inner", CALLS)
@pytest.mark.parametrize("outer", ["compiled", "compiled in place"])
@torch.no_grad()
def test_compiled_models_in_compiled_models(inner, outer):
    layer, x = Linear4bit(64, 64).eval(), torch.randn(2, 64)
    want = layer(x)
    model = CALLS[outer](nn.Sequential(CALLS[inner](layer)))
    for again in (model, copy.deepcopy(model)):
        assert torch.equal(again(x), want)
    whole = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), want + 1)
    layer.weight.data.copy_(layer.weight.data * 0.9)
    with pytest.raises(RuntimeError, match="the packed bytes of this"):
        model(x)


@torch.no_grad()
def test_compiled_models_whose_layers_are_replaced():
    net, rows = make_net(), torch.arange(16)
    model = torch.compile(net, backend="eager")
    model(rows)
    qlora_ext.merge_and_unload(net, progress_bar=False)
    assert torch.equal(model(rows), net(rows))
    dense = torch.compile(nn.Linear(4, 4), backend="eager")
    assert torch.equal(dense(torch.ones(1, 4)), dense._orig_mod(torch.ones(1, 4)))


def set_item(model, layer):
    model[0] = layer


def set_attribute(model, layer):
    setattr(model, "0", layer)


def set_container(model, layer):
    model[0] = nn.Sequential(layer)


def pack_in_place(model, layer):
    qlora_ext.quantize_model(model, progress_bar=False)


@pytest.mark.parametrize("called", [False, True], ids=["not called", "called"])
@pytest.mark.parametrize("call", ["compiled", "compiled in place"])
@pytest.mark.parametrize("pack", [set_item, set_attribute, set_container, pack_in_place])
@torch.no_grad()
def test_models_that_were_compiled_before_they_were_packed(pack, call, called):
    net, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    model = CALLS[call](net)
    if called:
        model(x)
    pack(net, Linear4bit(64, 64).eval())
    want = net.forward(x)
    assert torch.equal(model(x), want)
    layer = next(m for m in net.modules() if isinstance(m, Linear4bit))
    before = layer.weight.detach().clone()
    layer.weight.data.copy_(layer.weight.data * 0.9)
    with pytest.raises(RuntimeError, match="the packed bytes of this"):
        model(x)
    layer.weight.data.copy_(before)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x), want)


def by_data_arithmetic(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.data.mul_(DECAY).add_(theirs.data, alpha=1 - DECAY)


def by_lerp(average, model):
    for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
        own.lerp_(theirs, 1 - DECAY)


def by_foreach_lerp(average, model):
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - DECAY)


@pytest.mark.parametrize("average", [by_data_arithmetic, by_lerp, by_foreach_lerp])
@torch.no_grad()
def test_arithmetic_that_torch_refuses_for_bytes(average):
    net = make_net()
    mean, before = copy.deepcopy(net), integers(net)
    with pytest.raises((RuntimeError, NotImplementedError), match="Byte"):
        average(mean, net)
    assert all(torch.equal(t, before[n]) for n, t in integers(mean).items())


@torch.no_grad()
def test_averages_of_floats_alone():
    """timm's ModelEmaV3, and an average of the adapters' entries."""
    net, rows = make_net(), torch.arange(16)
    start = copy.deepcopy(net)
    train_a_step(net)
    lerped, loaded = copy.deepcopy(start), copy.deepcopy(start)
    pairs = zip(lerped.state_dict().values(), net.state_dict().values(), strict=True)
    for own, theirs in pairs:
        if own.is_floating_point():
            own.lerp_(theirs, 1 - DECAY)
        else:
            own.copy_(theirs)
    old, new = start.state_dict(), net.state_dict()
    mean = {k: torch.lerp(old[k], new[k], 1 - DECAY) for k in new if "lora" in k}
    loaded.load_state_dict(mean, strict=False)
    for model in (lerped, loaded):
        got = model.up.lora_A.double()
        want = of_all_steps([start.up.lora_A, net.up.lora_A], True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lerped(rows), loaded(rows))


@pytest.mark.parametrize("average", [by_data, by_new_data])
@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.eval(),
        lambda layer: layer.state_dict(),
        lambda layer: layer.quantized,
        lambda layer: copy.deepcopy(layer),
        lambda layer: pickle.dumps(layer),
        lambda layer: qlora_ext.merge_and_unload(nn.Sequential(layer), progress_bar=False),
    ],
    ids=["eval", "state_dict", "quantized", "deepcopy", "pickle", "merge"],
)
@torch.no_grad()
def test_writes_that_torch_does_not_count_are_found_later(average, use):
    layer = qlora_ext.nn.LoraLinear4bit(64, 32)
    mean = copy.deepcopy(layer)
    average(mean, layer)
    with pytest.raises(RuntimeError, match="LoraLinear4bit: the packed bytes of this"):
        use(mean)
    use(layer)


def layer_and_input(kind):
    if kind == "embedding":
        return Embedding4bit(32, 64).eval(), torch.arange(4)
    layer = Linear4bit(64, 32).eval()
    if kind == "adapted":
        layer = qlora_ext.nn.LoraLinear4bit.from_linear(layer, r=4).eval()
    return layer, torch.randn(4, 64)


def forwards_until_refused(layer, x, most=1000):
    for n in range(most):
        try:
            layer(x)
        except RuntimeError as error:
            assert "the packed bytes of this" in str(error)
            return n
    raise AssertionError("never")


@pytest.mark.parametrize("kind", ["linear", "adapted", "embedding"])
@torch.no_grad()
def test_a_model_that_stays_in_eval_refuses_writes_to_data(kind):
    layer, x = layer_and_input(kind)
    for done in (0, 1, 100):
        mean = copy.deepcopy(layer)
        for _ in range(done):
            mean(x)
        by_data(mean, layer)
        assert forwards_until_refused(mean, x) <= 512
    for _ in range(600):
        layer(x)


@pytest.mark.parametrize("kind", ["linear", "adapted", "embedding"])
@torch.no_grad()
def test_the_next_forward_pass_refuses_new_data(kind):
    layer, x = layer_and_input(kind)
    mean = copy.deepcopy(layer)
    mean(x)
    by_new_data(mean, layer)
    with pytest.raises(RuntimeError, match="the packed bytes of this"):
        mean(x)


def test_writes_to_inference_tensors_are_found():
    with torch.inference_mode():
        layer, x = layer_and_input("linear")
        mean = copy.deepcopy(layer)
        mean(x)
        by_parameters(mean, layer)
        assert forwards_until_refused(mean, x) <= 512


@torch.no_grad()
def test_tools_that_move_the_bytes(monkeypatch):
    """FSDP2, ZeRO-3, offloading: each comparison would wait for the GPU."""
    layer, x = layer_and_input("linear")
    want, reads = layer(x), []
    sample = packed.byte_sample
    monkeypatch.setattr(packed, "byte_sample", lambda t: reads.append(1) or sample(t))
    elsewhere = [layer.weight.data.clone() for _ in range(6)]
    for data in elsewhere:
        layer.weight.data = data
        assert torch.equal(layer(x), want)
    assert len(reads) == 1


@pytest.mark.parametrize("kind", ["linear", "adapted", "embedding"])
@torch.no_grad()
def test_data_of_another_dtype(kind):
    layer, x = layer_and_input(kind)
    want, state = layer(x), copy.deepcopy(layer.state_dict())
    vector = torch.nn.utils.parameters_to_vector(p.float() for p in layer.parameters())
    torch.nn.utils.vector_to_parameters(vector, layer.parameters())
    name = type(layer).__name__
    for use in (lambda: layer(x), layer.eval, layer.state_dict, lambda: copy.deepcopy(layer)):
        with pytest.raises(RuntimeError, match=f"{name}: weight is torch.float32, want uint8"):
            use()
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("kind", ["linear", "adapted", "embedding"])
def test_a_dense_weight_for_one_call(kind):
    layer, x = layer_and_input(kind)
    N, K = layer._shape
    want = rf"want uint8, the bytes of a packed \[{N}, "
    sentence = rf"{type(layer).__name__}: weight is torch.float32, {want}"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=sentence):
            torch.func.functional_call(layer, {"weight": torch.randn(N, K)}, (x,))
        layer(x)


@torch.no_grad()
def test_a_compiled_model_refuses_at_eval():
    layer, x = Linear4bit(64, 32), torch.randn(4, 64)
    mean = torch.compile(copy.deepcopy(layer), backend="eager")
    mean(x)
    by_parameters(mean, layer)
    with pytest.raises(RuntimeError, match="Linear4bit: the packed bytes of this"):
        mean.eval()


@torch.no_grad()
def test_tools_that_leave_frozen_parameters_alone():
    """diffusers' EMAModel: lists of tensors; what is frozen is copied."""
    net, rows = make_net(), torch.arange(16)
    before = integers(net)
    shadow = [p.clone().detach() for p in net.parameters()]
    start = [p.clone() for p in shadow]
    train_a_step(net)
    for own, theirs in zip(shadow, net.parameters(), strict=True):
        if theirs.requires_grad:
            own.sub_((1 - DECAY) * (own - theirs))
        else:
            own.copy_(theirs)
    want = [
        of_all_steps([first, p.clone()], True) if p.requires_grad else first
        for first, p in zip(start, net.parameters(), strict=True)
    ]
    for own, theirs in zip(shadow, net.parameters(), strict=True):
        theirs.data.copy_(own)
    for got, value in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(got.to(value.dtype), value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in integers(net).items())
    net.eval()(rows)


def test_a_compiled_model_is_compiled_once():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    layer, x = Linear4bit(64, 32), torch.randn(4, 64)
    model = torch.compile(layer, backend=backend)
    averaged = AveragedModel(layer)
    for _ in range(3):
        model.eval()(x)
        averaged.update_parameters(model)
        with torch.no_grad():
            layer.weight.copy_(averaged.module.weight)
    assert len(graphs) == 1


# State dicts --------------------------------------------------------------------------------------

SOUPS = {
    "truncated": lambda a, b: (DECAY * a + (1 - DECAY) * b).to(a.dtype),
    "wrapped": lambda a, b: (a + b) // 2 if a.dtype == torch.uint8 else (a + b) / 2,
    "scaled": lambda a, b: (a * 0.7).to(a.dtype),
}


@pytest.mark.parametrize("soup", SOUPS)
@pytest.mark.parametrize("assign", [False, True])
def test_an_averaged_state_dict_is_refused(soup, assign):
    layer = Linear4bit(64, 32)
    state = layer.state_dict()
    averaged = {key: SOUPS[soup](state[key], state[key]) for key in state}
    # As it was, so that what is compared with the config does not give it away.
    averaged["weight_codebook"] = state["weight_codebook"]
    before = integers(layer)
    with pytest.raises(RuntimeError, match="Linear4bit: weight holds this layer's bytes after ari"):
        layer.load_state_dict(averaged, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in integers(layer).items())


@pytest.mark.parametrize("key", ["weight", "weight_absmax", "weight_nested", "weight_codebook"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_tensor_of_the_packed_shape_is_refused(key, dtype):
    """What a model soup gives. Its values are bytes, whatever dense weights are taken."""
    layer = Linear4bit(64, 32)
    state = layer.state_dict()
    state[key] = torch.stack([state[key], state[key]]).to(dtype).mean(0)
    advice = "; if it is an average of packed bytes, average the dense weights" * (key == "weight")
    sentence = rf"Linear4bit: {key} is {dtype} .*, want uint8 \[.*\]{advice}"
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict(state)


def test_a_soup_of_equal_bytes():
    """Of several fine-tunes of one base: exact, so it loads."""
    nets = [make_net() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
        train_a_step(net)
    states = [net.state_dict() for net in nets]
    soup = {
        key: torch.stack([state[key] for state in states]).double().mean(0).to(value.dtype)
        for key, value in states[0].items()
    }
    nets[0].load_state_dict(soup)
    assert all(torch.equal(t, integers(nets[1])[n]) for n, t in integers(nets[0]).items())
    nets[0](torch.arange(16))


@pytest.mark.parametrize("size", [(64, 32), (2, 3), (1, 1)])
@pytest.mark.parametrize("assign", [False, True])
def test_other_packed_weights_are_loaded(size, assign):
    """Also constant ones, over constant ones, and those written into the model's own tensors."""
    x = torch.randn(2, size[0])
    constant = nn.Linear(*size)
    nn.init.ones_(constant.weight)
    zero = nn.Linear(*size)
    nn.init.zeros_(zero.weight)
    layers = [Linear4bit(*size), Linear4bit(*size)]
    layers += [Linear4bit.from_linear(constant), Linear4bit.from_linear(zero)]
    for one in layers:
        for other in layers:
            layer = copy.deepcopy(one)
            layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            assert torch.equal(layer.eval()(x), other(x))
            own = one.state_dict()  # as torch.distributed.checkpoint reads
            layer.load_state_dict(own, assign=assign)
            assert torch.equal(layer.eval()(x), one(x))


@torch.no_grad()
def test_other_weights_read_into_the_models_own_tensors():
    """torch.distributed.checkpoint does so, and then load_state_dict is called with them."""
    layer, other, x = Linear4bit(64, 32), Linear4bit(64, 32), torch.randn(2, 64)
    state = layer.state_dict()
    for key, tensor in other.state_dict().items():
        state[key].copy_(tensor)
    layer.load_state_dict(state)
    assert torch.equal(layer.eval()(x), other(x))


# What is no arithmetic ----------------------------------------------------------------------------


def test_moves_copies_and_empty_modules():
    layer, x = Linear4bit(64, 32, bias=False).eval(), torch.randn(2, 64)
    want = layer(x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    again = again.to(torch.bfloat16).to("cpu", torch.float32)
    assert torch.equal(again.eval()(x), want)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu").eval()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.eval()(x), want)
    empty = Linear4bit(64, 32, bias=False, device="meta").eval()
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x), want)


@pytest.mark.parametrize("probe", [True, False], ids=["probe", "no probe"])
def test_all_bytes_are_compared_after_a_write_alone(monkeypatch, probe):
    """Their price is not paid in every forward pass. With a probe, after it has changed."""
    reads = []
    sample = packed.byte_sample
    monkeypatch.setattr(packed, "byte_sample", lambda t: reads.append(1) or sample(t))
    if not probe:
        monkeypatch.setattr(packed, "byte_probe", lambda t: None)
    layer, x = Linear4bit(64, 32), torch.randn(2, 64)
    del reads[:]
    for _ in range(3):
        layer(x)
    assert not reads
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())
    for _ in range(3):
        layer(x)
    assert len(reads) == (not probe)


@torch.no_grad()
def test_a_probe_needs_bytes_that_show_arithmetic():
    """Equal bytes, as of a table of zeros, may stay what they are; the scales then show it."""
    table = torch.zeros(64, 64)
    table[::16] = torch.randn(4, 64)
    layer = Embedding4bit.from_embedding(nn.Embedding.from_pretrained(table)).eval()
    assert layer._probe is None and Linear4bit(64, 64)._probe is not None
    rows = torch.arange(4)
    mean = copy.deepcopy(layer)
    mean(rows)
    by_data(mean, layer)
    assert forwards_until_refused(mean, rows) <= 512


def test_inference_tensors():
    with torch.inference_mode():
        layer, x = Linear4bit(64, 32), torch.randn(2, 64)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied.eval()(x), layer(x))
    with torch.no_grad():
        assert torch.equal(copied(x), layer(x))


def test_equal_writes_are_no_fault():
    """DDP sends every parameter to every process once."""
    layer, x = Linear4bit(64, 32), torch.randn(2, 64)
    want = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.clone())
    assert torch.equal(layer.eval()(x), want)


@pytest.mark.parametrize("words", [["--rounds", "20"], ["--rounds", "20", "--adapted"]])
def test_the_bench_of_its_price_runs(words):
    script = REPOSITORY / "bench" / "forward_overhead.py"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("with the check (noise") == 4


# FSDP2 ------------------------------------------------------------------------------------------


def test_fsdp2_in_two_processes():
    import processes

    processes.run(__file__)


def averages_of_shards():
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def full(tensor):
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()

    for name_of_function, function in FUNCTIONS.items():
        torch.manual_seed(0)
        net = make_net()
        want = integers(net)
        averaged = AveragedModel(net, **function())
        for model in (net, averaged.module):
            for layer in (model.up, model.down):
                fully_shard(layer)
            fully_shard(model)
        trained = {name: [] for name, p in net.named_parameters() if p.requires_grad}
        rows = torch.arange(16)
        for _ in range(3):
            net(rows).sum().backward()  # leaves every tensor sharded
            train_a_step(net)
            averaged.update_parameters(net)
            for name, values in trained.items():
                values.append(full(net.get_parameter(name)))
        is_ema = "ema" in name_of_function
        for name, values in trained.items():
            got = full(averaged.module.get_parameter(name)).double()
            torch.testing.assert_close(got, of_all_steps(values, is_ema), rtol=1e-5, atol=1e-5)
        gather = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(averaged.module, options=gather)
        if dist.get_rank() == 0:
            assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
        averaged.eval()(rows)

    # A tool that averages the shards themselves.
    averaged.module.reshard()  # what that forward pass left whole
    with torch.no_grad():
        by_parameters(averaged.module, net)
    averaged.eval()
    with pytest.raises(RuntimeError, match="the packed bytes of this"):
        averaged(rows)
    dist.barrier()


if __name__ == "__main__":
    import processes

    with processes.group():
        averages_of_shards()
