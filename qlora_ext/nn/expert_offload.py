"""Keeps the packed experts of a mixture in host memory and copies them to the GPU layer by layer.

The experts are most of a mixture's weights and few of a step's work, so a small card can hold the
rest of the model and two layers' experts. While a layer computes, a second stream copies the
experts of the layer whose turn comes next: the one after it in a forward pass, the one before it in
a backward pass. Autograd saves no copy: the backward pass fetches a layer's experts again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

from .experts import Experts4bit
from .packed import _PACKED_KEYS
from .stack import Stack4bit

_SLOTS = 2  # layers on the device at a time
_ALIGNMENT = 256  # bytes between the tensors of a slot, as torch's allocator aligns


class _Streams:
    """The current stream, which computes, and one of our own, which copies. On a CPU, where each
    call is done when it returns, nothing is waited for."""

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def computed(self):
        """An event: all that was given to the computing stream until now is done."""
        return None if self.side is None else torch.cuda.current_stream().record_event()

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after):
        """Starts copying (target, source) pairs after an event. Returns an event: they are done."""
        if self.side is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self.side.wait_event(after)
        with torch.cuda.stream(self.side):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self.side.record_event()

    def wait(self, event) -> None:
        """Makes the computing stream wait for an event."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class Fetched(tuple):
    """The ops' arguments for a weight that was fetched. `again()` is a context in which it is
    fetched once more, so autograd saves that instead of the tensors, which the next layers
    overwrite."""

    def __new__(cls, w4, again):
        self = super().__new__(cls, w4)
        self.again = again
        return self


class _Slot:
    """Memory on the device for the experts of one layer."""

    def __init__(self, nbytes: int, device: torch.device):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.layer: int | None = None  # whose experts it holds or is being given
        self.views: dict[Stack4bit, list[torch.Tensor | None]] = {}
        self.ready = None  # an event of _Streams: they are there


class ExpertFetcher:
    """Fetches the stacks of a model's mixture layers to a device.

    Whoever fetches holds `lock` until the product with what was fetched is computed, or given to
    the device's stream: another thread would overwrite it.

    Args:
        layers: in the order in which the model calls them.
        device: where they compute.
        streams: for tests; what `_Streams` does.
    """

    def __init__(self, layers: list[Experts4bit], device: torch.device, streams=None):
        self.device = device
        self.lock = threading.RLock()
        self.streams = streams or _Streams(device)
        self.layers = layers
        self.layer_of = self._layer_of_each_stack()
        self.last = -1  # the layer that was asked for last; -1: none yet
        nbytes = max(map(layer_bytes, layers))
        self.slots = [_Slot(nbytes, device) for _ in range(min(_SLOTS, len(layers)))]

    def _layer_of_each_stack(self) -> dict[Stack4bit, int]:
        return {s: i for i, layer in enumerate(self.layers) for s in (layer.up, layer.down)}

    def forget(self, stack: Stack4bit) -> None:
        """The packed tensors of a stack have other bytes from now on, or other memory."""
        with self.lock:
            for slot in self.slots:
                if slot.layer is not None and slot.layer == self.layer_of.get(stack, slot.layer):
                    slot.layer = None

    def fetch(self, stack: Stack4bit, w4) -> Fetched:
        """w4, the ops' arguments with the tensors of a stack in host memory, on the device."""
        if stack not in self.layer_of:  # adapters were added or removed
            self.layer_of = self._layer_of_each_stack()
            for slot in self.slots:
                slot.layer = None
        if stack not in self.layer_of:
            raise RuntimeError(
                f"{type(stack).__name__}: offload_experts keeps the bytes in host memory for a "
                "layer of a model, and this stack is in none; copy.deepcopy gives one of its own"
            )
        layer = self.layer_of[stack]
        slot = next((s for s in self.slots if s.layer == layer), None)
        if slot is None:
            # The slot that was not used last: its layer is further away.
            slot = next(s for s in self.slots if s.layer != self.last or len(self.slots) == 1)
            self._start(slot, layer)
        step = 1 if layer > self.last else -1 if layer < self.last else 0
        if layer == 0:  # a forward pass starts, or a backward pass ends
            step = 1
        self.last = layer
        self.streams.wait(slot.ready)
        following = layer + step
        if step and 0 <= following < len(self.layers):
            other = next((s for s in self.slots if s is not slot), None)
            if other is not None and other.layer != following:
                self._start(other, following)
        return Fetched((*slot.views[stack], *w4[4:]), lambda: self._fetched(stack, w4))

    @contextlib.contextmanager
    def _fetched(self, stack: Stack4bit, w4) -> Iterator[Fetched]:
        with self.lock:
            yield self.fetch(stack, w4)

    def _start(self, slot: _Slot, layer: int) -> None:
        """Starts copying a layer's experts into a slot."""
        stacks = self.layers[layer].up, self.layers[layer].down
        for source in (tensor for stack in stacks for tensor in _tensors(stack)):
            if type(source) not in (nn.Parameter, torch.Tensor, type(None)):
                raise RuntimeError(
                    f"offload_experts: a layer's experts are a {type(source).__name__} now, want "
                    "plain tensors: shard a model (FSDP2) or offload its experts, not both"
                )
        slot.layer, slot.views, start, pairs = layer, {}, 0, []
        for stack in stacks:
            views: list[torch.Tensor | None] = []
            for source in _tensors(stack):
                if source is None:
                    views.append(None)
                    continue
                target = slot.memory[start : start + source.nbytes].view(source.shape)
                start += -(-source.nbytes // _ALIGNMENT) * _ALIGNMENT
                views.append(target)
                pairs.append((target, source.detach()))
            slot.views[stack] = views
        # What the slot held may still be in use by work that was given to the device before.
        slot.ready = self.streams.copy(pairs, self.streams.computed())


def _tensors(stack: Stack4bit) -> list[torch.Tensor | None]:
    return [stack._parameters[key] for key in _PACKED_KEYS if key != "weight_codebook"]


def layer_bytes(layer: Experts4bit) -> int:
    """Bytes that the experts of a layer take in a slot."""
    tensors = [t for stack in (layer.up, layer.down) for t in _tensors(stack) if t is not None]
    return sum(-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors)


def bytes_on_device(model: nn.Module) -> tuple[int, int]:
    """Bytes of all packed experts of model, and how many of them are on the device at a time if
    offload_experts keeps the rest in host memory."""
    layers = [layer_bytes(m) for m in model.modules() if isinstance(m, Experts4bit)]
    return sum(layers), min(_SLOTS, len(layers)) * max(layers, default=0)


def check_not_in_host(op: str, name: str, stack: Stack4bit) -> None:
    """Raises ValueError if offload_experts keeps a stack in host memory."""
    if stack.fetcher is not None:
        raise ValueError(
            f"{op}: offload_experts keeps {name} in host memory, want it where its adapter is to "
            "merge into 4 bits: load the model and the adapter again without offload_experts, or "
            "merge into 16 bits"
        )


def offload_experts(model: nn.Module, device: torch.device | str = "cuda") -> nn.Module:
    """Keeps the packed experts of a mixture in host memory, and moves all else to a device.

    The device holds the experts of two layers at a time: one computes while the next one's are
    copied. Host memory is pinned if device is a GPU. Forward and backward work, with and without
    activation checkpointing, for inference and for adapters on any layer; adapters of experts are
    on the device. torch.compile leaves the experts' products out of its graphs. Threads take turns
    at them; all must use one CUDA stream. A copy of the model is not offloaded. Has not run on a
    GPU yet: the order of copies and waits is tested with recorded streams.

    Args:
        model: a packed mixture, best on the CPU: from_pretrained without a device_map, or
            quantize_model. It may have adapters, or get them later.
        device: where the model computes.

    Returns:
        model. `model.to(...)` moves all but the experts from now on.

    Raises:
        TypeError: model is not a module.
        ValueError: model has no packed experts, its weights are sharded, on the meta device or
            offloaded by accelerate, or its experts are offloaded already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"offload_experts: model is a {type(model).__name__}, want an nn.Module")
    device = torch.device(device)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Experts4bit)]
    if not layers:
        raise ValueError(
            f"offload_experts: {type(model).__name__} has no packed experts, want a mixture whose "
            "experts quantize_model or from_pretrained packed"
        )
    for name, layer in layers:
        for stack in (layer.up, layer.down):
            if stack.fetcher is not None:
                raise ValueError(f"offload_experts: {name} is offloaded already, want it once")
            weight = stack._parameters["weight"]
            if type(weight) is not nn.Parameter or weight.is_meta:
                kind = "on the meta device" if weight.is_meta else f"a {type(weight).__name__}"
                raise ValueError(
                    f"offload_experts: {name} is {kind}, want plain tensors: neither sharded nor "
                    "offloaded by accelerate (a device_map with 'cpu' or 'disk')"
                )
    for _, layer in layers:
        for stack in (layer.up, layer.down):
            stack._to_host(pinned=device.type == "cuda")
    fetcher = ExpertFetcher([layer for _, layer in layers], device)
    for _, layer in layers:
        layer.up.fetcher = layer.down.fetcher = fetcher
    return model.to(device)
