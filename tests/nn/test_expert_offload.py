"""Experts in host memory: the order of copies and waits, and the same results."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qlora_ext
import tiny_models as tiny
from qlora_ext.nn import Experts4bit
from qlora_ext.nn.expert_offload import ExpertFetcher
from qlora_ext.nn.linear import _share

pytest.importorskip("transformers")


class RecordedStreams:
    """Streams that note what they are asked. A copy is done when it is started ("early") or when
    something waits for it ("late"): a result that needs one of the two is wrong on a GPU."""

    def __init__(self, mode):
        self.mode = mode
        self.log = []  # ("computed", n), ("copy", n, after), ("wait", n)
        self.pending = []

    def computed(self):
        self.log.append(("computed", len(self.log)))
        return self.log[-1]

    def copy(self, pairs, after):
        assert after is self.log[-1]  # nothing was computed in between
        self.log.append(("copy", len(self.log), after))
        self.pending.append((self.log[-1], pairs))
        if self.mode == "early":
            self._do(self.log[-1])
        return self.log[-1]

    def wait(self, event):
        self.log.append(("wait", len(self.log), event))
        self._do(event)

    def _do(self, event):
        """Copies are done in order."""
        while any(e is event for e, _ in self.pending):
            _, pairs = self.pending.pop(0)
            for target, source in pairs:
                target.copy_(source)


def offloaded(model, mode="late"):
    """The model with its experts offloaded, and the streams."""
    qlora_ext.offload_experts(model, "cpu")
    layers = [m for m in model.modules() if isinstance(m, Experts4bit)]
    streams = RecordedStreams(mode)
    fetcher = ExpertFetcher(layers, torch.device("cpu"), streams)
    for layer in layers:
        layer.up.fetcher = layer.down.fetcher = fetcher
    return model, fetcher, streams


def mixture(layers=4):
    model = qlora_ext.quantize_model(
        tiny.make("qwen3_moe", num_hidden_layers=layers), progress_bar=False
    )
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=2, mlp=True, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def losses_and_gradients(model):
    batch = tiny.inputs(getattr(model, "_orig_mod", model))
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [loss, *gradients]


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_the_same_results(layers, checkpointed, mode):
    plain = mixture(layers).train()
    model, fetcher, _ = offloaded(copy.deepcopy(plain), mode)
    if checkpointed:
        for each in (plain, model):
            each.gradient_checkpointing_enable({"use_reentrant": False})
            each.enable_input_require_grads()
    for _ in range(2):  # the second step starts with what the first one left
        for got, want in zip(losses_and_gradients(model), losses_and_gradients(plain)):
            assert torch.equal(got, want)
    assert len(fetcher.slots) == min(2, layers)


def test_the_next_layer_is_copied_while_one_computes():
    model, _, streams = offloaded(mixture(4))
    model.train()
    losses_and_gradients(model)
    copies = [entry for entry in streams.log if entry[0] == "copy"]
    # Forward: each layer once. Backward: the last two are there still, and two are copied again.
    assert len(copies) == 6
    # All but the first were started before their layer was asked for.
    waits = [entry[2] for entry in streams.log if entry[0] == "wait"]
    for entry in copies[1:]:
        first = next(i for i, event in enumerate(waits) if event is entry)
        asked = [e for e in streams.log if e[0] == "wait"][first][1]
        between = [e for e in streams.log if e[0] == "wait" and entry[1] < e[1] < asked]
        assert between, "the copy was waited for at once"


@torch.no_grad()
def test_each_forward_pass_copies_ahead():
    """As in generate: only the first layer of a pass is copied when it is asked for."""
    model, _, streams = offloaded(mixture(4))
    batch = tiny.inputs(model)
    for _ in range(3):
        started = len(streams.log)
        model(**batch)
        kinds = [entry[0] for entry in streams.log[started:] if entry[0] != "computed"]
        # A wait for each of two stacks. Layers 1 and 2 start the copy of the next one.
        later = [*2 * ["wait", "copy", "wait"], "wait", "wait"]
        assert kinds == ["copy", "wait", "copy", "wait", *later]


def test_no_copy_is_kept_for_the_backward_pass():
    model, fetcher, _ = offloaded(mixture(3))
    memory = {slot.memory.untyped_storage().data_ptr() for slot in fetcher.slots}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses_and_gradients(model)
    assert saved
    assert not any(t.untyped_storage().data_ptr() in memory for t in saved)


def test_layers_out_of_order_and_a_layer_twice():
    model, _, _ = offloaded(mixture(4))
    layers = [m for m in model.modules() if isinstance(m, Experts4bit)]
    plain = copy.deepcopy(layers)
    assert plain[0].up.fetcher is None  # a copy has its experts in host memory
    x = torch.randn(6, 64)
    args = torch.randint(4, (6, 2)), torch.rand(6, 2)
    for i in (3, 0, 0, 2, 1, 3, 3, 0):
        assert torch.equal(layers[i](x, *args), plain[i](x, *args))
    y = checkpoint(layers[2], x.requires_grad_(), *args, use_reentrant=False)
    z = layers[0](layers[3](y, *args), *args)
    z.sum().backward()
    got, x.grad = x.grad, None
    plain[0](plain[3](plain[2](x, *args), *args), *args).sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("assign", [False, True])
def test_other_bytes_and_adapters_later(assign):
    model = qlora_ext.quantize_model(tiny.make("qwen3_moe"), progress_bar=False)
    other = qlora_ext.quantize_model(tiny.make("qwen3_moe", seed=1), progress_bar=False)
    want = tiny.logits(other)
    offloaded(model)
    tiny.logits(model)  # the device now holds these experts
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(tiny.logits(model), want)
    for each in (model, other):
        qlora_ext.add_lora(each, qlora_ext.LoraConfig(r=2, mlp=True))
        for name, parameter in each.named_parameters():
            if "lora_" in name:
                torch.nn.init.constant_(parameter, 0.1)
    for got, want in zip(losses_and_gradients(model), losses_and_gradients(other)):
        assert torch.equal(got, want)


def test_compiled():
    plain = mixture(4).train()
    model, _, streams = offloaded(copy.deepcopy(plain))
    compiled = torch.compile(model, backend="aot_eager")
    for got, want in zip(losses_and_gradients(compiled), losses_and_gradients(plain)):
        torch.testing.assert_close(got, want)
    # Before a compiled call all packed bytes are looked at; no experts are fetched for that.
    assert sum(entry[0] == "copy" for entry in streams.log) == 6


def test_threads_take_turns():
    """What one fetched, another must not overwrite before the product is computed."""
    model = mixture(6)
    batches = [torch.randint(3, tiny.VOCAB, (1, 30 + i)) for i in range(3)]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(ids):
        loss = model(input_ids=ids, labels=ids).loss
        return [loss, *torch.autograd.grad(loss, parameters)]

    wants = [step(ids) for ids in batches]
    qlora_ext.offload_experts(model, "cpu")
    with ThreadPoolExecutor(len(batches)) as pool:
        for gots in [list(pool.map(step, batches)) for _ in range(2)]:
            for got, want in zip(gots, wants):
                assert all(map(torch.equal, got, want))


def test_a_copy_is_offloaded_again_by_itself():
    model = qlora_ext.offload_experts(mixture(2), "cpu")
    want = tiny.logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        experts = again.model.layers[0].mlp.experts
        assert experts.up.fetcher is None and experts.up.weight.device.type == "cpu"
        assert torch.equal(tiny.logits(again), want)
        qlora_ext.offload_experts(again, "cpu")
        assert experts.up.fetcher is not model.model.layers[0].mlp.experts.up.fetcher
        assert torch.equal(tiny.logits(again), want)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_leaves_experts_out(process_group):
    """A GPU's DDP refuses parameters on two kinds of devices, unless it is told to ignore them."""
    model, plain = offloaded(mixture(3))[0], mixture(3)
    packed = [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, packed)
    wrapped = DistributedDataParallel(model)
    assert not any(p.dtype == torch.uint8 for p in wrapped._module_parameters)
    batch = tiny.inputs(model)
    wrapped(**batch, labels=batch["input_ids"]).loss.backward()
    want = losses_and_gradients(plain)[1:]
    got = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, got, want))


def test_sharding_afterwards_is_refused(process_group):
    model, _, _ = offloaded(mixture(2))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="are now of type DTensor, want plain tensors: shard"
        ):
            tiny.logits(model)


def test_moves_and_saves(tmp_path):
    model, _, _ = offloaded(mixture(2))
    plain = mixture(2)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    before = model.model.layers[0].mlp.experts.up.weight
    model.to(torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    assert experts.up.weight is before and experts.up.dtype == torch.bfloat16
    assert torch.equal(tiny.logits(model), tiny.logits(plain.to(torch.bfloat16)))
    qlora_ext.save_adapter(model, tmp_path)
    assert torch.equal(
        tiny.logits(qlora_ext.merge_and_unload(model, progress_bar=False)),
        tiny.logits(qlora_ext.merge_and_unload(plain, progress_bar=False)),
    )


def test_what_is_refused():
    with pytest.raises(TypeError, match="model is a int, want"):
        qlora_ext.offload_experts(3)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no packed experts"):
        qlora_ext.offload_experts(tiny.make("llama"), "cpu")
    model = mixture(2)
    with pytest.raises(ValueError, match=r"experts is on the meta device, want plain tensors"):
        qlora_ext.offload_experts(copy.deepcopy(model).to("meta"), "cpu")
    qlora_ext.offload_experts(model, "cpu")
    with pytest.raises(ValueError, match="offloaded already"):
        qlora_ext.offload_experts(model, "cpu")
    stack = model.model.layers[0].mlp.experts.up
    alone = type(stack).__new__(type(stack))
    _share(stack, alone)
    with pytest.raises(RuntimeError, match="is no longer in a layer of its model; use copy"):
        alone(torch.randn(1, 64), torch.tensor([0, 1, 1, 1], dtype=torch.int32))
