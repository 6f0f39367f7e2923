"""Errors of code that reads a packed weight and was not found before packing: what they say."""

import copy
import io
import operator
import pickle
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import qlora_ext
from qlora_ext.models.raw_errors import _tells_bytes, add_explanation
from qlora_ext.models.reads import read_in_frame
from qlora_ext.nn import Linear4bit, LoraLinear4bit

pytestmark = pytest.mark.filterwarnings("ignore:(quantize_model|QLoraExtConfig)")
MARK = "\nqlora_ext: "
weight_of = operator.attrgetter("weight")


@pytest.fixture
def not_found(monkeypatch):
    """Nothing is found by its source, so that the error is all there is."""
    monkeypatch.setattr("qlora_ext.models.plan.read_past_forward", lambda model: {})


class Net(nn.Module):
    """Two layers; subclasses read one of them."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(64, 64)
        self.called = nn.Linear(64, 64)
        self.many = nn.ModuleList([nn.Linear(64, 64)])
        self.apart = nn.ModuleDict({"proj": nn.Linear(64, 64)})
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.called(self.read(x)))


class Product(Net):
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


class Computed(Net):
    def forward(self, x):
        key = "".join(["re", "ad"])
        return F.linear(self.called(x), getattr(self._modules[key], "weight"))  # noqa: B009


class Getter(Net):
    def forward(self, x):
        return self.called(x) @ weight_of(self.read).T


class Property(Net):
    @property
    def matrix(self):
        return self.read.weight.T

    def forward(self, x):
        return self.called(x) @ self.matrix


def product(x, weight):
    return F.linear(x, weight.float())


class Helper(Net):
    def forward(self, x):
        return product(self.called(x), self.read.weight)


class Looped(Net):
    def forward(self, x):
        for layer in self.many:
            x = F.linear(x, layer.weight)
        return x


class Viewed(Net):
    def forward(self, x):
        return torch.einsum("bi,hoi->bho", self.called(x), self.read.weight.view(4, 16, 64))


class Averaged(Net):
    def forward(self, x):
        return self.called(x) * self.read.weight.mean(0)


class Redrawn(Net):
    def forward(self, x):
        nn.init.normal_(self.read.weight)
        return self.called(x)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T


class Custom(Net):
    def forward(self, x):
        return OwnFunction.apply(self.called(x), self.read.weight)


class Convolved(Net):
    def forward(self, x):
        return F.conv1d(self.called(x)[:, :, None], self.read.weight[:, :, None])


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.read.register_forward_hook(lambda layer, x, y: y @ layer.weight.T)


class Cast(Net):
    def forward(self, x):
        return self.called(x.to(self.read.weight.dtype))


class Table(Net):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 64)

    def forward(self, x):
        return self.norm(F.embedding(torch.arange(len(x)), self.table.weight))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(Product(), nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Attention(Net):
    def forward(self, x):
        zeros = torch.zeros(3 * 64, 64)
        return F.multi_head_attention_forward(
            x, x, x, 64, 4, zeros, None, None, None, False, 0.0, self.read.weight, self.read.bias
        )[0]


def pack(model, **settings):
    return qlora_ext.quantize_model(model, progress_bar=False, dense_panels=False, **settings)


# what reads -> (the module that is named, what keeps it dense)
READERS = {
    Product: ("Product", ["read"]),
    Computed: ("Computed", ["read"]),
    Getter: ("Getter", ["read"]),
    Property: ("Property", ["read"]),
    Helper: ("Helper", ["read"]),
    Looped: ("Looped", ["many"]),
    Viewed: ("Viewed", ["read"]),
    Averaged: ("Averaged", ["read"]),
    Redrawn: ("Redrawn", ["read"]),
    Custom: ("Custom", ["read"]),
    Convolved: ("Convolved", ["read"]),
    Hooked: ("Hooked", ["read"]),
    Cast: ("Cast", ["read"]),
    Table: ("Table", ["table"]),
    Attention: ("Attention", ["read"]),
    Stack: ("layers.0.0 (Product)", ["read"]),
}


def raised(model, *args, **kwargs):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        model(*args, **kwargs)
    return caught.value


def advice(error):
    return re.search(r"modules_to_not_convert=(\[.*\])$", str(error))[1]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_the_error_names_module_and_layer_and_the_advice_helps(reader, not_found):
    model = pack(reader(), quantize_embeddings=True)
    x = torch.randn(4, 64)
    error = raised(model, x)
    for hook in list(model._forward_hooks):
        del model._forward_hooks[hook]
    raw = raised(model, x)
    who, keep = READERS[reader]
    assert type(error) is type(raw)
    assert MARK not in str(raw)
    assert str(error).startswith(f"{raw}{MARK}{who} seems to read the weight of a packed layer")
    assert str(error).count(MARK) == 1
    given = eval(advice(error))
    assert set(keep) <= set(given)
    again = pack(reader(), quantize_embeddings=True, modules_to_not_convert=given)
    again(x)


def test_several_layers_of_a_stack_are_kept_by_one_name(not_found):
    names = eval(advice(raised(pack(Stack()), torch.randn(4, 64))))
    model = pack(Stack(), modules_to_not_convert=names)
    assert all(type(layer[0].read) is nn.Linear for layer in model.layers)
    model(torch.randn(4, 64))


TARGETS = {f"{d} target": d for d in (torch.int32, torch.int16, torch.float32)}
OWN_MISTAKES = ["mask", "size", "packed size", "dtype with a number", "index", "raise", "norm"]
OWN_MISTAKES += ["memory", "conv", *TARGETS]


class Straight(Net):
    """Its own mistakes: none is about a packed weight."""

    def forward(self, x, how):
        if self.read.weight.device != x.device:  # reads the weight, and does no harm
            return None
        y = self.called(self.read(x))
        if how == "mask":
            return y.masked_fill(torch.ones(4, 64, dtype=torch.uint8), 0.0)
        if how == "size":
            return y + torch.zeros(4, 31)
        if how == "packed size":
            return y * torch.ones(32)
        if how == "dtype with a number":  # of the packed size
            raise TypeError("want another dtype than torch.float32")
        if how in TARGETS:
            return F.cross_entropy(y, torch.zeros(4).to(TARGETS[how]))
        if how == "index":
            return y[torch.zeros(4, dtype=torch.int16)]
        if how == "raise":
            raise ValueError("want another shape of 7")
        if how == "norm":
            return self.norm(y[:, :48])
        if how == "memory":
            raise torch.OutOfMemoryError("uint8")
        return F.conv1d(x[None].byte() if how == "bytes" else x, torch.zeros(1, 1, 1))


@pytest.mark.parametrize("how", OWN_MISTAKES)
def test_other_errors_pass_as_they_are(how):
    model = pack(Straight())
    assert MARK not in str(raised_by_any(model, torch.randn(4, 64), how))
    assert MARK not in str(raised_by_any(model, torch.randn(4, 48), how))  # our own error


def raised_by_any(model, *args):
    with pytest.raises(Exception) as caught:
        model(*args)
    return caught.value


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32])
def test_labels_of_another_dtype_are_not_blamed_on_a_layer(dtype):
    transformers = pytest.importorskip("transformers")

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_labels=3, pad_token_id=0,
        problem_type="single_label_classification",
    )  # fmt: skip
    ids = torch.randint(3, 96, (2, 9))
    for name, labels in (("CausalLM", ids), ("SequenceClassification", torch.zeros(2))):
        model = pack(getattr(transformers, f"LlamaFor{name}")(config))
        error = raised(model, input_ids=ids, labels=labels.to(dtype))
        assert "got" in str(error)
        assert MARK not in str(error)


@pytest.mark.parametrize(
    ("text", "tells"),
    [
        ("expected target dtype to be Long or Byte, but got Int", False),
        ("expected scalar type Long or Int or Byte but found Float", False),
        ("Expected one of these scalar types: Byte, Char, Long; but got torch.FloatTensor", False),
        ("only uint8 or bool masked indices", False),
        ("expected Long, Int; but got torch.ByteTensor instead", True),
        ("mat1 and mat2 must have the same dtype, but got Float and Byte", True),
        ("expected scalar type Byte but found Float", True),
        ("\"addmm_impl_cpu_\" not implemented for 'Byte'", True),
    ],
)
def test_what_was_accepted_is_not_what_was_given(text, tells):
    assert _tells_bytes(text) is tells


class Reads:
    """Code, and whether a packed weight harms it."""

    def device(self, x):
        return x.to(self.read.weight.device)

    def compared(self, x):
        return x if x.dtype != self.read.weight.dtype else self.read(x)

    def absent(self, x):
        return x if self.read.weight is None else self.read(x)

    def variable(self, x):
        weight = self.read.weight
        return x.to(weight.device) if weight.requires_grad else x

    def layer_of_that_name(self, x):
        return self.down_proj(x)

    def harm_dtype(self, x):
        return x.to(self.read.weight.dtype)

    def harm_product(self, x):
        return x @ self.read.weight.T

    def harm_values(self, x):
        return self.read.weight == x

    def harm_variable(self, x):
        weight = self.read.weight
        return x.to(weight.device) @ weight

    def harm_inner(self, x):
        return (lambda: self.read.weight)() + x

    def harm_name(self, x):
        return getattr(self.read, "weight") + x  # noqa: B009

    def harm_all(self, x):
        return [p.sum() for p in self.parameters()]


@pytest.mark.parametrize("name", [name for name in vars(Reads) if not name.startswith("__")])
def test_code_that_asks_for_what_packing_leaves_is_no_reader(name):
    model = type("Model", (Reads, Net), {})()
    model.down_proj, x = nn.Linear(64, 64), torch.randn(64, 64)
    layers = {id(p): [m] for m in model.modules() for p in m._parameters.values()}
    frames = []
    sys.setprofile(lambda frame, event, argument: frames.append(frame))
    try:
        getattr(model, name)(x)
    finally:
        sys.setprofile(None)
    frame = next(f for f in frames if f.f_code is vars(Reads)[name].__code__)
    assert bool(read_in_frame(frame, None, layers)) is name.startswith("harm")


class Seeing(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.proj = nn.Conv2d(3, 64, 4), nn.Linear(64, 64)

    def forward(self, pixels):
        return self.proj(self.patches(pixels).flatten(2).mT)


def test_bytes_that_the_caller_gave_are_not_blamed_on_a_layer():
    model = pack(Seeing())
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for error in (raised(model, pixels), raised(model, pixels=pixels)):
        assert MARK not in str(error)


def test_an_error_that_is_being_handled_elsewhere_stays_as_it_is():
    class Silent(Net):
        def forward(self, x):
            self.called(x)

    model = pack(Silent())
    try:
        raise RuntimeError("mat1 and mat2 must have the same dtype, but got Float and Byte")
    except RuntimeError as error:
        model(torch.randn(4, 64))
        assert MARK not in str(error)


def test_a_head_tied_after_packing(not_found):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.proj = nn.Embedding(32, 64), nn.Linear(64, 64)
            self.lm_head = nn.Linear(64, 32, bias=False)

        def forward(self, ids):
            return self.lm_head(self.proj(self.embed(ids)))

    model = pack(Tied(), quantize_embeddings=True, modules_to_not_convert=["lm_head"])
    model.lm_head.weight = model.embed.weight
    error = raised(model, torch.arange(4))
    assert "lm_head (Linear) was tied to embed, a packed embedding" in str(error)
    assert advice(error) == "['embed']"


# What a hook must not get in the way of -----------------------------------------------------------


def explains(model):
    return add_explanation in model._forward_hooks.values()


def test_copies_explain_too(not_found):
    model = pack(Product())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(4, 64)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for same in (*copies, torch.load(file, weights_only=False), AveragedModel(model)):
        assert MARK in str(raised(same, x))


def test_a_graph_may_ask_for_the_dtype_and_device_of_a_packed_weight(not_found):
    class Asks(Net):
        def forward(self, x):
            weight = self.called.weight
            x = x.to(weight.device) if weight.dtype is not torch.int8 else x
            return self.called(x)

    model, x = pack(Asks()), torch.randn(4, 64)
    assert isinstance(model.called, Linear4bit)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_compiled_exported_and_checkpointed_models_are_as_before():
    model, x = pack(Net()), torch.randn(4, 64)
    want = model(x)
    assert explains(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    inside = copy.deepcopy(model)
    inside.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(x), want)
    for strict in (False, True):
        exported = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), want)
    for use_reentrant in (False, True):
        given = x.clone().requires_grad_()
        y = checkpoint(model, given, use_reentrant=use_reentrant)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        assert given.grad is not None


def test_sharded_models_explain(not_found, tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        x = torch.randn(4, 64)
        parallel = DistributedDataParallel(pack(Product()))
        assert "Product seems to read" in str(raised(parallel, x))
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = fully_shard(pack(Product()), mesh=mesh)
        error = raised(sharded, x)
        assert "Product seems to read" in str(error)
        assert advice(error) == "['read']"
        fine = pack(Net())
        want = fine(x)
        torch.testing.assert_close(fully_shard(fine, mesh=mesh)(x), want)
    finally:
        torch.distributed.destroy_process_group()


def test_peft_explains_and_a_dense_model_forgets(not_found):
    peft = pytest.importorskip("peft")

    x = torch.randn(4, 64)
    config = peft.LoraConfig(r=2, target_modules=["called", "read"])
    wrapped = peft.get_peft_model(pack(Product()), config)
    error = raised(wrapped, x)
    assert "Product seems to read the weight" in str(error)
    assert "base_layer" not in str(error)
    assert advice(error) == "['read']"
    assert MARK in str(raised(wrapped.unload(), x))

    dense = peft.get_peft_model(pack(Net()), config).merge_and_unload()
    assert not any(map(explains, dense.modules()))
    lora = qlora_ext.LoraConfig(r=2, target_modules=["called", "read"])
    model = qlora_ext.add_lora(pack(Net()), lora)
    assert explains(model)
    merged = qlora_ext.merge_and_unload(model, torch.float32, progress_bar=False)
    assert not any(map(explains, merged.modules()))


def test_a_model_built_of_packed_layers_explains_with_adapters():
    class Built(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.other = Linear4bit(64, 64), Linear4bit(64, 64)

        def forward(self, x):
            return F.linear(self.proj(x), self.other.weight)

    model = qlora_ext.add_lora(Built(), qlora_ext.LoraConfig(r=2, target_modules=["proj"]))
    assert advice(raised(model, torch.randn(4, 64))) == "['other']"


def test_transformers_models_explain_however_they_were_packed(not_found, tmp_path):
    transformers = pytest.importorskip("transformers")

    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8, pad_token_id=0
    )
    dense = transformers.MambaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    load = transformers.MambaForCausalLM.from_pretrained
    settings = qlora_ext.QLoraExtConfig()
    loaded = load(tmp_path / "dense", quantization_config=settings, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", dtype=torch.float32)
    ids = torch.randint(96, (2, 9))
    for model in (pack(dense), loaded, again):
        hooked = sum(map(explains, model.modules()))
        assert hooked == 2  # the model and its backbone, which may be called alone
        for module in (model, model.backbone):
            model.config.__dict__.pop("_is_quantized", None)
            error = raised(module, ids)
            assert "layers.0.mixer (MambaMixer)" in str(error)
            assert "mixer.dt_proj" in eval(advice(error))
    assert not any(map(explains, again.dequantize().modules()))


# torch's functions on modules ---------------------------------------------------------------------


def test_requires_grad_leaves_packed_weights_frozen():
    for model in (pack(Net()), nn.Sequential(LoraLinear4bit(64, 64, r=2))):
        model.requires_grad_(False)
        with pytest.warns(UserWarning, match=r"requires_grad_\(True\): the packed weights of "):
            assert model.requires_grad_(True) is model
        for parameter in model.parameters():
            assert parameter.requires_grad is parameter.is_floating_point()
        model.requires_grad_(False)
        assert not any(p.requires_grad for p in model.parameters())


def test_requires_grad_of_other_integers_stays_an_error():
    model = pack(Net())
    model.counts = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        model.requires_grad_(True)
