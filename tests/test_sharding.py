"""DDP and FSDP2 with packed layers, two gloo processes on the CPU against one process."""

import processes
import pytest

MODES = ["ddp", "fsdp2", "fsdp2_bfloat16"]


def test_two_processes_train_as_one():
    pytest.importorskip("transformers")
    processes.run(__file__)


# What each process runs ---------------------------------------------------------------------------


def train(mode):
    import tiny_models as tiny
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    from qlora_ext import LoraConfig, add_lora, quantize_model

    def build():
        model = quantize_model(tiny.make("llama"), progress_bar=False)
        add_lora(model, LoraConfig(key=True, projection=True, mlp=True, lora_dropout=0.0))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        return model

    def full(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    rank = dist.get_rank()
    ids = tiny.inputs(build())["input_ids"]  # one row for each process
    one = build()
    one_loss = one(input_ids=ids, labels=ids).loss
    one_loss.backward()

    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = model
    if mode == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        low = torch.bfloat16 if mode.endswith("bfloat16") else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        local = sum(p.to_local().nbytes for p in model.parameters())
        assert local <= 0.51 * sum(p.nbytes for p in one.parameters())

    row = ids[rank : rank + 1]
    loss = wrapped(input_ids=row, labels=row).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    tolerance = 2e-2 if mode.endswith("bfloat16") else 1e-5
    torch.testing.assert_close(mean / 2, one_loss.detach(), rtol=tolerance, atol=tolerance)
    gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    assert len(gradients) == 28
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in gradients)
        if name in gradients:
            error = (full(parameter.grad) - gradients[name]).abs().max()
            assert error <= tolerance * largest, (name, error, largest)

    # Gathered, sharded and mixed-precision or not: the bytes are the ones that were packed.
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(full(tensor), before[name]), name
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    again = build()
    if mode == "ddp" or rank == 0:
        again.load_state_dict(gathered)
        assert torch.equal(tiny.logits(again), tiny.logits(one))
    set_model_state_dict(model, dict(before), options=StateDictOptions(full_state_dict=True))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    moved = sum(not torch.equal(full(t), before[n]) for n, t in model.state_dict().items())
    assert moved == 28, moved


if __name__ == "__main__":
    with processes.group():
        for each in MODES:
            train(each)
