"""The base class of all layers with a packed weight: its tensors, checks and moves.

A packed weight is a few plain tensors on its module, so that state_dict, safetensors, DDP, FSDP2
and torch.compile work without extra code:

    weight           uint8 [N, K / 2], frozen; [ceil(N * K / 2), 1] if K is odd
    weight_absmax    uint8, frozen: 8-bit scale codes [num_blocks]; without double_quant the bytes
                     of fp32 scales [4 * num_blocks]
    weight_nested    uint8, frozen, double_quant only: bytes of the fp32 offset and absmax2
    weight_mean      uint8, frozen, normalization "standard" only: bytes of fp32 means
    weight_codebook  uint8 [64], frozen: the bytes of the codebook's 16 fp32 values; checked against
                     the config whenever a state dict is loaded

All but the codebook have E as their first size if the layer holds a stack of experts [E, N, K].
Statistics are bytes, so `.to(dtype)` cannot round them. The module's `config` says what the bytes
mean (block size, quant type); whoever writes a checkpoint stores it once for the model.

This file is longer than others: it is one class, with checks of state dicts that name each key.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch
from torch import nn
from torch.compiler import is_compiling

from ..checks import NO_DATA, lacks_data, not_dense, not_stored
from ..ops import _C
from ..tensor.config import FLOAT_DTYPES, QuantConfig
from ..tensor.functions import quantize_stack_4bit, quantize_tensor
from ..tensor.quantized import QuantizedTensor
from .dense_state import (
    dense_shape,
    drop_own_beside_dense,
    is_dense,
    pack_dense,
    pre_hooks_first,
    read_lazy,
)
from .marked import MarkedWeight
from .packed_bytes import byte_probe, byte_sample, is_arithmetic

_CODEBOOK_BYTES = 64
# After this many forward passes the sample is compared again, even if torch counted no write. A
# layer with a probe (on a CPU) does without this: every forward pass compares some bytes.
_FORWARDS = 512
# Attributes of a layer whose bytes have not been compared yet.
_UNSEEN = {"_seen_version": -1, "_seen_address": None, "_probe": None, "_probed": None}
_REPARAMETRIZING = frozenset(
    f"torch.nn.utils.{name}" for name in ("parametrizations", "parametrize", "weight_norm", "prune")
)
_AVERAGE = (
    "; if it is an average of packed bytes, average the dense weights (or the adapters) instead, "
    "and quantize the result"
)
_PACKED_KEYS = ("weight", "weight_absmax", "weight_nested", "weight_mean", "weight_codebook")


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    # transformers' weight initialisers skip tensors with this mark.
    parameter._is_hf_initialized = True
    return parameter


def tensors_of(q: QuantizedTensor) -> dict[str, torch.Tensor | None]:
    """q's tensors by the names that layers give them."""
    return dict(zip(_PACKED_KEYS, (q.packed, q.absmax, q.nested, q.mean), strict=False))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """tensor, copied if its address is not a multiple of 16, as in a memory-mapped file. The ops
    would otherwise copy it on every call."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
        return tensor
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class _Packed4bit(MarkedWeight):
    """The base of the packed layers: the packed weight, its checks and its moves."""

    holds_packed_weight = True  # in the parameters weight..., of the logical shape _shape
    config: QuantConfig
    dtype: torch.dtype  # the dense weight's dtype; .to(dtype) changes it
    # A sample of the bytes that were packed or loaded.
    _sealed: bytes | None
    # At the last comparison with the sample: weight's version (torch's count of writes; -1 if never
    # compared, None if torch counts none) and its address (None if tools move it).
    _seen_version: int | None
    _seen_address: int | None
    # The bytes of weight that every forward pass reads, and what they were. Without a probe (on a
    # GPU): the number of forward passes until the sample is compared again.
    _probe: ctypes.Array | None
    _probed: bytes | None
    _forwards_left: int
    # The dtype of adapters that are not cast to fp32; None is `dtype`.
    adapter_dtype: torch.dtype | None = None

    def _init_packed(self, shape: tuple[int, ...], config, dtype) -> None:
        """shape: of the dense weight, [N, K], or [E, N, K] for a stack of experts."""
        name = type(self).__name__
        if config is None:
            config = QuantConfig()
        if not isinstance(config, QuantConfig):
            raise TypeError(f"{name}: config is a {type(config).__name__}, want a QuantConfig")
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: dtype is {dtype}, want float32, float16 or bfloat16")
        self.config = config
        self.dtype = dtype
        self._shape = torch.Size(shape)
        self._blocksize = config.stored_blocksize
        self._custom = config.stored_codebook
        self._quant_type = config.stored_quant_type
        # The shape is a plain tuple, which the ops parse faster than a torch.Size.
        self._format = (tuple(shape), self._blocksize, self._quant_type, self._custom)
        self._nested = config.stores_nested
        self._values = tuple(self._custom or _C.codebooks()[config.quant_type])
        self._unseal()
        for key in _PACKED_KEYS:
            self.register_parameter(key, None)

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every packed tensor this module holds, by key."""
        *stack, N, K = self._shape
        numel = N * K
        num_blocks = math.ceil(numel / (self._blocksize or max(numel, 1)))
        sizes = {
            "weight": (N, K // 2) if K % 2 == 0 else ((numel + 1) // 2, 1),
            "weight_absmax": (num_blocks,) if self._nested else (4 * num_blocks,),
        }
        if self._nested:
            sizes["weight_nested"] = (4 * (1 + math.ceil(num_blocks / 256)),)
        if self.config.stores_mean:
            sizes["weight_mean"] = (4 * num_blocks,)
        return {key: (*stack, *size) for key, size in sizes.items()}

    def _codebook_bytes(self, device) -> torch.Tensor:
        return torch.tensor(self._values, dtype=torch.float32, device=device).view(torch.uint8)

    def _set_empty(self, device) -> None:
        """Allocates the packed tensors on device without filling them."""
        self._unseal()
        for key, size in {**self._sizes(), "weight_codebook": (_CODEBOOK_BYTES,)}.items():
            setattr(self, key, _frozen(torch.empty(size, dtype=torch.uint8, device=device)))
        if not self.weight_codebook.is_meta:
            self.weight_codebook.copy_(self._codebook_bytes(device))

    def _as_parameters(self, q: QuantizedTensor) -> dict[str, nn.Parameter]:
        """q's tensors as this module holds them: with its names and in its shapes."""
        parts = tensors_of(q)
        parameters = {k: _frozen(parts[k].reshape(size)) for k, size in self._sizes().items()}
        parameters["weight_codebook"] = _frozen(self._codebook_bytes(q.packed.device))
        return parameters

    def _set_quantized(self, q: QuantizedTensor) -> None:
        for key, parameter in self._as_parameters(q).items():
            setattr(self, key, parameter)
        self._unseal()
        self._check_bytes()

    def _pack(self, weight: torch.Tensor) -> QuantizedTensor:
        """weight, a dense tensor of this layer's shape, packed as the config says."""
        if len(self._shape) == 3:
            return quantize_stack_4bit(weight, self.config)
        return quantize_tensor(weight, self.config)

    def _quantize(self, weight: torch.Tensor) -> None:
        self._set_quantized(self._pack(weight))

    def _unseal(self) -> None:
        """Forgets the sample. The next _check_bytes accepts the bytes that it finds."""
        self._sealed, self._forwards_left = None, _FORWARDS
        self.__dict__.update(_UNSEEN)

    def _copied_from(self, other: _Packed4bit) -> None:
        """Call it after other's packed bytes were written over this module's."""
        other._check_bytes()
        self._unseal()
        self._sealed = other._sealed

    def _in_place_of(self, other: _Packed4bit):
        """Takes what other libraries look for on `other`. Returns self."""
        for key in ("weight_marks", "adapter_dtype"):
            if key in other.__dict__:  # the class's own weight_marks cannot be copied or pickled
                setattr(self, key, getattr(other, key))
        return self

    def _held(self) -> list[torch.Tensor]:
        """The packed tensors, weight first; an empty list if one has another shape, as one
        process's share of a sharded model may have."""
        sizes = {**self._sizes(), "weight_codebook": (_CODEBOOK_BYTES,)}
        held = [self._parameters.get(key) for key in sizes]
        whole = all(t is not None and t.shape == size for t, size in zip(held, sizes.values()))
        return held if whole else []

    def _check_bytes(self) -> None:
        """Raises RuntimeError if the packed bytes differ from those that were packed or loaded.

        It always finds arithmetic on all parameters (EMA, SWA, model soups), but may miss a write
        to a few bytes. If the bytes cannot be read now, the next forward pass checks them.
        """
        self._forwards_left = _FORWARDS
        held = self._held()
        for key in (*self._sizes(), "weight_codebook"):
            tensor = self._parameters.get(key)
            if tensor is not None and tensor.dtype != torch.uint8 and not tensor.is_meta:
                raise RuntimeError(
                    f"{type(self).__name__}: {key} is {tensor.dtype}, want uint8, the bytes of a "
                    f"packed {list(self._shape)} weight. Something assigned other values to the "
                    ".data of a packed weight (vector_to_parameters, an average of all "
                    "parameters), or passed them (functional_call): change only parameters with "
                    "requires_grad, and load this weight again with load_state_dict(assign=True)"
                )
        sample = byte_sample(held) if held else None
        if sample is None:
            self.__dict__.update(_UNSEEN)
            return
        if self._sealed is None:
            self._sealed = sample
        elif sample != self._sealed:
            raise RuntimeError(
                f"{type(self).__name__}: the packed bytes of this {list(self._shape)} weight were "
                "changed in place after they were packed or loaded. Arithmetic on them, such as an "
                "average of all parameters, gives a broken weight: average only parameters with "
                "requires_grad, and load other packed weights with load_state_dict"
            )
        weight = held[0]
        self._seen_version = None if weight.is_inference() else weight._version
        self._seen_address = weight.data_ptr()
        self._probe = byte_probe(weight)
        self._probed = self._probe and self._probe.raw

    def _check_written(self, weight: torch.Tensor) -> None:
        """_check_bytes for a forward pass that found weight's version or address changed."""
        if torch._C._are_functorch_transforms_active():  # their tensors have no address
            self._check_bytes()
            return
        known = self._seen_version != -1
        moved = known and weight.data_ptr() != self._seen_address
        self._check_bytes()
        # The bytes are the same at another address: FSDP2, ZeRO-3 and offloading move them for each
        # forward pass. On a GPU each comparison waits for the device, so ignore the address from
        # now on and rely on torch's count of writes.
        if moved:
            self._seen_address = self._probe = None

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this module's bytes. Raises RuntimeError if
        they were changed in place, as averaging does."""
        self._check_bytes()
        p = self._parameters
        if "weight" not in p:
            raise self._packed_error("weight")
        return QuantizedTensor(
            packed=p["weight"].detach(),
            absmax=p["weight_absmax"].detach(),
            nested=None if p["weight_nested"] is None else p["weight_nested"].detach(),
            mean=None if p["weight_mean"] is None else p["weight_mean"].detach(),
            shape=self._shape,
            dtype=self.dtype,
            blocksize=self._blocksize,
            quant_type=self._quant_type,
            codebook=self._custom,
        )

    def _w4(self, is_traced: bool):
        """The ops' arguments for the weight. Raises RuntimeError if its bytes were changed, unless
        a graph is being traced."""
        # This reads the dicts, not nn.Module.__getattr__ and __setattr__, which would take a tenth
        # of the call at M = 1. It caches nothing: .to(), loading and FSDP2 swap the parameters.
        d = self.__dict__
        p = d["_parameters"]
        try:
            weight = p["weight"]
        except KeyError:
            raise self._packed_error("weight") from None
        if not is_traced:
            probe = d["_probe"]
            if probe is None:
                d["_forwards_left"] = left = d["_forwards_left"] - 1
                version, address = d["_seen_version"], d["_seen_address"]
                try:
                    changed = (
                        left < 0
                        or (version is not None and weight._version != version)
                        or (address is not None and weight.data_ptr() != address)
                    )
                except RuntimeError:  # weight became an inference tensor, which counts no writes
                    changed = True
            else:
                try:
                    changed = weight.data_ptr() != d["_seen_address"] or probe.raw != d["_probed"]
                except RuntimeError:  # torch.func.functional_call gave it a tensor of a transform
                    changed = True
            if changed:
                self._check_written(weight)
        return (
            weight,
            p["weight_absmax"],
            p["weight_nested"],
            p["weight_mean"],
            *d["_format"],
        )

    def _packed_error(self, key: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}: {key} is packed, so it cannot be pruned, parametrized or "
            "normalized (torch.nn.utils). Do that to the dense layer, make it permanent "
            "(prune.remove, remove_parametrizations), then pack it. To go on with this layer, undo "
            "the change or load it again"
        )

    def __getattr__(self, name: str):
        """As nn.Module's, but raises RuntimeError if torch.nn.utils' parametrizations ask: they
        would compute with packed bytes."""
        # Not while compiling: dynamo cannot trace sys._getframe.
        if (
            name in _PACKED_KEYS
            and not is_compiling()
            and sys._getframe(1).f_globals.get("__name__") in _REPARAMETRIZING
        ):
            raise self._packed_error(name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; raises RuntimeError if torch.nn.utils.prune renames a packed weight."""
        key = name.removesuffix("_orig")
        if key != name and key in _PACKED_KEYS:
            raise self._packed_error(key)
        super().register_parameter(name, param)

    def _replicate_for_data_parallel(self):
        # A replica's tensors are plain attributes that every forward pass makes again.
        raise RuntimeError(
            f"{type(self).__name__}: nn.DataParallel is not supported; start one process per GPU "
            "(torchrun, accelerate launch), or use one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def reset_parameters(self) -> None:
        """Does nothing: packed weights come from a dense weight or a checkpoint."""

    def train(self, mode: bool = True):
        """As nn.Module's; eval() also checks the bytes. It finds changes that forward passes find
        late (writes to .data on a GPU) or never (in a compiled function)."""
        if not mode:
            self._check_bytes()
        return super().train(mode)

    def __getstate__(self):
        self._check_bytes()
        return {**self.__dict__, **_UNSEEN}  # a copy's bytes are at another address

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._check_bytes()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        def keep_bytes(tensor):
            moved = fn(tensor)
            if tensor.dtype == torch.uint8 and moved.dtype != torch.uint8:
                # Module.type(dst_type) casts everything. Move the bytes, but do not cast them.
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_bytes, recurse)
        self.__dict__.update(_UNSEEN)
        if self.weight.is_meta:
            self._unseal()
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype in FLOAT_DTYPES:
            self.dtype = probe.dtype
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys)
        assign = local_metadata.get("assign_to_params_buffers", False)
        # A pre-hook may rename, pack or unpack entries, so the checks see what it made of them.
        with pre_hooks_first(self, *args, error_msgs):
            read_lazy(state_dict, [prefix + key for key in self._parameters])
            drop_own_beside_dense(self, state_dict, prefix, _PACKED_KEYS)
            dtype = self.dtype
            errors = self._check_kinds(state_dict, prefix)
            if not errors and self._is_given_dense(state_dict, prefix):
                dtype = state_dict[prefix + "weight"].dtype
                errors = pack_dense(self, state_dict, prefix, assign)
            errors = errors or self._check_state(state_dict, prefix)
            if errors:
                error_msgs += errors
                return
            if assign:
                for key in self._sizes():
                    if prefix + key in state_dict:
                        state_dict[prefix + key] = _aligned(state_dict[prefix + key])
            before = len(error_msgs)
            super()._load_from_state_dict(*args, error_msgs)
        if prefix + "weight" in state_dict and len(error_msgs) == before:
            if assign:  # as for the tensors of any layer, which are then those of the state dict
                self.dtype = dtype
            self._unseal()
            self._check_bytes()

    def _is_given_dense(self, state_dict, prefix: str) -> bool:
        """Whether a state dict holds a dense weight for this layer, and nothing packed."""
        held = [key for key in _PACKED_KEYS if prefix + key in state_dict]
        return held == ["weight"] and is_dense(self, state_dict[prefix + "weight"])

    def _check_kinds(self, state_dict, prefix: str) -> list[str]:
        """One error message for each entry of this module that is not a dense tensor, and for each
        bias or adapter of another shape."""
        errors = []
        for key in self._parameters:
            value = state_dict.get(prefix + key)
            if prefix + key not in state_dict:
                continue
            got, own = not_stored(value), self._parameters[key]
            # In a dry run the layer itself has no data; then the entry needs none either.
            if got is None and lacks_data(value) and not (own is None or lacks_data(own)):
                got = NO_DATA
            if got is None and key not in _PACKED_KEYS:
                got = not_dense(value)  # _check_state reports the layout of packed ones
            if got is not None:
                errors.append(f"{type(self).__name__}: {prefix}{key} is {got}, want a dense tensor")
            elif key not in _PACKED_KEYS and own is not None and value.shape != own.shape:
                # torch reports it too, but after it has loaded the weight.
                errors.append(
                    f"{type(self).__name__}: {prefix}{key} has shape {list(value.shape)}, want "
                    f"{list(own.shape)}"
                )
        return errors

    def _check_state(self, state_dict, prefix: str) -> list[str]:
        """One error message for each thing wrong with the packed tensors of a state dict."""
        name = type(self).__name__
        held = [key for key in _PACKED_KEYS if prefix + key in state_dict]
        if not held:
            return []  # perhaps an adapter alone; torch reports the key if loading is strict
        weight = state_dict.get(prefix + "weight")
        if held == ["weight"] and weight.is_floating_point():
            shape = tuple(weight.shape)
            hint = "" if shape != self._sizes()["weight"] else _AVERAGE
            return [
                f"{name}: {prefix}weight is {weight.dtype} {list(shape)}, want a dense weight "
                f"{list(dense_shape(self))} to pack, or the packed entries{hint}"
            ]
        errors = []
        for key, size in {**self._sizes(), "weight_codebook": (_CODEBOOK_BYTES,)}.items():
            tensor = state_dict.get(prefix + key)
            if tensor is None:
                errors.append(
                    f"{name}: {prefix}{key} is missing, want uint8 {list(size)} in addition to "
                    f"{prefix}weight ({self._describe()})"
                )
            elif tensor.dtype != torch.uint8:
                hint = "; a dense weight is packed only if the layer's other entries are not given"
                if tuple(tensor.shape) == size:
                    hint = _AVERAGE
                errors.append(
                    f"{name}: {prefix}{key} is {tensor.dtype} {list(tensor.shape)}, want uint8 "
                    f"{list(size)}{hint if key == 'weight' else ''}"
                )
            elif tensor.layout != torch.strided:
                errors.append(
                    f"{name}: {prefix}{key} has layout {tensor.layout}, want torch.strided"
                )
            elif tuple(tensor.shape) != size:
                errors.append(
                    f"{name}: {prefix}{key} has shape {list(tensor.shape)}, want {list(size)} for "
                    f"{list(self._shape)} weights ({self._describe()})"
                )
        for key in ("weight_nested", "weight_mean"):
            if prefix + key in state_dict and key not in self._sizes():
                errors.append(
                    f"{name}: {prefix}{key} is unexpected with {self._describe()}; the checkpoint "
                    "was written with another config: build the layer with that one"
                )
        if errors:
            return errors
        codebook = state_dict[prefix + "weight_codebook"]
        readable = type(codebook) in (torch.Tensor, nn.Parameter) and not codebook.is_meta
        if readable and not torch.equal(codebook.cpu(), self._codebook_bytes("cpu")):
            got = codebook.cpu().clone().view(torch.float32).tolist()
            errors.append(
                f"{name}: {prefix}weight_codebook holds {[round(v, 4) for v in got]}, want "
                f"{[round(v, 4) for v in self._values]} ({self._describe()})"
            )
        floats = ["weight_nested", "weight_mean"]
        for key in floats if self._nested else ["weight_absmax", *floats]:
            tensor = state_dict.get(prefix + key)
            if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type == "meta":
                continue
            if not tensor.detach().clone().view(torch.float32).isfinite().all():
                errors.append(
                    f"{name}: {prefix}{key} holds a NaN or an infinity, want finite fp32 "
                    "statistics; the checkpoint is damaged"
                )
            elif key == "weight_nested" and not _scales_fit(tensor):
                errors.append(
                    f"{name}: {prefix}{key} gives scales that float32 cannot hold, want finite "
                    "ones; the checkpoint is damaged"
                )
        # The codebook is compared above.
        sample = byte_sample([state_dict[prefix + key] for key in self._sizes()])
        sealed = (self._sealed or b"")[:-_CODEBOOK_BYTES]
        if sample is not None and is_arithmetic(sealed, sample):
            errors.append(
                f"{name}: {prefix}weight holds this layer's bytes after arithmetic on them, such "
                "as an average of state dicts; average only the floating-point entries, and copy "
                "the uint8 entries unchanged"
            )
        return errors

    def _describe(self) -> str:
        c = self.config
        text = f"quant_type={c.quant_type}, blocksize={c.blocksize}, double_quant={c.double_quant}"
        if c.normalization != "absmax":
            text += f", normalization={c.normalization}"
        if c.companding != "none":
            text += f", companding={c.companding}({c.companding_k:g})"
        return text


def _scales_fit(nested: torch.Tensor) -> bool:
    """Whether every scale that the nested statistics [offset, absmax...] can give fits fp32."""
    values = nested.detach().clone().view(torch.float32).abs()
    if values.shape[-1] < 2 or values.numel() == 0:
        return True
    return bool((values[..., 0] + values[..., 1:].amax(-1)).isfinite().all())
