"""Lines over a number, several in one picture, with the spread of each point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparsify.report.svg import CHARACTER, Drawing, nice_ticks

HEIGHT, TOP, BOTTOM, RIGHT = 250, 22, 42, 14


@dataclass(frozen=True)
class Mark:
    """One point: the median y at x, from `least` to `greatest`."""

    x: float
    y: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Line:
    """css: the class of its colour. crosses: x without a y, drawn at the top; levels: y without an x, dotted across."""

    name: str
    css: str
    marks: Sequence[Mark]
    dashed: bool = False
    crosses: Sequence[float] = ()
    levels: Sequence[float] = field(default_factory=list)


def line_chart(lines: Sequence[Line], width: float, label: str, write: Callable[[float], str]) -> str:
    """Both axes begin at 0. write: how a y reads."""
    high = max(
        [mark.greatest for line in lines for mark in line.marks] + [y for line in lines for y in line.levels], default=1
    )
    far = max(
        [mark.x for line in lines for mark in line.marks] + [x for line in lines for x in line.crosses], default=1
    )
    rows, columns = nice_ticks(high), nice_ticks(far)
    left = max(len(write(tick)) for tick in rows) * CHARACTER + 14

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / columns[-1], y / rows[-1]
        return left + across * (width - left - RIGHT), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    drawing = Drawing(width, HEIGHT, label)
    for tick in rows:
        y = at(0, tick)[1]
        drawing.line(left, y, width - RIGHT, y, "grid")
        drawing.text(left - 8, y + 4, write(tick), "tick", "end")
    for tick in columns:
        drawing.text(at(tick, 0)[0], HEIGHT - BOTTOM + 18, f"{tick:g}", "tick", "middle")
    drawing.text(width - RIGHT, HEIGHT - 6, "requests per second asked", "tick", "end")
    for line in lines:
        _draw(drawing, line, at, write)
    for x in sorted({x for line in lines for x in line.crosses}):
        for place, line in enumerate([line for line in lines if x in line.crosses]):
            _cross(drawing, at(x, 0)[0] - 13 * place, line.css, f"{line.name}, {x:.3g} per second: saturated")
    return drawing.render()


def _draw(
    drawing: Drawing,
    line: Line,
    at: Callable[[float, float], tuple[float, float]],
    write: Callable[[float], str],
) -> None:
    style = f"{line.css}{' dashed' if line.dashed else ''}"
    for level in line.levels:
        left, y = at(0, level)
        drawing.line(left, y, drawing.width - RIGHT, y, f"line {line.css} dotted")
    if len(line.marks) > 1:
        drawing.path([at(mark.x, mark.y) for mark in line.marks], f"line {style}")
    for mark in line.marks:
        x, y = at(mark.x, mark.y)
        if mark.greatest > mark.least:
            drawing.line(x, at(mark.x, mark.least)[1], x, at(mark.x, mark.greatest)[1], f"line {line.css}")
        drawing.circle(x, y, 3.5, f"mark {line.css}", f"{line.name}, {mark.x:.3g} per second: {write(mark.y)}")


def _cross(drawing: Drawing, x: float, css: str, title: str) -> None:
    """Above everything that has a value, since this has none."""
    y, size = 8, 4
    drawing.line(x - size, y - size, x + size, y + size, f"line {css}")
    drawing.line(x - size, y + size, x + size, y - size, f"line {css}")
    drawing.circle(x, y, 6, "unseen", title)
