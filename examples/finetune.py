"""QLoRA from end to end: quantize a language model to 4 bits, train LoRA, merge, generate text.

    python examples/finetune.py                         # SmolLM2-135M on Python's own docstrings
    python examples/finetune.py --model NAME_OR_FOLDER --data pairs.jsonl
    python examples/finetune.py --preset full --model ... --data ...   # the customary settings
    torchrun --nproc-per-node 2 examples/finetune.py ...    # each batch shared by two processes

Leaves in --output: report.json, loss.png, adapter/ (PEFT's format) and merged/ (a plain
transformers model). If a run is interrupted, the same command goes on where it stopped. Read main()
first: it has the steps in order.
"""

import argparse
import copy
import io
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import checkpoints
import instructions
import parallel
import smollm2
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

import qlora_ext

# The demonstration's defaults; every value is a flag.
DEMO = dict(
    learning_rate=2e-3,
    batch_size=4,
    micro_batch_size=2,
    weight_decay=0.01,
    warmup=10,
    steps=60,
    dropout=0.05,
    max_length=192,
    lora_layers="query,key,value,projection,mlp",
    minutes=6.0,
)
# The settings people start from for a model and data of their own.
FULL = dict(
    learning_rate=3e-4,
    batch_size=128,
    micro_batch_size=1,
    weight_decay=0.01,
    warmup=100,
    steps=50_000,
    dropout=0.05,
    max_length=512,
    lora_layers="query,value",
    minutes=0.0,
)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_STEPS = 20  # fewer teach the demonstration nothing worth reporting
# The only settings that may change when an interrupted run goes on.
NOT_COMPARED = ("output", "cache", "checkpoint_every", "fresh", "preset", "minutes")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=["demo", "full"], default="demo", help="defaults of the flags below")
    add("--model", default=None, help="folder or hub name; SmolLM2-135M-Instruct if left out")
    add("--data", type=Path, default=None, help="JSON lines; Python's docstrings if left out")
    add("--output", type=Path, default=Path("runs/demo"))
    add("--cache", type=Path, default=Path(".cache"), help="where the converted model is kept")
    add("--learning-rate", type=float, help="peak, after the warm-up; cosine decay to a tenth")
    add("--batch-size", type=int, help="pairs per optimizer step")
    add("--micro-batch-size", type=int, help="pairs per forward and backward pass")
    add("--weight-decay", type=float)
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--steps", type=int, help="optimizer steps; a number given here is not reduced")
    add(
        "--minutes",
        type=float,
        help="training is shortened to end after about so many; 0: no limit",
    )
    add("--max-length", type=int, help="tokens per pair; longer ones are cut")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16)
    add("--dropout", type=float, help="on the LoRA branch's input")
    add("--lora-layers", help="of query,key,value,projection,mlp,head")
    add("--target-modules", default=None, help="comma-separated names, instead of --lora-layers")
    add("--quant-type", default="nf4")
    add("--blocksize", type=int, default=64, help="weights per scale")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="of the activations")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--eval-pairs", type=int, default=64, help="held-out pairs that the losses are taken over")
    add("--prompt", default=None, help="what the model is asked before and after")
    add("--checkpoint-every", type=int, default=10, help="steps")
    add("--fresh", action="store_true", help="start over instead of going on from a checkpoint")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    args.steps_given = args.steps is not None
    for name, value in (DEMO if args.preset == "demo" else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (args.micro_batch_size * args.processes):
        several = f" x {args.processes} processes" if args.processes > 1 else ""
        parser.error(
            f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size}{several}"
        )
    return args


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model answers with letters that the encoding may lack: as on stderr, they are escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_arguments()
    parallel.start(args.device)
    transformers.utils.logging.disable_progress_bar()
    report = Report(args)
    torch.manual_seed(args.seed)

    choose_precision(args, report)
    tokenizer, model = load_base(args, report)
    train_pairs, held_out = load_pairs(args, tokenizer, report)
    resumed = find_checkpoint(args, report)

    if resumed is None:
        with report.timed("evaluate_base"):
            report.losses["base_unquantized"] = evaluate(model, held_out, args)
        say(f"Held-out loss of the unquantized base: {report.losses['base_unquantized']:.4f}")

    with report.timed("quantize"):
        config = qlora_ext.QuantConfig(quant_type=args.quant_type, blocksize=args.blocksize)
        model = qlora_ext.quantize_model(model, config, progress_bar=parallel.is_first())
    say(f"{model.quantization_report}")

    if resumed is None:
        with report.timed("evaluate_4bit"):
            report.losses["base_4bit"] = evaluate(model, held_out, args)
        say(f"Held-out loss of the 4-bit base: {report.losses['base_4bit']:.4f}")
        report.answers["before"] = answer(model, tokenizer, report.prompt, args)

    model = qlora_ext.add_lora(model, lora_config(args))
    if parallel.is_first():
        qlora_ext.print_trainable_parameters(model)
    report.take_memory(model)
    with report.timed("train_and_checkpoints"):
        train(model, train_pairs, args, report, resumed)

    with report.timed("evaluate_trained"):
        report.losses["trained"] = evaluate(model, held_out, args)
    say(f"Held-out loss after training: {report.losses['trained']:.4f}")
    report.answers["after"] = answer(model, tokenizer, report.prompt, args)
    write_folder(args.output / "adapter", lambda folder: qlora_ext.save_adapter(model, folder))
    merge(model, tokenizer, held_out, args, report)
    if parallel.is_first():
        report.finish()


# --- before training


def choose_precision(args, report) -> None:
    """The activations' precision in training: bf16 if the machine computes it faster than fp32, as
    measured on layers like the model's, else fp32. (A CPU without bf16 instructions emulates them,
    which takes many times as long as fp32.)"""
    if args.precision != "auto":
        report.precision = {"chosen": args.precision, "why": "--precision"}
        return
    seconds = {name: seconds_of_layer(args.device, PRECISIONS[name]) for name in ("fp32", "bf16")}
    seconds = parallel.from_first(seconds)
    chosen = "bf16" if seconds["bf16"] * 1.2 < seconds["fp32"] else "fp32"
    times = ", ".join(f"{1e3 * taken:.1f} ms in {name}" for name, taken in seconds.items())
    why = f"a 4-bit layer and a dense one, forward and backward, took {times}"
    say(f"Activations in {chosen}: {why}")
    report.precision = {"chosen": chosen, "why": why}


def seconds_of_layer(device: str, dtype: torch.dtype, rows=256, inner=576, outer=1536) -> float:
    quantized = qlora_ext.quantize_4bit(torch.randn(outer, inner, device=device))
    dense = torch.randn(outer, inner, device=device)
    x = torch.randn(rows, inner, device=device, requires_grad=True)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        with lower_precision(device, dtype):
            (qlora_ext.linear_4bit(x, quantized) @ dense).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def lower_precision(device: str, dtype: torch.dtype):
    """Matrix products in `dtype` below this point; nothing changes for fp32."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def load_base(args, report):
    """The tokenizer and the unquantized model: in fp32 on a CPU, on other devices in the dtype that
    it was saved in. Layers that stay unquantized keep it; held-out losses are computed in it."""
    name = args.model
    if name is None:
        with report.timed("convert"):  # takes no time if it was done before
            if parallel.is_first():
                name = smollm2.folder(args.cache)
            name = parallel.from_first(name)
    with report.timed("load"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32 if args.device == "cpu" else "auto"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, model.to(args.device).eval()


def load_pairs(args, tokenizer, report):
    """(training examples, held-out examples), tokenized; sets the report's prompt."""
    with report.timed("data"):
        read = instructions.stdlib_pairs if args.data is None else instructions.file_pairs
        train_pairs, held_out_pairs = read() if args.data is None else read(args.data)
        report.prompt = args.prompt or instructions.demo_prompt(held_out_pairs)
        held_out_pairs = instructions.sample(held_out_pairs, args.eval_pairs, args.seed)
        train_examples = instructions.encode_all(tokenizer, train_pairs, args.max_length)
        held_out = instructions.encode_all(tokenizer, held_out_pairs, args.max_length)
    report.data = {
        "source": str(args.data or "docstrings of the standard library of Python "
                      + platform.python_version()),
        "train_pairs": len(train_examples),
        "held_out_pairs": len(held_out),
        "held_out_answer_tokens": sum(
            label != instructions.IGNORED_LABEL for _, labels in held_out for label in labels
        ),
    }  # fmt: skip
    say(f"{len(train_examples)} pairs to train on, {len(held_out)} held out to measure by")
    # Like lengths together, so that little is padding.
    held_out.sort(key=lambda example: len(example[0]))
    return instructions.Batches(train_examples, args.micro_batch_size, args.seed,
                                tokenizer.pad_token_id), [
        instructions.collate(held_out[i : i + 4], tokenizer.pad_token_id)
        for i in range(0, len(held_out), 4)
    ]  # fmt: skip


def lora_config(args) -> qlora_ext.LoraConfig:
    common = dict(r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout)
    if args.target_modules:
        return qlora_ext.LoraConfig(**common, target_modules=args.target_modules.split(","))
    chosen = args.lora_layers.split(",")
    known = ("query", "key", "value", "projection", "mlp", "head")
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"--lora-layers: no layer is called {', '.join(unknown)}; want {known}")
    return qlora_ext.LoraConfig(**common, **{name: name in chosen for name in known})


# --- loss, training, answers


def token_losses(model, batch: dict) -> torch.Tensor:
    """The sum of the cross entropies of the batch's labelled tokens, in fp32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    kept = labels != instructions.IGNORED_LABEL  # before fp32: most logits are the prompts'
    return F.cross_entropy(logits[:, :-1][kept].float(), labels[kept], reduction="sum")


def labelled(batch: dict) -> int:
    return int((batch["labels"][:, 1:] != instructions.IGNORED_LABEL).sum())


def on_device(batch: dict, args) -> dict:
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(model, batches: list[dict], args) -> float:
    """Mean cross entropy per answer token, in nats; each process takes some of the batches."""
    was_training = model.training
    model.eval()
    bar = progress(desc="evaluating", leave=False, iterable=parallel.share(batches))
    own = sum(token_losses(model, on_device(b, args)).item() for b in bar)
    model.train(was_training)
    (total,) = parallel.total(own)
    return total / sum(map(labelled, batches))


def rate(step: int, steps: int, args) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, steps - args.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def train(model, batches: instructions.Batches, args, report, resumed: dict | None) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay
    )
    if args.gradient_checkpointing:
        before_5_23 = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", before_5_23)
        enable({"use_reentrant": False})
        model.config.use_cache = False
    wrapped = parallel.wrapped(model)
    if parallel.rank():
        torch.manual_seed(args.seed + parallel.rank())  # each process drops other inputs out
    precision = PRECISIONS[report.precision["chosen"]]
    scaler = torch.amp.GradScaler(args.device, enabled=precision == torch.float16)
    per_step = args.batch_size // args.micro_batch_size
    steps, step = args.steps, 0
    if resumed is not None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(resumed["adapter"][name])
        optimizer.load_state_dict(resumed["optimizer"])
        # Dropout goes on with the numbers it would have drawn.
        set_random_states(resumed["random"][parallel.rank()], args)
        if resumed.get("scaler"):  # empty where there is nothing to scale
            scaler.load_state_dict(resumed["scaler"])
        steps, step = resumed["steps"], resumed["step"]

    def save() -> None:
        state = {
            "step": step,
            "steps": steps,
            "adapter": {name: p.detach().cpu() for name, p in trained.items()},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": parallel.gathered(random_states(args)),
            **report.to_resume(),
        }
        if not parallel.is_first():
            return
        try:
            report.last_checkpoint = checkpoints.save_checkpoint(args.output / "checkpoints", state)
        except OSError as e:  # training is worth more than this checkpoint; the one before it stays
            say(f"The checkpoint of step {step} could not be written ({e}); training goes on")

    model.train()
    bar = progress(total=steps, initial=step, desc="training")
    durations = []
    with stop_signals() as stopped:
        while step < steps:
            start = time.perf_counter()
            micro_batches = [batches.at(step * per_step + i) for i in range(per_step)]
            answer_tokens = sum(map(labelled, micro_batches))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate(step, steps, args)
            loss = 0.0
            own = parallel.share(micro_batches)
            for i, batch in enumerate(own):
                with parallel.averaging(wrapped, now=i == len(own) - 1):
                    with lower_precision(args.device, precision):
                        share = token_losses(wrapped, on_device(batch, args)) / answer_tokens
                    # Averaged over the processes, gradients are to be summed over them.
                    scaler.scale(share * parallel.count()).backward()
                loss += share.item()
            (loss,) = parallel.total(loss)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if not math.isfinite(loss):
                raise SystemExit(
                    f"The loss of step {step} is {loss}; the last checkpoint is "
                    f"{report.last_checkpoint}. Try a lower --learning-rate, or --precision fp32."
                )

            durations.append(time.perf_counter() - start)
            tokens = sum(int(b["attention_mask"].sum()) for b in micro_batches)
            report.step_done(loss, tokens, durations[-1])
            bar.set_postfix_str(f"loss {report.recent_loss():.3f}, {report.speed():.0f} tokens/s")
            bar.update()
            # Three steps tell the pace; the first is left out, since it also warms caches up.
            if len(durations) >= 4 and not args.steps_given and args.minutes and step < steps:
                used = sum(h["seconds"] for h in report.history)
                used, pace = parallel.from_first((used, statistics.median(durations[1:][-5:])))
                steps = bar.total = fitting_steps(
                    steps, step, used, pace, args, first=len(durations) == 4
                )
                bar.refresh()
            if any(parallel.total(bool(stopped))):  # of whichever process was told
                save()
                bar.close()
                raise SystemExit(
                    f"Interrupted after step {step} of {steps}; checkpoint: "
                    f"{report.last_checkpoint}. The same command goes on from there."
                )
            if step % args.checkpoint_every == 0 or step == steps:
                save()
    bar.close()


def random_states(args) -> dict:
    """The states of the generators that a run on this device draws from."""
    states = {"rng": torch.get_rng_state()}
    if torch.device(args.device).type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(args.device)
    return states


def set_random_states(states: dict, args) -> None:
    torch.set_rng_state(states["rng"])
    if "cuda_rng" in states:
        torch.cuda.set_rng_state(states["cuda_rng"], args.device)


def fitting_steps(steps: int, step: int, used: float, pace: float, args, first: bool) -> int:
    """How many steps to take in all, so that training ends in time.

    It is asked after every step, because a machine may slow down: then fewer steps are left than
    were planned, and the learning rate, which goes by their number, falls faster. The number never
    grows. After the first time, a tenth of the time may be missing before it changes.

    Args:
        steps: the number planned so far.
        step: steps taken, in `used` seconds.
        pace: seconds of a step now.
        first: whether nothing was said about it yet.
    """
    allowed = args.minutes * 60
    end = used + (steps - step) * pace
    slack = 0 if first else 0.1 * allowed
    # Two more steps at least, in which the learning rate comes down.
    fitting = step + max(2, int((allowed - used) / pace))
    fitting = max(min(MIN_STEPS, steps), fitting)
    fits = end <= allowed + slack or fitting >= steps
    if first or not fits:
        plan = "taking them all" if fits else f"taking {fitting}"
        say(
            f"{steps} steps end after {end / 60:.1f} minutes, at {pace:.1f} s each now: {plan} "
            f"({args.minutes:g} minutes are allowed; change with --minutes or --steps)"
        )
    return steps if fits else fitting


@contextmanager
def stop_signals():
    """A list that Ctrl-C or SIGTERM makes non-empty, so that the current step can end first.
    A second Ctrl-C interrupts at once."""
    stopped = []

    def note(number, frame):
        stopped.append(number)
        signal.signal(number, previous[number])
        say("Stopping after this step (again: at once)")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@torch.no_grad()
def answer(model, tokenizer, prompt: str, args) -> str:
    """The model's answer to `prompt`: the likeliest token each time."""
    if not parallel.is_first():
        return ""
    was_training = model.training
    model.eval()
    ids = torch.tensor([instructions.prompt_ids(tokenizer, prompt)], device=args.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=64,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def merge(model, tokenizer, held_out, args, report) -> None:
    """Merges into fp32, bf16 and fp16, measures each one's held-out loss and saves the fp16 model.

    The merged weights are rounded to that dtype. The loss is computed as the adapter's was, in the
    dtype of the model's unquantized part, so that only the rounding differs.
    """
    computed_in = model.get_input_embeddings().weight.dtype
    say("Merging the adapter into fp32, bf16 and fp16 weights")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with report.timed(f"merge_{name}"):
            merged = qlora_ext.merge_and_unload(copy.deepcopy(model), dtype, progress_bar=False)
        if name == "fp16":
            with report.timed("save_merged"):
                write_folder(
                    args.output / "merged",
                    lambda folder, merged=merged: (
                        merged.save_pretrained(folder),
                        tokenizer.save_pretrained(folder),
                    ),
                )
        merged.to(computed_in)
        with report.timed(f"evaluate_{name}"):
            report.losses[f"merged_{name}"] = evaluate(merged, held_out, args)
        del merged


# --- resuming and reporting


def settings(args) -> dict:
    """What a resumed run must have in common with its first part, as plain values."""
    return {
        name: value if isinstance(value, (int, float, bool, type(None))) else str(value)
        for name, value in vars(args).items()
        if name not in NOT_COMPARED
    }


def find_checkpoint(args, report) -> dict | None:
    """The state that this run goes on from, or None."""
    if args.fresh:
        return None
    found = None
    if parallel.is_first():
        found = checkpoints.load_newest(args.output / "checkpoints")
    found = parallel.from_first(found)
    if found is None:
        return None
    state, path = found
    then, now = state["settings"], settings(args)
    different = [name for name in now if then.get(name) != now[name]]
    if different:
        changes = ", ".join(f"{name} was {then.get(name)}, is {now[name]}" for name in different)
        raise SystemExit(
            f"{path} is of a run with other settings ({changes}): give its settings to go on with "
            "it, --fresh to start over, or another --output"
        )
    report.resume(state, path)
    where = f"step {state['step']} of {state['steps']}"
    say(f"Going on from {where} in {report.precision['chosen']} ({path}; --fresh starts over)")
    return state


class Report:
    """What report.json will hold; `to_resume` and `resume` carry it through an interruption."""

    def __init__(self, args):
        self.args, self.started = args, time.perf_counter()
        self.losses, self.seconds, self.answers, self.data = {}, {}, {}, {}
        self.history = []  # of {"loss", "tokens", "seconds"}, one a step
        self.precision, self.memory, self.prompt = {}, {}, ""
        self.resumed_at, self.last_checkpoint = [], None

    @contextmanager
    def timed(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        self.memory.setdefault("peak_rss_bytes_after", {})[name] = peak_memory()["peak_rss_bytes"]

    def take_memory(self, model) -> None:
        memory = qlora_ext.memory_report(model)
        self.memory |= {
            "bytes_by_part": memory.parts,
            "total_bytes": memory.total,
            "bits_per_packed_weight": memory.bits_per_weight,
            "share_of_weights_packed": model.quantization_report.quantized_share,
        }
        say(str(memory))

    def step_done(self, loss: float, tokens: int, seconds: float) -> None:
        self.history.append({"loss": loss, "tokens": tokens, "seconds": seconds})

    def recent_loss(self) -> float:
        recent = [h["loss"] for h in self.history[-10:]]
        return sum(recent) / len(recent)

    def speed(self) -> float:
        recent = self.history[-10:]
        return sum(h["tokens"] for h in recent) / sum(h["seconds"] for h in recent)

    def to_resume(self) -> dict:
        return {
            "settings": settings(self.args),
            "report": {
                name: getattr(self, name)
                for name in ("losses", "seconds", "answers", "history", "precision", "resumed_at")
            },
        }

    def resume(self, state: dict, path: Path) -> None:
        for name, value in state["report"].items():
            setattr(self, name, value)
        self.resumed_at.append(state["step"])
        self.last_checkpoint = path

    def finish(self) -> None:
        losses, args = self.losses, self.args
        self.seconds["train"] = sum(h["seconds"] for h in self.history)
        self.seconds["this_process"] = time.perf_counter() - self.started
        self.seconds["merge"] = sum(
            seconds for name, seconds in self.seconds.items() if name.startswith("merge_")
        )
        content = {
            "held_out_loss": losses,
            "loss_differences": {
                "trained_minus_base_4bit": losses["trained"] - losses["base_4bit"],
                "trained_minus_base_unquantized": losses["trained"] - losses["base_unquantized"],
                **{
                    f"merged_{name}_minus_trained": losses[f"merged_{name}"] - losses["trained"]
                    for name in ("fp32", "bf16", "fp16")
                },
            },
            "memory": {**self.memory, **peak_memory()},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "training": {
                "steps": len(self.history),
                "steps_asked": args.steps,
                "tokens": sum(h["tokens"] for h in self.history),
                "tokens_per_second": sum(h["tokens"] for h in self.history) / self.seconds["train"],
                "resumed_at": self.resumed_at,
                "history": self.history,
            },
            "answers": {"prompt": self.prompt, **self.answers},
            "precision": self.precision,
            "data": self.data,
            "settings": settings(args),
            "versions": versions(),
            "machine": machine(),
        }
        checkpoints.write_json(args.output / "report.json", content)
        plot(args.output / "loss.png", self.history, losses)
        # The run is complete, so its checkpoints are no longer needed.
        for file in (args.output / "checkpoints").glob("step-*.pt"):
            file.unlink()
        self.show(content)

    def show(self, content: dict) -> None:
        say("\nHeld-out loss, in nats per answer token")
        for name, value in content["held_out_loss"].items():
            say(f"  {name.replace('_', ' '):18} {value:.4f}")
        say(f"\nAsked:  {self.prompt}")
        say(f"Before: {self.answers['before']}")
        say(f"After:  {self.answers['after']}")
        say(
            f"\nPeak memory {content['memory']['peak_rss_bytes'] / 1e9:.2f} GB; "
            f"{content['training']['tokens_per_second']:.0f} tokens/s in training. "
            f"Written: {self.args.output}/{{report.json, loss.png, adapter, merged}}"
        )


def plain(value):
    """`value` with everything that JSON doesn't know turned into text."""
    return json.loads(json.dumps(value, default=lambda o: getattr(o, "__dict__", None) or str(o)))


def peak_memory() -> dict:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024)}
    if torch.cuda.is_available():
        peaks["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "qlora_ext": plain(qlora_ext.build_info())}
    for package in ("torch", "transformers", "peft", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    found = {
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def plot(path: Path, history: list[dict], losses: dict) -> None:
    import io

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps = range(1, len(history) + 1)
    raw = [h["loss"] for h in history]
    last_ten = [raw[max(0, i - 9) : i + 1] for i in range(len(raw))]
    smooth = [sum(ten) / len(ten) for ten in last_ten]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(steps, raw, color="0.75", linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="training, mean of 10 steps")
    for name, label, colour, style in (
        ("base_unquantized", "held out: unquantized base", "tab:green", "--"),
        ("base_4bit", "held out: 4-bit base", "tab:red", "--"),
        ("trained", "held out: 4-bit base + adapter", "tab:blue", "-."),
        ("merged_fp16", "held out: merged, fp16", "black", ":"),
    ):
        axes.axhline(losses[name], color=colour, linestyle=style, linewidth=1.2,
                     label=f"{label}  {losses[name]:.3f}")  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="cross entropy, nats per answer token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    checkpoints.write_file(path, image.getvalue())


def write_folder(path: Path, fill) -> None:
    """`checkpoints.write_folder` by the first process."""
    if parallel.is_first():
        checkpoints.write_folder(path, fill)


def progress(**settings) -> tqdm:
    """A progress bar, of the first process."""
    return tqdm(**settings, file=sys.stdout, disable=not parallel.is_first())


def say(text: str) -> None:
    if parallel.is_first():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def run() -> None:
    """main(), with a short message instead of a traceback if something outside stops it."""
    again = (
        "Checkpoints are written whole or not at all: the same command goes on from the last one"
    )
    try:
        main()
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"{type(e).__name__}: {e}\n{again}, if there is one.") from e
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted at once. {again}, if there is one.") from None
    parallel.finish()


if __name__ == "__main__":
    run()
