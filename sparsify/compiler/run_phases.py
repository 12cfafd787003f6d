"""Where the time of a run went: its phases, with what they computed and what this machine could have computed meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sparsify import phases
from sparsify.compiler.operations import SOLVER, count_operations
from sparsify.compute import rates
from sparsify.distributed import device, processes

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan

BAR = 24  # characters of the longest bar
OTHER = "other"
LEAST = 0.005  # of the time of a run: what takes less is shown with the rest


def phases_of(plan: Plan, resumed: bool) -> dict[str, dict[str, float]]:
    """The phases of the run that is measured, longest first: `seconds`, and where the operations are known those of this
    process, as many `per_second`, and how many were `possible_per_second`: the speed of torch's matrix products that was once
    measured on this processor, times the threads. Products of our own can be faster.

    resumed: parts were there before, so that it is not known how much of the work was done now
    """
    counted = {} if resumed else count_operations(plan)
    measured = rates() if device() == "cpu" else None
    found: dict[str, dict[str, float]] = {}
    for name, seconds in sorted(phases.seconds_so_far().items(), key=lambda item: -item[1]):
        found[name] = {"seconds": round(seconds, 2)}
        if not (work := counted.get(name, 0) // processes()) or not seconds:
            continue
        found[name] |= {"operations": work, "per_second": round(work / seconds)}
        if measured is not None:
            dtype = torch.float32 if name in SOLVER else plan.model.dtype
            found[name]["possible_per_second"] = round(measured.of(dtype) * torch.get_num_threads())
    return found


def phases_in_words(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The phases that run.json holds as rows of a table, each with a bar for its share of the whole time."""
    whole, parts = record["seconds"], record.get("phases") or {}
    rows = [(name, part["seconds"], _speed(part)) for name, part in parts.items() if part["seconds"] >= LEAST * whole]
    if not rows or whole <= 0:
        return []
    rest = whole - sum(seconds for _, seconds, _ in rows)
    if rest >= LEAST * whole:
        rows.append((OTHER, rest, ""))
    longest = max(seconds for _, seconds, _ in rows)
    return [
        (f"time: {name}", f"{'█' * max(1, round(BAR * seconds / longest)):<{BAR}} {seconds:.0f} s{speed}")
        for name, seconds, speed in rows
    ]


def _speed(part: Mapping[str, float]) -> str:
    if "per_second" not in part:
        return ""
    said = f", {part['per_second'] / 1e9:.0f} GFLOP/s"
    possible = part.get("possible_per_second")
    return f"{said}, {part['per_second'] / possible:.2f} times the speed of torch's products" if possible else said
