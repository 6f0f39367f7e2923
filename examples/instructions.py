"""Instruction pairs for fine-tuning: from the standard library's docstrings, or from a file.

The docstrings need no download: they are on every machine that runs Python. Each documented
function, method or class becomes one pair: the instruction names it with its signature, the
answer is its docstring. Whole modules are held out, so that no held-out answer can be copied
from a neighbour that was trained on.
"""

import ast
import inspect
import json
import os
import random
import sysconfig
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

IGNORED_LABEL = -100  # torch's cross_entropy leaves these targets out

# Not documentation of the library: its own tests, bundled tools and the demos.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib",
                    "lib2to3", "turtledemo", "ensurepip", "__pycache__"}  # fmt: skip
_MIN_ANSWER, _MAX_ANSWER = 40, 2000  # characters; shorter ones say little, longer ones too much


@dataclass(frozen=True)
class Pair:
    instruction: str
    answer: str


def library_files(root: Path):
    """The library's public Python files, in one order on every machine."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py" and not path.relative_to(root).parts[0].startswith("_"):
                yield path


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """`(a, b=1)` of a function; nothing for a class."""
    return "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"


def documented(tree: ast.AST, prefix: str):
    """Every (dotted name, node) below `tree` that has a docstring and isn't private."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if ast.get_docstring(node):
            yield name, node
        if isinstance(node, ast.ClassDef):
            yield from documented(node, name)


def stdlib_pairs(holdout: float = 0.1) -> tuple[list[Pair], list[Pair]]:
    """(train, held out) pairs from the docstrings of Python's standard library.

    `holdout` is the share of top-level modules held out. A module's side depends on its name
    alone, so it is the same on every machine; identical docstrings are kept once.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out, seen = [], [], set()
    for path in library_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old string escapes in the library's own source
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        module = ".".join(p for p in parts if p != "__init__")
        side = held_out if zlib.crc32(parts[0].encode()) % 1000 < holdout * 1000 else train
        for name, node in documented(tree, module):
            answer = inspect.cleandoc(ast.get_docstring(node)).strip()
            if answer in seen or not _MIN_ANSWER <= len(answer) <= _MAX_ANSWER:
                continue
            seen.add(answer)
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            call = f"{name}{signature(node)}"
            side.append(Pair(f"Write the docstring of the Python {kind} `{call}`.", answer))
    return train, held_out


def file_pairs(path: Path, holdout: float = 0.1) -> tuple[list[Pair], list[Pair]]:
    """(train, held out) pairs from a JSON-lines file.

    Each line has `instruction` (and perhaps `input`) and `output`, or `prompt` and `completion` or
    `response`. Identical lines are kept once. A pair's text alone decides whether it is held out.
    """
    train, held_out, seen = [], [], set()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question = row.get("instruction") or row["prompt"]
                answer = row.get("output") or row.get("completion") or row["response"]
            except (json.JSONDecodeError, KeyError, AttributeError) as e:
                raise SystemExit(
                    f"{path}:{number}: want a JSON object with instruction and output, or "
                    f"prompt and completion ({type(e).__name__}: {e})"
                ) from None
            if row.get("input"):
                question = f"{question}\n\n{row['input']}"
            pair = Pair(str(question), str(answer))
            if pair in seen:
                continue
            seen.add(pair)
            key = zlib.crc32(pair.instruction.encode()) % 1000
            (held_out if key < holdout * 1000 else train).append(pair)
    if not train or not held_out:
        raise SystemExit(
            f"{path}: {len(train)} pairs to train on and {len(held_out)} held out; want at "
            "least one of each (a few dozen lines do)"
        )
    return train, held_out


def prompt_ids(tokenizer, instruction: str) -> list[int]:
    """The tokens of a conversation up to where the answer starts, in the model's own format."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": instruction}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = f"### Instruction:\n{instruction}\n\n### Response:\n"
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def encode(tokenizer, pair: Pair, max_length: int) -> tuple[list[int], list[int]] | None:
    """(input ids, labels), cut to `max_length` tokens; None when the prompt alone fills it.

    Only the answer and the end-of-text token after it carry a label: the loss is about what the
    model says, not about the question.
    """
    prompt = prompt_ids(tokenizer, pair.instruction)
    answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    ids = (prompt + answer + [tokenizer.eos_token_id])[:max_length]
    if len(ids) < len(prompt) + 8:
        return None
    labels = [IGNORED_LABEL] * len(prompt) + ids[len(prompt) :]
    return ids, labels


def encode_all(tokenizer, pairs: list[Pair], max_length: int) -> list[tuple[list[int], list[int]]]:
    encoded = (encode(tokenizer, pair, max_length) for pair in pairs)
    return [example for example in encoded if example is not None]


def sample(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs without repetition (all of them when there are fewer)."""
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def demo_prompt(held_out: list[Pair]) -> str:
    """A question whose answer was not trained on."""
    named = [p.instruction for p in held_out if "difflib.get_close_matches(" in p.instruction]
    return (named or [p.instruction for p in held_out])[0]


class Batches:
    """Endless micro-batches, each epoch in a new order; any position can be reached at once.

    The order of epoch e depends on (seed, e) alone, so a resumed run sees what it would have
    seen without the interruption.
    """

    def __init__(self, examples, micro_batch: int, seed: int, pad_id: int):
        self.examples, self.seed, self.pad_id = examples, seed, pad_id
        self.micro_batch = min(micro_batch, len(examples))
        self.per_epoch = len(examples) // self.micro_batch

    def at(self, index: int) -> dict:
        """Micro-batch number `index`, counted from the start of training."""
        epoch, position = divmod(index, self.per_epoch)
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        start = position * self.micro_batch
        return collate([self.examples[i] for i in order[start : start + self.micro_batch]],
                       self.pad_id)  # fmt: skip


def collate(examples, pad_id: int) -> dict:
    """Right-padded int64 tensors `input_ids`, `attention_mask`, `labels`, each [batch, longest].

    `longest` is a multiple of 16: few lengths, so that freed activations fit the next batch.
    """
    import torch

    longest = -(-max(len(ids) for ids, _ in examples) // 16) * 16
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), IGNORED_LABEL)
    for row, (row_ids, row_labels) in enumerate(examples):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        mask[row, : len(row_ids)] = 1
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
