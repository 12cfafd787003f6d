"""ALPS (arXiv 2406.07831): the mask as the solution of the layer's least-squares problem by ADMM, all inputs at once.

minimise (W - T)' H (W - T) over W whose every 4 consecutive inputs keep at most two. Split into W, free, and D, 2:4, which
must agree (section 3.1): W solves a linear system, D projects, V collects their disagreement, and the penalty rho grows
until the support of D stands still. Inputs are scaled to a unit diagonal of H first (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.solver.dispatch import kernel_for
from sparsify.solver.masks.magnitude import keep_two_of_four

FORCE = "SPARSIFY_ALPS"
ITERATIONS = 15
PENALTY = 0.08  # of a Hessian with unit diagonal, at the start
GROWTH = 1.25
ROWS = 1024  # outputs that are solved together: half a dozen matrices of their size are alive at once


def alps_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """bool [N, K], two of every four. W: [N, K], the weights whose outputs are wanted; H: [K, K], the damped Hessian.

    SPARSIFY_ALPS=torch or native forces the kernel.
    """
    assert H is not None
    size = H.diagonal().sqrt()
    scaled = (H / size[:, None]).div_(size)
    target = W * size
    pull = target @ scaled
    eigenvalues, Q = torch.linalg.eigh(scaled)
    del scaled
    rows = rows_together(*W.shape)
    pieces = zip(target.split(rows), pull.split(rows), strict=True)
    return torch.cat([_admm(piece, pulled, eigenvalues, Q) for piece, pulled in pieces])


def rows_together(outputs: int, inputs: int) -> int:
    """How many outputs of N are solved together. More where they share the inverse of each round's system (`_solver`)."""
    return ROWS if outputs <= inputs else max(ROWS, 4 * inputs)


def _admm(target: Tensor, pull: Tensor, eigenvalues: Tensor, Q: Tensor) -> Tensor:
    """The mask of some rows, which do not depend on each other. target, pull: [n, K], T and T H; H = Q diag(eigenvalues) Q'."""
    penalty = PENALTY
    right = pull + penalty * target * keep_two_of_four(target.abs())
    V = torch.zeros_like(target)
    for _ in range(ITERATIONS):
        W = _solver(eigenvalues + penalty, Q, target.shape[0])(right)
        penalty *= GROWTH
        kept = next_round(W, pull, penalty, V, right)
    return kept


def _solver(shifted: Tensor, Q: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """X -> X (H + rho I)^-1 with H + rho I = Q diag(shifted) Q', in the fewest operations for so many rows of X."""
    if rows <= Q.shape[0]:
        return lambda X: (X @ Q).div_(shifted) @ Q.t()
    inverse = (Q / shifted) @ Q.t()
    return lambda X: X @ inverse


def next_round(W: Tensor, pull: Tensor, penalty: float, V: Tensor, right: Tensor) -> Tensor:
    """Split V + W into D, 2:4, and the new V. Returns where D is kept, bool [n, K].

    W, pull, V, right: [n, K]; V and right, which becomes T H + rho (D - V), are changed in place.
    """
    kernel = kernel_for(FORCE, "cpu/alps", W.device)
    if kernel is not None and hasattr(kernel, "alps_round"):  # a GPU computes it as below
        return kernel.alps_round(W, pull, penalty, V, right)
    V += W
    kept = keep_two_of_four(V.abs())
    torch.add(pull, torch.where(kept, V, -V), alpha=penalty, out=right)
    V.masked_fill_(kept, 0)
    return kept
