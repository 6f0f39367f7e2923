"""DeepSpeed's ZeRO on packed layers, two gloo processes on the CPU against one process."""

import os
import sys

import pytest

import processes

MODES = [(2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not here: make test-deepspeed")
    pytest.importorskip("transformers")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    processes.run(__file__, str(tmp_path))


# What each process runs ---------------------------------------------------------------------------


def train(stage: int, dtype: str, folder: str) -> None:
    """Three steps' losses, the bytes after them, and a checkpoint into another engine."""
    import deepspeed
    import torch
    import torch.distributed as dist

    import tiny_models as tiny
    from qlora_ext import (
        LoraConfig,
        add_lora,
        load_adapter,
        merge_and_unload,
        quantize_model,
        save_adapter,
    )

    def build(seed=0):
        model = quantize_model(tiny.make("llama"), progress_bar=False)
        add_lora(model, LoraConfig(key=True, projection=True, mlp=True))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        return model

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def engine_of(model):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # 0: also tensors as small as these are split among the processes.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default is 1.0
        }
        if dtype == "bf16":
            config["bf16"] = {"enabled": True}
        return deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]

    one = build()
    optimizer = adamw(one)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    ids = tiny.inputs(one)["input_ids"]
    row = ids[dist.get_rank()][None]

    def step(engine):
        loss = engine(input_ids=row, labels=row).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        return mean / 2

    engine = engine_of(build())
    tolerance = 5e-3 if dtype == "bf16" else 1e-5
    for _ in range(3):
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(step(engine), loss.detach(), rtol=tolerance, atol=tolerance)

    packed = {n: p for n, p in engine.module.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 14 * 4
    with deepspeed.zero.GatheredParameters(list(packed.values())):
        for name, parameter in packed.items():
            assert torch.equal(parameter, before[name]), name

    engine.save_checkpoint(folder)
    if stage == 3:  # its files hold empty tensors for frozen weights
        with pytest.raises(RuntimeError, match=r"has shape \[0\], want"):
            engine_of(build(seed=1)).load_checkpoint(folder)
        for call in (save_adapter, merge_and_unload):
            with pytest.raises(
                ValueError, match=rf"{call.__name__}: [\w.]+ is a tensor of .* ZeRO-3"
            ):
                call(engine.module, *[f"{folder}/not-written"] * (call is save_adapter))
        assert not os.path.exists(f"{folder}/not-written")
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            adapter = os.path.join(folder, f"adapter-{dist.get_rank()}")
            save_adapter(engine.module, adapter)
        load_adapter(quantize_model(tiny.make("llama"), progress_bar=False), adapter)
        return
    other = engine_of(build(seed=1))
    other.load_checkpoint(folder)
    for _ in range(2):
        assert step(other) == step(engine)


if __name__ == "__main__":
    with processes.group():
        for each in MODES:
            train(*each, folder=os.path.join(sys.argv[1], "-".join(map(str, each))))
