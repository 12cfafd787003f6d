"""Every value that a training logs, one JSON object per line and step, while it runs and in the finished directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

LOG = "log.jsonl"  # in the directory of one training
STEP = "step"


class TrainingLog:
    """Appends to a file what is logged. A training that goes on from a checkpoint loses the lines of the steps that it does again.

    file: None for a process that writes nothing; done: steps before this start
    """

    def __init__(self, file: Path | None, done: int):
        self.file = file
        if file is not None:
            kept = [line for line in _lines(file) if done and 0 <= _step(line) <= done]
            file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a step; NaN and infinities, which JSON has not, become null."""
        if self.file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({STEP: step, **finite}) + "\n")


def _lines(file: Path) -> Iterator[str]:
    if file.exists():
        yield from file.read_text(encoding="utf-8").splitlines()


def _step(line: str) -> int:
    """The step of a line; -1 for one that a kill has cut."""
    try:
        return int(json.loads(line)[STEP])
    except (ValueError, KeyError, TypeError):
        return -1


def whole_log(work: Path) -> str:
    """The logs of all trainings of a run one after another, each line with the number of its pass; empty without any."""
    found = []
    for file in sorted(work.glob(f"training-*/{LOG}"), key=_number):
        found += [json.dumps({"training": _number(file), **json.loads(line)}) for line in _lines(file)]
    return "".join(f"{line}\n" for line in found)


def _number(file: Path) -> int:
    return int(file.parent.name.rpartition("-")[2])
