"""Stacks of experts [E, N, K]: each expert's bytes are what packing it alone gives."""

import dataclasses
import pickle
import re

import pytest
import torch
import torch.utils._pytree as pytree

import qlora_ext
from cases import CONFIGS, DTYPES, assert_same_bytes, make_stack, random_weight, reference_quantize
from qlora_ext import dequantize_4bit, quantize_4bit, quantize_stack_4bit

PARTS = ("packed", "absmax", "nested", "mean")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_expert_has_the_bytes_of_packing_it_alone(name, dtype):
    config = CONFIGS[name]
    # 33 * 66 weights are no whole number of blocks: each expert's last one is short.
    for shape in [(3, 33, 66), (2, 64, 128), (1, 5, 14)]:
        weight = random_weight(shape, dtype)
        q = quantize_stack_4bit(weight, config)
        assert q.is_stack and q.shape == shape and q.dtype == dtype
        assert q.packed.shape == (shape[0], shape[1], shape[2] // 2)
        for e in range(shape[0]):
            want = reference_quantize(weight[e], config)
            for part in PARTS:
                stack, alone = getattr(q, part), getattr(want, part)
                assert (stack is None) == (alone is None)
                if stack is not None:
                    assert_same_bytes(stack[e].flatten(), alone, f"{shape} {e} {part}")
        dense = dequantize_4bit(q)
        assert_same_bytes(dense[-1], dequantize_4bit(q[-1]), "dense")


def test_experts_are_views():
    q = quantize_stack_4bit(random_weight((4, 32, 64)))
    one, two = q[1], q[1:3]
    assert not one.is_stack and one.shape == (32, 64)
    assert two.is_stack and two.shape == (2, 32, 64)
    for part in ("packed", "absmax", "nested"):
        assert getattr(one, part).data_ptr() == getattr(q, part)[1].data_ptr()
        assert getattr(two, part).data_ptr() == getattr(q, part)[1].data_ptr()
    x = torch.randn(3, 64)
    assert_same_bytes(
        qlora_ext.linear_4bit(x, q[-1]), qlora_ext.linear_4bit(x, q[3]), "the last expert"
    )
    assert q[0:0].shape == (0, 32, 64)


def test_a_stack_is_one_value():
    _, q = make_stack((3, 32, 64))
    leaves, spec = pytree.tree_flatten(q)
    assert len(leaves) == 3
    for again in (pytree.tree_unflatten(leaves, spec), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert again.is_stack and again.shape == q.shape
        assert_same_bytes(again[2].packed, q[2].packed, "packed")
    out = torch.full((3, 32, 64), 7.0, dtype=torch.float16)
    assert dequantize_4bit(q, out=out) is out
    assert_same_bytes(out, dequantize_4bit(q, torch.float16), "out")
    assert q.bits_per_weight == q[0].bits_per_weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q: quantize_stack_4bit(torch.randn(4, 6)),
            "quantize_stack_4bit: weight has shape [4, 6], want [E, N, K] with at least one expert "
            "and an even K",
        ),
        (lambda q: quantize_stack_4bit(torch.randn(2, 4, 7)), "weight has shape [2, 4, 7]"),
        (lambda q: quantize_stack_4bit(torch.randn(0, 4, 8)), "weight has shape [0, 4, 8]"),
        (lambda q: quantize_stack_4bit([1.0]), "weight is a list, want a torch.Tensor"),
        (lambda q: q.state_dict(), "shape is [3, 32, 64], a stack of experts"),
        (lambda q: q[3], "index is 3, want one of 3 experts"),
        (lambda q: q[::2], "want an int or a slice of step 1"),
        (lambda q: q[0][0], "index is 0 into shape [32, 64]"),
        (lambda q: quantize_4bit(torch.randn(3, 4, 8))[0], "index is 0 into shape [3, 4, 8]"),
        (lambda q: dequantize_4bit(q, out=torch.empty(3, 64, 32)), "out has shape [3, 64, 32]"),
        (lambda q: qlora_ext.linear_4bit(torch.randn(2, 64), q), "want [N, K]"),
    ],
)
def test_errors_say_what_to_give(call, message):
    _, q = make_stack((3, 32, 64))
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError), match=re.escape(message)):
        call(q)


def test_a_bad_weight_is_named():
    weight = random_weight((3, 8, 64))
    weight[2, 5, 1] = float("nan")
    with pytest.raises(RuntimeError, match=r"expert 2: quantize_4bit: .* at index \[5, 1\]"):
        quantize_stack_4bit(weight)


def test_a_flat_tensor_of_three_dimensions_is_no_stack():
    """bitsandbytes packs any shape as one row of blocks; that stays."""
    q = quantize_4bit(random_weight((3, 8, 20)))
    assert not q.is_stack and q.absmax.shape == (8,)  # 480 weights in blocks of 64, not 3 * 3
    again = qlora_ext.QuantizedTensor.from_state_dict(q.state_dict())
    assert not again.is_stack and dataclasses.replace(again, packed=q.packed).shape == q.shape
