"""Every class of transformers that holds fused experts, built small.

As a program it writes the table of docs/generated/experts.md: `python
tests/support/expert_families.py --write`.
"""

import argparse
import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers

MODELS = Path(transformers.__file__).parent / "models"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "generated" / "experts.md"
EXPERTS, HIDDEN, INNER = 5, 64, 48
DECORATED = re.compile(r"^@use_experts_implementation.*?\nclass (\w+)\(", re.M | re.S)


def classes():
    """(folder of the model, class name) of every class that the decorator marks."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "\n@use_experts_implementation" in text:
            found += [(path.parent.name, name) for name in DECORATED.findall(text)]
    return found


def _small(config):
    """Sets the sizes that an experts class reads, whatever its config calls them."""
    for key, value in list(vars(config).items()):
        if not isinstance(value, (int, list, type(None))):
            continue
        if re.fullmatch(r"(moe_)?hidden_size", key):
            small = HIDDEN
        elif re.search("intermediate_size|ffn_hidden_size", key):
            small = INNER
        elif re.fullmatch(r"(moe_)?(num|n)_(local_|routed_)?experts", key):
            small = EXPERTS
        else:
            continue
        setattr(config, key, [small] * len(value) if isinstance(value, list) else small)
    config._experts_implementation = "eager"
    return config


def build(folder, name):
    """The class of that name with random weights; AssertionError if no config of its model builds
    it."""
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    cls = getattr(modeling, name)
    more = [INNER] if "intermediate_size" in inspect.signature(cls.__init__).parameters else []
    errors = []
    for config_class in vars(modeling).values():
        if not (inspect.isclass(config_class) and config_class.__name__.endswith("Config")):
            continue
        try:
            with torch.device("meta"):
                layer = cls(_small(config_class()), *more)
            assert layer.down_proj.shape[0] == EXPERTS and layer.down_proj.numel() < 10**5
        except Exception as error:
            errors.append(f"{config_class.__name__}: {error!r}")
            continue
        generator = torch.Generator().manual_seed(0)
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        return layer.float()
    raise AssertionError(f"{folder}.{name}: {errors}")


def routed(layer, tokens=11, slots=3):
    """Hidden states, the chosen experts and their weights, for a layer of `build`."""
    generator = torch.Generator().manual_seed(1)
    width = layer.down_proj.shape[2 if layer.is_transposed else 1]
    x = torch.randn(tokens, width, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(tokens)])
    return x, index[:, :slots], torch.rand(tokens, slots, generator=generator)


def _row(folder, name):
    from qlora_ext.nn.experts import is_fused_experts

    layer = build(folder, name)
    notes = {
        "transposed": layer.is_transposed,
        "biases": layer.has_bias,
        "no gate": not layer.has_gate,
        "its own gate": layer._apply_gate.__func__.__name__ != "_default_apply_gate",
        "norm after each expert": getattr(layer, "has_post_expert_norm", False),
    }
    layout = ", ".join(note for note, has in notes.items() if has) or "plain"
    how = "packed" if is_fused_experts(layer) else "left dense"
    return f"| `{folder}` | `{name}` | {layout} | {how} |"


def page():
    rows = [_row(*both) for both in classes()]
    return "\n".join(
        [
            "# Experts of transformers, class by class",
            "",
            f"Every class of transformers {transformers.__version__} that holds its experts in",
            "one parameter per projection. Each is built small, packed, and compared with its own",
            "forward on the dequantized weights (tests/nn/test_expert_families.py). Written by",
            "`python tests/support/expert_families.py --write`.",
            "",
            "| Model | Class | Layout | `quantize_model` |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew docs/generated/experts.md")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
