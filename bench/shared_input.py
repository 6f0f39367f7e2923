"""A training step whose q, k, v and gate, up share a dropout mask and x A^T, against one whose
layers each have their own.

Same model, in turns; the CPU time of one thread, so that a busy machine matters little, in memory
that was touched before.

    python bench/shared_input.py [--dropout 0.05] [--dtype fp32] [--length 256] [--rounds 7]
"""

import argparse
import statistics
import time

import cpu


def main() -> None:
    """Prints both medians and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--length", type=int, default=256, help="tokens in each of two rows")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cpu.restart_with(cpu.TOUCHED)

    import torch

    import qlora_ext
    from qlora_ext.nn.shared_input import SharedInput

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = qlora_ext.quantize_model(cpu.smollm2(dtype), progress_bar=False).train()
    qlora_ext.add_lora(
        model,
        qlora_ext.LoraConfig(key=True, projection=True, mlp=True, lora_dropout=args.dropout),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, 49152, (2, args.length))
    rules = {"shared": SharedInput.pays, "alone": lambda *_: False}
    seconds = {name: [] for name in rules}
    for round_ in range(args.rounds + 1):
        for name in rules if round_ % 2 else reversed(rules):
            SharedInput.pays = rules[name]
            start = time.thread_time()
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            if round_ > 0:
                seconds[name].append(time.thread_time() - start)
    ratios = [s / a for s, a in zip(seconds["shared"], seconds["alone"], strict=True)]
    medians = ", ".join(f"{name} {statistics.median(t):.3f} s" for name, t in seconds.items())
    print(
        f"{args.dtype}, dropout {args.dropout:g}, 2 x {args.length} tokens: {medians}; ratio "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
