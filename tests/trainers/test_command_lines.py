"""Other trainers' own command lines on our kernels, without a changed line: QLORA_EXT_ENABLE.

Each trainer fine-tunes the same small model a few steps on the CPU three times: as it is, on
bitsandbytes; with QLORA_EXT_ENABLE=1; with QLORA_EXT_ENABLE=layers. spy/sitecustomize.py counts
which layers and ops ran. `make test-trainers` installs the trainers, each into an environment of
its own in $TRAINERS_FOLDER, and runs this; what is not installed is skipped. TRL's test runs
wherever TRL is. In $TRAINERS_RESULTS each test leaves a row for tools/trainers_table.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

import small_model
import trainer_results
from paths import REPOSITORY, TESTS

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EXAMPLES = REPOSITORY / "examples"
STEPS, PACKED = 4, small_model.LINEAR  # steps of training; 4-bit layers of the model
# bitsandbytes' layers on our kernels give its losses up to the order of sums. With our layers the
# 8-bit code of a scale can be a neighbour of bitsandbytes': without double quantization 1e-6.
TOLERANCE = {"1": 1e-4, "layers": 1e-3}


def program(trainer: str, name: str) -> str:
    path = Path(os.environ.get("TRAINERS_FOLDER", "nowhere"), trainer, "bin", name)
    if not path.exists():
        pytest.skip(f"{trainer} is not installed here: make test-trainers TRAINERS={trainer}")
    return str(path)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder: `model`, the small one; `data`, 32 conversations; `llamafactory`, which names them
    for LLaMA-Factory; `adapter`, a new one."""
    folder = tmp_path_factory.mktemp("start")
    small_model.cut(folder / "model")
    code = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "model")
torch.manual_seed(7)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
get_peft_model(model, lora).save_pretrained(folder / "adapter")
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    (folder / "data").mkdir()
    with open(folder / "data" / "sums.jsonl", "w") as file:
        for a in range(2, 10):
            for b in range(3, 7):
                question = {"role": "user", "content": f"What is {a} plus {b}?"}
                answer = {"role": "assistant", "content": f"{a} plus {b} is {a + b}."}
                file.write(json.dumps({"messages": [question, answer]}) + "\n")
    tags = ("role_tag", "role"), ("content_tag", "content")
    tags += ("user_tag", "user"), ("assistant_tag", "assistant")
    sums = {"file_name": "../data/sums.jsonl", "formatting": "sharegpt", "tags": dict(tags)}
    sums["columns"] = {"messages": "messages"}
    (folder / "llamafactory").mkdir()
    (folder / "llamafactory" / "dataset_info.json").write_text(json.dumps({"sums": sums}))
    return folder


class Run:
    """One run of a trainer's command in `folder`, which must succeed. It writes into `run`."""

    def __init__(self, command, start, folder, enable, **env):
        folder.mkdir()
        env = {**os.environ, **env}
        env["QLORA_EXT_ENABLE"] = enable  # empty: as without it
        paths = [str(TESTS / "trainers" / "spy"), env.pop("MORE_PATHS", "")]
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SPY_FOLDER": str(folder)}
        # No GPU, no hub, one thread: the trainers start more for their data.
        env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        env |= {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
        command = [part.format(start=start, out=folder / "run") for part in command]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        (folder / "log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        lines = (done.stdout + done.stderr).splitlines()
        self.said = [line for line in lines if "qlora_ext: " in line]
        runtime = re.search(r"'train_runtime': '?([0-9.]+)", done.stdout + done.stderr)
        self.seconds = float(runtime[1])
        # The process that trains, which the command may have started.
        found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        assert len(found) == 1, found
        self.calls, self.versions = found[0]["calls"], found[0]["versions"]
        checkpoint = next((folder / "run").rglob(f"checkpoint-{STEPS}"))
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        self.losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(self.losses) == STEPS
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as adapter:
            self.adapter = {key: adapter.get_slice(key).get_shape() for key in adapter.keys()}  # noqa: SIM118


def compare(trainer, way_in, command, start, tmp_path):
    """Runs the command three times; returns the runs by the value of QLORA_EXT_ENABLE."""
    runs = {
        enable: Run(command, start, tmp_path / (enable or "stock"), enable)
        for enable in ("", "1", "layers")
    }
    stock = runs[""]
    forwards = PACKED * STEPS * 2  # checkpoints of activations: each forward runs twice
    assert stock.calls == {"bitsandbytes.Linear4bit": forwards}
    assert stock.said == [] and runs["1"].said and runs["layers"].said
    assert len(stock.adapter) == PACKED * 2
    # Each of bitsandbytes' layers: our product forward, our weights for its backward.
    assert runs["1"].calls == {
        "bitsandbytes.Linear4bit": forwards,
        "gemm_4bit": forwards,
        "dequantize_4bit": PACKED * STEPS,
    }
    check_layers(runs["layers"])
    for enable in ("1", "layers"):
        check_losses(stock, runs[enable], TOLERANCE[enable])
    found = {
        enable or "stock": {"losses": run.losses, "seconds": run.seconds}
        for enable, run in runs.items()
    }
    trainer_results.note(trainer, way_in, 0, found, stock.versions)
    return runs


def check_layers(run):
    """PEFT's layers over ours: base and LoRA in one op, none of bitsandbytes' layers."""
    forwards = PACKED * STEPS * 2
    assert run.calls == {"lora_linear": forwards, "lora_gemm_4bit": forwards}


def check_losses(stock, run, tolerance):
    assert run.losses == pytest.approx(stock.losses, rel=tolerance)
    assert run.adapter == stock.adapter
    assert stock.losses[-1] < stock.losses[0]


def test_trl(start, tmp_path):
    pytest.importorskip("trl")
    options = f"""
        --model_name_or_path {{start}}/model --dataset_name {{start}}/data --output_dir {{out}}
        --load_in_4bit --use_bnb_nested_quant --dtype float32 --bf16 False
        --use_peft --lora_target_modules all-linear --lora_r 8 --lora_dropout 0
        --per_device_train_batch_size 2 --learning_rate 1e-3 --seed 7 --use_cpu
        --max_steps {STEPS} --save_steps {STEPS} --logging_steps 1 --report_to none
    """
    # What the program `trl` runs.
    command = [sys.executable, "-m", "trl.cli.main", "sft", *options.split()]
    compare("trl", "trl sft", command, start, tmp_path)


def test_llamafactory(start, tmp_path):
    options = f"""
        model_name_or_path={{start}}/model dataset_dir={{start}}/llamafactory dataset=sums
        output_dir={{out}} max_steps={STEPS} save_steps={STEPS} seed=7
    """
    settings = str(EXAMPLES / "trainers" / "llamafactory.yaml")
    command = [program("llamafactory", "llamafactory-cli"), "train", settings, *options.split()]
    compare("llamafactory", "llamafactory-cli train", command, start, tmp_path)


def test_axolotl(start, tmp_path):
    settings = yaml.safe_load((EXAMPLES / "trainers" / "axolotl.yaml").read_text())
    settings["datasets"] = [
        {"path": f"{start}/data/sums.jsonl", "ds_type": "json", "type": "chat_template"}
    ]
    # A new adapter is random in axolotl, whatever the seed: all runs start from a saved one.
    options = f"""
        --launcher python --base-model {{start}}/model --lora-model-dir {{start}}/adapter
        --output-dir {{out}} --max-steps {STEPS} --save-steps {STEPS} --logging-steps 1 --seed 7
    """
    path = tmp_path / "axolotl.yaml"
    command = [program("axolotl", "axolotl"), "train", str(path), *options.split()]
    path.write_text(yaml.safe_dump(settings))
    runs = compare("axolotl", "axolotl train", command, start, tmp_path)

    # The plugin needs no variable, and turns axolotl's own kernels off.
    settings = {name: value for name, value in settings.items() if not name.endswith("_kernel")}
    settings["plugins"] = ["qlora_ext_axolotl.QLoraExtPlugin"]
    path.write_text(yaml.safe_dump(settings))
    run = Run(command, start, tmp_path / "plugin", "", MORE_PATHS=str(EXAMPLES / "trainers"))
    check_layers(run)
    assert run.losses == pytest.approx(runs["layers"].losses, rel=1e-6)


def test_ms_swift(start, tmp_path):
    options = f"""
        --model {{start}}/model --model_type llama --template chatml --use_hf true
        --dataset {{start}}/data/sums.jsonl --output_dir {{out}}
        --max_steps {STEPS} --save_steps {STEPS} --seed 7 --use_cpu true
    """
    folder = Path(program("ms-swift", "swift")).parent
    path = f"PATH={folder}{os.pathsep}{os.environ['PATH']}"
    script = str(EXAMPLES / "trainers" / "ms-swift.sh")
    command = ["env", path, "sh", script, *options.split()]
    compare("ms-swift", "swift sft", command, start, tmp_path)
