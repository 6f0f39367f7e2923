"""Runs the Python blocks of docs/integrations.md, one after another."""

import re
from pathlib import Path

import pytest
from integration_helpers import REPOSITORY, tiny_llama, tiny_tokenizer

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("bitsandbytes")


def test_every_snippet_runs(tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    base = tmp_path / "base"
    tiny_tokenizer(tiny_llama(base))
    names = {"base": base, "out": Path(tmp_path)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/integrations.md, block {number}", "exec"), names)
    assert (tmp_path / "merged" / "config.json").exists()
    assert "qlora_ext" in (tmp_path / "merged-4bit" / "config.json").read_text()
