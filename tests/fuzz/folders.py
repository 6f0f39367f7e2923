"""Hostile folders: mutated files of tiny checkpoints and adapters, and the commands run on them.

`python folders.py FOLDER SEED FIRST COUNT` makes the tiny folders under FOLDER and runs the cases
FIRST, FIRST + 1, ... of a seed. A case depends on its number and the seed alone. Each runs in a
child that is forked from this process, which has everything imported, with bounds of memory and of
CPU time; it prints a line of JSON for each case: what was done, and what is wrong with the outcome.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

MEMORY = 2 * 2**30  # bytes beyond what the process has mapped before
CPU_SECONDS = 30
WALL_SECONDS = 240  # for a child that waits for something: the machine may be busy
INDEX = "model.safetensors.index.json"
WEIGHTS = "adapter_model.safetensors"


class Nan(float):
    """Written as NaN."""


VALUES = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 10**9, 2**62, 2**64, -(2**63), 10**400,
    0.5, -0.0, 1e308, Nan("nan"), float("inf"), "", "x", "x" * 5000, "../x", "/etc/passwd",
    "a/b", "a\0b", "\ud800", "\x1b[2J\x07", "None", "1", [], [None], ["x"], [5], [[1]], {},
    {"a": 1}, {"rope_type": "zzz"}, {"rope_type": "yarn", "factor": "x"},
    {"rope_type": "linear", "factor": 0},
    {"quant_method": 5}, {"quant_method": "qlora_ext", "blocksize": "x"},
    {"quant_method": "bitsandbytes", "load_in_4bit": "no"}, {"quant_method": ["qlora_ext"]},
    {"quant_method": "qlora_ext", "codebook": [1, 2]}, {"quant_method": "gptq"},
    ["sliding_attention"] * 3, {"AutoModel": "evil.Model"}, "evil/kernel", ["LlamaModel"],
    ["T5Model"], ["torch"], "float8_e4m3fn", "int8", "(a+)+$", ["(a|a)*b"],
]  # fmt: skip
KEYS = [
    "auto_map", "architectures", "model_type", "quantization_config", "rope_parameters", "dtype",
    "attn_implementation", "num_hidden_layers", "vocab_size", "hidden_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "tie_word_embeddings",
    "hidden_act", "max_position_embeddings", "layer_types", "num_labels", "id2label",
    "text_config", "rms_norm_eps", "pad_token_id", "attention_bias", "sliding_window",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
    "peft_type", "layer_replication", "megatron_config", "base_model_name_or_path", "use_dora",
    "validate", "save_pretrained", "to_dict", "_auto_class", "output_attentions",  # its own methods
    "eos_token_id", "max_length", "do_sample", "tokenizer_class", "chat_template",
]  # fmt: skip
BYTES = {
    "empty": b"",
    "invalid UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a BOM": b'\xef\xbb\xbf{"a": 1}',
    "very deep": b"[" * 100_000,
    "deep": b'{"a":' * 500 + b"1" + b"}" * 500,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "NUL": b"\0" * 64,
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
}
# What bitsandbytes stores as JSON in a tensor of bytes.
STATES = [
    b"", b"{}", b"[]", b"\0" * 40, b"[" * 50_000, b'{"shape":' * 3000 + b"1" + b"}" * 3000,
    b'{"shape": [Infinity, 4], "blocksize": 1e400, "quant_type": "nf4"}',
    b'{"shape": [' + b"9" * 5000 + b', 4], "blocksize": 64, "quant_type": "nf4"}',
]  # fmt: skip
FOLDERS = ("base", "packed", "bitsandbytes", "adapter")
KINDS = ("missing", "folder", "pipe", "loop", "dangling", "zeros", "unreadable", "long name")


def make_folders(root: Path) -> None:
    """base (in shards), packed, bitsandbytes, adapter: what the cases are mutations of."""
    import torch

    import qlora_ext
    import tiny_models
    from integration_helpers import tiny_tokenizer

    model = tiny_models.make("llama", torch.bfloat16, vocab_size=256)
    model.save_pretrained(root / "base", max_shard_size="60KB")
    tiny_tokenizer(root / "base")
    qlora_ext.quantize_model(model, progress_bar=False).save_pretrained(root / "packed")
    tiny_tokenizer(root / "packed")
    qlora_ext.save_pretrained(model, root / "bitsandbytes", format="bitsandbytes")
    tiny_tokenizer(root / "bitsandbytes")
    qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=2))
    model.name_or_path = str(root / "base")
    qlora_ext.save_adapter(model, root / "adapter")


# Mutations ----------------------------------------------------------------------------------------


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def mutate_json(path: Path, rng: random.Random) -> str:
    """Changes one value, or the bytes, of a JSON file."""
    if rng.random() < 0.12:
        name = rng.choice(list(BYTES))
        path.write_bytes(BYTES[name])
        return name
    if rng.random() < 0.08:
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
        return "cut"
    value = json.loads(path.read_text())
    inner = value
    if path.name == INDEX and rng.random() < 0.8:
        inner = value["weight_map"]
    nested = [v for v in inner.values() if isinstance(v, dict) and v]
    if nested and rng.random() < 0.25:
        inner = rng.choice(nested)
    key = rng.choice([*inner, *KEYS]) if rng.random() < 0.9 else rng.choice(["", "x" * 5000, "a\0"])
    new = copy.deepcopy(rng.choice(VALUES))
    if rng.random() < 0.1:
        inner.pop(key, None)
        said = f"no {key[:40]!r}"
    else:
        inner[key] = new
        said = f"{key[:40]!r}: {str(new)[:60]!r}"
    write(path, value)
    return said


def mutate_safetensors(path: Path, rng: random.Random) -> str:
    """Changes the header of a safetensors file, or its length."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    key = rng.choice([k for k in header if k != "__metadata__"])
    tensor = header[key]
    how = rng.choice(["shape", "dtype", "offsets", "name", "twice", "length", "cut", "longer",
                      "swap", "value", "metadata", "bytes", "extra"])  # fmt: skip
    said = how
    if how in ("shape", "dtype", "offsets"):
        field = "data_offsets" if how == "offsets" else how
        if isinstance(tensor[field], list) and rng.random() < 0.7:
            at = rng.randrange(len(tensor[field]))
            tensor[field][at] = rng.choice([0, 1, -1, 2**31, 2**62, 2**64, 1.5, None, "1", [1]])
        else:
            tensor[field] = rng.choice([None, [], [0], [[]], "F32", "F4", "U16", "I64", "zzz", 5,
                                        [1] * 40, [2**32, 2**32], tensor[field][::-1]])  # fmt: skip
        said = f"{key[:40]}: {field} = {tensor[field]!r}"
    elif how in ("name", "extra"):
        name = rng.choice(["", "x" * 5000, "a\0b", "../../x", "\x1b[2J", "a." * 400, "\ud800",
                           "model.layers.99.mlp.up_proj.weight", key + ".weight_absmax",
                           "x.weight.quant_state.bitsandbytes__nf4",
                           "x.lora_A.weight"])  # fmt: skip
        header[name] = header.pop(key) if how == "name" else dict(
            dtype="U8", shape=[0, rng.choice([1, 2**40, 2**62])], data_offsets=[len(data)] * 2
        )  # fmt: skip
        said = f"{how}: {name[:30]!r}"
    elif how == "swap":
        other = rng.choice([k for k in header if k != "__metadata__"])
        header[key], header[other] = header[other], header[key]
    elif how == "metadata":
        header["__metadata__"] = rng.choice([5, None, {"format": 5}, {"format": "tf"}, [], {}])
    elif how == "value":
        start, end = tensor["data_offsets"]
        data = (
            data[:start] + b"\x7f\xff"[:: rng.choice([1, -1])] * ((end - start) // 2) + data[end:]
        )
    text = json.dumps(header).encode()
    if how == "twice":
        text = text[:-1] + b"," + json.dumps({key: tensor}).encode()[1:]
    if how == "bytes":
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    length = len(text)
    if how == "length":
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    if how == "longer":
        data += b"\0" * rng.choice([1, 1000])
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return said


def mutate_quant_state(path: Path, rng: random.Random) -> str:
    """Changes what bitsandbytes says of one weight, or one of that weight's statistics."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    key = rng.choice(sorted(key for key in tensors if ".quant_state." in key))
    how = rng.choice(["value", "value", "value", "bytes", "dtype", "gone", "statistics"])
    state, said = json.loads(bytes(tensors[key].tolist())), how
    if how == "value":
        field = rng.choice(sorted(state))
        state[field] = rng.choice([*VALUES, [2**47, 2**47], [64, 96], [-96, -64], ["96", "64"]])
        said = f"{field}: {str(state[field])[:60]!r}"
    text = rng.choice(STATES) if how == "bytes" else json.dumps(state).encode()
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
    if how == "dtype":
        tensors[key] = tensors[key].to(rng.choice([torch.float32, torch.int64])) + 1000
    stem = key.partition(".quant_state.")[0]
    other = rng.choice([name for name in sorted(tensors) if name.startswith(f"{stem}.")])
    if how == "gone":
        del tensors[other]
        said = f"no {other}"
    elif how == "statistics":
        tensors[other] = tensors[other].reshape(-1)[: rng.randrange(4)].clone()
        said = f"{other} is cut"
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{key}: {said}"


def mutate_kind(path: Path, rng: random.Random) -> str:
    """Puts something that is no file in a file's place."""
    how = rng.choice(KINDS)
    if how == "unreadable":
        path.chmod(0)
        return how
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "zeros":
        path.symlink_to("/dev/zero")
    elif how == "long name":
        path.with_name("x" * 200 + path.suffix).write_bytes(b"x")
    return how


# Cases --------------------------------------------------------------------------------------------


def make_case(root: Path, work: Path, seed: int, number: int) -> tuple[list[str], str, Path]:
    """The words of a command, what was mutated, and the mutated folder."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(["base", "base", "packed", "bitsandbytes", "adapter"])
    for name in FOLDERS:
        shutil.copytree(root / name, work / name)
    folder, out = work / kind, str(work / "out")
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors")]
    names = {"config.json", INDEX, "adapter_config.json"}
    # What decides most is taken most often.
    path = rng.choice([*files, *[p for p in files if p.name in names or
                                 p.suffix == ".safetensors"] * 3])  # fmt: skip
    if rng.random() < 0.1:
        said = mutate_kind(path, rng)
    elif path.suffix == ".json":
        said = mutate_json(path, rng)
    elif kind == "bitsandbytes" and rng.random() < 0.5:
        said = mutate_quant_state(path, rng)
    else:
        said = mutate_safetensors(path, rng)
    base, adapter = str(work / "base"), str(work / "adapter")
    if kind == "adapter":
        commands = [["inspect", adapter], ["merge", base, adapter, out],
                    ["merge", base, adapter, out, "--four-bit"],
                    ["chat", adapter, "--base", base, "--prompt", "a", "--max-tokens", "1",
                     "--device", "cpu"], ["load_adapter", str(root / "base"), adapter]]  # fmt: skip
    else:
        one = str(folder)
        commands = [["inspect", one], ["inspect", one, "--json"], ["quantize", one, out],
                    ["quantize", one, out], ["merge", one, adapter, out],
                    ["estimate", one, "--seq", "4"],
                    ["chat", one, "--prompt", "a", "--max-tokens", "1", "--device", "cpu"],
                    ["from_pretrained", one],
                    ["merge_into_4bit", str(root / "packed"), adapter, one]]  # fmt: skip
    return rng.choice(commands), f"{kind}/{path.name}: {said}", folder


def run_library(words: list[str]) -> int:
    """A function of the library as a command: what it may raise is a sentence with status 1."""
    import transformers

    import qlora_ext

    try:
        if words[0] == "from_pretrained":
            qlora_ext.from_pretrained(words[1])
            return 0
        model = transformers.AutoModelForCausalLM.from_pretrained(words[1], dtype="auto")
        qlora_ext.load_adapter(model, words[2])
        if words[0] == "merge_into_4bit":
            qlora_ext.merge_into_4bit(model, base=words[3], progress_bar=False)
    except (ValueError, FileNotFoundError, OverflowError) as error:
        print(f"qlora-ext {words[0]}: {error}", file=sys.stderr)
        return 1
    return 0


def child(words: list[str], log: Path) -> None:
    """Runs one command with its outputs in files; does not return."""
    code = 99
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        if words[0] in ("from_pretrained", "load_adapter", "merge_into_4bit"):
            code = run_library(words)
        else:
            from qlora_ext.cli import app

            sys.argv = ["qlora-ext", *words]
            try:
                app.run()
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def state(folder: Path) -> list:
    """What a folder holds, and when it was last changed."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_mode, status.st_size, status.st_mtime_ns))
    return found


def run_case(root: Path, work: Path, seed: int, number: int) -> dict:
    """One case; `problem` is None where the outcome is success or one sentence."""
    work.mkdir()
    words, said, folder = make_case(root, work, seed, number)
    before = [state(work / name) for name in FOLDERS]
    pid = os.fork()
    if pid == 0:
        child(words, work)
    end, status = time.monotonic() + WALL_SECONDS, None
    while status is None:
        done, value = os.waitpid(pid, os.WNOHANG)
        if done:
            status = value
        elif time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        else:
            time.sleep(0.005)
    stderr = (work / "stderr").read_text(errors="replace")
    sentences = [line for line in stderr.splitlines() if line.startswith("qlora-ext ")]
    code = None if status is None else os.waitstatus_to_exitcode(status)
    problem = None
    if code is None:
        problem = "it hangs"
    elif "Traceback" in stderr or code not in (0, 1):
        problem = f"exit status {code}: {stderr[-1500:]}"
    elif code == 1 and len(sentences) != 1:
        problem = f"{len(sentences)} sentences: {stderr[-1500:]}"
    elif code == 1 and str(folder) not in sentences[0] and "cannot hold" not in sentences[0]:
        # A sum of weights that is too large is named by its layer.
        problem = f"the sentence does not name {folder.name}: {sentences[0]}"
    elif code == 1 and len(sentences[0]) > 2000:
        problem = f"a sentence of {len(sentences[0])} characters: {sentences[0][:300]}"
    elif code == 1 and (work / "out").exists():
        problem = "OUT is there after a failure"
    elif [state(work / name) for name in FOLDERS] != before:
        problem = "an input was changed"
    command = " ".join(words).replace(f"{work}/", "")
    outcome = {"number": number, "command": command, "mutation": said, "code": code,
               "sentence": sentences[0] if sentences else "", "problem": problem}  # fmt: skip
    shutil.rmtree(work)
    return outcome


def main(root: Path, seed: int, first: int, count: int) -> None:
    import torch

    from qlora_ext.cli import app

    torch.set_num_threads(1)  # a fork loses torch's threads
    torch.set_num_interop_threads(1)
    make_folders(root)
    # Everything that a command imports, once.
    for words in (["quantize", str(root / "base"), str(root / "warm")],
                  ["estimate", str(root / "base"), "--seq", "4"],
                  ["chat", str(root / "adapter"), "--prompt", "a", "--max-tokens", "1"],
                  ["merge", str(root / "base"), str(root / "adapter"), str(root / "warm2")],
                  ["inspect", str(root / "base")]):  # fmt: skip
        app.app(words, standalone_mode=False)
    sys.stdout.flush()
    for number in range(first, first + count):
        print("CASE " + json.dumps(run_case(root, root / "case", seed, number)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
