"""What tests of training share."""

from pathlib import Path

import pytest

import sparsify.compiler.run_training as training
from sparsify.compiler.metrics import RECORD
from sparsify.training.student import Student


class Killed(BaseException):
    """What ends a run in a test as a signal would."""


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Every file of an output but the one that holds times."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.name != RECORD}


def noted_students(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """The students of all training passes from now on, to look at afterwards."""
    made: list[Student] = []

    class Noted(Student):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(training, "Student", Noted)
    return made
