"""The column sweep of Optimal Brain Surgeon: decide one input at a time, let the later inputs repair the error.

One loop serves SparseGPT (it decides masks), GPTQ (it decides codes) and both together, on one Hessian. Columns are
visited in panels, so that most of the repair is a matrix product (lazy batch updates, arXiv 2210.17323, section 3.3).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.passes.quantize.grid import Grid, search_scale

PANEL = 128

Select = Callable[[Tensor, Tensor], Tensor]
"""(quad [4, N], d [4]) -> bool [4, N], the two weights to keep of each group of 4; d is the diagonal of U there."""


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
    columns = order if order is not None else torch.arange(k, device=W.device)
    W = W.t().contiguous()  # one input per row: every step below touches whole rows
    codes = torch.zeros((k, n), dtype=torch.int8, device=W.device) if grid else None
    found = torch.zeros((k // grid.group_size, n), device=W.device) if grid else None
    group_of = (columns // grid.group_size).tolist() if grid else []
    kept_rows = keep.t() if keep is not None else None
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        panel, local = W[start:stop], U[start:stop, start:stop]
        errors = torch.empty_like(panel)
        d = local.diagonal()
        kept: Tensor | None = None
        scale: Tensor | None = None
        for i in range(stop - start):
            if select is not None:
                if i % 4 == 0:
                    kept = select(panel[i : i + 4], d[i : i + 4])
                row_kept = kept[i % 4]  # type: ignore[index]
            else:
                row_kept = kept_rows[start + i] if kept_rows is not None else None
            row = panel[i]
            if grid is not None and codes is not None and found is not None:
                if scales is not None:
                    scale = scales[group_of[start + i]]
                elif (start + i) % grid.group_size == 0:
                    ahead = slice(i, i + grid.group_size)
                    scale = search_scale(
                        panel[ahead], grid, _likely_kept(panel[ahead], d[ahead], kept_rows, start + i, select), d[ahead]
                    )
                    found[group_of[start + i]] = scale
                assert scale is not None
                code = (row / scale).round_().clamp_(grid.low, grid.high)
                if row_kept is not None:
                    code.mul_(row_kept)
                codes[start + i] = code
                new = code * scale
            else:
                new = row.to(store).float()
                if row_kept is not None:
                    new = new * row_kept  # not in place: without rounding `new` is the row itself
            errors[i] = (row - new) / d[i]
            panel[i] = new
            if i + 1 < stop - start:
                panel[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        if stop < k:
            W[stop:].addmm_(U[start:stop, stop:].t(), errors, alpha=-1)
    scale_rows = scales if scales is not None else found
    weight, codes = W.t(), codes.t() if codes is not None else None
    if order is not None:
        back = torch.argsort(order)
        weight, codes = weight[:, back], codes[:, back] if codes is not None else None
    return Swept(
        weight.contiguous(),
        codes.contiguous() if codes is not None else None,
        scale_rows.t().contiguous().to(grid.dtype) if grid is not None and scale_rows is not None else None,
    )


def _likely_kept(rows: Tensor, d: Tensor, kept_rows: Tensor | None, first: int, select: Select | None) -> Tensor | None:
    """The mask of a scale group before its sweep: the given one, or what `select` would keep of the weights as they are.

    rows: [G, N]. Returns bool [G, N] or None when nothing is pruned.
    """
    if kept_rows is not None:
        return kept_rows[first : first + rows.shape[0]]
    if select is None:
        return None
    return torch.cat([select(rows[j : j + 4], d[j : j + 4]) for j in range(0, rows.shape[0], 4)])


def _fixed_scales(
    W: Tensor, U: Tensor, grid: Grid, keep: Tensor | None, select: Select | None, order: Tensor | None
) -> Tensor:
    """Scales [K/G, N] chosen from the weights before the sweep."""
    d = U.diagonal() if order is None else U.diagonal()[torch.argsort(order)]
    rows, kept_rows = W.t(), keep.t() if keep is not None else None
    scales = []
    for first in range(0, W.shape[1], grid.group_size):
        ahead = slice(first, first + grid.group_size)
        scales.append(
            search_scale(rows[ahead], grid, _likely_kept(rows[ahead], d[ahead], kept_rows, first, select), d[ahead])
        )
    return torch.stack(scales)
