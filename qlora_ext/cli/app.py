"""Declares the commands, their arguments and what they print.

This file is longer than others, so that all arguments and their help are in one place.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..build_info import build_info, in_words
from ..ops import _C
from ..text import UserError, format_bytes, plural
from .errors import INSTALL, CliError, as_cli_error
from .screen import bar, console, say, table

app = typer.Typer(
    name="qlora-ext",
    help="4-bit models: quantize, merge, inspect, estimate, try out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


MOST = 2**31  # the largest number that a user may give: tokens, samples, GiB

QuantType = Enum("QuantType", {name: name for name in _C.codebooks()}, type=str)


class Dtype(str, Enum):
    """The dtype of a dense result."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


# Arguments that several commands take.
Out = Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)]
Type = Annotated[QuantType, typer.Option("--quant-type", help="Codebook.")]
Block = Annotated[int, typer.Option("--blocksize", help="Weights per scale, 32 to 4096.")]
Nested = Annotated[bool, typer.Option(help="Scales in 8 bits instead of 32.")]
Keep = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads it at run time)
    typer.Option("--keep", help="Layer (part of a dotted name) to leave unquantized; repeatable."),
]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Pack untied embeddings too.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Size of each output file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what an interrupted run finished.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def run() -> None:
    """The entry point. A failure prints a message on stderr and exits with status 1.

    Faults of files raise a UserError (see files.reading). Other errors are bugs of this program
    and keep their traceback.
    """
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the encoding lacks. Escape them, as stderr does.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        if os.environ.get("QLORA_EXT_TRACEBACK"):
            raise
        fail(command, str(error))
    except ModuleNotFoundError as error:
        fail(command, f"{error.name} is not installed: {INSTALL}")
    except KeyboardInterrupt:
        fail(command, "interrupted")
    except BrokenPipeError:  # `qlora-ext inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        fail(command, "memory is used up: use a machine with more memory")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        fail(command, f"{error.strerror or error}{where}")


def fail(command: str, message: str) -> None:
    """Prints why the command failed, and exits."""
    say(f"qlora-ext {command}: {' '.join(message.split())}", stderr=True)
    sys.exit(1)


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500MB", "1GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise CliError(f"--max-shard-size is {text!r}, want a size such as 2GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def quant_config(quant_type: QuantType, blocksize: int, double_quant: bool):
    """The QuantConfig of these settings. Raises CliError if one is out of range."""
    from ..tensor.config import QuantConfig

    try:
        return QuantConfig(quant_type.value, blocksize, double_quant)
    except ValueError as error:
        raise CliError(str(error).replace("QuantConfig: ", "--", 1)) from None


def quiet() -> None:
    """Turns off transformers' log messages and progress bars, so that only ours are printed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# Commands -----------------------------------------------------------------------------------------


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show what was built, for which devices, and the versions in use."""
    from importlib.metadata import PackageNotFoundError, version

    found = dict(build_info())
    for package in ("transformers", "peft", "safetensors", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table("", ["", ""], [[key, text] for key, text in in_words(found).items()], left=2)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Unquantized checkpoint: folder or hub name.")],
    out: Out,
    quant_type: Type = QuantType.nf4,
    blocksize: Block = 64,
    double_quant: Nested = True,
    keep: Keep = None,
    embeddings: Embeddings = False,
    max_shard_size: ShardSize = "2GB",
    force: Force = False,
    restart: Restart = False,
) -> None:
    """Pack a checkpoint's linear layers in 4 bits, one layer in memory at a time.

    The result is what quantize_model and save_pretrained write, and loads with transformers. To
    continue an interrupted run, give the same command again.
    """
    config = quant_config(quant_type, blocksize, double_quant)
    limit = parse_size(max_shard_size)
    from ..files import find_folder
    from . import quantize as work
    from .output import Output

    quiet()
    folder = find_folder(model)
    with Output(out, force=force, restart=restart, inputs=[folder]) as target:
        job = work.plan(folder, config, keep or [], embeddings, limit)
        report = job.result.quantization_report
        for note in job.notes():
            say(f"note: {note}")
        if (folder / "adapter_config.json").exists():
            say(f"note: only the model in {model} is quantized, not the adapter in that folder")
        settings = {
            "command": "quantize",
            "settings": {**config.to_dict(), "keep": keep, "embeddings": embeddings},
        }
        with bar("quantizing", job.nbytes_in) as progress:
            job.run(target, settings, progress)
    say(f"{report}")
    written(out, job)


def written(out: Path, job) -> None:
    """Prints the last line of a command that writes a checkpoint."""
    say(
        f"{out}: {format_bytes(job.nbytes_out)} in {plural(len(job.shards), 'shard')}, "
        f"{format_bytes(job.nbytes_in)} before"
    )


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The model the adapter is for: folder or hub name.")],
    adapter: Annotated[str, typer.Argument(help="LoRA adapter in PEFT's format.")],
    out: Out,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: BASE's if 16-bit, else float16.")
    ] = Dtype.auto,
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Quantize W + s B A of an unquantized BASE.")
    ] = False,
    calibration: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="Text file: merge into 4 bits, fitted to the layers' inputs on it."),
    ] = None,
    own_text: Annotated[
        bool, typer.Option("--own-text", help="As --calibration, on text that the model writes.")
    ] = False,
    quant_type: Type = QuantType.nf4,
    blocksize: Block = 64,
    double_quant: Nested = True,
    keep: Keep = None,
    embeddings: Embeddings = False,
    max_shard_size: ShardSize = "2GB",
    force: Force = False,
    restart: Restart = False,
) -> None:
    """Add an adapter to its base's weights, one layer in memory at a time.

    Each sum W + s B A is made in fp32 and rounded once, to 16 bits or, with --four-bit, to 4. BASE
    may be unquantized or in 4 bits (qlora_ext's or bitsandbytes'). From 4 bits the result is dense,
    because packing the sum again would lose most of what was trained.

    --calibration gives a result in 4 bits that keeps most of it. Its text should be of the kind
    that the model is for. BASE is in 4 bits or, with --four-bit, unquantized. If you have no such
    text, --own-text lets the model write some. Both run the model, so all of it is in memory,
    packed, with up to 1 GiB of statistics and what a forward pass takes.
    """
    config = quant_config(quant_type, blocksize, double_quant)
    limit = parse_size(max_shard_size)
    import torch

    from ..files import extra_files, find_folder
    from ..integrations.transformers.building import read_config, stored_method
    from . import merge as work
    from .calibrated import merge_calibrated
    from .output import Output

    quiet()
    if four_bit and dtype is not Dtype.auto:
        raise CliError("--dtype is for a dense result, and --four-bit makes none: want one of them")
    folder, adapter_folder = inputs = [find_folder(base), find_folder(adapter)]
    if calibration is not None and own_text:
        raise CliError(
            "--calibration names a text, and --own-text lets the model write one: want one of them"
        )
    if calibration is not None or own_text:
        flag = "--own-text" if own_text else "--calibration"
        if dtype is not Dtype.auto or embeddings:
            raise CliError(
                f"--dtype and --embeddings have no effect with {flag}: its result is in 4 bits, "
                "with BASE's embeddings; leave them out"
            )
        packed = stored_method(read_config(folder)) is not None
        if not packed and not four_bit:
            raise CliError(
                f"{base} is unquantized, but {flag} makes a 4-bit result: give --four-bit too"
            )
        if packed and (keep or config != quant_config(QuantType.nf4, 64, True)):
            raise CliError(
                f"{base} is in 4 bits already: --keep, --quant-type, --blocksize and "
                "--no-double-quant are for an unquantized BASE; leave them out"
            )
        # For text that the model writes, the adapter's own tokenizer and template are used.
        inputs += extra_files(adapter_folder) if own_text else [calibration]
        settings = {**config.to_dict(), "keep": keep, "max_shard_size": limit}
        with (
            Output(out, force=force, restart=restart, inputs=inputs) as target,
            target.at_once({"command": "merge with calibration", "settings": settings}) as made,
        ):
            if made is None:
                say(f"{out} is complete: an interrupted run had finished it")
                return
            tokens = merge_calibrated(
                folder, adapter_folder, calibration, made, config, keep or [], limit
            )
        by = "that the model wrote" if own_text else f"of {calibration}"
        say(f"{out}: merged into 4 bits by {tokens:,} tokens {by}")
        return
    with Output(out, force=force, restart=restart, inputs=inputs) as target:
        job, pairs = work.plan(
            folder,
            adapter_folder,
            dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value),
            four_bit=config if four_bit else None,
            keep=keep or [],
            embeddings=embeddings,
            max_shard_bytes=limit,
        )
        if four_bit and job.checkpoint.quantizer is not None:
            say(f"note: {work.REQUANTIZING.format(base=base)}")
            four_bit = False
        for note in job.notes():
            say(f"note: {note}")
        settings = {
            "command": "merge",
            "settings": {
                "dtype": dtype.value,
                "four_bit": {**config.to_dict(), "keep": keep, "embeddings": embeddings}
                if four_bit
                else None,
            },
            "adapter": work.adapter_fingerprint(adapter_folder),
        }
        with bar("merging", job.nbytes_in) as progress:
            job.run(target, settings, progress)
    ranks = sorted({pair.r for pair in pairs.values()})
    what = "4 bits" if four_bit else str(job.result.dtype).removeprefix("torch.")
    say(
        f"{plural(len(pairs), 'layer')} merged (rank {', '.join(map(str, ranks))}), "
        f"weights in {what}"
    )
    written(out, job)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint or adapter, or a file.")],
    layers: Annotated[bool, typer.Option("--layers", help="Every layer on its own row.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show layers, quant types, shapes and bits per weight of a checkpoint or adapter.

    Reads only the files' headers. Knows the layouts of qlora_ext and bitsandbytes, and PEFT's
    adapters. "nested" scales are in 8 bits (double quantization).
    """
    from . import inspect as work

    contents = work.read(path)
    if as_json:
        print(json.dumps(work.as_json(contents), indent=2))
        return
    for line in work.summary(contents):
        say(line)
    columns = ["layer", "stored as", "shape", "weights", "bits each", "size"]
    table("", columns, work.rows(contents, layers), left=2)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Folder, config.json or hub name.")],
    seq: Annotated[int, typer.Option("--seq", min=1, max=MOST, help="Tokens per sample.")] = 512,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=MOST, help="Samples per forward pass.")
    ] = 1,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapters.")] = 8,
    target: Annotated[
        str,
        typer.Option("--target", help="Adapted layers: all-linear, or names separated by commas."),
    ] = "all-linear",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="16-bit weights, for comparison.")] = False,
    offload: Annotated[
        bool, typer.Option("--offload-experts", help="Packed experts in host memory.")
    ] = False,
    quant_type: Type = QuantType.nf4,
    blocksize: Block = 64,
    double_quant: Nested = True,
    gpu: Annotated[
        Optional[float],  # noqa: UP045 (typer reads it at run time)
        typer.Option("--gpu", min=0, help="Memory in GiB. Default: this GPU, else common sizes."),
    ] = None,
) -> None:
    """Will training fit? Memory of a LoRA step, from config.json alone.

    What is stored and saved for the backward pass is counted exactly, on the meta device. What
    allocators and kernels add is only estimated.
    """
    if gpu is not None and not gpu <= MOST:
        raise CliError(f"--gpu is {gpu:g}, want a memory size in GiB, at most {MOST:,}")
    config = None if dense else quant_config(quant_type, blocksize, double_quant)
    import torch

    from ..adapters.config import LoraConfig
    from ..files import reading
    from . import estimate as work

    quiet()
    targets = target if target == "all-linear" else tuple(target.split(","))
    with as_cli_error(ValueError):
        lora = LoraConfig(r=rank, target_modules=targets)
    settings = work.load(model)
    with reading(f"{model}: config.json", "cannot be estimated"):
        found = work.estimate(
            settings,
            seq=seq,
            batch=batch,
            quant=config,
            lora=lora,
            checkpointing=checkpointing,
            offload=offload,
        )
    rows = [[name, format_bytes(nbytes)] for name, nbytes in found.parts.items()]
    rows.append([f"CUDA context, and {work.SLACK:.0%} for the allocator",
                 format_bytes(found.total - sum(found.parts.values()))])  # fmt: skip
    rows.append(["total", format_bytes(found.total)])
    if offload:
        rows.append(["also, in host memory: experts", format_bytes(found.host)])
    how = ", gradient checkpointing" if checkpointing else ""
    table(f"Estimate: batch {batch} x {seq} tokens, rank {rank} on {target}{how}", ["", ""], rows)
    say(
        "\ntotal = (weights + adapters + gradients + optimizer (AdamW: 2 fp32 per adapter weight) "
        "+ what one\nforward pass in bfloat16 saves for the backward pass, counted per tensor with "
        "attention saved as flash\nkernels save it"
        + (" (checkpointing: one input per layer, and one whole layer)" if checkpointing else "")
        + " + logits and two fp32 gradients)\n"
        f"x {1 + work.SLACK:.2f} + {format_bytes(work.CONTEXT)}. An estimate: kernels' "
        "workspaces and fragmentation differ from run to run.\n"
    )
    sizes = [gpu] if gpu is not None else list(work.GPUS)
    if gpu is None and torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(0).total_memory / 2**30]
    table("", ["GPU", "fits", "largest batch"], [
        [f"{gib:g} GiB" if gib == int(gib) else f"{gib:.1f} GiB",
         "yes" if found.total <= gib * 2**30 else "no",
         f"{found.largest_batch(gib * 2**30):,}"]
        for gib in sizes
    ])  # fmt: skip


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Base, adapter or merged model.")],
    base: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Option("--base", help="An adapter's base, if not the one its config names."),
    ] = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Option("--prompt", help="Answer this and end."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    four_bit: Annotated[
        bool, typer.Option(help="Pack an unquantized model in 4 bits while loading.")
    ] = True,
    device: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Option("--device", help="Default: cuda if there is a GPU, else cpu."),
    ] = None,
) -> None:
    """Talk to a model. /reset starts over, /quit or Ctrl-D ends."""
    import torch

    from .chat import Chat

    quiet()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    talk = Chat(model, base=base, four_bit=four_bit, device=device)
    if prompt is not None:
        talk.answer(prompt, max_tokens=max_tokens, temperature=temperature, stream=True)
        return
    say(f"{model} on {device}. /reset starts over, /quit or Ctrl-D ends.")
    while True:
        try:
            text = console().input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text == "/quit":
            return
        if text == "/reset":
            talk.turns.clear()
        elif text:
            try:
                talk.answer(text, max_tokens=max_tokens, temperature=temperature, stream=True)
            except KeyboardInterrupt:  # it ends the answer, not the conversation
                say(" ...")
