"""Models as points of two figures, and the front of those that no other beats in both (Pareto)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsify.report.svg import CHARACTER, Drawing, clip, nice_ticks

HEIGHT, TOP, BOTTOM, APART = 300, 14, 46, 14


@dataclass(frozen=True)
class Axis:
    """title: what it is; write: how a value reads; less: whether less is better; zero: whether it begins at 0"""

    title: str
    write: Callable[[float], str]
    less: bool
    zero: bool = True


@dataclass(frozen=True)
class Point:
    """One model. interval: of y, where one is known; css: its colour"""

    name: str
    x: float
    y: float
    css: str
    interval: tuple[float, float] | None = None


def front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """The points that no other is at least as good as in both figures and better than in one, by x."""

    def beats(one: Point, other: Point) -> bool:
        first, second = (
            (a - b) * (-1 if axis.less else 1) for a, b, axis in ((one.x, other.x, x), (one.y, other.y, y))
        )
        return first >= 0 and second >= 0 and (first > 0 or second > 0)

    kept = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda point: point.x)


def scatter(points: Sequence[Point], x: Axis, y: Axis, width: float) -> str:
    """The points with their names, and the front as a line. Which end of an axis is better stands beside its title."""
    columns, rows = (
        _ticks([point.x for point in points], x),
        _ticks([value for point in points for value in (point.y, *(point.interval or ()))], y),
    )
    left = max(len(y.write(tick)) for tick in rows) * CHARACTER + 14
    end = width - max(len(x.write(columns[-1])) * CHARACTER / 2, 10) - 4

    def at(point_x: float, point_y: float) -> tuple[float, float]:
        across = (point_x - columns[0]) / (columns[-1] - columns[0])
        up = (point_y - rows[0]) / (rows[-1] - rows[0])
        return left + across * (end - left), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    best = front(points, x, y)
    label = (
        f"{y.title} against {x.title} of {len(points)} models; on the front: {', '.join(point.name for point in best)}"
    )
    drawing = Drawing(width, HEIGHT, label)
    for tick in rows:
        level = at(columns[0], tick)[1]
        drawing.line(left, level, end, level, "grid")
        drawing.text(left - 8, level + 4, y.write(tick), "tick", "end")
    for number, tick in enumerate(columns):
        if width > 400 or number % 2 == 0:
            drawing.text(at(tick, rows[0])[0], HEIGHT - BOTTOM + 18, x.write(tick), "tick", "middle")
    drawing.text(end, HEIGHT - 6, f"{x.title}, {'less' if x.less else 'more'} is better", "tick", "end")
    if len(best) > 1:
        drawing.path([at(point.x, point.y) for point in best], "line front dashed")
    for point in points:
        cx, cy = at(point.x, point.y)
        if point.interval is not None:
            low, high = (at(point.x, value)[1] for value in point.interval)
            drawing.line(cx, low, cx, high, f"line {point.css}")
        title = f"{point.name}: {x.title} {x.write(point.x)}, {y.title} {y.write(point.y)}"
        drawing.circle(cx, cy, 5, f"mark {point.css}", title)
    _names(drawing, [(point.name, *at(point.x, point.y)) for point in points], left)
    return drawing.render()


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
    """Round values that cover all, from 0 or from below the least."""
    least, most = min(values), max(values)
    if axis.zero or most == least:
        return nice_ticks(most)
    step = nice_ticks(most - least)[1]
    first = int(least / step) * step
    return [first + number * step for number in range(int((most - first) / step + 1 - 1e-9) + 1)]


def _names(drawing: Drawing, places: Sequence[tuple[str, float, float]], left: float) -> None:
    """Names beside their points, on the side where there is room, one below the other where they would touch."""
    taken: list[tuple[float, float, float]] = []
    for name, x, y in sorted(places, key=lambda place: place[2]):
        room = max(drawing.width - x, x - left) - 10
        text = clip(name, room)
        extent = len(text) * CHARACTER
        right = x + 10 + extent <= drawing.width
        begin = x + 10 if right else x - 10 - extent
        level = y + 4
        while any(abs(level - other) < APART and begin < end and start < begin + extent for start, end, other in taken):
            level += APART
        taken.append((begin, begin + extent, level))
        drawing.text(x + 10 if right else x - 10, level, text, "label", "start" if right else "end")
