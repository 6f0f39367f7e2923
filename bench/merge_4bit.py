"""What merging a LoRA adapter back into 4 bits keeps of a fine-tune, by route.

    python examples/finetune.py                      # leaves runs/demo/adapter and the base
    python bench/merge_4bit.py --adapter runs/demo/adapter

Prints the table of docs/merging.md and writes bench/results/merge-4bit-<machine>-<date>.json. All
rows use the same held-out set. The calibration text is from the training set, which has no module
in common with it. If the model writes the text, the seconds include that. Rows measured before with
the same settings are taken from --output.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import finetune
import instructions
import smollm2
import torch
import transformers

import qlora_ext
from qlora_ext.models.walk import replace_module
from qlora_ext.nn import Linear4bit, LoraLinear4bit
from qlora_ext.nn.dense import dense_layer

ROWS = {
    "base": "unquantized base",
    "base_4bit": "4-bit base",
    "adapter": "4-bit base + adapter",
    "merged_16bit": "merged, fp16",
    "requantized": "merged, requantized without either",
    "from_base": "merged into 4 bits, `base=`",
    "calibrated": "merged into 4 bits, `calibration=`",
    "own_text": "merged into 4 bits, text that the model wrote",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=None, help="folder of the base; the demonstration's if left out")
    add("--cache", type=Path, default=Path(".cache"))
    add("--adapter", type=Path, default=Path("runs/demo/adapter"))
    add("--held-out-pairs", type=int, default=64)
    add("--calibration-pairs", type=int, default=48)
    add("--max-length", type=int, default=192, help="tokens per pair")
    add("--hessian-bytes", type=int, default=2**30)
    add("--rows", default=",".join(ROWS), help="which to measure")
    add("--output", type=Path, default=None)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.utils.logging.disable_progress_bar()

    output = args.output or default_output()
    settings = {
        name: getattr(args, name)
        for name in ("held_out_pairs", "calibration_pairs", "max_length", "hessian_bytes")
    }
    settings["adapter_bytes"] = (args.adapter / "adapter_model.safetensors").stat().st_size
    results = {"settings": settings, "machine": machine(args), "rows": {}}
    if output.exists():
        before = json.loads(output.read_text())
        if before["settings"] == settings:
            results["rows"] = before["rows"]

    folder = args.model or smollm2.folder(args.cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = base.to(args.device).eval()
    held_out, calibration = texts(tokenizer, args)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in calibration)
    results["calibration_tokens"] = tokens
    results["held_out_answer_tokens"] = sum(map(finetune.labelled, held_out))

    quantized = qlora_ext.quantize_model(copy.deepcopy(base), progress_bar=False)
    adapted = qlora_ext.load_adapter(copy.deepcopy(quantized), args.adapter).eval()
    for name in args.rows.split(","):
        if name in results["rows"]:
            continue
        start, processor = time.perf_counter(), time.process_time()
        model = make(name, base, quantized, adapted, calibration, tokenizer, args)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        loss = finetune.evaluate(model, held_out, args)
        results["rows"][name] = {
            "held_out_loss": loss,
            "merge_seconds": round(seconds, 1),
            "merge_processor_seconds": round(processor, 1),  # of all threads
        }
        taken = f"{seconds:.0f} s to merge, {processor:.0f} s of processor"
        print(f"{ROWS[name]}: {loss:.4f} ({taken})", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
        del model
    show(results)
    print(f"Written: {output}")


def texts(tokenizer, args) -> tuple[list[dict], list[dict]]:
    """Held-out and calibration batches; no module of the library is in both."""
    train, held_out = instructions.stdlib_pairs()
    held_out = instructions.sample(held_out, args.held_out_pairs, seed=0)
    calibration = instructions.sample(train, args.calibration_pairs, seed=1)
    batches = []
    for pairs in (held_out, calibration):
        examples = instructions.encode_all(tokenizer, pairs, args.max_length)
        examples.sort(key=lambda example: len(example[0]))
        batches.append(
            [
                instructions.collate(examples[i : i + 8], tokenizer.pad_token_id)
                for i in range(0, len(examples), 8)
            ]
        )
    held_out, calibration = batches
    return held_out, [{k: v for k, v in b.items() if k != "labels"} for b in calibration]


def make(name: str, base, quantized, adapted, calibration, tokenizer, args):
    """The model of a row. A merged one is a copy."""
    if name in ("base", "base_4bit", "adapter"):
        return {"base": base, "base_4bit": quantized, "adapter": adapted}[name]
    model = copy.deepcopy(adapted)
    if name == "merged_16bit":
        # Round to fp16, but compute in fp32 like the other rows.
        return qlora_ext.merge_and_unload(model, torch.float16).float()
    if name == "requantized":
        for module in [m for m in model.modules() if isinstance(m, LoraLinear4bit)]:
            dense = dense_layer(module, torch.float32)
            replace_module(model, module, Linear4bit.from_linear(dense, module.config))
        return model
    if "own_text" in name:
        calibration = qlora_ext.write_calibration(model, tokenizer)
    sources = {
        "from_base": {"base": base},
        "calibrated": {"calibration": calibration},
        "own_text": {"calibration": calibration},
    }[name]
    return qlora_ext.merge_into_4bit(model, **sources, hessian_bytes=args.hessian_bytes)


def show(results: dict) -> None:
    rows = results["rows"]
    loss = {name: row["held_out_loss"] for name, row in rows.items()}
    gain = loss.get("base_4bit", 0) - loss.get("adapter", 0)
    print("\n| | held-out loss | share of the gain | processor seconds |\n|---|---|---|---|")
    for name, label in ROWS.items():
        if name not in rows:
            continue
        share = (loss["base_4bit"] - loss[name]) / gain if gain else float("nan")
        merged = not name.startswith(("base", "adapter"))
        seconds = f"{rows[name]['merge_processor_seconds']:.0f}" if merged else ""
        kept = "" if name == "base" else f"{share:.0%}"
        print(f"| {label} | {loss[name]:.4f} | {kept} | {seconds} |")


def machine(args) -> dict:
    found = finetune.machine()
    kept = ("cpu", "cores", "torch_threads", "memory_bytes", "load_average", "gpu")
    return {
        **{key: found[key] for key in kept if key in found},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def default_output() -> Path:
    """bench/results/merge-4bit-<machine>-<date>.json, where machine is the processor's name."""
    cpu = finetune.machine()["cpu"] or platform.machine()
    if torch.cuda.is_available():
        cpu = torch.cuda.get_device_name()
    name = "-".join("".join(c if c.isalnum() else " " for c in cpu.lower()).split())
    date = datetime.date.today().isoformat()
    cores = os.cpu_count()
    return Path(__file__).parent / "results" / f"merge-4bit-{name}-{cores}-cores-{date}.json"


if __name__ == "__main__":
    main()
