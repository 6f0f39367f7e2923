"""Tiny models of many architectures, from transformers' own classes with random weights."""

import importlib

import pytest
import torch

from qlora_ext.nn.experts import is_fused_experts

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**COMMON, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 16}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name -> (config class, settings); the causal model class is the auto class's.
FAMILIES = {
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "gemma": ("GemmaConfig", GEMMA),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi": ("PhiConfig", LLAMA),
    "phi3": ("Phi3Config", LLAMA),
    "smollm3": ("SmolLM3Config", LLAMA),
    "starcoder2": ("Starcoder2Config", LLAMA),
    "olmo2": ("Olmo2Config", LLAMA),
    "stablelm": ("StableLmConfig", LLAMA),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    "falcon": ("FalconConfig", {**COMMON, "new_decoder_architecture": False}),
    "mixtral": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 4, "head_dim": 16}),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
}


def make(name, dtype=torch.float32, seed=0, **settings):
    """A tiny model of a family, in eval mode."""
    import transformers

    config_class, defaults = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**defaults, **settings})
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype).eval()


def inputs(model, batch=2, length=9):
    """Keyword arguments of a forward pass."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model):
    """Logits of `inputs`, fp32."""
    return model(**inputs(model)).logits.float()


def generate(model):
    """Five greedy tokens after a prompt."""
    ids = inputs(model, batch=1)["input_ids"]
    return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)


def randomize(model, seed=0, scale=1 / 4):
    """Gives every lora_B values, so that adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def train(model, steps=6, rate=1e-2):
    """A few steps of AdamW on one batch; first and last loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate)
    batch = inputs(model)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


# One class of fused experts for every layout: plain, transposed, with biases and interleaved,
# without gate.
EXPERT_LAYOUTS = {
    "mixtral": ("mixtral", "MixtralExperts", "MixtralConfig", {}),
    "aria": ("aria", "AriaExperts", "AriaTextConfig", {"moe_num_experts": 4}),
    "gpt_oss": ("gpt_oss", "GptOssExperts", "GptOssConfig", {}),
    "nemotron_h": ("nemotron_h", "NemotronHExperts", "NemotronHConfig", {"n_routed_experts": 4}),
}


def experts(layout, dtype=torch.float32, seed=0):
    """A fused-experts module of 4 experts, 64 -> 96 -> 64, with random weights and biases. The test
    is skipped if this transformers keeps them apart."""
    import transformers

    module, experts_class, config_class, settings = EXPERT_LAYOUTS[layout]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
    config = getattr(transformers, config_class)(**{**sizes, "num_local_experts": 4, **settings})
    config._experts_implementation = "eager"
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    layer = getattr(modeling, experts_class)(config)
    if not is_fused_experts(layer):
        pytest.skip(f"{experts_class} holds no fused experts in this release of transformers")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return layer.to(dtype)
