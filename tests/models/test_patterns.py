"""Regular expressions from files: those that could take years to match are refused."""

import pytest

from qlora_ext.models import patterns

QUICK = [
    *("q_proj", "model.layers.0.self_attn.q_proj", r"^model\.layers\.0\.mlp", "^(?:a|b)", "h.1?0"),
    *(r"model\.layers\.\d+\..*_proj", "(q|k|v)_proj", r".*\.(gate|up)_proj", "layers.[0-2].q_proj"),
    *(r"layers\.(?!0\.)", "|".join(map(str, range(100))), r"[\]*+(]+x", "[]+*]a", r"\(\)*", ""),
]
SLOW = [
    *("([a-z_]+)+!", "(a|a)*!", "(.*){9}!", "((a?)+)x", "(a)(b)*", "(?:a+)+!", ".*.*.*.*.*.*!"),
    *("(.|.)" * 30, ".?" * 30 + "!", "(?x:#[\n(a+)+!#]\n)", "(?#[)(a+)+!(?#])", "(?P<n>a+)+!"),
    *("a)+(b", "(?i)UP_PROJ", "(?=.*)" * 4, "(" + "a|" * 1000 + ")" + "(" + "b|" * 1000 + ")"),
]


@pytest.mark.parametrize("pattern", QUICK)
def test_regular_expressions_that_are_quick_to_match(pattern):
    assert patterns.bad_regex([pattern] * 3) is None


@pytest.mark.parametrize("pattern", SLOW, ids=lambda p: p[:20])
def test_regular_expressions_that_could_take_years(pattern):
    got, want = patterns.bad_regex(["q_proj", pattern])
    assert got == pattern and want.startswith("a name, or a regular expression that is quick to m")


def test_regular_expressions_share_one_budget():
    assert patterns.bad_regex(["model.layers.7.mlp.up_proj"] * 10000) is None
    assert patterns.bad_regex([".*a.*b.*c"] * 10000)[0] == ".*a.*b.*c"
    for pattern in ["(", "a)", "[a", "*", "(" * 100000]:
        assert patterns.bad_regex([pattern]) == (pattern, "a regular expression")
