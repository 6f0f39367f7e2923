"""Packs a dense weight that a packed layer finds in a state dict.

So code can build a packed model first and then load an unquantized checkpoint in the usual way: the
entry `weight` is replaced by packed entries, which nn.Module loads.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..checks import lacks_data, out_of_memory
from ..tensor.config import FLOAT_DTYPES

_PLAIN = (torch.Tensor, nn.Parameter)


@contextlib.contextmanager
def pre_hooks_first(module: nn.Module, *args):
    """Calls the load_state_dict pre-hooks of module with args, as nn.Module._load_from_state_dict
    does. Inside the context that method does not call them again."""
    hooks = module._load_state_dict_pre_hooks
    for hook in hooks.values():
        hook(*args)
    module._load_state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        module._load_state_dict_pre_hooks = hooks


def read_lazy(state_dict, keys) -> None:
    """Reads entries that are not tensors but act like tensors, such as those of Lightning's lazy
    loader: any torch function of them returns a tensor."""
    for key in keys:
        value = state_dict.get(key)
        if not isinstance(value, torch.Tensor) and torch.overrides.is_tensor_like(value):
            state_dict[key] = torch.detach(value)


def _is_transposed(layer) -> bool:
    """Whether the dense weight that layer was packed from is stored as [K, N] or [E, K, N]."""
    return getattr(layer, "from_conv1d", False) or getattr(layer, "is_transposed", False)


def dense_shape(layer) -> tuple[int, ...]:
    """The shape of the dense weight that layer was packed from."""
    *stack, N, K = layer._shape
    return (*stack, K, N) if _is_transposed(layer) else (*stack, N, K)


def is_dense(layer, value) -> bool:
    """Whether value is a dense weight for layer: of the right shape, and of floats."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and tuple(value.shape) == dense_shape(layer)
    )


def is_own(own: torch.Tensor | None, value) -> bool:
    """Whether value, an entry of a state dict, is the parameter own itself."""
    if value is own:
        return True
    if type(own) not in _PLAIN or type(value) not in _PLAIN or value.shape != own.shape:
        return False
    # Not data_ptr: on the meta device all addresses are 0.
    return value.untyped_storage()._cdata == own.untyped_storage()._cdata


def drop_own_beside_dense(layer, state_dict, prefix: str, keys) -> None:
    """If a state dict holds a dense weight for layer, drops the entries, of those in `keys`, that
    are the layer's own parameters. torch's set_model_state_dict, which accelerate also calls, adds
    them: it fills in missing entries with the model's own."""
    if is_dense(layer, state_dict.get(prefix + "weight")):
        for key in keys:
            value = state_dict.get(prefix + key)
            if value is not None and is_own(layer._parameters[key], value):
                del state_dict[prefix + key]


def pack_dense(layer, state_dict, prefix: str, assign: bool) -> list[str]:
    """Replaces the dense weight of a state dict by packed entries. Returns error messages; if there
    are any, the state dict is unchanged.

    The weight is packed on the layer's device. With assign, or if the layer is on the meta device,
    it is packed on its own device.
    """
    name, key = type(layer).__name__, f"{prefix}weight"
    weight, own = state_dict[key], layer._parameters["weight"]
    if weight.dtype not in FLOAT_DTYPES:
        return [f"{name}: {key} has dtype {weight.dtype}, want float32, float16 or bfloat16"]
    whole = type(own) in _PLAIN or isinstance(own, FakeTensor)
    if not whole or own.shape != layer._sizes()["weight"]:
        return [
            f"{name}: {key} is a dense {weight.dtype} {list(weight.shape)}, but this layer is "
            "sharded, want packed entries; or load the dense weight before sharding the model"
        ]
    if lacks_data(weight):
        sizes = {**layer._sizes(), "weight_codebook": layer.weight_codebook.shape}
        empty = {k: weight.new_empty(size, dtype=torch.uint8) for k, size in sizes.items()}
        state_dict.update({prefix + k: value for k, value in empty.items()})
        return []
    if type(weight) not in _PLAIN:
        return [f"{name}: {key} is a dense {type(weight).__name__}, want a plain tensor to pack"]
    weight = weight.detach()
    if not assign and not own.is_meta:
        weight = weight.to(own.device)
    if _is_transposed(layer):
        weight = weight.mT
    try:
        q = layer._pack(weight)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return [f"{name}: {key}: {error}"]
    state_dict.update({prefix + k: value for k, value in layer._as_parameters(q).items()})
    return []
