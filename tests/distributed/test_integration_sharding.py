"""accelerate's FSDP2 and TRL's DDP on packed layers, two gloo processes on the CPU against one."""

import sys
import types

import pytest

import processes


def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    processes.run(__file__, str(tmp_path))


# What each process runs ----------------------------------------------------------------------


def train(efficient: bool, family: str, block: str) -> None:
    """One step's loss and gradients, sharded by what `Accelerator.prepare` calls for FSDP2.

    The Accelerator itself offers FSDP on accelerators only, so that function is called directly.
    """
    import copy

    import peft
    import torch
    import torch.distributed as dist
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    import qlora_ext
    import tiny_models as tiny

    torch.manual_seed(0)
    model = qlora_ext.quantize_model(tiny.make(family), progress_bar=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    one = copy.deepcopy(model)
    ids = tiny.inputs(one)["input_ids"]  # one row for each process
    one_loss = one(input_ids=ids, labels=ids).loss
    one_loss.backward()

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        cpu_ram_efficient_loading=efficient,
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        parallelism_config=None,
    )
    model = fsdp2_prepare_model(accelerator, model)
    row = ids[dist.get_rank()][None]
    loss = model(input_ids=row, labels=row).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, one_loss.detach(), rtol=1e-5, atol=1e-5)

    gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    assert len(gradients) == 28
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if name in gradients:
            error = (parameter.grad.full_tensor() - gradients[name]).abs().max()
            assert error <= 1e-5 * largest, (name, error)
    before = one.state_dict()
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert tensor.dtype != torch.uint8 or torch.equal(full, before[name]), name


def merge_with_peft(path) -> None:
    """PEFT's merging and saving refuse a sharded model, which trains on; its state, gathered into a
    whole one, merges as that of one process."""
    import peft
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    import qlora_ext
    import tiny_models as tiny
    from qlora_ext.integrations.peft import merging_to_4bit, versions

    every = "all-linear"
    configs = {
        "lora": peft.LoraConfig(r=4, target_modules=every),
        "dora": peft.LoraConfig(r=4, target_modules=every, use_dora=True),
        "adalora": peft.AdaLoraConfig(init_r=4, target_modules=every, total_step=10),
        "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=every),
        "miss": peft.MissConfig(r=4, target_modules=every),
    }
    if versions.ADAPTS_STACKS:
        stacks = ["experts.gate_up_proj", "experts.down_proj"]
        configs["experts"] = peft.LoraConfig(r=4, target_modules=[], target_parameters=stacks)

    def build(kind):
        torch.manual_seed(0)
        dense = tiny.make("qwen3_moe" if kind == "experts" else "llama")
        model = qlora_ext.quantize_model(dense, progress_bar=False)
        model = peft.get_peft_model(model, configs[kind])
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "oft_R" in name or "miss_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    def shard(model):
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        return fully_shard(model)

    row = tiny.inputs(build("lora"))["input_ids"][dist.get_rank()][None]
    words = r"[\w.]+ is a DTensor, .* want a whole model: gather its state as docs/sharding"
    for kind in configs:
        model = shard(build(kind))
        before = {name: p.full_tensor() for name, p in model.named_parameters()}
        calls = [("merge_and_unload", ()), ("merge_adapter", ()), ("save_pretrained", (path,))]
        for name, arguments in calls:
            with pytest.raises(ValueError, match=f"{name}: {words}"):
                getattr(model, name)(*arguments)
        with merging_to_4bit(), pytest.raises(ValueError, match=f"merge_and_unload: {words}"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match=f"replace_lora_weights_loftq: {words}"):
            qlora_ext.integrations.peft.replace_lora_weights_loftq(model, path)
        if kind in ("lora", "adalora", "experts"):
            block = model.get_base_model().model.layers[0].mlp
            layer = block.experts if kind == "experts" else block.up_proj
            for name in ("merge", "unmerge"):
                with pytest.raises(ValueError, match=rf"{name}: [\w.]+: {words}"):
                    getattr(layer, name)()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), before[name]), (kind, name)
        model(input_ids=row, labels=row).loss.backward()

        merged = build(kind)
        merged.merge_adapter()
        with pytest.raises(ValueError, match=f"unmerge_adapter: {words}"):
            shard(merged).unmerge_adapter()

        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            final = build(kind)
            for parameter in final.parameters():
                parameter.data.zero_()
            final.load_state_dict(whole)
            want = tiny.logits(build(kind).merge_and_unload())
            assert torch.equal(tiny.logits(final.merge_and_unload()), want)


def refuse(path) -> None:
    """Tensor parallelism says so at load, of a model to pack and of a packed one."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import qlora_ext

    dense, packed = f"{path}/dense", f"{path}/packed"
    if dist.get_rank() == 0:
        import tiny_models as tiny

        tiny.make("llama").save_pretrained(dense)
        qlora_ext.quantize_model(tiny.make("llama"), progress_bar=False).save_pretrained(packed)
    dist.barrier()
    config = qlora_ext.QLoraExtConfig()
    for folder, settings in [(dense, {"quantization_config": config}), (packed, {})]:
        with pytest.raises(ValueError, match="tp_size > 1 is not supported"):
            AutoModelForCausalLM.from_pretrained(
                folder, distributed_config=DistributedConfig(tp_size=2), **settings
            )


def train_with_trl(path) -> None:
    """SFTTrainer under DDP: as many rows a step as the processes have, one adapter in all."""
    import torch
    import torch.distributed as dist
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    import qlora_ext
    from integration_helpers import tiny_llama, tiny_tokenizer

    base = f"{path}/base"
    if dist.get_rank() == 0:
        tiny_tokenizer(tiny_llama(base))
    dist.barrier()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [f"{i} plus {i} is {2 * i}." for i in range(8)]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=qlora_ext.QLoraExtConfig(), dtype=torch.float32
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": rows}),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=f"{path}/run", max_steps=3, per_device_train_batch_size=2, use_cpu=True,
            learning_rate=1e-2, bf16=False, ddp_backend="gloo", report_to="none", save_steps=3,
            logging_steps=1, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    assert trainer.args.world_size == 2
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert trainer.state.epoch == 1.5  # 3 steps of 2 x 2 rows, of 8
    seen = 0
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            mean = parameter.detach().clone()
            dist.all_reduce(mean)
            assert torch.equal(mean / 2, parameter), name
            assert "lora_B" not in name or parameter.abs().max() > 0, name
            seen += 1
        elif parameter.dtype == torch.uint8:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain]), name
    assert seen == 28


if __name__ == "__main__":
    from qlora_ext.integrations.peft.versions import RELEASE

    with processes.group():
        for each in (False, True):
            train(each, "llama", "LlamaDecoderLayer")
        if RELEASE >= (0, 20):  # before, "all-linear" does not work for a mixture
            train(False, "qwen3_moe", "Qwen3MoeDecoderLayer")
        merge_with_peft(sys.argv[1])
        refuse(sys.argv[1])
        train_with_trl(sys.argv[1])
