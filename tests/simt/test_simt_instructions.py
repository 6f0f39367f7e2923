"""The emulated instructions against independent statements of what they do: fragment layouts as the
PTX ISA document's formulas and as CuTe's (thread, value) layouts, the rest as Python models."""

import ctypes

import numpy as np
import pytest

from simt import build

RNG = np.random.default_rng(0)


def load_probe(ptx):
    if ptx:
        build.require_nvcc()
    library = ctypes.CDLL(str(build.harness("probe", shared=True, ptx=("90a",) * ptx)))
    if ptx:
        library.simt_set_device(90, 4)
        library.simt_set_ptx(1)
    return library


def caller(library):
    """A function that calls a probe by name and wants no error."""

    def call(name, *arguments):
        run = getattr(library, name)
        run.restype = ctypes.c_char_p
        error = run(*arguments)
        assert error is None, error

    return call


@pytest.fixture(scope="module", params=["twin", "ptx"])
def probe(request):
    """Calls of probe.cu: on the host twin of ptx.cuh, and on what nvcc made of ptx.cuh itself."""
    return caller(load_probe(request.param == "ptx"))


def pack(*values):
    """A params struct of arrays (as pointers) and ints, by reference."""
    fields, kept = [], []
    for i, value in enumerate(values):
        array = isinstance(value, np.ndarray)
        fields.append((f"f{i}", ctypes.c_void_p if array else ctypes.c_int))
        kept.append(value.ctypes.data if array else value)
    return ctypes.byref(type("Params", (ctypes.Structure,), {"_fields_": fields})(*kept))


# ---------------------------------------------------------------- fragment layouts, written twice


def isa_a16(lane, i):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": A, element a_i."""
    group, thread = lane >> 2, lane % 4
    row = group if (0 <= i < 2) or (4 <= i < 6) else group + 8
    col = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, col


def isa_b16(lane, i):
    group, thread = lane >> 2, lane % 4
    return (thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8), group


def isa_c(lane, i):
    """C and D of m16n8k16 and m16n8k8."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def isa_a8(lane, i):
    """PTX ISA, "Matrix Fragments for mma.m16n8k8": A of .f16."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def isa_b8(lane, i):
    group, thread = lane >> 2, lane % 4
    return thread * 2 + i, group


def cute(thread_strides, value_shape, value_strides, rows):
    """A CuTe layout of thread shape (4, 8): (lane, value) -> (row, column), of `rows` rows."""

    def at(lane, value):
        offset = (lane % 4) * thread_strides[0] + (lane // 4) * thread_strides[1]
        for extent, stride in zip(value_shape, value_strides, strict=True):
            offset += (value % extent) * stride
            value //= extent
        return offset % rows, offset // rows

    return at


# mma_traits_sm80.hpp: ALayout (m, k), BLayout (n, k), CLayout (m, n), all column-major.
CUTE_A16 = cute((32, 1), (2, 2, 2), (16, 8, 128), 16)
CUTE_B16 = cute((16, 1), (2, 2), (8, 64), 8)
CUTE_C = cute((32, 1), (2, 2), (16, 8), 16)  # SM80_16x8_Row, also A of 16x8x8
CUTE_B8 = cute((16, 1), (2,), (8,), 8)  # SM80_8x8_Row


def test_the_two_tables_agree():
    for lane in range(32):
        assert [isa_a16(lane, i) for i in range(8)] == [CUTE_A16(lane, i) for i in range(8)]
        assert [isa_b16(lane, i)[::-1] for i in range(4)] == [CUTE_B16(lane, i) for i in range(4)]
        assert [isa_c(lane, i) for i in range(4)] == [CUTE_C(lane, i) for i in range(4)]
        assert [isa_a8(lane, i) for i in range(4)] == [CUTE_C(lane, i) for i in range(4)]
        assert [isa_b8(lane, i)[::-1] for i in range(2)] == [CUTE_B8(lane, i) for i in range(2)]


def to_bits(values, bf16):
    if bf16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def fragments(matrix, layout, count, bf16, registers):
    """[32, registers] words: elements 2r and 2r + 1 of a lane in the halves of register r."""
    bits = to_bits(matrix, bf16)
    words = np.zeros((32, registers), np.uint32)
    for lane in range(32):
        for i in range(count):
            words[lane, i // 2] |= np.uint32(bits[layout(lane, i)]) << (16 * (i % 2))
    return words


@pytest.mark.parametrize("shape", ["m16n8k16-f16", "m16n8k16-bf16", "m16n8k8-f16", "sm75-k16"])
def test_mma_fragments(probe, shape):
    k = 8 if shape == "m16n8k8-f16" else 16
    bf16 = shape.endswith("bf16")
    # Small integers: every sum is exact, so a swapped element cannot hide in a tolerance.
    A, B = RNG.integers(-9, 10, (16, k)).astype(float), RNG.integers(-9, 10, (k, 8)).astype(float)
    C = RNG.integers(-99, 100, (16, 8)).astype(np.float32)
    a_layout, b_layout = (isa_a8, isa_b8) if k == 8 else (isa_a16, isa_b16)
    a = fragments(A, a_layout, k // 2, bf16, 4)
    b = fragments(B, b_layout, k // 4, bf16, 2)
    d = np.array([[C[isa_c(lane, i)] for i in range(4)] for lane in range(32)], np.float32)
    probe(
        "probe_mma_run",
        ["m16n8k16-f16", "m16n8k16-bf16", "m16n8k8-f16", "sm75-k16"].index(shape),
        pack(a, b, d),
    )
    want = A @ B + C
    got = np.zeros((16, 8))
    for lane in range(32):
        for i in range(4):
            got[isa_c(lane, i)] = d[lane, i]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", ["m16n8k16-f16", "m16n8k8-f16"])
def test_mma_places_single_elements(probe, shape):
    """One nonzero element of A and of B at a time: which rows and columns meet."""
    k = 8 if shape == "m16n8k8-f16" else 16
    a_layout, b_layout = (isa_a8, isa_b8) if k == 8 else (isa_a16, isa_b16)
    for m, kk, n in [(0, 0, 0), (3, 5, 7), (8, 1, 2), (15, k - 1, 7), (9, k - 2, 5), (7, 4, 1)]:
        A, B = np.zeros((16, k)), np.zeros((k, 8))
        A[m, kk], B[kk, n] = 2, 3
        d = np.zeros((32, 4), np.float32)
        a, b = fragments(A, a_layout, k // 2, False, 4), fragments(B, b_layout, k // 4, False, 2)
        probe("probe_mma_run", 0 if k == 16 else 2, pack(a, b, d))
        hits = [
            (isa_c(lane, i), d[lane, i]) for lane in range(32) for i in range(4) if d[lane, i] != 0
        ]
        assert hits == [((m, n), 6.0)]


def test_ldmatrix(probe):
    """PTX ISA, ldmatrix.x4.trans: threads 8i..8i+7 give the rows of matrix i; thread t receives of
    row t / 4 of the transposed matrix the elements 2 * (t % 4) and the next."""
    elements = RNG.permutation(2048).astype(np.uint16)
    rows = (RNG.permutation(256)[:32] * 16).astype(np.uint32)
    d = np.zeros((32, 4), np.uint32)
    probe("probe_ldmatrix_run", pack(elements, rows, d))
    for i in range(4):
        matrix = np.stack([elements[rows[8 * i + r] // 2 :][:8] for r in range(8)]).T
        for lane in range(32):
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert d[lane, i] == int(low) | (int(high) << 16)


@pytest.mark.parametrize("valid", [16, 13, 3, 0])
def test_copies_and_loads(probe, valid):
    data = RNG.integers(1, 256, 1024).astype(np.uint8)
    buffer = np.zeros(1024 + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    buffer[start : start + 1024] = data
    out = np.zeros(8 * 1024 + 16, np.uint8)
    begin = -out.ctypes.data % 16
    probe("probe_copies_run", pack(buffer[start:], out[begin:], valid))
    out = out[begin : begin + 8 * 1024].reshape(8, 1024)
    keep = np.arange(1024) % 16 < valid  # what is not valid is zero
    np.testing.assert_array_equal(out[0], np.where(keep, data, 0))
    for copied in out[1:6]:
        np.testing.assert_array_equal(copied, data)
    want = (np.arange(1024) // 32 + np.arange(1024) % 32).astype(np.uint8)
    np.testing.assert_array_equal(out[6], want)
    words, kept = out[7].view(np.uint32).reshape(64, 4), np.zeros((64, 4), np.uint32)
    kept[:, 0] = np.arange(64)
    loads = np.arange(64)[:, None] % 3 == 0  # the other threads keep what they had
    np.testing.assert_array_equal(words, np.where(loads, data.view(np.uint32).reshape(64, 4), kept))


class Split:
    """Launches of probe_last_block: 3 tiles, the sums of 5 parts. `words` is what the workspace
    holds before."""

    TILES, PARTS = 3, 5

    def __init__(self, probe, count, words):
        self.probe, self.count = probe, count
        self.words = np.array(words, np.uint64)
        self.given = RNG.integers(-99, 99, (self.PARTS, self.TILES * count)).astype(np.float32)

    def run(self, launch, blocks=PARTS):
        """The output of a launch that ends after `blocks` blocks of each tile."""
        out = np.full(self.given.shape[1], -1, np.float32)
        parts = np.full(self.given.shape, np.nan, np.float32)
        io = pack(
            self.words,
            self.given,
            parts,
            out,
            np.array([launch << 8], np.uint64),
            self.count,
            self.PARTS,
        )
        self.probe("probe_last_block_run", self.TILES, blocks, io)
        return out

    def is_right(self, out):
        return np.array_equal(out, self.given.sum(0)) and not self.words.any()


@pytest.mark.parametrize("count", [1, 24, 64, 150])
@pytest.mark.parametrize(
    "words",
    [(0, 0, 0), (2**64 - 1,) * 3, (98 << 8 | 1, 100 << 8 | 4, 255)],
    ids=["zeros", "ones", "others"],
)
def test_the_last_block_adds_the_parts_whatever_the_workspace_held(probe, words, count):
    """Also counts of other launches. (A word with the id of this launch counts for it.)"""
    split = Split(probe, count, words)
    for _ in range(3):  # a graph that is replayed has the same id
        assert split.is_right(split.run(99))


def test_a_launch_after_one_that_ended_early(probe):
    split = Split(probe, 24, (0, 0, 0))
    assert (split.run(5, blocks=3) == -1).all() and split.words.all()
    assert split.is_right(split.run(6))


def test_launches_have_ids_of_their_own():
    library = load_probe(ptx=False)
    library.probe_launch_id.restype = ctypes.c_uint64
    ids = {library.probe_launch_id() for _ in range(1000)}
    assert len(ids) == 1000 and 2**50 < max(ids) < 2**56


def test_a_block_larger_than_its_launch_bounds_is_refused():
    run = load_probe(ptx=True).probe_bounds_run
    run.restype = ctypes.c_char_p
    out = np.zeros(64, np.uint32)
    assert run(32, pack(out)) is None and out.sum() == 32
    refused = run(64, pack(out))
    assert refused == b"probe_bounds: launch failed: 64 threads, its __launch_bounds__ allow 32"


# ---------------------------------------------------------------- lanes


def shfl(kind, lane, b, width):
    """PTX ISA, shfl.sync: the source lane."""
    clamp = 0 if kind == "up" else 0x1F
    segment = (32 - width) & 0x1F
    max_lane = (lane & segment) | (clamp & ~segment & 0x1F)
    min_lane = lane & segment
    if kind == "up":
        j, valid = lane - b, lane - b >= max_lane
    elif kind == "down":
        j, valid = lane + b, lane + b <= max_lane
    elif kind == "xor":
        j, valid = lane ^ b, (lane ^ b) <= max_lane
    else:
        j = min_lane | (b & ~segment & 0x1F)
        valid = j <= max_lane
    return j if valid else lane


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
def test_shuffles(probe, kind, width):
    values = RNG.integers(0, 2**32, 32, dtype=np.uint32)
    for b in (0, 1, 2, 3, 5, 8, 16, 31):
        out = np.zeros(32, np.uint32)
        probe(
            "probe_shuffle_run",
            pack(values, out, ["idx", "up", "down", "xor"].index(kind), b, width),
        )
        assert out.tolist() == [values[shfl(kind, lane, b, width)] for lane in range(32)]


def test_votes_and_reductions(probe):
    values = RNG.integers(0, 2**32, 32, dtype=np.uint32)
    out = np.zeros((8, 32), np.uint32)
    probe("probe_vote_run", pack(values, out))
    for lanes in (range(8), range(8, 32)):
        v = values[list(lanes)]
        ballot = sum(1 << lane for lane in lanes if values[lane] & 1)
        want = [
            ballot,
            int(any(v & 2)),
            int(all(v & 4)),
            int(v.sum(dtype=np.uint32)),
            int(v.view(np.int32).max()) & 0xFFFFFFFF,
        ]
        want += [int(v.min()), int(np.bitwise_xor.reduce(v)), int(np.bitwise_or.reduce(v))]
        for lane in lanes:
            assert out[:, lane].tolist() == want


# ---------------------------------------------------------------- bits and arithmetic


def test_bits(probe):
    n = 500
    words = RNG.integers(0, 2**32, (n, 3), dtype=np.uint32)
    words[:20, 0] = 0
    out = np.zeros((n, 9), np.uint32)
    probe("probe_bits_run", pack(words, out, n))
    for (a, b, c), got in zip(words.tolist(), out.tolist(), strict=True):
        octets = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        picked = [(c >> 4 * i) & 15 for i in range(4)]
        perm = int.from_bytes(bytes(octets[p & 7] for p in picked), "little")
        signed = bytes(
            (0xFF if octets[p & 7] & 0x80 else 0) if p & 8 else octets[p & 7] for p in picked
        )

        def s8(x):
            return [v - 256 if v > 127 else v for v in x.to_bytes(4, "little")]

        both = (b << 32) | a
        dp4a = (sum(x * y for x, y in zip(s8(a), s8(b), strict=True)) + c) & 0xFFFFFFFF
        want = [int.from_bytes(signed, "little"), perm]
        want += [
            ((both << (c & 31)) >> 32) & 0xFFFFFFFF,
            (both >> (c & 31)) & 0xFFFFFFFF,
            int(f"{a:032b}"[::-1], 2),
        ]
        want += [32 - a.bit_length(), a.bit_count(), dp4a, (a * b) >> 32]
        assert got == want


def test_half_fma_rounds_once(probe):
    n = 4000
    bits = RNG.integers(0, 2**16, (n, 3), dtype=np.uint16)
    f16, bf16 = np.zeros(n, np.uint16), np.zeros(n, np.uint16)
    probe("probe_half_fma_run", pack(bits, f16, bf16, n))
    with np.errstate(all="ignore"):
        x = bits.view(np.float16).astype(
            np.longdouble
        )  # 64 bits: products and sums of these are exact
        want = (x[:, 0] * x[:, 1] + x[:, 2]).astype(np.float16)
    got = f16.view(np.float16)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[finite], want[finite])
    assert not np.isfinite(got[~finite]).any()
