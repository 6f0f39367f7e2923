"""One layer of experts: our grouped products against a loop over the chosen experts, and against
transformers' dense `grouped_mm` in fp32. The layer is Qwen3-30B-A3B's: hidden size 2048,
intermediate 768, 128 experts of which a token takes 8.

One thread's CPU time in touched memory, so that a busy machine matters little; all contenders in
turns with cold caches, medians. The dense experts take 2.4 GB.

    python bench/experts.py [--dtype fp32] [--rounds 9] [--json FILE]
"""

import argparse
import json
import statistics
import time

import cpu

H, F, E, TOP_K, RANK = 2048, 768, 128, 8, 8
# (case, tokens) -> contender -> how many times faster we want to be
TARGETS = {
    ("forward", 1): {"calls": 1 / 1.05, "dense": 2.5},
    ("forward", 64): {"dense": 2.6},
    ("forward", 512): {"dense": 1.4},
    ("forward + backward, LoRA", 64): {"loop": 1.4},
    ("forward + backward, LoRA", 512): {"loop": 1.2},
}


class Layer:
    """The layer as `nn.Experts4bit`, with and without adapters on both stacks, and dense."""

    def __init__(self, dtype):
        import torch
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        from qlora_ext import dequantize_4bit
        from qlora_ext.nn import Experts4bit, LoraStack4bit

        self.torch, self.dtype = torch, dtype
        config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=F, num_experts=E)
        config._experts_implementation = "grouped_mm"
        self.dense = Qwen3MoeExperts(config).requires_grad_(False)
        for parameter in self.dense.parameters():
            parameter.normal_(0, 0.02)
        self.packed = Experts4bit.from_experts(self.dense)
        for name, stack in self.packed.stacks().items():
            dequantize_4bit(stack.quantized, out=self.dense.get_parameter(name).data)
        up, down = self.packed.up, self.packed.down
        q = up.quantized, down.quantized
        self.experts = [(q[0][e].op_args(), q[1][e].op_args()) for e in range(E)]
        self.lora = [LoraStack4bit.from_stack(stack, r=RANK) for stack in (up, down)]
        for stack in self.lora:
            torch.nn.init.normal_(stack.lora_B, 0, 0.01)
        self.adapted = Experts4bit(self.packed.template, *self.lora)

    def inputs(self, T: int):
        """x [T, H], the chosen experts [T, k] and their weights [T, k]."""
        torch = self.torch
        x = torch.randn(T, H).to(self.dtype)
        scores = torch.randn(T, E).softmax(-1)
        weights, chosen = scores.topk(TOP_K)
        return x, chosen, (weights / weights.sum(-1, keepdim=True)).to(self.dtype)

    def gate(self, h):
        gate, up = h.chunk(2, -1)
        return self.torch.nn.functional.silu(gate) * up

    def grouped(self, x, chosen, weights, lora):
        """Ours: one product for each projection."""
        return (self.adapted if lora else self.packed)(x, chosen, weights)

    def loop(self, x, chosen, weights, lora):
        """One expert after another, as in transformers' own loop and in our layers before."""
        torch = self.torch
        from qlora_ext import ops

        out = torch.zeros(x.shape, dtype=torch.float32)
        for e in chosen.unique().tolist():
            token, slot = torch.where(chosen == e)
            up, down = self.experts[e]
            if lora:
                (A, B), (A2, B2) = ((s.lora_A[e], s.lora_B[e]) for s in self.lora)
                h = self.gate(ops.lora_gemm_4bit(x[token], up, A, B, 2.0))
                y = ops.lora_gemm_4bit(h, down, A2, B2, 2.0)
            else:
                y = ops.gemm_4bit(self.gate(ops.gemm_4bit(x[token], up)), down)
            out.index_add_(0, token, (y * weights[token, slot, None]).float())
        return out.to(x.dtype)

    def calls(self, x, chosen, weights, lora):
        """The chosen experts' products alone, for one token."""
        from qlora_ext import ops

        for e in chosen[0].tolist():
            up, down = self.experts[e]
            y = ops.gemm_4bit(self.gate(ops.gemm_4bit(x, up)), down)
        return y

    def dense_grouped(self, x, chosen, weights, lora):
        """transformers' grouped_mm_experts_forward on the dequantized weights."""
        return self.dense(x, chosen, weights)


def measure(layer: Layer, case: str, T: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender."""
    torch = layer.torch
    lora = "LoRA" in case
    given = layer.inputs(T)

    def run(forward):
        if not lora:
            with torch.no_grad():
                return forward(*given, False)
        x = given[0].clone().requires_grad_()
        return forward(x, *given[1:], True).float().square().sum().backward()

    contenders = {"ours": layer.grouped, "loop": layer.loop}
    if not lora and T == 1:
        contenders["calls"] = layer.calls
    if not lora and layer.dtype == torch.float32:
        contenders["dense"] = layer.dense_grouped
    times = {name: [] for name in contenders}
    other = torch.zeros(2**26)  # 256 MB, written before each run: all start with cold caches
    for turn in range(rounds + 1):
        for name, forward in contenders.items():
            other.add_(1)
            start = time.thread_time()
            run(forward)
            if turn > 0:
                times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints a table; writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the rows there")
    args = parser.parse_args()
    cpu.restart_with(cpu.TOUCHED)

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = Layer({"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype])
    rows = []
    for case, T in TARGETS:
        ms = measure(layer, case, T, args.rounds if T < 512 else max(3, args.rounds // 3))
        targets = TARGETS[case, T] if args.dtype == "fp32" or "LoRA" in case else {}
        row = cpu.Row(f"{case}, T={T}", f"{E} x {2 * F} x {H}", ms, targets)
        rows.append(row)
        others = ", ".join(f"{row.ratio(name):.2f}x {name}" for name in ms if name != cpu.OURS)
        print(f"{row.case:36} ours {ms[cpu.OURS]:8.2f} ms   {others}   {row.verdict()}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(
                [vars(row) | {"cpu": cpu.cpu_name(), "dtype": args.dtype} for row in rows], file
            )


if __name__ == "__main__":
    main()
