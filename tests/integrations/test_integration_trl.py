"""The code people paste: SFTTrainer on a 4-bit base, save, reload in fp16, merge, save, load."""

import inspect
from unittest import mock

import pytest
import torch
import transformers

import tiny_models as tiny
from integration_helpers import logits, peft_reads_mixtures, run_python, tiny_llama, tiny_tokenizer

pytest.importorskip("trl")
pytest.importorskip("datasets")

import qlora_ext
from qlora_ext import grouped_ops, ops
from qlora_ext.integrations.peft.versions import ADAPTS_STACKS
from qlora_ext.nn import Experts4bit

TEXTS = [f"{a} plus {b} is {a + b}. That is a sum." for a in range(4) for b in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_llama(tmp_path_factory.mktemp("llama"))
    tiny_tokenizer(path)
    return path


def sft_config(path, **kwargs):
    from trl import SFTConfig

    return SFTConfig(
        **{
            "output_dir": str(path),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_length": 48,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **kwargs,
        }
    )


def trainer(folder, path, model=None, lora=None, **kwargs):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    if model is None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=qlora_ext.QLoraExtConfig(), dtype=torch.float32
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=LoraConfig(
            **{
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "r": 8,
                "bias": "none",
                "task_type": "CAUSAL_LM",
                "target_modules": "all-linear",
                **(lora or {}),
            }
        ),
        args=sft_config(path, **kwargs),
    )


def losses(trained) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


def test_the_whole_way(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sft = trainer(folder, tmp_path / "out", max_steps=12)
    adapters = [p for p in sft.model.parameters() if p.requires_grad]
    assert adapters and all(p.dtype == torch.float32 for p in adapters)
    sft.train()
    history = losses(sft)
    assert history[-1] < history[0] - 0.3, history
    new_model = tmp_path / "new_model"
    sft.save_model(str(new_model))

    base = AutoModelForCausalLM.from_pretrained(
        folder, low_cpu_mem_usage=True, return_dict=True, torch_dtype=torch.float16,
        device_map={"": "cpu"}, trust_remote_code=True,
    )  # fmt: skip
    model = PeftModel.from_pretrained(base, new_model)
    model = model.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.dtype == torch.float16
    assert torch.equal(logits(again), logits(model))
    # The merged model is near the one that was trained: they differ by the base's 4 bits.
    trained = logits(sft.model)
    error = (logits(again).float() - trained).std() / trained.std()
    assert error < 0.5, error
    prompt = AutoTokenizer.from_pretrained(tmp_path / "merged")("1 plus", return_tensors="pt")
    assert again.generate(**prompt, max_new_tokens=4).shape[1] > 4


@pytest.mark.skipif(not ADAPTS_STACKS, reason="PEFT before 0.19.1 cannot adapt packed experts")
@pytest.mark.skipif(not peft_reads_mixtures(), reason="this PEFT fails under this transformers")
def test_a_mixture_the_whole_way(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, adapter = tmp_path / "mixture", tmp_path / "adapter"
    tiny.make("qwen3_moe", vocab_size=256).save_pretrained(folder)
    tiny_tokenizer(folder)
    lora = {
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    sft = trainer(folder, tmp_path / "out", lora=lora, max_steps=12)
    experts = sft.model.base_model.model.model.layers[0].mlp.experts
    assert type(experts.get_base_layer()) is Experts4bit
    before = {n: p.detach().clone() for n, p in experts.named_parameters() if "lora_" in n}
    with mock.patch.object(
        grouped_ops, "grouped_lora_gemm_4bit", wraps=grouped_ops.grouped_lora_gemm_4bit
    ) as fused:
        sft.train()
    assert fused.call_count >= 12 * 4
    assert all(not torch.equal(p, before[n]) for n, p in experts.named_parameters() if n in before)
    history = losses(sft)
    assert history[-1] < history[0] - 0.3, history
    sft.save_model(str(adapter))
    trained = logits(sft.model)

    base = AutoModelForCausalLM.from_pretrained(folder)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    # They differ by the base's 4 bits.
    assert (logits(again) - trained).std() / trained.std() < 0.5
    # Merged into the weights that the adapter was trained on, it computes what it did.
    torch.testing.assert_close(logits(sft.model.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)


def test_training_calls_our_op(folder, tmp_path):
    # Per step and layer: the fused op, or with dropout its two halves.
    sft = trainer(folder, tmp_path, max_steps=2, gradient_checkpointing=False)
    with (
        mock.patch.object(ops, "lora_shrink", wraps=ops.lora_shrink) as shrink,
        mock.patch.object(ops, "gemm_4bit", wraps=ops.gemm_4bit) as gemm,
        mock.patch.object(ops, "lora_gemm_4bit", wraps=ops.lora_gemm_4bit) as fused,
    ):
        sft.train()
        assert (shrink.call_count, gemm.call_count, fused.call_count) == (2 * 14, 2 * 14, 0)
        for module in sft.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        sft.train()
    assert (shrink.call_count, gemm.call_count, fused.call_count) == (2 * 14, 2 * 14, 2 * 14)


def test_report_to_tensorboard(folder, tmp_path, monkeypatch):
    """The callback writes the losses, and the configs of model and arguments as text."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    sft = trainer(folder, tmp_path, max_steps=2, report_to="tensorboard")
    sft.train()
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    written = events.read_bytes()
    assert b"train/loss" in written and b"qlora_ext" in written


def test_checkpointing_does_not_change_the_losses(folder, tmp_path):
    runs = []
    for checkpointing in [False, True]:
        transformers.set_seed(0)  # older TRL makes the adapters before it sets the seed
        sft = trainer(folder, tmp_path, gradient_checkpointing=checkpointing, max_steps=3)
        sft.train()
        runs.append(losses(sft))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(folder, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=qlora_ext.QLoraExtConfig(), dtype=dtype
    )
    sft = trainer(folder, tmp_path, model=model, bf16=dtype == torch.bfloat16, max_steps=3)
    assert all(p.dtype == torch.float32 for p in sft.model.parameters() if p.requires_grad)
    sft.train()
    history = losses(sft)
    assert history[-1] < history[0], history


def test_model_by_name(folder, tmp_path):
    """SFTTrainer loads and quantizes the model itself."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTTrainer

    settings = {"quantization_config": qlora_ext.QLoraExtConfig()}
    is_argument = "quantization_config" in inspect.signature(SFTTrainer).parameters
    more = {} if is_argument else {"model_init_kwargs": settings}  # older TRL
    sft = SFTTrainer(
        model=str(folder),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        args=sft_config(tmp_path, max_steps=1, **more),
        **(settings if is_argument else {}),
    )
    sft.train()
    assert type(sft.model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_resume_from_checkpoint(folder, tmp_path):
    first = trainer(folder, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer(folder, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-1] == pytest.approx(losses(first)[-1], rel=1e-3)


def test_plain_trainer_refuses_a_model_without_adapters(folder, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=qlora_ext.QLoraExtConfig()
    )
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_without_bitsandbytes(folder, tmp_path):
    """What transformers reads bitsandbytes for when a model says it is loaded in 4 bits."""
    run_python(
        f"""
        sys.path.insert(0, "tests")
        from pathlib import Path
        import importlib.util
        assert importlib.util.find_spec("bitsandbytes") is None
        from test_integration_trl import trainer, losses
        folder, out = Path({str(folder)!r}), Path({str(tmp_path)!r})
        sft = trainer(folder, out, max_steps=2, save_strategy="steps", save_steps=1)
        sft.train()
        assert len(losses(sft)) == 2
        sft.save_model(str(out / "adapter"))
        base = sft.model.unload()
        assert not getattr(base, "is_loaded_in_4bit", False)
        assert base.num_parameters() > 1000
        base.save_pretrained(out / "base", max_shard_size="30KB")
        assert len(list((out / "base").glob("model-*.safetensors"))) > 1
        import peft
        from transformers import AutoModelForCausalLM
        again = AutoModelForCausalLM.from_pretrained(out / "base")
        model = peft.PeftModel.from_pretrained(again, out / "adapter")
        model.merge_and_unload(safe_merge=True).save_pretrained(out / "merged")
        """,
        without=("bitsandbytes",),
    )
