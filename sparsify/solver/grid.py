"""The symmetric integer grid: w ~ scale * code, one scale for every G consecutive inputs of an output."""

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

    @property
    def low(self) -> int:
        return CODE_RANGE[self.bits][0]

    @property
    def high(self) -> int:
        return CODE_RANGE[self.bits][1]


def search_scale(rows: Tensor, grid: Grid, kept: Tensor | None, d: Tensor | None) -> Tensor:
    """The scale of one group for every output: the clipping ratio with the least error, already rounded to `grid.dtype`.

    rows: [G, N], the group's inputs; kept: bool [G, N] or None; d: [G], the diagonal of U, which weighs an error at
    input g by 1/d[g]^2, what the sweep pays for it; None weighs all alike. Returns float32 [N], never zero.
    """
    if rows.shape[1] > CHUNK and rows.device.type == "cpu":
        pieces = range(0, rows.shape[1], CHUNK)
        masks = [None if kept is None else kept[:, i : i + CHUNK] for i in pieces]
        return torch.cat([search_scale(rows[:, i : i + CHUNK], grid, m, d) for i, m in zip(pieces, masks, strict=True)])
    if kept is not None:
        rows = rows * kept
    smallest = torch.finfo(grid.dtype).tiny
    full = rows.abs().amax(0) / (grid.high + 0.5)
    weight = None if d is None else d[:, None] ** -2
    best_error: Tensor | None = None
    best = full
    for ratio in SHRINK if grid.search else (1.0,):
        scale = (full * ratio).to(grid.dtype).float().clamp_(min=smallest)
        error = (rows / scale).round_().clamp_(grid.low, grid.high).mul_(scale).sub_(rows).square_()
        total = (error if weight is None else error.mul_(weight)).sum(0)
        if best_error is None:
            best_error, best = total, scale
        else:
            better = total < best_error
            best, best_error = torch.where(better, scale, best), torch.minimum(total, best_error)
    return best


def round_to_nearest(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Every weight to the closest point of its grid; no data is needed, and zeros stay zeros, so a mask survives.

    W: [N, K] float32. Returns codes int8 [N, K] and scale [N, K/G].
    """
    n, k = W.shape
    groups = W.reshape(n * (k // grid.group_size), grid.group_size)
    scale = search_scale(groups.t(), grid, None, None)
    codes = (groups / scale[:, None]).round_().clamp_(grid.low, grid.high).to(torch.int8)
    return codes.reshape(n, k), scale.reshape(n, k // grid.group_size).to(grid.dtype)
