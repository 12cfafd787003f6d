"""GuideLLM's benchmarks.json as a run of `sparsify bench serve`, to be drawn in the same pictures.

The schema is that of GuideLLM 0.8 (guidellm.benchmark.schemas.report.GenerativeBenchmarksReport, version 2 of its metadata): one
entry in `benchmarks` for each rate, with `config.strategy` and the distributions of `metrics`, of which those of successful
requests are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.bench.under_load.result import keeps_up, spread
from sparsify.bench.under_load.workload import PERCENTILES
from sparsify.errors import CheckpointError
from sparsify.files import read_json

# Our name of a time in milliseconds, GuideLLM's name, and the factor. Its inter_token_latency_ms leaves out the first token, as
# vLLM's tpot does; its time_per_output_token_ms includes it.
TIMES = (
    ("ttft", "time_to_first_token_ms", 1.0),
    ("tpot", "inter_token_latency_ms", 1.0),
    ("e2el", "request_latency", 1000.0),  # seconds
)
RATES = (
    ("request_throughput", "requests_per_second"),
    ("output_throughput", "output_tokens_per_second"),
    ("total_token_throughput", "tokens_per_second"),
    ("request_goodput", "request_goodput"),
)


def read_guidellm(path: str | Path) -> dict[str, Any]:
    """A run with one model. CheckpointError where the file is not as GuideLLM writes it."""
    found = read_json(path)
    try:
        benchmarks = found["benchmarks"]
        points = [_point(benchmark) for benchmark in benchmarks]
        first = benchmarks[0]["config"]
        model = str((first.get("backend") or {}).get("model") or Path(path).stem)
        version = (found.get("metadata") or {}).get("guidellm_version")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no benchmarks.json as GuideLLM 0.8 writes it ({type(error).__name__}: {str(error)[:100]}); give the JSON "
            "of `guidellm benchmark`"
        ) from None
    failed = [reason for point in points for reason in point["notes"]]
    return {
        "source": "GuideLLM",
        "models": [{"model": model, "points": points, "server": {}, "failure": None}],
        "notes": [f"{model}: {reason}" for reason in failed],
        "versions": {"guidellm": str(version)} if version else {},
        "goodput": {},
        "repeats": 1,
    }


def _point(benchmark: Mapping[str, Any]) -> dict[str, Any]:
    """One rate. Where a fixed number of requests is under way at any time, the rate is the one that was reached."""
    metrics, strategy = benchmark["metrics"], benchmark["config"]["strategy"]
    kind = str(strategy["type_"])
    figures = {
        f"p{p}_{name}_ms": _one(_of(metrics, theirs, f"p{p}"), factor)
        for name, theirs, factor in TIMES
        for p in PERCENTILES
    }
    figures |= {name: _one(_of(metrics, theirs, "mean"), 1.0) for name, theirs in RATES}
    completed = figures["request_throughput"]
    reached = completed["median"] if completed else 0.0
    rate = {"throughput": None, "constant": strategy.get("rate"), "poisson": strategy.get("rate")}.get(kind, reached)
    closed = {"synchronous": "one at a time", "concurrent": f"{strategy.get('streams', 'several')} at a time"}
    return {
        "load": None,
        "rate": None if rate is None else float(rate),
        "asked": closed.get(kind),
        "repeats": 1,
        "completion_rate": completed,
        "saturated": rate is None or not keeps_up(reached, float(rate)),
        "figures": figures,
        "server": {},
        "notes": _failed(metrics["request_totals"], kind, rate),
    }


def _of(metrics: Mapping[str, Any], name: str, which: str) -> float | None:
    """Mean or percentile of a metric over successful requests; None where there were none, or no such metric."""
    found = (metrics.get(name) or {}).get("successful")
    if not found:
        return None
    value = found["mean"] if which == "mean" else found["percentiles"][which]
    return None if value is None else float(value)


def _one(value: float | None, factor: float) -> dict[str, Any] | None:
    return spread([None if value is None else value * factor])


def _failed(totals: Mapping[str, Any], kind: str, rate: float | None) -> list[str]:
    errored = totals.get("errored") or 0
    if not errored:
        return []
    asked = f"{float(rate):.3g} per second" if rate is not None else kind
    return [f"{errored} of {totals.get('total', 'the')} requests failed at {asked}; figures are of the others"]
