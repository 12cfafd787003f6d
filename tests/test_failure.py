"""What a failure is called in a cell, from errors as vLLM, torch and we word them."""

import pytest

from sparsify.errors import NumericalError
from sparsify.failure import Failure, failure_of, foot


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("x: vLLM failed with exit status 1: AttributeError: '_OpNamespace' '_C' object has no attribute 'op'", "vLLM lacks it"),
        ("x: vLLM failed with exit status 1: NotImplementedError: Could not run '_C::op' with", "vLLM lacks it"),
        ("x: vLLM was killed by signal SIGKILL (too little memory?)", "too little memory"),
        ("x: vLLM took longer than the time limit", "took too long"),
        ("x: vLLM failed with exit status 1: ModuleNotFoundError: No module named 'zentorch'", "package missing"),
        ("x: vLLM failed with exit status 3: ValueError: the flux capacitor is cold", "vLLM failed"),
    ],
)  # fmt: skip
def test_few_words(reason: str, words: str) -> None:
    assert failure_of(reason, "vLLM") == Failure(words, reason)


def test_the_first_line_of_an_error_is_its_reason() -> None:
    error = NumericalError("m gives NaN or infinite logits\nlast lines of its log:\n  ...")
    assert failure_of(error, "sparsify") == Failure("NaN or infinite", "m gives NaN or infinite logits")
    assert failure_of(ValueError(), "sparsify") == Failure("sparsify failed", "ValueError")


def test_a_reason_stands_once_at_the_foot() -> None:
    assert foot([Failure("a", "one"), Failure("b", "two"), Failure("a", "one")]) == "one\ntwo"
