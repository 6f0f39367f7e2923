"""What the check of the packed bytes costs a layer's forward pass (docs/models.md, averaging).

First it measures the check in the layer: with and without it, in turns of ten calls with one row of
x. Compare equal percentiles of both, because on a busy machine single runs differ by more than the
check takes. Then it measures the check alone, called in a loop, as a line of Python is usually
timed. In the layer it takes longer, because other code has used the caches.

    python bench/forward_overhead.py [--size 64] [--rounds 10000] [--device cpu] [--adapted]
"""

import argparse
import gc
import random
import time
import timeit

import torch

from qlora_ext.nn import Linear4bit, LoraLinear4bit
from qlora_ext.nn.packed import _Packed4bit

CALLS = 10
PERCENTILES = (1, 5, 10, 25)


def bare(self, is_traced):
    """_w4 without the check."""
    d = self.__dict__
    p = d["_parameters"]
    try:
        weight = p["weight"]
    except KeyError:
        raise self._packed_error("weight") from None
    return (weight, p["weight_absmax"], p["weight_nested"], p["weight_mean"], *d["_format"])


def seconds_by_way(layer: torch.nn.Module, x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Sorted seconds per call: with the check, without it, and without it again (the noise)."""
    checked = _Packed4bit._w4
    seconds = {"with": [], "without": [], "again": []}
    ways = list(seconds)
    try:
        for _ in range(rounds):
            random.shuffle(ways)
            for way in ways:
                _Packed4bit._w4 = checked if way == "with" else bare
                layer(x)
                start = time.perf_counter()
                for _ in range(CALLS):
                    layer(x)
                seconds[way].append((time.perf_counter() - start) / CALLS)
    finally:
        _Packed4bit._w4 = checked
    return {way: sorted(values) for way, values in seconds.items()}


def seconds_alone(layer: torch.nn.Module, rounds: int) -> float:
    """Seconds that the check takes alone in a loop: the least of 20 differences."""

    def least(call) -> float:
        return min(timeit.repeat(lambda: call(layer, False), number=rounds, repeat=5)) / rounds

    return min(least(_Packed4bit._w4) - least(bare) for _ in range(20))


def main() -> None:
    """Prints microseconds per call at several percentiles."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=64, help="in and out features")
    parser.add_argument("--rounds", type=int, default=10000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapted", action="store_true", help="with a LoRA adapter")
    args = parser.parse_args()

    torch.set_num_threads(1)
    kind = LoraLinear4bit if args.adapted else Linear4bit
    layer = kind(args.size, args.size, device=args.device).eval()
    x = torch.randn(1, args.size, device=args.device)
    gc.disable()
    with torch.no_grad():
        layer(x)
        seconds = seconds_by_way(layer, x, args.rounds)
    print(f"{kind.__name__} {args.size} x {args.size}, one row, {args.device}; us per call")
    for percentile in PERCENTILES:
        at = args.rounds * percentile // 100
        without, with_, again = (1e6 * seconds[w][at] for w in ("without", "with", "again"))
        print(
            f"percentile {percentile:2}: {without:.2f} without, {with_ - without:+.2f} with the "
            f"check (noise {again - without:+.2f})"
        )
    print(f"alone in a loop: {1e6 * seconds_alone(layer, args.rounds):+.2f}")


if __name__ == "__main__":
    main()
