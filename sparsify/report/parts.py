"""What templates are given besides text: pictures in two widths, cells of tables, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.report import svg

HALF, THIRD = 416, 284  # width in pixels of a picture in one of two or three columns


@dataclass(frozen=True)
class Picture:
    """One picture as SVG for a desk and for a phone, which templates take as it is."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class Cell:
    """A cell that is more than text. sub: set smaller after it; picture: an SVG before it; code: set as code."""

    text: str
    sub: str = ""
    picture: str = ""
    code: bool = False


@dataclass(frozen=True)
class Table:
    """head: the title of every column; rows: as many cells each, of which the first is the row's heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


Facts = list[tuple[str, list[str | Cell]]]  # pairs of a name and what it is, one line or several


def picture(draw: Callable[[float], str], wide: float = svg.WIDE) -> Picture:
    """draw: a width in pixels -> SVG. The functions of `svg` escape what they are given."""
    return Picture(draw(wide), draw(svg.NARROW))


def reasons(rows: Sequence[Any]) -> list[str]:
    """Why some rows have no figures, each reason once."""
    return list(dict.fromkeys(row["failure"]["reason"] for row in rows if row.get("failure")))
