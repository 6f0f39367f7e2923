"""config.json of a model, judged before transformers makes anything of it.

transformers checks the types of most values and few of their sizes: it would make as many layers as
a file says, or download the code that one names.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .checks import CheckpointError, short
from .files import read_json

# Sizes of what is made, by the names that architectures have for them.
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
_SIZES = (
    *LAYER_COUNTS,
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "num_labels"),
    *("num_experts", "num_local_experts"),
    *("n_embd", "n_head", "n_positions", "n_inner", "d_model", "d_ff", "d_kv"),
    *("num_heads", "ffn_dim", "word_embed_proj_dim", "embedding_size"),
)
_MAX_SIZE = 2**32
# What modules or entries of a list are made for, one by one. `-1` may mean the last layer.
_LAYERS = re.compile(r"layers?$|blocks?$|depths?$")
# One module, and one line of a table, are made for each. Switch has 2,048 experts.
_MAX_EXPERTS = 2**12
_MAX_LABELS = 2**16
# The deepest language models have 126 layers; where the weights are at hand, they say.
_MAX_LAYERS = 1024
_SURELY_LAYERS = 256
_MAX_NAMES = 10_000  # of layers that are not to be packed
_NAME_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")


def read_raw_config(folder: Path, tensors: int | None = None) -> dict:
    """The JSON object in a folder's config.json.

    Args:
        tensors: how many the folder's files hold, which bounds the number of layers; None where
            that is not known.

    Raises:
        CheckpointError: naming the file and the key, where a value is of the wrong type, out of
            range, or names code to be run.
    """
    path = folder / "config.json"
    raw = read_json(path)
    check_config(path, raw, tensors)
    return raw


def check_config(path: Path, raw: dict, tensors: int | None = None, within: str = "") -> None:
    """CheckpointError unless `raw`, the object in `path`, may be given to transformers."""

    def refuse(key: str, want: str):
        name = f"{within}{key}"
        raise CheckpointError(f"{path}: {name} is {short(raw[key])}, want {want}")

    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path} brings model code of its own (auto_map), which is not run here; "
            "want an architecture of transformers"
        )
    for key, value in raw.items():
        if key == "model_type":
            if not isinstance(value, str):
                refuse(key, "the name of an architecture")
        elif key == "architectures":
            names = [] if value is None else value
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                refuse(key, "a list of names of model classes")
        elif key in ("dtype", "torch_dtype"):
            if value is not None and not isinstance(value, dict) and not _is_float_dtype(value):
                refuse(key, "the name of a float dtype of torch")
        elif key == "quantization_config":
            _check_quantization(path, value)
        elif key.endswith(("attn_implementation", "experts_implementation")):
            # A name with a slash is a kernel's on the hub, whose code would be run.
            names = value.values() if isinstance(value, dict) else [value]
            if any(n is not None and (not isinstance(n, str) or "/" in n) for n in names):
                refuse(key, "the name of an implementation in transformers")
        elif key.endswith("_config") and value is not None and not isinstance(value, dict):
            refuse(key, "an object")
        elif isinstance(value, int) and not isinstance(value, bool):
            _check_count(key, value, tensors, refuse)
        elif isinstance(value, dict) and key.endswith("config"):
            check_config(path, value, tensors, f"{within}{key}.")


def _is_float_dtype(name: object) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return name == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def _check_count(key: str, value: int, tensors: int | None, refuse) -> None:
    if key in _SIZES and value < 1:
        refuse(key, "1 or more")
    if key in _SIZES and value > _MAX_SIZE:
        refuse(key, f"at most {_MAX_SIZE:,}")
    if key == "num_labels" and value > _MAX_LABELS:
        refuse(key, f"at most {_MAX_LABELS:,}")
    if key.endswith("experts") and value > _MAX_EXPERTS:
        refuse(key, f"at most {_MAX_EXPERTS:,}")
    if key == "n_layer" or _LAYERS.search(key):
        if tensors is None and value > _MAX_LAYERS:
            refuse(key, f"at most {_MAX_LAYERS:,}")
        if tensors is not None and value > max(tensors, _SURELY_LAYERS):
            refuse(key, f"no more than the {tensors:,} tensors in the folder's files")


def _check_quantization(path: Path, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: quantization_config is {short(value)}, want an object with quant_method"
        )
    for key in _NAME_LISTS:
        names = value.get(key)
        if isinstance(names, list) and len(names) > _MAX_NAMES:
            raise CheckpointError(
                f"{path}: quantization_config.{key} has {len(names):,} names, want at most "
                f"{_MAX_NAMES:,}"
            )
