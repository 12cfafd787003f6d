"""What benchmarks/soak.py counts as the same answer, as a tie, and as growth; the server that it loads is a real one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def soak(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", repository / "benchmarks" / "soak.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("found", "counted"),
    [
        ("a b c", "equal"),
        ("a x c", "tie"),  # the two likeliest of the second token lie 0.02 apart
        ("a x y", "tie"),  # what comes after belongs to another text
        ("x b c", "different"),
        ("a b x", "different"),
        ("a b", "different"),  # cut off
        ("a b c d", "different"),
    ],
)
def test_what_parts_at_a_tie_is_no_error(soak: ModuleType, found: str, counted: str) -> None:
    alone = soak.Answer(("a", "b", "c"), (0.5, 0.02, 0.021))
    tally = soak.Tally()
    soak.compare(soak.Question("m", "p", 3), alone, soak.Answer(tuple(found.split()), ()), tally)
    assert (tally.equal, tally.ties, len(tally.different)) == {
        "equal": (1, 0, 0), "tie": (0, 1, 0), "different": (0, 0, 1),
    }[counted]  # fmt: skip


def test_gaps_are_those_of_the_two_likeliest(soak: ModuleType) -> None:
    best = [{" a": -0.5, " b": -1.5}, {" c": -0.01, " d": -5.0, " e": -0.02}, {" f": -0.1}]
    said = '{"choices": [{"logprobs": {"tokens": [" a", " c", " f"], "top_logprobs": %s}}]}'
    answer = soak.answer_of((said % str(best).replace("'", '"')).encode())
    assert answer.tokens == (" a", " c", " f")
    assert answer.gaps == pytest.approx((1.0, 0.01, 1.0))


def test_growth_is_from_the_second_tenth_to_the_last(soak: ModuleType) -> None:
    assert soak.growth([100] * 9) is None
    assert soak.growth([5] * 10 + [100] * 90) == 0  # what is loaded with the first requests is no growth
    assert soak.growth([100] * 90 + [103] * 10) == pytest.approx(0.03)
    assert soak.growth([100] * 95 + [100, 100, 900, 100, 100]) == 0
