"""GPTQ (arXiv 2210.17323): codes by the column sweep, strictly inside a mask when there is one."""

from torch import Tensor

from sparsify.passes.quantize.grid import Grid
from sparsify.passes.sweep import Swept, column_sweep


def gptq(W: Tensor, U: Tensor, grid: Grid, keep: Tensor | None = None, order: Tensor | None = None) -> Swept:
    """Quantize W: [N, K] float32 on `grid`. U: [K, K] upper factor of the inverse Hessian; keep: bool [N, K] or None."""
    return column_sweep(W, U, grid, keep=keep, order=order)
