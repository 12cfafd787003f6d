"""Round-to-nearest: every weight to the closest point of its grid, no data needed."""

import torch
from torch import Tensor

from sparsify.solver.grid import Grid, search_scale


def round_to_nearest(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale [N, K/G] of W: [N, K] float32. Zeros stay zeros, so a mask survives."""
    n, k = W.shape
    groups = W.reshape(n * (k // grid.group_size), grid.group_size)
    scale = search_scale(groups.t(), grid, None, None)
    codes = (groups / scale[:, None]).round_().clamp_(grid.low, grid.high).to(torch.int8)
    return codes.reshape(n, k), scale.reshape(n, k // grid.group_size).to(grid.dtype)
