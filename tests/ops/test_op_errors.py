"""What the ops say of arguments that they refuse, and of memory that torch cannot give; operands
that start at odd addresses, as views into a file's bytes do."""

import fractions
import re

import numpy as np
import pytest
import torch

import qlora_ext
from cases import assert_same_bytes
from qlora_ext.nn import Embedding4bit, Linear4bit, LoraLinear4bit

ops = torch.ops.qlora_ext
N, K, M, R = 48, 64, 5, 4
W4 = ("packed", "absmax", "nested", "mean", "shape", "blocksize", "quant_type", "codebook")


def operands():
    q = qlora_ext.quantize_4bit(torch.randn(N, K))
    A, B, S = torch.randn(R, K), torch.randn(N, R), torch.randn(M, R)
    return q.op_args(), torch.randn(M, K), torch.randn(M, N), A, B, S


@pytest.mark.parametrize(
    "x, says",
    [
        (
            torch.randn(M, K - 1),
            r"x has shape \[5, 63\], want \[..., 64\] for a weight of \[48, 64\]",
        ),
        (torch.randn(M - 1, K), r"x has shape \[4, 64\], want the 5 rows of dY, .* \[5, 48\]"),
        (torch.randn(M, K).double(), "x has dtype float64, want float32, float16 or bfloat16"),
        (torch.tensor(1.0), "x is a scalar, want at least one dimension"),
    ],
    ids=["columns", "rows", "dtype", "scalar"],
)
@pytest.mark.parametrize("need_dx", [True, False])
def test_a_backward_names_the_op_and_the_argument_that_were_given(x, says, need_dx):
    """lora_gemm_4bit_backward is made of three products, each of which is an op of its own."""
    w4, _, dY, A, B, S = operands()
    with pytest.raises(RuntimeError, match=f"^lora_gemm_4bit_backward: {says}"):
        ops.lora_gemm_4bit_backward(dY, x, S, *w4, A, B, 1.0, need_dx)


@pytest.mark.parametrize("scaling", [float("inf"), float("nan"), 1e300, -1e39])
def test_a_scaling_that_no_float32_holds(scaling):
    w4, x, dY, A, B, S = operands()
    calls = {
        "lora_shrink": lambda: ops.lora_shrink(x, A, scaling),
        "lora_shrink_backward": lambda: ops.lora_shrink_backward(S, x, A, scaling, True),
        "lora_gemm_4bit": lambda: ops.lora_gemm_4bit(x, *w4, A, B, scaling),
        "lora_gemm_4bit_backward": lambda: ops.lora_gemm_4bit_backward(
            dY, x, S, *w4, A, B, scaling, True
        ),
        "merge_lora_4bit": lambda: ops.merge_lora_4bit(*w4, A, B, scaling, torch.float32),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{op}: scaling is .*, want a finite float32"):
            call()
    with pytest.raises(RuntimeError, match=r"^lora_gemm_4bit: scaling is "):
        ops.lora_gemm_4bit(x, *w4, A, B, scaling, None, S)


def test_memory_that_torch_cannot_give():
    """Strides of zero describe tensors that no memory holds, so no copy can be made of them.
    accelerate's find_executable_batch_size looks for torch's own words in the error."""
    w4, *_ = operands()
    byte, one = torch.zeros(1, dtype=torch.uint8), torch.zeros(1)
    shape = [2**23, 2**24]
    half_packed = (byte.expand(2**46), byte.expand(4), None, None, shape, 0, "nf4", None)
    indices = torch.zeros(1, dtype=torch.int32).expand(2**46)
    calls = {
        f"lora_shrink: torch could not allocate {2**44} bytes for a copy of x, [1048576, 4194304]"
        " in float32": lambda: ops.lora_shrink(one.expand(2**20, 2**22), one.expand(2, 2**22), 1.0),
        f"quantize_4bit: torch could not allocate {2**48} bytes for a copy of weight, "
        "[8388608, 16777216] in bfloat16": lambda: qlora_ext.quantize_4bit(
            one.bfloat16().expand(shape)
        ),
        f"dequantize_4bit: torch could not allocate {2**46} bytes for a copy of packed, "
        "[70368744177664] in uint8": lambda: ops.dequantize_4bit(*half_packed, torch.float32),
        f"embedding_4bit: torch could not allocate {2**48} bytes for a copy of indices, "
        "[70368744177664] in int32": lambda: ops.embedding_4bit(indices, *w4, torch.float16),
    }
    for says, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value).startswith(says)
        # Before torch 2.13 its stable ABI does not pass on why.
        if torch.__version__ >= "2.13":
            assert "DefaultCPUAllocator: can't allocate memory" in str(error.value)


def at_odd_address(tensor):
    """The same values one byte past an aligned address."""
    values = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    memory = np.zeros(values.size + 64, np.uint8)
    start = -memory.ctypes.data % 16 + 1
    memory[start : start + values.size] = values
    odd = torch.from_numpy(memory[start : start + values.size].view(np.uint8))
    dtype = {torch.bfloat16: torch.int16}.get(tensor.dtype, tensor.dtype)
    array = np.ndarray(tensor.shape, str(dtype).removeprefix("torch."), memory, start)
    odd = torch.from_numpy(array).view(tensor.dtype)
    assert odd.data_ptr() % 2 == 1 and torch.equal(odd, tensor)
    return odd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operands_at_odd_addresses(backend, dtype):
    if backend.name == "cuda":
        pytest.skip("a view at an odd address cannot be made on a GPU by torch")
    ops = backend.ops
    w4, x, dY, A, B, S = operands()
    x, dY, bias = x.to(dtype), dY.to(dtype), torch.randn(N).to(dtype)
    odd = at_odd_address
    indices = torch.tensor([3, 0, N - 1])
    odd_w4 = tuple(odd(t) if torch.is_tensor(t) else t for t in w4)
    pairs = [
        (ops.gemm_4bit, (x, *w4, bias, S, B), (odd(x), *odd_w4, odd(bias), odd(S), odd(B))),
        (ops.gemm_4bit_backward, (dY, *w4, S, A), (odd(dY), *odd_w4, odd(S), odd(A))),
        (ops.lora_shrink, (x, A, 2.0), (odd(x), odd(A), 2.0)),
        (ops.lora_shrink_backward, (S, x, A, 2.0, True), (odd(S), odd(x), odd(A), 2.0, True)),
        (ops.lora_expand_backward, (dY, S, B), (odd(dY), odd(S), odd(B))),
        (ops.merge_lora_4bit, (*w4, A, B, 2.0, dtype), (*odd_w4, odd(A), odd(B), 2.0, dtype)),
        (ops.embedding_4bit, (indices, *w4, dtype), (odd(indices), *odd_w4, dtype)),
        (ops.embedding_4bit, (indices.int(), *w4, dtype), (odd(indices.int()), *w4, dtype)),
        (
            ops.quantize_4bit,
            (x, 64, "nf4", None, "absmax", 3.0, "none", 1.0),
            (odd(x), 64, "nf4", None, "absmax", 3.0, "none", 1.0),
        ),
    ]
    for op, aligned, misaligned in pairs:
        want, got = op(*aligned), op(*misaligned)
        want, got = (want, got) if isinstance(want, tuple) else ((want,), (got,))
        for a, b in zip(got, want, strict=True):
            assert_same_bytes(a, b, str(op))
    with pytest.raises(
        RuntimeError, match=r"^dequantize_4bit: out starts 1 bytes past a multiple of"
    ):
        ops.dequantize_4bit.out(*w4, out=odd(torch.empty(N, K, dtype=dtype).zero_()))


@pytest.mark.parametrize("op", ["gemm_4bit", "lora_gemm_4bit", "lora_shrink", "linear"])
def test_none_for_a_required_tensor(op):
    """Torch takes None for `Tensor` and hands on one that is undefined."""
    w4, x, _, A, B, S = operands()
    arguments = {
        "gemm_4bit": {"x": x, "packed": w4[0], "absmax": w4[1]},
        "lora_gemm_4bit": {"x": x, "packed": w4[0], "absmax": w4[1], "lora_A": A, "lora_B": B},
        "lora_shrink": {"x": x, "lora_A": A},
        "linear": {"x": x, "weight": torch.randn(N, K)},
    }[op]
    rest = {} if "packed" not in arguments else dict(zip(W4[2:], w4[2:], strict=True))
    if "lora_A" in arguments:
        rest["scaling"] = 1.0
    for name in arguments:
        if name == "x":
            continue  # without it the dispatcher knows no backend
        with pytest.raises(RuntimeError, match=f"^{op}: {name} is None, want a tensor"):
            getattr(ops, op)(**{**arguments, **rest, name: None})
    if op == "gemm_4bit":
        with pytest.raises(
            RuntimeError, match="lora_S is given without lora_B, want both or neither"
        ):
            ops.gemm_4bit(x, *w4, None, S, None)


def test_none_for_a_required_tensor_beside_tensors_on_meta():
    weight, nested = torch.randn(N, K, device="meta"), torch.empty(8, device="meta")
    with pytest.raises(RuntimeError, match=r"^linear_backward: dY is None, want a tensor"):
        ops.linear_backward(None, weight)
    with pytest.raises(RuntimeError, match=r"^dequantize_absmax: code is None, want a tensor"):
        ops.dequantize_absmax(None, nested.byte())
    with pytest.raises(RuntimeError, match=r"^lora_shrink: x is None, want a tensor"):
        ops.lora_shrink(None, weight, 1.0)


def test_a_storage_that_was_freed_or_cut():
    """FSDP1 and offloaders free a storage under its tensors; a read would end the process."""
    w4, x, dY, A, B, _ = operands()

    def cut(tensor, nbytes):
        tensor = tensor.clone()
        tensor.untyped_storage().resize_(nbytes)
        return tensor

    for nbytes in (0, 16, x.nbytes - 1):
        says = rf"x has shape \[5, 64\] and a storage of only {nbytes} bytes, want"
        with pytest.raises(RuntimeError, match=f"^gemm_4bit: {says}"):
            ops.gemm_4bit(cut(x, nbytes), *w4)
        with pytest.raises(RuntimeError, match=f"^lora_shrink: {says}"):
            ops.lora_shrink(cut(x, nbytes), A, 1.0)
    with pytest.raises(RuntimeError, match=r"^gemm_4bit: packed has .* a storage of only 0 bytes"):
        ops.gemm_4bit(x, cut(w4[0], 0), *w4[1:])
    with pytest.raises(
        RuntimeError, match=r"^merge_lora_4bit: lora_B has .* storage of only 8 bytes"
    ):
        ops.merge_lora_4bit(*w4, A, cut(B, 8), 1.0, torch.float32)
    with pytest.raises(
        RuntimeError, match=r"^quantize_4bit: weight has .* a storage of only 0 bytes"
    ):
        qlora_ext.quantize_4bit(cut(dY, 0))
    part = torch.randn(8, 64)[3:]  # a view may lie anywhere in a storage that holds it
    assert ops.gemm_4bit(part[:, :64], *w4).shape == (5, N)
    part.untyped_storage().resize_(4 * 64 * 7)
    with pytest.raises(
        RuntimeError, match=r"^gemm_4bit: x has shape .* a storage of only 1792 bytes"
    ):
        ops.gemm_4bit(part, *w4)


@pytest.mark.parametrize("x", [None, [1.0] * 64, np.ones((2, 64)), torch.eye(64).to_sparse()])
def test_functions_name_what_is_no_dense_tensor(x):
    q = qlora_ext.quantize_4bit(torch.randn(N, K))
    A, B = torch.randn(R, K), torch.randn(N, R)
    with pytest.raises(TypeError, match=r"^linear_4bit: x is .*, want a dense tensor"):
        qlora_ext.linear_4bit(x, q)
    with pytest.raises(TypeError, match=r"^lora_linear_4bit: lora_A is .*, want a dense tensor"):
        qlora_ext.lora_linear_4bit(torch.randn(2, K), q, x, B, 1.0)
    with pytest.raises(TypeError, match=r"^merge_lora_4bit: lora_B is .*, want a dense tensor"):
        qlora_ext.merge_lora_4bit(q, A, x, 1.0)


@pytest.mark.parametrize(
    "kind, got",
    [("quantized", "a tensor quantized by torch"), ("jagged", "a nested tensor"),
     ("csr", "a tensor of layout torch.sparse_csr")],
)  # fmt: skip
def test_a_bias_that_is_no_dense_tensor(kind, got):
    linear = torch.nn.Linear(64, 32)
    x = torch.randn(4, 8)
    odd = {
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "jagged": lambda: torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged),
        "csr": x.to_sparse_csr,
    }[kind]()
    linear._parameters["bias"] = torch.nn.Parameter(odd, requires_grad=False)
    with pytest.raises(TypeError, match=f"Linear4bit: linear.bias is {got}.*, want a dense"):
        qlora_ext.nn.Linear4bit.from_linear(linear)
    layer = qlora_ext.nn.Linear4bit(64, 32)
    with pytest.raises(RuntimeError, match=f"bias is {got}.*, want a dense tensor"):
        layer.load_state_dict({**layer.state_dict(), "bias": odd}, assign=True)


def test_scaling_of_any_real_type():
    q, x = qlora_ext.quantize_4bit(torch.randn(N, K)), torch.randn(2, K)
    A, B = torch.randn(R, K), torch.randn(N, R)
    want = qlora_ext.lora_linear_4bit(x, q, A, B, 2.5)
    for scaling in (np.float32(2.5), fractions.Fraction(5, 2), torch.tensor(2.5)):
        got = qlora_ext.lora_linear_4bit(x, q, A, B, scaling)
        torch.testing.assert_close(got, want)
    for scaling in (torch.tensor(2.5, device="meta"), torch.tensor(True), True, "2.5"):
        with pytest.raises(ValueError, match=r"^lora_linear_4bit: scaling is .*, want a finite"):
            qlora_ext.lora_linear_4bit(x, q, A, B, scaling)


def odd_inputs():
    x = torch.randn(2, K)
    return {
        "jagged": torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
        "nested": torch.nested.nested_tensor([x, x[:1]]),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "mkldnn": x.to_mkldnn(),
        "sparse": x.to_sparse(),
        "csr": x.to_sparse_csr(),
        "None": None,
        "list": x.tolist(),
    }


def layers():
    peft = pytest.importorskip("peft")

    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.Linear(N, N))
    qlora_ext.quantize_model(model, progress_bar=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=["0"]))
    return {
        "Linear4bit": Linear4bit(K, N),
        "LoraLinear4bit": LoraLinear4bit(K, N, r=R),
        "LoraLinear4bit with dropout": LoraLinear4bit(K, N, r=R, lora_dropout=0.5),
        "0": wrapped.base_model.model[0],
        "Embedding4bit": Embedding4bit(K, N),
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", odd_inputs())
def test_layers_name_what_is_no_dense_tensor(kind, grad):
    x = odd_inputs()[kind]
    want = "want a dense tensor" + (r" \(pass its values\(\)" if kind == "jagged" else "")
    for name, layer in layers().items():
        argument = "indices" if name == "Embedding4bit" else "x"
        with torch.set_grad_enabled(grad), pytest.raises(TypeError) as caught:
            layer(x)
        assert re.match(rf"{name.split()[0]}: {argument} is .*, {want}", str(caught.value))
    if kind != "quantized" and isinstance(x, torch.Tensor):
        match = "quantize_4bit: weight (is a nested tensor, want a dense|has layout .*, want)"
        with pytest.raises(TypeError, match=match):
            qlora_ext.quantize_4bit(x)


def test_the_advice_for_jagged_tensors_works():
    x, layer = torch.randn(5, K), Linear4bit(K, N)
    jagged = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    y = torch.nested.nested_tensor_from_jagged(layer(jagged.values()), jagged.offsets())
    for part, rows in zip(y.unbind(), (x[:2], x[2:]), strict=True):
        torch.testing.assert_close(part, layer(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_head_takes_what_torchs_layer_takes(dtype):
    """PanelLinear, which stands in for it on a CPU."""
    x = torch.randn(5, K, dtype=dtype)
    jagged = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    head = torch.nn.Linear(K, N, dtype=dtype)
    got = qlora_ext.nn.PanelLinear.from_linear(head, always=True)(jagged)
    torch.testing.assert_close(got.values(), head(jagged).values())


def test_jit_trace_is_for_inference():
    x = torch.randn(2, K)
    for layer in (Linear4bit(K, N), LoraLinear4bit(K, N, r=R)):
        match = "gemm_4bit: torch.jit.trace cannot record its gradient; trace under torch.no_grad"
        with pytest.raises(RuntimeError, match=match):
            torch.jit.trace(layer, (x,))
        with torch.no_grad():
            traced = torch.jit.trace(layer, (x,))
        assert torch.equal(traced(x[:1]), layer(x[:1]))
