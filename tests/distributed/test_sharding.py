"""DDP and FSDP2 with packed layers, two gloo processes on the CPU against one process."""

import sys
from pathlib import Path

import pytest

import processes

MODES = ["ddp", "ddp_experts", "fsdp2", "fsdp2_bfloat16", "fsdp2_offload", "fsdp2_experts"]


def test_two_processes_train_as_one_and_go_on_from_a_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    processes.run(__file__, str(tmp_path / "checkpoint"))


# What each process runs ---------------------------------------------------------------------------


def build(family="llama", seed=0):
    """A packed tiny model with adapters that are not zero."""
    import torch

    import tiny_models as tiny
    from qlora_ext import LoraConfig, add_lora, quantize_model

    # Three experts, which two processes share unequally.
    settings = {"num_local_experts": 3} if family == "mixtral" else {}
    model = quantize_model(tiny.make(family, **settings), progress_bar=False)
    config = LoraConfig(key=True, projection=True, mlp=True, lora_dropout=0.0)
    add_lora(model, config, share_inputs=True)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def shard(model, mode):
    """FSDP2 over each layer and the model."""
    import torch
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    low = torch.bfloat16 if mode == "fsdp2_bfloat16" else None
    settings = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=False) if mode == "fsdp2_offload" else OffloadPolicy()
        ),
    }
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def train(mode):
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    import tiny_models as tiny

    def full(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    family = "mixtral" if mode.endswith("experts") else "llama"
    rank = dist.get_rank()
    ids = tiny.inputs(build(family))["input_ids"]  # one row for each process
    one = build(family)
    one_loss = one(input_ids=ids, labels=ids).loss
    one_loss.backward()

    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = model
    if mode.startswith("ddp"):
        # An expert that no token was sent to has a gradient of zero, so nothing is unused.
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        shard(model, mode)
        local = sum(p.to_local().nbytes for p in model.parameters())
        share = 0.51 if family == "llama" else 0.65  # the first process has two of three experts
        assert local <= share * sum(p.nbytes for p in one.parameters())
        stacks = [p for n, p in model.named_parameters() if "experts." in n and "codebook" not in n]
        assert all(len(p.to_local()) == 2 - rank for p in stacks) and len(stacks) in (0, 2 * 10)

    row = ids[rank : rank + 1]
    loss = wrapped(input_ids=row, labels=row).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    tolerance = 2e-2 if mode.endswith("bfloat16") else 1e-5
    torch.testing.assert_close(mean / 2, one_loss.detach(), rtol=tolerance, atol=tolerance)
    gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    assert len(gradients) == (28 if family == "llama" else 24)
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
    again = build(family)
    if mode.startswith("ddp") or rank == 0:
        again.load_state_dict(gathered)
        assert torch.equal(tiny.logits(again), tiny.logits(one))
    set_model_state_dict(model, dict(before), options=StateDictOptions(full_state_dict=True))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    moved = sum(not torch.equal(full(t), before[n]) for n, t in model.state_dict().items())
    assert moved == len(gradients), moved
    if not mode.startswith("ddp"):
        refuse_sharded(model)


def refuse_sharded(model):
    """What needs whole tensors says so."""
    import torch

    from qlora_ext import merge_and_unload, merge_into_4bit, save_adapter

    folder = f"{sys.argv[1]}-refused"
    for call, arguments in (
        (save_adapter, {"path": folder}),
        (merge_and_unload, {"dtype": torch.float32}),
        (merge_into_4bit, {"base": model}),
        (type(model).save_pretrained, {"save_directory": folder}),
    ):
        words = rf"{call.__name__}: [\w.]+ is a DTensor, .* want a whole model"
        with pytest.raises(ValueError, match=words):
            call(model, **arguments)
    assert not list(Path(folder).glob("**/*.safetensors"))


def refuse():
    """The first FSDP joins tensors of one dtype, which packed and other weights are not."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(ValueError, match="Must flatten tensors with uniform dtype"):
        FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True)


def resume(folder):
    """Sharded model and optimizer through a checkpoint on disk into others: the same next steps."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    import tiny_models as tiny

    ids = tiny.inputs(build())["input_ids"][dist.get_rank()][None]

    def made(seed):
        model = shard(build(seed=seed), "fsdp2_bfloat16")
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2)

    def step(model, optimizer):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def state(model, optimizer):
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    first, other = made(seed=0), made(seed=1)
    for _ in range(2):
        step(*first)
    dcp.save(state(*first), checkpoint_id=folder)
    read = state(*other)
    dcp.load(read, checkpoint_id=folder)
    set_state_dict(*other, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    assert [step(*first) for _ in range(2)] == [step(*other) for _ in range(2)]
    for (name, one), two in zip(first[0].state_dict().items(), other[0].state_dict().values()):
        assert torch.equal(one.to_local(), two.to_local()), name


if __name__ == "__main__":
    with processes.group():
        for each in MODES:
            train(each)
        refuse()
        resume(sys.argv[1])
