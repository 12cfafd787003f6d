"""What tests of training share."""

from pathlib import Path

import pytest

import sparsify.compiler.run_training as training
from sparsify.compiler.metrics import RECORD
from sparsify.manifest import MANIFEST
from sparsify.training.student import Student


class Killed(BaseException):
    """What ends a run in a test as a signal would."""


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Every file of an output but the one that holds times, and the manifest, which has its digest."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in (RECORD, MANIFEST))
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


def noted_students(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """The students of all training passes from now on, to look at afterwards."""
    made: list[Student] = []

    class Noted(Student):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(training, "Student", Noted)
    return made
