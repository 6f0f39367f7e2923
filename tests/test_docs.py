"""docs/ops.md lists the schemas that are registered, and no other."""

from pathlib import Path

import torch

import qlora_ext  # noqa: F401

DOCS = Path(__file__).parent.parent / "docs"


def test_ops_page_lists_every_schema():
    listed = {
        line
        for line in (DOCS / "ops.md").read_text().splitlines()
        if ") -> " in line and "(Tensor" in line
    }
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("qlora_ext::")]
    registered = {
        str(torch._C._get_schema(*(n.split(".") if "." in n else (n, "")))).removeprefix(
            "qlora_ext::"
        )
        for n in names
    }
    assert listed == registered
