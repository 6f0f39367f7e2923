"""trainers_table.py RESULTS [PAGE]: what `make test-trainers` ran, as a table in Markdown.

RESULTS is the folder where the tests left a file for each trainer. With PAGE the table also
goes into that file, between the lines `<!-- trainers -->` and `<!-- /trainers -->`.
"""

import json
import sys
from pathlib import Path

ORDER = ("trl", "llamafactory", "axolotl", "ms-swift")
HEAD = ("command", "with", "lines changed", "last loss", "our kernels", "our layers", "time")


def line(row: dict) -> list[str]:
    versions = row["versions"]
    stock, kernels, layers = (row[way] for way in ("stock", "1", "layers"))

    def off(run):
        pairs = zip(run["losses"], stock["losses"], strict=True)
        return f"{max(abs(a / b - 1) for a, b in pairs):.0e}"

    return [
        f"`{row['way in'].strip('`')}` {row['release']}",
        ", ".join(versions[name] for name in ("transformers", "peft", "trl")),
        "0",
        f"{stock['losses'][-1]:.4f}",
        off(kernels),
        off(layers),
        ", ".join(f"{run['seconds'] / stock['seconds']:.1f}" for run in (kernels, layers)),
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
