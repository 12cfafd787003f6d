"""Coordinate descent on the exact layer error, after the column sweep: masks, codes and scales together.

The sweep decides each column once, not knowing what becomes of the later ones. Here every group of four columns is decided
again, given all other weights as they are stored: the best support of two (a swap of the mask, where one helps), its
values, and from time to time each scale. Every step lowers e = (w - t)' H (w - t), so the result is never worse than the
sweep's. Cyclic descent on codes is that of QuantEase (arXiv 2309.01885), exchanges of the support that of ALPS
(arXiv 2406.07831, section 3); here one step does both.

The half gradient of a block, H (w - t), is computed anew at every visit: one product with all inputs of what the weights are
off by, where keeping it up to date would be one of the same size after every visit, and would read and write all of it.

W is held transposed, [K, N], as in `column_sweep.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from sparsify.solver.column_sweep import Solved
from sparsify.solver.dispatch import kernel_for
from sparsify.solver.grid import Grid, rounded

FORCE = "SPARSIFY_COORDINATE_DESCENT"
BLOCKSIZE = 64
LARGEST = 2 * BLOCKSIZE  # group that is visited as one block


@torch.no_grad()
def coordinate_descent(
    solved: Solved,
    target: Tensor,
    H: Tensor,
    passes: int,
    *,
    grid: Grid | None = None,
    mask: Tensor | None = None,
    two_four: bool = False,
    store: torch.dtype = torch.bfloat16,
) -> Solved:
    """Lower sum_n (W - target)_n' H (W - target)_n, visiting every column `passes` times.

    solved: W [N, K], with its scales (and zero points, which stay) on `grid` when there is one, at most two of four when `two_four`
    target: [N, K] float32
    H:      [K, K] float32, the damped Hessian
    mask:   bool [N, K], which weights may differ from zero; None for all
    two_four: choose the two of every four instead
    store:  type of the stored values where there is no grid
    SPARSIFY_COORDINATE_DESCENT=torch, native or triton forces the kernel.
    """
    if not passes:
        return solved
    W = solved.weight.t().clone(memory_format=torch.contiguous_format)
    off = (solved.weight - target).contiguous()  # [N, K]
    mask = mask.t().contiguous() if mask is not None else None
    scales = solved.scale.float().t().contiguous() if solved.scale is not None else None  # [K/G, N]
    zeros = solved.zero_point.float().t().contiguous() if solved.zero_point is not None else None
    group = grid.group_size if grid is not None else BLOCKSIZE
    size = group if group <= LARGEST else BLOCKSIZE
    for _ in range(passes):
        for start in range(0, W.shape[0], size):
            columns = slice(start, min(start + size, W.shape[0]))
            unit, zero = (None if t is None else t[start // group] for t in (scales, zeros))
            kept = mask[columns] if mask is not None else None
            H_block, G = H[columns, columns].contiguous(), H[columns] @ off.t()
            visit_block(W[columns], G, H_block, unit, zero, grid, kept, two_four, store)
            if unit is not None and grid is not None and group == size:
                refit_scale(W[columns], G, H_block, unit, grid)
            torch.sub(W[columns].t(), target[:, columns], out=off[:, columns])
        if scales is not None and grid is not None and group != size:
            for index, unit in enumerate(scales):
                columns = slice(index * group, (index + 1) * group)
                refit_scale(W[columns], H[columns] @ off.t(), H[columns, columns], unit, grid)
                torch.sub(W[columns].t(), target[:, columns], out=off[:, columns])
    del off
    if scales is None or grid is None:
        return Solved(W.t())
    codes = torch.empty_like(W, dtype=torch.int8)
    for index, unit in enumerate(scales):
        columns = slice(index * group, (index + 1) * group)
        code = (W[columns] / unit).round_()
        codes[columns] = code if zeros is None else code.add_(zeros[index])
    scale = scales.t().contiguous().to(grid.dtype)
    return Solved(W.t(), codes.t().contiguous(), scale, solved.zero_point)


def refit_scale(W: Tensor, G: Tensor, H: Tensor, unit: Tensor, grid: Grid) -> None:
    """Move the scales of one group to their least-squares values, codes and zero points fixed. Changes W and unit in place.

    W, G: [G, N], weights and half gradient; H: [G, G]; unit: [N].
    """
    kernel = kernel_for(FORCE, "cpu/coordinate_descent", W.device)
    if kernel is not None and W.shape[0] <= LARGEST and hasattr(kernel, "refit_scale"):  # a GPU computes it as below
        kernel.refit_scale(W, G, H, unit, grid)
        return
    codes = (W / unit).round_()
    curvature = (codes * (H @ codes)).sum(0)
    slope = (codes * G).sum(0)
    best = (unit - slope / curvature.clamp(min=1e-30)).to(grid.dtype).float()
    step = best - unit
    helps = (best > torch.finfo(grid.dtype).tiny) & (step * (2 * slope + step * curvature) < 0)
    unit.copy_(torch.where(helps, best, unit))
    torch.mul(codes, unit, out=W)


def visit_block(
    W: Tensor, G: Tensor, H: Tensor, scale: Tensor | None, zero: Tensor | None, grid: Grid | None,
    mask: Tensor | None, two_four: bool, store: torch.dtype,
) -> None:  # fmt: skip
    """Decide every column of a block once. Changes W and G.

    W, mask: [B, N]; G: [B, N] half gradient; H: [B, B]; scale, zero: [N], zero points where the grid has them
    """
    known = grid is not None or store in (torch.bfloat16, torch.float32)
    if known and (kernel := kernel_for(FORCE, "cpu/coordinate_descent", W.device)) is not None:
        kernel.visit_block(W, G, H, scale, zero, grid, mask, two_four, store)
        return

    def stored(x: Tensor) -> Tensor:
        if grid is None or scale is None:
            return x.to(store).float()
        return rounded(x, scale, zero, grid).mul_(scale)

    step = 4 if two_four else 1
    scalars = H.cpu()  # a branch on a number that lies on a GPU would wait for all the work before it
    for i in range(0, W.shape[0], step):
        here = slice(i, i + step)
        before = W[here].clone()
        if two_four:
            W[here] = _best_two(before, G[here], H[here, here], scalars[here, here], stored)
        elif (curvature := scalars[i, i]) > 0:
            new = stored(before[0] - G[i] / curvature)
            change = new - before[0]
            better = change * (curvature * change + 2 * G[i]) < 0
            W[i] = torch.where(better if mask is None else better & mask[i], new, before[0])
        G.addmm_(H[:, here], W[here] - before)


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
