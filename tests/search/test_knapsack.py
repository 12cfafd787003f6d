"""The multiple-choice knapsack against every selection there is."""

from itertools import product

import numpy as np
import pytest

from sparsify.search.knapsack import knapsack, lightest, total


@pytest.mark.parametrize("seed", range(12))
def test_the_best_selection_of_all(seed):
    rng = np.random.default_rng(seed)
    options = rng.integers(1, 5, size=6)
    costs = [rng.exponential(size=n).tolist() for n in options]
    loads = [rng.integers(1, 10**9, size=n).tolist() for n in options]
    every = list(product(*map(range, options)))
    weights = sorted(total(loads, one) for one in every)
    for limit in (weights[0], weights[len(weights) // 3], weights[-1], weights[len(weights) // 2] + 0.5):
        found = knapsack(costs, loads, limit)
        assert total(loads, found) <= limit
        best = min(total(costs, one) for one in every if total(loads, one) <= limit)
        assert total(costs, found) == pytest.approx(best, rel=1e-5)


def test_a_limit_that_nothing_meets():
    loads = [[3, 2], [5]]
    assert lightest(loads) == [1, 0]
    assert knapsack([[1.0, 2.0], [1.0]], loads, 7) == [1, 0]
    assert knapsack([[1.0, 2.0], [1.0]], loads, 6.999) is None


def test_the_limit_is_met_to_the_byte():
    """A solver's tolerance is relative; a budget of 10^12 bytes exceeded by one byte is exceeded."""
    loads = [[10**12 + 1, 10**12]]
    assert knapsack([[0.0, 1.0]], loads, 10**12) == [1]


def test_hundreds_of_units_take_no_time():
    rng = np.random.default_rng(0)
    sizes = np.array([16, 8.25, 4.25, 9, 5.25, 3.25])
    costs = (rng.exponential(size=(400, 1)) / sizes**2).tolist()
    loads = (rng.choice([100, 300, 500], size=(400, 1)) * sizes).tolist()
    limit = 3.5 / 3.25 * total(loads, lightest(loads))
    found = knapsack(costs, loads, limit)
    uniform = total(costs, lightest(loads))
    assert total(loads, found) <= limit and total(costs, found) < uniform


def test_the_solver_says_nothing(capfd):
    """HiGHS prints a line where it improves a selection in one way of its own, into what a user pipes on."""
    rng = np.random.default_rng(1)
    sizes = rng.choice([10, 20, 30, 55], size=(120, 1))
    loads = (sizes * np.array([17, 16, 13, 12])).tolist()
    costs = (rng.exponential(size=(120, 1)) * (rng.random((120, 4)) + [0, 0.3, 1, 1.3])).tolist()
    for limit in np.linspace(sizes.sum() * 12.2, sizes.sum() * 16.5, 20):
        assert knapsack(costs, loads, limit) is not None
    assert capfd.readouterr().out == ""
