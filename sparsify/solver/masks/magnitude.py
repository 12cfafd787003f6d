"""Magnitude pruning: of every 4 consecutive weights the two largest stay. No data needed."""

import torch
from torch import Tensor


def keep_two_of_four(importance: Tensor) -> Tensor:
    """bool [N, K]: the two most important of every 4 consecutive entries of importance: [N, K]; ties keep the first."""
    quads = importance.reshape(-1, 4)
    first_two = quads.argsort(dim=1, descending=True, stable=True)[:, :2]
    return torch.zeros_like(quads, dtype=torch.bool).scatter_(1, first_two, True).reshape(importance.shape)


def magnitude_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """Importance |w|. W: [N, K]."""
    return keep_two_of_four(W.abs())
