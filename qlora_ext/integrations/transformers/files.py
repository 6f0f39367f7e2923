"""Finds a model's layers in its checkpoint's files, and makes errors that name file and tensor."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ...checks import check_finite, lacks_data, without_mask
from ...files import FLOATS, TORCH_DTYPES, SafetensorsFiles
from ...models.plan import Stored
from ...nn.experts import is_fused_experts, weight_names
from ...nn.linear import is_plain_linear
from ...nn.packed import _PACKED_KEYS
from ...text import CheckpointError
from .versions import saved_key

_ALWAYS = ("weight", "weight_absmax", "weight_codebook")  # every packed layer has these


def _headers(checkpoint_files) -> dict[str, tuple[str, int, Path]]:
    """Key -> (safetensors' name of the dtype, bytes, file) for every tensor of a checkpoint.

    Raises:
        CheckpointError: a safetensors file is damaged. Other files that cannot be read are left to
            transformers' loader, which reports them.
    """
    paths = [Path(file) for file in checkpoint_files or []]
    others = [path for path in paths if path.suffix != ".safetensors"]
    tensors = SafetensorsFiles([path for path in paths if path not in others], any_dtype=True)
    found = {
        key: (dtype, tensors.nbytes(key), tensors.where[key])
        for key, dtype in tensors.stored.items()
    }
    for path in others:
        try:
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception:
            return {}
        for key, tensor in state.items():
            dtype = "U8" if tensor.dtype == torch.uint8 else str(tensor.dtype)
            found[key] = dtype, tensor.nbytes, path
    return found


def check_loaded(model, checkpoint_files) -> None:
    """Checks the dense weights and saved buffers of a model that was just read: norms, biases,
    embeddings, heads. Packed layers check their own statistics.

    Args:
        checkpoint_files: the paths it was read from, or None; for the error.

    Raises:
        CheckpointError: one has a NaN or an infinity, in the file or after the cast to the model's
            dtype. The error names file and tensor. Buffers may hold infinities, for masks.
    """
    buffers = {
        f"{name}.{key}".lstrip("."): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        if tensor.dtype not in FLOATS or lacks_data(tensor):
            continue
        values = local_part(tensor.detach())
        if name in buffers:
            values = without_mask(values)
        check_read(model, name, values, checkpoint_files)


def check_read(model, name: str, values: torch.Tensor, checkpoint_files) -> None:
    """Raises the error of `not_held` if the values of the model's tensor `name` are not finite."""
    try:
        check_finite(name, values, values.dtype)
    except OverflowError as error:
        raise not_held(model, name, values.dtype, error, checkpoint_files) from None


def not_held(model, name: str, dtype: torch.dtype, error, checkpoint_files) -> CheckpointError:
    """The error for a tensor that is not finite in the dtype it was read in. It names file and
    tensor, and says whether another dtype helps or the file itself is damaged.

    Args:
        error: the text to use if the file's tensor is not known.
    """
    files, keys = sources_of(model, name, checkpoint_files)
    for key in keys:
        if files.dtypes.get(key) not in FLOATS:
            continue
        values = files[key]
        is_damaged = not values.isfinite().all()
        try:
            check_finite(key, values, dtype)
        except OverflowError as found:
            stored = values.dtype
            advice = f"it is stored in {stored}: load it with that dtype"
            if is_damaged:
                advice = "the file itself holds that: it is damaged, download or save it again"
            return CheckpointError(f"{files.where[key]}: {found}; {advice}")
    where, key = (f"{files.where[keys[0]]}: ", keys[0]) if keys else ("", name)
    return CheckpointError(f"{where}{str(error).replace(name, key, 1)}")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sources_of(model, name: str, checkpoint_files) -> tuple[SafetensorsFiles, list[str]]:
    """The files of a model, and the names of the stored tensors from which one of its tensors is
    made. There are no names if this cannot be found out."""
    paths = [Path(file) for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
    files = SafetensorsFiles([])
    try:
        files = SafetensorsFiles(paths, any_dtype=True)
        conversions = get_model_conversion_mapping(model, None, None)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        return files, [
            key
            for key in files
            if rename_source_key(key, renamings, converters, prefix, state)[0] == name
        ]
    except Exception:  # the error that is being reported matters more than this one
        return files, []


def file_of(model, name: str, checkpoint_files) -> str:
    """The file that a tensor of a model comes from, or "" if it is not known."""
    files, keys = sources_of(model, name, checkpoint_files)
    return str(files.where[keys[0]]) if keys else ""


def stored_layers(model, checkpoint_files, packed: bool) -> Stored | None:
    """The layers of a model that a checkpoint holds, under their names in the model; None if the
    checkpoint's tensors are not known.

    Args:
        model: the unpacked model, on meta.
        packed: whether the checkpoint's config says that it is packed.

    Raises:
        ValueError: a tensor of a packed layer is not uint8. transformers would cast it.
        CheckpointError: some packed tensors of a layer are there and others are not.
    """
    headers = _headers(checkpoint_files)
    if not headers:
        return None
    ours, all_packed = set(), set()
    if packed:
        owner = {key: key.rpartition(".")[::2] for key in headers}
        ours = {layer for layer, kind in owner.values() if kind in _PACKED_KEYS[1:]}
        for key, (layer, kind) in owner.items():
            if layer in ours and kind in _PACKED_KEYS and headers[key][0] != "U8":
                raise ValueError(
                    f"{key}: dtype got {headers[key][0]}, want U8, packed bytes; the checkpoint "
                    "was changed after it was saved: save the packed model again"
                )
        for key, (layer, kind) in owner.items():
            lacks = [k for k in _ALWAYS if f"{layer}.{k}" not in headers] if layer in ours else []
            if lacks and kind in _PACKED_KEYS:
                raise CheckpointError(
                    f"{headers[key][2]}: {key} is there, but the checkpoint lacks "
                    f"{', '.join(f'{layer}.{k}' for k in lacks)}; it is damaged: save the packed "
                    "model again, or pack the unquantized one"
                )
        theirs = {key.rpartition(".weight.")[0] for key in headers if ".weight." in key}
        alone = {
            key.removesuffix(".weight")
            for key, (dtype, _, _) in headers.items()
            if key.endswith(".weight") and dtype == "U8"
        }
        all_packed = ours | theirs | alone
    sizes: dict[str, int] = {}
    dense, names, unknown = set(), {}, set()
    for key, targets in _targets(model, headers).items():
        stored_as = key.removesuffix(".weight")
        if not targets and key.endswith(".weight"):
            unknown.add(stored_as)
        for target in targets:
            layer = target.removesuffix(".weight")
            if stored_as in all_packed:
                sizes[layer] = headers[key][1]
            else:
                dense.add(layer)
            names[layer] = stored_as
    for name, module in model.named_modules():
        if is_fused_experts(module):
            if _holds_experts(ours, name):
                sizes[name] = 0
        elif name not in sizes and name not in dense and is_plain_linear(module):
            # transformers' renaming does not know the name (`key_mapping`): match by its end.
            ends = [one for one in unknown if _same_end(one, name)]
            if ends and ends[0] in all_packed:
                sizes[name] = headers[f"{ends[0]}.weight"][1]
            elif ends:
                dense.add(name)
    saved = getattr(model.config, "architectures", None) or []
    return Stored(
        packed=sizes,
        dense=frozenset(dense),
        same_class=type(model).__name__ in saved and not unknown,
        names=names,
    )


def storage_dtype(checkpoint_files) -> torch.dtype:
    """The dtype that bitsandbytes' packed bytes are stored in. Without any it is ours, uint8."""
    headers = _headers(checkpoint_files)
    weights = (key.rpartition(".quant_state.")[0] for key in headers)
    stored = {headers[key][0] for key in weights if key in headers}
    name = min(stored, default="U8")
    return TORCH_DTYPES.get(name) or getattr(torch, name.removeprefix("torch."), torch.uint8)


def _same_end(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _targets(model, keys) -> dict[str, list[str]]:
    """Tensor of a checkpoint -> the model's weights that transformers' loader makes from it."""
    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        targets = [name]
        if pattern is not None:  # one tensor may become several
            first, *others = by_pattern[pattern].target_patterns
            targets += [name.replace(first, other, 1) for other in others]
        found[key] = [t for t in targets if t.endswith(".weight") and t in state]
    return found


def checkpoint_names(model) -> list[dict[str, str]]:
    """Mappings of layer -> its name in files, for layers of a transformers model whose names differ
    there. LLaVA's files say `language_model.model` for `model.language_model`. The first mapping is
    for the files that the class writes. A loaded model has a second one, for the file it was read
    from. For other models than transformers' the list is empty."""
    if not isinstance(model, transformers.PreTrainedModel):
        return []
    of_file = getattr(model, "_weight_conversions", None)
    of_class = get_model_conversion_mapping(model, add_legacy=False)
    found = [_saved_names(model, c) for c in (of_class, of_file) if c is not None]
    return [names for names in found if names]


def _saved_names(model, conversions: list) -> dict[str, str]:
    back = []
    for conversion in conversions[::-1]:
        try:
            back.append(conversion.reverse_transform())
        except (ValueError, NotImplementedError):  # it cannot be reversed
            continue
    renamings = [c for c in back if isinstance(c, WeightRenaming)]
    converters = [c for c in back if isinstance(c, WeightConverter)]
    found = {}
    for name, module in model.named_modules():
        if is_plain_linear(module):
            key, pattern = saved_key(f"{name}.weight", renamings, converters)
            if pattern is None and key != f"{name}.weight":
                found[name] = key.removesuffix(".weight")
        elif is_fused_experts(module):
            # A file has one tensor per expert and name: `block_sparse_moe.experts.*.w1.weight`.
            own = f"{name}.{weight_names(module)[0]}"
            key, _ = saved_key(own, renamings, converters)
            stored = key.partition(".*")[0] if ".*" in key else key.rpartition(".")[0]
            if stored != name:
                found[name] = stored
    return found


def _holds_experts(stored: set[str], name: str) -> bool:
    """Whether the `stored` layers include packed experts with the same last part as `name`, in the
    same layer of the model. In a checkpoint the parts before it may differ (Mixtral's
    `block_sparse_moe.experts`)."""
    last = name.rpartition(".")[2]
    for first in (f"{last}.up", f"{last}.packed.0.up"):  # the second: packed expert by expert
        places = (key.removesuffix(first) for key in stored if f".{key}".endswith(f".{first}"))
        if any(_numbers(place) == _numbers(name) for place in places):
            return True
    return False


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]
