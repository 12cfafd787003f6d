"""Coordinate descent on the exact layer error, after the column sweep: masks, codes and scales together.

The sweep decides each input once, not knowing what becomes of the later ones. Here every group of four inputs is decided
again, given all other weights as they are stored: the best support of two (a swap of the mask, where one helps), its
values, and from time to time each scale. Every step lowers e = (w - t)' H (w - t), so the result is never worse than the
sweep's. Cyclic descent on codes is that of QuantEase (arXiv 2309.01885), exchanges of the support that of ALPS
(arXiv 2406.07831, section 3); here one step does both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from sparsify.processor import kernel_level
from sparsify.solver.dispatch import faster_way
from sparsify.solver.grid import Grid

FORCE = "SPARSIFY_REFINE"
PANEL = 64


@dataclass(frozen=True)
class Refined:
    """weight: [N, K] float32 as it will be stored; codes int8 [N, K] and scale [N, K/G] with a grid, else None."""

    weight: Tensor
    codes: Tensor | None
    scale: Tensor | None


@torch.no_grad()
def refine(
    W: Tensor,
    target: Tensor,
    H: Tensor,
    sweeps: int,
    *,
    scale: Tensor | None = None,
    grid: Grid | None = None,
    keep: Tensor | None = None,
    select: bool = False,
    store: torch.dtype = torch.bfloat16,
) -> Refined:
    """Lower sum_n (W - target)_n' H (W - target)_n, visiting every input `sweeps` times.

    W:      [N, K] float32, stored weights: on the grid when there is one, at most two of four when `select`
    target: [N, K] float32
    H:      [K, K] float32, the damped Hessian
    scale:  [N, K/G], of W on `grid`
    keep:   bool [N, K], which weights may differ from zero; None for all
    select: choose the two of every four instead
    SPARSIFY_REFINE=torch, native or triton forces one of the three ways.
    """
    rows = W.t().clone(memory_format=torch.contiguous_format)
    kept = keep.t().contiguous() if keep is not None else None
    units = scale.float().t().contiguous() if scale is not None else None  # [K/G, N]
    group = grid.group_size if grid is not None else PANEL
    size = group if group <= 2 * PANEL else PANEL
    G = H @ (rows - target.t())
    for _ in range(sweeps):
        for start in range(0, rows.shape[0], size):
            inside = slice(start, min(start + size, rows.shape[0]))
            unit = units[start // group] if units is not None else None
            before = rows[inside].clone()
            mask = kept[inside] if kept is not None else None
            H_inside, G_inside = H[inside, inside].contiguous(), G[inside].clone()
            visit_panel(rows[inside], G_inside, H_inside, unit, grid, mask, select, store)
            if unit is not None and grid is not None and group == size:
                _refit_scale(rows[inside], G_inside, H_inside, unit, grid)
            G.addmm_(H[:, inside], rows[inside] - before)
        if units is not None and grid is not None and group != size:
            for index, unit in enumerate(units):
                inside = slice(index * group, (index + 1) * group)
                before = rows[inside].clone()
                _refit_scale(rows[inside], G[inside], H[inside, inside], unit, grid)
                G.addmm_(H[:, inside], rows[inside] - before)
    if units is None or grid is None:
        return Refined(rows.t().contiguous(), None, None)
    codes = (rows / units.repeat_interleave(group, 0)).round_().to(torch.int8)
    return Refined(rows.t().contiguous(), codes.t().contiguous(), units.t().contiguous().to(grid.dtype))


def _refit_scale(rows: Tensor, G: Tensor, H: Tensor, unit: Tensor, grid: Grid) -> None:
    """Move the scales of one group to their least-squares values, codes fixed. Changes rows and unit in place.

    rows, G: [G, N], weights and half gradient; H: [G, G]; unit: [N].
    """
    codes = (rows / unit).round_()
    curvature = (codes * (H @ codes)).sum(0)
    slope = (codes * G).sum(0)
    best = (unit - slope / curvature.clamp(min=1e-30)).to(grid.dtype).float()
    step = best - unit
    helps = (best > torch.finfo(grid.dtype).tiny) & (step * (2 * slope + step * curvature) < 0)
    unit.copy_(torch.where(helps, best, unit))
    torch.mul(codes, unit, out=rows)


def visit_panel(
    W: Tensor, G: Tensor, H: Tensor, scale: Tensor | None, grid: Grid | None,
    keep: Tensor | None, select: bool, store: torch.dtype,
) -> None:  # fmt: skip
    """Decide every input of a panel once. W, keep: [B, N]; G: [B, N] half gradient; H: [B, B]; scale: [N]. Changes W and G."""
    known = grid is not None or store in (torch.bfloat16, torch.float32)
    way = faster_way(FORCE, "cpu/coordinate_descent", W.device) if known else None
    if way is None:
        _in_torch(W, G, H, scale, grid, keep, select, store)
        return
    if not isinstance(way, ctypes.CDLL):
        way.refine_panel(W, G, H, scale, grid, keep, select, store)
        return
    assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (W, G, H, keep) if t is not None)
    way.sparsify_refine_panel(
        _pointer(W), _int64(W.stride(0)), _pointer(G), _int64(G.stride(0)), _pointer(H), _int64(H.stride(0)),
        W.shape[0], _int64(W.shape[1]), _pointer(scale),
        ctypes.c_float(grid.low if grid else 0), ctypes.c_float(grid.high if grid else 0),
        _pointer(keep), _int64(keep.stride(0) if keep is not None else 0),
        int(select), int(store == torch.bfloat16), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip


def _in_torch(
    W: Tensor, G: Tensor, H: Tensor, scale: Tensor | None, grid: Grid | None,
    keep: Tensor | None, select: bool, store: torch.dtype,
) -> None:  # fmt: skip
    def stored(x: Tensor) -> Tensor:
        if grid is None or scale is None:
            return x.to(store).float()
        return (x / scale).round_().clamp_(grid.low, grid.high).mul_(scale)

    step = 4 if select else 1
    scalars = H.cpu()  # a branch on a number that lies on a GPU would wait for all the work before it
    for i in range(0, W.shape[0], step):
        of_four = slice(i, i + step)
        before = W[of_four].clone()
        if select:
            W[of_four] = _best_two(before, G[of_four], H[of_four, of_four], scalars[of_four, of_four], stored)
        elif (curvature := scalars[i, i]) > 0:
            new = stored(before[0] - G[i] / curvature)
            change = new - before[0]
            better = change * (curvature * change + 2 * G[i]) < 0
            W[i] = torch.where(better if keep is None else better & keep[i], new, before[0])
        G.addmm_(H[:, of_four], W[of_four] - before)


def _best_two(v: Tensor, g: Tensor, H: Tensor, A: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
    """The best support of two and its stored values. v, g: [4, N], weights and half gradient. Returns [4, N].

    H: [4, 4]; A: the same on the CPU, for the numbers in it
    """
    b = H @ v - g
    best, least = v, (v * (H @ v - 2 * b)).sum(0)
    for r, s in permutations(range(4), 2):  # r is rounded first, s knows what r lost
        if A[s, s] <= 0:
            continue
        det = A[r, r] * A[s, s] - A[r, s] ** 2
        regular = det > 1e-6 * A[r, r] * A[s, s]
        x = (A[s, s] * b[r] - A[r, s] * b[s]) / det if regular else b[r] / A[r, r] if A[r, r] > 0 else 0 * b[r]
        new = torch.zeros_like(v)
        new[r] = stored(x)
        new[s] = stored((b[s] - A[r, s] * new[r]) / A[s, s])
        error = (new * (H @ new - 2 * b)).sum(0)
        better = error < least
        best, least = torch.where(better, new, best), torch.where(better, error, least)
    return best


_int64 = ctypes.c_int64


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
