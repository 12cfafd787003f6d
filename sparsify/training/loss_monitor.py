"""What is remembered of the losses of a training run, and when to stop because it diverges."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsify.errors import CheckpointError

WINDOW = 10  # steps, at most, that the loss at the start is the mean of
RISE = 1.5  # the smoothed loss above so many times its start means divergence: batches differ, but not by half
GOOD = 1.25  # above this no state is saved over an earlier, better one
SMOOTHING = 0.9
POINTS = 100  # of the curve in metrics.json


@dataclass
class LossWatch:
    """Losses of every step so far. `add` answers whether the run has diverged.

    window: the first steps, in which the rate is still rising, so that their mean loss is that of the start
    losses: one mapping per step, "loss" and its parts; smoothed: the exponential mean of "loss"
    """

    window: int = 1
    losses: list[dict[str, float]] = field(default_factory=list)
    smoothed: float = math.nan

    def add(self, losses: dict[str, float]) -> str | None:
        """Note a step's losses; what is wrong when training must stop here, else None."""
        loss = losses["loss"]
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self.losses.append(losses)
        self.smoothed = loss if math.isnan(self.smoothed) else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        if len(self.losses) > WINDOW and self.smoothed > RISE * self.start:
            return f"the smoothed loss rose from {self.start:.4g} to {self.smoothed:.4g}"
        return None

    @property
    def start(self) -> float:
        """The mean loss of the first steps."""
        first = self.losses[: self.window]
        return sum(step["loss"] for step in first) / len(first)

    @property
    def good(self) -> bool:
        """Whether the state is worth saving: the loss is not clearly above its start."""
        return self.smoothed <= GOOD * self.start

    def summary(self) -> dict[str, Any]:
        """What metrics.json says: mean losses of the first and the last steps, and the curve."""
        window = max(1, min(WINDOW, len(self.losses) // 4))
        stride = -(-len(self.losses) // POINTS)
        curve = [
            [start + 1, round(_mean(self.losses[start : start + stride], "loss"), 6)]
            for start in range(0, len(self.losses), stride)
        ]
        return {
            "first": _means(self.losses[:window]),
            "last": _means(self.losses[-window:]),
            "curve": curve,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LossWatch:
        """What `to_json` gave. CheckpointError for anything else."""
        try:
            losses = [{key: float(value) for key, value in step.items()} for step in saved["losses"]]
            if not losses or any("loss" not in step or step.keys() != losses[0].keys() for step in losses):
                raise ValueError("no loss of every step")
            return cls(max(1, int(saved["window"])), losses, float(saved["smoothed"]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the losses kept in a checkpoint of the training are damaged ({error}); remove that checkpoint, and resume "
                "from the one before"
            ) from None


def _mean(steps: list[dict[str, float]], key: str) -> float:
    return sum(step[key] for step in steps) / len(steps)


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(_mean(steps, key), 6) for key in steps[0]}
