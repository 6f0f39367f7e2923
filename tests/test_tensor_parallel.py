"""Column and row parallelism on packed layers, two gloo processes on the CPU against one."""

import processes
import pytest


def test_two_processes_train_as_one():
    pytest.importorskip("transformers")
    processes.run(__file__)


# What each process runs ---------------------------------------------------------------------------


def build(config):
    import tiny_models as tiny
    import torch

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
    import tiny_models as tiny
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor.parallel import parallelize_module

    from qlora_ext import QuantConfig, save_adapter

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
        for name, want in trained(one).items():
            got = trained(model)[name].grad.full_tensor()
            assert (got - want.grad).abs().max() <= 1e-5 * want.grad.abs().max() + 1e-7, name
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
    with pytest.raises(ValueError, match="model has no adapters"):
        save_adapter(model, "nowhere")


def refuse(mesh):
    import torch

    from qlora_ext.integrations.tensor_parallel import ColwiseParallel4bit, RowwiseParallel4bit
    from qlora_ext.nn import Linear4bit

    for K, N, style, words in (
        (64, 64, RowwiseParallel4bit(), "by columns, want K a multiple of blocksize x 2"),
        (64, 63, ColwiseParallel4bit(), "by rows, want K a multiple of blocksize and N of 2"),
        (96, 64, ColwiseParallel4bit(), "blocksize=64 cannot be cut into 2 parts"),
    ):
        with pytest.raises(ValueError, match=words):
            style._apply(Linear4bit(K, N), mesh)
    with pytest.raises(TypeError, match="the layer is a Linear, want a Linear4bit"):
        ColwiseParallel4bit()._apply(torch.nn.Linear(64, 64), mesh)


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
        low_precision(each)
