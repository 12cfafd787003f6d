"""Intervals against drawing items one by one, against scipy's bootstrap, and for how often they hold what they should."""

import json
import random
from importlib.util import find_spec

import numpy as np
import pytest
from scipy import stats

from sparsify.evaluation import evaluate
from sparsify.evaluation.intervals import accuracy_interval, bootstrap, difference_interval, recovery_interval

from .test_tasks import words

ITEMS = 300


@pytest.fixture(scope="module")
def scores(directories, tmp_path_factory):
    """What a small model and the one that it was made from score on 300 items."""
    if find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed (extra eval)")
    rng, file = random.Random(4), tmp_path_factory.mktemp("many") / "many.jsonl"
    items = [
        {"question": words(rng, rng.randrange(2, 9)), "choices": [words(rng, 2), words(rng, 2)], "answer": 0}
        for _ in range(ITEMS)
    ]
    file.write_text("\n".join(map(json.dumps, items)))
    result = evaluate(directories / "compressed", directories / "dense", tasks=file, quiet=True).tasks["many"]
    mine, dense = (np.array([int(digit) for digit in given]) for given in (result.right, result.dense_right))
    assert (mine.mean(), dense.mean()) == (result.accuracy, result.dense_accuracy)
    assert result.recovery == result.accuracy / result.dense_accuracy and (mine != dense).any()
    assert tuple(result.recovery_interval) == recovery_interval([mine], [dense])
    assert tuple(result.difference_interval) == difference_interval([mine], [dense])
    assert tuple(result.accuracy_interval) == accuracy_interval([mine])
    return mine, dense


KINDS = {
    "accuracy": (lambda a, b, p: accuracy_interval([a], p), lambda a, b: a.mean()),
    "difference": (lambda a, b, p: difference_interval([a], [b], p), lambda a, b: a.mean() - b.mean()),
    "recovery": (lambda a, b, p: recovery_interval([a], [b], p), lambda a, b: a.mean() / b.mean()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corrected", [True, False])
def test_random_halves_cover_the_value_of_all(scores, kind, corrected):
    """A half is drawn without replacement, so that its mean deviates from that of all by sqrt(1/2) of what it would deviate from
    that of items without end. With the correction for that, 95 of 100 intervals are to hold it; without, more than 99."""
    interval, value = KINDS[kind]
    mine, dense = scores
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        half = rng.permutation(ITEMS)[: ITEMS // 2]
        low, high = interval(mine[half], dense[half], [ITEMS] if corrected else None)
        held += low <= value(mine, dense) <= high
    assert held >= (90 if corrected else 97)
    if corrected:
        assert held < 100, "an interval that always holds it is wider than it says"


def test_scipys_bootstrap_gives_the_same_interval(scores):
    mine, dense = scores
    theirs = stats.bootstrap(
        (mine, dense), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert recovery_interval([mine], [dense]) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_paired_is_tighter_than_two_intervals(scores):
    mine, dense = scores
    paired, shuffled = (
        difference_interval([mine], [its]) for its in (dense, np.random.default_rng(1).permutation(dense))
    )
    assert paired.high - paired.low < 0.8 * (shuffled.high - shuffled.low)


def test_several_tasks_count_the_same_whatever_their_size():
    rng = np.random.default_rng(2)
    tasks = [(rng.random(size) < p).astype(float) for size, p in ((400, 0.8), (50, 0.3), (90, 0.5))]
    draws = [np.mean([rng.choice(one, len(one)).mean() for one in tasks]) for _ in range(10_000)]
    assert accuracy_interval(tasks) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.005)


def test_shares_of_items_are_drawn_too(monkeypatch):
    import sparsify.evaluation.intervals as module

    monkeypatch.setattr(module, "AT_ONCE", 1000)  # several rounds
    values = np.random.default_rng(3).random(80)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert accuracy_interval([values]) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_where_there_is_no_interval():
    assert accuracy_interval([[1.0]]) is None and difference_interval([[1.0], [0, 1]], [[0.0], [1, 1]]) is None
    assert recovery_interval([[1, 0, 1]], [[0, 0, 1]]) is None  # some draw has nothing right in the dense model
    assert accuracy_interval([[1, 1, 1, 1]]) == (1, 1)
    assert accuracy_interval([[1, 0, 1, 1]], [4]) == (0.75, 0.75)  # all that there are were scored
    assert bootstrap([([0, 1],)], lambda means: means[:, 0] * np.nan) is None
