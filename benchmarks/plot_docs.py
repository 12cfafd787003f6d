"""Draws the pictures of docs/images, of which the README shows speed.svg, from the records in benchmarks/results.

python benchmarks/plot_docs.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.report.svg import Bar, Drawing, bars, nice_ticks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
SHAPE = (8192, 28672)

Curves = dict[str, dict[int, float]]
"""Name of a curve -> number below (tokens, or blocks) -> value."""


class Axes(NamedTuple):
    """What a chart shows. below: of the numbers below; what: of the whole, for who cannot see it; unit: behind a value; tick: the same
    beside the axis; one: a line at 1"""

    below: str
    what: str
    unit: str
    tick: str = ""
    one: bool = False
    count: Callable[[int], str] = str


SPEED = Axes("tokens multiplied at once", "Times faster than the dense product, by tokens", "x", "x", one=True)
TOKENS = Axes("calibration tokens", "Memory by calibration tokens", " GB", count=lambda count: f"{count // 1024}k")
BLOCKS = Axes("blocks", "Memory by blocks", " GB")

PANEL, HEIGHT, GAP = 440, 300, 34
LEFT, TOP, BOTTOM = 40, 58, 40
NAME = {"sparsify CUDA": "sparsify", "Sparse-Marlin": "Sparse-Marlin", "MARLIN": "MARLIN (dense 4-bit)"}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a }
.title { font-weight: 600; fill: #24292f } .value { font-weight: 600 } .aside { font-weight: 400 }
.grid { stroke: #d0d7de } .one { stroke: #57606a; stroke-dasharray: 4 3 }
path { fill: none; stroke-width: 2.5 }
path.c0 { stroke: #0969da } path.c1 { stroke: #bf5700 } path.c2 { stroke: #8250df }
path.c3 { stroke: #1a7f37 } circle.c3, text.c3 { fill: #1a7f37 }
rect.ours { fill: #0969da } rect.peer { fill: #8c959f } rect.track { fill: #eaeef2 }
circle.c0, text.c0 { fill: #0969da } circle.c1, text.c1 { fill: #bf5700 } circle.c2, text.c2 { fill: #8250df }
@media (prefers-color-scheme: dark) {
rect.ours { fill: #58a6ff } rect.peer { fill: #656c76 } rect.track { fill: #21262d } .value { fill: #f0f6fc }
text { fill: #9198a1 } .title { fill: #f0f6fc } .grid { stroke: #3d444d } .one { stroke: #9198a1 }
path.c0 { stroke: #58a6ff } path.c1 { stroke: #f0883e } path.c2 { stroke: #bc8cff }
path.c3 { stroke: #3fb950 } circle.c3, text.c3 { fill: #3fb950 }
circle.c0, text.c0 { fill: #58a6ff } circle.c1, text.c1 { fill: #f0883e } circle.c2, text.c2 { fill: #bc8cff }
}"""


def record(name: str) -> dict[str, Any]:
    """One file of benchmarks/results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def h100() -> Curves:
    """One linear on an H100 against torch's dense bf16."""
    rows = [row for row in record("2026-11-22-h100-linears")["rows"] if (row["n"], row["k"]) == SHAPE]
    return {NAME[kind]: {row["tokens"]: row["times_faster_than_torch_bf16"][kind] for row in rows} for kind in NAME}


def cpu() -> Curves:
    """One linear on a CPU held to AVX2 against torch's dense float32, the fastest dense product there."""
    plain, int8 = (record(f"2026-11-28-kernels-avx2{kind}")["rows"] for kind in ("", "-int8"))
    dense = {row["m"]: row["ratios"]["torch fp32"] for row in plain}
    peer = {row["m"]: dense[row["m"]] / row["ratios"]["llama.cpp Q4_1"] for row in plain}
    return {
        "sparsify": dense,
        "sparsify, int8": {row["m"]: row["ratios"]["torch fp32"] for row in int8},
        "llama.cpp Q4_1": peer,
    }


def shapes() -> Curves:
    """Our CUDA kernel on an H100 by shape."""
    found: Curves = {}
    for row in record("2026-11-22-h100-linears")["rows"]:
        name = f"{row['n']} x {row['k']}"
        found.setdefault(name, {})[row["tokens"]] = row["times_faster_than_torch_bf16"]["sparsify CUDA"]
    return found


def memory() -> list[Bar]:
    """One token on a CPU held to AVX2: what each contestant reads per second, as a share of what the machine reads at most."""
    found = record("2026-11-28-kernels-avx2")
    (row,) = [row for row in found["rows"] if row["m"] == 1]
    own = row["timings"][0]
    peak = own["bandwidth"] / row["bandwidth_share"]
    entries = []
    for timing in row["timings"]:
        css = "ours" if timing is own else "peer"
        aside = f"{timing['nbytes'] / 1e6:.0f} MB of weights"
        entries.append(named_bar(timing["contestant"], timing["bandwidth"] / peak, css, aside))
    return entries


def integers() -> list[Bar]:
    """128 tokens on a CPU held to AVX2: operations per second as a share of the peak of its float32 products."""
    plain, int8 = (record(f"2026-11-28-kernels-avx2{kind}") for kind in ("", "-int8"))
    entries = []
    for name, found in (("sparsify, int8", int8), ("sparsify", plain)):
        (row,) = [row for row in found["rows"] if row["m"] == 128]
        entries.append(named_bar(name, row["arithmetic_share"], "ours"))
    peak = plain["peaks"]["float32"]
    entries += [named_bar(t["contestant"], t["arithmetic"] / peak, "peer") for t in row["timings"][1:]]
    return entries


def peaks(below: str) -> Curves:
    """Peaks of anonymous memory on a small shape, in GB, by `tokens` or `blocks`, without and with `--memory 1.2GB`."""
    found: Curves = {}
    for row in record("2026-11-30-memory-small")["rows"]:
        if row["varies"] == below:
            name, guess = ("1.2 GB", "its prediction") if row["memory"] else ("no budget", "predicted")
            found.setdefault(name, {})[row[below]] = row["peak_bytes"] / 1e9
            found.setdefault(guess, {})[row[below]] = row["predicted_bytes"] / 1e9
    return found


def named_bar(name: str, share: float, css: str, aside: str = "") -> Bar:
    return Bar(name, share, f"{share:.0%}", css, aside)


def panel(drawing: Drawing, left: float, title: str, curves: Curves, axes: Axes) -> None:
    """One chart: tokens or blocks to the right by doubling, values upward."""
    tokens = sorted({count for curve in curves.values() for count in curve})
    ticks = nice_ticks(max(value for curve in curves.values() for value in curve.values()))
    x0, width, height = left + LEFT, PANEL - LEFT - 12, HEIGHT - TOP - BOTTOM

    def at(count: int, value: float) -> tuple[float, float]:
        share = math.log2(count / tokens[0]) / math.log2(tokens[-1] / tokens[0])
        return x0 + 10 + share * (width - 20), TOP + (1 - value / ticks[-1]) * height

    drawing.text(left, 16, title, "title")
    for tick in ticks:
        drawing.line(x0, at(tokens[0], tick)[1], x0 + width, at(tokens[0], tick)[1], "grid")
        drawing.text(x0 - 8, at(tokens[0], tick)[1] + 4, f"{tick:g}{axes.tick}", "tick", "end")
    if axes.one:
        drawing.line(x0, at(tokens[0], 1)[1], x0 + width, at(tokens[0], 1)[1], "one")
    for count in tokens:
        drawing.text(at(count, 0)[0], HEIGHT - BOTTOM + 18, axes.count(count), "tick", "middle")
    drawing.text(x0 + width, HEIGHT - 4, axes.below, "tick", "end")
    place = left
    for number, (name, curve) in enumerate(curves.items()):
        drawing.circle(place + 5, 33, 4.5, f"c{number}")
        drawing.text(place + 15, 37, name, f"c{number}")
        place += 34 + 7 * len(name)
        drawing.path([at(*point) for point in sorted(curve.items())], f"c{number}")
        for count, value in sorted(curve.items()):
            drawing.circle(
                *at(count, value), 3.5, f"c{number}", f"{name}, {count} {axes.below}: {value:.3g}{axes.unit}"
            )


def charts(panels: Mapping[str, tuple[Curves, Axes]]) -> str:
    """Charts side by side."""
    label = "; ".join(f"{axes.what}: {title}" for title, (_, axes) in panels.items())
    drawing = Drawing(len(panels) * PANEL + (len(panels) - 1) * GAP, HEIGHT, label)
    for number, (title, (curves, axes)) in enumerate(panels.items()):
        panel(drawing, number * (PANEL + GAP), title, curves, axes)
    return drawing.render()


def alone(svg: str) -> str:
    """A picture as a file of its own: the colours and both colour schemes are inside."""
    style = f"<style>{escape(STYLE, quote=False)}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {svg.removeprefix("<svg ").replace(">", f">{style}", 1)}\n'


def pictures() -> dict[str, str]:
    """Every picture by the name of its file."""
    n, k = SHAPE
    speed = {
        f"H100, {n} x {k}, against dense bf16": (h100(), SPEED),
        "CPU (AVX2), 28672 x 8192, against dense fp32": (cpu(), SPEED),
    }
    walk = {
        "Peak in GB, two blocks": (peaks("tokens"), TOKENS),
        "Peak in GB, 8k tokens": (peaks("blocks"), BLOCKS),
    }
    return {
        "walk-memory.svg": charts(walk),
        "speed.svg": charts(speed),
        "h100-shapes.svg": charts({"The CUDA kernel on an H100, against dense bf16": (shapes(), SPEED)}),
        "memory.svg": bars(memory(), PANEL * 1.6, "Share of the memory's speed, one token, AVX2", full=1),
        "integers.svg": bars(integers(), PANEL * 1.6, "Share of the fp32 peak, 128 tokens, AVX2"),
    }


def main() -> None:
    for name, svg in pictures().items():
        (IMAGES / name).write_text(alone(svg), encoding="utf-8")
        print((IMAGES / name).relative_to(ROOT))


if __name__ == "__main__":
    main()
