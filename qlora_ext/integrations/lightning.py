"""Precision plug-ins for Lightning: Fabric and Trainer run a model with 4-bit linear layers.

Import this module yourself; unlike the other plug-ins it attaches to nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable

import torch
from lightning_utilities import apply_to_collection
from torch import nn

from ..models.plan import is_factor
from ..models.quantize import quantize_model
from ..models.walk import stacked_names
from ..nn.linear import Linear4bit
from ..nn.packed import _Packed4bit
from ..tensor.config import QuantConfig

try:
    from lightning.fabric.plugins import Precision as _FabricPrecision
    from lightning.pytorch.plugins import Precision as _TrainerPrecision
except ImportError:  # the two packages that `lightning` combines
    from lightning_fabric.plugins import Precision as _FabricPrecision
    from pytorch_lightning.plugins import Precision as _TrainerPrecision

_NAMES = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-true",
    torch.float16: "16-true",
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _linear_class(config: QuantConfig):
    """Inside the context torch.nn.Linear makes a Linear4bit."""
    dense = torch.nn.Linear

    class Linear(Linear4bit):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__(
                in_features, out_features, bias, config=config, device=device, dtype=dtype
            )
            if type(self) is Linear:
                self.__class__ = Linear4bit  # so that it can be pickled

    torch.nn.Linear = Linear
    try:
        yield
    finally:
        torch.nn.Linear = dense


class Precision4bit:
    """What both plug-ins share. Everything but the packed weights has `dtype`, as with Lightning's
    "bf16-true"; floating-point inputs are cast to it, and outputs to torch's default dtype.

    A model that is built under `fabric.init_module()` (Trainer: in `configure_model`) gets a
    Linear4bit for every torch.nn.Linear, heads included, and packs its checkpoint when it loads
    it. A model that has no packed layer when it is set up is packed by quantize_model, which leaves
    heads and adapters dense. Make the optimizer after that.

    Args:
        config: a QuantConfig; None is NF4 with blocks of 64, double-quantized.
        dtype: torch.bfloat16, float16 or float32.
        modules_to_not_convert: as in quantize_model. With it `init_module` raises an error, because
            layers have no names yet while a model is built.

    Raises:
        TypeError: config is not a QuantConfig, or dtype is another dtype.
    """

    def __init__(
        self,
        config: QuantConfig | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        modules_to_not_convert: Iterable[str] | None = None,
    ):
        name = type(self).__name__
        if config is not None and not isinstance(config, QuantConfig):
            raise TypeError(f"{name}: config is a {type(config).__name__}, want a QuantConfig")
        if dtype not in _NAMES:
            raise TypeError(f"{name}: dtype is {dtype}, want float32, float16 or bfloat16")
        self.config = config or QuantConfig()
        self.dtype = dtype
        self.precision = _NAMES[dtype]
        self.modules_to_not_convert = modules_to_not_convert
        self._built = False  # whether init_module was entered

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Packs module in place, unless it has packed layers, and casts the rest to dtype. Raises
        as quantize_model does."""
        if any(isinstance(part, _Packed4bit) for part in module.modules()):
            self._warn_of_dense(module)
        else:
            quantize_model(
                module,
                self.config,
                modules_to_not_convert=self.modules_to_not_convert,
                progress_bar=False,
            )
        return module.to(self.dtype)

    def _warn_of_dense(self, module: nn.Module) -> None:
        """Warns about linear layers that were made under init_module but are dense, because their
        code imported torch's class under another name."""
        if not self._built or any(hasattr(m, "quantization_report") for m in module.modules()):
            return
        dense = [
            name
            for name, part in module.named_modules()
            if isinstance(part, (nn.Linear, nn.MultiheadAttention))
            and not isinstance(part, _Packed4bit)
            and not is_factor(name)
        ]
        if dense:
            warnings.warn(
                f"{type(self).__name__}: {', '.join(stacked_names(dense)[:8])} stay dense, because "
                "init_module replaces the name torch.nn.Linear only, and their code does not use "
                "it; to pack nn.Linear layers, build the model outside init_module",
                stacklevel=3,
            )

    def module_init_context(self):
        """A context in which torch.nn.Linear makes packed layers, and tensors have dtype."""
        if self.modules_to_not_convert:
            raise RuntimeError(
                f"{type(self).__name__}: init_module cannot leave the layers of "
                f"modules_to_not_convert={self.modules_to_not_convert} dense, because layers have "
                "no names while they are made; build the model outside init_module"
            )
        self._built = True
        stack = contextlib.ExitStack()
        stack.enter_context(_default_dtype(self.dtype))
        stack.enter_context(_linear_class(self.config))
        return stack

    def tensor_init_context(self):
        return _default_dtype(self.dtype)

    def forward_context(self):
        return _default_dtype(self.dtype)

    def convert_input(self, data):
        return _cast(data, self.dtype)

    def convert_output(self, data):
        return _cast(data, torch.get_default_dtype())


def _cast(data, dtype: torch.dtype):
    def cast(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return apply_to_collection(data, torch.Tensor, cast)


class FabricPrecision4bit(Precision4bit, _FabricPrecision):
    """For `lightning.Fabric(plugins=FabricPrecision4bit())`. See Precision4bit."""


class TrainerPrecision4bit(Precision4bit, _TrainerPrecision):
    """For `lightning.Trainer(plugins=TrainerPrecision4bit())`. See Precision4bit.

    Trainer loads a checkpoint before it sets the model up. To resume from one, build the model in
    `configure_model`, or pack it with quantize_model before `fit`.
    """
