"""GPTQ (arXiv 2210.17323): codes by the column sweep, strictly inside a mask, or together with one."""

from torch import Tensor

from sparsify.solver.column_sweep import Select, Swept, column_sweep
from sparsify.solver.grid import Grid


def gptq(
    W: Tensor,
    U: Tensor,
    grid: Grid,
    keep: Tensor | None = None,
    select: Select | None = None,
    order: Tensor | None = None,
) -> Swept:
    """Quantize W: [N, K] float32 on `grid`. U: [K, K] upper factor of the inverse Hessian.

    keep:   bool [N, K], a mask decided beforehand; no code leaves it
    select: decides the mask in the same sweep (the joint pass): the error of a rounding and that of a removal are
            repaired alike, and a scale is chosen from the weights that will probably stay
    """
    return column_sweep(W, U, grid, keep=keep, select=select, order=order)
