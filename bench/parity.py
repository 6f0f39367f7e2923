"""Training parity: the same tiny model, seed and data trained on the CPU and on the GPU.

    python bench/parity.py [--device cuda]

Prints both sides' losses step by step, and the peak memory of a larger model's training step next
to the figure of `qlora-ext estimate`. Exits with status 1 if the two sides differ by more than
BOUNDS. Memory is only shown. Needs transformers.

The model is a Llama with two layers, packed to NF4 with nested scales, with an adapter on every
linear layer. The adapters' B is not zero, so every gradient exists from the first step. Batches of
8 and of 288 tokens alternate: in bf16 the first uses the fused kernels, the second dequantizes in
chunks. The optimizer is plain SGD, because AdamW divides a gradient by its size and so would hide a
wrong factor.

It compares the loss of each step, and each parameter's gradient at the first step of each batch, by
|gpu - cpu| / |cpu| (norms; the largest counts).

Where the bounds come from. Both sides start from the same bytes and compute in the same dtype.
They differ in the order of sums, and so in what some sums are rounded to. The CPU's own paths
differ from each other in the same way, so they were measured: portable, AVX2 and AVX-512 with its
bf16 instructions, with this model and these 10 steps. The largest differences were

           of a loss   of a gradient
    fp32        2e-7            2e-6
    bf16        3e-4            3e-2     (between bf16 and fp32: 4e-4 and 9e-2)

The bf16 bounds are about three times that. The fp32 bounds are 50 times that, because the GPU's exp
and its long sums round differently; 2^-13 for a gradient still notices TF32, which keeps 10 bits.
The learning rate is small enough for a smooth descent. At ten times the rate, one rounding
difference grows until the two sides have nothing in common.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys

import torch

import qlora_ext
from qlora_ext.cli.estimate import SLACK, estimate

LORA = qlora_ext.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
TINY = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
}
BATCHES = ((1, 8), (4, 72))  # (sequences, tokens), in turn
STEPS, RATE = 10, 0.1
# dtype -> the largest relative difference of a loss, of a parameter's gradient
BOUNDS = {torch.float32: (1e-5, 2.0**-13), torch.bfloat16: (1e-3, 0.1)}

# The model whose memory is measured. It is large enough that workspaces matter little.
LARGE = {
    **TINY,
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
LARGE_SEQ = 2048


def build(dtype: torch.dtype, device: str):
    """The tiny model, made on the CPU and then moved, so that every device gets the same bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).to(dtype)
    qlora_ext.quantize_model(model, progress_bar=False)
    qlora_ext.add_lora(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.to(device).train()


def train(model, device: str) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The losses of all steps, and the gradients (by name) of the first step of each batch."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(16, shape, generator=generator).to(device) for shape in BATCHES]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    losses, gradients = [], []
    for step in range(STEPS):
        ids = data[step % len(data)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step < len(data):
            gradients.append({name: p.grad.detach().cpu().clone() for name, p in trained.items()})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).double().norm() / want.double().norm()).item()


def parity(dtype: torch.dtype, device: str) -> bool:
    """Trains on both sides and prints the table. Returns whether they stay within the bounds."""
    (want, wanted), (got, found) = (train(build(dtype, side), side) for side in ("cpu", device))
    of_loss, of_gradient = BOUNDS[dtype]
    good = True
    for step, (w, g) in enumerate(zip(want, got, strict=True)):
        relative = abs(g - w) / abs(w)
        within = relative <= of_loss  # false for NaN
        good &= within
        tokens = BATCHES[step % len(BATCHES)]
        print(
            f"| {dtype!s:14} | {step:4} | {tokens[0] * tokens[1]:6} | {w:9.6f} | {g:9.6f} | "
            f"{relative:.1e} | {of_loss:.1e} | {'' if within else 'DIFFERS'}"
        )
    for tokens, w, g in zip(BATCHES, wanted, found, strict=True):
        by_name = {name: off(g[name], w[name]) for name in w}
        worst = max(by_name, key=lambda name: (math.isnan(by_name[name]), by_name[name]))
        relative = by_name[worst]
        within = relative <= of_gradient
        good &= within
        print(
            f"| {dtype!s:14} | gradients of the first step, {tokens[0] * tokens[1]} tokens: "
            f"{relative:.1e} | {of_gradient:.1e} | {worst} {'' if within else 'DIFFERS'}"
        )
    return good


def peak_of_a_step(checkpointing: bool, device: str) -> int:
    """The most bytes that torch had allocated during a training step of the large model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    gc.collect()  # the model before this one
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**LARGE)).to(torch.bfloat16).train()
    qlora_ext.quantize_model(model, progress_bar=False)
    qlora_ext.add_lora(model, LORA)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(LARGE["vocab_size"], (1, LARGE_SEQ), device=device)
    for _ in range(2):  # the first makes the optimizer's state and cuBLAS's workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def memory(device: str) -> None:
    """Prints the measured peak next to the estimate, with and without checkpointing."""
    from transformers import LlamaConfig

    print("\n| peak memory of a step | measured, MiB | estimate, MiB | ratio |")
    for checkpointing in (False, True):
        found = estimate(
            LlamaConfig(**LARGE),
            seq=LARGE_SEQ,
            batch=1,
            quant=qlora_ext.QuantConfig(),
            lora=LORA,
            checkpointing=checkpointing,
        )
        said = sum(found.parts.values())
        peak = peak_of_a_step(checkpointing, device)
        name = "with checkpointing" if checkpointing else "without checkpointing"
        print(
            f"| {name:21} | {peak / 2**20:13.1f} | {said / 2**20:13.1f} | {peak / said:5.2f} | "
            + ("" if peak <= said * (1 + SLACK) else "MORE than estimated, slack included")
        )
    print("| (what torch allocates; the estimate's tensors, without the CUDA context)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="the other side")
    device = parser.parse_args().device
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("bench/parity.py: torch sees no GPU; --device cpu compares the CPU with itself")
    try:
        import transformers  # noqa: F401
    except ImportError:
        sys.exit("bench/parity.py: the model needs transformers: pip install transformers")
    print(f"| training on cpu and {torch.cuda.get_device_name() if on_gpu else device}")
    print(f"| dtype          | step | tokens | loss, cpu | loss, {device} | off | bound |")
    good = [parity(dtype, device) for dtype in BOUNDS]
    print("|", "parity: within the bounds" if all(good) else "parity: NO, the two sides differ")
    if on_gpu:
        sys.stdout.flush()
        memory(device)
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
