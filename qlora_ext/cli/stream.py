"""Converts a checkpoint into another, one module at a time; `quantize` and `merge` share it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..build_info import build_info
from ..checks import check_finite, without_mask
from ..files import FLOATS, INDEX, extra_files
from ..integrations.transformers.checkpoint import Checkpoint, Unit
from ..integrations.transformers.conversions import without_those_of_packed
from ..nn.embedding import Embedding4bit
from ..nn.experts import Experts4bit, is_fused_experts, weight_names
from ..nn.linear import Linear4bit
from ..nn.packed import _Packed4bit
from ..text import first_few, first_line, plural
from .errors import CliError, as_cli_error
from .experts import ExpertError, Read, tensors_of_expert, written_alone
from .inputs import InputsChanged
from .output import STATE, Output, is_full
from .shards import Entry, Shard, ShardWriter, plan_shards, write_index

M_MMAP_THRESHOLD = -3  # malloc.h
WRITTEN = ["config.json", "generation_config.json", INDEX]  # by _write_rest
PACKED = (Linear4bit, Embedding4bit, Experts4bit)


def packed_names(model: nn.Module) -> set[str]:
    """Names of the outermost packed modules. Experts count as the layer that holds them."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PACKED) and not (names and name.startswith(f"{names[-1]}.")):
            names.append(name)
    return set(names)


@contextlib.contextmanager
def saving_config_of(folder: Path):
    """A context in which transformers saves a folder's config again. It checks some values only
    then. If it refuses one, that is a CliError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        path = folder / "config.json"
        raise CliError(
            f"{path} cannot be saved again ({first_line(error)}): correct it first"
        ) from error


@dataclasses.dataclass
class Piece:
    """A unit of the input, and what is written for it."""

    unit: Unit
    kept: dict[str, str]  # name in the unit's state -> name in the result's state
    entries: list[Entry]  # tensors to write


def return_freed_memory() -> None:
    """Makes glibc return large freed blocks to the system. By default it comes to keep blocks of up
    to 32 MiB. Merging layers of 6 MiB took 95 MiB besides the libraries, and 38 MiB with this."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


class Job:
    """A conversion, planned before the first weight is read: pieces, files, sizes.

    Args:
        checkpoint: the input.
        result: a model on meta with the structure, names, shapes and dtypes to write; its config is
            written too.
        transform: makes a module of the result from (name, the input's module with its values).
            Stacks of experts that can be read one by one are on meta.
        stacks: makes functions that read one expert of the result from (name, the input's module),
            for experts that stay dense. They are written as they are read.
        wholes: modules that transform takes with everything inside them, besides packed ones.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        result: nn.Module,
        transform: Callable[[str, nn.Module], nn.Module],
        stacks: Callable[[str, nn.Module], dict[str, Read]],
        *,
        max_shard_bytes: int,
        wholes: set[str] = frozenset(),
    ):
        self.checkpoint, self.result, self.transform = checkpoint, result, transform
        self.stacks = stacks
        result._weight_conversions = without_those_of_packed(result, checkpoint.used_conversions)
        self.wholes = {*wholes, *packed_names(result), *packed_names(checkpoint.model)}
        everything = result.state_dict()
        state = {
            name: tensor
            for name, tensor in everything.items()
            if name not in (result._keys_to_ignore_on_save or ())
        }
        try:
            state = remove_tied_weights_from_state_dict(state, result)
        except RuntimeError as error:
            raise CliError(f"{checkpoint.folder}: {str(error).splitlines()[0]}") from None
        self.pieces = self._pieces(everything, state)
        self._check_names(state)
        entries = [piece.entries for piece in self.pieces]
        self.shards, self.where = plan_shards(entries, max_shard_bytes)

    def _pieces(self, everything: dict, state: dict) -> list[Piece]:
        # A tied parameter may be read under one name and written under another.
        ids = defaultdict(list)
        for name in everything:
            ids[id(self.result.get_parameter_or_buffer(name))].append(name)
        written = {}
        for names in ids.values():
            kept = [name for name in names if name in state]
            for name in names:
                if kept:
                    written[name] = name if name in state else kept[0]
        pieces = []
        self.written_alone: set[str] = set()  # stacks of experts
        for unit in self.checkpoint.units(self.wholes, self.result._weight_conversions):
            names = [n for module in unit.modules for n in self._names(module, everything)]
            stacks = [n for module in unit.modules for n in self._dense_stacks(module)]
            self.written_alone |= {n for n in stacks if written_alone(self.result, n)}
            kept = {name: written[name] for name in names if name in written}
            part = revert_weight_conversion(
                self.result, {other: everything[name] for name, other in kept.items()}
            )
            entries = [Entry(n, t.dtype, tuple(t.shape)) for n, t in part.items()]
            pieces.append(Piece(unit, kept, entries))
        return pieces

    def _names(self, module: str, everything: dict) -> list[str]:
        prefix = f"{module}." if module else ""
        if module in self.wholes:
            return [name for name in everything if name.startswith(prefix)]
        own = (
            name
            for name in everything
            if name.startswith(prefix) and "." not in name[len(prefix) :]
        )
        # Of a tied pair, keep only the one that is read.
        return [name for name in own if name in self.checkpoint.sources]

    def _check_names(self, state: dict) -> None:
        """Raises CliError unless the pieces together are what save_pretrained would write."""
        whole = revert_weight_conversion(self.result, state)
        want = {name: (t.dtype, tuple(t.shape)) for name, t in whole.items()}
        got = {e.name: (e.dtype, e.shape) for piece in self.pieces for e in piece.entries}
        if got != want:
            odd = {name for name in {*got, *want} if got.get(name) != want.get(name)}
            raise CliError(
                f"transformers stores {first_few(odd)} of {type(self.result).__name__} in a way "
                "that takes several modules at once: load the model as a whole, convert it with "
                "qlora_ext.quantize_model or merge_and_unload, and save that"
            )

    # running

    def run(self, output: Output, run: dict, progress) -> None:
        """Writes the checkpoint. It uses the shards that an interrupted run has finished.

        Args:
            run: settings, JSON values by name. Only shards of a run with the same ones are used.
            progress: a Bar of screen.py, or something like it.
        """
        return_freed_memory()
        try:
            run = {
                **run,
                "input": self.checkpoint.fingerprint(),
                "versions": [build_info()["version"], transformers.__version__, torch.__version__],
            }
            output.check_inputs()
            todo = output.open(self.shards, run)
            if output.in_place:
                progress.say(f"{output.out} is complete: an interrupted run had finished it")
                progress.advance(self.nbytes_in)
                return
            if len(todo) < len(self.shards):
                done = len(self.shards) - len(todo)
                progress.say(f"continuing: {done} of {len(self.shards)} shards are finished")
            for number, shard in enumerate(self.shards):
                pieces = [p for p, where in zip(self.pieces, self.where, strict=True)
                          if where == number]  # fmt: skip
                progress.shard(number + 1, len(self.shards))
                if shard in todo:
                    self._write(output, shard, pieces, progress)
                else:
                    progress.advance(sum(self._bytes(piece) for piece in pieces))
            output.announce([p.name for p in self._copied()] + WRITTEN)
            self._write_rest(output.folder)
            output.complete()
        except KeyboardInterrupt:
            raise CliError(f"interrupted: {output.kept(self.shards)}") from None
        except Exception as error:
            raise self._explained(error, output) from None
        finally:
            output.close()

    def _explained(self, error: Exception, output: Output) -> Exception:
        """The error to raise instead. If an input has changed, that may be what caused this one."""
        if not isinstance(error, InputsChanged) and not output.is_recorded():
            try:
                output.check_inputs()
            except InputsChanged as changed:
                error = changed
        if isinstance(error, InputsChanged):
            if error.stale:
                output.discard()
                return CliError(
                    f"{error}, so the partial output was removed: give the same command again, "
                    "which starts over"
                )
            return CliError(f"{error}: {output.kept(self.shards)}")
        if isinstance(error, OSError):
            if not is_full(error) and output.inputs.holds(error.filename):
                what = f"{error.filename} cannot be read"
            else:
                what = f"{output.folder} cannot be written"
            return CliError(f"{what} ({error.strerror or error}): {output.kept(self.shards)}")
        return error

    def _bytes(self, piece: Piece) -> int:
        return sum(self.checkpoint.files.nbytes(key) for key in piece.unit.sources)

    @property
    def nbytes_in(self) -> int:
        """Bytes to read."""
        return sum(self._bytes(piece) for piece in self.pieces)

    @property
    def nbytes_out(self) -> int:
        """Bytes of all shards to write."""
        return sum(shard.nbytes for shard in self.shards)

    def _write(self, output: Output, shard: Shard, pieces: list[Piece], progress) -> None:
        with contextlib.closing(ShardWriter(output.folder, shard)) as writer:
            for piece in pieces:
                for name, tensor, number in self._convert(piece):
                    writer.write(name, tensor, number)
                progress.advance(self._bytes(piece))
            output.check_inputs()  # a later run may use a finished shard, so it must be right
            writer.finish()

    def _copied(self) -> list[Path]:
        return [path for path in extra_files(self.checkpoint.folder) if path.name != STATE]

    @torch.no_grad()
    def _convert(self, piece: Piece) -> Iterator[tuple[str, torch.Tensor, int | None]]:
        """(name, tensor, None) for each tensor to write; (name, slice, number) for each slice."""
        state = {}
        with self.checkpoint.loaded(piece.unit, self._read_alone(piece.unit)) as modules:
            for name, module in modules.items():
                prefix = f"{name}." if name else ""
                with self._naming(f"{prefix}weight"):
                    if isinstance(module, _Packed4bit):
                        damage = module._check_state(module.state_dict(prefix=prefix), prefix)
                        if damage:
                            raise CliError(f"{self.checkpoint.folder}: {damage[0]}")
                    new = self.transform(name, module)
                tensors = new.state_dict(prefix=prefix)
                if name not in self.wholes:
                    tensors = {k: t for k, t in tensors.items() if "." not in k[len(prefix) :]}
                parameters = {
                    prefix + key for key, _ in new.named_parameters(remove_duplicate=False)
                }
                stacks = self._dense_stacks(name)
                for key, tensor in tensors.items():
                    if key in piece.kept and key not in stacks:
                        self._check_finite(key, tensor, is_buffer=key not in parameters)
                        state[piece.kept[key]] = tensor.detach()
                del new, tensors
                readers = self.stacks(name, module) if stacks else {}
                for key in stacks:
                    like, read = stacks[key], readers[key[len(prefix) :]]
                    if key in self.written_alone:
                        yield from self._experts(key, like, read)
                    else:
                        whole = state[piece.kept[key]] = torch.empty_like(like, device="cpu")
                        for e, expert in enumerate(whole):
                            expert.copy_(self._expert(key, e, like, read))
            for name, tensor in revert_weight_conversion(self.result, state).items():
                yield name, tensor, None

    def _experts(self, name: str, like: torch.Tensor, read: Read):
        for e in range(len(like)):
            weight = self._expert(name, e, like, read)
            for key, tensor, is_slice in tensors_of_expert(self.result, name, e, weight):
                yield key, tensor, e if is_slice else None

    def _expert(self, name: str, e: int, like: torch.Tensor, read: Read) -> torch.Tensor:
        with self._naming(name, e):
            weight = read(e).to(like.dtype)
        self._check_finite(name, weight, is_buffer=False, expert=e)
        return weight

    @contextlib.contextmanager
    def _naming(self, name: str, expert: int | None = None):
        """A context in which an error about the weight `name` names the weight and its file."""
        try:
            yield
        except (RuntimeError, MemoryError, OverflowError) as error:
            if isinstance(error, ExpertError):
                name, expert = f"{name.rpartition('.')[0]}.{error.key}", error.expert
            where = self._where(name, expert)
            raise CliError(f"{where}: {str(error).splitlines()[0]}") from None

    def _dense_stacks(self, module: str) -> dict[str, torch.Tensor]:
        """The stacks of a module of the result, if it is one of fused experts, on meta."""
        experts = self.result.get_submodule(module)
        if not is_fused_experts(experts):
            return {}
        return {f"{module}.{key}": experts._parameters[key] for key in weight_names(experts)}

    def _read_alone(self, unit: Unit) -> list[str]:
        """The input's stacks of a unit whose experts can be read one after another."""
        names = []
        for name in unit.modules:
            module = self.checkpoint.model.get_submodule(name)
            if is_fused_experts(module):
                names += [f"{name}.{key}" for key in weight_names(module)]
        return [name for name in names if self.checkpoint.expert_reader(name) is not None]

    def _check_finite(
        self, name: str, tensor: torch.Tensor, is_buffer: bool, expert: int | None = None
    ) -> None:
        """Raises CliError if a tensor to write holds a NaN or an infinity. A buffer may hold
        infinities, for a mask."""
        if tensor.dtype not in FLOATS:
            return
        values = without_mask(tensor) if is_buffer else tensor
        with as_cli_error(OverflowError):
            check_finite(self._where(name, expert), values, tensor.dtype)

    def _where(self, name: str, expert: int | None = None) -> str:
        """The file and tensor that the model's tensor `name` comes from, else folder and name. For
        one expert of a stack also its number, and its file if all its tensors are in one."""
        checkpoint, number = self.checkpoint, "" if expert is None else f"[{expert}]"
        sources = checkpoint.sources.get(name, ())
        if len(sources) == 1:
            return f"{checkpoint.files.where[sources[0]]}: {sources[0]}{number}"
        if expert is not None:
            sources = checkpoint.expert_keys(name, expert)
            files = {checkpoint.files.where[key] for key in sources}
            if len(files) == 1:
                return f"{files.pop()}: {name}{number} of {' and '.join(sources)}"
        return f"{checkpoint.folder}: {name}{number}"

    def _write_rest(self, folder: Path) -> None:
        """Writes what save_pretrained writes besides weights; copies the input's other files."""
        for path in self._copied():
            shutil.copyfile(path, folder / path.name)
        config = self.result.config
        config.dtype = str(self.result.dtype).removeprefix("torch.")
        config.architectures = [type(self.result).__name__]
        with saving_config_of(self.checkpoint.folder):
            config.save_pretrained(folder)
        if self.result.can_generate() and not (folder / "generation_config.json").exists():
            self.result.generation_config.save_pretrained(folder)
        write_index(folder, self.shards, self.result.num_parameters())

    def notes(self) -> list[str]:
        """Notes for the user that are not errors."""
        unexpected = self.checkpoint.unexpected
        if not unexpected:
            return []
        return [
            f"left out {plural(len(unexpected), 'tensor')} of the input that "
            f"{type(self.result).__name__} does not have: {first_few(unexpected)}"
        ]
