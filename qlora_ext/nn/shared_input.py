"""Computes scaling x A^T once for layers that read the same x (q, k, v; gate, up), if
`add_lora(..., share_inputs=True)` asks for it.

Adapted layers of one parent whose names suggest the same x form a `SharedInput`. Whether they do
read the same x shows when they run:

    q(x)   computes S = scaling x [A_q; A_k; A_v]^T and takes its columns
    k(x)   the same tensor, unchanged: takes its columns
    v(x)   takes the last ones; nothing is kept
    k(z)   another tensor: computes its own

S is computed without gradients, and a layer's op takes its columns as `lora_S` instead of computing
them. So each layer has its own graph, and outputs and gradients are those of layers that share
nothing. A wrong group costs a little work but gives no wrong numbers. With dropout active, each
layer draws its own mask and computes its own product.

"Unchanged" means that torch reports the same count of writes, address, dtype, shape and strides for
x and for A. torch does not count writes through `.data`, NumPy or another pointer, so such a write
between the calls of two siblings goes unnoticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops


def _state(tensor: Tensor) -> tuple:
    """A value that stays equal while nothing is written to the tensor and it is the same view."""
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _stream(x: Tensor) -> torch.cuda.Stream | None:
    """The CUDA stream of a product with x. On another stream S may not be ready yet."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def _may_share(x: Tensor) -> bool:
    """Whether torch can tell if x changed, and any backward can save an S computed now."""
    return (
        type(x) is Tensor  # no DTensor, FakeTensor or other subclass
        and not x.is_inference()  # torch counts no writes to it
        and not torch.is_inference_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
    )


def _factor(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The layer's lora_A if it can be stacked with others and multiply x by it, else None."""
    lora_A = layer._parameters.get("lora_A")
    is_plain = (
        type(lora_A) in (nn.Parameter, Tensor)  # no DTensor
        and lora_A.dim() == 2
        and lora_A.shape[1:] == x.shape[-1:]
        and lora_A.device == x.device
        and not lora_A.is_inference()
    )
    return lora_A if is_plain else None


def _key(lora_A: Tensor, scaling: float) -> tuple:
    """What a layer's columns of S depend on besides x."""
    return id(lora_A), *_state(lora_A), scaling


class SharedInput:
    """A group of LoraLinear4bit that may be called with the same x. See the module's docstring.

    It keeps no layer alive. A copied or unpickled group starts empty: a layer that is copied with
    its siblings joins their new group when it is first called.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()):
        self._layers = weakref.WeakKeyDictionary(dict.fromkeys(layers))
        # The last x, its state, and the columns that no layer has taken yet, as key -> (lora_A, S);
        # empty once x is gone. lora_A is kept so that no other tensor gets its id. It is one tuple,
        # so that alternating threads read parts that belong together.
        self._last: tuple[Callable[[], Tensor | None], tuple, dict] = (lambda: None, (), {})
        for layer in layers:
            layer.shared_input = self

    def __reduce__(self):
        return SharedInput, ()

    def __setstate__(self, state):
        """For pickles of adapted models from before `share_inputs` existed."""
        self.__init__()

    def take(self, layer: nn.Module, x: Tensor, cast: Tensor) -> Tensor | None:
        """S = scaling x A^T [..., r] for `layer`, which was called with x; None if the layer must
        compute S itself. `cast` is x in the dtype that the layer computes in (maybe autocast's)."""
        lora_A = _factor(layer, cast) if _may_share(x) else None
        if lora_A is None:
            return None
        if layer not in self._layers:
            self._layers[layer] = None
        state = (*_state(x), cast.dtype, _stream(x))
        key = _key(lora_A, layer.scaling)
        last_x, last_state, columns = self._last
        if last_x() is not x or last_state != state or key not in columns:
            columns = self._compute(layer.scaling, cast)
            self._last = weakref.ref(x, lambda _: columns.clear()), state, columns
        _, S = columns.pop(key, (None, None))
        return S

    def _compute(self, scaling: float, x: Tensor) -> dict:
        """key -> (lora_A, S) for the layers that can multiply x by their A. A layer with another
        scaling has another key. Empty for a single layer, whose op computes S itself."""
        layers = [layer for r in self._layers.keyrefs() if (layer := r()) is not None]
        found = [A for layer in layers if (A := _factor(layer, x)) is not None]
        factors = {_key(lora_A, scaling): lora_A for lora_A in found}
        if len(factors) < 2:
            return {}
        with torch.no_grad():
            S = ops.lora_shrink(x, torch.cat(list(factors.values())), scaling)
        parts = S.split([A.shape[0] for A in factors.values()], dim=-1)
        if x.device.type == "cpu":
            # A product reads S once for every 32 rows of W, from L1 if the rows of S are adjacent.
            # (q, k and v of 576 inputs, 512 rows, r = 8: strided rows cost 5%. 2026-11.)
            parts = [part.contiguous() for part in parts]
        return dict(zip(factors, zip(factors.values(), parts, strict=True), strict=True))
