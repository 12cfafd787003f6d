"""The column sweep of Optimal Brain Surgeon: decide one input at a time, let the later inputs repair the error.

One loop serves SparseGPT (it decides masks), GPTQ (it decides codes) and both together, on one Hessian. Columns are
visited in panels, so that most of the repair is a matrix product (lazy batch updates, arXiv 2210.17323, section 3.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.solver.grid import Grid
from sparsify.solver.span import Panel, Select, group_scale, sweep_span

PANEL = 128


@dataclass(frozen=True)
class Swept:
    """weight: [N, K] float32 as it will be stored; codes int8 [N, K] and scale [N, K/G] when it was quantized."""

    weight: Tensor
    codes: Tensor | None
    scale: Tensor | None


def column_sweep(
    W: Tensor,
    U: Tensor,
    grid: Grid | None,
    keep: Tensor | None = None,
    select: Select | None = None,
    order: Tensor | None = None,
    store: torch.dtype = torch.bfloat16,
) -> Swept:
    """Compress W column by column.

    W:      [N, K] float32
    U:      [K, K] upper triangular, U'U = H^-1 (in the visiting order when `order` is given)
    grid:   the quantization grid; None rounds the kept weights to `store`
    keep:   bool [N, K], a mask decided beforehand
    select: decides the 2:4 mask during the sweep
    order:  int64 [K], visit these columns first to last (activation order); whole groups of 4 when `select` is given.
            Scales are then fixed beforehand, so the stored format does not change.
    """
    n, k = W.shape
    scales = None
    if grid is not None and (order is not None or grid.group_size > PANEL):
        scales = _fixed_scales(W, U, grid, keep, select, order)
    if order is not None:
        W = W[:, order]
        keep = keep[:, order] if keep is not None else None
    W = W.t().clone(memory_format=torch.contiguous_format)  # one input per row: every step below touches whole rows
    U = U.contiguous()
    codes = torch.zeros((k, n), dtype=torch.int8, device=W.device) if grid else None
    kept_rows = keep.t().contiguous() if keep is not None else None
    found: list[Tensor] = []
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        inside = slice(start, stop)
        panel = Panel(
            W[inside],
            torch.empty_like(W[inside]),
            U[inside, inside],
            codes[inside] if codes is not None else None,
            kept_rows[inside] if kept_rows is not None else None,
        )
        if grid is None:
            sweep_span(panel, 0, stop - start, None, None, select, store)
        elif scales is not None:
            groups = (order[inside] if order is not None else torch.arange(start, stop)) // grid.group_size
            sweep_span(panel, 0, stop - start, grid, scales[groups], select, store)
        else:
            for first in range(0, stop - start, grid.group_size):
                scale = _group_scale(panel, first, grid, select)
                found.append(scale)
                sweep_span(panel, first, first + grid.group_size, grid, scale[None], select, store)
        if stop < k:
            W[stop:].addmm_(U[inside, stop:].t(), panel.errors, alpha=-1)
    scale_rows = scales if scales is not None else torch.stack(found) if found else None
    weight, codes = W.t(), codes.t() if codes is not None else None
    if order is not None:
        back = torch.argsort(order)
        weight, codes = weight[:, back], codes[:, back] if codes is not None else None
    return Swept(
        weight.contiguous(),
        codes.contiguous() if codes is not None else None,
        scale_rows.t().contiguous().to(grid.dtype) if grid is not None and scale_rows is not None else None,
    )


def _group_scale(panel: Panel, first: int, grid: Grid, select: Select | None) -> Tensor:
    """The scale of the group that begins at input `first` of a panel, from the weights as they are now. Returns [N]."""
    ahead = slice(first, first + grid.group_size)
    keep = panel.keep[ahead] if panel.keep is not None else None
    return group_scale(panel.rows[ahead], panel.U.diagonal()[ahead], grid, keep, select)


def _fixed_scales(
    W: Tensor, U: Tensor, grid: Grid, keep: Tensor | None, select: Select | None, order: Tensor | None
) -> Tensor:
    """Scales [K/G, N] chosen from the weights before the sweep."""
    d = U.diagonal() if order is None else U.diagonal()[torch.argsort(order)]
    rows, kept_rows = W.t().contiguous(), keep.t() if keep is not None else None
    groups = (slice(first, first + grid.group_size) for first in range(0, W.shape[1], grid.group_size))
    return torch.stack(
        [group_scale(rows[g], d[g], grid, kept_rows[g] if kept_rows is not None else None, select) for g in groups]
    )
