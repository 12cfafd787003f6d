"""Pictures of the report, drawn as inline SVG. Colours are classes of style.css, so that both colour schemes work.

Every picture is drawn for one width in pixels and never scaled: text keeps its size. The page holds each one twice,
for a desk and for a phone, and style.css shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from sparsify import units
from sparsify.report.figures import Layer, errors_by_block, heat_edges, heat_step, short_kinds

WIDE, NARROW = 914, 330
# Widest usual mean width of a character of 12 px type: nobody measures text before the page is shown.
CHARACTER, BOLD_CHARACTER = 7.0, 8.2


class Drawing:
    """Collects SVG elements. All text is escaped here and nowhere else."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, css: str, title: str = "", radius: float = 0
    ) -> None:
        inner = f"<title>{escape(title)}</title>" if title else ""
        rounded = f' rx="{radius:g}"' if radius else ""
        self.parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}"{rounded} '
            f'class="{css}">{inner}</rect>'
        )

    def text(
        self, x: float, y: float, content: str, css: str = "label", anchor: str = "start", aside: str = ""
    ) -> None:
        more = f' <tspan class="aside" dx="4">{escape(aside)}</tspan>' if aside else ""
        self.parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" class="{css}">{escape(content)}{more}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self.parts.append(f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" class="{css}"/>')

    def path(self, points: Sequence[tuple[float, float]], css: str, close: bool = False) -> None:
        steps = " L".join(f"{x:.2f},{y:.2f}" for x, y in points)
        self.parts.append(f'<path d="M{steps}{" Z" if close else ""}" class="{css}"/>')

    def circle(self, x: float, y: float, radius: float, css: str, title: str = "") -> None:
        inner = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:g}" class="{css}">{inner}</circle>')

    def render(self) -> str:
        return (
            f'<svg width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'role="img" aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'
        )


def gutter(names: Sequence[str], limit: float) -> float:
    """Room for labels left of a picture."""
    return min(limit, max((len(name) for name in names), default=0) * CHARACTER + 12)


def clip(name: str, room: float) -> str:
    """Shortens a label to the room there is, at the front: the end distinguishes modules."""
    fits = max(int((room - 12) / BOLD_CHARACTER), 4)
    return name if len(name) * CHARACTER + 12 <= room else "…" + name[-(fits - 1) :]


def every(count: int, room: float) -> int:
    """Label every n-th of `count` columns so that labels do not touch: 1, 2, 5, 10, 20, ..."""
    step, factors = 1, (2, 2.5, 2)
    for i in range(12):
        if count / step * 26 <= room:
            break
        step = int(step * factors[i % 3])
    return step


def heat_map(layers: Sequence[Layer], width: float) -> str:
    """Relative error of every linear: one column per block, one row per kind."""
    measured = [layer for layer in layers if layer.relative_error is not None]
    blocks = sorted({layer.block for layer in layers})
    names = short_kinds(layer.kind for layer in layers)
    edges = heat_edges([layer.relative_error or 0 for layer in measured])
    left, row, axis, legend = gutter(list(names.values()), width * 0.34), 24, 22, 52
    cell = (width - left) / max(len(blocks), 1)
    gap = 2 if cell > 8 else min(1, cell / 5)
    label = (
        f"Heat map of the relative error of {len(measured)} linears: {len(names)} kinds in {len(blocks)} blocks, "
        f"from {units.error(min((x.relative_error or 0 for x in measured), default=None))} "
        f"to {units.error(max((x.relative_error or 0 for x in measured), default=None))}"
    )
    drawing = Drawing(width, len(names) * row + axis + legend, label)
    rows = {kind: i for i, kind in enumerate(names)}
    columns = {block: i for i, block in enumerate(blocks)}
    for kind, i in rows.items():
        drawing.text(left - 10, i * row + 16, clip(names[kind], left), "label", "end")
    for layer in layers:
        described = f"block {layer.block}, {names[layer.kind]}: error {units.error(layer.relative_error)}"
        if layer.sparsity is not None:
            described += f", {units.percent(layer.sparsity)} zeros"
        described += f", {layer.bits} bits\n{layer.module} {layer.shape[0]} × {layer.shape[1]}"
        step = "none" if layer.relative_error is None else heat_colour(layer.relative_error, edges)
        drawing.rect(
            left + columns[layer.block] * cell, rows[layer.kind] * row + 1, cell - gap, row - 2,
            f"cell {step}", described, radius=min(4, cell / 4),
        )  # fmt: skip
    bottom = len(names) * row
    stride = every(len(blocks), width - left)
    for block, i in columns.items():
        if i % stride == 0:
            drawing.text(left + (i + 0.5) * cell - gap / 2, bottom + 15, str(block), "tick", "middle")
    drawing.text(left - 10, bottom + 15, "block", "tick", "end")
    heat_legend(drawing, edges, left, bottom + axis + 10, min(width - left, 460))
    return drawing.render()


def heat_colour(value: float, edges: Sequence[float]) -> str:
    """The class of a value's colour."""
    return f"h{_colour(heat_step(value, edges), edges)}"


def _colour(step: int, edges: Sequence[float]) -> int:
    """Spreads fewer steps over the whole ramp, so that one single value is not drawn as the worst."""
    return step if len(edges) > 1 else 2


def heat_legend(
    drawing: Drawing,
    edges: Sequence[float],
    x: float,
    y: float,
    width: float,
    what: str = "error up to",
    written: Callable[[float], str] = units.error,
) -> None:
    """The colours of a heat map with their upper edges. what: stands before them; written: how an edge reads."""
    step = width / max(len(edges), 1)
    for i, edge in enumerate(edges):
        drawing.rect(x + i * step, y, step - 2, 10, f"h{_colour(i, edges)}", f"up to {written(edge)}", radius=2)
        # From the worst down, so that the end of the scale is labelled also where only every second label fits.
        if step > 44 or (len(edges) - 1 - i) % 2 == 0:
            drawing.text(x + (i + 1) * step - 2, y + 25, written(edge), "tick", "end")
    drawing.text(x - 10, y + 9, what, "tick", "end")


def depth_chart(layers: Sequence[Layer], width: float) -> str:
    """Mean relative error of a block by its depth, with the spread from the best to the worst linear."""
    blocks = errors_by_block(layers)
    left, top, bottom, height = 52, 12, 38, 220
    ceiling = max(greatest for *_, greatest in blocks)
    ticks = nice_ticks(ceiling)
    peak = ticks[-1] or 1.0
    first, last = blocks[0][0], blocks[-1][0]

    def at(block: int, value: float) -> tuple[float, float]:
        share = (block - first) / (last - first) if last > first else 0.5
        return left + 8 + share * (width - left - 20), top + (1 - value / peak) * (height - top - bottom)

    worst = max(blocks, key=lambda entry: entry[2])
    drawing = Drawing(
        width, height,
        f"Relative error by depth: the mean of a block is highest in block {worst[0]} with {units.error(worst[2])}",
    )  # fmt: skip
    for tick in ticks:
        y = at(first, tick)[1]
        drawing.line(left, y, width, y, "grid")
        drawing.text(left - 8, y + 4, units.error(tick), "tick", "end")
    drawing.path(
        [at(b, high) for b, _, _, high in blocks] + [at(b, low) for b, low, _, _ in reversed(blocks)], "band", True
    )
    drawing.path([at(b, middle) for b, _, middle, _ in blocks], "curve")
    for block, low, middle, high in blocks:
        described = f"block {block}: mean {units.error(middle)}, from {units.error(low)} to {units.error(high)}"
        drawing.circle(*at(block, middle), 3.5, "dot", described)
    stride = every(last - first + 1, width - left)
    for block, *_ in blocks:
        if (block - first) % stride == 0:
            drawing.text(at(block, 0)[0], height - bottom + 18, str(block), "tick", "middle")
    drawing.text(width, height - 4, "block", "tick", "end")
    return drawing.render()


def loss_curve(points: Sequence[tuple[int, float]], width: float, label: str) -> str:
    """The mean loss over the steps of a training; from 0 up, so that a drop looks as large as it is."""
    left, top, bottom, height = 52, 12, 38, 200
    ticks = nice_ticks(max(loss for _, loss in points))
    peak, first, last = ticks[-1] or 1.0, points[0][0], points[-1][0]

    def at(step: int, loss: float) -> tuple[float, float]:
        share = (step - first) / (last - first) if last > first else 0.5
        return left + 8 + share * (width - left - 20), top + (1 - loss / peak) * (height - top - bottom)

    drawing = Drawing(width, height, label)
    for tick in ticks:
        y = at(first, tick)[1]
        drawing.line(left, y, width, y, "grid")
        drawing.text(left - 8, y + 4, f"{tick:g}", "tick", "end")
    drawing.path([at(*point) for point in points], "curve")
    for point in (points[0], points[-1]):
        drawing.circle(*at(*point), 3.5, "dot", f"step {point[0]}: {point[1]:.4g}")
    drawing.text(at(first, 0)[0], height - bottom + 18, str(first), "tick", "middle")
    drawing.text(at(last, 0)[0], height - bottom + 18, str(last), "tick", "end")
    drawing.text(width, height - 4, "step", "tick", "end")
    return drawing.render()


def nice_ticks(ceiling: float, wanted: int = 4) -> list[float]:
    """0 and round steps (1, 2, 2.5, 5 times a power of ten) up to the first one that covers `ceiling`."""
    if ceiling <= 0:
        return [0.0, 1.0]
    rough = ceiling / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(ceiling / step - 1e-9) + 1)]


def stacked_bars(bars: Sequence[tuple[str, Mapping[str, int]]], width: float) -> str:
    """Bytes of each checkpoint by part."""
    parts = list(dict.fromkeys(name for _, stack in bars for name in stack))
    totals = [sum(stack.values()) for _, stack in bars]
    left = gutter([label for label, _ in bars], width * 0.3)
    room = width - left - max(len(units.size(total)) for total in totals) * BOLD_CHARACTER - 10
    row, bar = 44, 28
    described = "; ".join(f"{label} {units.size(total)}" for (label, _), total in zip(bars, totals, strict=True))
    drawing = Drawing(width, len(bars) * row + 6, f"Size on disk by part: {described}")
    for i, (label, stack) in enumerate(bars):
        y, x = i * row + 4, left
        drawing.text(left - 10, y + bar / 2 + 4, clip(label, left), "label", "end")
        for name, nbytes in stack.items():
            extent = nbytes / max(max(totals), 1) * room
            share = nbytes / max(totals[i], 1)
            if extent:
                title = f"{label}, {name}: {units.size(nbytes)} ({share:.0%})"
                drawing.rect(x, y, max(extent - 1.5, 0.8), bar, f"part{parts.index(name)}", title, radius=3)
            inside = units.size(nbytes)
            if extent > len(inside) * CHARACTER + 14:
                drawing.text(x + extent / 2, y + bar / 2 + 4, inside, f"on{parts.index(name)}", "middle")
            x += extent
        drawing.text(x + 8, y + bar / 2 + 4, units.size(totals[i]), "value")
    return drawing.render()


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, how long, what is written beside it (bold, and an aside), and its class."""

    name: str
    value: float
    written: str
    css: str
    aside: str = ""

    @property
    def room(self) -> float:
        """Room for what is written beside the bar."""
        return len(self.written) * BOLD_CHARACTER + (len(self.aside) * CHARACTER + 8 if self.aside else 0) + 12


def bars(entries: Sequence[Bar], width: float, label: str, full: float | None = None) -> str:
    """Horizontal bars with the name on the left. full: the value of a whole row, drawn as a track behind the bar."""
    left = gutter([entry.name for entry in entries], width * 0.34)
    room = max(width - left - max(entry.room for entry in entries), 40)
    peak = full or max(entry.value for entry in entries) or 1.0
    row, thick = 34, 20
    drawing = Drawing(width, len(entries) * row + 4, label)
    for i, entry in enumerate(entries):
        y = i * row + 4
        drawing.text(left - 10, y + thick / 2 + 4, clip(entry.name, left), "label", "end")
        extent = max(min(entry.value / peak, 1.0) * room, 2)
        if full:
            drawing.rect(left, y, room, thick, "track", radius=4)
        drawing.rect(left, y, extent, thick, entry.css, f"{entry.name}: {entry.written}", radius=4)
        beside = left + (room if full else extent) + 8
        drawing.text(beside, y + thick / 2 + 4, entry.written, "value", aside=entry.aside)
    return drawing.render()


def labelled_bars(entries: Sequence[Bar], width: float, label: str, reference: float) -> str:
    """Horizontal bars with the name above each, for narrow columns; a dashed line marks the value `reference`."""
    room = max(width - max(entry.room for entry in entries), 40)
    peak = max([entry.value for entry in entries] + [reference])
    mark = reference / peak * room
    row, thick = 46, 18
    drawing = Drawing(width, len(entries) * row, label)
    for i, entry in enumerate(entries):
        y = i * row + 18
        drawing.text(0, y - 5, clip(entry.name, width), "label")
        extent = max(entry.value / peak * room, 2)
        drawing.rect(0, y, extent, thick, entry.css, f"{entry.name}: {entry.written} {entry.aside}", radius=4)
        drawing.line(mark, y - 3, mark, y + thick + 3, "reference")
        # Beside the longer of bar and line, so that the line never runs through the figures.
        drawing.text(max(extent, mark) + 8, y + thick / 2 + 4, entry.written, "value", aside=entry.aside)
    return drawing.render()


def mini_bar(share: float, label: str) -> str:
    """A bar the size of a word, for a table cell."""
    drawing = Drawing(64, 8, label)
    drawing.rect(0, 0, 64, 8, "track", radius=4)
    drawing.rect(0, 0, max(min(share, 1.0) * 64, 2), 8, "ours", radius=4)
    return drawing.render()


def emblem() -> str:
    """The 2:4 pattern: of every four weights two are kept. Decoration, so no label."""
    kept = ((0, 1), (1, 3), (0, 2), (2, 3), (0, 3), (1, 2))
    squares = []
    for row in range(3):
        for group in range(6):
            for i in range(4):
                css = "kept" if i in kept[(group * 5 + row * 2) % 6] else "gone"
                x, y = group * 46 + i * 11, row * 11
                squares.append(f'<rect x="{x}" y="{y}" width="9" height="9" rx="2" class="{css}"/>')
    return (
        f'<svg class="emblem" width="273" height="31" viewBox="0 0 273 31" aria-hidden="true">{"".join(squares)}</svg>'
    )
