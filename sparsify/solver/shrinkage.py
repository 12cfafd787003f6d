"""Statistics of an expert of a mixture, which may have been given few calibration tokens or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.distributed import gathered, sum_over_all
from sparsify.solver.hessian import HessianAccumulator, Statistics, accumulated

Batches = Iterable[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ExpertStatistics:
    """statistics: H and C of an expert; tokens: that it was given; shrinkage: how far H and C were moved to the layer's."""

    statistics: Statistics
    tokens: int
    shrinkage: float


def expert_statistics(batches: Batches, layer: Callable[[], Batches]) -> ExpertStatistics:
    """H = X'X / M of an expert's M tokens; of fewer tokens than inputs K, shrunk toward the layer's.

    Such an H has no full rank: it says nothing of directions that the tokens do not have, and too much of those they have.
    It becomes (1 - s) H + s T, where T is the mean over the layer's tokens, each as if this expert had been given it, and
    the intensity s is the one of least expected squared error (Ledoit and Wolf 2004, Journal of Multivariate Analysis 88,
    lemma 2.1 and section 3.2, whose target is a multiple of the identity; for other targets Schaefer and Strimmer 2005,
    Statistical Applications in Genetics and Molecular Biology 4(1), article 32, equation 10):

        s = min(1, sum_m ||x_m x_m' - H||^2 / (M (M - 1)) / ||H - T||^2)  =  min(1, (sum_m ||x_m||^4 / M - ||H||^2) / (M - 1) / ||H - T||^2)

    in Frobenius norms, and 1 for less than two tokens. C = Xd'X / M is shrunk likewise.
    batches, layer: what the expert's linears read and what they would read, as `accumulated` takes it; all processes call this
    """
    sums, fourth = HessianAccumulator(), torch.zeros((), dtype=torch.float64)
    for inputs, dense_inputs in batches:
        sums.add(inputs, dense_inputs)
        fourth += inputs.double().square().sum(1).square().sum().cpu()
    tokens = sum(gathered(sums.tokens))
    if tokens == 0:
        return ExpertStatistics(accumulated(layer()), 0, 1.0)
    own = sums.mean()
    if tokens >= own.H.shape[0]:
        return ExpertStatistics(own, tokens, 0.0)
    target = accumulated(layer())
    s = intensity(own.H, target.H, float(sum_over_all(fourth)), tokens)
    H = torch.lerp(own.H, target.H, s)
    C = None if own.C is None or target.C is None else torch.lerp(own.C, target.C, s)
    return ExpertStatistics(Statistics(H, C), tokens, s)


def intensity(H: Tensor, target: Tensor, fourth: float, tokens: int) -> float:
    """The shrinkage s of `expert_statistics`. H, target: [K, K]; fourth: the sum of ||x||^4 over the tokens."""
    if tokens < 2:
        return 1.0
    variance = max(0.0, fourth / tokens - _squares(H)) / (tokens - 1)
    distance = _squares(H - target)
    return min(1.0, variance / distance) if distance > 0 else 1.0


def _squares(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
