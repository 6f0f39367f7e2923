"""bench/cpu.py: what it reports of the numbers it measured."""

import importlib.util
import json
import re
import sys

import pytest

from paths import REPOSITORY

ROOT = REPOSITORY


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_cpu", ROOT / "bench" / "cpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_cpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_cpu"]


def test_a_bar_is_met_by_the_ratio_to_its_own_contender(bench):
    row = bench.Row(
        "linear", "4x4", {"ours": 2.0, "dense": 4.0, "bitsandbytes": 30.0}, {"dense": 2.0}
    )
    assert row.ratio("bitsandbytes") == 15.0
    assert row.verdict() == "met"
    row.targets = {"dense": 2.1, "bitsandbytes": 10.0, "torchao": 99.0}  # torchao did not run
    assert row.held() == {"dense": False, "bitsandbytes": True}
    assert row.verdict() == "MISSED: dense 2.00x of 2.10x"
    assert bench.verdicts([row]).startswith("1 of 2 targets met\nlinear: dense 2.00x of 2.10x")


def test_contenders_take_turns_and_slow_ones_run_once(bench, monkeypatch):
    calls, now = [], [0.0]

    def contender(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    monkeypatch.setattr(bench, "clock", lambda: now[0])
    ms = bench.interleave(
        {"a": contender("a", 0.5), "b": contender("b", 0.1), "slow": contender("slow", 60)}, 9
    )
    assert calls == ["a", "b", "slow", *["a", "b"] * 3]
    assert {name: round(value) for name, value in ms.items()} == {"a": 500, "b": 100, "slow": 60000}


def test_the_page_shows_the_results_that_it_names(bench):
    page = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    table = page.split(bench.BEGIN)[1].split(bench.END)[0].strip("\n")
    source = re.search(r"From `(bench/results/[^`]+)`", table)[1]
    assert table == bench.markdown(json.loads((ROOT / source).read_text()), source)
    assert "bitsandbytes 1.15x" in table and "ours fp32 0.87x" in table  # targets as they are set
