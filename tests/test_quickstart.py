"""Runs the Python blocks of README.md and docs/quickstart.md, each page's one after another."""

import re
from pathlib import Path

import pytest
from integration_helpers import REPOSITORY, tiny_llama, tiny_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.mark.parametrize("page, count", [("README.md", 1), ("docs/quickstart.md", 2)])
@pytest.mark.filterwarnings("ignore:quantize_model")
def test_every_snippet_runs(tmp_path, monkeypatch, page, count):
    text = (REPOSITORY / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= count
    base = tmp_path / "base"
    tiny_tokenizer(tiny_llama(base))
    monkeypatch.chdir(tmp_path)
    names = {"base": base, "out": Path(tmp_path)}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert (tmp_path / "merged" / "config.json").exists()
