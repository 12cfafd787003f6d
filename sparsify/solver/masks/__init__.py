"""Pruning methods. To add one: its file here, its line in METHODS and in `recipe/methods.py`, a recipe, a test."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparsify.solver.masks.alps import alps_mask
from sparsify.solver.masks.keep import keep_mask
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from sparsify.solver.masks.wanda import wanda_mask


@dataclass(frozen=True)
class PruneMethod:
    """How a method finds a 2:4 mask.

    mask:   (W [N, K], H [K, K] or None) -> bool [N, K], decided before any weight moves
    select: (quad [4, N], d [4]) -> bool [4, N], decided during the column sweep

    What it needs of the text stands in `recipe/methods.py`. A mask that belongs to a solution of the layer's problem (with a
    Hessian there) gets the damped H, its kept weights are swept to make up for the others, and coordinate descent may still
    exchange what is kept.
    """

    mask: Callable[[Tensor, Tensor | None], Tensor] | None = None
    select: Callable[[Tensor, Tensor], Tensor] | None = None


METHODS = {
    "keep": PruneMethod(mask=keep_mask),
    "magnitude": PruneMethod(mask=magnitude_mask),
    "wanda": PruneMethod(mask=wanda_mask),
    "sparsegpt": PruneMethod(select=sparsegpt_select),
    "alps": PruneMethod(mask=alps_mask),
}
