"""How numbers read in the report."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """1234567 -> 1.23 M"""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g}"


def size(nbytes: float) -> str:
    """Bytes in decimal units, as model hubs count them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            scaled = nbytes / factor
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{nbytes:.0f} B"


def percent(value: float | None, digits: int = 1) -> str:
    """A share; small ones keep two significant digits instead of showing 0.0%."""
    if value is None:
        return "–"
    if 0 < value < 10 ** -(digits + 2):
        return f"{value * 100:.1e}%"
    return f"{value:.{digits}%}"


def error(value: float | None) -> str:
    """A relative error with three significant digits, as a share of the output's energy."""
    if value is None:
        return "–"
    if value == 0:
        return "0%"
    return f"{value * 100:.3g}%" if value >= 1e-5 else f"{value * 100:.1e}%"


def ratio(value: float | None) -> str:
    """A factor."""
    if value is None:
        return "–"
    return f"{value:.0f}×" if value >= 100 else f"{value:.2f}×"


def number(value: float | None, digits: int = 2) -> str:
    """A plain figure; absurd ones in scientific notation."""
    if value is None:
        return "∞"  # JSON has no infinity: an evaluation that wrote null overflowed
    if not math.isfinite(value):
        return "∞"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Times of one request."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def span(seconds: float) -> str:
    """Times of a whole run."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
