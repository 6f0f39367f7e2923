"""torch's own tools on a whole Llama block with LoRA, ours and PEFT's: compile, checkpointing,
autocast, export, copies, files, other dtypes (issue 5, point 5)."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tiny_models as tiny
from qlora_ext import LoraConfig, add_lora, quantize_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.parametrize("adapters", ["ours", "peft"])


def make(adapters, dropout=0.0):
    """A Llama of one block whose linear layers all have an adapter, in training mode."""
    torch.manual_seed(0)
    model = quantize_model(tiny.make("llama", num_hidden_layers=1), progress_bar=False)
    if adapters == "ours":
        everything = {"key": True, "projection": True, "mlp": True}
        add_lora(model, LoraConfig(r=4, lora_dropout=dropout, **everything))
    else:
        peft = pytest.importorskip("peft")
        settings = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.train()


def block_of(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers[0]


def ids(length):
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(length))


def logits(model, length=7):
    return model(input_ids=ids(length), use_cache=False).logits


def step(model, forward, length):
    """Logits, loss and every gradient, for the same draws each time."""
    torch.manual_seed(1)
    out = forward(input_ids=ids(length), labels=ids(length), use_cache=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 14
    return [out.logits, out.loss, *torch.autograd.grad(out.loss, trained)]


def recompilations(compiled, model, lengths=(5, 8, 13), compare=True):
    """Runs both on several lengths; how many graphs that took beyond the first."""
    from torch._dynamo.utils import counters

    counters.clear()
    for length in lengths:
        got, want = (step(model, forward, length) for forward in (compiled, model))
        if compare:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return counters["stats"]["unique_graphs"] - 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_forward_and_backward_for_any_length(adapters, backend):
    model = make(adapters)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    assert recompilations(compiled, model) == 0


def test_compile_fullgraph_with_dropout(adapters):
    """Compiled layers draw masks of their own, so only the graph is the same."""
    model = make(adapters, dropout=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert recompilations(compiled, model, compare=False) == 0


@pytest.mark.parametrize("use_reentrant, compiled", [(False, False), (True, False), (False, True)])
def test_activation_checkpointing(adapters, use_reentrant, compiled):
    block = block_of(make(adapters, dropout=0.0 if compiled else 0.3))
    angles = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    position = (angles.cos(), angles.sin())

    def whole(x):
        return block(x, position_embeddings=position)

    def saved(x):
        return checkpoint(whole, x, use_reentrant=use_reentrant)

    def gradients(forward):
        block.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = forward(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in block.parameters() if p.requires_grad)]

    torch._dynamo.reset()
    if compiled:
        saved = torch.compile(saved, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(saved), gradients(whole), rtol=1e-4, atol=1e-5)


def test_autocast(adapters):
    model = make(adapters)
    want = step(model, model, 7)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            got = step(model, model, 7)
        assert got[0].dtype == dtype
        assert all(g.dtype == torch.float32 for g in got[2:])  # of fp32 adapters
        for g, w in zip(got, want, strict=True):
            assert (g.float() - w).norm() < 0.05 * w.norm()


def test_export_for_any_length(adapters):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens, use_cache=False).logits

    module = Logits(make(adapters).eval())
    length = {1: torch.export.Dim("length", min=2, max=32)}
    program = torch.export.export(module, (ids(9),), dynamic_shapes=(length,), strict=False)
    torch.testing.assert_close(program.module()(ids(17)), module(ids(17)))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(adapters, duplicate):
    model = make(adapters, dropout=0.3)
    other = duplicate(model)
    torch.testing.assert_close(step(other, other, 7), step(model, model, 7), rtol=0, atol=0)
    with torch.no_grad():  # a copy has parameters of its own
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.equal(logits(other.eval()), logits(model.eval()))


def test_other_dtypes(adapters):
    model = make(adapters).eval()
    packed = [p.clone() for p in model.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 7 * 4
    want = logits(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        got = logits(model)
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 0.05 * want.norm()
    after = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(after, packed, strict=True))


def test_other_devices(adapters):
    """Of devices that are here: meta and back through a state dict."""
    model = make(adapters).eval()
    want, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    assert torch.equal(logits(model), want)
