"""write_calibration: text that a model writes itself, to merge without any (issue 5, point 6)."""

import re

import pytest
import torch
from test_merge import trained
from test_merge_4bit import distance, peft_model, run, small, without_adapter
from torch import nn

import tiny_models as tiny
from qlora_ext import write_calibration

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tokenizer:
    """As many tokens as the tiny models have; a character is one."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, template=TEMPLATE):
        self.chat_template = template

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens  # a template writes its own
        return {"input_ids": [3 + ord(c) % (tiny.VOCAB - 3) for c in text]}

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        from jinja2 import Template

        assert not tokenize
        return Template(self.chat_template).render(
            messages=chat, add_generation_prompt=add_generation_prompt
        )

    def encode(self, text):
        return self(text, add_special_tokens=False)["input_ids"]


def rows(batches):
    """The texts without padding, which is all on the right."""
    found = []
    for batch in batches:
        assert batch["input_ids"].dtype == torch.int64
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            n = int(mask.sum())
            assert mask[:n].all() and not mask[n:].any()
            found.append(ids[:n].tolist())
    return found


def say(model, token):
    """Makes a model say one token whatever it reads."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        bias = torch.zeros(tiny.VOCAB)
        bias[token] = 1e4
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)


def test_texts_are_questions_and_answers_in_the_chat_format():
    tokenizer = Tokenizer()
    texts = rows(write_calibration(tiny.make("llama"), tokenizer, tokens=3000))
    before, between = tokenizer.encode("<user>"), tokenizer.encode("|<assistant>")
    for row in texts:
        assert row[: len(before)] == before
        middle = [i for i in range(len(row)) if row[i : i + len(between)] == between]
        assert middle  # the question ends, by itself or by its length
        question, answer = row[len(before) : middle[0]], row[middle[0] + len(between) :]
        assert len(question) <= 15 and len(answer) <= 31  # a third, and the rest of 64 positions
        assert between[0] not in question and 2 not in answer
    assert 3000 <= sum(map(len, texts)) < 3000 + 40 * 64
    assert len({tuple(row) for row in texts}) == len(texts)


def test_without_a_template_texts_start_from_their_start():
    texts = rows(write_calibration(tiny.make("llama"), Tokenizer(None), tokens=500))
    assert all(row[0] == 1 and len(row) <= 64 for row in texts)
    assert len({tuple(row) for row in texts}) == len(texts)
    tokenizer = Tokenizer(None)
    tokenizer.bos_token_id = None
    assert all(row[0] == 2 for row in rows(write_calibration(tiny.make("llama"), tokenizer)))
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        write_calibration(tiny.make("llama"), tokenizer)


@pytest.mark.parametrize("end", ["eos", "question", "generation_config"])
def test_a_turn_ends_where_the_model_ends_it(end):
    model, tokenizer = tiny.make("llama"), Tokenizer()
    frame = tokenizer.encode("<user>") + tokenizer.encode("|<assistant>")
    if end == "generation_config":
        model.generation_config.eos_token_id = [9, 11]
    say(model, {"eos": 2, "question": frame[6], "generation_config": 11}[end])
    texts = rows(write_calibration(model, tokenizer, tokens=50))
    # What ends a question may stand in an answer.
    want = frame + [frame[6]] * 31 if end == "question" else frame
    assert texts == [want] * len(texts)


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_draws_are_the_seed_s_and_leave_no_trace(kind):
    model = small(trained()) if kind == "ours" else peft_model()
    settings = model.generation_config
    settings.repetition_penalty, settings.top_k = 1.5, 1  # for speaking, not for this
    model.train()
    model.base_model.eval() if kind == "ours" else model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (
        rows(write_calibration(model, Tokenizer(), tokens=400, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({row[6] for row in first}) > 10  # top_k would have left one
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings and settings.top_k == 1


def test_the_adapter_writes():
    """With another adapter it is another text."""
    model = trained()
    without = without_adapter(model)
    texts = [rows(write_calibration(m, Tokenizer(), tokens=100)) for m in (model, without)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_its_own_text_alone_keeps_what_was_learnt(family):
    model = small(trained(family))
    want = tiny.logits(model)
    unmerged = distance(without_adapter(model), want)
    run(model, calibration=write_calibration(model, Tokenizer(), tokens=1500))
    assert distance(model, want) < 0.8 * unmerged


def test_what_is_refused():
    model = tiny.make("llama")  # 64 positions
    with pytest.raises(TypeError, match="model is a Linear, want a transformers model"):
        write_calibration(nn.Linear(2, 2), Tokenizer())
    for tokens in (0, 2.5, "many"):
        with pytest.raises(ValueError, match="want an int of at least 1"):
            write_calibration(model, Tokenizer(), tokens=tokens)
    for template, count in (("hello", 0), (TEMPLATE + TEMPLATE, 2)):
        with pytest.raises(ValueError, match=f"writes a question {count} times"):
            write_calibration(model, Tokenizer(template))
    with pytest.raises(ValueError, match="takes 1018 of the model's 64 positions"):
        write_calibration(model, Tokenizer("x" * 1000 + TEMPLATE))
    tokenizer = Tokenizer(None)
    tokenizer.bos_token_id = tiny.VOCAB
    with pytest.raises(
        ValueError, match=f"token {tiny.VOCAB}, but the model knows only {tiny.VOCAB} tok"
    ):
        write_calibration(model, tokenizer)


def test_an_error_midway_leaves_the_model_as_it_was(monkeypatch):
    model = tiny.make("llama").train()
    settings = model.generation_config
    monkeypatch.setattr(model.model.norm, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_calibration(model, Tokenizer())
    assert model.training and model.generation_config is settings


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ raise_exception('no') }}", "chat template fails"),
        ("{% for m in messages %}", "chat template fails"),
    ],
)
def test_a_template_that_fails_is_a_sentence(template, says):
    with pytest.raises(ValueError, match=f"write_calibration: the tokenizer's {says}"):
        write_calibration(tiny.make("llama"), Tokenizer(template))


def test_nothing_to_start_a_text_with_is_a_sentence():
    tokenizer = Tokenizer("{% for m in messages %}{{ m.content }}|{% endfor %}")
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="nor a chat template that starts"):
        write_calibration(tiny.make("llama"), tokenizer)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(TypeError, match="an encoder-decoder, want a decoder-only"):
        write_calibration(tiny.make("t5"), Tokenizer())


@pytest.mark.parametrize(
    "arguments, kind, says",
    [
        ({"tokenizer": None}, TypeError, "tokenizer is None, want the model's tokenizer"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer is 'gpt2', want the model's tokenizer"),
        ({"tokenizer": len}, TypeError, "tokenizer is <built-in function len>, want"),
        ({"model": None}, TypeError, "model is a NoneType, want a transformers model"),
        ({"model": transformers.LlamaForCausalLM}, TypeError, "model is a type, want a trans"),
        ({"tokens": True}, ValueError, "tokens is True, want an int of at least 1"),
        ({"tokens": None}, ValueError, "tokens is None, want an int of at least 1"),
        ({"tokens": 10.0}, ValueError, "tokens is 10.0, want an int of at least 1"),
        ({"tokens": -(10**5000)}, ValueError, "tokens is an integer of 16610 bits, want"),
        ({"seed": None}, ValueError, "seed is None, want an int from"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616, want an int from"),
        ({"seed": "0"}, ValueError, "seed is '0', want an int from"),
    ],
)
def test_wrong_arguments_are_named(arguments, kind, says):
    given = {"model": tiny.make("llama"), "tokenizer": Tokenizer(), "tokens": 1, **arguments}
    model, tokenizer = given.pop("model"), given.pop("tokenizer")
    with pytest.raises(kind, match=re.escape(f"write_calibration: {says}")):
        write_calibration(model, tokenizer, **given)


def test_a_model_without_data_is_refused():
    model = tiny.make("llama").to("meta")
    with pytest.raises(ValueError, match="write_calibration: model has no parameters with data"):
        write_calibration(model, Tokenizer(), tokens=1)
