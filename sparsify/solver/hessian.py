"""The layer-wise least-squares problem: damping, factors, and the dense-target correction.

A linear y = W x is compressed to What so that sum_t ||W x_t - What x_t||^2 is small over calibration tokens x_t. Every
method here needs of the tokens only H = X'X / tokens, and for the correction C = Xd'X / tokens, where row t of X is
x_t in the compressed model and row t of Xd is the same token's input in the dense model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import NumericalError

RETRIES = 3  # each with ten times the damping


@dataclass(frozen=True)
class Factors:
    """Factors of the damped Hessian.

    damped:  H + damping * mean(diag H) * I, [K, K]
    lower:   L [K, K] with L L' = damped
    inverse: U [K, K] upper triangular with U'U = (H + ...)^-1; row k holds how the later inputs repair an error at k
    ridge:   what was added to the diagonal
    dead:    bool [K], inputs that are zero for every token; their weights do not matter
    """

    damped: Tensor
    lower: Tensor
    inverse: Tensor
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
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(inverse).all():
            return Factors(damped, lower, inverse, ridge, dead)
    raise NumericalError(
        f"{name}: its Hessian cannot be factored even with damping {damping * 10 ** (RETRIES - 1):g}; "
        "raise `damping` in the recipe or use more calibration samples"
    )


def corrected_target(W: Tensor, C: Tensor, factors: Factors, alpha: float) -> Tensor:
    """Move W toward the weights that reproduce the dense model's outputs from the compressed model's inputs.

    W*: argmin over V of ||Xd W' - X V'||^2 + ridge ||V - W||^2  =  W (C + ridge I) (H + ridge I)^-1, and the result is
    W + alpha (W* - W). W: [N, K]; C = Xd'X / tokens: [K, K]; alpha in [0, 1].
    """
    pulled = C.clone()
    pulled.diagonal().add_(factors.ridge)
    best = torch.cholesky_solve((W @ pulled).t(), factors.lower).t()
    return torch.lerp(W, best, alpha)


def relative_error(W: Tensor, What: Tensor, H: Tensor) -> float:
    """||X (W - What)'||^2 / ||X W'||^2 on the tokens of H. W, What: [N, K]; H: [K, K]."""
    difference = W - What
    lost = ((difference @ H) * difference).sum()
    total = ((W @ H) * W).sum()
    return float(lost / total) if total > 0 else 0.0
