"""Accuracy on multiple-choice tasks, and how much of the dense model's is left, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sparsify.evaluation.intervals import Interval, accuracy_interval, difference_interval, recovery_interval


class Scored(Protocol):
    """A task whose items were scored: one of `task_files`, or one of `presets`.

    metric: what an item's score is, as lm-evaluation-harness calls it
    chance: expected accuracy of guessing
    size:   items that there are, of which the first `count` are scored
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def chance(self) -> float: ...
    @property
    def fewshot(self) -> int: ...
    @property
    def prompt(self) -> str: ...
    @property
    def requests(self) -> int: ...


@dataclass(frozen=True)
class Answers:
    """What one model answered to the items of one task.

    chosen:       the answer with the greatest log-likelihood per character, counted from 0 (with another metric than `acc_norm`:
                  in sum); text where the task asks for text
    right:        whether that is the gold answer (`acc_norm` of lm-evaluation-harness), or the item's share of 1
    right_in_sum: whether the answer with the greatest log-likelihood is (`acc`); the same as `right` with another metric
    truncated:    items that were longer than the model's context and lost their beginning
    """

    chosen: list[int | str]
    right: list[float]
    right_in_sum: list[float]
    truncated: int = 0


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task, or the mean over several; what begins with `dense`, and all below it, needs the dense model.

    Accuracies are shares of 1. Standard errors are those of a mean over independent items, None of a single item. Intervals are of
    95%, from a bootstrap over the items (`intervals`), paired with the dense model; None where there is none.

    accuracy:       by log-likelihood per character (`acc_norm` of lm-evaluation-harness), or what `metric` says; unnormalised: `acc`
    chance:         expected accuracy of guessing
    above_chance:   (accuracy - chance) / (dense_accuracy - chance); None where the dense model is not above chance
    difference:     accuracy - dense_accuracy, and its standard error over the same items, paired
    recovery:       accuracy / dense_accuracy; None where the dense model has nothing right
    flips:          share of items to which the model gives another answer than the dense model
    fewshot:        solved examples in the prompt
    right, dense_right: a digit for each item, 1 where it is right; None where items score shares
    """

    task: str
    items: int
    items_in_file: int
    chance: float
    accuracy: float
    accuracy_stderr: float | None
    unnormalised_accuracy: float
    unnormalised_accuracy_stderr: float | None
    prompt: str | None = None
    truncated: int = 0
    dense_accuracy: float | None = None
    dense_unnormalised_accuracy: float | None = None
    above_chance: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    flips: float | None = None
    metric: str = "acc_norm"
    fewshot: int = 0
    accuracy_interval: Interval | None = None
    difference_interval: Interval | None = None
    recovery: float | None = None
    recovery_interval: Interval | None = None
    right: str | None = None
    dense_right: str | None = None


def task_score(task: Scored, answers: Answers, dense: Answers | None = None) -> TaskScore:
    """Score what a model answered. dense: what the dense model answered to the same items"""
    accuracy, unnormalised = mean(answers.right), mean(answers.right_in_sum)
    score = TaskScore(
        task=task.name,
        items=task.count,
        items_in_file=task.size,
        chance=task.chance,
        accuracy=accuracy,
        accuracy_stderr=standard_error(answers.right),
        unnormalised_accuracy=unnormalised,
        unnormalised_accuracy_stderr=standard_error(answers.right_in_sum),
        prompt=task.prompt,
        truncated=answers.truncated,
        metric=task.metric,
        fewshot=task.fewshot,
        accuracy_interval=accuracy_interval([answers.right]),
        right=digits(answers.right),
    )
    if dense is None:
        return score
    differences = [float(mine) - float(its) for mine, its in zip(answers.right, dense.right, strict=True)]
    return replace(
        score,
        dense_accuracy=mean(dense.right),
        dense_unnormalised_accuracy=mean(dense.right_in_sum),
        above_chance=above_chance(accuracy, mean(dense.right), task.chance),
        difference=mean(differences),
        difference_stderr=standard_error(differences),
        flips=mean([mine != its for mine, its in zip(answers.chosen, dense.chosen, strict=True)]),
        difference_interval=difference_interval([answers.right], [dense.right]),
        recovery=recovery(accuracy, mean(dense.right)),
        recovery_interval=recovery_interval([answers.right], [dense.right]),
        dense_right=digits(dense.right),
    )


def mean_score(
    scores: Sequence[TaskScore], answers: Sequence[Answers], dense: Sequence[Answers] | None = None
) -> TaskScore:
    """The mean over tasks, each of which counts the same; errors of independent tasks. `above_chance` and `recovery` are those of the
    means. answers, dense: those behind the scores, for the intervals"""
    given = [one.right for one in answers]
    accuracy, chance = mean([one.accuracy for one in scores]), mean([one.chance for one in scores])
    mean_dense = _mean_known([one.dense_accuracy for one in scores])
    return TaskScore(
        task="mean",
        items=sum(one.items for one in scores),
        items_in_file=sum(one.items_in_file for one in scores),
        chance=chance,
        accuracy=accuracy,
        accuracy_stderr=_error_of_mean([one.accuracy_stderr for one in scores]),
        unnormalised_accuracy=mean([one.unnormalised_accuracy for one in scores]),
        unnormalised_accuracy_stderr=_error_of_mean([one.unnormalised_accuracy_stderr for one in scores]),
        truncated=sum(one.truncated for one in scores),
        dense_accuracy=mean_dense,
        dense_unnormalised_accuracy=_mean_known([one.dense_unnormalised_accuracy for one in scores]),
        above_chance=None if mean_dense is None else above_chance(accuracy, mean_dense, chance),
        difference=_mean_known([one.difference for one in scores]),
        difference_stderr=_error_of_mean([one.difference_stderr for one in scores]),
        flips=_mean_known([one.flips for one in scores]),
        metric="mean",
        accuracy_interval=accuracy_interval(given),
        difference_interval=difference_interval(given, [one.right for one in dense]) if dense else None,
        recovery=None if mean_dense is None else recovery(accuracy, mean_dense),
        recovery_interval=recovery_interval(given, [one.right for one in dense]) if dense else None,
    )


def above_chance(accuracy: float, dense: float, chance: float) -> float | None:
    """The share that is left of what the dense model has above chance; None where it has nothing above it."""
    return (accuracy - chance) / (dense - chance) if dense > chance else None


def recovery(accuracy: float, dense: float) -> float | None:
    """Accuracy as a part of the dense model's; None where that has nothing right."""
    return accuracy / dense if dense > 0 else None


def digits(right: Sequence[float]) -> str | None:
    """`0110` for items that are right or wrong; None where an item has a share."""
    return "".join(str(int(one)) for one in right) if all(one in (0, 1) for one in right) else None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values, from their sample standard deviation; None of a single one."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def _mean_known(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean of independent quantities from theirs."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None
