"""What templates are given besides text: pictures in two widths, cells of tables, tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.report import svg

HALF, THIRD = 416, 284  # width in pixels of a picture in one of two or three columns


@dataclass(frozen=True)
class Picture:
    """One picture as SVG for a desk and for a phone, which templates take as it is.

    name: of the files that it is saved as, without an ending; head, rows: the figures behind it, as they were measured
    """

    wide: str
    narrow: str
    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def csv(self) -> str:
        """The figures as RFC 4180 has them; nothing where one was not measured."""
        text = io.StringIO()
        csv.writer(text).writerows([self.head, *self.rows])
        return text.getvalue()


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


def picture(
    draw: Callable[[float], str],
    name: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    wide: float = svg.WIDE,
) -> Picture:
    """draw: a width in pixels -> SVG. The functions of `svg` escape what they are given. name, head, rows: of `Picture`"""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "picture"
    return Picture(draw(wide), draw(svg.NARROW), plain, head, rows)


def reasons(rows: Sequence[Any]) -> list[str]:
    """Why some rows have no figures, each reason once."""
    return list(dict.fromkeys(row["failure"]["reason"] for row in rows if row.get("failure")))
