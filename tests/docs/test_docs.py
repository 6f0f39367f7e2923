"""docs/: what the pages list is what the sources have."""

import ast
import mmap
import re
from pathlib import Path

import pytest
import torch

import qlora_ext  # noqa: F401
from paths import REPOSITORY

DOCS = REPOSITORY / "docs"


def test_ops_page_lists_every_schema():
    listed = {
        line
        for line in (DOCS / "ops.md").read_text(encoding="utf-8").splitlines()
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


def test_models_page_has_every_family():
    from qlora_ext.models.architectures import FAMILIES

    text = (DOCS / "models.md").read_text(encoding="utf-8").lower().replace("-", "")
    for name in FAMILIES:
        stem = re.sub(r"(_text|_?moe|_?\d+)+$", "", name.replace("gpt_", "gpt"))
        assert stem in text or stem in ("mt", "umt", "ministral", "starcoder", "nemotron"), name


# Sentences ----------------------------------------------------------------------------------------

ROOT = DOCS.parent
PAGES = [*ROOT.glob("*.md"), *sorted(DOCS.glob("**/*.md")), ROOT / "tests/simt/README.md"]
GAP = "\0"  # what is filled in when a message is made
# Pages that list error messages, an item each: - `message` (library): what to do
LISTS = ("cli.md", "merging.md", "troubleshooting.md")
ITEM = re.compile(r"^- `([^`\n]+)`(?:\s+\((\w+)\))?:\s", re.M)


def quoted_sentences() -> list[tuple[str, str, str]]:
    """(page, message, the library whose it is or "") of every item of a list of error messages."""
    return [
        (name, *item)
        for name in LISTS
        for item in ITEM.findall((DOCS / name).read_text(encoding="utf-8"))
    ]


def python_messages(path: Path) -> list[str]:
    """Every string of a Python file, an f-string with gaps."""

    def text(node) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else GAP
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return text(node.left) + text(node.right) if isinstance(node, ast.BinOp) else GAP

    tree = ast.parse(path.read_text(errors="replace"))
    return [
        text(node) for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))
    ]


def cpp_messages(path: Path) -> list[str]:
    """The string literals of each statement of a C++ file, in order, with gaps between them."""
    text = re.sub(r'"\s+"', "", re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8")))
    return [GAP.join(re.findall(r'"((?:[^"\\]|\\.)*)"', part)) for part in text.split(";")]


def holds(message: str, sentence: str) -> bool:
    """Whether the parts of the sentence between its dots stand in the message, in that order, and
    what is in one part stands together."""
    parts = [part.strip() for part in sentence.split("...")]
    return re.search(".*?".join(map(re.escape, filter(None, parts))), message, re.S) is not None


def test_quoted_sentences_are_those_of_the_sources():
    ours = [m for path in [*ROOT.glob("qlora_ext/**/*.py"), *ROOT.glob("*.py")]
            for m in python_messages(path)]  # fmt: skip
    for suffix in ("cpp", "h", "cu", "cuh"):
        ours += [m for path in ROOT.glob(f"csrc/**/*.{suffix}") for m in cpp_messages(path)]
    assert holds("op: x has dtype \0, want \0 rows", "x has dtype ..., want ... rows")
    assert not holds("x has dtype \0", "x has dtype float64")
    sentences = quoted_sentences()
    assert {page for page, _, _ in sentences} == set(LISTS)
    assert len(sentences) > 120
    lost = [
        (page, sentence)
        for page, sentence, owner in sentences
        if not owner and not any(holds(message, sentence) for message in ours)
    ]
    assert not lost


def test_quoted_sentences_of_other_libraries():
    for page, sentence, owner in quoted_sentences():
        if owner in ("", "Python"):
            continue
        package = pytest.importorskip(owner)
        files = Path(package.__file__).parent.glob("**/*.py")
        found = any(
            holds(re.sub(r'"\s+f?"', "", path.read_text(errors="replace")), sentence)
            for path in files
        )
        for path in (Path(package.__file__).parent / "lib").glob("libtorch_cpu.*"):
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                found = found or mapped.find(sentence.encode()) >= 0
        assert found, (page, sentence)


def test_links_lead_somewhere():
    def anchors(page: Path) -> set[str]:
        heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}

    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in anchors(target), (page.name, link)


def test_lines_of_a_page_are_under_100_characters():
    """Except in blocks of code and in what a program writes."""
    for page in PAGES:
        if page.parent.name == "generated":
            continue
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
        text = re.sub(r"<!-- results: begin.*?results: end", "", text, flags=re.S)
        long = [line for line in text.splitlines() if len(line) > 99]
        assert not long, (page.name, long)


def test_promises_name_tests_that_exist():
    table = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .split("the test that shows it")[1]
        .split("##")[0]
    )
    sharding = (DOCS / "sharding.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:\w+/)?test_\w+\.py)`", table + sharding)
    assert len(names) > 25
    for name in names:
        assert (ROOT / "tests" / name).exists(), name


def test_tested_versions_are_those_that_the_plug_ins_expect():
    from qlora_ext.integrations import bitsandbytes
    from qlora_ext.integrations.import_hook import WINDOWS

    table = (
        (DOCS / "integrations.md")
        .read_text(encoding="utf-8")
        .split("## Tested versions")[1]
        .split("##")[0]
    )
    for name, window in WINDOWS.items():
        series = rf"{re.escape(window.oldest)}\b.* to {re.escape(window.newest)}\b"
        assert re.search(rf"^\| {name} \| {series}", table, re.M | re.I), name
    series = re.escape(bitsandbytes.TESTED)
    assert re.search(rf"^\| bitsandbytes \| {series}\b", table, re.M), "bitsandbytes"


def test_the_window_is_what_test_versions_runs():
    """Its ends are in the oldest and the newest set of releases, and the extras take all of it."""
    from packaging.requirements import Requirement
    from packaging.version import Version
    from setuptools.config.pyprojecttoml import read_configuration

    from qlora_ext.integrations.import_hook import WINDOWS

    sets = {}
    for path in (REPOSITORY / "tests" / "versions").glob("*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        wanted = [Requirement(line) for line in lines if not line.startswith("#")]
        sets[path.stem] = {r.name: Version(str(r.specifier).removeprefix("==")) for r in wanted}
    project = read_configuration(REPOSITORY / "pyproject.toml", expand=False)["project"]
    extras = map(Requirement, project["optional-dependencies"]["train"])
    ranges = {extra.name: extra.specifier for extra in extras}
    for name, window in WINDOWS.items():
        assert Version(window.oldest).release == sets["oldest"][name].release[:2]
        assert Version(window.newest).release == sets["newest"][name].release[:2]
        assert all(sets["oldest"][name] <= s[name] <= sets["newest"][name] for s in sets.values())
        assert all(s[name] in ranges[name] for s in sets.values())
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"^VERSIONS \?= (.*)$", makefile, re.M)[1].split()
    assert sorted(names) == sorted(sets)
