"""The page itself: the context of each section, made from what was measured, and the templates that set it.

`header`, `measured` and `compressed` turn figures into text; all HTML stands in `templates/`, where every value is escaped.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsify.report import compare, compressed, header, measured, search, svg
from sparsify.report.figures import as_list, read_layers
from sparsify.report.under_load import under_load


@cache
def environment() -> Environment:
    """The templates. Values are escaped, but for the pictures, marked `safe`; a name that the context lacks is an error."""
    loader = PackageLoader("sparsify.report", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    made.globals["script_hash"] = script_hash
    return made


def script_hash() -> str:
    """The one script of the page, as a content security policy names it."""
    script = environment().get_template("save.js").render()
    return f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}"


def page_context(
    metrics: Mapping[str, Any],
    evaluations: Any = None,
    bench: Mapping[str, Any] | None = None,
    searched: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What page.html.j2 sets. metrics: metrics.json; evaluations, bench: what `eval --json` and `bench --json` printed; searched:
    search.json of `sparsify search`; runs: of `sparsify bench serve` or GuideLLM."""
    evaluated = without_dense(as_list(evaluations or metrics.get("evaluation")))
    layers = read_layers(metrics)
    named = list(zip(measured.labels_of(evaluated), evaluated, strict=True))
    return {
        "header": header.header(metrics, layers, evaluated, bench),
        "accuracy": measured.accuracy(metrics, evaluated),
        "comparison": compare.comparison(compare.models_of(named, {}, [bench] if bench else [], runs)),
        "size": measured.size(metrics),
        "speed": measured.speed(bench or {}),
        "load": under_load(runs),
        "answers": measured.answers(bench or {}),
        "search": search.search(searched),
        **_about(metrics, evaluated, bench or {}),
    }


def _about(
    metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], bench: Mapping[str, Any]
) -> dict[str, Any]:
    """What the sections about one checkpoint alone set."""
    return {
        "depth": compressed.depth(metrics),
        "training": compressed.training(metrics),
        "layers": compressed.by_layer(metrics, read_layers(metrics)),
        "dense": compressed.dense_modules(metrics),
        "recipe": compressed.recipe(metrics),
        "method": measured.method(metrics, evaluated, bench),
    }


def render_page(
    metrics: Mapping[str, Any],
    evaluations: Any = None,
    bench: Mapping[str, Any] | None = None,
    searched: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The document about one checkpoint; see `page_context`."""
    return rendered("page.html.j2", page_context(metrics, evaluations, bench, searched, runs))


def rendered(template: str, context: Mapping[str, Any]) -> str:
    """A whole document."""
    return environment().get_template(template).render(context)


def several_context(
    checkpoints: Sequence[tuple[str, Mapping[str, Any]]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    bench: Sequence[Mapping[str, Any]] = (),
    searched: Sequence[Mapping[str, Any]] = (),
    runs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What several.html.j2 sets. checkpoints: names and metrics.json of each; a checkpoint that no evaluation is about has that of
    its metrics.json. The rest as `page_context` takes it, several of each."""
    given = as_list(list(evaluations))
    about = [(compare.called(row["model"]), row) for row in given]
    for name, metrics in checkpoints:
        if name not in dict(about):
            about += [(name, row) for row in as_list(metrics.get("evaluation"))]
    sizes = {name: (metrics.get("sizes") or {}).get("compressed_bytes") for name, metrics in checkpoints}
    known = {name: nbytes for name, nbytes in sizes.items() if nbytes}
    names = [name for name, _ in checkpoints]
    others = [(name, row) for name, row in about if not compare.is_dense(row)]
    rows = [{**row, "model": name} for name, row in others]
    return {
        "header": {
            "name": f"{len(names)} checkpoints",
            "emblem": svg.emblem(),
            "lead": ", ".join(names) + ": accuracy, size and speed side by side",
        },
        "comparison": compare.comparison(compare.models_of(about, known, bench, runs)),
        "accuracy": measured.accuracy({}, rows, [name for name, _ in others]),
        "speeds": [measured.speed(one) for one in bench],
        "load": under_load(runs),
        "checkpoints": [
            {"name": name, **_about(metrics, [row for called, row in about if called == name], {})}
            for name, metrics in checkpoints
        ],
        "searches": [search.search(one) for one in searched],
    }


def load_context(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What serving.html.j2 sets: runs under load alone, without a checkpoint."""
    names = list(dict.fromkeys(str(model["model"]) for run in runs for model in run["models"]))
    rates = len({point["rate"] for run in runs for model in run["models"] for point in model["points"]})
    lead = f"{', '.join(names)}: latency and throughput at {rates} rates of requests"
    top = {"name": "Servers under load", "emblem": svg.emblem(), "lead": lead}
    return {"header": top, "load": under_load(runs)}


def without_dense(evaluated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out the row of the dense model itself: every other row carries its figures."""
    others = [row for row in evaluated if row.get("format") != "dense" or not is_same(row)]
    return others or evaluated


def is_same(row: dict[str, Any]) -> bool:
    """Whether a model did nothing else than the dense one, on text or, without any, on tasks."""
    if row.get("kl") is not None or not row.get("tasks"):
        return row.get("kl") == 0
    return all(score["flips"] == 0 for score in row["tasks"].values())
