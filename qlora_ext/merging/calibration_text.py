"""Lets a model write its own calibration text, if you have none.

Given an empty user turn in its own template, a chat model writes a question and then its answer. So
its layers see the format that the adapter was trained on, and some of its subject.

Source: Magpie (arXiv 2406.08464) gets questions from an empty user turn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import is_integer
from ..text import shorten

_ROWS = 40  # texts written at a time
_LENGTH = 192  # most tokens of a question and its answer; a third is for the question
_MARK = "WHERE-THE-QUESTION-IS"


def write_calibration(
    model: nn.Module, tokenizer, *, tokens: int = 5000, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Makes calibration for merge_into_4bit: text that the model writes with its adapters.

    With a chat template, the model writes a question and then its answer for each text. Without
    one, it writes from the start of a text. All tokens are drawn at temperature 1.

    Args:
        model: a transformers model, or a PeftModel around one.
        tokenizer: the model's tokenizer; its chat_template is used if it has one.
        tokens: the least number of tokens, 1 or more.
        seed: seed of the draws. torch's own random state does not change.

    Returns:
        Batches of input_ids and attention_mask, int64 [texts, longest text], padded on the right.

    Raises:
        TypeError: model cannot generate, or is an encoder-decoder; tokenizer is not a tokenizer.
        ValueError: tokens is not an int of at least 1, or seed not an int of 64 bits; model has no
            data; the chat template fails, changes a question, has a token that the model lacks,
            or leaves no room in the model's context; or nothing can start a text, because there is
            no chat template and no bos or eos token.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise TypeError(
            f"write_calibration: model is a {type(model).__name__}, want a transformers model "
            "that has generate()"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"write_calibration: model is a {type(model).__name__}, an encoder-decoder, want a "
            "decoder-only model; give merge_into_4bit text of your own as calibration"
        )
    parts = ("chat_template", "bos_token_id", "eos_token_id")
    if not callable(tokenizer) or not all(hasattr(tokenizer, part) for part in parts):
        raise TypeError(
            f"write_calibration: tokenizer is {shorten(tokenizer)}, want the model's tokenizer, "
            "from transformers.AutoTokenizer.from_pretrained"
        )
    if not is_integer(tokens) or tokens < 1:
        raise ValueError(
            f"write_calibration: tokens is {shorten(tokens)}, want an int of at least 1"
        )
    if not is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(
            f"write_calibration: seed is {shorten(seed)}, want an int from -2**63 to 2**64 - 1"
        )
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    if device is None:
        raise ValueError(
            "write_calibration: model has no parameters with data (all are on the meta device), "
            "want one that is loaded"
        )
    before, between = _frame(tokenizer)
    length = _length(model, before + between)
    question = length // 3 if between else 0
    settings = getattr(model, "generation_config", None)
    ends = set(_ids(tokenizer.eos_token_id)) | set(_ids(getattr(settings, "eos_token_id", None)))
    modes = [(module, module.training) for module in model.modules()]
    batches: list[dict[str, Tensor]] = []
    written = texts = 0
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            while written < tokens:
                missing = (tokens - written) * texts / written if written else _ROWS
                rows = [before] * min(_ROWS, math.ceil(missing))
                if between:
                    # The question also ends at the token that follows it in the template.
                    rows = _drawn(model, rows, question, ends | {between[0]}, device)
                    rows = [row + between for row in rows]
                rows = _drawn(model, rows, length - question, ends, device)
                written, texts = written + sum(map(len, rows)), texts + len(rows)
                rows.sort(key=len)  # so that batches need little padding
                batches += [_padded(rows[i : i + 8], "right") for i in range(0, len(rows), 8)]
    finally:
        for module, mode in modes:
            module.training = mode
    return batches


def _frame(tokenizer) -> tuple[list[int], list[int]]:
    """The tokens before a question, and those between it and its answer. Without a chat template:
    the token that starts a text, and none."""
    start = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None][:1]
    before, between = _template_frame(tokenizer) if tokenizer.chat_template else ([], [])
    if not before and not start:
        raise ValueError(
            "write_calibration: tokenizer has neither a bos nor an eos token, nor a chat template "
            "that starts a question, want one of these to start a text with; or give "
            "merge_into_4bit text of your own"
        )
    return before or start, between


def _template_frame(tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the chat template puts before a question, and between it and its answer."""
    chat = [{"role": "user", "content": _MARK}]
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"write_calibration: the tokenizer's chat template fails: {error}"
        ) from None
    parts = text.split(_MARK)
    if len(parts) != 2:
        raise ValueError(
            f"write_calibration: the tokenizer's chat template writes a question {len(parts) - 1} "
            "times, want once and unchanged"
        )
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)


def _length(model: nn.Module, frame: list[int]) -> int:
    """How many tokens a text may have besides the template's. Raises ValueError if the model does
    not know a token of the template, or if the template leaves no room."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    if max(frame) >= known:
        raise ValueError(
            f"write_calibration: a text contains token {max(frame)}, but the model knows only "
            f"{known} tokens, want the tokenizer of this model"
        )
    context = context_length(getattr(model, "config", None))
    length = min(_LENGTH, context - len(frame))
    if length < 3:
        raise ValueError(
            f"write_calibration: the chat template takes {len(frame)} of the model's {context} "
            "positions, want a template that leaves room for a question and an answer"
        )
    return length


def context_length(config) -> float:
    """How many tokens a model with this transformers config can read; infinity if it does not
    say."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None) or math.inf


def _ids(token: int | list[int] | None) -> list[int]:
    """A setting that holds one token, several or none, as a list."""
    return [] if token is None else token if isinstance(token, list) else [token]


def _drawn(model, rows: list[list[int]], most: int, ends: set[int], device) -> list[list[int]]:
    """The rows, each continued by up to `most` drawn tokens, up to the first token in `ends`."""
    batch = _padded(rows, "left")
    if hasattr(model, "get_base_model"):  # a PeftModel has its own settings
        model = model.get_base_model()
    # Replace the model's settings: those that an argument does not set would stay the model's.
    before = model.generation_config
    model.generation_config = type(before)(
        max_new_tokens=most,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    try:
        out = model.generate(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.generation_config = before
    drawn = out[:, batch["input_ids"].shape[1] :].tolist()
    lengths = [next((i for i, t in enumerate(new) if t in ends), len(new)) for new in drawn]
    return [row + new[:n] for row, new, n in zip(rows, drawn, lengths, strict=True)]


def _padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    """Token ids of different lengths as one batch."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.int64)
        mask[i, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}
