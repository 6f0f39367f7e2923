"""Names of layers by architecture: the one table of model families."""

from __future__ import annotations

import dataclasses

# Names of layers whose output is the outputs of several layers, concatenated (Phi-3, GPT-2, Mamba,
# ModernBERT and others). query_key_value is not here, because models split it head by head.
FUSED = frozenset(
    ("qkv_proj", "gate_up_proj", "c_attn", "in_proj", "Wqkv", "W_pack", "Wi", "qkv", "up_gate_proj")
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of an architecture's layers, as ends of their dotted paths.

    If one layer computes query, key and value, `fused` names it and those three are empty.
    """

    projection: tuple[str, ...]  # attention output
    mlp: tuple[str, ...]
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    fused: str | None = None


_QKV = {"query": ("q_proj",), "key": ("k_proj",), "value": ("v_proj",)}
LLAMA = Family(("o_proj",), ("gate_proj", "up_proj", "down_proj"), **_QKV)
PHI = Family(("self_attn.dense",), ("fc1", "fc2"), **_QKV)
PHI3 = Family(("o_proj",), ("gate_up_proj", "down_proj"), fused="qkv_proj")
GPT2 = Family(("attn.c_proj",), ("mlp.c_fc", "mlp.c_proj"), fused="c_attn")
GPT_NEOX = Family(("attention.dense",), ("dense_h_to_4h", "dense_4h_to_h"), fused="query_key_value")
OPT = Family(("out_proj",), ("fc1", "fc2"), **_QKV)
BLOOM = Family(
    ("self_attention.dense",), ("dense_h_to_4h", "dense_4h_to_h"), fused="query_key_value"
)
STARCODER2 = Family(("o_proj",), ("mlp.c_fc", "mlp.c_proj"), **_QKV)
NEMOTRON = Family(("o_proj",), ("up_proj", "down_proj"), **_QKV)
T5 = Family(("o",), ("wi", "wi_0", "wi_1", "wo"), query=("q",), key=("k",), value=("v",))

# config.model_type -> family. A new architecture needs one line here. LoraConfig.to_peft() uses all
# names if it gets no model, so none may be the end of a name that a family has for another switch.
FAMILIES = {
    **dict.fromkeys(["llama", "mistral", "ministral", "mixtral", "smollm3", "stablelm"], LLAMA),
    **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite", "cohere"], LLAMA),
    **dict.fromkeys(["gemma", "gemma2", "gemma3", "gemma3_text", "cohere2"], LLAMA),
    **dict.fromkeys(["olmo", "olmo2", "olmo3", "olmoe"], LLAMA),
    **dict.fromkeys(["gpt_oss", "granitemoe", "ernie4_5_moe"], LLAMA),
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "bloom": BLOOM,
    "falcon": BLOOM,
    "starcoder2": STARCODER2,
    "nemotron": NEMOTRON,
    **dict.fromkeys(["t5", "mt5", "umt5"], T5),
}

# Names of layers with one parent that read the same input.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and its kin, Phi, OPT, StarCoder2, Nemotron
    ("q", "k", "v"),  # T5
    ("query", "key", "value"),  # BERT
    ("gate_proj", "up_proj"),  # Llama and its kin
    ("wi_0", "wi_1"),  # T5
)
