"""torchtune's LoRA models with the layers' weights in 4 bits, instead of torchao's NF4Tensor.

    PYTHONPATH=examples/trainers tune run lora_finetune_single_device \\
        --config examples/trainers/torchtune.yaml checkpointer.checkpoint_dir=... ...

The recipe is torchtune's own. Only the model of its config is ours: `lora_in_4bit` with the name of
torchtune's builder. Needs torchtune 0.6.1 and the torchao that it imports (0.10). It ran on a CPU;
no GPU was tried.
"""

import torch
from torch import nn
from torchtune.config._utils import _get_component_from_path
from torchtune.modules.peft import LoRALinear

from qlora_ext import QuantConfig, dequantize_4bit, lora_linear_4bit
from qlora_ext.nn import Linear4bit


class Layer(Linear4bit):
    """Packs the weight that it loads, and saves it dense, under the same name: torchtune merges
    adapters in the state dict."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = dequantize_4bit(self.quantized)
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class LoraLayer(Layer):
    """torchtune's LoRALinear, with the same names."""

    def __init__(self, layer: LoRALinear, config: QuantConfig):
        super().__init__(layer.in_dim, layer.out_dim, layer.use_bias, config=config)
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b
        self.scaling = layer.alpha / layer.rank
        self.dropout = getattr(layer.dropout, "p", 0.0)
        self.disabled = False

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disabled:
            return super().forward(x)
        A, B = self.lora_a.weight, self.lora_b.weight
        dropout = self.dropout if self.training else 0.0
        return lora_linear_4bit(x, self.quantized, A, B, self.scaling, self.bias, dropout)


def lora_in_4bit(
    builder: str, quant_type: str = "nf4", blocksize: int = 64, **settings
) -> nn.Module:
    """The model that a builder of torchtune gives for these settings, for example
    torchtune.models.llama3_2.lora_llama3_2_1b, with the linear layers of its blocks in 4 bits.
    The embeddings and the output projection stay dense."""
    model = _get_component_from_path(builder)(**settings)
    config = QuantConfig(quant_type=quant_type, blocksize=blocksize)
    for parent in list(model.layers.modules()):
        if hasattr(parent, "adapter_params"):  # replaced as a whole, or another kind of adapter
            continue
        for name, layer in list(parent.named_children()):
            if type(layer) is LoRALinear:
                setattr(parent, name, LoraLayer(layer, config))
            elif type(layer) is nn.Linear:
                N, K = layer.weight.shape
                setattr(parent, name, Layer(K, N, layer.bias is not None, config=config))
    return model
