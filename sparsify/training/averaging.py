"""The mean of the weights after each of the last steps of training.

Izmailov et al. 2018, stochastic weight averaging (arXiv 1803.05407, algorithm 1); of the last checkpoints of a run, Kaddour 2022
(arXiv 2209.14981). What is averaged are the weights before rounding: codes have no mean, and the mean is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The running mean of parameters. mean: by name, float32, empty before the first `add`; count: states in it"""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self.mean: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self) -> None:
        """Count the parameters as they are now."""
        self.count += 1
        for name, parameter in self.parameters.items():
            if self.count == 1:
                self.mean[name] = parameter.detach().clone()
            else:
                self.mean[name].lerp_(parameter, 1 / self.count)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are the mean inside the block, and to the bit what they were after it. No mean yet: as they are."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, mean in self.mean.items():
            kept = self.parameters[name].detach().clone()
            self.parameters[name].copy_(mean)
            mean.copy_(kept)


def first_averaged(steps: int, share: float) -> int:
    """The first step, from 1, whose weights are in the mean over the last `share` of all; above `steps` when there is none."""
    return steps + 1 - round(steps * share)
