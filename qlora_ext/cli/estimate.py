"""`qlora-ext estimate`: the memory that a training step takes, computed from config.json alone.

The model is built, packed and adapted on the meta device, which has shapes but no memory. The
memory that autograd keeps for the backward pass is counted: a forward pass runs on meta with hooks
that see every saved tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

from ..adapters.add import add_lora
from ..adapters.config import LoraConfig
from ..files import find_folder
from ..integrations.transformers.building import build, build_folder, read_config, unquantized
from ..models.quantize import quantize_model
from ..models.report import memory_report, num_parameters
from ..nn.expert_offload import bytes_on_device
from ..tensor.config import QuantConfig
from ..text import first_line
from .errors import CliError, as_cli_error

# Memory sizes of GPUs, in GiB.
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141)
# Besides torch's tensors: bytes of the CUDA context with its libraries, and the share of memory
# that the allocator cannot use.
CONTEXT = 0.7 * 2**30
SLACK = 0.05


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by part, for one batch size."""

    parts: dict[str, int]
    per_sample: int  # bytes per sample of the parts that grow with the batch
    batch: int
    host: int = 0  # bytes of experts in host memory

    @property
    def total(self) -> int:
        """Bytes of a whole step, including context and allocator slack."""
        return int(sum(self.parts.values()) * (1 + SLACK) + CONTEXT)

    def largest_batch(self, gpu: float) -> int:
        """The largest batch that fits in `gpu` bytes, 0 if none does."""
        fixed = sum(self.parts.values()) - self.per_sample * self.batch
        room = (gpu - CONTEXT) / (1 + SLACK) - fixed
        return max(0, int(room // max(self.per_sample, 1)))


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes that one forward pass of one sample keeps for the backward pass."""

    total: int
    layer: int  # the part of the largest repeated layer
    layers: int  # the number of repeated layers
    layer_input: int  # what checkpointing keeps for each layer
    logits: int  # the logits, and two fp32 gradients of them, which the loss's backward has


class _SavesLikeFlash(torch.autograd.Function):
    """Attention that saves what flash kernels save: q, k, v, the output, and one fp32 per row."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dout):
        raise NotImplementedError("only the forward pass is counted")


def _attention(module, query, key, value, attention_mask=None, **kwargs):
    """transformers' attention interface: [B, heads, S, d] -> [B, S, heads, d]."""
    return _SavesLikeFlash.apply(query, key, value).transpose(1, 2), None


@contextlib.contextmanager
def _counting(model: nn.Module):
    """Yields a dict: storage of each tensor saved for backward -> (bytes, layer that saved it)."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    own |= {b.untyped_storage()._cdata for b in model.buffers()}
    found: dict[int, tuple[int, str | None, object]] = {}
    current: list[str] = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            # Keep the tensor: another could get the address of a freed storage.
            found[storage._cdata] = (storage.nbytes(), current[-1] if current else None, tensor)
        return tensor

    handles = []
    for name, layer in _repeated(model):
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: current.append(name)))
        handles.append(layer.register_forward_hook(lambda *_: current.pop() and None))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of the model's main stack, which gradient checkpointing recomputes."""
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        return []
    # A layer may hold a list of experts, so the stack is the list with the most weights.
    name, stack = max(stacks, key=lambda item: num_parameters(item[1]))
    return [(f"{name}.{i}", layer) for i, layer in enumerate(stack)]


def saved_bytes(model: nn.Module, seq: int) -> Saved:
    """Counts what a forward pass with labels keeps for backward, for one sample of `seq` tokens.

    Raises:
        CliError: the architecture's forward pass does not run on the meta device.
    """
    ids = torch.zeros(1, seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    if not model.config.is_encoder_decoder:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["use_cache"] = False
    if (embedding := model.get_input_embeddings()) is not None:
        # PEFT's and transformers' checkpointing does this too; it puts every layer in the graph.
        embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    try:
        with _counting(model) as found, torch.enable_grad():
            out = model.train()(**inputs)
            logits = out.logits
    except Exception as error:  # an architecture's forward may raise anything
        raise CliError(
            f"the forward pass of {type(model).__name__} does not run on the meta device "
            f"({first_line(error, with_type=True)}), so its activations cannot be counted; measure "
            "a training step instead"
        ) from None
    layers: dict[str, int] = {}
    for nbytes, layer, _ in found.values():
        if layer is not None:
            layers[layer] = layers.get(layer, 0) + nbytes
    hidden = model.config.get_text_config().hidden_size
    return Saved(
        total=sum(nbytes for nbytes, _, _ in found.values()),
        layer=max(layers.values(), default=0),
        layers=len(layers),
        layer_input=seq * hidden * model.dtype.itemsize,
        logits=logits.numel() * (logits.element_size() + 8),
    )


def load(model: str) -> transformers.PreTrainedConfig:
    """The config of a folder, a config.json or a hub name. Only config.json is downloaded."""
    path = Path(model)
    folder = find_folder(str(path.parent) if path.name == "config.json" else model, "config.json")
    config = read_config(folder)
    build_folder(folder, unquantized(config), torch.bfloat16)  # its errors name the key
    return config


def estimate(
    config,
    *,
    seq: int,
    batch: int,
    quant: QuantConfig | None,
    lora: LoraConfig,
    checkpointing: bool,
    dtype: torch.dtype = torch.bfloat16,
    optimizer_bytes: int = 8,
    offload: bool = False,
) -> Estimate:
    """The memory that a training step takes.

    Args:
        config: transformers' config.
        seq, batch: tokens per sample, samples per forward pass.
        quant: how linear layers are packed; None leaves them in dtype.
        lora: the adapter that is trained.
        checkpointing: whether layers are recomputed in the backward pass.
        dtype: of unpacked weights and of activations.
        optimizer_bytes: bytes of optimizer state per trained weight (AdamW: two fp32).
        offload: whether offload_experts keeps packed experts in host memory.
    """
    config = unquantized(config)
    transformers.AttentionInterface.register("qlora_ext_counting", _attention)
    transformers.AttentionMaskInterface.register("qlora_ext_counting", lambda *a, **k: None)
    model = build(config, dtype)
    model.tie_weights()
    # If the class has its own attention code, that is counted as it is.
    with contextlib.suppress(ValueError, AttributeError):
        model.set_attn_implementation("qlora_ext_counting")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with as_cli_error(ValueError):
            if quant is not None:
                quantize_model(model, quant, progress_bar=False)
            base = memory_report(model)
            experts, slots = bytes_on_device(model)
            add_lora(model, lora)
    trained = num_parameters(model, only_trainable=True)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    saved = saved_bytes(model, seq)
    if checkpointing:
        outside = saved.total - saved.layer * saved.layers
        # A layer is recomputed only after the logits' gradients are freed.
        again = max(saved.layer - saved.logits, 0)
        activations = saved.layers * saved.layer_input + again + max(outside, 0)
    else:
        activations = saved.total
    packed = base.parts["4-bit weights"] + base.parts["4-bit statistics"]
    if offload and not experts:
        raise CliError(
            f"--offload-experts: {type(model).__name__} has no packed experts, want a "
            "mixture of experts; leave the option out"
        )
    host = experts if offload else 0
    parts = {
        "4-bit weights and scales": packed - host + (slots if offload else 0),
        "weights that stay dense": base.total - packed,
        "LoRA adapters (fp32)": 4 * trained,
        "their gradients (fp32)": 4 * trained,
        "optimizer": optimizer_bytes * trained,
        "saved for the backward pass": activations * batch,
        "logits and their gradients": saved.logits * batch,
    }
    return Estimate(parts, activations + saved.logits, batch, host)
