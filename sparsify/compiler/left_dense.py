"""Linears that a checkpoint format cannot hold: they are written dense, which a user is told before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from sparsify.formats import get_format

NAMED = 3  # modules that a sentence names


def none_held(format: str, reasons: Mapping[str, str], linears: Collection[str], whose: str) -> str | None:
    """The sentence for a model of which the format can hold not a single linear; None when it holds one.

    reasons: of the linears that it cannot hold, by module; linears: all that were to be written; whose: the model
    """
    if not linears or any(module not in reasons for module in linears):
        return None
    counted = Counter(reasons[module] for module in linears).most_common()
    said = "; ".join(reason if len(counted) == 1 else f"{reason} ({count})" for reason, count in counted)
    return (
        f"none of the {len(linears)} linears of {whose} can be written as {format}: {said}. "
        f"{format} holds {get_format(format).holds}: use such settings, or another format"
    )


def some_not_held(format: str, reasons: Mapping[str, str]) -> list[str]:
    """A sentence for each reason for which linears are written dense, with their number and the first names."""
    by_reason: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        by_reason.setdefault(reason, []).append(module)
    said = []
    for reason, modules in by_reason.items():
        names = ", ".join(modules[:NAMED]) + (", ..." if len(modules) > NAMED else "")
        count = f"{len(modules)} linear{'s' if len(modules) > 1 else ''}"
        said.append(
            f"{count} cannot be written as {format} and stay{'s' if len(modules) == 1 else ''} dense: {reason} ({names})"
        )
    return said
