"""One option for each item, at least cost within a limit: the multiple-choice knapsack, as a mixed-integer linear program.

minimise sum cost[i][o] x[i][o]   subject to   sum_o x[i][o] = 1 for every i,   sum load[i][o] x[i][o] <= limit,   x in {0, 1}

Solved by HiGHS through `scipy.optimize.milp`. Hundreds of items with six options each take a fraction of a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from sparsify.errors import NumericalError

GAP = 1e-6  # relative: the cost of the selection is at most so far above the least


def lightest(loads: Sequence[Sequence[float]]) -> list[int]:
    """The option of least load of every item."""
    return [min(range(len(options)), key=options.__getitem__) for options in loads]


def knapsack(costs: Sequence[Sequence[float]], loads: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """The option of each item that together cost least, or None where no selection is within the limit.

    costs, loads: one number per item and option; items may have different numbers of options
    """
    least = lightest(loads)
    if total(loads, least) > limit:
        return None
    slack = limit
    for _ in range(8):
        found = _solved(costs, loads, slack)
        if found is None:
            return least
        over = total(loads, found) - limit
        if over <= 0:
            return found
        slack -= over  # the solver takes a limit for met that is exceeded by its tolerance
    return least


def total(numbers: Sequence[Sequence[float]], selection: Sequence[int]) -> float:
    """The sum over items of the number of the option that is selected."""
    return sum(options[option] for options, option in zip(numbers, selection, strict=True))


def _solved(costs: Sequence[Sequence[float]], loads: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """None where the solver says that there is no selection."""
    import numpy as np  # scipy takes a while to load, and only this needs it
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    item_of = np.repeat(np.arange(len(costs)), [len(options) for options in costs])
    columns = np.arange(len(item_of))
    one_each = csr_array((np.ones(len(columns)), (item_of, columns)), shape=(len(costs), len(columns)))
    cost, load = (np.array([x for options in numbers for x in options], dtype=float) for numbers in (costs, loads))
    load_scale, cost_scale = (max(float(np.abs(x).max()), 1e-300) for x in (load, cost))
    with _silent_stdout():
        result = milp(
            cost / cost_scale,
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint((load / load_scale)[None], -np.inf, limit / load_scale),
            ],
            options={"mip_rel_gap": GAP},
        )
    if result.status == 2:
        return None
    if result.x is None:
        raise NumericalError(f"the selection could not be solved: {result.message}")
    chosen = np.round(result.x).astype(bool)
    starts = np.searchsorted(item_of, np.arange(len(costs)))
    return [int(column - starts[item_of[column]]) for column in columns[chosen]]


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS prints a line when it finds a better selection, whatever its options say."""
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
