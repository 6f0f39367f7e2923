"""What is packed: the names to leave alone, and layers whose weight is read past their forward."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import every_architecture
import layer_reads
import qlora_ext
import tiny_models as tiny
from qlora_ext import LoraConfig, add_lora, merge_and_unload, quantize_model
from qlora_ext.models.names import Names, as_names, matches
from qlora_ext.models.reads import read_past_forward
from qlora_ext.nn import Embedding4bit, Linear4bit, Stack4bit

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*stay unquantized in layers that you might expect")


def packed_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, (Linear4bit, Stack4bit))}


def quantize(model, *args, **settings):
    return quantize_model(model, *args, progress_bar=False, **settings)


# Names --------------------------------------------------------------------------------------------


def llava():
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**tiny.LLAMA),
        image_token_index=90,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {"llava": llava}
MODELS |= {name: functools.partial(tiny.make, name) for name in ("llama", "t5", "mixtral")}


def by_quantize_model(model, folder, names):
    return quantize(model, modules_to_not_convert=names)


def by_from_pretrained(model, folder, names):
    config = qlora_ext.QLoraExtConfig(modules_to_not_convert=names)
    return type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def by_bitsandbytes_config(model, folder, names):
    asked = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=names)
    config = qlora_ext.QLoraExtConfig.from_bnb(asked)
    return type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def by_command(model, folder, names):
    from typer.testing import CliRunner

    from qlora_ext.cli.app import app

    keep = [part for name in names for part in ("--keep", name)]
    out = folder.parent / "out"
    result = CliRunner().invoke(app, ["quantize", str(folder), str(out), *keep])
    assert result.exit_code == 0, result.output
    return type(model).from_pretrained(out, dtype=torch.float32)


ENTRANCES = [by_quantize_model, by_from_pretrained, by_bitsandbytes_config, by_command]


@pytest.mark.parametrize(
    ("family", "names", "kept"),
    [
        ("llava", ["vision_tower"], lambda n: "vision_tower" in n),
        ("llava", ["vision_tower.encoder", "q_proj"], lambda n: ".encoder." in n or "q_proj" in n),
        ("llava", ["vision_tower.vision_model"], lambda n: "vision_tower" in n),
        ("mixtral", ["block_sparse_moe"], lambda n: ".mlp." in n),
        ("mixtral", ["layers.0.block_sparse_moe.experts"], lambda n: "layers.0.mlp.experts" in n),
        ("llava", ["language_model.model.layers.0"], lambda n: "language_model.layers.0." in n),
        ("llama", ["layers.1.mlp", "k_proj"], lambda n: "layers.1.mlp" in n or "k_proj" in n),
        ("llama", ["model.layers.0.self_attn.q_proj"], lambda n: n.endswith("0.self_attn.q_proj")),
        (
            "llama",
            ["layers.[0-9].mlp", "(q|k)_proj"],
            lambda n: "v_proj" not in n and "o_p" not in n,
        ),
        ("t5", ["encoder"], lambda n: n.startswith("encoder.")),
    ],
    ids=range(10),
)
def test_a_name_means_the_same_in_every_entrance(family, names, kept, tmp_path):
    make = MODELS[family]
    make().save_pretrained(tmp_path / "dense")
    everything = packed_names(quantize(make()))
    want = {name for name in everything if not kept(name)}
    assert want and want != everything
    for entrance in ENTRANCES:
        model = entrance(make(), tmp_path / "dense", names)
        assert packed_names(model) == want, entrance.__name__
        # What was kept is recorded: the saved model is the same again.
        model.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again")
        assert packed_names(again) == want, entrance.__name__
        assert set(again.config.quantization_config.modules_to_not_convert) == set(
            model.config.quantization_config.modules_to_not_convert
        )


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["proj", "vision_tow", "layers.1.ml", "q_proj_"])
def test_a_name_that_matches_nothing_is_named(entrance, name, tmp_path):
    make = MODELS["llama"]
    make().save_pretrained(tmp_path / "dense")
    said = rf"modules_to_not_convert has '{name}', which\s+matches\s+no"
    if entrance in (by_from_pretrained, by_bitsandbytes_config):
        with pytest.warns(UserWarning, match=said):
            model = entrance(make(), tmp_path / "dense", [name])
        assert packed_names(model) == packed_names(quantize(make()))
    else:
        with pytest.raises((ValueError, AssertionError), match=said):
            entrance(make(), tmp_path / "dense", [name])


@pytest.mark.parametrize("name", [r"layers\.0\.mlp$", r".*mlp$", "^model$"])
def test_a_pattern_that_ends_at_a_container_matches_nothing(name):
    """No layer below it is matched, so it would be ignored without a word."""
    with pytest.raises(ValueError, match="which matches no module"):
        quantize(tiny.make("llama"), modules_to_not_convert=[name])


@pytest.mark.parametrize("name", ["experts$", r"mlp\.gate$", "q_proj$"])
def test_a_pattern_that_ends_at_what_holds_weights_matches_it(name):
    model = tiny.make("qwen3_moe")
    assert Names(model).unmatched([name]) == []


def test_names_for_a_packed_checkpoint_change_nothing_and_that_is_said(tmp_path):
    packed = quantize(tiny.make("llama"), modules_to_not_convert=["k_proj"])
    packed.save_pretrained(tmp_path)
    config = qlora_ext.QLoraExtConfig(
        modules_to_not_convert=["layers.0.mlp", "k_proj", "none_such"]
    )
    with pytest.warns(UserWarning) as told:
        model = type(packed).from_pretrained(tmp_path, quantization_config=config)
    said = " ".join(str(w.message) for w in told)
    assert "packed already: model.layers.0.mlp.down_proj, " in said and "stay packed" in said
    assert "k_proj" not in said and "modules_to_not_convert has 'none_such', which matches" in said
    assert packed_names(model) == packed_names(packed)
    saved = model.config.quantization_config.to_dict()
    assert saved == packed.config.quantization_config.to_dict()
    assert config.modules_to_not_convert == ["layers.0.mlp", "k_proj", "none_such"]


def test_names_of_another_class_of_the_architecture(tmp_path):
    """A list that was saved for a causal model is one for its backbone, and the other way round."""
    causal = tiny.make("llama")
    causal.save_pretrained(tmp_path / "causal")
    causal.model.save_pretrained(tmp_path / "base")
    for cls, folder, name in (
        (transformers.LlamaModel, "causal", "model.layers.0.mlp"),
        (transformers.LlamaModel, "base", "model.layers.0.mlp"),
        (transformers.LlamaForCausalLM, "base", "layers.0.mlp"),
    ):
        config = qlora_ext.QLoraExtConfig(modules_to_not_convert=[name])
        model = cls.from_pretrained(tmp_path / folder, quantization_config=config)
        assert len(packed_names(model)) == 11
        assert not any("layers.0.mlp" in n for n in packed_names(model))
        # and each, packed, is read by the other class
        model.save_pretrained(tmp_path / "packed")
        for other in (transformers.LlamaModel, transformers.LlamaForCausalLM):
            assert len(packed_names(other.from_pretrained(tmp_path / "packed"))) == 11


@pytest.mark.parametrize(
    ("pattern", "name", "want"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head.weight", "lm_head", True),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("layers.1", "model.layers.11.mlp", False),
        ("proj", "model.layers.0.q_proj", False),
        ("q_proj", "model.layers.0.my_q_proj", False),
        ("a.b", "axb", False),  # a dot is a dot
        (".*q_proj", "model.layers.0.q_proj", True),
        ("^model.*1", "model.layers.1.q_proj", True),
        ("^layers", "model.layers.1.q_proj", False),
        ("layers.*.mlp", "model.layers.1.mlp.up_proj", True),
        ("[qk]_pro", "model.layers.0.q_proj", False),
        ("q|k", "model.layers.0.q_proj", False),
        ("(q|k)_proj", "model.layers.0.k_proj", True),
    ],
)
def test_matching(pattern, name, want):
    assert bool(matches(name, [pattern])) is want


def test_a_shared_module_goes_by_every_name():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(64, 64)})
    assert Names(model).matches("a", ["b"]) == "b"
    assert packed_names(quantize(model, modules_to_not_convert=["b"])) == {"c"}


def test_what_is_no_list_of_names_is_refused():
    assert len(packed_names(quantize(tiny.make("gpt_neox"), modules_to_not_convert=["lm_head"])))
    for names in (5, [None], [""], {"a": 1}, "("):
        with pytest.raises(ValueError, match=r"op: modules_to_not_convert (got|has)"):
            as_names(names, "op")
    with pytest.raises(ValueError, match="quantize_model: modules_to_not_convert has"):
        quantize(tiny.make("llama"), modules_to_not_convert=["(.+)+!"])
    assert as_names(iter(("b", "a")), "op") == as_names({"b": 1, "a": 2}.keys(), "op") == ["b", "a"]
    for owner, pack in (
        ("QLoraExtConfig", lambda names: qlora_ext.QLoraExtConfig(modules_to_not_convert=names)),
        (
            "quantize_model",
            lambda names: qlora_ext.quantize_model(
                nn.Sequential(nn.Linear(4, 4)), modules_to_not_convert=names
            ),
        ),
    ):
        with pytest.raises(
            ValueError, match=f"{owner}: modules_to_not_convert got {{'0': 1}}, want"
        ):
            pack({"0": 1})
        with pytest.raises(ValueError, match=r"no flags such as \(\?i\)"):
            pack(["(?i)UP_PROJ"])
    assert as_names("lm_head", "op") == ["lm_head"] and as_names({"b", "a"}, "op") == ["a", "b"]


# Weights read past the forward --------------------------------------------------------------------


class Reading(nn.Module):
    """Two layers, of which subclasses read `read` and never `called`."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(64, 64)
        self.called = nn.Linear(64, 64)
        self.many = nn.ModuleList([nn.Linear(64, 64)])
        self.slow = False


class Direct(Reading):
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


class Sliced(Reading):
    def forward(self, x):
        return self.called(x) @ self.read.weight[:, :64].T


class Alias(Reading):
    def forward(self, x):
        chosen = self.read
        weight = chosen.weight
        return F.linear(self.called(x), weight)


class ByName(Reading):
    def forward(self, x):
        return F.linear(self.called(x), getattr(getattr(self, "read"), "weight"))  # noqa: B009


class ByDict(Reading):
    def forward(self, x):
        return F.linear(self.called(x), self._modules["read"]._parameters["weight"])


class CastToFirst(Reading):
    def forward(self, x):
        return self.called(x).to(next(self.read.parameters()).dtype)


class Computed(Reading):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"read0": nn.Linear(64, 64)})

    def forward(self, x):
        return F.linear(self.called(self.read(x)), getattr(self.inner, f"read{0}").weight)


class Looped(Reading):
    def forward(self, x):
        for _, layer in enumerate(self.many):
            x = F.linear(x, layer.weight)
        return self.called(self.read(x))


class Listed(Reading):
    def forward(self, x):
        return self.called(x) @ torch.cat([layer.weight for layer in self.many]).T


class Cast(Reading):
    def forward(self, x):
        return self.called(x).to(self.read.weight.dtype)


class Property(Reading):
    @property
    def matrix(self):
        return self.read.weight.T

    def forward(self, x):
        return self.called(x) @ self.matrix


class CachedProperty(Reading):
    @functools.cached_property
    def matrix(self):
        return self.read.weight.T

    def forward(self, x):
        return self.called(x) @ self.matrix


def multiply(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Helper(Reading):
    def forward(self, x):
        return multiply(self.read, self.called(x))


class OwnHelper(Reading):
    def product(self, x, layer):
        return x @ layer.weight.T

    def forward(self, x):
        return self.product(self.called(x), layer=self.read)


class Multiply(nn.Module):
    def forward(self, x, layer):
        return F.linear(x, layer.weight)


class HandedOn(Reading):
    def __init__(self):
        super().__init__()
        self.multiply = Multiply()

    def forward(self, x):
        return self.multiply(self.called(x), self.read)


class Inherited(Direct):
    def forward(self, x):
        return super().forward(x) + 1


class Decorated(Reading):
    @torch.no_grad()
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


class OtherFile(Reading):
    def forward(self, x):
        return layer_reads.multiply(self.read, self.called(x))


class Static(Reading):
    def forward(self, x):
        return layer_reads.Products.multiply(self.read, self.called(x))


class Imports(Reading):
    def forward(self, x):
        from layer_reads import multiply as product

        return product(self.read, self.called(x))


class FirstListed(Reading):
    def forward(self, x):
        return self.called(x) @ list(self.read.parameters())[0].T  # noqa: RUF015


class ParameterLoop(Reading):
    def forward(self, x):
        x = self.called(x)
        for parameter in self.read.parameters():
            x = x @ parameter.T if parameter.ndim == 2 else x + parameter
        return x


class ParameterDict(Reading):
    def forward(self, x):
        return self.called(x) @ dict(self.read.named_parameters())["weight"].T


class StateDict(Reading):
    def forward(self, x):
        return self.called(x) @ self.read.state_dict()["weight"].T


class GetParameter(Reading):
    def forward(self, x):
        return self.called(x) @ self.get_parameter("read.weight").T


class Nested(Reading):
    def forward(self, x):
        def product(layer):
            return self.called(x) @ layer.weight.T

        return product(self.read)


class Lambda(Reading):
    def forward(self, x):
        return sum(map(lambda layer: self.called(x) @ layer.weight.T, [self.read]))


class OtherFirstName(Reading):
    def forward(module, x):
        return F.linear(module.called(x), module.read.weight)


class Returned(Reading):
    def pick(self):
        return self.read

    def forward(self, x):
        return F.linear(self.called(x), self.pick().weight)


class InDict(Reading):
    def forward(self, x):
        layers = {"a": self.read, "b": self.called}
        return F.linear(layers["b"](x), layers["a"].weight)


class NamedLikeLoading(Reading):
    def load_balance(self, x):
        return F.linear(x, self.read.weight)

    def forward(self, x):
        return self.load_balance(self.called(x))


class Penalty(Reading):
    def penalty(self):
        return sum(m.weight.float().pow(2).sum() for m in self.read.modules())

    def forward(self, x):
        return self.called(x) * self.penalty()


weight_of = operator.attrgetter("weight")


class Getter(Reading):
    def forward(self, x):
        return self.called(x) @ weight_of(self.read).T


class DottedGetter(Reading):
    def forward(self, x):
        return self.called(x) @ operator.attrgetter("read.weight")(self).T


class Typed(Reading):
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight.type(torch.float32))


class FirstInNoForward(Reading):
    """As Swin v2 has it: only its `_init_weights` calls the method, maybe on a packed model."""

    def table(self):
        return torch.zeros(4).to(next(iter(self.read.parameters())).dtype)

    def forward(self, x):
        return self.called(x)


READS = [Direct, Sliced, Alias, ByName, Cast, Property, CachedProperty, Helper, OwnHelper, HandedOn]
READS += [Inherited, Decorated, ByDict, CastToFirst, OtherFile, Static, Imports, FirstListed]
READS += [ParameterLoop, ParameterDict, StateDict, GetParameter, Nested, Lambda, OtherFirstName]
READS += [Returned, InDict, NamedLikeLoading, Penalty, Getter, DottedGetter, Typed]
READS += [FirstInNoForward]


@pytest.mark.parametrize("cls", READS, ids=lambda cls: cls.__name__)
def test_a_layer_that_is_read_stays_dense(cls):
    model = nn.ModuleDict({"part": cls()})
    x = torch.randn(3, 64)
    want = model["part"](x)
    quantize(model)
    assert packed_names(model) == {"part.called", "part.many.0"}
    reasons = {part.name: part.reason for part in model.quantization_report.unquantized}
    assert "which bypasses the layer's forward" in reasons["part.read"]
    assert cls.__name__ in reasons["part.read"]
    got = model["part"](x)
    assert got.dtype == want.dtype and (got - want).norm() < 0.3 * want.norm()


def scale(layer, args, y):
    return y / layer.weight.norm()


class Scales:
    def scale(self, layer, args):
        return args[0] / layer.weight.norm()


def look(layer, args, y):
    assert layer.weight.device == y.device


@pytest.mark.parametrize("hook", ["function", "method", "lambda", "on the parent"])
def test_a_layer_that_a_hook_reads_stays_dense(hook):
    model = Replaced()
    model.called.register_forward_hook(look)
    if hook == "function":
        model.read.register_forward_hook(scale)
    elif hook == "method":
        model.read.register_forward_pre_hook(Scales().scale)
    elif hook == "lambda":
        model.read.register_forward_hook(lambda layer, x, y: y / layer.weight.norm())
    else:

        def scale_all(module, args, y):
            return y / module.read.weight.norm()

        model.register_forward_hook(scale_all)
    assert set(read_past_forward(model)) == {id(model.read)}


class Unpacked(Looped):
    def forward(self, x):
        (first,) = self.many
        return F.linear(self.called(self.read(x)), first.weight)


class Tail(Looped):
    def forward(self, x):
        for layer in self.many[-1:]:
            x = F.linear(x, layer.weight)
        return self.called(self.read(x))


class Next(Looped):
    def forward(self, x):
        layers = iter(self.many)
        return F.linear(self.called(self.read(x)), next(layers).weight)


@pytest.mark.parametrize(
    "cls", [Looped, Listed, Unpacked, Tail, Next], ids=lambda cls: cls.__name__
)
def test_a_list_of_layers_that_is_read_stays_dense(cls):
    model = quantize(cls())
    assert packed_names(model) == {"called", "read"}
    assert model(torch.randn(3, 64)).isfinite().all()


class OverAll(nn.Module):
    """A penalty on the weights, as a loss has it, over all linear layers but those of `other`."""

    def __init__(self, how):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.other = nn.ModuleList([nn.Linear(64, 64)])
        self.how = how

    def modules_loop(self):
        total = 0.0
        for m in self.net.modules():
            if isinstance(m, nn.Linear):
                total += m.weight.float().pow(2).sum()
        return total

    def parameters_loop(self):
        return sum(p.float().pow(2).sum() for p in self.net.parameters())

    def helper(self):
        return layer_reads.penalty(self.net)

    def applied(self):
        totals = []

        def add(m):
            if not isinstance(m, nn.Linear):
                return
            totals.append(m.weight.float().pow(2).sum())

        self.net.apply(add)
        return sum(totals)

    def forward(self, x):
        return (
            self.other[0](x).mean()
            + {
                "modules_loop": self.modules_loop,
                "parameters_loop": self.parameters_loop,
                "helper": self.helper,
                "applied": self.applied,
            }[self.how]()
        )


@pytest.mark.parametrize("how", ["modules_loop", "parameters_loop", "helper", "applied"])
def test_a_loop_over_all_weights_gives_the_right_number(how):
    torch.manual_seed(0)
    model, x = OverAll(how), torch.randn(3, 64)
    want = model(x)
    quantize(model)
    assert packed_names(model) == {"other.0"}
    assert (model(x) - want).abs() < 0.1 * want.abs()


class Utilities(Reading):
    """Loops over all weights that no forward calls, or that look at no linear layer."""

    def freeze(self):
        for parameter in self.parameters():
            parameter.requires_grad = False

    def norms(self):
        return {n: m.weight.norm() for n, m in self.named_modules() if hasattr(m, "weight")}

    def scales(self):
        return sum(m.weight.sum() for m in self.modules() if isinstance(m, nn.LayerNorm))

    def trained(self):
        return sum(p.pow(2).sum() for p in self.parameters() if p.requires_grad)

    def forward(self, x):
        self.freeze()
        dtype = next(self.many.parameters()).device
        return self.called(self.read(x)).to(dtype) + self.scales() + self.trained()


def test_loops_that_touch_no_packed_weight_cost_nothing():
    model = quantize(Utilities())
    assert packed_names(model) == {"called", "read", "many.0"}
    assert model(torch.randn(3, 64)).isfinite().all()


def test_a_name_that_is_computed_may_be_any():
    model = quantize(Computed())
    assert packed_names(model) == {"called", "read", "many.0"}
    assert model(torch.randn(3, 64)).isfinite().all()


class Asks(Reading):
    """What does no harm: where the weight is, whether there is one, and comparing dtypes."""

    def __init__(self, slow=False):
        super().__init__()
        self.slow = slow

    def _init_weights(self):
        self.read.weight.data.normal_()

    def forward(self, x):
        x = x.to(self.read.weight.device)
        weight = self.read.weight
        x = x.to(weight.device) if weight.requires_grad else x
        if self.read.weight is None or not isinstance(self.read.weight, torch.Tensor):
            raise ValueError
        if x.dtype != self.read.weight.dtype and self.slow:
            return F.linear(x, self.read.weight)
        if not self.slow:
            return self.called(self.read(x))
        return x @ self.read.weight.T


class Replaced(Direct):
    def forward(self, x):
        return self.called(self.read(x))


def test_what_does_no_harm_is_packed():
    for model in (Asks(), Replaced()):
        assert read_past_forward(model) == {}
        assert packed_names(quantize(model)) == {"called", "read", "many.0"}
        assert model(torch.randn(3, 64)).isfinite().all()
    assert len(read_past_forward(Asks(slow=True))) == 1


def test_classes_without_source():
    """Made by exec, as in an interactive session: what names the layer and `weight` counts."""
    code = """
class Hidden(Reading):
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)

class Plain(Reading):
    def forward(self, x):
        return self.called(self.read(x))
"""
    scope = {"Reading": Reading, "F": F}
    exec(code, scope)
    model = scope["Hidden"]()
    assert id(model.read) in read_past_forward(model)
    assert read_past_forward(scope["Plain"]()) == {}


def test_an_embedding_that_is_read_stays_dense():
    model = tiny.make("opt")
    model.model.decoder.project = model.model.decoder.embed_tokens
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    vision = quantize(transformers.CLIPVisionModel(config), quantize_embeddings=True)
    assert not any(isinstance(m, Embedding4bit) for m in vision.modules())
    reasons = {part.name: part.reason for part in vision.quantization_report.unquantized}
    name = next(name for name in reasons if name.endswith("position_embedding"))
    assert "read by CLIPVisionEmbeddings" in reasons[name]


STATE_SPACE = {
    "mamba": ("MambaConfig", {"state_size": 8}, {"x_proj", "dt_proj", "out_proj"}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8}, {"x_proj", "dt_proj", "out_proj"}),
    "mamba2": (
        "Mamba2Config",
        {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1},
        {"out_proj"},
    ),
}


@pytest.mark.parametrize("family", STATE_SPACE)
def test_state_space_models(family, tmp_path):
    name, settings, read = STATE_SPACE[family]
    sizes = {k: tiny.COMMON[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = getattr(transformers, name)(**sizes, **settings, pad_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    want = tiny.logits(dense)
    asked = qlora_ext.QLoraExtConfig()
    loaded = type(dense).from_pretrained(
        tmp_path / "dense", quantization_config=asked, dtype=torch.float32
    )
    own = quantize(dense)
    assert packed_names(own) == packed_names(loaded)
    assert {name.rpartition(".")[2] for name in packed_names(own)} == {"in_proj"}
    left = {
        part.name.rpartition(".")[2]: part.reason for part in own.quantization_report.unquantized
    }
    assert all("which bypasses the layer's forward" in left[name] for name in read)
    for model in (own, loaded.eval()):
        assert (tiny.logits(model) - want).norm() < 0.5 * want.norm()
    assert torch.equal(tiny.logits(own), tiny.logits(loaded))


def test_attention_that_computes_its_own_products():
    config = transformers.WavLMConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        conv_dim=(32,), conv_kernel=(10,), conv_stride=(5,), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = quantize(transformers.WavLMModel(config).eval())
    with torch.no_grad():
        out = model(torch.randn(1, 1600)).last_hidden_state
    assert out.isfinite().all()
    assert len([name for name in packed_names(model) if "feed_forward" in name]) == 4


class Marked(transformers.LlamaPreTrainedModel):
    """A layer that is read unless the config says that the model is packed."""

    def __init__(self, config):
        super().__init__(config)
        self.read = nn.Linear(64, 64)

    def forward(self, x):
        if hasattr(self.config, "_is_quantized"):
            return self.read(x)
        return F.linear(x, self.read.weight)


def test_a_way_around_packed_weights_is_known():
    model = quantize(Marked(transformers.LlamaConfig()))
    assert packed_names(model) == {"read"}
    assert model(torch.randn(3, 64)).isfinite().all()
    model = quantize(nn.ModuleDict({"inner": Marked(transformers.LlamaConfig())}))
    assert model["inner"](torch.randn(3, 64)).isfinite().all()


@pytest.mark.parametrize("slow", [False, True])
def test_a_path_that_the_config_turns_off_costs_nothing(slow):
    model = tiny.make("bloom", pretraining_tp=2 if slow else 1, slow_but_exact=slow)
    quantize(model)
    assert len(packed_names(model)) == (4 if slow else 8)
    assert tiny.logits(model).isfinite().all()


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "t5"])
def test_usual_families_lose_no_layer(family):
    with torch.device("meta"):
        model = tiny.make(family)
    head = model.get_output_embeddings()
    assert set(read_past_forward(model)) <= {id(head), id(model.get_input_embeddings())}


def test_quantize_model_tells_the_models_own_code(tmp_path):
    """As from_pretrained does: transformers has ways around packed weights."""
    config = transformers.LlamaConfig(**tiny.LLAMA)
    other = transformers.LlamaForCausalLM(config)
    model = quantize(transformers.LlamaForCausalLM(config))
    assert model.config._is_quantized and model.model.layers[0].self_attn.config._is_quantized
    assert not hasattr(other.config, "_is_quantized")
    wrapped = quantize(nn.ModuleDict({"inner": transformers.LlamaForCausalLM(config)}))
    assert wrapped["inner"].config._is_quantized and not hasattr(config, "_is_quantized")
    merged = model.dequantize()
    assert not hasattr(merged.config, "_is_quantized")
    assert not hasattr(merged, "quantization_report")
    joint = add_lora(quantize(llava()), LoraConfig(target_modules=["up_proj"]))
    merge_and_unload(joint, torch.float32, progress_bar=False)
    configs = [m.config for m in joint.modules() if isinstance(m, transformers.PreTrainedModel)]
    assert len(configs) > 2 and not any(hasattr(config, "_is_quantized") for config in configs)


# Every architecture -------------------------------------------------------------------------------

QUICK = ("bamba", "bert", "bloom", "gpt2", "jamba", "llama", "mixtral", "t5", "wavlm", "whisper")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow])
        for kind in every_architecture.class_names()
    ],
)
def test_every_architecture_runs_packed_where_it_runs_dense(kind):
    """A weight that is read as bytes shows on the meta device: by its dtype, or its shape."""
    built = ran = 0
    for name in every_architecture.class_names()[kind]:
        model = every_architecture.build(name)
        if model is None:
            continue
        built += 1
        dense = every_architecture.runs(model)
        try:
            quantize(model)
        except ValueError as error:  # nothing but convolutions, say
            assert "no layer to pack" in str(error), name
            continue
        if dense is None:
            ran += 1
            assert every_architecture.runs(model) is None, name
    if kind in QUICK:
        assert ran
    elif not built:
        pytest.skip(f"no class of {kind} can be built from defaults here")


def test_most_architectures_are_reached():
    """The walk above is over hundreds of architectures, whatever transformers calls them."""
    names = every_architecture.class_names()
    assert len(names) > 300 and sum(map(len, names.values())) > 1000
    assert {"llama", "falcon_mamba", "wavlm", "deberta", "reformer"} <= names.keys()


# Adapters on dense layers ------------------------------------------------------------------------


def test_no_adapter_where_it_would_be_left_out():
    model = quantize_model(Direct(), progress_bar=False)
    with pytest.raises(
        ValueError, match=r"Direct\.forward reads the weight of read and bypasses its"
    ):
        add_lora(model, LoraConfig(target_modules=["read", "called"]))
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out read \(Direct\.forward\): that'):
        add_lora(model, LoraConfig(target_modules="all-linear"))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"called", "many.0"}


def test_a_layer_whose_dtype_is_read_takes_an_adapter():
    model = add_lora(Cast(), LoraConfig(target_modules=["read"]))
    assert hasattr(model.read, "lora_A")
    model(torch.randn(3, 64))
