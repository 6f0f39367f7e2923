"""peft_hub.py FOLDER: a cache of huggingface_hub with the models that PEFT's 4-bit tests ask for.

Each has the real one's architecture and random weights, and is small. All have one small tokenizer.
With HF_HUB_CACHE=FOLDER and HF_HUB_OFFLINE=1 the tests load them by their names on the hub.
"""

import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = (Path(__file__).parents[2] / "README.md").read_text()

SMALL = {"vocab_size": 1024, "hidden_size": 64, "num_attention_heads": 4}
OPT = {
    **SMALL,
    "num_hidden_layers": 4,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 512,
    "dropout": 0.0,
}
LLAMA = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 128}
T5 = {
    "vocab_size": 1024,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 1024,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
# 1024: a test multiplies by it.
BLOOM = {"vocab_size": 1024, "hidden_size": 1024, "n_layer": 2, "n_head": 16, "pad_token_id": 1}
NEOX = {**SMALL, "num_hidden_layers": 2, "intermediate_size": 128}
WHISPER = {
    "vocab_size": 1024,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
OPT_125M = {**OPT, "num_hidden_layers": 12}  # a test counts its layers

# name on the hub -> (transformers' names of the classes, settings)
MODELS = {
    "peft-internal-testing/opt-125m": ("OPT", "ForCausalLM", OPT_125M),
    "facebook/opt-125m": ("OPT", "ForCausalLM", OPT),
    "facebook/opt-350m": ("OPT", "ForCausalLM", OPT),
    "facebook/opt-6.7b": ("OPT", "ForCausalLM", OPT),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", "ForCausalLM", OPT),
    "hf-internal-testing/tiny-random-OPTForCausalLM": ("OPT", "ForCausalLM", OPT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("Bloom", "ForCausalLM", BLOOM),
    "bigscience/bloomz-560m": ("Bloom", "ForCausalLM", BLOOM),
    "openai-community/gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "google/flan-t5-base": ("T5", "ForConditionalGeneration", T5),
    "t5-small": ("T5", "ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-t5": ("T5", "ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "ForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoX", "ForCausalLM", NEOX),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", "LMHeadModel", GPT2),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "ForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2", "ForCausalLM", LLAMA),
    "openai/whisper-large": ("Whisper", "ForConditionalGeneration", WHISPER),
}


def tokenizer():
    """Byte pairs of our README, with OPT's special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet
    )
    raw.train_from_iterator([TEXT], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def model(prefix: str, suffix: str, settings: dict):
    """A random model that is about as sure of the next token as a trained one."""
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(0)
    made = getattr(transformers, prefix + suffix)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, module in made.named_modules():
            if name.endswith(("decoder.final_layer_norm", "ln_f", "model.norm")):
                module.weight.mul_(12)
    return made


def snapshot(hub: Path, name: str) -> Path:
    """The folder of a repository's one commit in the cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


def main(hub: Path):
    words = tokenizer()
    for name, (prefix, suffix, settings) in MODELS.items():
        folder = snapshot(hub, name)
        made = model(prefix, suffix, settings)
        made.save_pretrained(folder)
        words.save_pretrained(folder)
        if name == "facebook/opt-350m":  # the one adapter that the tests load
            lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            get_peft_model(made, lora).save_pretrained(snapshot(hub, "ybelkada/test-st-lora"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
