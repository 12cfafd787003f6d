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
ON_TASKS = "accuracy on tasks"
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
    bases = {called(row["dense"]) for _, row in evaluated if row.get("dense")}
    protocols = _protocols([row for _, row in evaluated])

    def model(name: str) -> Model:
        return found.setdefault(name, Model(name))

    for name, row in evaluated:
        base = DENSE if len(bases) < 2 or not row.get("dense") else called(row["dense"])
        if row.get("dense") and row.get("dense_nbytes"):
            _add_dense(model(base), row, protocols)
        own = model(base if is_dense(row) else name)
        own.nbytes, own.evaluation = row.get("nbytes"), row
        _add_accuracy(own, row, protocols)
    for name, nbytes in sizes.items():
        own = model(name)
        own.nbytes = own.nbytes or nbytes
    for record in (*bench, *runs):
        speeds = _speeds(record)
        taken = {name for one in found.values() for name in one.speed}
        # what another record has measured under the same title is not to be mixed with
        for title in sorted({title for _, by_title in speeds for title in by_title} & taken):
            number = 2 + sum(name.startswith(f"{title} (") for name in taken)
            speeds = [
                (row, {f"{name} ({number})" if name == title else name: value for name, value in by_title.items()})
                for row, by_title in speeds
            ]
        for row, by_title in speeds:
            _of_benchmark(found, row).speed |= by_title
    return sorted(found.values(), key=lambda one: one.name != DENSE)


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of the dense model itself."""
    return row.get("format") == DENSE and (row.get("kl") == 0 or row.get("model") == row.get("dense"))


def _protocols(rows: Sequence[Mapping[str, Any]]) -> dict[str, set[Any]]:
    """How each text was cut, and which items were scored: figures of two protocols do not compare and get two columns."""
    found: dict[str, set[Any]] = {}
    for row in rows:
        for name, text in row["texts"].items():
            found.setdefault(name, set()).add(_cut(text))
        if row.get("tasks"):
            found.setdefault(ON_TASKS, set()).add(_items(row))
    return found


def _cut(text: Mapping[str, Any]) -> str:
    return f"{text['tokens']} tokens in chunks of {text['sequence_length']}"


def _items(row: Mapping[str, Any]) -> str:
    scores = row["tasks"].values()
    return ", ".join(f"{score['task']} {score['items']} items {score.get('fewshot', 0)} shots" for score in scores)


def _text_title(what: str, name: str, text: Mapping[str, Any], protocols: Mapping[str, set[Any]]) -> str:
    return f"{what}, {name}" + (f", {_cut(text)}" if len(protocols[name]) > 1 else "")


def _tasks_title(row: Mapping[str, Any], protocols: Mapping[str, set[Any]]) -> str:
    return ON_TASKS + (f": {_items(row)}" if len(protocols[ON_TASKS]) > 1 else "")


def _add_dense(dense: Model, row: Mapping[str, Any], protocols: Mapping[str, set[Any]]) -> None:
    dense.nbytes = row["dense_nbytes"]
    for name, text in row["texts"].items():
        if text.get("dense_perplexity") is not None:
            dense.accuracy[_text_title("perplexity", name, text, protocols)] = text["dense_perplexity"]
            dense.accuracy[_text_title("KL", name, text, protocols)] = 0.0
    if (mean := row.get("tasks_mean")) and mean.get("dense_accuracy") is not None:
        dense.accuracy[_tasks_title(row, protocols)] = mean["dense_accuracy"]


def _add_accuracy(model: Model, row: Mapping[str, Any], protocols: Mapping[str, set[Any]]) -> None:
    for name, text in row["texts"].items():
        if text.get("perplexity") is not None:
            model.accuracy[_text_title("perplexity", name, text, protocols)] = text["perplexity"]
        if text.get("kl") is not None:
            model.accuracy[_text_title("KL", name, text, protocols)] = text["kl"]
    if mean := row.get("tasks_mean"):
        title = _tasks_title(row, protocols)
        model.accuracy[title] = mean["accuracy"]
        if mean.get("accuracy_interval"):
            low, high = mean["accuracy_interval"]
            model.intervals[title] = (low, high)


def _speeds(record: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], dict[str, float]]]:
    """The rows of `bench latency`, `throughput` or `serve`, with what each says of the model's speed."""
    found = []
    for row in record["models"]:
        speed: dict[str, float] = {}
        if row.get("latency"):
            speed["tokens/s, one request"] = row["latency"]["decode_tokens_per_second"]
        if row.get("throughput"):
            speed["tokens/s, many requests"] = row["throughput"]["output_tokens_per_second"]
        at_once = next((point for point in row.get("points") or [] if point["rate"] is None), None)
        if at_once and at_once["figures"].get("output_throughput"):
            speed["tokens/s, all at once"] = at_once["figures"]["output_throughput"]["median"]
        if speed:
            found.append((row, speed))
    return found


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
    first = next((name for name in measures if name.startswith("perplexity")), None)
    on_tasks = [name for name in measures if name.startswith(ON_TASKS)]
    against_speed = {*on_tasks, first}  # each figure against each speed would be dozens of pictures
    charts = []
    for measure in measures:
        y = _axis(measure)
        sizes = {model.name: float(model.nbytes) for model in models if model.nbytes}
        charts.append((f"{_titled(measure)} and size", _chart(models, colours, measure, y, SIZE, sizes)))
        for speed in speeds if measure in against_speed else ():
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
    recovered = any(name.startswith(ON_TASKS) for name in measures)
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
