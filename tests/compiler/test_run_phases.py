"""Phases of a run in run.json and in the table at its end."""

import pytest

from sparsify import compute
from sparsify.compiler.apply import apply
from sparsify.compiler.run_phases import phases_in_words
from sparsify.compiler.summary import summary
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny

RECIPE = """
version: 1
calibration: {source: self, samples: 4, sequence_length: 32}
solver: {error_propagation: 0.5, coordinate_descent: 1}
passes:
  - prune: {method: alps}
  - quantize: {method: gptq, bits: 4, group_size: 32}
"""


def cells(table):
    return [[str(cell) for cell in column.cells] for column in table.columns]


def test_a_run_says_where_its_time_went(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "rates", lambda measure=False: compute.Rates(4e11, 1e11))
    monkeypatch.setattr("sparsify.compiler.run_phases.rates", lambda: compute.Rates(4e11, 1e11))
    model = save_tiny(tmp_path / "model", "llama")
    recipe = parse_recipe(RECIPE)
    done = apply(recipe, str(model), tmp_path / "out", quiet=True)
    phases = done.record["phases"]
    solver = {"factors", "masks", "sweep", "coordinate descent", "errors"}
    assert {"calibration text", "forward", "dense forward", "statistics", "reading", "writing", *solver} <= set(phases)
    assert sum(part["seconds"] for part in phases.values()) <= done.record["seconds"] + 0.2
    assert "operations" not in phases["writing"]
    for name in ("forward", "statistics", *solver):
        part = phases[name]
        assert part["operations"] > 0 and part["per_second"] > 0
        assert part["possible_per_second"] % 1e11 == 0
    assert phases["forward"]["operations"] == phases["dense forward"]["operations"]
    assert f"time: {next(iter(phases))}" in cells(summary(done.metrics, "t", done.record))[0]  # the longest
    assert not [name for name in cells(summary(done.metrics, "t"))[0] if name.startswith("time")]


def test_bars_are_as_long_as_their_shares():
    parts = {
        "forward": {"seconds": 60.0, "operations": 1, "per_second": 2.2e11, "possible_per_second": 4.4e11},
        "sweep": {"seconds": 15.0},
        "reading": {"seconds": 0.1},
    }
    rows = dict(phases_in_words({"seconds": 100.0, "phases": parts}))
    assert list(rows) == ["time: forward", "time: sweep", "time: other"]
    assert [row.count("█") for row in rows.values()] == [24, 6, 10]
    assert rows["time: forward"].endswith("60 s, 220 GFLOP/s, 0.50 times the speed of torch's products")
    assert rows["time: other"].endswith("25 s")
    assert phases_in_words({"seconds": 1.0}) == []  # of a run before phases were counted


@pytest.mark.parametrize("resumed", [True, False])
def test_what_was_done_before_is_not_counted_as_done_now(tmp_path, resumed, monkeypatch):
    from sparsify.compiler.planning import make_plan
    from sparsify.compiler.run_phases import phases_of

    monkeypatch.setattr("sparsify.phases.seconds_so_far", lambda: {"forward": 2.0})
    plan = make_plan(parse_recipe(RECIPE), str(save_tiny(tmp_path / "model", "llama")))
    assert ("operations" in phases_of(plan, resumed)["forward"]) != resumed
