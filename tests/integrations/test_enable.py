"""QLORA_EXT_ENABLE: our kernels and layers in programs that never name qlora_ext."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from integration_helpers import tiny_llama

pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

LOADED = "print('qlora_ext' in __import__('sys').modules)"


def run(code, enable=None, **env):
    """(stdout, stderr's lines about us) of a new process, which must succeed."""
    env = {**os.environ, **env}
    env.pop("QLORA_EXT_ENABLE", None)
    if enable is not None:
        env["QLORA_EXT_ENABLE"] = enable
    done = subprocess.run(  # not from the checkout, where `import qlora_ext` finds it at once
        [sys.executable, "-c", code], env=env, cwd=tempfile.gettempdir(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if line.startswith("qlora_ext:")]


# The doors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("enable", [None, "", "0"])
def test_without_the_variable_nothing_happens(enable):
    out, said = run(f"import torch, bitsandbytes\n{LOADED}", enable)
    assert (out, said) == ("False\n", [])


def test_kernels_under_bitsandbytes():
    code = """
import torch, bitsandbytes.functional as F
from qlora_ext.integrations import bitsandbytes as ours
print(ours.is_enabled())
"""
    out, said = run(code, "1")
    assert out == "True\n"
    assert said == [
        "qlora_ext: bitsandbytes' 4-bit ops run on qlora_ext's kernels (QLORA_EXT_ENABLE=1)"
    ]


def test_torch_alone_takes_only_the_layers_door():
    assert run(f"import torch\n{LOADED}", "1") == ("False\n", [])
    assert run(f"import torch\n{LOADED}", "layers") == ("True\n", [])
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert run(f"import torch\n{LOADED}", "layers", **off) == ("False\n", [])


def test_an_unknown_value_is_named():
    out, said = run(f"import torch, bitsandbytes\n{LOADED}", "yes")
    assert out == "False\n"
    assert said == ["qlora_ext: not enabled: want 1 or layers (QLORA_EXT_ENABLE=yes)"]


@pytest.mark.parametrize("enable", ["1", "layers"])
def test_a_broken_installation_breaks_no_import(tmp_path, enable):
    (tmp_path / "qlora_ext").mkdir()
    (tmp_path / "qlora_ext" / "__init__.py").write_text("raise OSError('no library')")
    code = "import torch, bitsandbytes; print(bitsandbytes.__name__)"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    out, said = run(code, enable, PYTHONPATH=path)
    assert out == "bitsandbytes\n"
    assert said and all("not enabled: OSError: no library" in line for line in said)


@pytest.mark.parametrize(
    ("enable", "stderr"), [("1", "None"), ("1", "broken"), ("yes", "broken"), ("layers", "broken")]
)
def test_a_stderr_that_cannot_be_written_breaks_no_import(enable, stderr):
    """None is what Python has for a closed one (2>&-); print would take stdout instead."""
    code = f"""
import sys
class Broken:
    def write(self, text):
        raise OSError("broken pipe")
    def flush(self):
        pass  # Python calls it at exit
broken = Broken()
sys.stderr = {stderr}
import torch, bitsandbytes
import qlora_ext_enable
qlora_ext_enable.tell("something")
print(bitsandbytes.__name__, "qlora_ext" in sys.modules)
"""
    assert run(code, enable) == (f"bitsandbytes {enable != 'yes'}\n", [])


# Layers ----------------------------------------------------------------------------------------

PREPARE = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.set_num_threads(1)
ids = torch.arange(24).reshape(2, 12)
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage="bfloat16",
)
def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()
def layer(model):
    return type(model.model.layers[0].mlp.up_proj).__module__
"""
WRITE = (
    PREPARE
    + """
model = load(sys.argv[1], quantization_config=config)
model.save_pretrained(sys.argv[2])
torch.save(model(input_ids=ids).logits.detach(), sys.argv[3])
assert config.llm_int8_skip_modules is None
assert model.is_loaded_in_4bit and str(model.quantization_method.value) == "bitsandbytes"
assert type(model.config.quantization_config).__name__ == "BitsAndBytesConfig"
print(layer(model))
"""
)
READ = (
    PREPARE
    + """
model = load(sys.argv[2])
torch.save(model(input_ids=ids).logits.detach(), sys.argv[3])
print(layer(model))
"""
)
OURS, THEIRS = "qlora_ext.nn.linear\n", "bitsandbytes.nn.modules\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same model, loaded with BitsAndBytesConfig and saved, without us and with layers."""
    dense = tiny_llama(tmp_path_factory.mktemp("llama"))
    found = {}
    for who, enable, module in (("theirs", None, THEIRS), ("ours", "layers", OURS)):
        folder = tmp_path_factory.mktemp(who)
        out, said = program(WRITE, enable, dense, folder, folder / "logits.pt")
        assert out == module
        assert (
            "qlora_ext: BitsAndBytesConfig(load_in_4bit=True) gives qlora_ext's layers "
            "(QLORA_EXT_ENABLE=layers)" in said
        ) == (who == "ours")
        found[who] = folder
    return dense, found


def program(code, enable, *arguments, **env):
    code = f"import sys; sys.argv[1:] = {list(map(str, arguments))!r}\n{code}"
    return run(code, enable, **env)


def test_layers_are_off_for_good_if_torch_did_not_start_them(written):
    """The first load imports bitsandbytes, which starts qlora_ext in the middle of it."""
    dense, _ = written
    code = (
        PREPARE
        + """
early = sys.argv[2] == "early"
if early:
    import qlora_ext
kinds = [layer(load(sys.argv[1], quantization_config=config)) for _ in range(2)]
import qlora_ext
print(*kinds, layer(load(sys.argv[1], quantization_config=config)))
"""
    )
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out, said = program(code, "layers", dense, "late", **off)
    assert out.split() == [THEIRS.strip()] * 3
    assert sum("layers not enabled: torch did not start qlora_ext" in line for line in said) == 1
    assert not any("gives qlora_ext's layers" in line for line in said)
    out, said = program(code, "layers", dense, "early", **off)
    assert out.split() == [OURS.strip()] * 3
    assert not any("not enabled" in line for line in said)


def test_layers_answer_and_save_as_bitsandbytes(written):
    _, folders = written
    theirs, ours = (torch.load(folders[who] / "logits.pt") for who in ("theirs", "ours"))
    # On some CPUs bitsandbytes multiplies in bf16.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    files = [load_file(folders[who] / "model.safetensors") for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    for key, theirs in files[0].items():
        if key.endswith(".weight") and theirs.dtype != torch.float32:
            ours = files[1][key]
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8).view_as(ours)), key
    stored = [
        json.loads((folders[who] / "config.json").read_text())["quantization_config"]
        for who in ("theirs", "ours")
    ]
    stored[0]["llm_int8_skip_modules"] = stored[0]["llm_int8_skip_modules"] or ["lm_head"]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("writer", ["theirs", "ours"])
@pytest.mark.parametrize("enable", [None, "layers"])
def test_either_reads_what_either_wrote(written, tmp_path, writer, enable):
    dense, folders = written
    out, _ = program(READ, enable, dense, folders[writer], tmp_path / "logits.pt")
    assert out == (OURS if enable else THEIRS)
    want = torch.load(folders[writer] / "logits.pt")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=0, atol=1e-2)


def test_what_trainers_do_with_the_layers(written):
    """PEFT trains them through our op, and kernels that want a QuantState get an error."""
    dense, _ = written
    code = (
        PREPARE
        + """
from unittest import mock
import peft, copy, pickle
from qlora_ext import ops
model = load(sys.argv[1], quantization_config=config)
weight = model.model.layers[0].mlp.up_proj.weight
for read in (lambda: weight.quant_state.absmax, lambda: weight.quant_state.shape):
    try:
        read()
    except RuntimeError as error:
        assert "has no QuantState of bitsandbytes. Call the layer" in str(error), error
    else:
        raise AssertionError("read bytes as a QuantState")
copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.layers[0].mlp.up_proj))
model = peft.prepare_model_for_kbit_training(model)
model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
with mock.patch.object(ops, "lora_linear", wraps=ops.lora_linear) as called:
    model(input_ids=ids, labels=ids).loss.backward()
assert called.call_count >= 14, called.call_count
merged = model.merge_and_unload()
assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
assert not getattr(merged, "is_loaded_in_4bit", False)
"""
    )
    program(code, "layers", dense)


def test_a_sharded_model_is_not_saved_as_bitsandbytes(written, tmp_path):
    """Whatever state is given: the format is made from the model's own, which is in pieces."""
    dense, _ = written
    code = (
        PREPARE
        + """
import os
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
model = load(sys.argv[1], quantization_config=config)
state = model.state_dict()
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
fully_shard(model.model.layers[0])
try:
    model.save_pretrained(sys.argv[2], state_dict=state)
except ValueError as error:
    assert "save_pretrained" in str(error) and "DTensor" in str(error), error
else:
    raise AssertionError("saved a sharded model")
assert not os.path.exists(os.path.join(sys.argv[2], "model.safetensors"))
"""
    )
    program(code, "layers", dense, tmp_path / "out")


def test_what_is_not_answered(written):
    """8 bits are bitsandbytes' own, and its format has no packed experts."""
    dense, _ = written
    code = (
        PREPARE
        + """
from transformers.quantizers.auto import AutoHfQuantizer
eight = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_8bit=True), pre_quantized=False)
assert type(eight).__name__ == "Bnb8BitHfQuantizer"
torch.manual_seed(0)
experts = transformers.MixtralForCausalLM(transformers.MixtralConfig(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
))
experts.save_pretrained(sys.argv[2])
model = load(sys.argv[2], quantization_config=config)
assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
assert "qlora_ext" in type(model.model.layers[0].self_attn.q_proj).__module__
"""
    )
    folder = written[1]["ours"].parent / "mixtral"
    program(code, "layers", dense, folder)
