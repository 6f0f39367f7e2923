"""Checks a model's config.json before transformers builds anything from it.

transformers checks the types of most values but few of their sizes. It would make as many layers as
the file says, or download code that the file names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import torch

from .. import hosts
from ..files import SafetensorsFiles, read_json, reading
from ..tensor.config import QuantConfig, check_format_version
from ..text import CheckpointError, printable, shorten

# Names of layer counts and other sizes in the configs of transformers' architectures.
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
_LIMITS = re.compile(r"(^|_)(limit|max|min|clip|clamp|cap)(_|$)")
# Counts for which transformers makes modules or list entries. `-1` may mean the last layer.
_LAYERS = re.compile(r"layers?$|blocks?$|depths?$")
# For each expert of each layer, and for each label, transformers makes some kilobytes of objects
# before it reads a weight. Up to _MAX_OBJECTS are allowed without proof. For more, the files must
# hold enough weights: at least _EXPERT_WEIGHTS for an expert, _LABEL_WEIGHTS (a head's row) for a
# label.
_MAX_OBJECTS = 2**18
_EXPERT_WEIGHTS = 1024
_LABEL_WEIGHTS = 64
_USUAL_LAYERS = 32  # assumed if the file does not say
# The limit if the files are not known; the deepest language models have 126 layers. If they are,
# the limit is their number of tensors, or _SURELY_LAYERS if that is more.
_MAX_LAYERS = 1024
_SURELY_LAYERS = 256
_MAX_NAMES = 10_000  # names of layers to leave unpacked
_NAME_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")


def read_raw_config(folder: Path, files: SafetensorsFiles | None = None) -> dict:
    """The JSON object in a folder's config.json.

    Args:
        files: the folder's files, whose tensors limit the numbers of layers, experts and labels;
            None if they are not known.

    Raises:
        CheckpointError: a value has the wrong type, is out of range, or names code to run. The
            error names the file and the key.
    """
    path = folder / "config.json"
    raw = read_json(path)
    check_config(path, raw, files)
    return raw


def check_config(
    path: Path, raw: dict, files: SafetensorsFiles | None = None, within: str = ""
) -> None:
    """Raises CheckpointError unless transformers may be given `raw`, the object in `path`."""

    def refuse(key: str, want: str):
        name = printable(f"{within}{key}")
        raise CheckpointError(f"{path}: {name} is {shorten(raw[key])}, want {want}")

    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path} brings model code of its own (auto_map), which is never run here; want a "
            "model whose architecture is in transformers"
        )
    _check_numbers(path, raw, within)
    layers = [n for key, n in raw.items() if _counts_layers(key) and type(n) is int and n > 0]
    layers = max(layers, default=_USUAL_LAYERS)
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
            # A name with a slash is a kernel on the hub, whose code transformers would run.
            names = value.values() if isinstance(value, dict) else [value]
            if any(n is not None and (not isinstance(n, str) or "/" in n) for n in names):
                refuse(key, "the name of an implementation in transformers")
        elif key.endswith("_config") and value is not None and not isinstance(value, dict):
            refuse(key, "an object")
        elif isinstance(value, int) and not isinstance(value, bool):
            _check_count(key, value, layers, files, refuse)
        elif isinstance(value, dict) and key.endswith("config"):
            check_config(path, value, files, f"{within}{key}.")


def _is_float_dtype(name: object) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _check_numbers(path: Path, raw: dict, within: str) -> None:
    """Raises CheckpointError for a NaN or an infinity. Lists, and limits (judged by their names),
    may hold infinities, because an interval may have no end (Mamba's `time_step_limit`)."""
    for key, value in raw.items():
        number = value
        if isinstance(value, dict) and value.get("__float__") in ("NaN", "Infinity", "-Infinity"):
            number = float(value["__float__"])  # transformers' own spelling
        if isinstance(number, float) and not math.isfinite(number):
            if math.isnan(number) or not _LIMITS.search(key):
                name = printable(f"{within}{key}")
                raise CheckpointError(f"{path}: {name} is {number}, want a finite number")
        elif isinstance(value, dict) and not key.endswith("config"):  # check_config does configs
            _check_numbers(path, value, f"{within}{key}.")


def _check_count(key: str, value: int, layers: int, files, refuse) -> None:
    if key in _SIZES and value < 1:
        refuse(key, "1 or more")
    if key in _SIZES and value > _MAX_SIZE:
        refuse(key, f"at most {_MAX_SIZE:,}")
    if key == "num_labels":
        _check_objects(key, value, 1, _LABEL_WEIGHTS, files, refuse)
    if key.endswith("experts"):
        _check_objects(key, value, layers, _EXPERT_WEIGHTS, files, refuse)
    if _counts_layers(key):
        if files is None and value > _MAX_LAYERS:
            refuse(key, f"at most {_MAX_LAYERS:,}")
        if files is not None and value > max(len(files), _SURELY_LAYERS):
            refuse(key, f"no more than the {len(files):,} tensors in the folder's files")


def _counts_layers(key: str) -> bool:
    return key == "n_layer" or _LAYERS.search(key) is not None


def _check_objects(key: str, value: int, times: int, weights: int, files, refuse) -> None:
    """Refuses too many experts or labels. Each is made `times` times and has at least `weights`
    weights."""
    held = 0 if files is None else files.total_numel
    most = max(_MAX_OBJECTS, held // weights) // times
    if value > most:
        of = f" in {times:,} layers" if times > 1 else ""
        with_files = "" if files is None else f" with the {held:,} weights in the folder's files"
        refuse(key, f"at most {most:,}{of}{with_files}")


def _check_method(path: Path, value: dict) -> None:
    """Raises CheckpointError for an unknown method, or for bad settings of our own method."""
    by_bits = value.get("load_in_4bit") or value.get("load_in_8bit")  # old files of bitsandbytes
    method = value.get("quant_method", "bitsandbytes" if by_bits else None)
    if method == "qlora_ext":
        with reading(f"{path}: quantization_config"):
            check_settings(value)
    elif method != "bitsandbytes" and not (
        isinstance(method, str) and hosts.knows_quant_method(method)
    ):
        # transformers would read packed bytes as if they were weights.
        raise CheckpointError(
            f"{path}: quant_method is {shorten(method)}, want qlora_ext, bitsandbytes or another "
            "that transformers knows"
        )


def check_settings(stored: dict) -> None:
    """Checks a quantization_config of ours. Raises ValueError for a setting that is unknown or out
    of range, TypeError for one of the wrong type."""
    known = {field.name for field in dataclasses.fields(QuantConfig)}
    own = {"quant_method", "checkpoint_format", "format_version", *_NAME_LISTS[:1]}
    check_format_version(stored.get("format_version"))  # a newer format may have other settings
    if unknown := sorted(stored.keys() - known - own):
        raise ValueError(f"got unknown settings {unknown}, want only {sorted(known | own)}")
    QuantConfig(**{key: value for key, value in stored.items() if key in known})


def _check_quantization(path: Path, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: quantization_config is {shorten(value)}, want an object with quant_method"
        )
    for key in _NAME_LISTS:
        names = value.get(key)
        if isinstance(names, list) and len(names) > _MAX_NAMES:
            raise CheckpointError(
                f"{path}: quantization_config.{key} has {len(names):,} names, want at most "
                f"{_MAX_NAMES:,}"
            )
    _check_method(path, value)
