"""What the trainers' tests leave for tools/trainers_table.py, in $TRAINERS_RESULTS."""

import json
import os
import re
from pathlib import Path

from paths import TESTS


def note(trainer: str, way_in: str, lines: int, runs: dict, versions: dict | None = None) -> None:
    """Writes the row of a trainer, if $TRAINERS_RESULTS says where.

    lines: that its user changes. runs: "stock", "1" and "layers" (QLORA_EXT_ENABLE, or our layers
    by another way), each {"losses": [...], "seconds": the training's or None}; "1" may be missing.
    versions: of transformers, PEFT and TRL, if it uses them.
    """
    if not (folder := os.environ.get("TRAINERS_RESULTS")):
        return
    if trainer == "trl":
        release = versions["trl"]
    else:
        pins = (TESTS / "trainers" / f"{trainer}.txt").read_text()
        release = re.search(r"^[\w-]+==(\S+)", pins, re.M)[1]
    row = {"way in": way_in, "release": release, "lines": lines, "versions": versions, **runs}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{trainer}.json").write_text(json.dumps(row, indent=1))
