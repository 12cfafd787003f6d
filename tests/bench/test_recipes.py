"""`bench recipes`: every recipe in a process of its own, one table, nothing made twice, nothing that flatters."""

import json

import pytest

from sparsify.bench.recipes import compare_recipes, contenders, table
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
