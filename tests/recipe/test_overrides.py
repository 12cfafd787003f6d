"""Overrides: what a recipe says of single linears, and what becomes of each."""

import pytest

from sparsify.errors import RecipeError
from sparsify.recipe import (
    LinearSettings,
    Override,
    Prune,
    PruneChange,
    Quantize,
    QuantizeChange,
    Recipe,
    dump_recipe,
    override_problem,
    parse_recipe,
    settings_of,
)

TEXT = """version: 1
ignore: [lm_head, "*gate*"]
passes:
  - prune: {method: alps}
  - quantize: {method: gptq, bits: 4, group_size: 64, activation_order: true}
overrides:
"""
PRUNE, QUANTIZE = Prune(method="alps"), Quantize(bits=4, group_size=64, activation_order=True)
LINEARS = [
    f"model.layers.{block}.{name}"
    for block in range(2)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def of(*entries: str) -> Recipe:
    return parse_recipe(TEXT + "".join(f"  - {entry}\n" for entry in entries))


def test_overrides_become_typed_objects_and_text_again() -> None:
    recipe = of(
        "{match: '*down_proj', prune: null}", "{match: 're:.*[.]0[.]', quantize: {bits: 8, scale_search: false}}"
    )
    assert recipe.overrides == [
        Override(match="*down_proj", prune=None),
        Override(match="re:.*[.]0[.]", quantize=QuantizeChange(bits=8, scale_search=False)),
    ]
    assert recipe.model_dump(mode="json")["overrides"] == [
        {"match": "*down_proj", "prune": None},
        {"match": "re:.*[.]0[.]", "quantize": {"bits": 8, "scale_search": False}},
    ]
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert Override(match="a", prune=None) != Override(match="a", prune=PruneChange(method="wanda"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{match: a}", "the override of 'a' changes nothing; give prune or quantize"),
        ("{prune: null}", "overrides needs the key 'match'"),
        ("{match: '', prune: null}", "an empty pattern matches nothing"),
        ("{match: 're:(', prune: null}", "'re:(' is not a valid regular expression"),
        ("{match: a, prune: {}}", "prune is empty and changes nothing; name a setting, or write null to leave it out"),
        ("{match: a, quantize: {bits: 5}}", "bits must be 4 or 8, not 5"),
        ("{match: a, quantize: {group: 64}}", "unknown key 'group' in quantize; did you mean 'group_size'?"),
        ("{match: a, quantize: {damping: 1}}", "it stands in solver: {damping: ...}"),
        ("{match: a, quantize: 8}", "must be a mapping of settings, not 8"),
        ("{match: a, quantise: null}", "unknown key 'quantise' in overrides; did you mean 'quantize'?"),
        ("{match: a, quantize: {method: rtn, activation_order: true}}", "it looks at no activations"),
    ],
)
def test_each_mistake_is_named_with_its_line(entry: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TEXT + f"  - {{match: b, prune: null}}\n  - {entry}\n", "r.yaml")
    assert str(caught.value).startswith("r.yaml:8: ") and words in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("prune: null", "leaves out prune, but there is no such pass"),
        ("prune: {method: wanda}", "changes prune, but there is no such pass; add '- prune: {...}'"),
    ],
)
def test_an_override_changes_a_pass_that_is_there(entry: str, words: str) -> None:
    text = TEXT.replace("  - prune: {method: alps}\n", "") + f"  - match: o_proj\n    {entry}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert str(caught.value).startswith("r.yaml:7: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "module", "expected"),
    [
        ([], "mlp.up_proj", LinearSettings(PRUNE, QUANTIZE)),
        (["{match: up_proj, prune: null}"], "mlp.down_proj", LinearSettings(PRUNE, QUANTIZE)),
        (["{match: '*down_proj', prune: null}"], "mlp.down_proj", LinearSettings(None, QUANTIZE)),
        (["{match: mlp.*, quantize: null}"], "mlp.down_proj", LinearSettings(PRUNE, None)),
        (
            ["{match: mlp.*, prune: null}", "{match: down_proj, quantize: null}"],
            "mlp.down_proj",
            LinearSettings(None, None, "an override leaves it dense"),
        ),
        (
            ["{match: mlp.gate_proj, quantize: {bits: 8}}"],
            "mlp.gate_proj",
            LinearSettings(None, None, "the recipe ignores it"),
        ),
        (  # setting by setting: the later one changes what it names and nothing else
            ["{match: mlp.*, quantize: {bits: 8, group_size: 32}}", "{match: down_proj, quantize: {group_size: channel}}"],
            "mlp.down_proj",
            LinearSettings(PRUNE, QUANTIZE.model_copy(update={"bits": 8, "group_size": "channel"})),
        ),
        (  # the last match wins
            ["{match: mlp.*, prune: {method: wanda}}", "{match: down_proj, prune: null}"],
            "mlp.down_proj",
            LinearSettings(None, QUANTIZE),
        ),
        (
            ["{match: '*', prune: null, quantize: {bits: 8}}", "{match: down_proj, prune: {method: wanda}}"],
            "mlp.down_proj",
            LinearSettings(Prune(method="wanda"), QUANTIZE.model_copy(update={"bits": 8})),
        ),
        (  # after null a later change begins again at the pass
            ["{match: '*', quantize: {bits: 8}}", "{match: '*', quantize: null}", "{match: '*', quantize: {group_size: 32}}"],
            "mlp.down_proj",
            LinearSettings(PRUNE, QUANTIZE.model_copy(update={"group_size": 32})),
        ),
    ],
)  # fmt: skip
def test_the_last_match_wins_setting_by_setting(entries: list[str], module: str, expected: LinearSettings) -> None:
    recipe = of(*entries) if entries else parse_recipe(TEXT + "  []\n")
    assert settings_of(recipe, f"model.layers.0.{module}") == expected


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{match: '*down_prj', prune: null}", "'*down_prj' matches no linear of M; did you mean 'down_proj'? its linears are"),
        ("{match: mlp.upproj, prune: null}", "did you mean 'mlp.up_proj'?"),
        ("{match: model.layers.9.mlp.up_proj, prune: null}", "did you mean 'model.layers."),
        ("{match: 're:.*[.]9[.]', prune: null}", "matches no linear of M; its linears are self_attn.q_proj, self_attn.o_proj, m"),
        ("{match: lm_head, quantize: {bits: 8}}", "'lm_head' names the output head, which export.head sets"),
        ("{match: '*q_proj', prune: null}", "'*q_proj' matches only linears that q_proj under ignore leaves dense"),
    ],
)  # fmt: skip
def test_an_override_without_effect_is_refused(entry: str, words: str) -> None:
    fine = "{match: o_proj, prune: null}"
    recipe = of(fine, entry).model_copy(update={"ignore": ["q_proj"]})
    problem = override_problem(recipe, LINEARS, "M")
    assert problem is not None and problem.startswith("overrides.1: ") and words in problem, problem
    assert override_problem(of(fine), LINEARS, "M") is None
