"""PEFT's `target_parameters` on a mixture's packed experts, through our grouped product.

PEFT wraps a module once for each parameter that it adapts, and looks only at a module's own
parameters. `named_stacks` shows it the stacks of an `Experts4bit` as such; the keys, the shapes and
the outputs of the adapters are then those of the dense experts. PEFT itself adds B A to the whole
dense stack in each forward. Our wrappers pass A and B to the experts instead.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn

from ...nn.dense import dense_experts, merged_stack
from ...nn.expert_offload import check_not_in_host
from ...nn.experts import Experts4bit
from ...nn.linear import _share
from ...nn.offload import device_of
from ...nn.stack import Adapter, Stack4bit
from ...tensor.functions import dequantize_4bit
from .lora import _FiniteScales
from .stand_in import (
    _adapters_to_merge,
    _check_finite,
    _innermost,
    _merge_to_4bit,
    _packed_base,
    _warn_of_requantizing,
    unmerge,
)
from .versions import adapted_layer

# The values of init_lora_weights that need no dense weight. On dense experts PEFT itself fails with
# the others. "eva" acts on the linear layers of the same model.
_STARTS = ("gaussian", "eva")


def _stand_in(stack: Stack4bit) -> nn.Parameter:
    """What PEFT sees in place of a packed stack: the dense one's shape, dtype and device, without
    memory. Its values are NaN, so nothing can take them for weights."""
    with torch.inference_mode(False):
        value = torch.full((), math.nan, dtype=stack.dtype, device=device_of(stack))
        shape = torch.Size(stack._shape)
        if stack.is_transposed:
            shape = torch.Size((shape[0], shape[2], shape[1]))
        return nn.Parameter(value.expand(shape), requires_grad=False)


@contextlib.contextmanager
def named_stacks(model: nn.Module) -> Iterator[None]:
    """A context in which the packed experts of model have parameters of the dense class's names."""
    added = []
    try:
        for experts in model.modules():
            for name, stack in experts.stacks().items() if isinstance(experts, Experts4bit) else ():
                if name not in experts._parameters:
                    experts._parameters[name] = _stand_in(stack)
                    added.append((experts, name))
        yield
    finally:
        for experts, name in added:
            experts._parameters.pop(name, None)


def with_named_stacks(original):
    """Wraps PEFT's function that turns names of layers into those of parameters, for models whose
    experts transformers has fused."""

    @functools.wraps(original)
    def convert_peft_config_for_transformers(peft_config, model, *args, **kwargs):
        with named_stacks(model):
            return original(peft_config, model, *args, **kwargs)

    return convert_peft_config_for_transformers


def check_biases(bias: str | None, model: nn.Module) -> None:
    """Raises ValueError for bias="all" on experts with biases: PEFT would store them under names
    that the dense model does not have."""
    for name, module in model.named_modules() if bias == "all" else ():
        if isinstance(module, Stack4bit) and module._parameters["bias"] is not None:
            raise ValueError(
                f"PEFT's bias='all' would train {name}.bias, the biases of packed experts, which "
                "PEFT cannot store in an adapter's file, want bias='none'"
            )


class ParamWrapper(_FiniteScales, PeftParamWrapper):
    """PEFT's LoRA on one stack of an `Experts4bit`. PEFT asks for the class by this name.

    While adapters are merged, experts of the dense class stand in for the packed ones.
    """

    def __init__(self, base_layer, adapter_name: str, config, **kwargs):
        self._name = adapted_layer.get()  # the parameter's full name
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def stack(self) -> Stack4bit | None:
        """The packed stack, or None if dense experts stand in for it."""
        base = self.get_base_layer()
        return base.stacks()[self.parameter_name] if isinstance(base, Experts4bit) else None

    def get_param(self) -> nn.Parameter:
        """A parameter like the dense stack. It has values only while adapters are merged."""
        stack = self.stack
        return super().get_param() if stack is None else _stand_in(stack)

    @property
    def weight(self) -> nn.Parameter:
        return self.get_param()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **kwargs) -> None:
        """As PEFT's. Raises ValueError for settings that its `ParamWrapper` refuses in the first
        adapter, and for values of init_lora_weights that need the dense weight."""
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower() not in _STARTS:
            raise ValueError(
                f"LoraConfig: init_lora_weights={start!r} needs the weights of {self._name}, which "
                "are packed, want True, False or 'gaussian'. For LoftQ, call "
                "peft.replace_lora_weights_loftq after that"
            )
        for setting in ("lora_bias", "fan_in_fan_out", "use_dora", "velora_config", "kasa_config"):
            if getattr(config, setting, None):
                raise ValueError(
                    f"PEFT's target_parameters on {self._name} does not work with {setting}; leave "
                    "it out of LoraConfig"
                )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """As PEFT's, but the adapter keeps its dtype, unless `_cast_adapters` asks for another."""
        stack = self.stack
        dtype = getattr(stack, "compute_dtype", None)
        device = device_of(stack) if stack is not None else self.get_param().device
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and not factors[adapter_name].weight.is_meta:
                factors[adapter_name] = factors[adapter_name].to(device, dtype)

    def _stacked(self, names: list[str], chosen: torch.Tensor | None = None) -> Adapter:
        """Several adapters as one: A [E, sum of r, K], B [E, N, sum of r], and the scaling.

        chosen: indices of experts, some perhaps out of range. B of the others may be left unset.
        """
        E = self.num_experts
        if chosen is None or len(names) > 1 or not _is_cheaper_apart(chosen, E):
            chosen = None
        pairs = []
        for name in names:
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            pairs.append((A.reshape(E, -1, A.shape[1]), _turned(B, E, chosen), self.scaling[name]))
        if len(pairs) == 1:
            return pairs[0]
        lora_A = torch.cat([A for A, _, _ in pairs], dim=1)
        return lora_A, torch.cat([B * scaling for _, B, scaling in pairs], dim=2), 1.0

    def get_delta_weight(self, adapter_name: str, *args, **kwargs) -> torch.Tensor:
        """scaling B A of all experts, in the shape and the dtype of the dense stack."""
        A, B, scaling = self._stacked([adapter_name])
        delta, param = (B @ A) * scaling, self.get_param()
        delta = delta.mT if getattr(self.get_base_layer(), "is_transposed", False) else delta
        return delta.to(param.device, param.dtype)

    def forward(
        self, x: torch.Tensor, *args: Any, adapters: dict[str, Adapter] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The experts with the active adapters. `adapters`: those of the wrappers around this."""
        if not isinstance(self.get_base_layer(), Experts4bit):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:  # into 4 bits
            self.unmerge()
        adapters = dict(adapters or {})
        names = [name for name in self.active_adapters if name in self.lora_A]
        if names and not self.disable_adapters and not self.merged:
            chosen = args[0] if args else kwargs.get("top_k_index")
            adapters[self.parameter_name] = self._stacked(names, chosen)
        return self.base_layer(x, *args, adapters=adapters, **kwargs)

    # Merging --------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into dense experts that stand in for the packed ones until `unmerge`.

        Args:
            safe_merge: has no effect, because values that are not finite are always refused.
            adapter_names: None means the active adapters.

        Raises:
            ValueError: a merged value is not finite or overflows the dtype, or the experts are
                sharded or offloaded. They then stay as they were.
        """
        names = _adapters_to_merge(self, adapter_names, self.r)
        if not names:
            return
        # Merge all at once into the packed weight, so that it is rounded once.
        A, B, scaling = self._stacked(self.merged_adapters + names)
        stack = _packed_base(self).stacks()[self.parameter_name]
        sums = functools.partial(merged_stack, stack.quantized, (A, B, float(scaling)))
        weight = sums(stack.dtype)
        _check_finite(self._name, weight, names, stack.dtype, lambda: sums(torch.float32))
        self._swap_in(weight)
        self.merged_adapters.extend(names)

    def _swap_in(self, weight: torch.Tensor) -> None:
        """Puts experts with this stack [E, N, K] in the packed ones' place: of the dense class, or
        packed within merging_to_4bit()."""
        holder, packed, name = _innermost(self), _packed_base(self), self.parameter_name
        current = holder.base_layer
        if _merge_to_4bit.get():
            check_not_in_host("merge", self._name, packed.stacks()[name])
            _warn_of_requantizing()
            if not isinstance(current, Experts4bit):
                raise ValueError(
                    f"merge: {self._name}: adapters of the same experts are merged into 16 bits; "
                    "call unmerge_adapter() before merging into 4 bits"
                )
            old = packed.stacks()[name]
            bias = old._parameters["bias"]
            new = _with_stack(current, name, Stack4bit.from_dense(weight, bias, old.config))
        elif isinstance(current, Experts4bit):
            new = dense_experts(current, weight.dtype, {name: weight}).requires_grad_(False)
            new = new.to(device_of(packed.stacks()[name]))  # of experts in host memory, too
        else:
            new, parameter = current, getattr(current, name)
            parameter.data = _in_class_order(packed, weight).to(parameter.device)
        # In a list, so that it is not a submodule.
        holder.__dict__.setdefault("_qlora_ext_packed", [packed])
        holder.__dict__.setdefault("_qlora_ext_merged", set()).add(name)
        holder.base_layer = new

    def unmerge(self) -> None:
        """Puts the packed stack back, with its bytes, once no other stack of the experts is merged.

        Raises:
            ValueError: the experts were sharded while adapters were merged. They stay as they were.
        """
        unmerge(self, ParamWrapper._restore_stack)

    def _restore_stack(self) -> None:
        holder, packed, name = _innermost(self), _packed_base(self), self.parameter_name
        current, stack = holder.base_layer, packed.stacks()[name]
        merged = holder.__dict__["_qlora_ext_merged"]
        merged.discard(name)
        if isinstance(current, Experts4bit):
            device, dtype = current.stacks()[name].weight.device, current.stacks()[name].dtype
        else:
            parameter = getattr(current, name)
            device, dtype = parameter.device, parameter.dtype
        if not merged:
            del holder.__dict__["_qlora_ext_packed"], holder.__dict__["_qlora_ext_merged"]
            packed = packed.to(device)  # the model may have been moved or cast meanwhile
            packed = packed if dtype == stack.dtype else packed.to(dtype)
            holder.base_layer = packed.train(current.training)
        elif isinstance(current, Experts4bit):
            holder.base_layer = _with_stack(current, name, stack.to(device))
        else:
            weight = dequantize_4bit(stack.quantized, dtype).to(device)
            parameter.data = _in_class_order(packed, weight)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts without the wrappers, merged or not."""
        layer = self
        while isinstance(layer, PeftParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


def _is_cheaper_apart(chosen: torch.Tensor, E: int) -> bool:
    """Whether turning B of the chosen experts takes less time than turning all of it. No gradient
    goes through the former, and a GPU turns all in a few microseconds."""
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_plain and chosen.device.type == "cpu" and 4 * chosen.numel() <= E


def _turned(B: torch.Tensor, E: int, chosen: torch.Tensor | None) -> torch.Tensor:
    """B [E, N, r] from PEFT's [N, r E]; of the chosen experts only, if given.

    No copy is kept for the next call: PEFT writes to .data, which torch does not count.
    """
    N, columns = len(B), B.reshape(-1, E)
    if chosen is None:  # takes a quarter of the time of B.permute(2, 0, 1)
        return columns.T.contiguous().view(E, N, -1)
    chosen = chosen.reshape(-1).clamp(0, E - 1).long()
    turned = B.new_empty(E, len(columns))  # the product does not read the other experts'
    turned.index_copy_(0, chosen, columns.index_select(1, chosen).T.contiguous())
    return turned.view(E, N, -1)


def _in_class_order(experts: Experts4bit, weight: torch.Tensor) -> torch.Tensor:
    """A stack [E, N, K] as the dense class stores it."""
    return weight.mT.contiguous() if experts.is_transposed else weight


def _with_stack(experts: Experts4bit, name: str, stack: Stack4bit) -> Experts4bit:
    """Experts that share everything with these but one stack."""
    new = Experts4bit.__new__(Experts4bit)
    _share(experts, new)
    stack.is_transposed = experts.is_transposed
    setattr(new, "down" if name == "down_proj" else "up", stack)
    return new
