"""Reads and checks the files of a checkpoint or adapter, which may come from anyone.

`read_json` reads JSON, and `SafetensorsFiles` reads tensors. If a library reads a file itself, call
it within `reading`. Every fault raises a CheckpointError that names the file.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from .checks import out_of_memory
from .text import CheckpointError, UserError, first_few, first_line, plural, printable, shorten

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
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
NOT_COPIED = {
    *("config.json", "README.md", ".gitattributes", "quantize_config.json"),
    "adapter_config.json",  # a folder with it but without the adapter's weights does not load
    # Files that trainers keep next to a model (transformers, accelerate, DeepSpeed).
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
    *("latest", "zero_to_fp32.py"),
}
OPEN_FILES = 2  # a module's tensors may be in two shards

# Limits for values from files; real files are far below them.
MAX_JSON = 2**26  # bytes
MAX_DEPTH = 64  # nested lists and objects
MAX_HEADER = 10**8  # bytes; safetensors' own limit
MAX_NAME = 1000  # characters of a tensor's name
MAX_DIMENSIONS = 16
MAX_NUMEL = 2**50


@contextlib.contextmanager
def reading(source: Path | str, what: str = "cannot be read"):
    """A context in which a library reads `source`. It turns errors into errors about the file.

    Raises:
        CheckpointError: "source what (reason)" instead of any other error, which is its cause.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a Rust library's panic is not an Exception
        why = "memory is used up" if out_of_memory(error) else first_line(error)
        raise CheckpointError(f"{source} {what} ({why})") from error


# Files --------------------------------------------------------------------------------------------


def find_folder(name: str, only: str | None = None) -> Path:
    """The folder of a model or adapter. `name` is a folder, or a name on the hub to download. If
    `only` is given, only that file is downloaded."""
    name = str(name)
    if os.path.isdir(name):  # False for a string that cannot be a path; Path.is_dir would raise
        return Path(name)
    if os.path.lexists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"{printable(name)} is not a folder, want one with "
            f"{only or 'config.json and safetensors files'}"
        )
    try:
        from huggingface_hub import snapshot_download

        kinds = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]
        return Path(snapshot_download(name, allow_patterns=only, ignore_patterns=kinds))
    except Exception as error:  # many kinds: no such name, no network, no permission
        raise CheckpointError(
            f"{printable(name)} is not a folder here, and it cannot be downloaded from the hub: "
            f"{first_line(error, with_type=True)}"
        ) from None


_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
}


def check_file(path: Path) -> int:
    """The size of a regular file in bytes. A pipe or device could make the reader wait for ever.

    Raises:
        CheckpointError: it is a pipe, device or folder, is missing, or may not be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # a loop of links, or a string that cannot be a path
        raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise CheckpointError(f"{path} is a {kind}, want a file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} cannot be read (Permission denied)")
    return status.st_size


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """The text of a UTF-8 file of at most `limit` bytes."""
    nbytes = check_file(path)
    if nbytes > limit:
        raise CheckpointError(f"{path} has {nbytes:,} bytes, want at most {limit:,}")
    with reading(path):
        return path.read_bytes().decode("utf-8")


def read_prefix(path: Path, limit: int) -> str:
    """The start of a UTF-8 file, at most `limit` bytes, cut between two characters."""
    check_file(path)
    with reading(path, "cannot be read as text"), open(path, "rb") as file:
        raw = file.read(limit)
        is_all = not file.read(1)
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=is_all)


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    text = read_text(path)
    with reading(path, "is not JSON"):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, want a JSON object")
    _check_depth(path, value)
    return value


def _check_depth(path: Path, value) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise CheckpointError(
        f"{path} nests lists and objects too deeply, want at most {MAX_DEPTH} levels"
    )


def _odd_name(name: object, limit: int) -> str | None:
    """What is wrong with a name that goes into messages and paths, or None."""
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    if not name:
        return "empty"
    if len(name) > limit:
        return f"{len(name):,} characters long, want at most {limit:,}"
    if not name.isprintable():  # NUL, a terminal's escapes, half a surrogate pair
        return "not printable"
    if any(c.isdigit() and not c.isdecimal() for c in name):  # transformers reads it as a number
        return "spelled with a digit that is not decimal"
    return None


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files: model.safetensors, or the files that the index names. If both exist,
    transformers reads model.safetensors and ignores the index, and so does this."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    if os.path.lexists(index) and not single.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map, want one that names the shards")
        for key, name in weight_map.items():
            odd = _odd_name(name, 255)
            if odd is None and (name in (".", "..") or "/" in name or os.sep in name):
                odd = "not a file of its own folder"
            if odd is None and not name.endswith(".safetensors"):
                odd = "not a .safetensors file"
            if odd is not None:
                raise CheckpointError(
                    f"{index}: weight_map[{shorten(key)}] is {shorten(name)}, which is {odd}: want "
                    "names of safetensors files in its own folder"
                )
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {plural(len(missing), 'shard')} of {len(names)}: "
                f"{first_few(missing)}; download or copy it again"
            )
        return [folder / name for name in names]
    if os.path.lexists(single):
        return [single]
    with reading(folder):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS[1:])
    hint = f" (it holds {first_few(others)}; transformers' save_pretrained writes safetensors)"
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor {INDEX}, want a safetensors checkpoint"
        f"{hint if others else ''}"
    )


def extra_files(folder: Path) -> list[Path]:
    """The files besides weights and config.json: tokenizer, generation settings, licence etc."""
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


# Tensors ------------------------------------------------------------------------------------------


def _open(path: Path):
    """A safetensors handle. It checks the header against the file: types, sizes, overlaps, gaps. It
    reads with pread, because a mapped file would count as this process's memory."""
    from safetensors import safe_open  # here, because `import qlora_ext` needs only torch

    with reading(path, "is damaged or not a safetensors file"):
        return safe_open(path, framework="pt", backend="pread")


def _read_header(path: Path) -> dict[str, dict]:
    """Name -> the tensor's dtype, shape and data_offsets, from a safetensors header.

    safetensors' own reader checks the header against the file. But if a name occurs twice, it
    silently takes the last entry; this function raises CheckpointError.
    """
    nbytes = check_file(path)
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} may be a pickle, which can run any code when it is read: want a safetensors "
            "file"
        )

    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path} has {shorten(twice)} twice in its header, want it once")
        return found

    _open(path)
    with reading(path, "is damaged or not a safetensors file"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, nbytes - 8):
            raise ValueError(f"it says that its header has {length:,} bytes")
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=once)
        header.pop("__metadata__", None)
    return header


class SafetensorsFiles(Mapping):
    """The tensors of several safetensors files by name. A tensor is read when it is asked for.

    Args:
        paths: the files.
        any_dtype: accept dtypes that TORCH_DTYPES lacks. Such a tensor has no entry in `dtypes` and
            must not be read.

    Attributes:
        where: name -> file. shapes: name -> shape. stored: name -> safetensors' name of the dtype.
        dtypes: name -> torch dtype. total_numel: the number of elements of all tensors.

    Raises:
        CheckpointError: a file is missing, damaged, not a regular file or not safetensors; a name
            is there twice, not printable or too long; a shape is too large; a dtype is unknown.
    """

    def __init__(self, paths: Iterable[Path], *, any_dtype: bool = False):
        self.paths = list(paths)
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.total_numel = 0
        self._nbytes: dict[str, int] = {}
        self._handles: OrderedDict[Path, object] = OrderedDict()
        for path in self.paths:
            for key, tensor in _read_header(path).items():
                self._add(path, key, tensor, any_dtype)

    def _add(self, path: Path, key: str, tensor: dict, any_dtype: bool) -> None:
        shape, dtype = tuple(tensor["shape"]), tensor["dtype"]
        if odd := _odd_name(key, MAX_NAME):
            raise CheckpointError(f"{path}: the name of a tensor, {shorten(key)}, is {odd}")
        if key in self.where:
            raise CheckpointError(f"{key} is in {self.where[key]} and in {path}, want it once")
        # Also for tensors without elements, because nothing else limits their other dimensions.
        if len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > MAX_NUMEL:
            raise CheckpointError(
                f"{path}: {shorten(key)} has shape {shorten(list(shape))}, want at most "
                f"{MAX_DIMENSIONS} dimensions and {MAX_NUMEL:,} elements"
            )
        if dtype in TORCH_DTYPES:
            self.dtypes[key] = TORCH_DTYPES[dtype]
        elif not any_dtype:
            raise CheckpointError(
                f"{path}: {key} has dtype {dtype}, want one of {', '.join(TORCH_DTYPES)}"
            )
        start, end = tensor["data_offsets"]
        self.where[key], self.shapes[key], self.stored[key] = path, shape, dtype
        self._nbytes[key] = end - start
        self.total_numel += math.prod(shape)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.where:
            raise KeyError(key)
        if not self.numel(key) and key in self.dtypes:  # safetensors cannot slice an empty tensor
            return torch.empty(self.shapes[key], dtype=self.dtypes[key])
        with reading(f"{self.where[key]}: {key}"):
            return self.slice(key)[...]

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the tensor
        return key in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def nbytes(self, key: str) -> int:
        return self._nbytes[key]

    def numel(self, key: str) -> int:
        return math.prod(self.shapes[key])

    def slice(self, key: str):
        """A safetensors slice. Indexing it reads only the indexed part."""
        path = self.where[key]
        if path not in self._handles:
            while len(self._handles) >= OPEN_FILES:
                self._handles.popitem(last=False)
            self._handles[path] = _open(path)
        self._handles.move_to_end(path)
        return self._handles[path].get_slice(key)

    def float_dtype(self) -> torch.dtype:
        """The dtype of all float tensors; float32 if there are several dtypes or none."""
        found = {dtype for dtype in self.dtypes.values() if dtype in FLOATS}
        return found.pop() if len(found) == 1 else torch.float32

    def meta(self, key: str) -> torch.Tensor:
        return torch.empty(self.shapes[key], dtype=self.dtypes[key], device="meta")

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, read a few rows at a time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        if not self.numel(one):
            return True
        if not self.shapes[one]:
            return bool((self.slice(one)[...] == self.slice(other)[...]).all())
        rows = self.shapes[one][0]
        step = max(1, 2**22 * rows // self.numel(one))
        parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        return all(torch.equal(self.slice(one)[part], self.slice(other)[part]) for part in parts)
