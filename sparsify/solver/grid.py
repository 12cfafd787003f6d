"""The integer grid: w ~ scale * (code - zero point), one of each for every G consecutive inputs of an output.

A symmetric grid has no zero points: they are 0. An asymmetric one reaches from the smallest weight of the group to the largest,
zero included: scale = (max - min) / (2^bits - 1) and zero point = round(low - min / scale), where codes begin at low
(GPTQ, arXiv 2210.17323, `quant.py` of its code; compressed-tensors, `calculate_qparams`). Zero is a point of either grid, so a
pruned weight stays exactly zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.model.linear import CODE_RANGE

SHRINK = tuple(1 - 0.025 * i for i in range(17))  # clipping ratios that the search tries: 1.0 down to 0.6
CHUNK = 1024  # outputs searched at once: so many times a group stays in the cache through all ratios


@dataclass(frozen=True)
class Grid:
    """bits: 4 or 8; group_size: inputs per scale; dtype: how scales are stored; search: try clipping ratios."""

    bits: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16
    search: bool = True
    symmetric: bool = True

    @property
    def low(self) -> int:
        return CODE_RANGE[self.bits][0]

    @property
    def high(self) -> int:
        return CODE_RANGE[self.bits][1]


Scales = tuple[Tensor, Tensor | None]
"""Scales and zero points of the outputs, float32 of one shape; no zero points where the grid is symmetric."""


def rounded(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """clamp(round(x / scale)), the code less the zero point: float32 in the shape of x. scale, zero: what broadcasts to x."""
    steps = (x / scale).round_()
    if zero is None:
        return steps.clamp_(grid.low, grid.high)
    return steps.clamp_(grid.low - zero, grid.high - zero)


def search_scale(rows: Tensor, grid: Grid, kept: Tensor | None, d: Tensor | None) -> Scales:
    """The scale of one group for every output: the clipping ratio with the least error, already rounded to `grid.dtype`.

    rows: [G, N], the group's inputs; kept: bool [G, N] or None; d: [G], the diagonal of U, which weighs an error at
    input g by 1/d[g]^2, what the sweep pays for it; None weighs all alike. A ratio shrinks the range of an asymmetric grid
    toward zero from both ends. Returns float32 [N], never zero, and the zero points.
    """
    if rows.shape[1] > CHUNK and rows.device.type == "cpu":
        pieces = range(0, rows.shape[1], CHUNK)
        masks = [None if kept is None else kept[:, i : i + CHUNK] for i in pieces]
        found = [search_scale(rows[:, i : i + CHUNK], grid, m, d) for i, m in zip(pieces, masks, strict=True)]
        zeros = [zero for _, zero in found if zero is not None]
        return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None
    if kept is not None:
        rows = rows * kept
    smallest = torch.finfo(grid.dtype).tiny
    least = rows.amin(0).clamp_(max=0)  # of the weights; their range includes zero
    if grid.symmetric:
        full = rows.abs().amax(0) / (grid.high + 0.5)
    else:
        full = (rows.amax(0).clamp_(min=0) - least) / (grid.high - grid.low)
    weight = None if d is None else d[:, None] ** -2
    best_error: Tensor | None = None
    best, best_zero = full, None
    for ratio in SHRINK if grid.search else (1.0,):
        scale = (full * ratio).to(grid.dtype).float().clamp_(min=smallest)
        zero = None if grid.symmetric else (grid.low - least * ratio / scale).round_().clamp_(grid.low, grid.high)
        error = rounded(rows, scale, zero, grid).mul_(scale).sub_(rows).square_()
        total = (error if weight is None else error.mul_(weight)).sum(0)
        if best_error is None:
            best_error, best, best_zero = total, scale, zero
            continue
        better = total < best_error
        best, best_error = torch.where(better, scale, best), torch.minimum(total, best_error)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best, best_zero


def round_to_nearest(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every weight to the closest point of its grid; no data is needed, and zeros stay zeros, so a mask survives.

    W: [N, K] float32. Returns codes int8 [N, K], scale [N, K/G] and zero points int8 [N, K/G], None for a symmetric grid.
    """
    n, k = W.shape
    groups = W.reshape(n * (k // grid.group_size), grid.group_size)
    scale, zero = search_scale(groups.t(), grid, None, None)
    codes = rounded(groups, scale[:, None], None if zero is None else zero[:, None], grid)
    if zero is not None:
        codes += zero[:, None]
    shape = (n, k // grid.group_size)
    zero_point = None if zero is None else zero.to(torch.int8).reshape(shape)
    return codes.to(torch.int8).reshape(n, k), scale.reshape(shape).to(grid.dtype), zero_point
