"""from_pretrained and save_pretrained for 4-bit models, in our format and in bitsandbytes'."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from ...files import SafetensorsFiles, reading, safetensors_files
from ...nn.embedding import Embedding4bit
from ...nn.experts import Experts4bit
from ...nn.linear import Linear4bit
from ...nn.offload import check_in_memory
from .bitsandbytes_format import skip_modules
from .building import build, check_complete, loading, read_config, stored_method, unquantized
from .config import CHECKPOINT_FORMATS, QUANT_METHOD, QLoraExtConfig
from .quantizer import QLoraExtHfQuantizer


def from_pretrained(path: str | Path, *, model_class: Any = None, **kwargs: Any):
    """Loads a 4-bit model that we saved, or that transformers and bitsandbytes saved.

    bitsandbytes itself is not needed. Its packed bytes are used unchanged, so the dequantized
    weights are the same bit for bit.

    Args:
        path: folder or hub name.
        model_class: an Auto class or model class; None is AutoModelForCausalLM.
        kwargs: for its from_pretrained (dtype, device_map, ...), or settings of the model's config
            that replace the checkpoint's (num_labels, use_cache, ...).

    Raises:
        TypeError: neither the model's from_pretrained nor its config knows a keyword.
        ValueError: the checkpoint is in neither format or in 8 bits. If the folder's files are
            damaged, hold a NaN or an infinity, or do not describe a model, it is a CheckpointError,
            which names the file.
    """
    hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    hub_kwargs = {key: kwargs[key] for key in (*hub, "trust_remote_code") if key in kwargs}
    config = kwargs.pop("config", None)
    elsewhere = {"subfolder", "variant", "gguf_file"} & kwargs.keys()
    local = os.path.isdir(path) and not elsewhere and not kwargs.get("trust_remote_code")
    files = stored_config = None
    if config is None and local:
        files = SafetensorsFiles(safetensors_files(Path(path)), any_dtype=True)
        # Errors here are the file's fault; those below are the keywords'.
        stored_config = read_config(Path(path), files)
    if config is None:
        # Keep these for the model's from_pretrained; AutoConfig would take them.
        own = ("dtype", "torch_dtype", "quantization_config", "attn_implementation")
        own = {key: kwargs.pop(key) for key in own if key in kwargs}
        config, unused = transformers.AutoConfig.from_pretrained(
            path, return_unused_kwargs=True, **{**kwargs, **hub_kwargs}
        )
        kwargs = {**unused, **own, **hub_kwargs}
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    method = stored_method(config)
    source = f"{Path(path) / 'config.json'}: quantization_config"
    if method == QUANT_METHOD and local:
        with reading(source):
            QLoraExtConfig(**stored)
    if method == "bitsandbytes":
        with reading(source):
            ours = QLoraExtConfig.from_bnb(stored)
        ours.checkpoint_format = "bitsandbytes"
        config.quantization_config = ours.to_dict()
    elif method is None:
        raise ValueError(
            f"from_pretrained: {path} is not quantized, want a 4-bit checkpoint; to pack it, pass "
            "quantization_config=QLoraExtConfig() to transformers' from_pretrained"
        )
    elif method != QUANT_METHOD:
        raise ValueError(
            f"from_pretrained: {path} is quantized by {method}, want qlora_ext or bitsandbytes; "
            "pack the unquantized model with transformers' "
            "from_pretrained(quantization_config=QLoraExtConfig())"
        )
    model_class = model_class or transformers.AutoModelForCausalLM
    want_info = kwargs.pop("output_loading_info", False)
    kwargs["output_loading_info"] = True
    with loading(path, files, stored_config, kwargs) if local else contextlib.nullcontext():
        model, info = model_class.from_pretrained(path, config=config, **kwargs)
        # A class other than the saved one may have a new head, which is not trained yet.
        if type(model).__name__ in (config.architectures or ()):
            check_complete(path, model, info["missing_keys"])
    return (model, info) if want_info else model


def save_pretrained(
    model: torch.nn.Module, path: str | Path, *, format: str = "qlora_ext", **kwargs: Any
) -> None:
    """Saves a 4-bit transformers model in our format or in bitsandbytes'.

    Args:
        model: a model with `Linear4bit` layers.
        path: folder.
        format: 'qlora_ext', or 'bitsandbytes' for stock transformers + bitsandbytes.
        kwargs: for `model.save_pretrained`: max_shard_size, ...

    Raises:
        ValueError: the format is unknown; the model is not packed, or has PEFT's adapters; or
            bitsandbytes lacks its settings (another codebook, one scale for a whole weight, means,
            packed embeddings) or transformers does not pack its layers for bitsandbytes (Falcon's).
    """
    if format not in CHECKPOINT_FORMATS:
        raise ValueError(
            f"save_pretrained: format got {format!r}, want one of {CHECKPOINT_FORMATS}"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QLoraExtHfQuantizer):
        raise ValueError(
            f"save_pretrained: {type(model).__name__} is not quantized by qlora_ext; "
            "save it with its own save_pretrained"
        )
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            "save_pretrained: the model has adapters of PEFT; save them with the PEFT model's "
            "save_pretrained, and pass the result of its unload() here"
        )
    if format == "qlora_ext":
        with _saving(model, format, quantizer.settings):
            model.save_pretrained(path, **kwargs)
        return
    if kwargs.get("state_dict") is not None:
        raise ValueError(
            f"save_pretrained: got a state_dict with format={format!r}, want none: the bytes are "
            "made from the model itself; leave it out, or use format='qlora_ext'"
        )
    check_in_memory("save_pretrained", model, "load it without 'cpu' and 'disk' in device_map")
    theirs = _bitsandbytes_config(model, quantizer.settings)
    if quantizer.saves_as == format:  # it was loaded with a config of theirs
        theirs = quantizer.quantization_config
    with _saving(model, format, theirs):
        model.save_pretrained(path, **kwargs)


@contextlib.contextmanager
def _saving(model, format: str, config: Any):
    """A context in which model.save_pretrained writes this format and config."""
    quantizer = model.hf_quantizer
    before = quantizer.saves_as, model.config.quantization_config
    quantizer.saves_as, model.config.quantization_config = format, config
    try:
        yield
    finally:
        quantizer.saves_as, model.config.quantization_config = before


def _bitsandbytes_config(model, config: QLoraExtConfig) -> dict[str, Any]:
    """The dict that BitsAndBytesConfig would write into config.json for these settings."""
    unknown_there = (
        config.quant_type not in ("nf4", "fp4")
        or config.normalization != "absmax"
        or config.companding != "none"
        or config.blocksize is None
        or any(isinstance(module, (Embedding4bit, Experts4bit)) for module in model.modules())
    )
    if unknown_there:
        raise ValueError(
            "save_pretrained: bitsandbytes has only nf4 and fp4, linear layers, one scale per "
            f"block; the model has {config.to_quant_config()}, want format='qlora_ext'"
        )
    dense = dict(build(unquantized(model.config), model.dtype, type(model)).named_modules())
    for name, module in model.named_modules():
        kind = type(dense.get(name)) if isinstance(module, Linear4bit) else torch.nn.Linear
        if kind not in (torch.nn.Linear, Conv1D):
            raise ValueError(
                f"save_pretrained: {name} is a {kind.__name__} in {type(model).__name__}, which "
                "stock transformers leaves unpacked for bitsandbytes; want format='qlora_ext'"
            )
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_blocksize": config.blocksize,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules(model, config.modules_to_not_convert or []),
        "llm_int8_threshold": 6.0,
    }
