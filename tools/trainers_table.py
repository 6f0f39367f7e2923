"""trainers_table.py RESULTS [PAGE]: what `make test-trainers` ran, as a table in Markdown.

RESULTS is the folder where the tests left a file for each trainer. With PAGE the table also
goes into that file, between the lines `<!-- trainers -->` and `<!-- /trainers -->`.
"""

import json
import sys
from pathlib import Path

ORDER = ("trl", "llamafactory", "axolotl", "ms-swift", "litgpt", "torchtune")
HEAD = ("command", "with", "lines changed", "last loss", "our kernels", "our layers", "time")


def line(row: dict) -> list[str]:
    versions, stock = row["versions"], row["stock"]
    ours = [row.get(way) for way in ("1", "layers")]

    def off(run):
        pairs = zip(run["losses"], stock["losses"], strict=True)
        return f"{max(abs(a / b - 1) for a, b in pairs):.0e}"

    times = [f"{run['seconds'] / stock['seconds']:.1f}" for run in ours if run and run["seconds"]]
    return [
        f"`{row['way in']}` {row['release']}",
        ", ".join(versions[name] for name in ("transformers", "peft", "trl")) if versions else "-",
        str(row["lines"]),
        f"{stock['losses'][-1]:.4f}",
        *(off(run) if run else "-" for run in ours),
        ", ".join(times) or "-",
    ]


def table(rows: list[dict]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *map(line, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(results: str, page: str | None = None) -> None:
    found = [Path(results, f"{name}.json") for name in ORDER]
    text = table([json.loads(path.read_text()) for path in found if path.exists()])
    print(text)
    if page:
        before, rest = Path(page).read_text().split("<!-- trainers -->\n")
        after = rest.split("<!-- /trainers -->")[1]
        new = f"{before}<!-- trainers -->\n{text}<!-- /trainers -->{after}"
        Path(page).write_text(new)


if __name__ == "__main__":
    main(*sys.argv[1:])
