"""Task heads on 4-bit models: dense, fresh where the checkpoint has none, saved and reloaded."""

import copy

import pytest
import torch
from torch import nn

import qlora_ext
import tiny_models as tiny
from qlora_ext import quantize_model
from qlora_ext.models.heads import heads_of
from qlora_ext.nn import Linear4bit

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*stay unquantized in layers that you might expect")

HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
# Backbones that have task heads only; the classes of tiny.FAMILIES write text as well.
ENCODERS = {
    "bert": ("BertConfig", tiny.COMMON),
    "roberta": ("RobertaConfig", tiny.COMMON),
    "electra": ("ElectraConfig", {**tiny.COMMON, "embedding_size": 64}),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    ),
    "deberta": ("DebertaConfig", tiny.COMMON),
    "modernbert": ("ModernBertConfig", {**tiny.COMMON, "cls_token_id": 1, "sep_token_id": 2}),
    "umt5": ("UMT5Config", {**tiny.FAMILIES["t5"][1], "pad_token_id": 0}),
}
CONFIGS = {**tiny.FAMILIES, **ENCODERS}


def config_of(family, **settings):
    name, defaults = CONFIGS[family]
    return getattr(transformers, name)(**{**defaults, "pad_token_id": 0, **settings})


def auto(head):
    return getattr(transformers, f"AutoModelFor{head}")


def has(family, head):
    return type(config_of(family)) in auto(head)._model_mapping


PAIRS = [(family, head) for family in CONFIGS for head in HEADS if has(family, head)]
QUICK = [("llama", "TokenClassification"), ("gpt2", "SequenceClassification")]
QUICK += [(family, HEADS[0]) for family in ("bert", "roberta", "modernbert", "t5", "umt5")]
QUICK += [("t5", "QuestionAnswering"), ("bert", "MultipleChoice")]


def some_quick(pairs):
    return [
        pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow], id="-".join(pair))
        for pair in pairs
    ]


def save_backbone(family, path):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config_of(family))
    model.save_pretrained(path / "dense")
    quantize_model(model, progress_bar=False).save_pretrained(path / "packed")


def load(cls, path, **settings):
    torch.manual_seed(5)
    return cls.from_pretrained(path, dtype=torch.float32, **settings).eval()


def head_layers(model):
    """Name -> layer of the linear layers that are heads, by what has to be true of them."""
    found = heads_of(model)
    names = {name: m for name, m in model.named_modules() if id(m) in found}
    assert names
    return names


def packed_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, 96, (1, 8), generator=torch.Generator().manual_seed(1))
    if "MultipleChoice" in type(model).__name__:
        ids = ids[:, None].expand(1, 2, 8)
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # T5 classifies there
    out = model(input_ids=ids)
    return out.start_logits if hasattr(out, "start_logits") else out.logits


def assert_same(got, want):
    """The same bytes, and logits: those of a dense head depend in the last bit on where the BLAS
    library finds its weight in memory."""
    want_state = want.state_dict()
    assert got.state_dict().keys() == want_state.keys()
    for key, value in got.state_dict().items():
        assert torch.equal(value, want_state[key]), key
    torch.testing.assert_close(logits(got), logits(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "head"), some_quick(PAIRS))
def test_a_fresh_head_is_dense_and_initialised(family, head, tmp_path):
    save_backbone(family, tmp_path)
    config = qlora_ext.QLoraExtConfig()
    want = load(auto(head), tmp_path / "dense")
    loaded = {
        "unquantized": load(auto(head), tmp_path / "dense", quantization_config=config),
        "packed": load(auto(head), tmp_path / "packed"),
    }
    fresh = head_layers(want)
    for how, model in loaded.items():
        for name, layer in fresh.items():
            got = model.get_submodule(name)
            assert isinstance(got, nn.Linear) and not isinstance(got, Linear4bit), (how, name)
            # Drawn by the class's own initialiser: the same numbers from the same seed.
            assert torch.equal(got.weight, layer.weight), (how, name)
            assert got.weight.requires_grad
            if layer.bias is not None:
                assert torch.equal(got.bias, layer.bias), (how, name)
        assert logits(model).isfinite().all()
    assert_same(loaded["packed"], loaded["unquantized"])
    # The same layers are packed as by quantize_model, and are the same after saving.
    own = quantize_model(want, progress_bar=False)
    for model in (own, *loaded.values()):
        assert packed_names(model) == packed_names(own)
        with torch.no_grad():
            for layer in head_layers(model).values():
                layer.weight += 0.125  # as if it had been trained
        model.save_pretrained(tmp_path / "again")
        again = load(type(model), tmp_path / "again")
        assert packed_names(again) == packed_names(own)
        assert_same(again, model)


@pytest.mark.parametrize("head", HEADS)
def test_a_fresh_head_on_a_checkpoint_of_bitsandbytes(head, tmp_path):
    torch.manual_seed(0)
    model = quantize_model(transformers.AutoModel.from_config(config_of("bert")))
    qlora_ext.save_pretrained(model, tmp_path, format="bitsandbytes")
    classifier = qlora_ext.from_pretrained(tmp_path, model_class=auto(head), dtype=torch.float32)
    assert packed_names(classifier) == {f"bert.{name}" for name in packed_names(model)} - {
        "bert.pooler.dense" if head in HEADS[1:3] else ""
    }
    assert all(layer.weight.isfinite().all() for layer in head_layers(classifier).values())
    assert logits(classifier).isfinite().all()
    classifier.save_pretrained(tmp_path / "again")
    again = load(type(classifier), tmp_path / "again")
    assert_same(again, classifier.eval())


@pytest.mark.parametrize("format", ["qlora_ext", "bitsandbytes"])
def test_ours_takes_settings_of_the_config_as_keywords(format, tmp_path):
    torch.manual_seed(0)
    cls = auto("CausalLM")
    model = cls.from_config(config_of("llama"))
    quantize_model(model, progress_bar=False)
    qlora_ext.save_pretrained(model, tmp_path, format=format)
    for other in (auto("SequenceClassification"), transformers.LlamaForSequenceClassification):
        classifier, info = qlora_ext.from_pretrained(
            tmp_path,
            model_class=other,
            num_labels=7,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            output_loading_info=True,
        )
        assert classifier.config.num_labels == 7 and len(classifier.config.id2label) == 7
        assert classifier.config._attn_implementation == "eager"
        assert classifier.score.weight.shape == (7, 64) and info["missing_keys"] == {"score.weight"}
        assert classifier.dtype == torch.bfloat16 and logits(classifier).isfinite().all()
    assert qlora_ext.from_pretrained(tmp_path, use_cache=False).config.use_cache is False
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        qlora_ext.from_pretrained(tmp_path, nonsense=1)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("dense", [True, False], ids=["from dense", "from packed"])
def test_another_number_of_labels(family, dense, tmp_path):
    cls = auto("SequenceClassification")
    torch.manual_seed(0)
    model = cls.from_config(config_of(family, num_labels=3))
    settings = {"quantization_config": qlora_ext.QLoraExtConfig()} if dense else {}
    if not dense:
        quantize_model(model, progress_bar=False)
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        load(cls, tmp_path, num_labels=5, **settings)
    other = load(cls, tmp_path, num_labels=5, ignore_mismatched_sizes=True, **settings)
    assert logits(other).shape[-1] == 5 and logits(other).isfinite().all()


def test_a_head_that_was_packed(tmp_path):
    """Checkpoints of bitsandbytes have them: a head that ends in a bias was packed there."""
    cls = auto("SequenceClassification")
    torch.manual_seed(0)
    model = quantize_model(cls.from_config(config_of("bert", num_labels=3)), progress_bar=False)
    model.classifier = Linear4bit.from_linear(model.classifier)
    model.eval().save_pretrained(tmp_path)
    again = load(cls, tmp_path)
    assert isinstance(again.classifier, Linear4bit)
    assert_same(again, model)
    other = load(cls, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert type(other.classifier) is not Linear4bit
    assert logits(other).shape[-1] == 5 and logits(other).isfinite().all()


def test_a_head_whose_name_ends_other_names_for_stock_transformers(tmp_path):
    """There `dense` stands for every layer whose name ends so; ours means the one."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    class Odd(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.dense = nn.Linear(64, 3)
            self.post_init()

    model = quantize_model(Odd(config_of("bert")), progress_bar=False)
    qlora_ext.save_pretrained(model, tmp_path, format="bitsandbytes")
    stored = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config
    skipped = stored["llm_int8_skip_modules"]
    assert not should_convert_module("dense", skipped)
    assert all(should_convert_module(name, skipped) for name in packed_names(model))


def test_a_packed_head_of_bitsandbytes_and_another_number_of_labels(tmp_path):
    cls = auto("SequenceClassification")
    torch.manual_seed(0)
    model = quantize_model(cls.from_config(config_of("bert", num_labels=4)), progress_bar=False)
    model.classifier = Linear4bit.from_linear(model.classifier)
    model.hf_quantizer.quantization_config.modules_to_not_convert = []
    qlora_ext.save_pretrained(model.eval(), tmp_path, format="bitsandbytes")
    again = qlora_ext.from_pretrained(tmp_path, model_class=cls, dtype=torch.float32)
    assert isinstance(again.classifier, Linear4bit)
    assert_same(again, model)
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_labels=6)
    other = qlora_ext.from_pretrained(
        tmp_path, model_class=cls, dtype=torch.float32, config=config, ignore_mismatched_sizes=True
    )
    assert logits(other).shape[-1] == 6 and logits(other).isfinite().all()


def test_what_the_backbone_gains_is_fresh_too(tmp_path):
    """A pooler that the saved class had not: inside of the backbone, and absent."""
    torch.manual_seed(0)
    saved = transformers.BertForTokenClassification(config_of("bert"))
    saved.save_pretrained(tmp_path / "dense")
    quantize_model(saved, progress_bar=False).save_pretrained(tmp_path / "packed")
    config = qlora_ext.QLoraExtConfig()
    for path, settings in (("dense", {"quantization_config": config}), ("packed", {})):
        model = load(transformers.BertForSequenceClassification, tmp_path / path, **settings)
        assert type(model.bert.pooler.dense) is not Linear4bit
        assert model.bert.pooler.dense.weight.isfinite().all()
        assert len(packed_names(model)) == 12
        report = {part.name: part.reason for part in model.quantization_report.unquantized}
        assert report["bert.pooler.dense"].startswith("not in the checkpoint")
        assert report["classifier"] == "task head"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cls", ["BertForTokenClassification", "BertForSequenceClassification"])
def test_a_layer_of_the_stack_that_is_missing_is_damage(packed, cls, tmp_path):
    from safetensors.torch import load_file, save_file

    model = transformers.BertForTokenClassification(config_of("bert"))
    settings = {} if packed else {"quantization_config": qlora_ext.QLoraExtConfig()}
    if packed:
        quantize_model(model, progress_bar=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense"
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{name}.weight")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"checkpoint lacks {name}\.weight, want every layer"):
        load(getattr(transformers, cls), tmp_path, **settings)


def test_heads_of_parts():
    """A decoder inside of another model has its own head; what joins parts is no head."""
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            image_size=16, patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**tiny.LLAMA),
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(llava)
    assert {n for n, m in model.named_modules() if id(m) in heads_of(model)} == {"lm_head"}
    bert = config_of("bert")
    joint = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, copy.copy(bert))
    model = transformers.EncoderDecoderModel(joint)
    names = {n for n, m in model.named_modules() if id(m) in heads_of(model)}
    assert names == {"decoder.cls.predictions.decoder", "decoder.cls.predictions.transform.dense"}
    assert heads_of(transformers.BertModel(bert)) == {}
    assert heads_of(nn.Sequential(nn.Linear(4, 4))) == {}


class Backbone(nn.Module):
    """A module of a user's own around a transformers model."""

    def __init__(self):
        super().__init__()
        self.backbone = transformers.LlamaModel(config_of("llama"))
        self.classifier = nn.Linear(64, 4)
        self.value = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.blocks = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, ids):
        hidden = self.backbone(ids).last_hidden_state
        return self.classifier(hidden), self.value(self.blocks[0](hidden))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Backbone()


class Ranker(transformers.PreTrainedModel):
    """One that says nothing of its backbone."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = transformers.LlamaModel(config)
        self.rank = nn.Linear(64, 1)
        self.post_init()

    def forward(self, input_ids):
        return self.rank(self.encoder(input_ids).last_hidden_state)


class Towers(nn.Module):
    """Two models, what joins them, and a head."""

    def __init__(self, second):
        super().__init__()
        self.first = transformers.BertModel(config_of("bert"))
        self.join = nn.Linear(64, 64)
        self.second = second
        self.score = nn.Linear(64, 1)


def test_heads_of_a_users_own_class(tmp_path):
    own = {"classifier", "value.0", "value.2"}
    ranker = Ranker(config_of("llama"))
    ranker.save_pretrained(tmp_path)
    cases = [
        (Backbone(), own, {"blocks.0"}),
        (Around(), {f"net.{name}" for name in own}, {"net.blocks.0"}),
        (ranker, {"rank"}, set()),
        (Towers(transformers.LlamaModel(config_of("llama"))), {"score"}, {"join"}),
        (Towers(transformers.LlamaForCausalLM(config_of("llama"))), set(), {"join", "score"}),
    ]
    for model, heads, beside in cases:
        parts = [n for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)]
        inside = {n for n in packed_names(quantize_model(model, progress_bar=False))}
        outside = {n for n in inside if not any(p and n.startswith(p) for p in parts)}
        assert outside == beside
        reasons = {part.name: part.reason for part in model.quantization_report.unquantized}
        assert {n for n in reasons if reasons[n] == "task head"} == heads
        for name in heads:
            assert model.get_submodule(name).weight.requires_grad
    config = qlora_ext.QLoraExtConfig()
    loaded = Ranker.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert packed_names(loaded) == packed_names(ranker)
