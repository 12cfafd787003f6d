"""Latency under load: what `sparsify bench serve` and GuideLLM measured at several rates of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsify import units
from sparsify.bench.under_load.result import STARTING
from sparsify.report.line_chart import Line, Mark, line_chart
from sparsify.report.parts import HALF, Cell, Facts, Picture, Table, picture

COLOURS = 6  # s0 to s5 of style.css

Run = Mapping[str, Any]  # serve.json, or what `read_guidellm` makes of a file; `name` is what it is called


@dataclass(frozen=True)
class Series:
    """One model of one run. css: its colour."""

    name: str
    css: str
    points: Sequence[Mapping[str, Any]]


def under_load(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Context of under_load.html.j2; None without runs."""
    if not runs:
        return None
    series = all_series(runs)
    models = [model for run in runs for model in run["models"]]
    charts = [
        ("Time to first token", latency_chart(series, "ttft", "Time to first token")),
        ("Time per further token", latency_chart(series, "tpot", "Time per further token")),
        ("Output tokens per second", throughput_chart(series, "output_throughput", "Output tokens per second")),
    ]
    if any(_median(point, "request_goodput") is not None for one in series for point in one.points):
        charts.append(("Goodput", throughput_chart(series, "request_goodput", "Good requests per second")))
    return {
        "series": [(one.name, one.css) for one in series],
        "charts": [(title, drawn) for title, drawn in charts if drawn],
        "saturated": any(point["saturated"] and point["rate"] for one in series for point in one.points),
        "table": load_table(series),
        "servers": server_table(series, models),
        "failures": [(m["failure"]["reason"], m["failure"].get("lines") or []) for m in models if m["failure"]],
        "notes": [note for run in runs for note in run.get("notes") or []],
        "methods": [(run["name"], method_facts(run), run.get("commands") or []) for run in runs],
        "no_gpu": all(run.get("machine") and not run["machine"].get("gpus") for run in runs),
        "one_round": any(run.get("repeats", 1) == 1 for run in runs),
    }


def all_series(runs: Sequence[Run]) -> list[Series]:
    """Every model, named after its run too where several have one of that name."""
    names = [(run["name"], str(model["model"])) for run in runs for model in run["models"]]
    only = [model for _, model in names]
    points = [model["points"] for run in runs for model in run["models"]]
    return [
        Series(model if only.count(model) == 1 else f"{model} ({run})", f"s{number % COLOURS}", found)
        for number, ((run, model), found) in enumerate(zip(names, points, strict=True))
    ]


def _median(point: Mapping[str, Any], name: str) -> float | None:
    found = point["figures"].get(name)
    return None if found is None else float(found["median"])


def _marks(series: Series, name: str, keeps_up: bool) -> list[Mark]:
    """The points of a figure by rate. keeps_up: leave out those of rates that the server did not keep up with."""
    marks = []
    for point in series.points:
        found = point["figures"].get(name)
        if found is not None and point["rate"] is not None and not (keeps_up and point["saturated"]):
            marks.append(Mark(point["rate"], found["median"], found["least"], found["greatest"]))
    return sorted(marks, key=lambda mark: mark.x)


def latency_chart(series: Sequence[Series], metric: str, label: str) -> Picture | None:
    """Median (solid) and 99th percentile (dashed) against the rate; a cross at the top where a rate is saturated."""
    lines = []
    for one in series:
        for p, dashed in ((50, False), (99, True)):
            name = f"{one.name}, p{p}"
            crosses = [] if dashed else sorted(q["rate"] for q in one.points if q["saturated"] and q["rate"])
            lines.append(Line(name, one.css, _marks(one, f"p{p}_{metric}_ms", True), dashed, crosses))
    if not any(line.marks or line.crosses for line in lines):
        return None
    return line_picture(lines, label, milliseconds, f"{metric}_ms")


def throughput_chart(series: Sequence[Series], name: str, label: str) -> Picture | None:
    """A throughput against the rate that was asked; a dotted level is what all requests at once reach."""
    lines = []
    for one in series:
        levels = [value for q in one.points if q["rate"] is None and (value := _median(q, name)) is not None]
        lines.append(Line(one.name, one.css, _marks(one, name, False), False, [], levels[:1]))
    if not any(line.marks or line.levels for line in lines):
        return None
    return line_picture(lines, label, "{:.3g}".format, name)


def line_picture(lines: Sequence[Line], label: str, write: Callable[[float], str], unit: str) -> Picture:
    """Lines over the rate that was asked. unit: of the values, as the JSON calls them"""
    rows: list[list[Any]] = []
    for line in lines:
        rows += [[line.name, mark.x, mark.y, mark.least, mark.greatest, ""] for mark in line.marks]
        rows += [[line.name, rate, None, None, None, "saturated"] for rate in line.crosses]
        rows += [[line.name, None, level, None, None, "all at once"] for level in line.levels]
    head = ["series", "requests per second asked", unit, "least", "greatest", "note"]
    draw = partial(line_chart, lines, label=f"{label} against the rate of requests", write=write)
    return picture(draw, f"load-{unit}", head, rows, HALF)


def milliseconds(value: float) -> str:
    """`12.3 ms`, `1.23 s`; `0` for nothing, as axes begin."""
    return units.duration(value / 1e3) if value else "0"


def load_table(series: Sequence[Series]) -> Table:
    """A row for each model and rate. A saturated one has no latencies: they grow with the number of requests."""
    goodput = any(_median(point, "request_goodput") is not None for one in series for point in one.points)
    head = [
        "model",
        "asked",
        "faster",
        "first token p50",
        "p99",
        "per token p50",
        "p99",
        "request p50",
        "p99",
        "tokens/s",
        "requests/s",
    ]
    head += ["KV cache"] + (["good/s"] if goodput else [])
    rows: list[list[str | Cell]] = []
    for one in series:
        for point in one.points:
            ratios = point.get("ratios") or {}
            ratio = ratios.get("e2el", ratios.get("throughput"))
            row: list[str | Cell] = [one.name, _asked(point), units.ratio(ratio)]
            for metric in ("ttft", "tpot", "e2el"):
                for p in (50, 99):
                    found = point["figures"].get(f"p{p}_{metric}_ms")
                    row.append(
                        ("saturated" if point["rate"] else "–") if point["saturated"] else _cell(found, milliseconds)
                    )
            row += [
                _cell(point["figures"].get(name), "{:.3g}".format)
                for name in ("output_throughput", "request_throughput")
            ]
            row.append(_cell(point["server"].get("kv_cache_usage"), lambda share: units.percent(share, 0)))
            rows.append([*row, _cell(point["figures"].get("request_goodput"), "{:.3g}".format)] if goodput else row)
    return Table(head, rows)


def _asked(point: Mapping[str, Any]) -> str | Cell:
    """The rate that was asked, with its share of the capacity."""
    if point.get("asked"):
        return str(point["asked"])
    if point["rate"] is None:
        return "all at once"
    share = point["load"]
    return Cell(f"{point['rate']:.3g}/s", sub="" if share is None else f"{share:.0%}")


def _cell(found: Mapping[str, Any] | None, write: Any) -> str | Cell:
    """The median, and from least to greatest where it was measured several times."""
    if found is None:
        return "–"
    low, high = write(found["least"]), write(found["greatest"])
    return Cell(write(found["median"]), sub=f"{low} to {high}" if low != high else "")


def server_table(series: Sequence[Series], models: Sequence[Mapping[str, Any]]) -> Table | None:
    """What starting the servers took; None where nobody measured it."""
    rows: list[list[str | Cell]] = []
    for one, model in zip(series, models, strict=True):
        if model["server"]:
            cells = [_cell(model["server"].get(name), write) for _, name, write in STARTING]
            rows.append([one.name, units.size(model["nbytes"]), *cells])
    return Table(["model", "size", *(title for title, _, _ in STARTING)], rows) if rows else None


def method_facts(run: Run) -> Facts:
    """Requests, machine, versions and environment of a run."""
    facts: Facts = []
    if asked := run.get("settings"):
        amount = f"{asked['dataset']}, {asked['requests']} requests at each rate, which arrive at random (Poisson)"
        facts.append(("requests", [amount]))
    if run.get("source"):
        facts.append(("measured by", [str(run["source"])]))
    facts.append(("rounds", [f"{run['repeats']}, interleaved" if run["repeats"] > 1 else "one"]))
    if capacity := run.get("capacity"):
        facts.append(
            ("capacity", [f"{capacity['requests_per_second']:.3g} requests per second, of {capacity['model']}"])
        )
    if goodput := run.get("goodput"):
        facts.append(("good requests", [", ".join(f"{name} within {limit:g} ms" for name, limit in goodput.items())]))
    if machine := run.get("machine"):
        gpus = ", ".join(machine.get("gpus") or []) or "none"
        facts += [
            ("machine", [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"]),
            ("GPUs", [gpus]),
        ]
    if versions := run.get("versions"):
        facts.append(("versions", [", ".join(f"{name} {number}" for name, number in versions.items())]))
    if environment := run.get("environment"):
        facts.append(("environment", [Cell(f"{name}={value}", code=True) for name, value in environment.items()]))
    return facts
