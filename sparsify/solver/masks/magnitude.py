"""Magnitude pruning: of every 4 consecutive weights the two largest stay. No data needed."""

import torch
from torch import Tensor


def keep_two_of_four(importance: Tensor) -> Tensor:
    """bool [N, K]: the two most important of every 4 consecutive entries of importance: [N, K]; ties keep the first."""
    quads = importance.reshape(-1, 4).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    a, b, c, d = quads.t().contiguous()
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d  # which of two comes first
    kept = torch.stack([_two(ab, ac, ad), _two(~ab, bc, bd), _two(~ac, ~bc, cd), _two(~ad, ~bd, ~cd)], dim=1)
    return kept.reshape(importance.shape)


def _two(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Whether two of three hold at least."""
    return (x & y) | (z & (x | y))


def magnitude_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """Importance |w|. W: [N, K]."""
    return keep_two_of_four(W.abs())
