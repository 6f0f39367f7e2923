"""Every model class of transformers' auto classes, made small on the meta device."""

import collections
import inspect
import sys

import torch

# A stack of two layers shows what one of eighty does.
STACKS = ("layers", "n_layer", "num_blocks")


def class_names():
    """model type -> the names of its classes, in order."""
    from transformers.models.auto import modeling_auto

    found = collections.defaultdict(set)
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("NAMES"):
            for kind, classes in mapping.items():
                classes = classes if isinstance(classes, (tuple, list)) else [classes]
                found[kind].update(c for c in classes if c)
    return {kind: sorted(found[kind]) for kind in sorted(found)}


def shrink(config, depth=0):
    """Two layers where there are many, in a config and in those inside of it."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, depth + 1)
        elif type(value) is int and value > 2 and key.endswith(STACKS):
            setattr(config, key, 2)
    return config


def build(name):
    """The class with its default config, on meta; None where that cannot be built (a library that
    is not installed, a config without defaults)."""
    import transformers

    cls = getattr(transformers, name, None)
    for make in (lambda: shrink(cls.config_class()), lambda: cls.config_class()):
        try:
            with torch.device("meta"):
                return cls(make()).to("meta", torch.bfloat16).eval()
        except Exception:
            continue
    return None


def _size(config, *names):
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)):
                value = value[0]
            if isinstance(value, int):
                return value
    return None


def inputs(model):
    """Inputs of a usual forward pass, as far as the class's main input tells."""
    floats = {"device": "meta", "dtype": torch.bfloat16}
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    taken = inspect.signature(model.forward).parameters
    given = {}
    kind = model.main_input_name
    if kind == "pixel_values":
        side = _size(model.config, "image_size") or 224
        channels = _size(model.config, "num_channels", "in_channels") or 3
        given[kind] = torch.zeros(1, channels, side, side, **floats)
    elif kind in ("input_values", "input_features"):
        mels = _size(model.config, "num_mel_bins", "feature_size")
        shape = (1, mels or 80, 3000) if kind == "input_features" else (1, 16000)
        given[kind] = torch.zeros(shape, **floats)
    if "input_ids" in taken:
        given["input_ids"] = ids[:, None] if "MultipleChoice" in type(model).__name__ else ids
        if kind == "pixel_values":
            given["attention_mask"] = torch.ones_like(ids)
    if model.config.is_encoder_decoder and "decoder_input_ids" in taken:
        given["decoder_input_ids"] = ids
    if "use_cache" in taken:
        given["use_cache"] = False
    return given


@torch.no_grad()
def runs(model):
    """None if a forward pass on meta works, or what it raises."""
    # As under tracing, transformers then asks no tensor for its values.
    tracing = [m for name, m in list(sys.modules.items()) if name.startswith("transformers.")]
    tracing = [(m, m.__dict__["is_tracing"]) for m in tracing if "is_tracing" in m.__dict__]
    for module, _ in tracing:
        module.is_tracing = lambda *args: True
    try:
        model(**inputs(model))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for module, original in tracing:
            module.is_tracing = original
    return None
