"""Runs the Python blocks of docs/models.md, one after another."""

import re
from pathlib import Path

import pytest
import tiny_models as tiny

pytest.importorskip("transformers")

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def test_every_snippet_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    tiny.make("llama").save_pretrained(tmp_path / "base")
    names = {"base": tmp_path / "base", "out": tmp_path}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/models.md, block {number}", "exec"), names)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_table_has_every_family():
    from qlora_ext.lora import FAMILIES

    text = PAGE.read_text().lower().replace("-", "")
    for name in FAMILIES:
        stem = re.sub(r"(_text|_moe|\d+)+$", "", name.replace("gpt_neox", "gptneox"))
        assert stem in text or stem in ("mt", "umt", "ministral", "starcoder", "nemotron"), name
