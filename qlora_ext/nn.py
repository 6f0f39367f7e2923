"""Modules over packed 4-bit weights.

A packed weight is plain tensors on its module, so that state_dict, safetensors, DDP, FSDP2 and
torch.compile need nothing of ours:

    weight           uint8 [N, K / 2], frozen; [ceil(N * K / 2), 1] where K is odd
    weight_absmax    uint8, frozen: 8-bit scale codes [num_blocks]; without double_quant the bytes
                     of fp32 scales [4 * num_blocks]
    weight_nested    uint8, frozen, double_quant only: bytes of the fp32 offset and absmax2
    weight_mean      uint8, frozen, normalization "standard" only: bytes of fp32 means
    weight_codebook  uint8 [64], frozen: the bytes of the codebook's 16 fp32 values; checked against
                     the config whenever a state dict is loaded

Statistics are bytes, so `.to(dtype)` cannot round them. What the bytes mean (block size, quant
type) is the module's `config`, which the checkpoint's owner stores once for the model.
"""

from __future__ import annotations

import copy
import ctypes
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from . import _C, ops
from .checks import FLOAT_MAX, NO_DATA, check_input, is_number, lacks_data, not_plain, short
from .offload import device_of
from .packed_bytes import byte_probe, byte_sample, is_arithmetic
from .quantized_tensor import (
    FLOAT_DTYPES,
    QuantConfig,
    QuantizedTensor,
    autocast,
    quantize_with,
)
from .shared_input import SharedInput

__all__ = ["Embedding4bit", "Linear4bit", "LoraLinear", "LoraLinear4bit", "PanelLinear"]

_CODEBOOK_BYTES = 64
# The bytes are compared again after so many forward passes, whatever torch counts, unless each of
# them reads some (on a CPU).
_FORWARDS = 512
# Attributes of a layer whose bytes were not compared yet.
_UNSEEN = {"_seen_version": -1, "_seen_address": None, "_probe": None, "_probed": None}
_REPARAMETRIZING = frozenset(
    f"torch.nn.utils.{name}" for name in ("parametrizations", "parametrize", "weight_norm", "prune")
)
_PACKED_KEYS = ("weight", "weight_absmax", "weight_nested", "weight_mean", "weight_codebook")


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether module computes x W^T + b and nothing else, so that a Linear4bit can stand in.

    Exactly nn.Linear and Conv1D: a subclass may compute something else (a router, a fused layer)
    or be read by its parent. Falcon's subclass is known to be plain.
    """
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear" or is_conv1d(module)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a Conv1D, however its weight is stored."""
    if is_conv1d(linear):
        return linear.weight.shape[1], linear.weight.shape[0]
    return linear.out_features, linear.in_features


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    # transformers' weight initialisers leave tensors alone that carry this mark.
    parameter._is_hf_initialized = True
    return parameter


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """tensor, copied if it starts at an odd address, as one in a memory-mapped file may: the ops
    would otherwise copy it on every call."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
        return tensor
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class _Packed4bit(nn.Module):
    """What Linear4bit and Embedding4bit share: the packed weight, its checks and its moves."""

    config: QuantConfig
    dtype: torch.dtype  # dtype of the weight the packed one stands for; follows .to(dtype)
    # A sample of the bytes that were packed or loaded.
    _sealed: bytes | None
    # When they were last compared with it: weight's version (what torch counts writes by; -1 for
    # never, None if it counts none) and address (None if tools move it).
    _seen_version: int | None
    _seen_address: int | None
    # Bytes of weight that every forward pass reads and what they were then, or the forward passes
    # until all are compared again if there is no probe (on a GPU).
    _probe: ctypes.Array | None
    _probed: bytes | None
    _forwards_left: int

    def _init_packed(self, N: int, K: int, config, dtype) -> None:
        name = type(self).__name__
        if config is None:
            config = QuantConfig()
        if not isinstance(config, QuantConfig):
            raise TypeError(f"{name}: config is a {type(config).__name__}, want a QuantConfig")
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: dtype is {dtype}, want float32, float16 or bfloat16")
        self.config = config
        self.dtype = dtype
        self._shape = torch.Size((N, K))
        self._blocksize = 0 if config.normalization == "none" else config.blocksize or 0
        self._custom = config.stored_codebook
        self._quant_type = config.stored_quant_type
        # A plain tuple for the shape: the ops parse it faster than a torch.Size.
        self._format = ((N, K), self._blocksize, self._quant_type, self._custom)
        self._nested = config.double_quant and config.normalization != "none"
        self._values = tuple(self._custom or _C.codebooks()[config.quant_type])
        self._unseal()
        for key in _PACKED_KEYS:
            self.register_parameter(key, None)

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every packed tensor this module holds, by key."""
        N, K = self._shape
        numel = N * K
        num_blocks = math.ceil(numel / (self._blocksize or max(numel, 1)))
        sizes = {
            "weight": (N, K // 2) if K % 2 == 0 else ((numel + 1) // 2, 1),
            "weight_absmax": (num_blocks,) if self._nested else (4 * num_blocks,),
        }
        if self._nested:
            sizes["weight_nested"] = (4 * (1 + math.ceil(num_blocks / 256)),)
        if self.config.normalization == "standard":
            sizes["weight_mean"] = (4 * num_blocks,)
        return sizes

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
        """q's tensors under the names and in the shapes that this module holds them."""
        parts = {"weight": q.packed, "weight_absmax": q.absmax}
        parts |= {"weight_nested": q.nested, "weight_mean": q.mean}
        parameters = {k: _frozen(parts[k].reshape(size)) for k, size in self._sizes().items()}
        parameters["weight_codebook"] = _frozen(self._codebook_bytes(q.packed.device))
        return parameters

    def _set_quantized(self, q: QuantizedTensor) -> None:
        for key, parameter in self._as_parameters(q).items():
            setattr(self, key, parameter)
        self._unseal()
        self._check_bytes()

    def _quantize(self, weight: torch.Tensor) -> None:
        self._set_quantized(quantize_with(weight, self.config))

    def _unseal(self) -> None:
        """Lets the next _check_bytes take the bytes that are then there."""
        self._sealed, self._forwards_left = None, _FORWARDS
        self.__dict__.update(_UNSEEN)

    def _copied_from(self, other: _Packed4bit) -> None:
        """Says that other's packed bytes were written over this module's."""
        other._check_bytes()
        self._sealed = other._sealed
        self.__dict__.update(_UNSEEN)

    def _held(self) -> list[torch.Tensor]:
        """The packed tensors, weight first; none where one has another shape, as a process's share
        may have."""
        sizes = {**self._sizes(), "weight_codebook": (_CODEBOOK_BYTES,)}
        held = [self._parameters.get(key) for key in sizes]
        whole = all(t is not None and t.shape == size for t, size in zip(held, sizes.values()))
        return held if whole else []

    def _check_bytes(self) -> None:
        """RuntimeError if the packed bytes are others than were packed or loaded.

        What arithmetic on all parameters does (EMA, SWA, model soups) is always found; a write to a
        few bytes may not be. Where the bytes cannot be read, the next forward pass looks.
        """
        self._forwards_left = _FORWARDS
        held = self._held()
        for key in (*self._sizes(), "weight_codebook"):
            tensor = self._parameters.get(key)
            if tensor is not None and tensor.dtype != torch.uint8:
                N, K = self._shape
                raise RuntimeError(
                    f"{type(self).__name__}: {key} is {tensor.dtype}, want uint8 (of a packed "
                    f"[{N}, {K}] weight): something assigned other values to the .data of a packed "
                    "weight, as vector_to_parameters and averages of all parameters do, or called "
                    "the layer with others (functional_call); change only parameters with "
                    "requires_grad, and load the packed weight again with "
                    "load_state_dict(assign=True)"
                )
        sample = byte_sample(held) if held else None
        if sample is None:
            self.__dict__.update(_UNSEEN)
            return
        if self._sealed is None:
            self._sealed = sample
        elif sample != self._sealed:
            N, K = self._shape
            raise RuntimeError(
                f"{type(self).__name__}: the packed bytes of this [{N}, {K}] weight were changed "
                "in place after they were packed or loaded. Arithmetic on them, such as an average "
                "of all parameters, gives a broken weight: average only parameters with "
                "requires_grad, and load other packed weights with load_state_dict"
            )
        weight = held[0]
        self._seen_version = None if weight.is_inference() else weight._version
        self._seen_address = weight.data_ptr()
        self._probe = byte_probe(weight)
        self._probed = self._probe and self._probe.raw

    def _check_written(self, weight: torch.Tensor) -> None:
        """_check_bytes for a forward pass that found another version or address of weight."""
        if torch._C._are_functorch_transforms_active():  # whose tensors have no address
            self._check_bytes()
            return
        known = self._seen_version != -1
        moved = known and weight.data_ptr() != self._seen_address
        self._check_bytes()
        # The same bytes elsewhere: FSDP2, ZeRO-3 and offloading put them somewhere else for each
        # forward pass, and on a GPU each comparison waits for the device. The count is left.
        if moved:
            self._seen_address = self._probe = None

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this module's bytes. RuntimeError if they
        were changed in place, as averaging does."""
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
        """The ops' arguments for the weight. RuntimeError if its bytes were changed, unless a graph
        is traced."""
        # Read from the dicts, not through nn.Module.__getattr__ and __setattr__: at M = 1 that
        # would be a tenth of the call. Never cached: .to(), loading and FSDP2 swap the parameters.
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
                except RuntimeError:  # it became an inference tensor, which counts no writes
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
            "normalized (torch.nn.utils); do that to the dense layer, make it permanent "
            "(prune.remove, remove_parametrizations), and pack it then; here, undo it or load the "
            "layer anew"
        )

    def __getattr__(self, name: str):
        """As nn.Module's; RuntimeError for torch.nn.utils' parametrizations, which would compute
        with packed bytes."""
        # A graph that is traced may ask for a dtype; frames cannot be traced.
        if (
            name in _PACKED_KEYS
            and not is_compiling()
            and sys._getframe(1).f_globals.get("__name__") in _REPARAMETRIZING
        ):
            raise self._packed_error(name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; RuntimeError for what torch.nn.utils.prune makes of a packed weight."""
        key = name.removesuffix("_orig")
        if key != name and key in _PACKED_KEYS:
            raise self._packed_error(key)
        super().register_parameter(name, param)

    def _replicate_for_data_parallel(self):
        # A replica's tensors are plain attributes, made anew in every forward pass.
        raise RuntimeError(
            f"{type(self).__name__}: nn.DataParallel is not supported; start one process per GPU "
            "(torchrun, accelerate launch), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def reset_parameters(self) -> None:
        """Does nothing: packed weights come from a dense weight or a checkpoint."""

    def train(self, mode: bool = True):
        """As nn.Module's; eval() looks for changed bytes, also those that forward passes find late
        (writes to .data on a GPU) or not at all (in a compiled function)."""
        if not mode:
            self._check_bytes()
        return super().train(mode)

    def __getstate__(self):
        self._check_bytes()
        return {**self.__dict__, **_UNSEEN}  # a copy's bytes lie elsewhere

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._check_bytes()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        def keep_bytes(tensor):
            moved = fn(tensor)
            if tensor.dtype == torch.uint8 and moved.dtype != torch.uint8:
                # Module.type(dst_type) casts everything; bytes may move but not change.
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
        errors = self._check_kinds(state_dict, prefix) or self._check_state(state_dict, prefix)
        if errors:
            error_msgs += errors
            return
        if local_metadata.get("assign_to_params_buffers", False):
            for key in self._sizes():
                if prefix + key in state_dict:
                    state_dict[prefix + key] = _aligned(state_dict[prefix + key])
        before = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "weight" in state_dict and len(error_msgs) == before:
            self._unseal()
            self._check_bytes()

    def _check_kinds(self, state_dict, prefix: str) -> list[str]:
        """Entries for this module that are no dense tensors, a sentence each."""
        errors = []
        for key in self._parameters:
            value = state_dict.get(prefix + key)
            if prefix + key not in state_dict:
                continue
            got, own = not_plain(value), self._parameters[key]
            # A layer that has no data itself may be given none: a dry run.
            if got is None and lacks_data(value) and not (own is None or lacks_data(own)):
                got = NO_DATA
            if got is not None:
                errors.append(f"{type(self).__name__}: {prefix}{key} is {got}, want a dense tensor")
        return errors

    def _check_state(self, state_dict, prefix: str) -> list[str]:
        """What is wrong with the packed tensors of a state dict, a sentence each."""
        name = type(self).__name__
        if not any(prefix + key in state_dict for key in _PACKED_KEYS):
            return []  # an adapter alone, say; torch reports the key if loading is strict
        errors = []
        for key, size in {**self._sizes(), "weight_codebook": (_CODEBOOK_BYTES,)}.items():
            tensor = state_dict.get(prefix + key)
            if tensor is None:
                errors.append(
                    f"{name}: {prefix}{key} is missing, want uint8 {list(size)} beside "
                    f"{prefix}weight ({self._describe()})"
                )
            elif tensor.dtype != torch.uint8:
                hint = "; quantize a dense weight with from_linear or quantize_model"
                if tuple(tensor.shape) == size:
                    hint = "; if it is an average of packed bytes, average the dense weights (or "
                    hint += "the adapters) instead, and quantize the result"
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
                    f"[{self._shape[0]}, {self._shape[1]}] weights ({self._describe()})"
                )
        for key in ("weight_nested", "weight_mean"):
            if prefix + key in state_dict and key not in self._sizes():
                errors.append(
                    f"{name}: {prefix}{key} is unexpected with {self._describe()}; the checkpoint "
                    "was written with another config"
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
                    f"{name}: {prefix}{key} makes scales beyond float32, want finite ones; the "
                    "checkpoint is damaged"
                )
        # The codebook is compared above.
        sample = byte_sample([state_dict[prefix + key] for key in self._sizes()])
        sealed = (self._sealed or b"")[:-_CODEBOOK_BYTES]
        if sample is not None and is_arithmetic(sealed, sample):
            errors.append(
                f"{name}: {prefix}weight holds this layer's bytes after arithmetic on them, as an "
                "average of state dicts gives; average the floating-point entries alone and take "
                "the uint8 ones as they are"
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
    """Whether fp32 holds every scale that the nested statistics [offset, absmax...] can make."""
    values = nested.detach().clone().view(torch.float32).abs()
    return values.numel() < 2 or bool((values[0] + values[1:].max()).isfinite())


# Names of layers whose outputs are those of several, one after the other (Phi-3, GPT-2, Mamba,
# ModernBERT and others). Not query_key_value, which models split head by head.
FUSED = frozenset(
    ("qkv_proj", "gate_up_proj", "c_attn", "in_proj", "Wqkv", "W_pack", "Wi", "qkv", "up_gate_proj")
)


class Linear4bit(_Packed4bit, nn.Linear):
    """y = x W^T + b with W packed in 4 bits and frozen: [..., in_features] -> [..., out_features].

    x is float32, float16 or bfloat16 and y has its dtype, or autocast's where autocast is on; the
    bias (a plain parameter of `dtype`) may have another one. Sums are fp32, rounded once.

    Made directly, it packs random weights drawn as nn.Linear draws them, or on the meta device
    allocates nothing and waits for a state dict. `from_linear` packs a trained layer.

    Args:
        in_features, out_features: logical sizes K and N, whatever the packed tensors' shapes are.
        bias: whether there is a bias of `dtype` [out_features].
        config: a QuantConfig; None is NF4, blocks of 64, double-quantized (4.127 bits per weight).
        device, dtype: as for nn.Linear; dtype is that of the bias and of the dequantized weight.

    Raises:
        TypeError: config is not a QuantConfig, or dtype is not float32, float16 or bfloat16.
        RuntimeError: from load_state_dict, naming the key whose shape, dtype or codebook is wrong.
    """

    from_conv1d = False  # merging gives a Conv1D back where there was one
    fused: str | None = None  # its name in the model, if that is one of FUSED

    def __init__(
        self, in_features, out_features, bias=True, *, config=None, device=None, dtype=None
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._init_packed(out_features, in_features, config, dtype)
        draft = torch.empty(out_features, in_features, device=device, dtype=dtype)
        if draft.is_meta:
            self._set_empty("meta")
        else:
            nn.init.kaiming_uniform_(draft, a=math.sqrt(5))
            self._quantize(draft)
        self.register_parameter("bias", None)
        if bias:
            bound = 1 / math.sqrt(in_features) if in_features > 0 else 0
            self.bias = nn.Parameter(draft.new_empty(out_features).uniform_(-bound, bound))

    @classmethod
    def empty_like(cls, linear: nn.Module, config=None, *, device="meta", dtype=None):
        """An unfilled Linear4bit of an nn.Linear's or Conv1D's shape, to load a checkpoint into.

        Args:
            linear: the layer to stand in for; its weight is not read and may be on meta.
            device: where the packed tensors are allocated. dtype: None is the layer's own.
        """
        _check_source(cls.__name__, linear)
        N, K = linear_shape(linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = K, N
        self._init_packed(N, K, config, dtype or linear.weight.dtype)
        self._set_empty(device)
        self.register_parameter("bias", None)
        if linear.bias is not None:
            bias = torch.empty(N, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        self.from_conv1d = is_conv1d(linear)
        return self.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Module, config=None):
        """Packs an nn.Linear, or transformers' Conv1D, whose weight is finite and floating.

        Args:
            linear: the layer; it is not changed, and its bias is shared. A layer on the meta
                device gives a module on the meta device.
            config: a QuantConfig, or None for NF4 with blocks of 64.

        Raises:
            TypeError: not a linear layer; a Linear4bit, which is quantized already; a weight that
                is not float32, float16 or bfloat16; a parametrized weight.
            RuntimeError: a NaN or Inf in the weight, naming its index.
        """
        self = cls.empty_like(linear, config)
        if not linear.weight.is_meta:
            weight = linear.weight.detach()
            self._quantize(weight.T.contiguous() if self.from_conv1d else weight)
        if linear.bias is not None:
            self.bias = linear.bias
        return self

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype the product runs in."""
        if x.dtype is torch.uint8:
            raise TypeError(
                f"{type(self).__name__}: x has dtype uint8, want float32, float16 or bfloat16. The "
                "caller cast its activations to this layer's weight.dtype, which is that of packed "
                "bytes (T5's feed-forward does so with `wo`): keep the layer unquantized, with "
                'modules_to_not_convert=["wo"]'
            )
        return autocast(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features] in x's (or autocast's) dtype."""
        bias = self._parameters["bias"]
        if is_compiling():
            return ops.gemm_4bit(self._input(x), self._w4(True), bias)
        try:
            return ops.gemm_4bit_eager(self._input(x), self._w4(False), bias)
        except Exception:
            check_input(type(self).__name__, x=x)
            raise

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._describe()}"
        )


def _check_source(name: str, linear: nn.Module) -> None:
    if isinstance(linear, _Packed4bit):
        raise TypeError(
            f"{name}: linear is a {type(linear).__name__}, want an nn.Linear with a dense weight; "
            "it is quantized already"
        )
    if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
        raise TypeError(
            f"{name}: linear is a {type(linear).__name__}, want an nn.Linear or "
            "transformers' Conv1D"
        )
    if torch.nn.utils.parametrize.is_parametrized(linear):
        raise TypeError(
            f"{name}: linear's weight is parametrized ({', '.join(linear.parametrizations)}), want "
            "a plain one; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    _check_own_weight(name, linear)
    if linear.weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: linear.weight has dtype {linear.weight.dtype}, want float32, float16 or "
            "bfloat16"
        )


def _check_own_weight(name: str, linear: nn.Module) -> None:
    if linear._parameters.get("weight") is None:
        raise TypeError(
            f"{name}: linear.weight is computed from other parameters "
            f"({', '.join(linear._parameters)}) by torch.nn.utils' weight_norm or spectral_norm, "
            "want a parameter; remove_weight_norm or remove_spectral_norm makes it one"
        )


# Unquantized layers -------------------------------------------------------------------------------


def _slow_on_cpu() -> frozenset[torch.dtype]:
    """The dtypes that this CPU has no instructions for, so that torch's own products are slow. (One
    core, 1536 x 576 and 8192 x 576, 192 rows: forward 5x slower than through fp32 panels, backward
    40x; with avx512_bf16, bf16 is 2x faster. 2026-11.) Where torch is held to AVX2
    (ATEN_CPU_CAPABILITY), the CPU's other instructions do not count."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return frozenset((torch.bfloat16, torch.float16))
    bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    float16 = torch.cpu._is_amx_fp16_supported()
    slow = {torch.bfloat16: not bfloat16, torch.float16: not float16}
    return frozenset(dtype for dtype, is_slow in slow.items() if is_slow)


SLOW_ON_CPU = _slow_on_cpu()


def _panel_product(x: torch.Tensor, weight: torch.Tensor, bias, always: bool) -> torch.Tensor:
    """x W^T + b, through fp32 panels where that is faster than torch's own product, or always."""
    if weight.dtype is torch.uint8:
        raise RuntimeError(
            "PanelLinear: weight is uint8, the packed table that the layer was tied to "
            "(tie_weights): only a dense table can be tied; tie before packing, which leaves tied "
            "tables dense, or set config.tie_word_embeddings=False and load the layer anew"
        )
    low = weight.dtype in (SLOW_ON_CPU if not always else (torch.bfloat16, torch.float16))
    if not low or x.dtype is not weight.dtype or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if x.is_nested or x.layout is not torch.strided:  # which torch's takes
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):  # which chooses the dtype of torch's product
        return F.linear(x, weight, bias)
    # A backward to come decides for the panels: it gains most. A graph for any number of rows
    # takes them too.
    backward = x.requires_grad and torch.is_grad_enabled()
    if backward or is_compiling() or x.numel() >= 4 * weight.shape[1]:
        return ops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


class PanelLinear(nn.Linear):
    """An unquantized nn.Linear (a language model's head) that is fast in bf16 and fp16 on any CPU.

    Its products, forward and backward, decode panels of the weight to fp32 where torch's own would
    run without instructions for the dtype. Each call decides: the weight may be cast or moved.
    Parameters and state dict are nn.Linear's own, so a tied weight stays tied.
    x: [..., in_features] -> [..., out_features] in x's dtype.
    """

    always_panels = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, always: bool = False):
        """The same layer, sharing its parameters; always: also where torch's product is fast.

        TypeError for anything but a plain nn.Linear.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"{cls.__name__}: linear is a {type(linear).__name__}, want a plain nn.Linear"
            )
        self = cls.__new__(cls)
        _share(linear, self)
        self.always_panels = always  # on the instance, for an adapter to take over
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features]."""
        return _panel_product(x, self.weight, self.bias, self.always_panels)


def _share(source: nn.Module, target: nn.Module) -> None:
    """Gives target source's attributes and its very parameters, buffers and hooks."""
    for key, value in source.__dict__.items():
        if key not in ("forward", "_hf_hook", "_old_forward"):
            # Containers of parameters and hooks are copied, what they hold is shared.
            container = isinstance(value, (dict, set))
            target.__dict__[key] = copy.copy(value) if container else value


# LoRA ---------------------------------------------------------------------------------------------


def check_lora_rank(name: str, r: int, in_features: int, out_features: int) -> None:
    """ValueError unless 1 <= r <= min(in_features, out_features): a larger r adds no rank."""
    most = min(in_features, out_features)
    if type(r) is not int or not 1 <= r <= most:
        raise ValueError(
            f"{name}: r is {r!r}, want an integer from 1 to min(in_features, out_features) = "
            f"{most} for a [{out_features}, {in_features}] weight"
        )


class _Lora(nn.Module):
    """The bypass that LoraLinear4bit and LoraLinear add: scaling * dropout(x) A^T B^T.

    Source: LoRA (arXiv 2106.09685); A is Kaiming-uniform with a = sqrt(5) as in PEFT, B is zero.
    """

    def _init_lora(self, r, lora_alpha, lora_dropout, use_rslora, device, lora_dtype) -> None:
        name = type(self).__name__
        check_lora_rank(name, r, self.in_features, self.out_features)
        if not isinstance(lora_dropout, (int, float)) or not 0 <= lora_dropout < 1:
            raise ValueError(
                f"{name}: lora_dropout is {lora_dropout!r}, want a probability in [0, 1)"
            )
        if lora_dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: lora_dtype is {lora_dtype}, want float32, float16 or bfloat16"
            )
        self.r = r
        self.lora_dropout = float(lora_dropout)
        self.set_scaling(lora_alpha, use_rslora)
        lora_A = torch.empty(r, self.in_features, device=device, dtype=lora_dtype)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_A.new_zeros(self.out_features, r))

    def set_scaling(self, lora_alpha: float, use_rslora: bool = False) -> None:
        """Sets the bypass's factor: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.

        ValueError unless lora_alpha is a positive number that fits float32, as in LoraConfig.
        """
        if not is_number(lora_alpha) or not 0 < lora_alpha <= FLOAT_MAX:
            raise ValueError(
                f"{type(self).__name__}: lora_alpha is {short(lora_alpha)}, want a finite number "
                "above 0 that fits float32"
            )
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    def _lora_repr(self) -> str:
        return f", r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


class LoraLinear4bit(_Lora, Linear4bit):
    """Linear4bit with one LoRA adapter: y = x W^T + b + scaling * dropout(x) A^T B^T.

    lora_A [r, in_features] and lora_B [out_features, r] are trainable, float32 unless lora_dtype
    says otherwise, whatever x's dtype is; scaling = lora_alpha / r. Dropout acts on the bypass's
    input only, in training. The bypass is part of the packed product: no [M, N] temporary.
    add_lora(..., share_inputs=True) sets `shared_input`, a group of layers that read the same x.

    Args:
        in_features, out_features, bias, config, device, dtype: as for Linear4bit.
        r: rank, from 1 to min(in_features, out_features).
        lora_alpha, lora_dropout: as in PEFT. use_rslora: scaling = lora_alpha / sqrt(r).
        lora_dtype: dtype of lora_A and lora_B.

    Raises:
        ValueError: r or lora_dropout out of range. TypeError: as Linear4bit, or a bad lora_dtype.
    """

    shared_input: SharedInput | None = None

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        lora_dtype=torch.float32,
        config=None,
        device=None,
        dtype=None,
    ):
        check_lora_rank(type(self).__name__, r, in_features, out_features)
        super().__init__(in_features, out_features, bias, config=config, device=device, dtype=dtype)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora, self.weight.device, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config=None,
        *,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        lora_dtype=torch.float32,
    ):
        """Adds an adapter to a Linear4bit, whose bytes are shared; a dense layer is packed first.

        Raises: as the constructor and Linear4bit.from_linear; TypeError where linear has an
        adapter already, or where config is given for a layer that is packed already.
        """
        name = cls.__name__
        if isinstance(linear, _Lora):
            raise TypeError(
                f"{name}: linear is a {type(linear).__name__}, want one without adapter"
            )
        if not isinstance(linear, Linear4bit):
            linear = Linear4bit.from_linear(linear, config)
        elif config is not None and config != linear.config:
            raise TypeError(
                f"{name}: config is given for a layer that is quantized already "
                f"({linear._describe()}), want None"
            )
        self = cls.__new__(cls)
        _share(linear, self)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora, device_of(linear), lora_dtype)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features] in x's (or autocast's) dtype."""
        if is_compiling():
            return self._product(x, True)
        try:
            return self._product(x, False)
        except Exception:
            check_input(type(self).__name__, x=x)
            raise

    def _product(self, x: torch.Tensor, is_traced: bool) -> torch.Tensor:
        p = self._parameters
        lora_A = p["lora_A"]
        given, x = x, self._input(x)
        if self.training and self.lora_dropout:
            # The bypass sees another x than the weight does, so its product is made apart.
            S = ops.lora_shrink(F.dropout(x, self.lora_dropout), lora_A, self.scaling)
            return ops.gemm_4bit(x, self._w4(is_traced), p["bias"], S, p["lora_B"])
        group = None if is_traced else self.shared_input
        S = None if group is None else group.take(self, given, x)
        return ops.lora_gemm_4bit(
            x, self._w4(is_traced), lora_A, p["lora_B"], self.scaling, p["bias"], S
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + self._lora_repr()


class LoraLinear(_Lora, nn.Linear):
    """An unquantized nn.Linear (a language model's head) with one LoRA adapter.

    The dense weight and bias are frozen and shared with the layer it was made from, so a weight
    tied to an embedding stays tied. lora_A [r, in_features] and lora_B [out_features, r] as in
    LoraLinear4bit; x: [..., in_features] -> [..., out_features].
    """

    always_panels = None  # a PanelLinear's, where it was made from one

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        lora_dtype=torch.float32,
    ):
        """Adds an adapter to a plain nn.Linear or a PanelLinear.

        Raises:
            TypeError: another module; a subclass of nn.Linear may compute something else.
            ValueError: a bad r.
        """
        is_plain = is_plain_linear(linear) and not is_conv1d(linear)
        if not is_plain and type(linear) is not PanelLinear:
            raise TypeError(
                f"{cls.__name__}: linear is a {type(linear).__name__}, want a plain nn.Linear with "
                "a dense weight and no adapter"
            )
        _check_own_weight(cls.__name__, linear)
        self = cls.__new__(cls)
        _share(linear, self)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora, device_of(linear), lora_dtype)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features], float -> [..., out_features]."""
        if self.always_panels is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = _panel_product(x, self.weight, self.bias, self.always_panels)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        S = F.linear(dropped.to(self.lora_A.dtype), self.lora_A)
        return y + (F.linear(S, self.lora_B) * self.scaling).to(y.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._lora_repr()


# Embeddings ---------------------------------------------------------------------------------------


class Embedding4bit(_Packed4bit, nn.Embedding):
    """nn.Embedding with the table packed in 4 bits and frozen. int64 indices [...] -> [..., dim].

    The output has `dtype`, which follows .to(dtype). padding_idx is kept, and has no gradient to
    stop since the table is frozen. Made directly it packs N(0, 1) rows, or waits on meta.

    Args:
        num_embeddings, embedding_dim, padding_idx: as for nn.Embedding.
        config, device, dtype: as for Linear4bit.

    Raises:
        TypeError: as Linear4bit.
        RuntimeError: an index out of range, on the CPU; on a GPU it traps, as in nn.Embedding.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx=None,
        *,
        config=None,
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._init_embedding(num_embeddings, embedding_dim, padding_idx, config, dtype)
        draft = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        if draft.is_meta:
            self._set_empty("meta")
            return
        nn.init.normal_(draft)
        if self.padding_idx is not None:
            draft[self.padding_idx] = 0
        self._quantize(draft)

    def _init_embedding(self, num_embeddings, embedding_dim, padding_idx, config, dtype) -> None:
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"Embedding4bit: padding_idx is {padding_idx}, want within "
                    f"num_embeddings = {num_embeddings}"
                )
            padding_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._init_packed(num_embeddings, embedding_dim, config, dtype)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config=None):
        """Packs an nn.Embedding's table; one on the meta device gives a module on meta.

        Raises:
            TypeError: not an nn.Embedding, one with max_norm, one quantized already, or a table
                that is not float32, float16 or bfloat16.
            RuntimeError: a NaN or Inf in the table, naming its index.
        """
        name = cls.__name__
        if isinstance(embedding, _Packed4bit) or not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"{name}: embedding is a {type(embedding).__name__}, want an nn.Embedding with a "
                "dense table"
            )
        if embedding.max_norm is not None:
            raise TypeError(
                f"{name}: embedding.max_norm is {embedding.max_norm}, want None: it rewrites rows "
                "as they are read"
            )
        if embedding.weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: embedding.weight has dtype {embedding.weight.dtype}, want float32, "
                "float16 or bfloat16"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        weight = embedding.weight.detach()
        N, K = weight.shape
        self._init_embedding(N, K, embedding.padding_idx, config, weight.dtype)
        if weight.is_meta:
            self._set_empty("meta")
        else:
            self._quantize(weight)
        return self.train(embedding.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices: int64 or int32 [...], in [0, num_embeddings) -> [..., embedding_dim], dtype."""
        if is_compiling():
            return ops.embedding_4bit(indices, self._w4(True), self.dtype)
        try:
            return ops.embedding_4bit(indices, self._w4(False), self.dtype)
        except Exception:
            check_input(type(self).__name__, indices=indices)
            raise

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return f"{text}, {self._describe()}"
