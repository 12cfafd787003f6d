"""The page itself: the context of each section, made from what was measured, and the templates that set it.

`header`, `measured` and `compressed` turn figures into text; all HTML stands in `templates/`, where every value is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsify.report import compressed, header, measured, search, svg
from sparsify.report.figures import as_list, read_layers
from sparsify.report.under_load import under_load


@cache
def environment() -> Environment:
    """The templates. Values are escaped, but for the pictures, marked `safe`; a name that the context lacks is an error."""
    loader = PackageLoader("sparsify.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)


def render_page(
    metrics: Mapping[str, Any],
    evaluations: Any = None,
    bench: Mapping[str, Any] | None = None,
    searched: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole document. metrics: metrics.json; evaluations, bench: what `eval --json` and `bench --json` printed; searched:
    search.json of `sparsify search`; runs: of `sparsify bench serve` or GuideLLM."""
    evaluated = without_dense(as_list(evaluations or metrics.get("evaluation")))
    layers = read_layers(metrics)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            header=header.header(metrics, layers, evaluated, bench),
            accuracy=measured.accuracy(metrics, evaluated),
            size=measured.size(metrics),
            speed=measured.speed(bench or {}),
            load=under_load(runs),
            answers=measured.answers(bench or {}),
            depth=compressed.depth(metrics),
            training=compressed.training(metrics),
            layers=compressed.by_layer(metrics, layers),
            search=search.search(searched),
            dense=compressed.dense_modules(metrics),
            recipe=compressed.recipe(metrics),
            method=measured.method(metrics, evaluated, bench or {}),
        )
    )


def render_load_page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The document of runs under load alone, without a checkpoint."""
    names = list(dict.fromkeys(str(model["model"]) for run in runs for model in run["models"]))
    rates = len({point["rate"] for run in runs for model in run["models"] for point in model["points"]})
    lead = f"{', '.join(names)}: latency and throughput at {rates} rates of requests"
    top = {"name": "Servers under load", "emblem": svg.emblem(), "lead": lead}
    return environment().get_template("serving.html.j2").render(header=top, load=under_load(runs))


def without_dense(evaluated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out the row of the dense model itself: every other row carries its figures."""
    others = [row for row in evaluated if row.get("format") != "dense" or not is_same(row)]
    return others or evaluated


def is_same(row: dict[str, Any]) -> bool:
    """Whether a model did nothing else than the dense one, on text or, without any, on tasks."""
    if row.get("kl") is not None or not row.get("tasks"):
        return row.get("kl") == 0
    return all(score["flips"] == 0 for score in row["tasks"].values())
