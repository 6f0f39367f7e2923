"""Two builds of the CPU kernels against each other: gemm_4bit and its backward, in fp32 or bf16.

Each side is a checkout whose library was built in place. The sides take turns, each round in a
process of its own; one thread's CPU time, the least of a few calls, and the median of the rounds.

    git worktree add ../before COMMIT
    (cd ../before && USE_CUDA=0 python setup.py build_ext --inplace)    # and here, if it changed
    python bench/two_builds.py ../before . [--dtype fp32] [--shape 2048x2048]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cpu

ROWS = (9, 16, 32, 64, 256, 512)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each op by rows, in this process."""
    import torch

    import qlora_ext

    where = Path(qlora_ext.__file__).resolve().parent.parent
    assert where == args.side.resolve(), f"qlora_ext is {where}, want {args.side}"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    N, K = map(int, args.shape.split("x"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    w4 = qlora_ext.quantize_4bit(torch.randn(N, K) * 0.02).op_args()
    ops = torch.ops.qlora_ext

    def least(call) -> float:
        call()
        times = []
        for _ in range(7):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
        return 1e3 * min(times)

    result = {"forward": [], "backward": []}
    for M in ROWS:
        x, dY = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        result["forward"].append(least(lambda x=x: ops.gemm_4bit(x, *w4)))
        result["backward"].append(least(lambda dY=dY: ops.gemm_4bit_backward(dY, *w4)))
    return result


def main() -> None:
    """Prints how many times faster the second side is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sides", type=Path, nargs="*", help="the old one and the new one")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--shape", default="2048x2048", help="NxK of the weight")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(measure(args)))
        return
    if len(args.sides) != 2:
        parser.error(f"got {len(args.sides)} folders, want two")
    settings = ["--dtype", args.dtype, "--shape", args.shape]
    rounds = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            command = [sys.executable, __file__, *settings, "--side", str(side)]
            environment = {**os.environ, **cpu.TOUCHED, "PYTHONPATH": str(side.resolve())}
            run = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            rounds[side].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{cpu.cpu_name()}, one thread, {args.shape} {args.dtype}, {args.rounds} rounds in turns")
    print("rows      " + "".join(f"{M:>8}" for M in ROWS))
    for op in ("forward", "backward"):
        old, new = (
            [statistics.median(run[op][i] for run in rounds[side]) for i in range(len(ROWS))]
            for side in args.sides
        )
        print(f"{op:10}" + "".join(f"{a / b:7.2f}x" for a, b in zip(old, new, strict=True)))


if __name__ == "__main__":
    main()
