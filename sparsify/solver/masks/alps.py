"""ALPS (arXiv 2406.07831): the mask as the solution of the layer's least-squares problem by ADMM, all inputs at once.

minimise (W - T)' H (W - T) over W whose every 4 consecutive inputs keep at most two. Split into W, free, and D, 2:4, which
must agree (section 3.1): W solves a linear system, D projects, V collects their disagreement, and the penalty rho grows
until the support of D stands still. Inputs are scaled to a unit diagonal of H first (section 3.2).
"""

import torch
from torch import Tensor

from sparsify.solver.masks.magnitude import keep_two_of_four

ITERATIONS = 30
PENALTY = 0.08  # of a Hessian with unit diagonal, at the start
GROWTH = 1.12
ROWS = 1024  # outputs that are solved together: a dozen matrices of their size are alive at once


def alps_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """bool [N, K], two of every four. W: [N, K], the weights whose outputs are wanted; H: [K, K], the damped Hessian."""
    assert H is not None
    size = H.diagonal().sqrt()
    scaled = (H / size[:, None]).div_(size)
    target = W * size
    pull = target @ scaled
    eigenvalues, Q = torch.linalg.eigh(scaled)
    del scaled
    pieces = zip(target.split(ROWS), pull.split(ROWS), strict=True)
    return torch.cat([_admm(rows, pulled, eigenvalues, Q) for rows, pulled in pieces])


def _admm(target: Tensor, pull: Tensor, eigenvalues: Tensor, Q: Tensor) -> Tensor:
    """The mask of some rows, which do not depend on each other. target, pull: [n, K], T and T H; H = Q diag(eigenvalues) Q'."""
    D = target * keep_two_of_four(target.abs())
    V = torch.zeros_like(D)
    penalty = PENALTY
    for _ in range(ITERATIONS):
        free = ((pull + penalty * (D - V)) @ Q).div_(eigenvalues + penalty) @ Q.t()
        V += free
        D = V * keep_two_of_four(V.abs())
        V -= D
        penalty *= GROWTH
    return keep_two_of_four((D + V).abs())
