"""`bench recipes`: every recipe in a process of its own, one table, nothing made twice, nothing that flatters."""

import json
from importlib.util import find_spec

import pytest

from sparsify.bench.recipes import compare_recipes, contenders, record, table, tables
from sparsify.errors import RecipeError, SparsifyError
from sparsify.evaluation import evaluate
from sparsify.recipe import load_recipe
from tests.helpers.tiny import save_tiny, tiny_text

RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 4, sequence_length: 32}}
passes:
  - prune: {{method: {method}}}
"""


@pytest.fixture
def place(tmp_path):
    save_tiny(tmp_path / "model")
    text = tiny_text(tmp_path / "text.txt")
    tiny_text(tmp_path / "test.txt", seed=1)
    for method in ("magnitude", "sparsegpt"):
        (tmp_path / f"{method}.yaml").write_text(RECIPE.format(text=text, method=method))
    return tmp_path


def compare(place, *specs, text="test.txt", overrides=()):
    return compare_recipes(
        specs, str(place / "model"), [str(place / text)], place / "out", overrides, 32, 4, quiet=True
    )  # fmt: skip


def test_each_recipe_is_made_once_and_scored_as_eval_does(place):
    one, other = f"{place / 'magnitude.yaml'}", f"raw={place / 'sparsegpt.yaml'},solver.coordinate_descent=0"
    results = compare(place, one, other)
    assert [result.label for result in results] == ["magnitude", "raw"]
    for result in results:
        expected = evaluate(place / "out" / result.label, place / "model", place / "test.txt", 32, 4, quiet=True)
        found = result.evaluation["test.txt"]
        assert (found.perplexity, found.kl) == (expected.perplexity, expected.kl)
        record = json.loads((place / "out" / result.label / "run.json").read_text())
        assert result.seconds == record["seconds"] > 0 and result.peak_memory_bytes == record["peak_memory_bytes"]
        assert result.bits_per_weight == 9
    made = (place / "out" / "magnitude" / "run.json").stat().st_mtime_ns
    again = compare(place, one)
    assert (place / "out" / "magnitude" / "run.json").stat().st_mtime_ns == made
    assert again[0].evaluation["test.txt"].kl == results[0].evaluation["test.txt"].kl
    with pytest.raises(SparsifyError, match="was made by another recipe"):
        compare(place, f"raw={place / 'sparsegpt.yaml'}")
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(SparsifyError, match="was made from other weights"):
        compare(place, one)
    weights.write_bytes(before)
    shown = table(results)
    assert shown.row_count == 3 and [column.header for column in shown.columns][:2] == ["recipe", "perplexity"]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)")
def test_one_row_per_recipe_holds_all_texts_and_tasks(place):
    tiny_text(place / "other.txt", seed=2)
    (place / "tasks").mkdir()
    for name, question, answers in (("quiz", "question", "choices"), ("story", "context", "endings")):
        lines = [json.dumps({question: f"a{n}b", answers: [f"c{n}", "dd", f"{n}e"], "answer": n % 3}) for n in range(8)]
        (place / "tasks" / f"{name}.jsonl").write_text("\n".join(lines))
    texts, tasks = [str(place / "test.txt"), str(place / "other.txt"), "self"], str(place / "tasks")
    recipes = [f"{place / name}.yaml" for name in ("magnitude", "sparsegpt")]
    results = compare_recipes(recipes, str(place / "model"), texts, place / "out", (), 32, 4, True, tasks, 6)
    expected = evaluate(place / "out" / "sparsegpt", place / "model", texts, 32, 4, tasks=tasks, limit=6, quiet=True)
    assert results[1].evaluation == expected.texts and list(expected.texts) == ["test.txt", "other.txt", "self"]
    assert results[1].tasks == expected.tasks and results[1].scored.tasks_mean == expected.tasks_mean
    assert (results[0].relative_seconds, results[0].relative_peak_memory) == (1, 1)
    assert results[1].relative_seconds == results[1].seconds / results[0].seconds
    assert results[1].relative_peak_memory == results[1].peak_memory_bytes / results[0].peak_memory_bytes
    kept = json.loads((place / "out" / "recipes.json").read_text())
    assert kept == json.loads(json.dumps(record(results))) and kept["dense"] == str(place / "model")
    row = kept["recipes"][1]
    assert (
        row["evaluation"]["other.txt"]["kl"] == expected.texts["other.txt"].kl and row["tasks"]["story"]["items"] == 6
    )
    assert row["tasks_mean"]["accuracy"] == expected.tasks_mean.accuracy
    assert row["command"].startswith(f"sparsify apply {recipes[1]} --model {place / 'model'} --output ")
    on_texts, on_tasks = tables(results)
    assert [column.header for column in on_tasks.columns][:4] == ["recipe", "quiz", "story", "mean"]
    assert on_texts.row_count == on_tasks.row_count == 3
    only = compare_recipes(recipes, str(place / "model"), None, place / "out", (), None, None, True, tasks, 6)
    assert not only[0].evaluation and only[1].tasks == expected.tasks and len(tables(only)) == 2


def test_what_cannot_be_scored_is_refused_before_a_recipe_runs(place):
    recipe, model = [str(place / "magnitude.yaml")], str(place / "model")
    with pytest.raises(SparsifyError, match=r"gone\.txt: cannot read the evaluation text"):
        compare_recipes(recipe, model, ["self", str(place / "test.txt"), "gone.txt"], place / "out", (), 32, 4, True)
    (place / "quiz.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 2}')
    with pytest.raises(SparsifyError, match=r"quiz\.jsonl, line 1 has the gold answer 2, out of range"):
        compare_recipes(recipe, model, None, place / "out", quiet=True, tasks=str(place / "quiz.jsonl"))
    assert not (place / "out").exists()


def test_changes_go_where_a_recipe_has_them(place):
    found = contenders(
        [str(place / "magnitude.yaml"), "2of4-w4a16"],
        ["passes.quantize.bits=8", "calibration.samples=7"], "some/model", place / "out",
    )  # fmt: skip
    assert found[0].recipe.quantize is None and found[1].recipe.quantize.bits == 8
    assert [entry.recipe.calibration.samples for entry in found] == [7, 7]
    changes = ["solver.damping=0.1", "ignore=[o_proj]", "overrides=[{match: q_proj, prune: null}]"]
    sparse, shorter = contenders(
        [str(place / "sparsegpt.yaml"), "depth-finercut"], changes, "some/model", place / "out"
    )
    assert sparse.recipe.solver.damping == 0.1 and sparse.recipe.ignore == ["o_proj"] and sparse.recipe.overrides
    assert shorter.recipe == load_recipe("depth-finercut", model="some/model")


def test_bad_input(place):
    recipe = str(place / "magnitude.yaml")
    with pytest.raises(SparsifyError, match="learns from .*text.txt, which would flatter it"):
        compare(place, recipe, text="text.txt")
    with pytest.raises(SparsifyError, match="two recipes are called magnitude"):
        compare(place, recipe, recipe)
    with pytest.raises(SparsifyError, match="name it with --model"):
        compare_recipes([recipe], None, ["self"], place / "out")
    with pytest.raises(RecipeError, match="dampning"):
        compare(place, recipe + ",passes.prune.dampning=1")
    assert not (place / "out").exists()
