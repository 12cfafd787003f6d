"""ALPS (arXiv 2406.07831): the mask as the solution of the layer's least-squares problem by ADMM, all inputs at once.

minimise (W - T)' H (W - T) over W whose every 4 consecutive inputs keep at most two. Split into W, free, and D, 2:4, which
must agree (section 3.1): W solves a linear system, D projects, V collects their disagreement, and the penalty rho grows
until the support of D stands still. Inputs are scaled to a unit diagonal of H first (section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import NumericalError
from sparsify.solver.dispatch import kernel_for
from sparsify.solver.masks.magnitude import keep_two_of_four

FORCE = "SPARSIFY_ALPS"
ITERATIONS = 15
PENALTY = 0.08  # of a Hessian with unit diagonal, at the start
GROWTH = 1.25
ROWS = 1024  # outputs that are solved together, or more:
TIMES = 4  # as many as that times the inputs, so that a factor costs little beside its products


def alps_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """bool [N, K], two of every four. W: [N, K], the weights whose outputs are wanted; H: [K, K], the damped Hessian.

    Makes one matrix [K, K]. SPARSIFY_ALPS=torch or native forces the kernel. Raises NumericalError when H is not positive definite.
    """
    assert H is not None
    size = H.diagonal().sqrt()
    system = torch.empty_like(H)
    failed = torch.zeros(ITERATIONS, dtype=torch.int32, device=H.device)
    mask = torch.cat([_admm(piece, H, size, system, failed) for piece in W.split(rows_together(*W.shape))])
    if failed.any():  # asked once: a GPU would be waited for in every round
        raise NumericalError("the damped Hessian is not positive definite; raise `damping` in the recipe")
    return mask


def rows_together(outputs: int, inputs: int) -> int:
    """How many outputs of N are solved together: four matrices of their size and a mask are alive at once."""
    return min(outputs, max(ROWS, TIMES * inputs))


def takes_inverse(rows: int, inputs: int) -> bool:
    """Whether so many rows are multiplied with the inverse of a system [K, K]; else its two triangles are solved for them."""
    return rows >= inputs


def _admm(W: Tensor, H: Tensor, size: Tensor, system: Tensor, failed: Tensor) -> Tensor:
    """The mask of some rows of W [n, K], which do not depend on each other, from W itself as the first solution.

    size: [K], roots of the diagonal of H; system: [K, K], to be written to; failed: int32 [rounds], not 0 where a round's
    system could not be factored
    """
    penalty, pull = PENALTY, (W @ H).div_(size)
    free = W * size
    V = torch.zeros_like(free)
    kept = next_round(free, pull, penalty, V)
    for one in failed:
        free = _solved(free, H, size, penalty, system, one)
        penalty *= GROWTH
        kept = next_round(free, pull, penalty, V)
    return kept


def _solved(B: Tensor, H: Tensor, size: Tensor, rho: float, system: Tensor, failed: Tensor) -> Tensor:
    """X with X (S^-1 H S^-1 + rho I) = B, S = diag(size) and size^2 = diag H. B: [n, K], overwritten as `system` [K, K] and
    `failed`, one number, are.

    H + rho S^2 is H with a diagonal 1 + rho times as large. Its Cholesky factor is S L, where L L' is the system that is wanted,
    so H is never scaled.
    """
    L = system.copy_(H)
    L.diagonal().mul_(1 + rho)
    upper = L.t()  # LAPACK counts columns first: its upper triangle is the lower one here
    torch.linalg.cholesky_ex(upper, upper=True, out=(upper, failed))
    L.div_(size[:, None])
    if takes_inverse(*B.shape):
        return B @ torch.cholesky_inverse(upper, upper=True, out=upper)
    columns = B.t()
    torch.linalg.solve_triangular(L, columns, upper=False, out=columns)
    torch.linalg.solve_triangular(upper, columns, upper=True, out=columns)
    return B


def next_round(free: Tensor, pull: Tensor, penalty: float, V: Tensor) -> Tensor:
    """Split V + W into D, 2:4, and the new V. Returns where D is kept, bool [n, K].

    free, pull, V: [n, K]. V is changed in place, and so is `free`: W before, T H + rho (D - V) afterwards.
    """
    kernel = kernel_for(FORCE, "cpu/alps", free.device)
    if kernel is not None and hasattr(kernel, "alps_round"):  # a GPU computes it as below
        return kernel.alps_round(free, pull, penalty, V)
    V += free
    kept = keep_two_of_four(V.abs())
    torch.add(pull, torch.where(kept, V, -V), alpha=penalty, out=free)
    V.masked_fill_(kept, 0)
    return kept
