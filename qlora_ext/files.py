"""The files of a checkpoint: which they are, and their tensors read one at a time."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checks import CheckpointError, count, some

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
NOT_COPIED = ("config.json", "README.md", ".gitattributes", "quantize_config.json")
OPEN_FILES = 2  # a module may lie across two shards


def find_folder(name: str) -> Path:
    """The folder of a model or adapter given as a folder or a hub name (then it is downloaded)."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"{name} is no folder, want one with config.json and safetensors files"
        )
    try:
        from huggingface_hub import snapshot_download

        ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]
        return Path(snapshot_download(name, ignore_patterns=ignored))
    except Exception as error:  # many kinds: no such name, no network, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{name} is no folder here, and as a hub name it cannot be had: "
            f"{type(error).__name__}: {reason}"
        ) from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, want a JSON object")
    return value


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files: those its index names, or its only one."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map, want one that names the shards")
        names = sorted(set(weight_map.values()))
        bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if bad:
            raise CheckpointError(f"{index} names {bad[0]!r}, want files of its own folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {count(len(missing), 'shard')} of {len(names)}: {some(missing)}"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS[1:])
    hint = f" (it holds {some(others)}; transformers' save_pretrained writes safetensors)"
    raise CheckpointError(
        f"{folder} has no model.safetensors nor {INDEX}, want a safetensors checkpoint"
        f"{hint if others else ''}"
    )


def open_shard(path: Path):
    """safetensors' handle; a damaged file is one sentence. Reads by pread: a mapped file would
    count as memory of this process."""
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error})") from None


class Files:
    """The tensors of several safetensors files, read on demand."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.handles: OrderedDict[Path, object] = OrderedDict()
        for path in paths:
            handle = open_shard(path)
            names = handle.keys()
            for key in names:
                part = handle.get_slice(key)
                if key in self.where:
                    raise CheckpointError(
                        f"{key} is in {self.where[key]} and in {path}, want it once"
                    )
                if part.get_dtype() not in TORCH_DTYPES:
                    raise CheckpointError(
                        f"{path}: {key} has dtype {part.get_dtype()}, which is unknown"
                    )
                self.where[key] = path
                self.shapes[key] = tuple(part.get_shape())
                self.dtypes[key] = TORCH_DTYPES[part.get_dtype()]

    def nbytes(self, key: str) -> int:
        return self.shapes_numel(key) * self.dtypes[key].itemsize

    def shapes_numel(self, key: str) -> int:
        return torch.Size(self.shapes[key]).numel()

    def slice(self, key: str):
        """safetensors' slice; only what is indexed is read."""
        path = self.where[key]
        if path not in self.handles:
            while len(self.handles) >= OPEN_FILES:
                self.handles.popitem(last=False)
            self.handles[path] = open_shard(path)
        self.handles.move_to_end(path)
        return self.handles[path].get_slice(key)

    def float_dtype(self) -> torch.dtype:
        """The dtype of all float tensors, or float32 where they have several or none."""
        found = {dtype for dtype in self.dtypes.values() if dtype in FLOATS}
        return found.pop() if len(found) == 1 else torch.float32

    def meta(self, key: str) -> torch.Tensor:
        return torch.empty(self.shapes[key], dtype=self.dtypes[key], device="meta")

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, read a few rows at a time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        if not self.shapes[one]:
            return bool((self.slice(one)[...] == self.slice(other)[...]).all())
        rows = self.shapes[one][0]
        step = max(1, 2**22 // max(1, self.shapes_numel(one) // max(rows, 1)))
        return all(
            torch.equal(
                self.slice(one)[i : min(i + step, rows)], self.slice(other)[i : min(i + step, rows)]
            )
            for i in range(0, rows, step)
        )


def extra_files(folder: Path) -> list[Path]:
    """Tokenizer, generation settings, templates, licence: all but weights and config.json."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in NOT_COPIED
        and path.suffix not in WEIGHTS
        and not path.name.endswith(".index.json")
    ]


def fingerprint(paths: list[Path]) -> list:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
