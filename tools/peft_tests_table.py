"""peft_tests_table.py FOLDER: the outcomes of PEFT's tests side by side (tools/peft_tests.sh).

The exit status is 1 if a test that passes on bitsandbytes fails on ours and is not in EXPECTED, or
if a test in EXPECTED passes.
"""

import json
import sys
from pathlib import Path

RUNS = ("stock", "config", "layers")

# (part of a test's name, run): why it cannot pass there.
EXPECTED = {
    ("test_olora_with_quantized_model", run): "it asks for bitsandbytes' class of weights"
    for run in RUNS[1:]
}
EXPECTED |= {
    ("test_replace_lora_weights_with_local_model", run): "it expects an error, but ours finds the "
    "unquantized model's folder by itself"
    for run in RUNS[1:]
}
EXPECTED |= {
    ("test_4bit_merge_lora", run): "it expects 4-bit layers after a merge; ours are 16-bit"
    for run in RUNS[1:]
}
EXPECTED["compute_dtype_diverges", "config"] = "QLoraExtConfig has no compute dtype"


def why(name: str, run: str) -> str:
    test = name.partition("[")[0]
    reasons = (EXPECTED[key] for key in EXPECTED if test.endswith(key[0]) and key[1] == run)
    return next(reasons, "")


def outcomes_of(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["name"]: row for row in rows}


def main(folder: Path) -> int:
    found = {run: outcomes_of(folder / f"{run}.jsonl") for run in RUNS}
    stock = found["stock"]
    # A test that ran counts only if it packed layers. Skipped tests all count.
    names = [
        name
        for name, row in stock.items()
        if row["outcome"] == "skipped" or any(found[run].get(name, row)["packs"] for run in RUNS)
    ]
    faults, rows = [], []
    for name in names:
        outcomes = [found[run].get(name, {}).get("outcome", "missing") for run in RUNS]
        rows.append((name.replace(".py::", "::"), *outcomes))
        for run in RUNS[1:]:
            fails = found[run].get(name, {}).get("outcome") != "passed"
            if stock[name]["outcome"] == "passed" and fails != bool(why(name, run)):
                faults.append(f"{run}: {name}: {found[run].get(name, {}).get('reason', 'missing')}")
    for row in (("test", *RUNS), *rows):
        print("{:<130} {:<8} {:<8} {:<8}".format(*row))
    print()
    for run in RUNS:
        outcomes = [found[run].get(name, {}).get("outcome", "missing") for name in names]
        counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
        print(run, " ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    skipped = [stock[name]["reason"] for name in names if stock[name]["outcome"] == "skipped"]
    for reason in sorted(set(skipped)):
        print(f"skipped {skipped.count(reason)}: {reason}")
    for key, reason in EXPECTED.items():
        print(f"expected to fail ({key[1]}): {key[0]}: {reason}")
    for fault in faults:
        print(f"FAULT {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
