"""What tests of training share."""

import pytest

import sparsify.compiler.run_training as training
from sparsify.training.student import Student


def noted_students(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """The students of all training passes from now on, to look at afterwards."""
    made: list[Student] = []

    class Noted(Student):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(training, "Student", Noted)
    return made
