"""The experts' ops for ops.py: valid arguments, and what they must give: each expert's rows bit for
bit what the plain op gives for them."""

import random

import torch

W4 = ("packed", "absmax", "nested", "mean", "shape", "blocksize", "quant_type", "codebook")
SIGNATURES = {
    "grouped_gemm_4bit": ["x", *W4, "offsets", "rows", "bias", "lora_S", "lora_B"],
    "grouped_gemm_4bit_backward": ["dY", *W4, "offsets", "lora_dS", "lora_A"],
    "grouped_lora_shrink": ["x", "lora_A", "scaling", "offsets", "rows"],
    "grouped_lora_shrink_backward": (
        ["dS", "x", "lora_A", "scaling", "offsets", "rows", "need_dx"]
    ),
    "grouped_lora_expand_backward": ["dY", "lora_S", "lora_B", "offsets"],
    "grouped_lora_gemm_4bit": (
        ["x", *W4, "lora_A", "lora_B", "scaling", "offsets", "rows", "bias"]
    ),
    "grouped_lora_gemm_4bit_backward": [
        *("dY", "x", "lora_S", *W4, "lora_A", "lora_B", "scaling", "offsets", "rows", "need_dx")
    ],
    "sum_rows": ["values", "order", "ends"],
}
INDICES = ("offsets", "rows", "order", "ends")  # int32 values that the op must check
SIZES = (0, 2, 4, 6, 16, 30, 32, 34, 64, 66, 96, 130)


def draw(rng: random.Random, draw_weight, floats) -> dict:
    """Valid arguments of all the ops, by name. draw_weight(shape) gives one expert's W4."""
    E, N, K = rng.choice((1, 2, 3, 5)), rng.choice(SIZES), rng.choice(SIZES)
    M, R = rng.choice((0, 1, 2, 5, 9, 17, 40)), rng.choice((1, 2, 5, 8, 17))
    dtype, lora_dtype = rng.choice(floats), rng.choice(floats)
    indexed = rng.random() < 0.5
    T = rng.choice((1, 3, 10)) if indexed else M

    def dense(*sizes, dtype=dtype):
        return torch.randn(sizes).to(dtype)

    def ends(count, most):
        return torch.tensor(sorted(rng.randint(0, most) for _ in range(count)), dtype=torch.int32)

    weights = [draw_weight((N, K))]
    settings = {k: weights[0][k] for k in ("blocksize", "quant_type", "codebook")}
    parts = {k: weights[0][k] for k in ("packed", "absmax", "nested", "mean")}
    values = {k: None if t is None else torch.stack([t] * E) for k, t in parts.items()}
    values["packed"] = torch.randint(0, 256, values["packed"].shape, dtype=torch.uint8)
    return {
        **values,
        **settings,
        "shape": [E, N, K],
        "x": dense(T, K),
        "dY": dense(M, N),
        "bias": rng.choice((None, dense(E, N))),
        "lora_A": dense(E, R, K, dtype=lora_dtype),
        "lora_B": dense(E, N, R, dtype=lora_dtype),
        "lora_S": dense(M, R, dtype=torch.float32),
        "dS": dense(M, R, dtype=torch.float32),
        "lora_dS": dense(M, R, dtype=torch.float32),
        "scaling": rng.choice((1.0, 0.0, -2.5)),
        "need_dx": rng.random() < 0.5,
        "offsets": ends(E, M),
        "rows": torch.randint(0, T, (M,), dtype=torch.int32) if indexed else None,
        "values": dense(T, K),
        "order": torch.randint(0, max(T, 1), (M if T else 0,), dtype=torch.int32),
        "ends": ends(rng.choice((1, 4)), M if T else 0),
    }


def spoil_index(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    wrong = (-1, -(2**31), 2**31 - 1, tensor.numel() + 1, 10)
    changed[rng.randrange(changed.numel())] = rng.choice(wrong)
    return changed


def expected(op: str, a: dict) -> tuple[torch.Tensor, ...]:
    """What the plain ops give, expert after expert."""
    ops = torch.ops.qlora_ext
    if op == "sum_rows":
        sums, begin = [], 0
        for end in a["ends"].tolist():
            total = torch.zeros(a["values"].shape[1])
            for row in a["order"][begin:end].tolist():
                total = total + a["values"][row].float()
            sums.append(total)
            begin = end
        return (torch.stack(sums).to(a["values"].dtype),) if sums else (a["values"].new_empty(0),)
    E = len(a["offsets"])
    x = a.get("x")
    if x is not None and a.get("rows") is not None:
        x = x[a["rows"].long()]
    results, begin, M = [], 0, len(x if x is not None else a["dY"])
    for e, end in enumerate(a["offsets"].tolist()):

        def mine(name, begin=begin, end=end):
            value = x if name == "x" else a.get(name)
            return None if value is None else value[begin:end]

        def of(name, e=e):
            return None if a.get(name) is None else a[name].reshape(E, *a[name].shape[1:])[e]

        w4 = ()
        if "packed" in a:
            stats = (None if a[k] is None else a[k].reshape(E, -1)[e] for k in W4[:4])
            w4 = (*stats, a["shape"][1:], *(a[k] for k in W4[5:]))
        A, B, s = of("lora_A"), of("lora_B"), a.get("scaling")
        call = getattr(ops, op.removeprefix("grouped_"))
        args = {
            "grouped_gemm_4bit": (mine("x"), *w4, of("bias"), mine("lora_S"), B),
            "grouped_gemm_4bit_backward": (mine("dY"), *w4, mine("lora_dS"), A),
            "grouped_lora_shrink": (mine("x"), A, s),
            "grouped_lora_shrink_backward": (mine("dS"), mine("x"), A, s, a.get("need_dx")),
            "grouped_lora_expand_backward": (mine("dY"), mine("lora_S"), B),
            "grouped_lora_gemm_4bit": (mine("x"), *w4, A, B, s, of("bias")),
            "grouped_lora_gemm_4bit_backward": (
                *(mine("dY"), mine("x"), mine("lora_S"), *w4, A, B, s, a.get("need_dx")),
            ),
        }[op]
        result = call(*args)
        results.append(result if isinstance(result, tuple) else (result,))
        begin = end
    rest = M - begin
    # dA and dB are the last results of their ops, and one an expert; the others are rows.
    stacked = {"grouped_lora_shrink_backward": 1, "grouped_lora_expand_backward": 1}
    stacked = stacked.get(op, 2 if op == "grouped_lora_gemm_4bit_backward" else 0)
    want = []
    for i, parts in enumerate(zip(*results, strict=True)):
        if i >= len(results[0]) - stacked:
            want.append(torch.stack(parts))
        elif "need_dx" in a and not a["need_dx"] and i == 0:
            want.append(parts[0])
        else:
            want.append(torch.cat([*parts, parts[0].new_zeros(rest, *parts[0].shape[1:])]))
    return tuple(want)


def check(op: str, args: dict, result) -> None:
    """Raises AssertionError where a result is not what the plain ops give, NaN for NaN."""
    got = result if isinstance(result, tuple) else (result,)
    for i, (g, w) in enumerate(zip(got, expected(op, args), strict=True)):
        if g.numel() == 0 and w.numel() == 0:
            continue
        same = g.shape == w.shape and torch.equal(g.isnan(), w.isnan())
        if not (same and torch.equal(g.nan_to_num(), w.nan_to_num())):
            raise AssertionError(f"result {i} is not what the plain op gives for each expert")
