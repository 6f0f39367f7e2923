"""`make size`: prints lines per file of qlora_ext, and the change against tools/size_base.txt.

A star marks files of more than 400 lines.
`python tools/size.py --write COMMIT` makes that commit the base.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "tools" / "size_base.txt"
LONG = 400


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def sizes_now() -> dict[str, int]:
    return {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "qlora_ext").rglob("*.py")
    }


def sizes_at(commit: str) -> dict[str, int]:
    names = git("ls-tree", "-r", "--name-only", commit, "qlora_ext").splitlines()
    return {
        name: len(git("show", f"{commit}:{name}").splitlines())
        for name in names
        if name.endswith(".py")
    }


def read_base(text: str) -> tuple[str, dict[str, int]]:
    """(commit, lines per file) from the text of size_base.txt."""
    head, *rows = text.splitlines()
    pairs = [row.split(maxsplit=1) for row in rows]
    return head.split()[-1], {name: int(lines) for lines, name in pairs}


def table(now: dict[str, int], base: dict[str, int], commit: str) -> str:
    """A row for each file that exists now or was in the base, and the total."""
    rows = []
    for name in sorted({*now, *base}):
        lines, change = now.get(name, 0), now.get(name, 0) - base.get(name, 0)
        note = "new" if name not in base else "gone" if name not in now else ""
        mark = "*" if lines > LONG else ""
        shown = f"{change:+}" if change else ""
        rows.append(f"{lines:6}{mark:1} {shown:>6} {note:4} {name}")
    total, was = sum(now.values()), sum(base.values())
    rows.append(
        f"{total:6}  {total - was:+6}      in {len(now)} files: {100 * total / was:.1f}% of "
        f"{was} lines in {len(base)} files at {commit}; * is more than {LONG} lines"
    )
    return "\n".join(rows)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        commit = git("rev-parse", "--short", arguments[1]).strip()
        rows = [f"{lines} {name}" for name, lines in sorted(sizes_at(commit).items())]
        BASE.write_text("\n".join([f"lines at commit {commit}", *rows, ""]), encoding="utf-8")
    elif arguments:
        sys.exit(f"size.py: got {' '.join(arguments)}, want nothing or --write COMMIT")
    commit, base = read_base(BASE.read_text(encoding="utf-8"))
    print(table(sizes_now(), base, commit))


if __name__ == "__main__":
    main(sys.argv[1:])
