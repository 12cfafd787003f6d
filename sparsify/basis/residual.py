"""One rotation of the residual stream for the whole model, by gradient descent on orthogonal matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.basis.objective import dropped, rotated_diagonal

RATE = 0.01
SAMPLED = 1024  # rows, or columns by fours, of a matrix that the rotation is chosen on


@dataclass(frozen=True)
class Reading:
    """Rows of linears that read the stream, gains of the norm before them included. W: [n, d]; inverse: H^-1 [d, d] of what
    they read without those gains; total: tr(W H W') of these rows."""

    W: Tensor
    inverse: Tensor
    total: float

    def loss(self, Q: Tensor) -> Tensor:
        return dropped(self.W @ Q, rotated_diagonal(self.inverse, Q)) / self.total


@dataclass(frozen=True)
class Writing:
    """Columns, by fours, of a linear that writes the stream. W: [d, k]; inverse_diagonal: [k] of H^-1; total: tr(W H W')."""

    W: Tensor
    inverse_diagonal: Tensor
    total: float

    def loss(self, Q: Tensor) -> Tensor:
        return dropped(Q.t() @ self.W, self.inverse_diagonal) / self.total


def orthogonal(A: Tensor) -> Tensor:
    """The orthogonal factor of A = QR with a positive diagonal of R: smooth in A, and A itself where that is orthogonal.

    A: [..., n, n]
    """
    Q, R = torch.linalg.qr(A)
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def keeping_ones(width: int) -> Tensor:
    """An orthogonal matrix [width, width] whose first column has equal entries: a Householder reflection."""
    v = torch.full((width,), width**-0.5, dtype=torch.float64)
    v[0] -= 1
    eye = torch.eye(width, dtype=torch.float64)
    return eye if width == 1 else eye - 2 * torch.outer(v, v) / v.dot(v)


def residual_rotation(
    parts: Sequence[Reading | Writing], width: int, steps: int, centred: bool, tick: Callable[[float], None]
) -> Tensor:
    """An orthogonal Q, float64 [width, width], under which 2:4 drops the least of all parts, each counted the same.

    centred: the model has norms that subtract the mean, so Q has to map the vector of ones to itself
    tick: called before the first step and after each with the mean share that is dropped
    """
    around = keeping_ones(width) if centred else None
    size = width - 1 if centred else width
    A = torch.eye(size, requires_grad=True)
    optimizer = torch.optim.Adam([A], lr=RATE)
    best, least = torch.eye(width, dtype=torch.float64), float("inf")
    for step in range(steps + 1):
        inner = orthogonal(A)
        Q = inner if around is None else _bordered(inner, around.to(inner.dtype))
        point = Q.detach().requires_grad_()
        share = 0.0
        for part in parts:
            loss = part.loss(point) / len(parts)
            loss.backward()
            share += float(loss.detach())
        if share < least:
            best, least = Q.detach().double(), share
        tick(share)
        if step < steps:
            optimizer.zero_grad()
            Q.backward(point.grad)
            optimizer.step()
    return _exactly_orthogonal(best, around)


def _bordered(inner: Tensor, around: Tensor) -> Tensor:
    """around diag(1, inner) around': leaves the first column of `around` where it is."""
    whole = torch.block_diag(torch.ones(1, 1, dtype=inner.dtype), inner)
    return around @ whole @ around.t()


def _exactly_orthogonal(Q: Tensor, around: Tensor | None) -> Tensor:
    """Q to the last bit of float64, after it was found in float32."""
    if around is None:
        return orthogonal(Q)
    inner = orthogonal((around.t() @ Q @ around)[1:, 1:])
    return _bordered(inner, around)
