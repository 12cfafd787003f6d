"""Several models side by side: accuracy against size and against speed, and the table behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparsify import units
from sparsify.report.measured import between
from sparsify.report.parts import HALF, Cell, Picture, Table, picture
from sparsify.report.scatter import Axis, Point, front, scatter

COLOURS = 6  # s0 to s5 of pictures.css; the dense model has s0
DENSE = "dense"
SIZE = Axis("size", units.size, less=True)


@dataclass
class Model:
    """What is known of one model. nbytes: of its tensors; accuracy, speed: figures by what they are"""

    name: str
    nbytes: int | None = None
    evaluation: Mapping[str, Any] | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)


def models_of(
    evaluated: Sequence[tuple[str, Mapping[str, Any]]],
    sizes: Mapping[str, int],
    bench: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> list[Model]:
    """Every model that something was measured of, the dense one first.

    evaluated: names and evaluations; sizes: bytes by name; bench, runs: JSON of `bench latency` or `throughput`, and of `bench serve`.
    A model of a benchmark is one of another record where both have one name, or both are dense.
    """
    found: dict[str, Model] = {}

    def model(name: str) -> Model:
        return found.setdefault(name, Model(name))

    for name, row in evaluated:
        if row.get("dense") and row.get("dense_nbytes"):
            _add_dense(model(DENSE), row)
        own = model(DENSE if is_dense(row) else name)
        own.nbytes, own.evaluation = row.get("nbytes"), row
        _add_accuracy(own, row)
    for name, nbytes in sizes.items():
        own = model(name)
        own.nbytes = own.nbytes or nbytes
    for record in bench:
        for row in record["models"]:
            own = _of_benchmark(found, row)
            if row.get("latency"):
                own.speed["tokens/s, one request"] = row["latency"]["decode_tokens_per_second"]
            if row.get("throughput"):
                own.speed["tokens/s, many requests"] = row["throughput"]["output_tokens_per_second"]
    for run in runs:
        for row in run["models"]:
            at_once = next((point for point in row["points"] if point["rate"] is None), None)
            if at_once and at_once["figures"].get("output_throughput"):
                own = _of_benchmark(found, row)
                own.speed["tokens/s, all at once"] = at_once["figures"]["output_throughput"]["median"]
    return sorted(found.values(), key=lambda one: one.name != DENSE)


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of the dense model itself."""
    return row.get("format") == DENSE and (row.get("kl") == 0 or row.get("model") == row.get("dense"))


def _add_dense(dense: Model, row: Mapping[str, Any]) -> None:
    dense.nbytes = row["dense_nbytes"]
    for name, text in row["texts"].items():
        if text.get("dense_perplexity") is not None:
            dense.accuracy |= {f"perplexity, {name}": text["dense_perplexity"], f"KL, {name}": 0.0}
    if (mean := row.get("tasks_mean")) and mean.get("dense_accuracy") is not None:
        dense.accuracy["accuracy on tasks"] = mean["dense_accuracy"]


def _add_accuracy(model: Model, row: Mapping[str, Any]) -> None:
    for name, text in row["texts"].items():
        if text.get("perplexity") is not None:
            model.accuracy[f"perplexity, {name}"] = text["perplexity"]
        if text.get("kl") is not None:
            model.accuracy[f"KL, {name}"] = text["kl"]
    if mean := row.get("tasks_mean"):
        model.accuracy["accuracy on tasks"] = mean["accuracy"]
        if mean.get("accuracy_interval"):
            low, high = mean["accuracy_interval"]
            model.intervals["accuracy on tasks"] = (low, high)


def _of_benchmark(found: dict[str, Model], row: Mapping[str, Any]) -> Model:
    """The model of a row of a benchmark, new where no other record has one."""
    name = str(row["model"])
    if name not in found and row.get("format") == DENSE and DENSE in found:
        name = DENSE
    model = found.setdefault(name, Model(name))
    model.nbytes = model.nbytes or row.get("nbytes")
    return model


def comparison(models: Sequence[Model]) -> dict[str, Any] | None:
    """Context of compare.html.j2; None for fewer than two models."""
    if len(models) < 2:
        return None
    colours = {model.name: f"s{number % COLOURS}" for number, model in enumerate(models)}
    measures = list(dict.fromkeys(name for model in models for name in model.accuracy))
    speeds = list(dict.fromkeys(name for model in models for name in model.speed))
    charts = []
    for measure in measures:
        y = _axis(measure)
        sizes = {model.name: float(model.nbytes) for model in models if model.nbytes}
        charts.append((f"{_titled(measure)} and size", _chart(models, colours, measure, y, SIZE, sizes)))
        for speed in speeds:
            x = Axis(speed, "{:.3g}".format, less=False)
            values = {model.name: model.speed[speed] for model in models if speed in model.speed}
            charts.append((f"{_titled(measure)} and {speed}", _chart(models, colours, measure, y, x, values)))
    return {
        "charts": [(title, drawn) for title, drawn in charts if drawn],
        "series": [(model.name, colours[model.name]) for model in models],
        "table": comparison_table(models),
    }


def _titled(measure: str) -> str:
    return measure[0].upper() + measure[1:]


def _axis(measure: str) -> Axis:
    """How a figure of accuracy is drawn."""
    if measure.startswith("accuracy"):
        return Axis(measure, lambda value: units.percent(value, 0), less=False, zero=False)
    return Axis(measure, "{:.3g}".format, less=True, zero=measure.startswith("KL"))


def _chart(
    models: Sequence[Model],
    colours: Mapping[str, str],
    measure: str,
    y: Axis,
    x: Axis,
    values: Mapping[str, float],
) -> Picture | None:
    """One figure against another; None where fewer than two models have both."""
    points = [
        Point(one.name, values[one.name], one.accuracy[measure], colours[one.name], one.intervals.get(measure))
        for one in models
        if one.name in values and measure in one.accuracy
    ]
    if len(points) < 2:
        return None
    best = {point.name for point in front(points, x, y)}
    rows = [[point.name, point.x, point.y, *(point.interval or (None, None)), point.name in best] for point in points]
    head = ["model", x.title, y.title, "low", "high", "on the front"]
    return picture(partial(scatter, points, x, y), f"{measure}-and-{x.title}", head, rows, HALF)


def comparison_table(models: Sequence[Model]) -> Table:
    """A row for each model; a dash where something was not measured."""
    measures = list(dict.fromkeys(name for model in models for name in model.accuracy))
    speeds = list(dict.fromkeys(name for model in models for name in model.speed))
    recovered = "accuracy on tasks" in measures
    rows: list[list[str | Cell]] = []
    for model in models:
        row: list[str | Cell] = [model.name, units.size(model.nbytes) if model.nbytes else "–"]
        for measure in measures:
            value = model.accuracy.get(measure)
            if value is None:
                row.append("–")
            elif measure.startswith("accuracy"):
                row.append(between(value, model.intervals.get(measure)))
            else:
                row.append(f"{value:.4f}" if measure.startswith("KL") else units.number(value))
        if recovered:
            mean = (model.evaluation or {}).get("tasks_mean") or {}
            row.append(between(mean.get("recovery"), mean.get("recovery_interval")))
        row += [f"{model.speed[speed]:.3g}" if speed in model.speed else "–" for speed in speeds]
        rows.append(row)
    return Table(["model", "size", *measures, *(["recovery"] if recovered else []), *speeds], rows)


def called(spec: str | Path) -> str:
    """What people call a model: the last part of its path or id."""
    return str(spec).rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
