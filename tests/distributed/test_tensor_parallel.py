"""Column and row parallelism on packed layers, two gloo processes on the CPU against one."""

import copy
import sys

import pytest

import processes


def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip("peft")
    processes.run(__file__, str(tmp_path))


# What each process runs ---------------------------------------------------------------------------


def build(config):
    import torch

    import tiny_models as tiny
    from qlora_ext import LoraConfig, add_lora, quantize_model

    model = quantize_model(tiny.make("qwen2", intermediate_size=128), config, progress_bar=False)
    add_lora(model, LoraConfig(key=True, projection=True, mlp=True, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "bias" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def plan():
    from qlora_ext.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit

    column, row = ColwiseParallel4bit(), RowwiseParallel4bit()
    layer = "model.layers.*."
    return {
        **{f"{layer}self_attn.{name}_proj": column for name in "qkv"},
        f"{layer}self_attn.o_proj": row,
        f"{layer}mlp.gate_proj": column,
        f"{layer}mlp.up_proj": column,
        f"{layer}mlp.down_proj": row,
    }


def train(mesh, **settings):
    """Three steps with clipping: losses, gradients, and the adapters gathered at the end."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor.parallel import parallelize_module

    import tiny_models as tiny
    from qlora_ext import QuantConfig, memory_report, num_parameters

    config = QuantConfig(blocksize=32, **settings)
    one, model = build(config), build(config)
    parallelize_module(model, mesh, plan())
    if one.model.layers[0].mlp.up_proj.weight_nested is None:  # else scales grow to fp32
        packed, own = (
            sum(
                getattr(p, "_local_tensor", p).nbytes
                for name, p in m.named_parameters()
                if p.dtype == torch.uint8 and not name.endswith("codebook")
            )
            for m in (one, model)
        )
        assert own == packed / 2

    def trained(m):
        return {name: p for name, p in m.named_parameters() if p.requires_grad}

    optimizers = [torch.optim.AdamW(trained(m).values(), lr=1e-2) for m in (one, model)]
    ids = tiny.inputs(one)["input_ids"]
    for _ in range(3):
        losses = []
        for m, optimizer in zip((one, model), optimizers):
            m.train()
            optimizer.zero_grad()
            losses.append(m(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
        # Gradients of q and k are small differences of large terms, whose rounding depends on the
        # machine: up to 7e-5 of such a gradient was seen, 1e-6 of the model's largest.
        largest = max(p.grad.abs().max() for p in trained(one).values())
        for name, want in trained(one).items():
            error = (trained(model)[name].grad.full_tensor() - want.grad).abs().max()
            assert error <= 1e-4 * want.grad.abs().max() + 1e-6 * largest, name
        norms = [torch.nn.utils.clip_grad_norm_(trained(m).values(), 0.1) for m in (one, model)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=1e-5, atol=0)
        for optimizer in optimizers:
            optimizer.step()

    # The adapters, gathered, go into a model that is whole.
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if torch.distributed.get_rank() == 0:
        assert torch.equal(whole["model.layers.0.mlp.up_proj.weight"],
                           one.state_dict()["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
        again = build(config)
        adapters = {name: tensor for name, tensor in whole.items() if "lora_" in name}
        again.load_state_dict(adapters, strict=False)
        torch.testing.assert_close(
            tiny.logits(again), tiny.logits(one.eval()), rtol=1e-3, atol=1e-4
        )
    # Counted as weights, not as bytes.
    for count in (num_parameters, type(one).num_parameters):
        for arguments in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
            assert count(model, **arguments) == count(one, **arguments)
    assert memory_report(model).bits_per_weight >= memory_report(one).bits_per_weight > 4
    refuse_sharded(model)


def refuse_sharded(model):
    """What needs whole tensors says so."""
    import tempfile
    from pathlib import Path

    import torch

    from qlora_ext import merge_and_unload, merge_into_4bit, save_adapter

    with tempfile.TemporaryDirectory() as folder:
        for call, arguments in (
            (save_adapter, (f"{folder}/adapter",)),
            (merge_and_unload, (torch.float32,)),
            (merge_into_4bit, ()),
            *([(type(model).save_pretrained, (folder,))] if hasattr(model, "config") else []),
        ):
            words = rf"{call.__name__}: [\w.]+ is a DTensor, .* want a whole model"
            with pytest.raises(ValueError, match=words):
                call(model, *arguments)
        assert not list(Path(folder).glob("**/*.safetensors"))


def one_of_two(mesh):
    """A layer in the plan beside one outside of it, which has an adapter too."""
    import torch
    from torch.distributed.tensor.parallel import parallelize_module

    from qlora_ext.nn import LoraLinear4bit

    model = torch.nn.ModuleDict({"a": LoraLinear4bit(64, 128), "b": LoraLinear4bit(64, 128)})
    parallelize_module(model, mesh, {"a": plan()["model.layers.*.mlp.up_proj"]})
    refuse_sharded(model)


def clip(mesh):
    """DTensors and plain tensors clipped by one norm, as docs/sharding.md does."""
    import copy

    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from qlora_ext.nn import LoraLinear4bit

    torch.manual_seed(0)
    one = torch.nn.Sequential(*(LoraLinear4bit(*size) for size in ((64, 128), (128, 64), (64, 64))))
    for name, parameter in one.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model, x = copy.deepcopy(one), torch.randn(4, 64)
    styles = plan()
    column, row = styles["model.layers.*.mlp.up_proj"], styles["model.layers.*.mlp.down_proj"]
    parallelize_module(model, mesh, {"0": column, "1": row})
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (one, model)]
    for m in (one, model):
        m(x).square().mean().backward()
    want = torch.nn.utils.clip_grad_norm_(trained[0], 1.0)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        torch.nn.utils.clip_grad_norm_(trained[1], 1.0)
    groups = [[p for p in trained[1] if isinstance(p, DTensor) == cut] for cut in (True, False)]
    assert [len(group) for group in groups] == [6, 3]  # A, B and bias
    norms = [get_total_norm([p.grad for p in group]) for group in groups]
    norm = torch.stack([norms[0].full_tensor(), norms[1]]).norm()
    for group in groups:
        clip_grads_with_norm_(group, 1.0, norm)
    assert want > 2
    torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
    for parameter, p in zip(trained[1], trained[0], strict=True):
        got = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)


def refuse(mesh):
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import tiny_models as tiny
    from qlora_ext.integrations import tensor_parallel
    from qlora_ext.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit
    from qlora_ext.nn import Experts4bit, Linear4bit

    torch.manual_seed(0)  # the same in every process
    layer = Linear4bit(64, 64)
    x, names = torch.randn(2, 64), [name for name, _ in layer.named_parameters()]
    want = layer(x)
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="the mesh has 2 dimensions, want 1"):
        ColwiseParallel4bit()._apply(layer, square)

    def failing(*args):
        raise RuntimeError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_parallel, "distribute_tensor", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            ColwiseParallel4bit()._apply(layer, mesh)
    assert type(layer) is Linear4bit and names == [name for name, _ in layer.named_parameters()]
    assert torch.equal(layer(x), want)
    rank = square.get_local_rank("tp")
    RowwiseParallel4bit()._apply(row := Linear4bit(128, 64), square["tp"])
    ColwiseParallel4bit()._apply(layer, square["tp"])
    torch.testing.assert_close(layer(x), want.chunk(2, -1)[rank])
    for module, placement, words in (
        (layer, Replicate(), r"x is a DTensor, want a plain tensor: x.full_tensor\(\)"),
        (row, Shard(1), r"want a plain tensor: this process's part, x.to_local\(\)"),
    ):
        with pytest.raises(TypeError, match=words):
            module(distribute_tensor(torch.randn(2, module.in_features), mesh, [placement]))

    for K, N, style, words in (
        (64, 64, RowwiseParallel4bit(), "by columns, want K a multiple of blocksize x 2"),
        (64, 63, ColwiseParallel4bit(), "by rows, want K a multiple of blocksize and N of 2"),
        (96, 64, ColwiseParallel4bit(), "blocksize=64 cannot be cut into 2 parts"),
    ):
        with pytest.raises(ValueError, match=words):
            style._apply(Linear4bit(K, N), mesh)
    with pytest.raises(TypeError, match="the layer is a Linear, want a Linear4bit"):
        ColwiseParallel4bit()._apply(torch.nn.Linear(64, 64), mesh)
    experts = Experts4bit.from_experts(tiny.experts("mixtral"))
    for layer in (experts, experts.up):
        with pytest.raises(TypeError, match=f"a {type(layer).__name__}, which holds a mixture's"):
            RowwiseParallel4bit()._apply(layer, mesh)


def keep_marks(mesh):
    """What other libraries look for on `layer.weight` is on the parameter that takes its place."""
    import torch
    from torch.distributed.fsdp import fully_shard

    from qlora_ext.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit
    from qlora_ext.nn import Linear4bit, LoraLinear4bit

    def change(layer, style):
        if style is None:
            return fully_shard(layer, mesh=mesh)
        return style._apply(layer, mesh)

    for style in (ColwiseParallel4bit(), RowwiseParallel4bit(), None):
        for kind in (Linear4bit, LoraLinear4bit):
            layer = kind(128, 64)
            layer.weight_marks, layer.adapter_dtype = {"quant_state": "ours"}, torch.bfloat16
            layer = change(layer, style)
            assert layer.weight.quant_state == "ours" and layer.adapter_dtype == torch.bfloat16
            assert not hasattr(change(kind(128, 64), style).weight, "quant_state")


def refuse_in_a_plan(mesh, folder):
    """Plans for whole models: layers that hold several, parts that are no whole number of blocks,
    and PEFT's layers."""
    import peft
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import parallelize_module

    import tiny_models as tiny
    from qlora_ext import LoraConfig, QLoraExtConfig, QuantConfig, add_lora, quantize_model
    from qlora_ext.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit

    column, row = ColwiseParallel4bit(), RowwiseParallel4bit()

    def check(model, plan, kind, words):
        with pytest.raises(kind, match=words):
            parallelize_module(model, mesh, plan)

    small = QuantConfig(blocksize=32)
    phi3 = quantize_model(tiny.make("phi3", intermediate_size=128), small, progress_bar=False)
    tiny.make("phi3", intermediate_size=128).save_pretrained(folder)  # the first process writes
    dist.barrier()
    settings = QLoraExtConfig(blocksize=32)
    loaded = type(phi3).from_pretrained(folder, quantization_config=settings)
    adapted = add_lora(copy.deepcopy(phi3), LoraConfig(key=True, mlp=True))
    for model in (phi3, loaded, adapted):
        want = tiny.logits(model)
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            words = f"tensor parallel: {name.rpartition('.')[2]} holds several layers"
            check(model, {f"model.layers.*.{name}": column}, ValueError, words)
        assert torch.equal(tiny.logits(model), want)
        # Its columns may be cut, since their sum is whole again; what reads it has the same x.
        layer = model.model.layers[0].self_attn.qkv_proj
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        want, own = layer(x), x.chunk(2, -1)[mesh.get_local_rank()]
        parallelize_module(model, mesh, {"model.layers.0.self_attn.qkv_proj": row})
        torch.testing.assert_close(layer(own), want, rtol=1e-4, atol=1e-4)

    llama = quantize_model(tiny.make("llama"), progress_bar=False)  # K of down_proj is 96
    name = "model.layers.*.mlp.down_proj"
    words = r"a \[64, 96\] weight with blocksize=64 cannot be cut into 2 parts by"
    check(llama, {name: row}, ValueError, f"{words} columns, want K a multiple of blocksize x 2")
    check(llama, {name: column}, ValueError, f"{words} rows, want K a multiple of blocksize")

    model = peft.get_peft_model(
        quantize_model(tiny.make("llama"), small, progress_bar=False),
        peft.LoraConfig(target_modules=["q_proj"]),
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    words = "the layer is PEFT's PeftLoraLinear4bit, want .* cannot be cut: use add_lora"
    for style in (column, row):
        check(model, {name: style}, TypeError, words)
    parallelize_module(model, mesh, {f"{name}.base_layer": column})
    with pytest.raises(
        TypeError, match=r"base layer of model\.layers\.0\.self_attn\.q_proj was cut"
    ):
        tiny.logits(model)


def low_precision(mesh):
    """bf16 under autocast, with dropout in training: every process answers the same."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import parallelize_module

    from qlora_ext.nn import LoraLinear4bit

    torch.manual_seed(0)
    pair = torch.nn.Sequential(
        LoraLinear4bit(64, 128, lora_dropout=0.5),
        torch.nn.GELU(),
        LoraLinear4bit(128, 64, lora_dropout=0.5),
    )
    styles = plan()
    column, row = styles["model.layers.*.mlp.up_proj"], styles["model.layers.*.mlp.down_proj"]
    parallelize_module(pair, mesh, {"0": column, "2": row})
    with torch.autocast("cpu", torch.bfloat16):
        y = pair.train()(torch.randn(4, 64))
    assert y.dtype == torch.bfloat16 and y.shape == (4, 64)
    sums = y.detach().float()
    dist.all_reduce(sums)
    assert torch.equal(sums, 2 * y.detach().float())


if __name__ == "__main__":
    with processes.group():
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        each = init_device_mesh("cpu", (dist.get_world_size(),))
        train(each)
        train(each, double_quant=False, normalization="standard")
        refuse(each)
        keep_marks(each)
        refuse_in_a_plan(each, sys.argv[1])
        one_of_two(each)
        clip(each)
        low_precision(each)
