"""Layers that read the same x (q, k, v; gate, up) compute scaling x A^T for all of them at once.

LoRA layers of one parent that may share their input are put in one `SharedInput`, by name. Whether
they do is seen when they run: a layer that is called with the very tensor that a sibling was just
called with takes its columns of the sibling's product, and any other call computes its own. So a
group that is wrong costs a little work and no wrong number.

    q(x)   S = scaling x [A_q; A_k; A_v]^T, of which q takes its columns
    k(x)   the same tensor, unchanged, in the same mode: takes its columns
    v(x)   the last one: S is forgotten
    o(z)   in no group

"Unchanged" is what torch knows of x and of A: the count of writes, the address, dtype, shape and
strides. A write that torch does not count (through `.data`, NumPy or another pointer), after one
sibling's call and before the next one's, is not seen.

In training with dropout, layers of add_lora that share x share the mask too: each layer's own mask
has the distribution that it would have alone, and the product stays one. In an activation
checkpoint, and wherever saved tensors have hooks, each draws its own. The shared product has a
gradient, so it is a part of the graph that the siblings have in common. A backward through one of
them alone frees it for the others, unless it is given `retain_graph=True`; and a sibling that was
computed for and not called gets a gradient of zeros for its A, not None.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import ops

# Names of sibling layers that read the same input.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and its kin, Phi, OPT, StarCoder2, Nemotron
    ("q", "k", "v"),  # T5
    ("query", "key", "value"),  # BERT
    ("gate_proj", "up_proj"),  # Llama and its kin
    ("wi_0", "wi_1"),  # T5
)

# Elements of x from which one product does not cost more than a product in each layer: without
# dropout, where the calls around it must be repaid by reading x once, and with, where two masks in
# three are not drawn. (One core, 576 inputs, r = 8, forward of q, k and v: without dropout 1.09 of
# the time at 74,000, 1.03 at 295,000, 0.98 at 1,180,000; with, a step is even at 1,000. 2026-11.)
MIN_ELEMENTS = 1048576
MIN_ELEMENTS_DROPOUT = 8192


_only_counts = contextvars.ContextVar("qlora_ext_only_counts", default=None)


class Member(Protocol):
    """What a layer in a group has: its group, its name there, and what it multiplies x by."""

    shared_input: SharedInput | None
    shared_name: str

    def shared_factor(self, dropout: float) -> tuple[Tensor, float] | None:
        """(lora_A, scaling) if, called now, the layer would multiply x by that, dropping its input
        with this probability; None if it would do anything else."""


def _state(tensor: Tensor) -> tuple:
    """What tells, of one tensor, that nothing was written to it and that it is the same view."""
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Columns(NamedTuple):
    """A layer's columns of S, and the factor that they were computed with."""

    lora_A: Tensor
    state: tuple
    scaling: float
    S: Tensor

    def belong_to(self, lora_A: Tensor, scaling: float) -> bool:
        return self.lora_A is lora_A and self.state == _state(lora_A) and self.scaling == scaling


class _Entry:
    """What the first layer called with an x made for its siblings. It does not keep x alive, and
    keeps nothing once x is gone."""

    __slots__ = (
        "__weakref__", "columns", "dropped", "input", "leader", "mode", "state", "takers", "x",
    )  # fmt: skip

    def __init__(self, x: Tensor, mode: tuple, leader: str):
        own = weakref.ref(self)

        def forget(_):
            entry = own()
            if entry is not None:
                entry.clear()

        self.x = weakref.ref(x, forget)
        self.state = _state(x)
        self.leader = leader
        self.takers: set[str] = set()
        self.clear()
        self.mode = mode

    def clear(self) -> None:
        self.mode = ()
        self.input: Tensor | None = None  # x as autocast casts it; None where that is x itself
        self.dropped: Tensor | None = None
        self.columns: dict[str, _Columns] = {}

    def serves(self, x: Tensor, mode: tuple, name: str) -> bool:
        return (
            self.x() is x
            and self.mode == mode
            and self.state == _state(x)
            and name not in self.takers
        )


def _mode(x: Tensor, dropout: float) -> tuple:
    """Everything beside x and A that what one layer makes for another depends on."""
    autocast = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        autocast = torch.get_autocast_dtype(x.device.type)
    return (
        dropout,
        autocast,
        x.requires_grad,
        torch.is_grad_enabled(),
        _stream(x),
    )


def _stream(x: Tensor) -> int | None:
    """The CUDA stream that x's siblings run on: another one would not wait for S."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None


def _may_share_mask() -> bool:
    """Whether what runs now is in no activation checkpoint, neither in its first run nor in its
    recomputation.

    A recomputation must draw what the first run drew, however checkpoints are nested, and neither
    knows of the other: in both, each layer draws its own mask. First runs are without gradients
    (reentrant) or have hooks for saved tensors; recomputations are within a backward, or have such
    hooks.
    """
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or hooks[0] is _only_counts.get()


@contextlib.contextmanager
def hook_that_only_counts(pack: Callable[[Tensor], Tensor]):
    """Within, the hook `pack` of saved tensors, which gives each as it is and makes none again,
    keeps no layers from sharing a mask."""
    token = _only_counts.set(pack)
    try:
        yield
    finally:
        _only_counts.reset(token)


def _is_plain(lora_A: Tensor, x: Tensor) -> bool:
    """Whether lora_A can be stacked: no DTensor or other subclass, 2-D, on x's device."""
    return (
        type(lora_A) in (nn.Parameter, Tensor)
        and lora_A.dim() == 2
        and lora_A.shape[1] == x.shape[-1]
        and lora_A.device == x.device
        and not lora_A.is_inference()
    )


class SharedInput:
    """A group of LoRA layers that may be called with the same x. See the module's docstring.

    Copying and pickling keep who is in a group with whom, and no tensor and no layer: a copied
    layer joins its copied group when it is first called.
    """

    def __init__(self):
        self.size = 0  # layers that were put in the group, called or not
        self._reset()

    def _reset(self) -> None:
        self._members: dict[str, weakref.ref[Member]] = {}
        self._entry: _Entry | None = None
        # name -> who took columns when that layer was the first; the next product is for those.
        self._takers: dict[str, frozenset[str]] = {}

    def __getstate__(self):
        return {"size": self.size}

    def __setstate__(self, state):
        self.size = state["size"]
        self._reset()

    def add(self, name: str, layer: Member) -> None:
        """Puts a layer in the group."""
        layer.shared_input = self
        layer.shared_name = name
        self.size += name not in self._members
        self._members[name] = weakref.ref(layer)

    def pays(self, x: Tensor, dropout: float) -> bool:
        """Whether sharing is possible with this x, and cheaper than a product in each layer."""
        return (
            self.size > 1
            and type(x) is Tensor
            and x.numel() >= (MIN_ELEMENTS_DROPOUT if dropout else MIN_ELEMENTS)
            and not x.is_inference()  # it has no version counter
            and not torch._C._are_functorch_transforms_active()
        )

    def take(
        self,
        layer: Member,
        x: Tensor,
        read: Callable[[Tensor], Tensor],
        lora_A: Tensor,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `layer`, called with x, needs of the group.

        Args:
            read: x -> the tensor that the layers compute with (autocast).
            lora_A [r, K], scaling: the layer's own.
            dropout: probability of dropping an element of the bypass's input.

        Returns:
            x as `read` gives it; the dropped x of the bypass, None without dropout; S = scaling x
            A^T [..., r] without a gradient of its own, or of the dropped x with one, or None
            where the layer has to compute it.
        """
        name = layer.shared_name
        known = self._members.get(name)
        if known is None or known() is not layer:
            self._members[name] = weakref.ref(layer)
        if dropout and not _may_share_mask():
            x = read(x)
            return x, nn.functional.dropout(x, dropout), None
        mode = _mode(x, dropout)
        entry = self._entry
        if entry is None or not entry.serves(x, mode, name):
            self._finish()
            entry = self._lead(name, x, mode, read, lora_A, scaling, dropout)
        entry.takers.add(name)
        found = entry.columns.pop(name, None)
        S = found.S if found is not None and found.belong_to(lora_A, scaling) else None
        result = (x if entry.input is None else entry.input), entry.dropped, S
        if len(entry.takers) >= self.size:
            self._finish()
        return result

    def _finish(self) -> None:
        """Forgets the last x, and learns who took part."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._takers[entry.leader] = frozenset(entry.takers)

    def _lead(self, name, x, mode, read, lora_A, scaling, dropout) -> _Entry:
        """The entry of an x that `name` is the first to be called with."""
        entry = _Entry(x, mode, name)
        given, x = x, read(x)
        source = x
        if x is not given:
            entry.input = x
        if dropout:
            entry.dropped = source = nn.functional.dropout(x, dropout)
        factors = self._factors(name, x, lora_A, scaling, dropout)
        if len(factors) > 1:
            stacked = [A for A, _ in factors.values()]
            if dropout:
                S = ops.lora_shrink(source, torch.cat(stacked), scaling)
            else:
                with torch.no_grad():
                    S = ops.lora_shrink(source, torch.cat(stacked), scaling)
            slices = S.split([A.shape[0] for A in stacked], dim=-1)
            if x.device.type == "cpu":
                # A product reads S once for every 32 rows of W, from L1 if its rows lie together.
                # (q, k and v of 576 inputs, 512 rows, r = 8: apart they cost 5%. 2026-11.)
                slices = [part.contiguous() for part in slices]
            for (key, (A, factor)), part in zip(factors.items(), slices, strict=True):
                entry.columns[key] = _Columns(A, _state(A), factor, part)
        self._entry = entry
        return entry

    def _factors(self, name, x, lora_A, scaling, dropout) -> dict[str, tuple[Tensor, float]]:
        """(lora_A, scaling) of every layer whose columns `name` computes, its own among them."""
        if not _is_plain(lora_A, x):
            return {}
        takers = self._takers.get(name)
        if takers is None:
            takers = frozenset(self._members)
        factors = {}
        for key, reference in list(self._members.items()):
            layer = reference()
            if key == name:
                factors[key] = (lora_A, scaling)
            elif key in takers and hasattr(layer, "shared_factor"):  # there, and not made another
                factor = layer.shared_factor(dropout)
                if (
                    factor is not None
                    and factor[1] == scaling
                    and factor[0].dtype == lora_A.dtype
                    and _is_plain(factor[0], x)
                ):
                    factors[key] = factor
        return factors


def share_input(parent: nn.Module, name: str) -> None:
    """Puts the LoRA layer `parent.name` in a group with those of its siblings that may read the
    same input, as their names say. Does nothing for any other name."""
    layer = parent._modules[name]
    names = next((names for names in SAME_INPUT if name in names), ())
    if not names or not hasattr(layer, "shared_factor") or layer.shared_input is not None:
        return
    siblings = [parent._modules.get(other) for other in names]
    groups = [getattr(sibling, "shared_input", None) for sibling in siblings]
    group = next((group for group in groups if group is not None), None)
    (group or SharedInput()).add(name, layer)
