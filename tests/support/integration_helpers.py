"""Tiny models and a tokenizer for the integration tests: random weights, seconds to train."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from paths import REPOSITORY


def peft_reads_mixtures() -> bool:
    """Whether this PEFT can read our adapters onto a mixture. Before 0.19.1 it takes a stack for
    its transpose, and 0.19 gives WeightConverter a keyword that transformers 5.17 lacks."""
    import peft
    from transformers.core_model_loading import WeightConverter

    from qlora_ext.integrations.peft.versions import ADAPTS_STACKS

    arguments = inspect.signature(WeightConverter.__init__).parameters
    has = "distributed_operation" in arguments
    return ADAPTS_STACKS and (has or not peft.__version__.startswith("0.19."))


def tiny_llama(path: Path, seed: int = 0, **settings):
    """Writes a random Llama of 4-bit-friendly sizes (K = 64 and 128) and returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Larger than the default, so that logits differ visibly when a layer goes wrong.
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))
    model.save_pretrained(path)
    return path


def tiny_tokenizer(path: Path):
    """Writes a byte-level tokenizer of 256 bytes (the vocabulary of `tiny_llama`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<unk>", "<s>", "</s>", *alphabet][:256]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(path)
    return fast


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids [rows, length], always the same."""
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids() if tokens is None else tokens).logits


def randomize(model, seed: int = 0):
    """Gives every trainable tensor of the adapters values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data += noise.to(parameter.dtype)
    return model


def run_python(code: str, *, without: tuple[str, ...] = (), timeout: int = 240) -> str:
    """Runs code in a fresh interpreter in which the modules `without` cannot be imported.

    Returns its stdout; a failure shows its stderr.
    """
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    result = subprocess.run(
        [sys.executable, "-c", "import sys\n" + hidden + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY / "tests",  # not the checkout: a wheel that is tested must not be hidden
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
