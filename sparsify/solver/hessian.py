"""The layer-wise least-squares problem: the Hessian, its damping and factors, and error propagation.

A linear y = W x is compressed to What so that sum_m ||W x_m - What x_m||^2 is small over M calibration tokens x_m. Every
method here needs of the tokens only H = X'X / M, and for error propagation C = Xd'X / M, where row m of X is x_m in the
compressed model and row m of Xd is the same token's input in the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.distributed import gathered, sum_over_all
from sparsify.errors import NumericalError
from sparsify.solver.gram import cross, gram

RETRIES = 3  # each with ten times the damping


@dataclass(frozen=True)
class Statistics:
    """What the calibration tokens say about linears that read one tensor: H = X'X / M and C = Xd'X / M, float32 [K, K]."""

    H: Tensor
    C: Tensor | None = None


class HessianAccumulator:
    """X'X and Xd'X over all calibration tokens, of this process and of all others.

    Feed it micro-batches, then take the mean. One call of `add` per group of linears keeps the order of summation, and with
    it the bits of the result (see `gram.py`).
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._H: Tensor | None = None
        self._C: Tensor | None = None

    def add(self, inputs: Sequence[Tensor], dense_inputs: Sequence[Tensor] | None = None) -> HessianAccumulator:
        """inputs, dense_inputs: micro-batches [tokens, K] of the compressed and of the dense model, the same tokens.

        Returns itself."""
        self._H = gram(inputs, self._H)
        if dense_inputs:
            self._C = cross(dense_inputs, inputs, self._C)
        self.tokens += sum(x.shape[0] for x in inputs)
        return self

    def mean(self) -> Statistics:
        """The means over the tokens of all processes, which all call this. Takes the sums: nothing can be added after it."""
        assert self._H is not None, "no tokens were added"
        H, C = self._per_token(self._H), None if self._C is None else self._per_token(self._C)
        self._H = self._C = None
        return Statistics(H, C)

    def _per_token(self, product: Tensor) -> Tensor:
        return sum_over_all(product).div_(sum(gathered(self.tokens)))


@dataclass(frozen=True)
class Factors:
    """Factors of the damped Hessian.

    damped:  H + damping * mean(diag H) * I, [K, K]
    cholesky: L [K, K] lower triangular with L L' = damped
    inverse_cholesky: U [K, K] upper triangular with U'U = damped^-1; row k says how later columns make up for an error at k
    ridge:   what was added to the diagonal
    dead:    bool [K], inputs that are zero for every token; their weights do not matter
    """

    damped: Tensor
    cholesky: Tensor
    inverse_cholesky: Tensor
    ridge: float
    dead: Tensor


def factor(H: Tensor, damping: float, name: str) -> Factors:
    """Factor H: [K, K] float32 as SparseGPT (arXiv 2301.00774, section 3) and GPTQ (arXiv 2210.17323, section 3) do.

    damping is relative to the mean of the diagonal and is raised tenfold, a few times, if H cannot be factored.
    Raises NumericalError naming the linear when H is not finite or cannot be factored at all.
    """
    diagonal = H.diagonal()
    if not torch.isfinite(diagonal).all():
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or Inf; check the dense model and the calibration text"
        )
    dead = diagonal == 0
    mean = float(diagonal.mean())
    for attempt in range(RETRIES):
        ridge = damping * 10**attempt * mean if mean > 0 else 1.0
        damped = H.clone()
        damped.diagonal().add_(ridge)
        damped.diagonal()[dead] = max(mean, 1.0)
        cholesky, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(cholesky), upper=True)
        if not failed and torch.isfinite(inverse).all():
            return Factors(damped, cholesky, inverse, ridge, dead)
    raise NumericalError(
        f"{name}: its Hessian cannot be factored even with damping {damping * 10 ** (RETRIES - 1):g}; "
        "raise `damping` in the recipe or use more calibration samples"
    )


def propagated_target(W: Tensor, C: Tensor, factors: Factors, alpha: float) -> Tensor:
    """Error propagation: move W toward the weights that give the dense model's outputs from the compressed model's inputs.

    W*: argmin over V of ||Xd W' - X V'||^2 / M + ridge ||V - W||^2  =  W (C + ridge I) (H + ridge I)^-1, and the result is
    W + alpha (W* - W): the weight correction of QEP with its propagation strength (arXiv 2504.09629), and close to GPTAQ's
    target (arXiv 2504.02692). W: [N, K]; C = Xd'X / M: [K, K]; alpha in [0, 1].
    """
    pulled = C.clone()
    pulled.diagonal().add_(factors.ridge)
    best = torch.cholesky_solve((W @ pulled).t(), factors.cholesky).t()
    return torch.lerp(W, best, alpha)


def relative_error(W: Tensor, What: Tensor, H: Tensor) -> float:
    """||X (W - What)'||^2 / ||X W'||^2 on the tokens of H. W, What: [N, K]; H: [K, K]."""
    difference = W - What
    lost = ((difference @ H) * difference).sum()
    total = ((W @ H) * W).sum()
    return float(lost / total) if total > 0 else 0.0
