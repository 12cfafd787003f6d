"""What 2:4 sparsity loses in a matrix, as a share of what the matrix gives.

Dropping weight w_j of a row costs w_j^2 / [H^-1]_jj when all other weights of the row may make up for it (Optimal Brain
Surgeon; SparseGPT, arXiv 2301.00774, equation 3). The two weights of four that are dropped are those of the smallest cost,
and the share is their sum over tr(W H W'), which no rotation changes. W^2 diag(H), which takes no account of what the
other weights make up for, falls by twice as much and gains nothing in perplexity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def two_smallest(costs: Tensor) -> Tensor:
    """The sum of the two smallest of every four consecutive costs, over all. costs: [..., K]; returns a scalar."""
    a, b, c, d = costs.unflatten(-1, (-1, 4)).unbind(-1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    other_low, other_high = torch.minimum(c, d), torch.maximum(c, d)
    least = torch.minimum(low, other_low)
    next_to_least = torch.minimum(torch.maximum(low, other_low), torch.minimum(high, other_high))
    return (least + next_to_least).sum()


def dropped(W: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """What 2:4 drops of W [N, K]: the two smallest w_j^2 / [H^-1]_jj of every four. inverse_diagonal: [K] of H^-1."""
    return two_smallest(W.square() / inverse_diagonal)


def rotated_diagonal(inverse: Tensor, Q: Tensor) -> Tensor:
    """The diagonal of (Q'HQ)^-1 = Q'H^-1 Q. inverse: H^-1 [K, K]; Q: [K, K] orthogonal."""
    return (Q * (inverse @ Q)).sum(-2)
