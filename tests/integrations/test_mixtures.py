"""Mixtures of experts through transformers: packed while loading, saved as stacks, reloaded; and
checkpoints of the version that packed expert by expert."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models as tiny

transformers = pytest.importorskip("transformers")

from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import qlora_ext
from qlora_ext.integrations.transformers import versions
from qlora_ext.integrations.transformers.checkpoint import Checkpoint
from qlora_ext.integrations.transformers.quantizer import QLoraExtHfQuantizer
from qlora_ext.nn import Experts4bit
from qlora_ext.nn.experts import is_fused_experts
from qlora_ext.nn.packed import _PACKED_KEYS
from qlora_ext.nn.stack import Stack4bit
from qlora_ext.text import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*stay unquantized:UserWarning")

_SIZES = {**tiny.LLAMA, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}
# Stored an expert a tensor or fused, renamed, transposed, with biases, without gate.
MODELS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "intermediate_size": 64}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {"num_experts": 4, "layer_types": ["full_attention"] * 2, "num_dense_layers": 0},
    ),
    "aria": ("AriaTextConfig", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "n_routed_experts": 4, "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2,
            "chunk_size": 8, "moe_shared_expert_intermediate_size": 32,
        },
    ),
}  # fmt: skip


BY_EXPERT = pytest.mark.skipif(
    versions.RELEASE < (5, 8), reason="the loader merges experts itself, a projection at a time"
)


def make(name, dtype=torch.float32):
    config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**{**_SIZES, **settings})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load(path, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **settings)


def quantized(name, path, **settings):
    """A model that is packed while it is loaded; path / "dense" is the checkpoint."""
    make(name).save_pretrained(path / "dense")
    return load(path / "dense", quantization_config=qlora_ext.QLoraExtConfig(**settings))


def stacks(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Stack4bit)}


def equal_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("normalization, count", [("absmax", 4), ("standard", 5)])
@pytest.mark.parametrize("name", MODELS)
def test_stacks_are_saved_whole_and_reload(name, normalization, count, tmp_path):
    """The weight, its statistics and a bias: no conversion of transformers makes more of them."""
    model = quantized(name, tmp_path, normalization=normalization)
    in_memory = qlora_ext.quantize_model(
        make(name), qlora_ext.QuantConfig(normalization=normalization), progress_bar=False
    )
    assert equal_tensors(model.state_dict(), in_memory.state_dict())
    # Older releases hold the experts of these two in layers of their own.
    held = 4 if any(map(is_fused_experts, make(name).modules())) else 0
    assert len(stacks(model)) == held and (held or name in ("granitemoe", "aria"))
    count += name == "gpt_oss"
    for folder, one in (("loaded", model), ("in memory", in_memory)):
        one.save_pretrained(tmp_path / folder)
        stored = load_file(tmp_path / folder / "model.safetensors")
        kinds = [re.search(r"experts\.(?:up|down)\.(\w+)$", key) for key in stored]
        assert sum(kind is not None for kind in kinds) == held * count
        names = [key for key in stored if "experts." in key and "shared" not in key]
        assert len(names) == held * count or not held
        for key, tensor in stored.items():
            if re.search(r"experts\.(up|down)\.(?!weight_codebook)", key):
                assert len(tensor) == 4, key
        again = load(tmp_path / folder)
        assert equal_tensors(again.state_dict(), model.state_dict())
        assert torch.equal(tiny.logits(again), tiny.logits(model))
        again.save_pretrained(tmp_path / "again")
        assert equal_tensors(load_file(tmp_path / "again" / "model.safetensors"), stored)


@pytest.mark.skipif(
    versions.RELEASE < (5, 8),
    reason="transformers' own code cannot save some of these models then, or has no fused experts",
)
@pytest.mark.parametrize("name", MODELS)
def test_made_dense_experts_are_saved_as_the_class_saves_them(name, tmp_path):
    """Though the packed checkpoint, which they were read from, has them together."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from qlora_ext.cli import app

    if not any(map(is_fused_experts, make(name).modules())):
        pytest.skip("this release of transformers holds these experts in layers of their own")
    quantized(name, tmp_path).save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed")
    config = qlora_ext.LoraConfig(r=2, target_modules=(), target_parameters=["down_proj"])
    qlora_ext.add_lora(model, config)
    qlora_ext.save_adapter(model, tmp_path / "adapter")
    merged = qlora_ext.merge_and_unload(model, torch.float32, progress_bar=False)
    merged.save_pretrained(tmp_path / "merged")
    arguments = ["merge", *(str(tmp_path / f) for f in ("packed", "adapter", "command"))]
    result = CliRunner().invoke(app.app, [*arguments, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    want = {key: t.shape for key, t in load_file(tmp_path / "dense/model.safetensors").items()}
    for folder in ("merged", "command"):
        stored = load_file(tmp_path / folder / "model.safetensors")
        assert {key: t.shape for key, t in stored.items()} == want
        assert torch.equal(tiny.logits(load(tmp_path / folder)), tiny.logits(merged))


@BY_EXPERT
def test_experts_are_read_and_packed_one_after_another(tmp_path, monkeypatch):
    """Of the dense weights, one expert's are in memory at a time."""
    events = []

    def watched(module, name, note):
        function = getattr(module, name)

        def call(*args, **kwargs):
            events.append(note(*args))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    make("mixtral").save_pretrained(tmp_path / "dense")
    watched(core_model_loading, "_materialize_copy", lambda tensor, *_: "read")
    watched(Stack4bit, "set_expert", lambda stack, e, weight: f"expert {e} {list(weight.shape)}")
    model = load(tmp_path / "dense", quantization_config=qlora_ext.QLoraExtConfig())
    started = [i for i, event in enumerate(events) if event.startswith("expert 0 ")]
    up, down = ([events[i - n : i + 3 * (n + 1) + 1] for i in started if events[i].endswith(shape)]
                for n, shape in ((2, "[192, 64]"), (1, "[64, 96]")))  # fmt: skip
    assert up == 2 * [[w for e in range(4) for w in ("read", "read", f"expert {e} [192, 64]")]]
    assert down == 2 * [[w for e in range(4) for w in ("read", f"expert {e} [64, 96]")]]
    assert not model.hf_quantizer.stacks
    assert {type(c) for c in model._weight_conversions} == {WeightConverter, WeightRenaming}


_OF_LINEAR = "self_attn.q_proj.bias"


@pytest.mark.parametrize(
    "stored, key",
    [("packed", "mlp.experts.up.bias"), ("packed", _OF_LINEAR), ("dense", _OF_LINEAR)],
)
def test_a_bias_that_a_checkpoint_lacks_is_refused(stored, key, tmp_path):
    """It would be whatever the memory held."""
    quantized("gpt_oss", tmp_path).save_pretrained(tmp_path / "packed")
    file = tmp_path / stored / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.{key}"]
    save_file(tensors, file, metadata={"format": "pt"})
    packs = {"quantization_config": qlora_ext.QLoraExtConfig()} if stored == "dense" else {}
    with pytest.raises(CheckpointError, match=rf"lacks model\.layers\.1\.{re.escape(key)}"):
        load(tmp_path / stored, **packs)


@BY_EXPERT
def test_a_stack_of_another_shape_is_refused_with_its_file(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    config = qlora_ext.QLoraExtConfig()
    place = "model.layers.1.block_sparse_moe.experts"
    words = r"model\.safetensors: model\.layers\.1\.mlp\.experts\.down_proj: shape got "
    for change, got in (
        ({f"{place}.3.w2.weight": None}, r"\[3, 64, 96\], want \[4, 64, 96\] by config"),
        ({f"{place}.2.w2.weight": torch.ones(64, 94)}, r"\[4, 64, 94\], want \[4, 64, 96\]"),
    ):
        state = {key: tensor for key, tensor in {**whole, **change}.items() if tensor is not None}
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words + got):
            load(tmp_path, quantization_config=config)


def test_the_commands_name_a_stack_of_another_shape_with_both_shapes(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    wrong = {key: torch.ones(64, 94) for key in state if ".layers.1." in key and ".w2." in key}
    save_file({**state, **wrong}, file, metadata={"format": "pt"})
    words = r"layers\.1\..*\(shape got \[4, 64, 94\], want \[4, 64, 96\] by config\.json\)"
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path)


def test_a_device_map_counts_experts_as_packed(tmp_path):
    quantizer = QLoraExtHfQuantizer(qlora_ext.QLoraExtConfig())
    with torch.device("meta"):
        model = make("mixtral", torch.bfloat16)
    quantizer._process_model_before_weight_loading(model, dtype=torch.bfloat16)
    counted = sum(
        parameter.numel() * quantizer.param_element_size(model, name, parameter)
        for name, parameter in model.named_parameters()
        if ".experts." in name
    )
    packed = qlora_ext.quantize_model(make("mixtral"), progress_bar=False)
    nbytes = sum(p.nbytes for n, p in packed.named_parameters() if ".experts." in n)
    assert nbytes <= counted < 1.1 * nbytes


def test_no_conversion_of_transformers_takes_a_stack_for_its_own():
    """Renaming is undone on loading; a converter would tear or transpose it."""
    mappings = conversion_mapping._build_checkpoint_conversion_mapping()
    assert len(mappings) > 50
    seen = 0
    for kind in mappings:
        conversions = conversion_mapping.get_checkpoint_conversion_mapping(kind)
        backward = []
        for conversion in conversions[::-1]:
            try:
                backward.append(conversion.reverse_transform())
            except (ValueError, NotImplementedError):  # it cannot be reversed, nor can saving
                continue
        for holder in ("mlp", "block_sparse_moe", "feed_forward", "mixer", "moe"):
            for key in (*_PACKED_KEYS, "bias"):
                for side in ("up", "down"):
                    name = f"model.layers.3.{holder}.experts.{side}.{key}"
                    for way in (conversions, backward):
                        renamings = [c for c in way if isinstance(c, WeightRenaming)]
                        converters = [c for c in way if isinstance(c, WeightConverter)]
                        _, pattern = rename_source_key(name, renamings, converters)
                        assert pattern is None, (kind, name, pattern)
                        seen += len(converters)
    assert seen > 10**3


# Checkpoints of the version that packed expert by expert ------------------------------------------


def one_by_one(path, into):
    """Writes a packed checkpoint as that version did: experts.packed.2.up.weight."""
    into.mkdir()
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2
    config["quantization_config"]["format_version"] = 1
    (into / "config.json").write_text(json.dumps(config))
    old = unstacked(load_file(path / "model.safetensors"))
    save_file(old, into / "model.safetensors", metadata={"format": "pt"})
    return old


def unstacked(state):
    """A state dict as that version had it."""
    old = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.*experts)\.((?:up|down)\.(\w+))", key)
        if match is None:
            old[key] = tensor
            continue
        for e in range(4):
            part = tensor if match[3] == "weight_codebook" else tensor[e]
            old[f"{match[1]}.packed.{e}.{match[2]}"] = part.clone()
    return old


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_an_older_checkpoint_loads_as_stacks(name, tmp_path):
    model = quantized(name, tmp_path, normalization="standard", quant_type="linear")
    model.save_pretrained(tmp_path / "new")
    old = one_by_one(tmp_path / "new", tmp_path / "old")
    assert sum(".packed.3." in key for key in old) == 4 * (6 if name == "gpt_oss" else 5)
    again = load(tmp_path / "old")
    assert equal_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    again.save_pretrained(tmp_path / "again")  # in today's format
    stored = [load_file(tmp_path / way / "model.safetensors") for way in ("again", "new")]
    assert equal_tensors(*stored)
    configs = [(tmp_path / way / "config.json").read_text() for way in ("again", "new")]
    assert configs[0] == configs[1]
    dry = load(tmp_path / "old", device_map="meta")
    assert {n: t.shape for n, t in dry.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    fresh = qlora_ext.quantize_model(
        make(name), model.hf_quantizer.quant_config, progress_bar=False
    )
    fresh.load_state_dict(unstacked(model.state_dict()))
    assert equal_tensors(fresh.state_dict(), model.state_dict())


def test_an_older_checkpoint_that_lacks_an_expert_is_refused(tmp_path):
    quantized("mixtral", tmp_path).save_pretrained(tmp_path / "new")
    old = one_by_one(tmp_path / "new", tmp_path / "old")
    for key in [key for key in old if "layers.1" in key and ".packed.2.down." in key]:
        del old[key]
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    # transformers' words, and ours where it takes what it reads
    words = r"ignore_mismatched_sizes|experts\.down\.weight: shape got \[3, 64, 48\]"
    with pytest.raises((ValueError, RuntimeError), match=words):
        load(tmp_path / "old")


def test_the_commands_read_an_older_checkpoint(tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from qlora_ext.cli import app

    model = quantized("mixtral", tmp_path)
    model.save_pretrained(tmp_path / "new")
    one_by_one(tmp_path / "new", tmp_path / "old")
    config = qlora_ext.LoraConfig(r=2, target_modules=(), target_parameters=["down_proj"])
    qlora_ext.add_lora(model, config)
    for layer in stacks(model).values():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B, std=0.02)
    qlora_ext.save_adapter(model, tmp_path / "adapter")
    for base in ("new", "old"):
        arguments = ["merge", tmp_path / base, tmp_path / "adapter", tmp_path / f"merged {base}"]
        result = CliRunner().invoke(app.app, [*map(str, arguments), "--dtype", "float32"])
        assert result.exit_code == 0, result.output
    merged = [load(tmp_path / f"merged {base}") for base in ("new", "old")]
    assert equal_tensors(*(one.state_dict() for one in merged))
    torch.testing.assert_close(tiny.logits(merged[0]), tiny.logits(model), rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, Experts4bit) for m in merged[1].modules())
