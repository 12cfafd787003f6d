"""A choice for every unit: what it costs, what it is predicted to lose, and the best one within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsify.compiler.estimate import stored_bytes
from sparsify.compiler.plan import Plan
from sparsify.errors import RecipeError
from sparsify.search.budget import Budget
from sparsify.search.choices import DENSE, Choice, Unit, linear_bytes
from sparsify.search.knapsack import knapsack, lightest, total
from sparsify.search.measure import Measurements
from sparsify.search.speed import Seconds

FRONT = 24  # selections that are computed between the smallest and the largest


@dataclass(frozen=True)
class Point:
    """A selection. choices: of each unit, in order; kl: predicted, nats per token.

    bits: mean bits per weight of the linears; nbytes: of all tensors of the checkpoint; speed: of the linears, times that of the
    dense ones, None where no times are known
    """

    choices: tuple[Choice, ...]
    kl: float
    bits: float
    nbytes: int
    speed: float | None

    def describe(self) -> str:
        """`3.50 bits per weight, 91 MB, predicted KL 0.21`"""
        faster = "" if self.speed is None else f", linears {self.speed:.2f}x as fast as dense"
        kl = "" if math.isnan(self.kl) else f", predicted KL {self.kl:.4g}"
        return f"{self.bits:.4g} bits per weight, {self.nbytes / 1e6:.4g} MB{faster}{kl}"

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "bytes": self.nbytes, "speed": self.speed, "predicted_kl": self.kl}


@dataclass(frozen=True)
class Selection:
    """The knapsack of a model.

    units: those that were measured; measured: every choice of each; seconds: of each choice of each unit, None where unknown
    fixed: linears that the recipe compresses in one way only, with fixed_bytes and fixed_weights
    outside_bytes: of all other tensors of the checkpoint
    scale: what the sum over the units is multiplied with to predict a divergence
    """

    units: Sequence[Unit]
    measured: Measurements
    fixed: Sequence[str]
    fixed_bytes: int
    fixed_weights: int
    outside_bytes: int
    seconds: Sequence[Seconds] | None = None
    scale: float = 1.0

    @cached_property
    def kl(self) -> list[list[float]]:
        """What each choice of each unit adds to the prediction."""
        measured = [[self.measured[unit.name][choice.name].kl for choice in unit.choices] for unit in self.units]
        return [[self.scale * kl for kl in own] for own in measured]

    @cached_property
    def nbytes(self) -> list[list[int]]:
        return [[unit.nbytes[choice] for choice in unit.choices] for unit in self.units]

    @cached_property
    def times(self) -> list[list[float]]:
        """Seconds of one token through each unit."""
        assert self.seconds is not None
        return [[own[choice] for choice in unit.choices] for unit, own in zip(self.units, self.seconds, strict=True)]

    @cached_property
    def dense_seconds(self) -> float:
        assert self.seconds is not None
        return sum(own[DENSE] for own in self.seconds)

    @cached_property
    def weights(self) -> int:
        """Of the linears over which bits are averaged."""
        return self.fixed_weights + sum(unit.weights for unit in self.units)

    def point(self, choices: Sequence[Choice]) -> Point:
        """What a selection costs. choices: one of each unit."""
        chosen = [unit.choices.index(choice) for unit, choice in zip(self.units, choices, strict=True)]
        return self._point(chosen)

    def _point(self, chosen: Sequence[int]) -> Point:
        nbytes = self.fixed_bytes + int(total(self.nbytes, chosen))
        speed = None if self.seconds is None else self.dense_seconds / max(total(self.times, chosen), 1e-30)
        choices = tuple(unit.choices[option] for unit, option in zip(self.units, chosen, strict=True))
        return Point(choices, total(self.kl, chosen), 8 * nbytes / self.weights, nbytes + self.outside_bytes, speed)

    def best(self, budget: Budget) -> Point:
        """The selection of least predicted divergence within a budget; for a budget of divergence, the smallest one.

        Raises RecipeError that names the nearest selection where none is within the budget.
        """
        loads, limit = self._limit(budget)
        chosen = knapsack(self.nbytes if budget.kind == "kl" else self.kl, loads, limit)
        if chosen is None:
            raise self._impossible(budget)
        return self._point(chosen)

    def refuse_impossible(self, budget: Budget) -> None:
        """The error of `best`, where sizes and times alone tell."""
        if budget.kind != "kl":
            loads, limit = self._limit(budget)
            if total(loads, lightest(loads)) > limit:
                raise self._impossible(budget)

    def _limit(self, budget: Budget) -> tuple[Sequence[Sequence[float]], float]:
        """What a budget limits, by unit and choice, and the limit of its sum."""
        if budget.kind == "kl":
            return self.kl, budget.value
        if budget.kind == "speed":
            return self.times, self.dense_seconds / budget.value
        linears = budget.value - self.outside_bytes if budget.kind == "bytes" else budget.value * self.weights / 8
        return self.nbytes, linears - self.fixed_bytes

    def _impossible(self, budget: Budget) -> RecipeError:
        nearest = self._point(lightest(self._limit(budget)[0]))
        return RecipeError(
            f"--budget {budget.text} cannot be met with these choices; the nearest selection has {nearest.describe()}"
        )

    def linears(self) -> list[str]:
        """The linears over which bits are averaged: those that choose, and those that the recipe compresses in one way only."""
        return [*(module for unit in self.units for module in unit.modules), *self.fixed]

    def front(self, count: int = FRONT) -> list[Point]:
        """Selections of least divergence at sizes between the smallest and that of the best, each better than the one before."""
        low, high = total(self.nbytes, lightest(self.nbytes)), total(self.nbytes, lightest(self.kl))
        found: list[Point] = []
        for step in range(count):
            limit = low + (high - low) * step / max(count - 1, 1)
            chosen = knapsack(self.kl, self.nbytes, limit)
            point = None if chosen is None else self._point(chosen)
            if point is not None and (not found or point.kl < found[-1].kl):
                found.append(point)
        return found


def selection_of(
    plan: Plan, units: Sequence[Unit], measured: Measurements, seconds: Sequence[Seconds] | None
) -> Selection:
    """The knapsack of a plan. seconds: as `speed` gives them for these units."""
    kept = [number for number, unit in enumerate(units) if unit.name in measured]
    free = {module for number in kept for module in units[number].modules}
    skipped = {module for unit in units for module in unit.modules} - free
    fixed = [module for module in plan.schemes if module not in free | skipped]
    return Selection(
        [units[number] for number in kept],
        measured,
        fixed,
        sum(linear_bytes(plan, module, plan.linears[module].scheme) for module in fixed),
        sum(plan.linears[module].weights for module in fixed),
        outside_bytes(plan, free | set(fixed)),
        None if seconds is None else [seconds[number] for number in kept],
    )


def outside_bytes(plan: Plan, linears: set[str]) -> int:
    """Bytes of all tensors of the checkpoint but the weights of these linears."""
    packed = {plan.linears[module].source for module in linears}
    head = plan.head
    if head is not None and not head.head.tied:
        packed.add(head.head.source)
    own = 0
    for name in plan.checkpoint.names():
        info = plan.checkpoint.info(name)
        if name in packed:
            continue
        known = name in plan.model.sources
        own += info.nbytes // info.dtype.itemsize * plan.stored_dtype(name).itemsize if known else info.nbytes
    if head is not None:
        own += stored_bytes(head.scheme, head.head.shape, plan)
    return own
