"""Medians with their spread over the repeats, what is saturated, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify import units
from sparsify.bench.under_load.workload import PERCENTILES

# vLLM's names. Times in milliseconds: to the first token, per further token of a request (tpot), between two tokens (itl),
# of a whole request (e2el).
LATENCIES = tuple(f"p{p}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el") for p in PERCENTILES)
THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")
# Below this share of the rate at which requests arrive, their number in the server grows for as long as they come.
KEEPS_UP = 0.9
SATURATED = "saturated"
STARTS = ("cold_start_seconds", "cold_compile_seconds", "warm_start_seconds", "warm_compile_seconds")


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Median, least and greatest of what was measured, and every value; None where nothing was."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return {"median": median(known), "least": min(known), "greatest": max(known), "values": known}


def keeps_up(reached: float, rate: float) -> bool:
    """Whether a server that ends `reached` requests per second keeps up with `rate`."""
    return reached >= KEEPS_UP * rate


def point(load: float | None, measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rate of one model over its repeats. load: as a share of the capacity, where it was given so; inf as None.

    saturated: the server did not keep up, so latencies grow with the number of requests and mean nothing by themselves. A
    server that gets all requests at once cannot keep up.
    """
    rate = measurements[0]["rate"]
    completed = spread([m["completion_rate"] for m in measurements])
    assert completed is not None
    names = (*LATENCIES, *THROUGHPUTS)
    return {
        "load": load,
        "rate": rate,
        "repeats": len(measurements),
        "completion_rate": completed,
        "saturated": rate is None or not keeps_up(completed["median"], rate),
        "figures": {name: spread([m["vllm"].get(name) for m in measurements]) for name in names},
        "server": {
            name: spread([m["server"].get(name) for m in measurements])
            for name in ("kv_cache_usage", "requests_running", "requests_waiting")
        },
    }


def add_ratios(models: Sequence[dict[str, Any]]) -> None:
    """Gives every point its `ratios` to the first model at the same rate: how many times faster, medians of medians.

    Latencies only where both models keep up with the rate; `throughput` is that of output tokens.
    """
    first = {(found["load"], found["rate"]): found for found in models[0]["points"]}
    for model in models:
        for found in model["points"]:
            base = first.get((found["load"], found["rate"]))
            found["ratios"] = ratios(found, base) if base else {}


def ratios(mine: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Of two points of the same rate; more than 1 is better."""

    def value(which: Mapping[str, Any], name: str) -> float:
        found = which["figures"][name]
        return found["median"] if found else 0.0

    found = {}
    if base_rate := value(base, "output_throughput"):
        found["throughput"] = value(mine, "output_throughput") / base_rate
    if not mine["saturated"] and not base["saturated"]:
        for metric in ("ttft", "tpot", "e2el"):
            if time := value(mine, f"p50_{metric}_ms"):
                found[metric] = value(base, f"p50_{metric}_ms") / time
    return found


def servers(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What starting took and the memory, over all starts of one model's server."""
    names = list(dict.fromkeys(name for one in facts for name in one))
    return {name: spread([one.get(name) for one in facts]) for name in names}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Latency and throughput by rate, what starting a server took, and cold and warm starts where they were measured."""
    starts = any(model["server"].get("cold_start_seconds") for model in result["models"])
    return [load_table(result), server_table(result), *([startup_table(result)] if starts else [])]


def load_table(result: Mapping[str, Any]) -> Table:
    """A row for each model and rate; a rate that the server did not keep up with has no latencies."""
    view = Table(
        title="Servers under load", caption=escape(_caption(result)), title_justify="left", caption_justify="left"
    )
    view.add_column("model", overflow="fold")
    heads = ["asked", "faster", "first token", "per token", "request", "tokens/s", "requests/s", "KV cache"]
    heads += ["good/s"] if result["goodput"] else []
    for head in heads:
        view.add_column(head, justify="right", no_wrap=True)
    for model in result["models"]:
        for row in model["points"]:
            view.add_row(model["model"], *_cells(row, bool(result["goodput"])))
        if model["failure"]:
            view.add_row(model["model"], Text(model["failure"]["short"], "yellow"))
    return view


def _cells(row: Mapping[str, Any], with_goodput: bool) -> list[Text]:
    figures, saturated = row["figures"], row["saturated"]
    asked = "all at once" if row["rate"] is None else f"{row['rate']:.3g}/s"
    share = f"{row['load']:.0%}" if row["load"] is not None else SATURATED if saturated and row["rate"] else ""
    ratio = row["ratios"].get("e2el", row["ratios"].get("throughput"))
    cells = [_two(asked, share), Text("–" if ratio is None else f"{ratio:.2f}x", "bold")]
    for metric in ("ttft", "tpot", "e2el"):
        fast, slow = (figures[f"p{p}_{metric}_ms"] for p in (50, 99))
        if saturated or not fast:
            cells.append(Text(SATURATED if row["rate"] else "–", "yellow" if row["rate"] else ""))
        else:
            cells.append(_two(milliseconds(fast["median"]), f"p99 {milliseconds(slow['median'])}"))
    cells.append(_with_spread(figures["output_throughput"]))
    cells.append(_with_spread(figures["request_throughput"]))
    usage = row["server"]["kv_cache_usage"]
    cells.append(Text("–" if usage is None else units.percent(usage["median"], 0)))
    return [*cells, _with_spread(figures["request_goodput"])] if with_goodput else cells


def _two(first: str, below: str) -> Text:
    text = Text(first, "bold")
    return text.append(f"\n{below}", "dim") if below else text


def _with_spread(found: Mapping[str, Any] | None) -> Text:
    if found is None:
        return Text("–")
    several = len(found["values"]) > 1
    return _two(f"{found['median']:.3g}", f"{found['least']:.3g}–{found['greatest']:.3g}" if several else "")


def milliseconds(value: float) -> str:
    """`12.3 ms`, `1.23 s`"""
    return units.duration(value / 1e3)


# What starting a server took: title, name in the JSON, how it is written. Of the seconds until it answers compiling is a part.
STARTING: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("ready after", "start_seconds", units.span),
    ("compiling", "compile_seconds", units.span),
    ("memory", "memory_bytes", units.size),
    ("KV cache", "kv_cache_tokens", lambda tokens: f"{units.count(tokens)} tokens"),
)


def server_table(result: Mapping[str, Any]) -> Table:
    """What starting each model's server took, medians over the starts."""
    view = Table(title="Starting them", title_justify="left")
    view.add_column("model", overflow="fold")
    for head in ("size", *(title for title, _, _ in STARTING)):
        view.add_column(head, justify="right", no_wrap=True)
    for model in result["models"]:
        view.add_row(f"{model['model']}", units.size(model["nbytes"]), *server_cells(model["server"]))
    return view


def server_cells(facts: Mapping[str, Any]) -> list[str]:
    """A cell for each of STARTING; a dash for what was not measured."""
    return [write(facts[name]["median"]) if facts.get(name) else "–" for _, name, write in STARTING]


def startup_table(result: Mapping[str, Any]) -> Table:
    """Seconds of an engine's cold and warm starts and of their compiling, medians."""
    view = Table(title="Cold and warm starts (vllm bench startup)", title_justify="left")
    view.add_column("model", overflow="fold")
    for head in ("cold start", "of it compiling", "warm start", "of it compiling"):
        view.add_column(head, justify="right", no_wrap=True)
    for model in result["models"]:
        found = [model["server"].get(name) for name in STARTS]
        view.add_row(model["model"], *(units.span(one["median"]) if one else "–" for one in found))
    return view


def _caption(result: Mapping[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    parts = [f"{settings['dataset']}, {settings['requests']} requests a rate, arriving at random (Poisson)"]
    parts.append(f"medians of {result['repeats']} interleaved rounds" if result["repeats"] > 1 else "one round")
    parts.append(
        f"faster: than {result['models'][0]['model']} at that rate, in requests or, where one is saturated, in tokens/s"
    )
    if capacity := result["capacity"]:
        parts.append(f"shares of {capacity['requests_per_second']:.3g}/s, the capacity of {capacity['model']}")
    if goodput := result["goodput"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput.items())
        parts.append(f"good: {limits}")
    parts.append(f"{machine['cpu']}, {machine['cores']} cores")
    reasons = [model["failure"]["reason"] for model in result["models"] if model["failure"]]
    return "\n".join(["; ".join(parts), *reasons])
