"""Early stopping: text that is never trained on is measured now and then, and the best state is the one that is kept.

Prechelt 1998, "Early Stopping - But When?" (doi 10.1007/3-540-49430-8_3): the criterion of successive rises, here so many
measurements without a new best. The measure is KL(teacher || student), in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.training.distill import TextRows, collate
from sparsify.training.student import Student, TeacherOutputs


@dataclass(frozen=True)
class HeldOutText:
    """What is measured, and when. teacher: as that of training; every: steps; patience: measurements without a new best"""

    rows: TextRows
    teacher: Callable[[Mapping[str, Tensor]], TeacherOutputs]
    every: int
    patience: int


@dataclass
class Measurements:
    """[step, divergence] of every measurement so far, the first before any training.

    patience: measurements in a row without a new best before training stops; since: those of earlier steps do not count
    """

    patience: int
    since: int = 0
    found: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, divergence: float) -> bool:
        """Note one, a finite number; whether it is the best so far."""
        best = self.best
        self.found.append((step, divergence))
        return best is None or divergence < best[1]

    @property
    def best(self) -> tuple[int, float] | None:
        """The earliest of the smallest."""
        return min(self.found, key=lambda pair: pair[1]) if self.found else None

    @property
    def stop(self) -> bool:
        """Whether so many measurements in a row were no new best that training should end."""
        if self.best is None:
            return False
        later = self.found[self.found.index(self.best) + 1 :]
        return sum(step >= self.since for step, _ in later) >= self.patience

    def summary(self) -> dict[str, Any]:
        """What metrics.json says."""
        assert self.best is not None
        return {
            "curve": [[step, round(divergence, 6)] for step, divergence in self.found],
            "best_step": self.best[0],
            "best": round(self.best[1], 6),
        }


@torch.no_grad()
def measure(student: Student, text: HeldOutText, rows_at_once: int) -> float:
    """KL(teacher || student), the mean over the tokens of the text."""
    device = next(student.parameters()).device
    training = student.training
    student.eval()
    total, counted = 0.0, 0
    for start in range(0, len(text.rows), rows_at_once):
        numbers = range(start, min(start + rows_at_once, len(text.rows)))
        batch = {key: value.to(device) for key, value in collate([{"row": n, **text.rows[n]} for n in numbers]).items()}
        target = text.teacher(batch).target
        assert target is not None
        total += float(student.divergence(batch["input_ids"], batch["labels"], target))
        counted += int((batch["labels"] != -100).sum())
    student.train(training)
    return total / counted
