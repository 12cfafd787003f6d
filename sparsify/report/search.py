"""What `sparsify search` measured: how sensitive every group of linears is, and what each became."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sparsify.report.figures import heat_edges, kind_of, short_kinds
from sparsify.report.parts import Table, picture
from sparsify.report.svg import Drawing, clip, every, gutter, heat_colour, heat_legend

ROW, AXIS, LEGEND = 24, 22, 52
COLOURS = 7  # of the ramp h0 to h6


def search(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Context of search.html.j2; None without a search. found: search.json"""
    if not found or not found["units"]:
        return None
    units = found["units"]
    own = found["recipe_as_given"]["choices"]
    values = {unit["name"]: float(unit["choices"][own[unit["name"]]]["kl"]) for unit in units}
    points = found["found"]
    return {
        "usual": " and ".join(sorted({told(choice) for choice in own.values()})),
        "sensitivity": picture(
            lambda w: divergence_map(units, values, w),
            "sensitivity",
            ["group", "block", "choice", "KL", "bytes"],
            [
                [unit["name"], unit["block"], name, entry["kl"], entry["bytes"]]
                for unit in units
                for name, entry in unit["choices"].items()
            ],
        ),
        "chosen": [
            (
                point["for"],
                picture(
                    partial(choice_map, units, point["choices"]),
                    f"chosen-for-{point['for']}",
                    ["group", "choice"],
                    [*point["choices"].items()],
                ),
            )
            for point in points
        ],
        "table": point_table(found["recipe_as_given"], points),
        "held_out": found["held_out"],
    }


def told(choice: str) -> str:
    """`2:4-4` is `2:4, 4 bits`; `2:4-4-128` has `, groups of 128` besides."""
    pattern, bits, *group = choice.split("-")
    shared = [", one scale per channel" if size == "channel" else f", groups of {size}" for size in group]
    return f"{pattern}, {bits} bits{''.join(shared)}"


def by_bytes(units: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all choices that were measured, by the bytes that they take per weight."""
    bits: dict[str, float] = {}
    for unit in units:
        for name, entry in unit["choices"].items():
            bits[name] = max(bits.get(name, 0.0), entry["bytes"] / unit["weights"])
    return sorted(bits, key=bits.__getitem__)


def nats(value: float) -> str:
    """A divergence with two significant digits."""
    return f"{value:.2g}"


def divergence_map(units: Sequence[Mapping[str, Any]], values: Mapping[str, float], width: float) -> str:
    """KL of every unit: one column per block, one row per kind. values: by the name of the unit"""
    edges = heat_edges([*values.values()])
    positive = [value for value in values.values() if value > 0] or [0.0]
    label = (
        f"Heat map of the KL divergence of {len(values)} groups of linears, each compressed alone, "
        f"from {nats(min(positive))} to {nats(max(positive))} nats per token"
    )

    def cell(unit: Mapping[str, Any]) -> tuple[str, str]:
        told_all = ", ".join(f"{told(name)}: {nats(entry['kl'])}" for name, entry in unit["choices"].items())
        return heat_colour(values[unit["name"]], edges), told_all

    drawing, left, bottom = block_grid(units, cell, width, label)
    heat_legend(drawing, edges, left, bottom + AXIS + 10, min(width - left, 460), "KL up to", nats)
    return drawing.render()


def choice_map(units: Sequence[Mapping[str, Any]], chosen: Mapping[str, str], width: float) -> str:
    """What every unit became. chosen: name of the choice by name of the unit"""
    order = by_bytes(units)
    names = [name for name in order if name in set(chosen.values())]
    step = min(1, COLOURS / len(order))
    colours = {name: f"h{int(order.index(name) * step)}" for name in names}
    label = "What each group of linears became: " + "; ".join(
        f"{sum(choice == name for choice in chosen.values())} {told(name)}" for name in names
    )

    def cell(unit: Mapping[str, Any]) -> tuple[str, str]:
        return colours[chosen[unit["name"]]], told(chosen[unit["name"]])

    drawing, left, bottom = block_grid(units, cell, width, label)
    room = (width - left) / max(len(names), 1)
    for number, name in enumerate(names):
        x, y = left + number * room, bottom + AXIS + 10
        drawing.rect(x, y, min(room - 4, 70), 10, colours[name], told(name), radius=2)
        drawing.text(x, y + 25, told(name) if room > 90 else name, "tick")
    return drawing.render()


def block_grid(
    units: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], tuple[str, str]], width: float, label: str
) -> tuple[Drawing, float, float]:
    """A cell for every unit, blocks from left to right, kinds from top to bottom, with room for a legend below.

    cell: its class and its title. Returns the drawing, where the cells begin and where they end.
    """
    kinds = short_kinds(kind_of(unit["name"], unit["block"]) for unit in units)
    blocks = sorted({unit["block"] for unit in units})
    left = gutter([*kinds.values()], width * 0.34)
    room = (width - left) / len(blocks)
    gap = 2 if room > 8 else min(1, room / 5)
    drawing = Drawing(width, len(kinds) * ROW + AXIS + LEGEND, label)
    rows, columns = ({value: number for number, value in enumerate(values)} for values in (kinds, blocks))
    for kind, number in rows.items():
        drawing.text(left - 10, number * ROW + 16, clip(kinds[kind], left), "label", "end")
    for unit in units:
        kind = kind_of(unit["name"], unit["block"])
        css, title = cell(unit)
        x, y = left + columns[unit["block"]] * room, rows[kind] * ROW + 1
        title = f"block {unit['block']}, {kinds[kind]}: {title}"
        drawing.rect(x, y, room - gap, ROW - 2, f"cell {css}", title, radius=min(4, room / 4))
    bottom = len(kinds) * ROW
    for block, number in columns.items():
        if number % every(len(blocks), width - left) == 0:
            drawing.text(left + (number + 0.5) * room - gap / 2, bottom + 15, str(block), "tick", "middle")
    drawing.text(left - 10, bottom + 15, "block", "tick", "end")
    return drawing, left, bottom


def point_table(own: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Table:
    """One row per selection, the recipe as it was given first."""
    head = ["selection", "bits per weight", "size", "predicted KL", "measured KL", "perplexity"]
    rows = []
    for label, point in [("the recipe as it was given", own), *((point["for"], point) for point in points)]:
        measured = point.get("verified") or {}
        rows.append(
            [
                label, f"{point['bits']:.2f}", f"{point['bytes'] / 1e6:.1f} MB", f"{point['predicted_kl']:.3f}",
                f"{measured['kl']:.3f}" if measured else "–", f"{measured['perplexity']:.2f}" if measured else "–",
            ]
        )  # fmt: skip
    return Table(head, rows)
