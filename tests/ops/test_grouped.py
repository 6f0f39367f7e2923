"""The ops of a mixture of experts on every backend: each expert's rows against the reference and
against that backend's ops for one weight, and what offsets and rows may be."""

import contextlib

import numpy as np
import pytest
import torch

import reference as R
from cases import CONFIGS, DTYPES, Tolerance, assert_close, assert_same_bytes, make_stack
from conftest import Backend
from simt.sweep import lawful

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Rows of each expert, how many sorted rows there are, how many rows x has (None: no index).
ROUTES = {
    "some": ([3, 0, 7, 1, 5], 20, 11),
    "sorted": ([3, 0, 7, 1, 5], 16, None),
    "decoding": ([0] * 20 + [1] + [0] * 15 + [1, 1] + [0] * 2, 3, 1),
    "all at one": ([0, 70, 0], 70, 40),
    "one expert": ([13], 13, 13),
    "nobody": ([0, 0], 9, 4),
    "no rows": ([0, 0, 0], 0, 4),
    "many": ([90, 41], 140, 60),
    "a warp of experts": ([1] * 32, 40, 8),
}
LORA_TOLERANCE = {"cpu": Tolerance(), "simt": Tolerance(factor=4.0), "cuda": Tolerance(factor=4.0)}
# Tensor cores keep 16 bits of S and dS; an expert with one row has no sum that averages it out.
GRADIENT = Tolerance(4.0, 3e-5)


def np64(t):
    return t.detach().double().cpu().numpy()


class Problem:
    """Inputs of one size on a backend's device, and each expert's share of them."""

    def __init__(self, backend, route, N, K, dtype, r=5, config="nf4"):
        sizes, self.M, T = ROUTES[route]
        self.E, self.N, self.K, self.dtype = len(sizes), N, K, dtype
        self.arrays, self.q = make_stack((self.E, N, K), CONFIGS[config], backend.device)
        self.ends = np.cumsum(sizes).tolist()
        on = lambda t, d=FP32: t.to(d).to(backend.device)  # noqa: E731
        self.offsets = on(torch.tensor(self.ends), torch.int32)
        self.rows = None if T is None else on(torch.randint(0, T, (self.M,)), torch.int32)
        self.x = on(torch.randn(self.M if T is None else T, K), dtype)
        self.dY = on(torch.randn(self.M, N), dtype)
        self.bias = on(torch.randn(self.E, N), dtype)
        self.A = on(torch.randn(self.E, r, K) / K**0.5)
        self.B = on(torch.randn(self.E, N, r) * 0.1)
        self.S, self.dS = on(torch.randn(self.M, r) * 0.3), on(torch.randn(self.M, r) * 0.3)
        self.x_sorted = self.x if T is None else self.x[self.rows.long()]

    def experts(self):
        """(expert, its rows) for all."""
        return [
            (e, slice(begin, end))
            for e, (begin, end) in enumerate(zip([0, *self.ends], self.ends, strict=False))
        ]

    def results(self, ops):
        w4 = self.q.op_args()
        y = ops.grouped_gemm_4bit(self.x, *w4, self.offsets, self.rows, self.bias, self.S, self.B)
        dX = ops.grouped_gemm_4bit_backward(self.dY, *w4, self.offsets, self.dS, self.A)
        S = ops.grouped_lora_shrink(self.x, self.A, 0.5, self.offsets, self.rows)
        dx, dA = ops.grouped_lora_shrink_backward(
            self.dS, self.x, self.A, 0.5, self.offsets, self.rows, True
        )
        dS, dB = ops.grouped_lora_expand_backward(self.dY, self.S, self.B, self.offsets)
        return {"y": y, "dX": dX, "S": S, "dx": dx, "dA": dA, "dS": dS, "dB": dB}

    def of_expert(self, ops, e, mine):
        """The same for one expert's rows, by the ops for one weight."""
        x, dY, S, dS = self.x_sorted[mine], self.dY[mine], self.S[mine], self.dS[mine]
        w4 = self.q[e].op_args()
        dx, dA = ops.lora_shrink_backward(dS, x, self.A[e], 0.5, True)
        expand = ops.lora_expand_backward(dY, S, self.B[e])
        return {
            "y": ops.gemm_4bit(x, *w4, self.bias[e], S, self.B[e]),
            "dX": ops.gemm_4bit_backward(dY, *w4, dS, self.A[e]),
            "S": ops.lora_shrink(x, self.A[e], 0.5),
            "dx": dx,
            "dA": dA,
            "dS": expand[0],
            "dB": expand[1],
        }

    def check(self, results, tolerance):
        """Every result against fp64, expert by expert, calibrated against torch's."""
        for e, mine in self.experts():
            x, dY, S, dS = self.x_sorted[mine], self.dY[mine], self.S[mine], self.dS[mine]
            W = torch.from_numpy(R.dequantize_4bit(self.arrays[e])).to(x)
            A, B = self.A[e], self.B[e]
            y = x @ W.T + self.bias[e] + (S @ B.T).to(self.dtype)
            want_y = R.linear_4bit(np64(x), self.arrays[e], np64(self.bias[e]))
            dX = dY @ W + (dS @ A).to(self.dtype)
            want_dX = R.linear_4bit_backward(np64(dY), self.arrays[e])[0]
            low = Tolerance(atol=2e-5)
            for name, by_torch, want, t in (
                ("y", y, want_y + np64(S) @ np64(B).T, tolerance),
                ("dX", dX, want_dX + np64(dS) @ np64(A), tolerance),
                ("S", 0.5 * x.float() @ A.T, 0.5 * np64(x) @ np64(A).T, low),
                ("dx", (0.5 * dS @ A).to(self.dtype), 0.5 * np64(dS) @ np64(A), Tolerance()),
                ("dA", 0.5 * dS.T @ x.float(), 0.5 * np64(dS).T @ np64(x), GRADIENT),
                ("dS", dY.float() @ B, np64(dY) @ np64(B), low),
                ("dB", dY.float().T @ S, np64(dY).T @ np64(S), GRADIENT),
            ):
                got = results[name][e] if name in ("dA", "dB") else results[name][mine]
                assert_close(got, by_torch, want, f"{name} of expert {e}", t)
        self.check_rest(results)

    def check_rest(self, results):
        for name in ("y", "dX", "S", "dx", "dS"):
            assert results[name].shape[0] == self.M
            rest = results[name][self.ends[-1] :]
            assert not rest.count_nonzero() and not rest.isnan().any(), f"{name} past the last end"
        for e, mine in self.experts():
            if mine.start == mine.stop:
                for name in ("dA", "dB"):
                    assert (results[name][e] == 0).all(), f"{name} of the empty expert {e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_products(backend, route, dtype):
    """K of 192 is for tensor cores; N, K of 33, 66 for the kernels of any shape."""
    for N, K, r in ((72, 192, 5), (33, 66, 3), (64, 64, 20)):
        problem = Problem(backend, route, N, K, dtype, r)
        problem.check(problem.results(backend.ops), LORA_TOLERANCE[backend.name])


@pytest.mark.parametrize("name", CONFIGS)
def test_formats(backend, name):
    for N, K in ((33, 66), (20, 128)):
        for dtype in (FP32, BF16):
            problem = Problem(backend, "some", N, K, dtype, config=name)
            problem.check(problem.results(backend.ops), LORA_TOLERANCE[backend.name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_experts_rows_are_those_of_the_op_for_one_weight(backend, dtype):
    """Bit for bit on the CPU. The CUDA kernels choose tiles by the mean rows of an expert and by
    the number of rows of the one weight, and sum in the order of the tile."""
    for route in ROUTES:
        for N, K, r in ((72, 192, 5), (33, 66, 3), (48, 64, 70)):
            problem = Problem(backend, route, N, K, dtype, r)
            results = problem.results(backend.ops)
            same = backend.name == "cpu" or (backend.name == "simt" and route == "one expert")
            for e, mine in problem.experts():
                for name, want in problem.of_expert(backend.ops, e, mine).items():
                    got = results[name][e] if name in ("dA", "dB") else results[name][mine]
                    what = f"{name} of expert {e}, {route}"
                    if same:
                        assert_same_bytes(got, want, what)
                    elif want.numel():
                        limit = (2e-2 if dtype != FP32 else 1e-4) * float(want.abs().max())
                        assert float((got.float() - want.float()).abs().max()) <= limit, what


def test_the_fused_ops_are_these_products(backend):
    p = Problem(backend, "some", 40, 128, BF16)
    ops, w4 = backend.ops, p.q.op_args()
    y, S = ops.grouped_lora_gemm_4bit(p.x, *w4, p.A, p.B, 2.0, p.offsets, p.rows, p.bias)
    want_S = ops.grouped_lora_shrink(p.x, p.A, 2.0, p.offsets, p.rows)
    assert_same_bytes(S, want_S, "S")
    want = ops.grouped_gemm_4bit(p.x, *w4, p.offsets, p.rows, p.bias, S, p.B)
    assert_same_bytes(y, want, "y")
    dX, dA, dB = ops.grouped_lora_gemm_4bit_backward(
        p.dY, p.x, S, *w4, p.A, p.B, 2.0, p.offsets, p.rows, True
    )
    dS, want_dB = ops.grouped_lora_expand_backward(p.dY, S, p.B, p.offsets)
    assert_same_bytes(dB, want_dB, "dB")
    _, want_dA = ops.grouped_lora_shrink_backward(2 * dS, p.x, p.A, 1.0, p.offsets, p.rows, False)
    assert_same_bytes(dA, want_dA, "dA")
    want = ops.grouped_gemm_4bit_backward(p.dY, *w4, p.offsets, 2 * dS, p.A)
    assert_same_bytes(dX, want, "dX")


def test_operands_may_lie_anywhere(backend):
    """Rows apart, bytes and rows off alignment, a slice of a larger stack: the same results."""
    for dtype in (FP32, BF16):
        p = Problem(backend, "some", 40, 128, dtype)
        want = p.results(backend.ops)
        shift = lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)  # noqa: E731
        wide = torch.cat([p.x.new_full((len(p.x), 3), torch.nan), p.x], dim=1)
        p.x = wide[:, 3:]
        p.dY = torch.cat([p.dY, p.dY], dim=1)[:, : p.N]
        p.S = torch.cat([p.S, p.S], dim=1)[:, p.S.shape[1] :]
        p.offsets, p.rows = shift(p.offsets), shift(p.rows)
        args = p.q.op_args()
        apart = (*(shift(t) for t in args[:3]), *args[3:])
        got = p.results(backend.ops)
        y = backend.ops.grouped_gemm_4bit(p.x, *apart, p.offsets, p.rows, p.bias, p.S, p.B)
        assert_same_bytes(y, got["y"], "y of shifted bytes")
        for name, t in got.items():  # x off alignment takes other kernels
            limit = (2e-2 if dtype == BF16 else 1e-4) * float(want[name].abs().max())
            assert float((t.float() - want[name].float()).abs().max()) <= limit, name
        # Experts 1 and 2 of the stack alone.
        begin, end = p.ends[0], p.ends[2]
        part = [None if t is None else t[1:3] for t in args[:4]]
        y = backend.ops.grouped_gemm_4bit(
            p.x, *part, [2, p.N, p.K], *args[5:], p.offsets[1:3] - begin, p.rows[begin:end],
            p.bias[1:3], p.S[begin:end], p.B[1:3],
        )  # fmt: skip
        limit = (2e-2 if dtype == BF16 else 1e-4) * float(got["y"].abs().max())
        assert float((y.float() - got["y"][begin:end].float()).abs().max()) <= limit


def test_same_bits_from_run_to_run(backend):
    for route in ("some", "many"):
        for dtype in (FP32, BF16):
            p = Problem(backend, route, 72, 192, dtype)
            first, second = p.results(backend.ops), p.results(backend.ops)
            for name in first:
                assert_same_bytes(first[name], second[name], name)


# Offsets and rows are data -------------------------------------------------------------------

BAD_OFFSETS = {
    "that fall": [4, 9, 2, 12, 11],
    "that exceed M": [4, 9, 12, 500, 2**31 - 1],
    "below zero": [-5, -1, 3, -(2**31), 7],
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("which", [*BAD_OFFSETS, "rows"])
def test_bad_offsets_and_rows(backend, which, dtype):
    """An error on the CPU. Elsewhere ends are running maxima in [0, M], and a row outside x reads
    zeros; AddressSanitizer watches the same in the emulator (sweep.py, hostile)."""
    p = Problem(backend, "some", 40, 128, dtype)
    if which == "rows":
        p.rows[::3] = len(p.x)
        p.rows[1::6] = -1
        p.rows[2::6] = 2**31 - 1
    else:
        p.offsets = torch.tensor(BAD_OFFSETS[which], dtype=torch.int32, device=backend.device)
    if backend.name == "cpu":
        what = "rows" if which == "rows" else "offsets"
        with pytest.raises(RuntimeError, match=rf"grouped_gemm_4bit: {what}\["):
            p.results(backend.ops)
        return
    got = p.results(backend.ops)
    p.offsets, p.rows, p.x = lawful(p.offsets, p.rows, p.x, p.M)
    for name, want in p.results(backend.ops).items():
        assert_same_bytes(got[name], want, name)


def test_slots_and_experts_of_many_numbers(backend):
    """Each row's result is its expert's, whatever the number of experts and rows: the scheduler
    reads 32 offsets at a time, and its slots are rows or tiles."""
    generator = torch.Generator().manual_seed(0)
    for E in (1, 2, 31, 32, 33, 64, 70):
        for M in (1, 5, 63, 64, 65, 130, 300):
            ends = torch.randint(0, M + 1, (E,), generator=generator).sort().values.int()
            expert = torch.searchsorted(ends, torch.arange(M), right=True)
            A = torch.cat([torch.arange(1.0, E + 1), torch.zeros(1)])
            S = backend.ops.grouped_lora_shrink(
                torch.arange(1.0, M + 1)[:, None].to(backend.device),
                A[:E, None, None].to(backend.device),
                1.0,
                ends.to(backend.device),
            )
            want = torch.arange(1.0, M + 1) * A[expert]
            assert torch.equal(S.cpu()[:, 0], want), (E, M)


def test_tiles_follow_the_mean_rows():
    """Emulator only: rows of the tile by architecture, rows and experts."""
    from simt.build import load_simt

    simt = load_simt()
    w = Problem(Backend("simt", simt, "cpu"), "one expert", 16, 64, BF16)
    cases = {  # (architecture, E, M): mma tiles of 8 rows, forward and backward
        (90, 64, 8): (1, 4),
        (90, 16, 192): (2, 4),
        (90, 4, 200): (4, 8),
        (90, 4, 260): (8, 8),
        (90, 1, 30): (4, 4),
        (80, 4, 80): (4, 4),
        (80, 4, 260): (8, 8),
        (86, 4, 260): (4, 4),
    }
    for (arch, E, M), tiles in cases.items():
        args = w.q.op_args()
        parts = [None if t is None else t.expand(E, *t.shape[1:]) for t in args[:4]]
        w4 = (*parts, [E, 16, 64], *args[5:])
        offsets = ((torch.arange(E) + 1) * M // E).int()
        simt.reset_launches()
        with simt.device(arch, 4):
            simt.grouped_gemm_4bit(torch.randn(M, 64).bfloat16(), *w4, offsets)
            simt.grouped_gemm_4bit_backward(torch.randn(M, 16).bfloat16(), *w4, offsets)
        launched = [name for name, count in simt.kernels().items() if count]
        assert sorted(launched) == sorted(
            [
                f"grouped_gemm_4bit_fused<Sm80, __nv_bfloat16, {tiles[0]}, true>",
                f"grouped_gemm_4bit_backward_fused<Sm80, __nv_bfloat16, {tiles[1]}, true>",
            ]
        ), (arch, E, M)


# sum_rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_rows(backend, dtype):
    for M, K, T in ((30, 64, 12), (30, 41, 12), (5, 8, 0), (7, 2048, 3)):
        values = torch.randn(M, K).to(dtype)
        order = torch.randint(0, M, (3 * M,)).int()
        ends = torch.randint(0, 3 * M + 1, (T,)).sort().values.int()
        want, begin = torch.zeros(T, K), 0
        for t, end in enumerate(ends.tolist()):
            for row in order[begin:end].tolist():
                want[t] += values[row].float()
            begin = end
        strided = torch.cat([values, values], dim=1)[:, K:].to(backend.device)
        for given in (values.to(backend.device), strided):
            got = backend.ops.sum_rows(given, order.to(backend.device), ends.to(backend.device))
            assert_same_bytes(got, want.to(dtype), f"{(M, K, T)}")


def test_sum_rows_of_bad_data(backend):
    values = torch.randn(6, 16, device=backend.device)
    order = torch.tensor([0, 6, -1, 2**31 - 1, 5], dtype=torch.int32, device=backend.device)
    ends = torch.tensor([2, 5, 5], dtype=torch.int32, device=backend.device)
    bad_ends = torch.tensor([-9, 99, 3], dtype=torch.int32, device=backend.device)
    lawful_order = torch.zeros_like(order)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match=r"sum_rows: order\[1\] is 6, want indices in"):
            backend.ops.sum_rows(values, order, ends)
        with pytest.raises(RuntimeError, match=r"sum_rows: ends\[0\] is -9"):
            backend.ops.sum_rows(values, lawful_order, bad_ends)
        return
    got = backend.ops.sum_rows(values, order, ends)
    assert torch.equal(got, torch.stack([values[0], values[5], torch.zeros_like(values[0])]))
    got = backend.ops.sum_rows(values, lawful_order, bad_ends)
    total = sum([values[0]] * 5, torch.zeros_like(values[0]))
    assert torch.equal(got, torch.stack([values[0] * 0, total, values[0] * 0]))


def test_ops_read_no_offset_on_the_host(backend):
    """As under a CUDA graph's capture, where a synchronization is an error."""
    if backend.name == "cpu":
        pytest.skip("the CPU checks offsets")
    p = Problem(backend, "some", 40, 128, BF16)
    capture = backend.ops.capture() if backend.name == "simt" else contextlib.nullcontext()
    with capture:
        p.check(p.results(backend.ops), LORA_TOLERANCE[backend.name])
