"""Bootstrap intervals over the items of tasks: of an accuracy, and of what is left of the dense model's, item by item.

The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). A draw takes as many items of a
task as it has, with replacement; of each item it takes what both models scored (paired), so that an item which is hard for both adds
nothing to the spread of a difference. Items of several tasks are drawn task by task, and each task counts the same.

Rows of scores that are equal are one kind, and how often a draw takes each kind is multinomial: the same distribution as drawing
items one by one, at a fraction of the cost where scores are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
DRAWS = 10_000
SEED = 0
AT_ONCE = 1 << 22  # counts that are alive together: 32 MiB

Floats = NDArray[np.float64]
Items = Sequence[float]  # the score of every item of one task: 0 or 1, or a share


class Interval(NamedTuple):
    """Of `LEVEL` of the draws."""

    low: float
    high: float


def accuracy_interval(tasks: Sequence[Items], population: Sequence[int] | None = None) -> Interval | None:
    """Of the mean over tasks of the mean score. tasks: the scores of each; population: of `bootstrap`"""
    return bootstrap([(one,) for one in tasks], lambda means: means[:, 0], population)


def difference_interval(
    tasks: Sequence[Items], dense: Sequence[Items], population: Sequence[int] | None = None
) -> Interval | None:
    """Of the mean less the dense model's. tasks, dense: scores of the same items of the same tasks"""
    return bootstrap(list(zip(tasks, dense, strict=True)), lambda means: means[:, 0] - means[:, 1], population)


def recovery_interval(
    tasks: Sequence[Items], dense: Sequence[Items], population: Sequence[int] | None = None
) -> Interval | None:
    """Of the mean as a part of the dense model's; None where the dense model has nothing right in some draw."""
    return bootstrap(list(zip(tasks, dense, strict=True)), _ratio, population)


def bootstrap(
    tasks: Sequence[Sequence[Items]],
    statistic: Callable[[Floats], Floats],
    population: Sequence[int] | None = None,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval | None:
    """The interval between the two percentiles of a statistic that leave `level` between them.

    tasks:      for each task the scores of M models on its N items, M sequences of N numbers
    statistic:  [draws, M] means over tasks -> [draws]; a NaN in it means that there is no interval
    population: items that each task has in all, of which those scored were drawn at random without replacement. The interval is then
                for the mean over exactly these: every deviation is smaller by sqrt(1 - n / N), the finite population correction
                (Cochran, Sampling Techniques, 1977, section 2.6), and nothing is uncertain where all are scored. By default there
                is no such correction: the interval is for items of this kind in general, whose number has no end, and so it is
                wider than needed for the mean over the file that the items came from.

    None where a task has a single item. Of items that all scored the same the interval is a point: a bootstrap knows only what
    occurred.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros((draws, len(tasks[0])))
    for number, columns in enumerate(tasks):
        rows = np.asarray(columns, dtype=np.float64).T  # [N, M]
        if len(rows) < 2:
            return None
        means = _means(rows, draws, rng)
        if population is not None:
            left = max(1 - len(rows) / population[number], 0.0) ** 0.5
            means = rows.mean(0) + (means - rows.mean(0)) * left
        total += means
    found = statistic(total / len(tasks))
    if not np.isfinite(found).all():
        return None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _means(rows: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Means of `draws` samples of rows with replacement. rows: [N, M]; returns [draws, M]"""
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    parts = []
    step = max(AT_ONCE // len(kinds), 1)
    for start in range(0, draws, step):
        taken = rng.multinomial(len(rows), counts / len(rows), size=min(step, draws - start))
        parts.append(taken @ kinds / len(rows))
    return np.concatenate(parts)


def _ratio(means: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[:, 0] / means[:, 1]
