"""Keeps the packed experts of a mixture in host memory and copies them to the GPU layer by layer.

Most of a mixture's weights are experts, and only one layer computes at a time. So a small card can
hold the rest of the model and the experts of two layers. While a layer computes, a second stream
copies the experts of the next one: the layer after it in a forward pass, the layer before it in a
backward pass. Autograd saves no copies: the backward pass fetches each layer's experts again.
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
    """The current stream, which computes, and one of our own, which copies. On a CPU each call has
    finished when it returns, so there is nothing to wait for."""

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def computed(self):
        """An event for the end of all work that was queued on the computing stream so far."""
        return None if self.side is None else torch.cuda.current_stream().record_event()

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after):
        """Copies (target, source) pairs once the event `after` has happened. Returns an event for
        the end of the copies."""
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
    """The ops' arguments for a weight that was fetched. `again()` is a context that fetches it once
    more. Autograd saves `again` instead of the tensors, because the next layers overwrite them."""

    def __new__(cls, w4, again):
        self = super().__new__(cls, w4)
        self.again = again
        return self


class _Slot:
    """Memory on the device for the experts of one layer."""

    def __init__(self, nbytes: int, device: torch.device):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.layer: int | None = None  # the layer whose experts it holds or is receiving
        self.views: dict[Stack4bit, list[torch.Tensor | None]] = {}
        self.ready = None  # an event of _Streams: the experts have arrived


class ExpertFetcher:
    """Fetches the stacks of a model's mixture layers to a device.

    A caller of `fetch` must hold `lock` until the product is computed or queued on the device's
    stream. Otherwise another thread could overwrite what was fetched.

    Args:
        layers: in the order in which the model calls them.
        device: where they compute.
        streams: replaces `_Streams` in tests.
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
        """Call it when the bytes of a stack's packed tensors change, or their memory: the copies in
        slots are no longer valid."""
        with self.lock:
            for slot in self.slots:
                if slot.layer is not None and slot.layer == self.layer_of.get(stack, slot.layer):
                    slot.layer = None

    def fetch(self, stack: Stack4bit, w4) -> Fetched:
        """Returns w4, the ops' arguments for a stack in host memory, with the tensors copied to the
        device."""
        if stack not in self.layer_of:  # adapters were added or removed
            self.layer_of = self._layer_of_each_stack()
            for slot in self.slots:
                slot.layer = None
        if stack not in self.layer_of:
            raise RuntimeError(
                f"{type(stack).__name__}: offload_experts keeps this stack in host memory, but it "
                "is no longer in a layer of its model; use copy.deepcopy(stack), which does not "
                "offload"
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
                    f"offload_experts: the experts of a layer are now of type "
                    f"{type(source).__name__}, want plain tensors: shard a model (FSDP2) or "
                    "offload its experts, not both"
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
        # Work that is already queued on the device may still read what the slot held.
        slot.ready = self.streams.copy(pairs, self.streams.computed())


def _tensors(stack: Stack4bit) -> list[torch.Tensor | None]:
    return [stack._parameters[key] for key in _PACKED_KEYS if key != "weight_codebook"]


def layer_bytes(layer: Experts4bit) -> int:
    """Bytes of a slot that the experts of a layer take."""
    tensors = [t for stack in (layer.up, layer.down) for t in _tensors(stack) if t is not None]
    return sum(-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors)


def bytes_on_device(model: nn.Module) -> tuple[int, int]:
    """Bytes of all packed experts of model, and how many of these are on the device at a time under
    offload_experts."""
    layers = [layer_bytes(m) for m in model.modules() if isinstance(m, Experts4bit)]
    return sum(layers), min(_SLOTS, len(layers)) * max(layers, default=0)


def check_not_in_host(op: str, name: str, stack: Stack4bit) -> None:
    """Raises ValueError if offload_experts keeps a stack in host memory."""
    if stack.fetcher is not None:
        raise ValueError(
            f"{op}: offload_experts keeps {name} in host memory, want it on its adapter's device "
            "to merge into 4 bits: load the model and the adapter again without offload_experts, "
            "or merge into 16 bits"
        )


def offload_experts(model: nn.Module, device: torch.device | str = "cuda") -> nn.Module:
    """Keeps the packed experts of a mixture in host memory, and moves the rest to a device.

    The device holds the experts of two layers at a time: one computes while the next one's are
    copied. Host memory is pinned if device is a GPU. Forward and backward work, with and without
    activation checkpointing, for inference and for adapters on any layer; adapters of experts are
    on the device. torch.compile leaves the experts' products out of its graphs. Threads take turns
    computing them, and must all use one CUDA stream. A copy of the model is not offloaded. This has
    not run on a GPU yet: tests check the order of copies and waits with recorded streams.

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
                raise ValueError(
                    f"offload_experts: {name} is offloaded already, want a model whose experts "
                    "are not"
                )
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
