"""Pruning methods. To add one: its file here, its line in METHODS, a recipe, a test."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparsify.solver.masks.alps import alps_mask
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from sparsify.solver.masks.wanda import wanda_mask


@dataclass(frozen=True)
class PruneMethod:
    """How a method finds a 2:4 mask.

    mask:   (W [N, K], H [K, K] or None) -> bool [N, K], decided before any weight moves
    select: (quad [4, N], d [4]) -> bool [4, N], decided during the column sweep
    solves: the mask belongs to a solution of the layer's problem: it wants the damped Hessian, the kept weights are swept
            to make up for the others, and refinement may still exchange what is kept
    """

    needs_data: bool
    mask: Callable[[Tensor, Tensor | None], Tensor] | None = None
    select: Callable[[Tensor, Tensor], Tensor] | None = None
    solves: bool = False


METHODS = {
    "magnitude": PruneMethod(needs_data=False, mask=magnitude_mask),
    "wanda": PruneMethod(needs_data=True, mask=wanda_mask),
    "sparsegpt": PruneMethod(needs_data=True, select=sparsegpt_select, solves=True),
    "alps": PruneMethod(needs_data=True, mask=alps_mask, solves=True),
}
