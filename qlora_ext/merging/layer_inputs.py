"""Gathers statistics of the adapted layers' inputs X on calibration text: H = X^T X / n."""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..checks import not_readable, out_of_memory
from ..nn.experts import Experts4bit
from ..text import first_line, shorten
from .adapted import AdaptedLayer

_FEW_TOKENS = 512


def as_batches(calibration: Iterable, model: nn.Module) -> list:
    """The calibration batches as a list, since they are read more than once. Raises TypeError or
    ValueError for batches that cannot be text for the model."""
    if isinstance(calibration, (str, bytes, Tensor, Mapping)):
        raise TypeError(
            f"merge_into_4bit: calibration is a {type(calibration).__name__}, want a list of "
            "batches: token ids [batch, tokens], or what tokenizer(text, return_tensors='pt') gives"
        )
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"merge_into_4bit: calibration is {shorten(calibration)}, want a list of batches: "
            "token ids [batch, tokens], or what tokenizer(text, return_tensors='pt') gives"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError(
            "merge_into_4bit: calibration is empty, want batches of text; 5,000 tokens are enough"
        )
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, Mapping)):
            raise TypeError(
                f"merge_into_4bit: calibration[{number}] is a {type(batch).__name__}, want token "
                "ids [batch, tokens], or what tokenizer(text, return_tensors='pt') gives"
            )
        _check_batch(f"merge_into_4bit: calibration[{number}]", batch, model)
    tokens = sum(map(_tokens, batches))
    if not tokens:
        raise ValueError(
            "merge_into_4bit: calibration has no tokens (is its attention_mask all zeros?), want "
            "batches of text; 5,000 tokens are enough"
        )
    if tokens < _FEW_TOKENS:
        warnings.warn(
            f"merge_into_4bit: calibration has {tokens} tokens, want at least {_FEW_TOKENS}; "
            "measurements used 5,000 (docs/merging.md)",
            stacklevel=3,
        )
    return batches


def _mask(batch) -> Tensor | None:
    """True for tokens that are not padding, bool [batch * tokens]; None if there is no mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.reshape(-1).bool() if mask is not None and mask.ndim == 2 else None


def _tokens(batch) -> float:
    """How many tokens of a batch are not padding; infinity if that is not known."""
    mask = _mask(batch)
    if mask is not None:
        return int(mask.sum())
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else math.inf


# Arguments of pure text. With others, such as an image's, an id may stand for something else than a
# token.
_TEXT_ARGUMENTS = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"),
    *("special_tokens_mask", "length"),
}


def _check_batch(called: str, batch, model: nn.Module) -> None:
    """Raises ValueError unless a batch can be text for the model. `called` is its name in errors.
    _forward reports what else the model refuses."""
    if isinstance(batch, Tensor):
        _check_ids(called, batch, _vocabulary(model))
        return
    if names := [name for name in batch if not isinstance(name, str)]:
        raise ValueError(
            f"{called} has the key {shorten(names[0])}, want names of arguments of the model's "
            "forward"
        )
    if not batch:
        raise ValueError(f"{called} is empty, want input_ids, token ids [batch, tokens]")
    for name, value in batch.items():
        got = not_readable(value) if isinstance(value, Tensor) else None
        if got is not None:
            raise ValueError(f"{called}[{name!r}] is {got}, want a dense tensor")
    mask = batch.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"{called}['attention_mask'] is {shorten(mask)}, want a tensor")
    ids = batch.get("input_ids")
    if ids is None and batch.keys() <= _TEXT_ARGUMENTS:
        raise ValueError(f"{called} has no input_ids, want token ids [batch, tokens]")
    if ids is None:  # the input is embeddings or sound
        return
    rows = _vocabulary(model) if batch.keys() <= _TEXT_ARGUMENTS else None
    _check_ids(f"{called}['input_ids']", ids, rows)
    if mask is not None and mask.ndim == 2 and mask.shape != ids.shape:
        raise ValueError(
            f"{called}['attention_mask'] has shape {list(mask.shape)}, want input_ids' "
            f"{list(ids.shape)}"
        )


def _check_ids(called: str, ids, rows: int | None) -> None:
    """Raises ValueError unless these are token ids, below `rows` if that is known."""
    got = not_readable(ids)
    if got is None and ids.dtype not in (torch.int64, torch.int32):
        got = f"a tensor of {ids.dtype}"
    if got is None and ids.ndim != 2:
        got = f"of shape {list(ids.shape)}"
    if got is not None:
        raise ValueError(f"{called} is {got}, want int64 token ids [batch, tokens]")
    if rows is None or not ids.numel():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= rows:
        raise ValueError(
            f"{called} has token {least if least < 0 else most}, want ids from 0 to {rows - 1:,}, "
            "which the model knows: is this the tokenizer of another model?"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model knows, or None."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


class _Enough(Exception):
    """Stops a forward pass after the last layer that it was made for."""


def _key(layer: AdaptedLayer) -> tuple[int, int | None]:
    return id(layer.module), layer.expert


class LayerInputs:
    """Iterates over (layers that share an input, H = X^T X / n of that input), in the order of the
    forward pass. One pass over the batches gathers as many H as fit in hessian_bytes."""

    def __init__(
        self, model: nn.Module, layers: list[AdaptedLayer], batches: list, hessian_bytes: int
    ):
        self.model, self.batches = model, batches
        self.hessian_bytes = hessian_bytes
        self.groups = self._order(layers)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self):
        rest = self.groups
        while rest:
            count, nbytes = 0, 0
            while count < len(rest):
                nbytes += 4 * rest[count][0].packed.in_features ** 2
                if count and nbytes > self.hessian_bytes:
                    break
                count += 1
            hessians = self._gather(rest[:count])
            for group in rest[:count]:
                yield group, hessians.pop(_key(group[0]))
            rest = rest[count:]

    def _order(self, layers: list[AdaptedLayer]) -> list[list[AdaptedLayer]]:
        """The layers in the order in which the first batch reaches them. Consecutive layers that
        are given the same tensor form a group. The experts of a stack, which is called once, have
        inputs of their own."""
        members: dict[int, list[AdaptedLayer]] = {}  # id of a module -> its layers
        for layer in layers:
            members.setdefault(id(layer.module), []).append(layer)
        calls: list[tuple[int, bool]] = []
        before = None

        def note(module: nn.Module, args: tuple) -> None:
            nonlocal before
            calls.append((id(module), args[0] is before))
            before = args[0]

        hooks = [m[0].module.register_forward_pre_hook(note) for m in members.values()]
        self._forward(0, hooks)
        counts = Counter(key for key, _ in calls)
        # If a layer runs twice, or not for every input, no pass may end early.
        self.can_stop = all(counts[key] == 1 for key in members)
        if not self.can_stop:
            order = dict.fromkeys([*(key for key, _ in calls), *members])
            return [[layer] for key in order for layer in members[key]]
        groups: list[list[AdaptedLayer]] = []
        for key, same_input in calls:
            if same_input and self._alike(groups[-1][0], members[key][0]):
                groups[-1] += members[key]
            else:
                groups += [[layer] for layer in members[key]]
        return groups

    @staticmethod
    def _alike(a: AdaptedLayer, b: AdaptedLayer) -> bool:
        same_device = a.packed.weight.device == b.packed.weight.device
        in_stack = a.expert is not None or b.expert is not None
        return not in_stack and same_device and a.packed.config == b.packed.config

    def _gather(self, groups: list[list[AdaptedLayer]]) -> dict[tuple, Tensor]:
        """H for the first layer of each group, by its _key."""
        sums, counts = {}, {}
        mask = None
        last = groups[-1][0].module
        tokens: dict[int, Tensor] = {}  # id of a stack -> the token of each row, sorted by expert

        def add(key: tuple, rows: Tensor) -> None:
            rows = rows.float()
            if key not in sums:
                sums[key] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
                counts[key] = 0
            sums[key].addmm_(rows.T, rows)
            counts[key] += len(rows)

        def is_text(count: int, device) -> Tensor | None:
            """The mask, if it is for that many tokens."""
            return mask.to(device) if mask is not None and mask.numel() == count else None

        def see(module, args) -> None:
            x = args[0].detach()
            rows = x.reshape(-1, x.shape[-1])
            text = is_text(len(rows), rows.device)
            add((id(module), None), rows if text is None else rows[text])
            stop(module)

        def note_tokens(module, args, experts: Experts4bit) -> None:
            x, _, rows, *_ = args
            text = is_text(len(x), x.device)
            for stack in (experts.up, experts.down):
                tokens.pop(id(stack), None)
                if text is not None:
                    tokens[id(stack)] = text[rows.long()]

        def see_stack(module, args, chosen: list[int]) -> None:
            x, offsets, rows = (*args, None)[:3]
            x, text = x.detach(), tokens.get(id(module))
            ends = [0, *offsets.tolist()]
            for e in chosen:
                part = slice(ends[e], ends[e + 1])
                each = x[part] if rows is None else x.index_select(0, rows[part])
                add((id(module), e), each if text is None else each[text[part]])
            stop(module)

        def stop(module) -> None:
            if module is last and self.can_stop:
                raise _Enough

        hooks = []
        chosen: dict[nn.Module, list[int]] = {}
        for group in groups:
            module, expert = group[0].module, group[0].expert
            if expert is None:
                hooks.append(module.register_forward_pre_hook(see))
            else:
                chosen.setdefault(module, []).append(expert)
        for experts in [m for m in self.model.modules() if isinstance(m, Experts4bit)]:
            if chosen.keys() & {experts.up, experts.down}:
                note = functools.partial(note_tokens, experts=experts)
                hooks.append(experts.up.register_forward_pre_hook(note))
        for module, numbers in chosen.items():
            see_these = functools.partial(see_stack, chosen=numbers)
            hooks.append(module.register_forward_pre_hook(see_these))
        try:
            for number, batch in enumerate(self.batches):
                mask = _mask(batch)
                self._forward(number, [])
        finally:
            for hook in hooks:
                hook.remove()
        for group in groups:
            key, K = _key(group[0]), group[0].packed.in_features
            if not counts.get(key):  # an expert that no token chose
                sums[key] = torch.zeros(K, K, device=group[0].packed.weight.device)
            else:
                sums[key] /= counts[key]
            if not math.isfinite(sums[key].diagonal().sum().item()):
                raise ValueError(
                    f"merge_into_4bit: {group[0].called} gets a NaN or an infinity as input on the "
                    "calibration text, want finite activations: load the model in bfloat16 or "
                    "float32"
                )
        return sums

    def _forward(self, number: int, hooks: list) -> None:
        """Runs the model on a batch, and removes the hooks. Raises ValueError if the model raises
        anything but an out-of-memory error."""
        batch = self.batches[number]
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        try:
            if isinstance(batch, Tensor):
                self.model(batch.to(device))
            else:
                self.model(
                    **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                )
        except _Enough:
            pass
        except Exception as error:  # an architecture's forward may raise anything
            if out_of_memory(error):
                raise
            raise ValueError(
                f"merge_into_4bit: the model's forward fails on calibration[{number}]: "
                f"{first_line(error, with_type=True)}; want a batch that this forward takes"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
