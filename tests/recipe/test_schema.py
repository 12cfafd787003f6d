"""What a recipe may say, and what an error says when it says something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from sparsify.errors import RecipeError
from sparsify.recipe import (
    Calibration,
    Distill,
    Prune,
    Quantize,
    Recipe,
    Solver,
    dump_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    ready_recipes,
    recipe_from,
)
from sparsify.recipe.methods import PRUNE as PRUNE_METHODS
from sparsify.recipe.methods import QUANTIZE as QUANTIZE_METHODS
from sparsify.recipe.methods import Needs, needs_of
from sparsify.recipe.sources import shares, sources_in_words

ROOT = Path(__file__).parents[2]
PRUNE = "version: 1\npasses:\n  - prune:\n      method: sparsegpt\n"
SOLVER = "version: 1\npasses:\n  - prune: {method: sparsegpt}\nsolver:\n"
JOINT = """version: 1
solver: {error_propagation: 0.5}
passes:
  - prune: {method: sparsegpt}
  - quantize: {method: gptq, bits: 4, group_size: 64}
"""


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    message = str(caught.value)
    assert "pydantic" not in message and "validation error" not in message
    return message


def test_a_recipe_becomes_typed_objects() -> None:
    recipe = parse_recipe(JOINT)
    assert recipe.prune == Prune(method="sparsegpt")
    assert recipe.quantize == Quantize(kind="quantize", method="gptq", bits=4, group_size=64)
    assert recipe.solver == Solver(damping=0.01, error_propagation=0.5, coordinate_descent=5)
    assert [step.kind for step in recipe.passes] == ["prune", "quantize"]
    assert recipe.calibration.source == "self" and recipe.export.format == "sparse24" and recipe.model is None
    assert recipe.quantize.scale_search and recipe.ignore == ["lm_head"] and recipe.overrides == []


def test_a_recipe_is_built_of_objects() -> None:
    recipe = Recipe(passes=[Prune(method="alps"), Quantize(bits=4, group_size=64)], solver=Solver(damping=0.02))
    assert recipe.version == 1 and recipe.quantize is not None and recipe.quantize.method == "gptq"
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe, ["solver.damping=0.5"], model="m").solver == Solver(damping=0.5)
    same = {
        "passes": [{"prune": {"method": "alps"}}, Quantize(bits=4, group_size=64)],
        "solver": {"damping": 0.02},
    }
    assert load_recipe(same) == recipe_from(same) == recipe
    assert same["solver"] == {"damping": 0.02}  # what was given stays what it was


@pytest.mark.parametrize(
    "build",
    [
        lambda: Prune(method="alps", refine=3),
        lambda: Prune(method="alp"),
        lambda: Quantize(bits=3, group_size=64),
        lambda: Quantize(bits="4", group_size=64),
        lambda: Recipe(passes=[]),
        lambda: Recipe(passes=[Prune(method="alps")], solvers=Solver()),
        lambda: Recipe(passes=[Prune(method="magnitude")], solver=Solver(damping=0.5)),
        lambda: Recipe(passes=[Quantize(bits=4, group_size=64), Prune(method="wanda")]),
        lambda: Recipe(passes=[Calibration()]),
        lambda: Recipe(passes=[Prune(method="wanda")], version=2),
    ],
)
def test_what_a_recipe_cannot_say_does_not_construct(build: Callable[[], object]) -> None:
    with pytest.raises(ValidationError):
        build()


def test_mistakes_in_plain_data_are_named_as_in_a_file() -> None:
    with pytest.raises(RecipeError, match="^mine: unknown key 'dampning' in solver; did you mean 'damping'"):
        recipe_from({"passes": [{"prune": {"method": "wanda"}}], "solver": {"dampning": 1}}, name="mine")
    with pytest.raises(RecipeError, match="^recipe: a recipe is a mapping"):
        load_recipe(["prune"])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="^recipe: this sparsify reads recipes of version 1, not 2"):
        load_recipe({"version": 2, "passes": [{"prune": {"method": "wanda"}}]})


def test_one_table_says_what_methods_need() -> None:
    for model, table in ((Prune, PRUNE_METHODS), (Quantize, QUANTIZE_METHODS)):
        assert set(table) == set(get_args(model.model_fields["method"].annotation))
    assert needs_of(None, None) == needs_of("magnitude", "rtn") == Needs()
    assert needs_of("wanda", "rtn") == Needs(data=True)
    assert needs_of("magnitude", "gptq") == needs_of("alps", None) == Needs(data=True, hessian=True, sweep=True)


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = parse_recipe(JOINT)
    with pytest.raises(ValidationError):
        recipe.model = "other"  # type: ignore[misc]


def test_dump_gives_the_same_recipe_back_and_other_yaml_readers_agree() -> None:
    text = JOINT + 'model: "1e5"\ncalibration: {source: "hub:a/b:2:4", seed: 7}\nexport: {dtype: float16}\n'
    recipe = parse_recipe(text)
    dumped = dump_recipe(recipe)
    assert parse_recipe(dumped) == recipe
    read = yaml.safe_load(dumped)
    assert read["model"] == "1e5" and read["passes"][0]["prune"]["pattern"] == "2:4"
    assert Recipe.model_validate(read) == recipe


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (PRUNE + "      metod: x\n", 5, "unknown key 'metod' in prune; did you mean 'method'? known keys: method, pattern"),
        (SOLVER + "  dampning: 0.1\n", 5, "unknown key 'dampning' in solver; did you mean 'damping'? known keys: da"),
        (PRUNE + "      damping: 0.1\n", 5, "'damping' is no setting of prune: it stands in solver: {damping: ...}"),
        (PRUNE + "      correction: 0.1\n", 5, "it stands in solver: {error_propagation: ...}"),
        (PRUNE + "      refine: 1\n", 5, "it stands in solver: {coordinate_descent: ...}"),
        (PRUNE + "      ignore: [a]\n", 5, "'ignore' is no setting of prune: it stands at the top of the recipe"),
        (PRUNE + "  - distill: {method: squarehead, tokens: 1M}\n", 5, "loss: {kl, reverse_kl, squarehead, cross_entropy} says it"),
        (PRUNE + "  - lora: {tokens: 1M, weights: {}}\n", 5, "no setting of lora: it is loss: {kl, reverse_kl, squarehead, "),
        (PRUNE + "  - distill:\n      tokens: 1M\n      loss: {logits: 1}\n", 7, "'logits' is no setting of loss: it is kl"),
        (PRUNE + "calibraton: {}\n", 5, "unknown key 'calibraton' in the recipe; did you mean 'calibration'?"),
        (PRUNE + "calibration:\n  samples: 8\n  xyz: 1\n", 7, "unknown key 'xyz' in calibration; known keys: source,"),
        (PRUNE + "      kind: prune\n", 5, "unknown key 'kind' in prune"),
        ("version: 1\npasses:\n  - prune: {}\n", 3, "prune needs the key 'method': magnitude, wanda, sparsegpt, alps or keep"),
        ("passes:\n  - prune: {method: wanda}\n", 1, "start the file with 'version: 1'"),
        ("\nversion: 2\npasses:\n  - prune: {method: wanda}\n", 2, "version 1, not 2"),
        ("version: 1\n", 1, "the recipe needs the key 'passes'"),
        ("version: 1\npasses: []\n", 2, "passes is empty"),
        ("version: 1\npasses: {prune: {method: wanda}}\n", 2, "passes must be a list"),
        ("version: 1\npasses:\n  - prun: {method: wanda}\n", 3, "unknown pass 'prun'; did you mean 'prune'? known"),
        ("version: 1\npasses:\n  - zzz: {}\n", 3, "unknown pass 'zzz'; known passes: depth, basis, prune"),
        ("version: 1\npasses:\n  - depth: {}\n", 3, "depth needs the key 'method': angular, deepest, streamline or finercut"),
        ("version: 1\npasses:\n  - tune: {}\n", 3, "tune trains what compression left over"),
        (
            "version: 1\npasses:\n  - prune: {method: sparsegpt}\n  - tune: {}\n  - quantize: {method: rtn, bits: 4, group_size: 64}",
            4,
            "which would undo the tuning; put tune last",
        ),
        (PRUNE.replace("magnitude", "wanda") + "  - tune: {epochs: 0}\n", 5, "epochs must be at least 1"),
        ("version: 1\npasses:\n  - prune: {method: magnitude}\nsolver:\n  coordinate_descent: 2\n", 5, "there is no sweep to"),
        ("version: 1\npasses:\n  - prune\n", 3, "pass 'prune' needs its settings"),
        ("version: 1\npasses:\n  - 3\n", 3, "a pass is a mapping of one key"),
        ("version: 1\npasses:\n  - prune:\n    method: wanda\n", 4, "'method' stands beside 'prune'"),
        ("version: 1\npasses:\n  - prune: {method: wanda}\n    quantize: {}\n", 4, "start each pass with its own '-'"),
        (SOLVER + "  damping: '0.1'\n", 5, "must be a number, not the text '0.1'; remove the quotes"),
        (SOLVER + "  damping: -1\n", 5, "at least 0"),
        (SOLVER + "  damping: .nan\n", 5, "finite number"),
        (SOLVER + "  error_propagation: 1.5\n", 5, "at most 1"),
        (PRUNE + "ignore: lm_head\n", 5, "must be a list"),
        (PRUNE + "ignore:\n  - ok\n  - 're:('\n", 7, "'re:(' is not a valid regular expression"),
        (PRUNE + "      pattern: 4:8\n", 5, "pattern must be \"2:4\", not the text '4:8'"),
        (PRUNE + "calibration:\n", 5, "calibration must be a mapping of settings, not nothing"),
        (PRUNE + "calibration: {samples: 0}\n", 5, "at least 1, not 0"),
        (PRUNE + "calibration: {samples: true}\n", 5, "a whole number, not true"),
        (PRUNE + "calibration: {samples: 1.5}\n", 5, "a whole number, not 1.5"),
        (PRUNE + "calibration: {source: wiki}\n", 5, "source 'wiki' is not one of self, file:PATH or hub:ID"),
        (PRUNE + f"calibration: {{source: {'w' * 9000}}}\n", 5, f"source '{'w' * 200}… (9000 characters)' is not one of"),
        (PRUNE + "calibration: {source: 'file:'}\n", 5, "names nothing after the colon"),
        (PRUNE + "calibration: {source: hub:a:b:c:d}\n", 5, "hub:ID[:CONFIG[:SPLIT]]"),
        (PRUNE + "model: 135\n", 5, "model must be text, not 135; put it in quotes"),
        (PRUNE + "model: ''\n", 5, "model is empty"),
        (PRUNE + "evaluation: {text: wiki.txt}\n", 5, "evaluation text must be file:PATH"),
        (PRUNE + "evaluation: {tasks: quiz.jsonl}\n", 5, "evaluation tasks must be file:PATH"),
        (PRUNE + "evaluation: {chunks: 3}\n", 5, "measures nothing; give it a text or tasks"),
        (PRUNE + "evaluation: {text: 'file:a.txt', limit: 3}\n", 5, "limit has no effect without tasks"),
        (PRUNE + "evaluation: {tasks: 'file:t', limit: 0}\n", 5, "at least 1, not 0"),
        (PRUNE + "export: {head: {bits: 16, group_size: 64}}\n", 5, "for 16 bits leave head out"),
        (PRUNE + "export:\n  head: {bits: 8}\n", 6, "head needs the key 'group_size': 32, 64, 128 or channel"),
        (PRUNE + "export:\n  head:\n    bits: 8\n    group_size: 64\n    group: 64\n", 9, "unknown key 'group' in head; did you mean"),
        (PRUNE + "export:\n  head: {bits: 4, group_size: 64, method: gtpq}\n", 6, "must be gptq or rtn, not the text 'gtpq'"),
        (PRUNE + "export:\n  head: 8\n", 6, "export.head must be a mapping of settings, not 8"),
        (PRUNE + "export:\n  format: dense\n  head: {bits: 8, group_size: 64}\n", 7, "leave head out"),
        ("version: 1\npasses:\n  - quantize: {method: gptq, bits: 16, group_size: 64}\n", 3, "leave the quantize pass"),
        ("version: 1\npasses:\n  - quantize: {method: gptq, bits: '4', group_size: 64}\n", 3, "remove the quotes"),
        ("version: 1\npasses:\n  - quantize: {method: gptq, bits: 4, group_size: -1}\n", 3, "per row write channel"),
        ("version: 1\npasses:\n  - quantize: {method: gptq, bits: 4, group_size: chanel}\n", 3, "mean 'channel'?"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_line(text: str, line: int, words: str) -> None:
    message = refused(text)
    assert message.startswith(f"r.yaml:{line}: "), message
    assert words in message
    assert "\n" not in message


def test_all_mistakes_are_reported_at_once() -> None:
    message = refused("version: 1\npasses:\n  - prune: {method: x}\n  - quantize: {method: gptq, bits: 5}\nfoo: 1\n")
    assert [line.split(": ")[0] for line in message.splitlines()] == ["r.yaml:3", "r.yaml:4", "r.yaml:4", "r.yaml:5"]


@pytest.mark.parametrize(
    ("passes", "line", "words"),
    [
        (
            ["prune: {method: wanda}", "prune: {method: wanda}"],
            4,
            "pass 'prune' is here a second time (first as passes.0)",
        ),
        (["quantize: {method: rtn, bits: 4, group_size: 32}", "prune: {method: wanda}"], 4, "put prune first"),
        (["quantize: {method: rtn, bits: 4, group_size: 32, activation_order: true}"], 3, "it looks at no activations"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(passes: list[str], line: int, words: str) -> None:
    message = refused("version: 1\npasses:\n" + "".join(f"  - {entry}\n" for entry in passes))
    assert message.startswith(f"r.yaml:{line}: ") and words in message


MAGNITUDE, WANDA = "prune: {method: magnitude}", "prune: {method: wanda}"
RTN, GPTQ = "quantize: {method: rtn, bits: 8, group_size: channel}", "quantize: {method: gptq, bits: 4, group_size: 32}"
TO_GPTQ = "{match: '*down_proj', quantize: {method: gptq}}"


@pytest.mark.parametrize(
    ("passes", "solver", "overrides", "words"),
    [
        ([MAGNITUDE], "damping: 0.1", "", "damping has no effect with method magnitude: no Hessian is inverted"),
        (
            [MAGNITUDE, RTN],
            "error_propagation: 0.1",
            "",
            "error_propagation has no effect with methods magnitude and rtn",
        ),
        ([WANDA], "damping: 0.1", "", "damping has no effect with method wanda: no Hessian is inverted"),
        ([WANDA, RTN], "coordinate_descent: 2", "", "coordinate_descent has no effect with methods wanda and rtn"),
        (
            ["distill: {tokens: 1M, teacher: m}"],
            "damping: 0.1",
            "",
            "solver has no effect: no pass prunes or quantizes",
        ),
        ([WANDA], "error_propagation: 0.5, damping: 0.1", "", None),
        ([WANDA, GPTQ], "damping: 0.1", "", None),
        (["prune: {method: sparsegpt}", RTN], "error_propagation: 0.5, coordinate_descent: 1", "", None),
        ([MAGNITUDE, GPTQ], "damping: 0.1, error_propagation: 1, coordinate_descent: 0", "", None),
        ([MAGNITUDE, RTN], "damping: 0.01, error_propagation: 0, coordinate_descent: 5", "", None),  # the defaults
        ([MAGNITUDE, RTN], "damping: 0.1", TO_GPTQ, None),
    ],
)
def test_settings_of_the_solver_need_a_method_that_honours_them(
    passes: list[str], solver: str, overrides: str, words: str | None
) -> None:
    text = "version: 1\npasses:\n" + "".join(f"  - {entry}\n" for entry in passes)
    text += f"overrides: [{overrides}]\nsolver:\n  {{{solver}}}\n"
    if words is None:
        recipe = parse_recipe(text)
        assert parse_recipe(dump_recipe(recipe)) == recipe
    else:
        line = len(passes) + (4 if "no pass" in words else 5)
        message = refused(text)
        assert message.startswith(f"r.yaml:{line}: ") and words in message


def test_what_is_said_of_linears_needs_a_pass_that_decides_them() -> None:
    depth = "version: 1\npasses:\n  - depth: {method: deepest, drop: 1}\nexport: {format: dense}\n"
    assert refused(depth + "ignore: [o_proj]\n").startswith(
        "r.yaml:5: ignore has no effect: no pass prunes or quantizes"
    )
    overrides = "overrides:\n  - {match: o_proj, prune: null}\n"
    assert refused(depth + overrides).startswith("r.yaml:5: overrides has no effect")
    assert parse_recipe(depth + "ignore: [lm_head]\noverrides: []\n").depth is not None


def test_the_parts_of_the_loss_have_the_names_of_the_field() -> None:
    recipe = parse_recipe(PRUNE + "  - distill: {tokens: 1M, loss: {kl: 2, squarehead: 0, cross_entropy: 0.5}}\n")
    (distill,) = recipe.training
    assert isinstance(distill, Distill) and dict(distill.loss) == {
        "kl": 2,
        "reverse_kl": 0,
        "squarehead": 0,
        "cross_entropy": 0.5,
    }
    assert dict(Distill(tokens=10**6).loss) == {"kl": 1, "reverse_kl": 0, "squarehead": 1, "cross_entropy": 0}
    assert parse_recipe(dump_recipe(recipe)) == recipe
    message = refused(PRUNE + "  - distill:\n      tokens: 1M\n      loss: {kl: 0, squarehead: 0}\n")
    assert message.startswith("r.yaml:7: none of kl, reverse_kl and squarehead counts")


def test_pack_quantized_needs_integers() -> None:
    assert refused(PRUNE + "export:\n  format: pack-quantized\n").startswith("r.yaml:6: pack-quantized stores integers")


def test_evaluating_on_the_calibration_text_is_refused(tmp_path: Path) -> None:
    text, link, copy, other = (tmp_path / name for name in ("a.txt", "link.txt", "copy.txt", "other.txt"))
    text.write_text("one text")
    copy.write_text("one text")
    other.write_text("two text")
    link.symlink_to(text)

    def recipe(path: object) -> str:
        return PRUNE + f"calibration: {{source: 'file:{text}'}}\nevaluation:\n  text: file:{path}\n"

    for same in (text, f"{tmp_path}/./a.txt", link, copy):
        message = refused(recipe(same))
        assert message.startswith("r.yaml:7: ") and "never calibrate on what is evaluated" in message
    assert parse_recipe(recipe(other)).evaluation is not None


def mixture(*entries: str, more: str = "") -> str:
    listed = "".join(f"    - {{{entry}}}\n" for entry in entries)
    return PRUNE + f"calibration:\n  sources:\n{listed}{more}"


def test_a_mixture_gives_each_source_its_share_of_the_rows() -> None:
    text = mixture("source: self, weight: 2", "source: 'file:a.txt', weight: 1", "source: 'hub:b', weight: 1")
    calibration = parse_recipe(text, overrides=["calibration.samples=7"]).calibration
    assert calibration.source is None
    assert calibration.mixture == [("self", 0.5), ("file:a.txt", 0.25), ("hub:b", 0.25)]
    assert calibration.rows == [3, 2, 2]  # 3.5, 1.75, 1.75: the two largest remainders get one more
    recipe = parse_recipe(text)
    assert parse_recipe(dump_recipe(recipe)) == recipe and parse_recipe(JOINT).calibration.rows == [128]


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (128, [0.5, 0.5], [64, 64]),
        (5, [1, 2, 7], [1, 1, 3]),
        (1, [0.5, 0.5], [1, 0]),
        (100, [1e-9, 3.0], [0, 100]),
    ],
)
def test_rows_are_shared_out_by_largest_remainders(total: int, weights: list[float], expected: list[int]) -> None:
    assert shares(total, weights) == expected and sum(expected) == total


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (mixture("source: self, weight: 1", more="  source: self\n"), 6, "both source and sources"),
        (PRUNE + "calibration:\n  source: null\n", 6, "calibration needs a source"),
        (PRUNE + "calibration:\n  sources: []\n", 6, "sources is empty; give at least one entry"),
        (mixture("source: self, weight: 0"), 7, "must be more than 0"),
        (mixture("source: self, weight: 1, x: 1"), 7, "unknown key 'x' in sources; known keys: source, weight"),
        (mixture("source: self"), 7, "sources needs the key 'weight'"),
        (mixture("source: wiki, weight: 1"), 7, "source 'wiki' is not one of self"),
        (mixture("source: self, weight: 1", "source: self, weight: 2"), 8, "here a second time"),
        (mixture("source: self, weight: 1", "source: 'file:a', weight: 1e-9"), 8, "gets none of the 128 samples"),
        (PRUNE + "calibration:\n  source: file:a\n  self: {chat: 1}\n", 7, "self has no effect"),
        (PRUNE + "calibration:\n  self:\n    chatt: 1\n", 7, "unknown key 'chatt' in self; did you mean 'chat'?"),
        (PRUNE + "calibration:\n  self:\n    coolest: 1.1\n", 7, "coolest is 1.1, above temperature, 1.0"),
    ],
)
def test_mixtures_and_own_text_that_cannot_be_meant(text: str, line: int, words: str) -> None:
    message = refused(text)
    assert message.startswith(f"r.yaml:{line}: ") and words in message, message


def test_no_part_of_a_mixture_may_be_what_is_evaluated(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one text")
    (tmp_path / "c.txt").write_text("two text")

    def recipe(part: str) -> str:
        entries = mixture("source: self, weight: 1", f"source: 'file:{tmp_path}/{part}', weight: 1")
        return entries + f"evaluation:\n  text: file:{tmp_path}/a.txt\n"

    assert "never calibrate on what is evaluated" in refused(recipe("b.txt"))
    assert parse_recipe(recipe("c.txt")).evaluation is not None


def test_a_mixture_is_named_in_words() -> None:
    assert sources_in_words({"source": "file:a"}) == "file:a" and sources_in_words({}) == "self"
    entries = [{"source": "self", "weight": 3.0}, {"source": "hub:b", "weight": 1.0}]
    assert sources_in_words({"source": None, "sources": entries}) == "75% self + 25% hub:b"


def test_a_source_that_is_a_file_is_told_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wiki.txt").write_text("x")
    assert "write file:wiki.txt" in refused(PRUNE + "calibration: {source: wiki.txt}\n")


def test_the_schema_for_editors_is_up_to_date() -> None:
    """`make recipes` writes it again."""
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == json_schema()


def test_the_schema_accepts_what_the_loader_accepts_and_refuses_what_it_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in ready_recipes().values():
        assert not list(validator.iter_errors(yaml.safe_load(path.read_text())))
        assert not list(validator.iter_errors(yaml.safe_load(dump_recipe(load_recipe(path)))))
    some = {"version": 1, "passes": [{"prune": {"method": "wanda"}}, {"quantize": {"bits": 4, "group_size": 64}}]}
    for overrides in (
        [{"match": "a", "prune": None}],
        [{"match": "a", "quantize": {"bits": 8}}, {"match": "b", "prune": {"method": "alps"}, "quantize": None}],
    ):
        assert not list(validator.iter_errors({**some, "overrides": overrides})) and recipe_from(
            {**some, "overrides": overrides}
        )
    for overrides in (
        [{"prune": None}],
        [{"match": "a", "quantize": {"bits": 5}}],
        [{"match": "a", "prunes": None}],
        {},
    ):
        assert list(validator.iter_errors({**some, "overrides": overrides})), overrides
    for passes in (
        [],
        [{"prune": {}}],
        [{"prun": {"method": "wanda"}}],
        [{"prune": {"method": "wanda", "x": 1}}],
        ["prune"],
    ):
        assert list(validator.iter_errors({"version": 1, "passes": passes})), passes
    assert list(validator.iter_errors({"version": 1, "passes": [{"prune": {"method": "wanda"}}], "foo": 1}))
