"""A training step with `add_lora(..., share_inputs=True)` against one without, on one model in
turns. No dropout: with it, layers share nothing.

On the CPU: CPU time of one thread, so that a busy machine matters little, in memory that was
touched before. On a GPU: wall time.

    python bench/shared_input.py [--device cpu] [--dtype fp32] [--length 256] [--rounds 7]
"""

import argparse
import statistics
import time

import cpu


def main() -> None:
    """Prints both medians and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--length", type=int, default=256, help="tokens in each of two rows")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if on_cpu:
        cpu.restart_with(cpu.TOUCHED)

    import torch

    import qlora_ext
    from qlora_ext.nn import LoraLinear4bit

    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = qlora_ext.quantize_model(cpu.smollm2(dtype).to(args.device), progress_bar=False).train()
    config = qlora_ext.LoraConfig(key=True, projection=True, mlp=True, lora_dropout=0.0)
    qlora_ext.add_lora(model, config, share_inputs=True)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear4bit)]
    groups = {True: [layer.shared_input for layer in layers], False: [None] * len(layers)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, 49152, (2, args.length), device=args.device)

    def seconds() -> float:
        if on_cpu:
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times = {True: [], False: []}
    for round_ in range(args.rounds + 1):
        for shared in (True, False) if round_ % 2 else (False, True):
            for layer, group in zip(layers, groups[shared], strict=True):
                layer.shared_input = group
            start = seconds()
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            if round_ > 0:
                times[shared].append(seconds() - start)
    ratios = [s / a for s, a in zip(times[True], times[False], strict=True)]
    print(
        f"{args.device}, {args.dtype}, 2 x {args.length} tokens: shared "
        f"{statistics.median(times[True]):.3f} s, alone {statistics.median(times[False]):.3f} s; "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
