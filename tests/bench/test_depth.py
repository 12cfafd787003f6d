"""`bench depth`: the rows it makes, what it says of them, and that a second call makes nothing again."""

import math

import pytest

from sparsify.bench.depth import DROPS, METHODS, DepthOptions, compare_depth, recipe_of, table
from sparsify.cli.bench_recipes import DEPTH_DROPS
from sparsify.errors import SparsifyError
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text


@pytest.fixture
def place(tmp_path):
    save_tiny(tmp_path / "model", num_hidden_layers=6)
    tiny_text(tmp_path / "text.txt")
    tiny_text(tmp_path / "test.txt", seed=1)
    return tmp_path


def compare(place, **options):
    overrides = (
        f"calibration.source=file:{place / 'text.txt'}", "calibration.samples=4", "calibration.sequence_length=32",
        "passes.lora.sequence_length=32", "passes.lora.samples=40", "passes.lora.batch_size=4", "passes.lora.precision=float32",
    )  # fmt: skip
    settings = {"drops": ["30%"], "overrides": overrides, "sequence_length": 32, "chunks": 4, "quiet": True, **options}
    return compare_depth(str(place / "model"), [str(place / "test.txt")], place / "out", DepthOptions(**settings))


def test_rows_before_and_after_what_makes_up_for_them(place):
    rows, speed = compare(place, methods=["streamline"], heal="8k")
    assert speed is None
    assert [(row.method, row.healed) for row in rows] == [("streamline", False), ("streamline", True)]
    assert all(row.layers == (6, 4) for row in rows)
    scores = [row.result.evaluation["test.txt"] for row in rows]
    dense, before, after = (math.log(x) for x in (scores[0].dense_perplexity, *(s.perplexity for s in scores)))
    if before > dense:
        assert rows[1].closed["test.txt"] == pytest.approx(1 - (after - dense) / (before - dense))
    assert not rows[0].closed and 0 < scores[0].stability <= 1
    made = {file: file.stat().st_mtime_ns for file in place.glob("out/*/model.safetensors")}
    compare(place, methods=["streamline"], heal=None)
    assert len(made) == 2 and all(file.stat().st_mtime_ns == then for file, then in made.items())
    assert table(rows, None).row_count == 3


def test_every_row_is_a_recipe_of_its_own():
    for method in METHODS:
        for heal in (None, "100k"):
            recipe = parse_recipe(str(recipe_of(method, "20%", heal)))
            assert recipe.depth.drop == 0.2 and recipe.export.format == "dense"
            assert bool(recipe.training) == (heal is not None and method != "streamline")
    assert DEPTH_DROPS == DROPS


def test_an_unknown_method_is_named(place):
    with pytest.raises(SparsifyError, match="shortgpt is no depth method; known are deepest, angular"):
        compare(place, methods=["shortgpt"])
