"""What trainers do with a device: modules' gradients, autocast, moves; on a GPU also its streams,
its graphs and a second GPU. What a CPU can run runs there; the rest waits for a GPU."""

import copy

import pytest
import torch

import qlora_ext
from cases import assert_close, assert_same_bytes, random_weight
from qlora_ext import nn as qnn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, K, RANK, SCALING = 96, 192, 8, 2.0


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@pytest.fixture(params=["cuda"])  # the name by which bench/gpu.sh selects
def gpu(request):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def lora_layer(dtype=FP32):
    """A LoraLinear4bit on the CPU whose lora_B is not zero."""
    linear = torch.nn.Linear(K, N).to(dtype)
    layer = qnn.LoraLinear4bit.from_linear(linear, r=RANK, lora_alpha=SCALING * RANK)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(N, RANK) / 8)
    return layer


def dense(layer, x, dY, dtype):
    """(y, dX, dA, dB) of the layer's formula over its dequantized weight, in `dtype`."""
    W = qlora_ext.dequantize_4bit(layer.quantized, FP32).cpu().to(dtype)
    x, A, B = (t.detach().cpu().to(dtype).requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    y = x @ W.T + layer.bias.detach().cpu().to(dtype) + SCALING * (x @ A.T) @ B.T
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dY.cpu().to(dtype))


@pytest.mark.parametrize("M", [1, 16, 80, 300])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_gradients_of_a_layer(device, dtype, M):
    layer = lora_layer(dtype).to(device)
    x = torch.randn(M, K).to(dtype).to(device).requires_grad_()
    dY = torch.randn(M, N).to(dtype).to(device)
    y = layer(x)
    assert y.dtype == dtype and y.device == x.device
    y.backward(dY)
    got = y, x.grad, layer.lora_A.grad, layer.lora_B.grad
    torchs, want = dense(layer, x, dY, dtype), dense(layer, x, dY, torch.float64)
    for name, g, t, w in zip(("y", "dX", "dA", "dB"), got, torchs, want, strict=True):
        assert_close(g, t, w, name)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast(device, dtype):
    layer = lora_layer().to(device)
    x = torch.randn(5, K).to(device).requires_grad_()
    with torch.autocast(device, dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == FP32
    same = qlora_ext.lora_linear_4bit(
        x.to(dtype), layer.quantized, layer.lora_A, layer.lora_B, SCALING, layer.bias
    )
    assert_same_bytes(y, same, "y")


def test_packing_on_a_device_and_moving(device):
    """The bytes are the CPU's, wherever the weight was packed and wherever it went."""
    linear = torch.nn.Linear(K, N)
    want = qnn.Linear4bit.from_linear(copy.deepcopy(linear)).state_dict()
    layer = qnn.Linear4bit.from_linear(linear.to(device))
    for moved in (layer, layer.to("cpu"), layer.to(device).to(BF16)):
        for name, tensor in moved.state_dict().items():
            if name != "bias":
                assert_same_bytes(tensor.cpu(), want[name], name)


def test_a_step_of_training_learns(device):
    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.GELU(), torch.nn.Linear(N, 4))
    model = qlora_ext.quantize_model(model.to(device), qlora_ext.QuantConfig())
    model = qlora_ext.add_lora(model, qlora_ext.LoraConfig(r=4, target_modules="all-linear"))
    x, target = torch.randn(32, K).to(device), torch.randn(32, 4).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# What only a GPU has -------------------------------------------------------------------------


def test_the_current_stream_is_used(gpu):
    """x is written late, on a stream of its own: an op on another stream would read zeros."""
    layer = lora_layer(BF16).cuda()
    value = torch.randn(16, K).to(BF16).cuda()
    want = layer(value)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros_like(value)
        torch.cuda._sleep(50_000_000)
        x.copy_(value)
        y = layer(x)
        packed = qlora_ext.quantize_4bit(x)
    stream.synchronize()
    assert_same_bytes(y, want, "y")
    assert_same_bytes(packed.packed, qlora_ext.quantize_4bit(value).packed, "packed")


@pytest.mark.parametrize("M", [1, 80, 1024])
def test_a_graph_replays_a_step(gpu, M):
    layer = lora_layer(BF16).cuda()
    x = torch.randn(M, K).to(BF16).cuda().requires_grad_()

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.float().sum(), (x, layer.lora_A, layer.lora_B))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn(M, K))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert_same_bytes(got, want, "a replayed result")


def test_quantizing_is_refused_under_capture(gpu):
    weight = random_weight((N, K)).cuda()
    with (
        pytest.raises(RuntimeError, match=r"quantize_4bit: .*captur"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        qlora_ext.quantize_4bit(weight)


def test_no_step_of_training_waits_for_the_gpu(gpu):
    layer = lora_layer(BF16).cuda()
    x = torch.randn(80, K).to(BF16).cuda().requires_grad_()
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
        qlora_ext.merge_lora_4bit(layer.quantized, layer.lora_A, layer.lora_B, SCALING)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_second_gpu(gpu):
    """The device of the tensors counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layer = lora_layer(BF16)
    x = torch.randn(16, K).to(BF16)
    want = copy.deepcopy(layer).to("cuda:0")(x.to("cuda:0")).cpu()
    assert_same_bytes(layer.to("cuda:1")(x.to("cuda:1")).cpu(), want, "y")
    assert torch.cuda.current_device() == 0
