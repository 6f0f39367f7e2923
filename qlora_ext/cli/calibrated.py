"""`qlora-ext merge` with calibration text: the model runs, so it is in memory as a whole."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from ..adapters.files import load_adapter
from ..checks import check_parameters
from ..files import extra_files, read_prefix, reading
from ..integrations.transformers.building import read_config
from ..integrations.transformers.config import QLoraExtConfig
from ..merging.calibration_text import context_length, write_calibration
from ..merging.into_4bit import merge_into_4bit
from ..tensor.config import QuantConfig
from .errors import CliError, as_cli_error
from .stream import saving_config_of

CALIBRATION_TOKENS = 8192  # 5,000 are enough (docs/merging.md)
CALIBRATION_LENGTH = 512  # tokens of each sample
CALIBRATION_BYTES = 2**20  # bytes read from the start of the file: 128 for each token


def merge_calibrated(
    base: Path,
    adapter_folder: Path,
    text: Path | None,
    folder: Path,
    settings: QuantConfig,
    keep: list[str],
    max_shard_bytes: int,
) -> int:
    """Merges into 4 bits with calibration text; see docs/merging.md.

    The model runs, so the whole model is in memory, in 4 bits. Returns the number of tokens used.

    Args:
        text: a file, or None for text that the adapted model writes.
        folder: an empty folder to write to.
        settings, keep: for packing an unquantized base, as in quantize_model.
    """
    from .chat import load_model, load_tokenizer

    tokenizer = load_tokenizer([base] if text else [adapter_folder, base])
    length = min(CALIBRATION_LENGTH, context_length(read_config(base)))
    samples = _samples(tokenizer, text, length) if text else []
    packing = QLoraExtConfig(modules_to_not_convert=keep or None, **settings.to_dict())
    model = load_model(base, packing, "cpu" if not torch.cuda.is_available() else "cuda")
    rows = model.get_input_embeddings().num_embeddings
    largest = max((int(part.max()) for part in samples), default=0)
    if largest >= rows:
        raise CliError(
            f"{base}: its tokenizer gives token {largest} for {text}, but its model has only "
            f"{rows} tokens, want the tokenizer of this model"
        )
    with as_cli_error(ValueError, TypeError, RuntimeError, OSError, OverflowError):
        check_parameters(str(base), model)  # the dtype of config.json may be too narrow
        model = load_adapter(model, adapter_folder)
        with reading(base, "has a model or tokenizer that cannot write text"):
            batches = samples or write_calibration(model, tokenizer)
        model = merge_into_4bit(model, calibration=batches, progress_bar=sys.stderr.isatty())
    with saving_config_of(base):
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    # safetensors makes files that only their owner may read, whatever the umask says.
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)
    for path in extra_files(base):
        shutil.copyfile(path, folder / path.name)
    if text is None and len(tokenizer) <= rows:  # it may be the adapter's tokenizer
        tokenizer.save_pretrained(folder)
    if text is None:
        return sum(int(batch["attention_mask"].sum()) for batch in batches)
    return sum(part.numel() for part in samples)


def _samples(tokenizer, text: Path, length: int) -> list[torch.Tensor]:
    """Token ids of a text file, in samples of at most `length`. Raises CliError if it is empty."""
    words = read_prefix(text, CALIBRATION_BYTES)
    tokenizer.model_max_length = 10**9  # so that it does not warn; samples are cut below
    with reading(tokenizer.name_or_path, "has a tokenizer that fails"):
        ids = tokenizer(words, return_tensors="pt").input_ids[:, :CALIBRATION_TOKENS]
    samples = [part for part in ids.split(length, dim=1) if part.numel()]
    if not samples:
        raise CliError(f"{text} is empty, want a few pages of the kind of text the model is for")
    return samples
