"""Regular expressions from outside: what `re` says, within a time limit."""

import re

import pytest

from sparsify import matching
from sparsify.errors import RecipeError, SparsifyError
from sparsify.formats.config_groups import is_ignored
from sparsify.formats.foreign.compressed_tensors import _matches
from sparsify.formats.foreign.gptq import _override
from sparsify.formats.gptq import GptqConfig
from sparsify.matching import SlowPattern, matches, pattern_problem, refuse_many
from sparsify.recipe import parse_recipe
from sparsify.recipe.patterns import ignored_by

NAMES = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.11.self_attn.q_proj", "a.b", "vision-tower.x")
PATTERNS = (
    ".*down_proj", "model.layers.[01][.].*", "^lm_head$", r"^model\.layers\.0\.mlp\.down_proj$", "(?!.*q_proj)model",
    r".*\.(q|k|v)_proj$", "", "lm", "^a.b$", r"^vision\-tower\.x$", r"(model)\.layers\.\d{1,2}\.", r"(?i)LM_HEAD", r"\w+\.\w",
)  # fmt: skip
SLOW = "(a|aa)+$"
LONG = "a" * 200 + "b"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_re(pattern: str) -> None:
    assert pattern_problem(pattern) is None
    assert [matches(pattern, name) for name in NAMES] == [re.match(pattern, name) is not None for name in NAMES]


@pytest.mark.parametrize(
    "pattern",
    ["(", "[a", "a{e<=1}b", "[[:alpha:]]", "a" * 1001, "(" * 400 + ")" * 400, "((a{1000}){1000}){1000}",
     "a{1001}", "a{9999999999999}"],
)  # fmt: skip
def test_what_is_not_accepted(pattern: str) -> None:
    assert pattern_problem(pattern)
    with pytest.raises(ValueError):
        matches(pattern, "a")


def test_a_match_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SECONDS", 0.2)
    callers = (
        lambda: matches(SLOW, LONG),
        lambda: ignored_by(LONG, [f"re:{SLOW}"]),
        lambda: is_ignored(LONG, [f"re:{SLOW}"]),
        lambda: _matches(LONG, f"re:{SLOW}"),
        lambda: _override({f"-:{SLOW}": {}}, LONG),
        lambda: GptqConfig.from_dict({"bits": 4, "group_size": 32, "dynamic": {f"-:{SLOW}": {}}}).label(LONG),
    )
    for call in callers:
        monkeypatch.setattr(matching, "_spent", {})
        with pytest.raises(SlowPattern, match="takes too long on 'aaa"):
            call()
    with pytest.raises(SlowPattern):  # its time is spent: other names do not get the same again
        matches(SLOW, LONG)
    assert matches(".*b", LONG) and issubclass(SlowPattern, SparsifyError)


def test_many_expressions_are_refused_and_many_names_are_not() -> None:
    assert "2001 regular expressions" in str(refuse_many(f"re:.*{number}" for number in range(2001)))
    assert refuse_many([f"model.layers.{number}" for number in range(9999)]) is None
    assert refuse_many([rf"re:^model\.layers\.{number}$" for number in range(9999)]) is None
    lines = "".join(f"  - re:.*{number}$\n" for number in range(2001))
    with pytest.raises(RecipeError, match="2001 regular expressions"):
        parse_recipe(f"version: 1\nignore:\n{lines}passes:\n  - prune: {{method: magnitude}}\n")


def test_a_name_is_compared_without_an_expression() -> None:
    assert not any(matches(rf"^model\.experts\.{number}\.up$", "model.experts.1.down") for number in range(20000))
    assert matching._compiled.cache_info().currsize < 4001
