"""A rotation of the values of every key-value head of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.basis.objective import rotated_diagonal, two_smallest
from sparsify.basis.residual import orthogonal

RATE = 0.02


def head_blocks(inverse: Tensor, query_heads: int) -> Tensor:
    """The diagonal blocks of H^-1 of what the output projection reads: [query_heads, h, h] of [K, K] with K = query_heads h."""
    size = inverse.shape[0] // query_heads
    return torch.stack([inverse[i : i + size, i : i + size] for i in range(0, inverse.shape[0], size)])


def head_rotations(W: Tensor, blocks: Tensor, value_heads: int, steps: int) -> Tensor:
    """Orthogonal matrices, float64 [value_heads, h, h], under which 2:4 drops the least of the output projection.

    W: [N, K]; blocks: [query_heads, h, h] as of `head_blocks`. Query heads that share values share their rotation.
    """
    query_heads, size = blocks.shape[0], blocks.shape[1]
    repeats = query_heads // value_heads
    by_head = W.unflatten(1, (query_heads, size)).transpose(0, 1)
    total = two_smallest((W.square().unflatten(1, (query_heads, size)) / blocks.diagonal(dim1=1, dim2=2)).flatten(1))
    A = torch.eye(size).repeat(value_heads, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([A], lr=RATE)
    best, least = torch.eye(size).repeat(value_heads, 1, 1), float("inf")
    for step in range(steps + 1):
        Q = orthogonal(A)
        each = Q.repeat_interleave(repeats, 0)
        costs = (by_head @ each).square() / rotated_diagonal(blocks, each).unsqueeze(1)
        loss = two_smallest(costs) / total
        if float(loss.detach()) < least:
            best, least = Q.detach(), float(loss.detach())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return orthogonal(best.double())
