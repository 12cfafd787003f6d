"""SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323): one sweep over the columns of a weight matrix.

Both papers visit the inputs k = 0 ... K-1 of a linear in turn, decide what becomes of column k, and let the columns that are
still to come make up for the error, as Optimal Brain Surgeon does:

    e = (W[:, k] - What[:, k]) / U[k, k]          U'U = H^-1, U upper triangular (GPTQ, Algorithm 1)
    W[:, k+1:] -= e U[k, k+1:]

They differ in the decision only. GPTQ rounds column k to its grid. SparseGPT looks at four columns at a time and keeps the
two with the largest W[n, k]^2 / U[k, k]^2. Here both can happen in the same sweep. Columns are taken in blocks of BLOCKSIZE,
after each of which all later ones are updated by one matrix product (GPTQ, section 3.3: lazy batch updates).

W is held transposed, [K, N]: a column of the papers is a row in memory. `sweep_block` ends with the inner loop as the papers
write it; C++ (`native_sweep.py`) and Triton (`triton_sweep.py`) do the same faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.solver.dispatch import kernel_for
from sparsify.solver.grid import Grid, Scales, rounded, search_scale
from sparsify.solver.masks.sparsegpt import sparsegpt_select

BLOCKSIZE = 128
FORCE = "SPARSIFY_SWEEP"
SEARCHED_NATIVELY = 128  # the largest group whose scale the native kernel searches

Select = Callable[[Tensor, Tensor], Tensor]
"""(four columns [4, N], their diagonal entries of U [4]) -> bool [4, N], the two weights to keep of each group of four."""


@dataclass(frozen=True)
class Solved:
    """A solved weight matrix.

    weight: float32 [N, K] as it will be stored, in any order of strides; with a grid, codes: int8 [N, K], scale: [N, K/G];
    with an asymmetric one, zero_point: int8 [N, K/G]
    """

    weight: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Columns that are swept together, transposed.

    W:      float32 [B, N]; becomes what is stored
    errors: float32 [B, N]; receives e of each column
    U:      [B, B], this block of the inverse Cholesky factor
    codes:  int8 [B, N], receives the codes; None without a grid
    mask:   bool [B, N], what is kept, decided beforehand; None where `select` decides or everything is kept
    """

    W: Tensor
    errors: Tensor
    U: Tensor
    codes: Tensor | None
    mask: Tensor | None


def column_sweep(
    W: Tensor,
    U: Tensor,
    grid: Grid | None,
    mask: Tensor | None = None,
    select: Select | None = None,
    order: Tensor | None = None,
    store: torch.dtype = torch.bfloat16,
) -> Solved:
    """Compress W column by column.

    W:      [N, K] float32
    U:      [K, K] upper triangular, U'U = H^-1 (in the visiting order when `order` is given)
    grid:   of the quantization; None keeps values, rounded to `store`
    mask:   bool [N, K], decided beforehand; nothing outside of it is kept
    select: decides the 2:4 mask during the sweep instead
    order:  int64 [K], visit these columns first to last (activation order); whole groups of 4 when `select` is given.
            Scales are then fixed beforehand, so that the stored format does not change.
    """
    n, k = W.shape
    scales: Scales | None = None
    if grid is not None and (order is not None or grid.group_size > BLOCKSIZE):
        scales = _fixed_scales(W, U, grid, mask, select, order)
    if order is not None:
        W = W[:, order]
        mask = mask[:, order] if mask is not None else None
    W = W.t().clone(memory_format=torch.contiguous_format)
    U = U.contiguous()
    codes = torch.zeros((k, n), dtype=torch.int8, device=W.device) if grid else None
    mask = mask.t().contiguous() if mask is not None else None
    found: list[Scales] = []
    for start in range(0, k, BLOCKSIZE):
        stop = min(start + BLOCKSIZE, k)
        columns = slice(start, stop)
        block = Block(
            W[columns],
            torch.empty_like(W[columns]),
            U[columns, columns],
            codes[columns] if codes is not None else None,
            mask[columns] if mask is not None else None,
        )
        if grid is None:
            sweep_block(block, 0, stop - start, None, None, None, select, store)
        elif scales is not None:
            groups = (order[columns] if order is not None else torch.arange(start, stop)) // grid.group_size
            scale, zero = (None if t is None else t[groups] for t in scales)
            sweep_block(block, 0, stop - start, grid, scale, zero, select, store)
        else:
            for first in range(0, stop - start, grid.group_size):
                group = slice(first, first + grid.group_size)
                kept = block.mask[group] if block.mask is not None else None
                found.append(group_scale(block.W[group], block.U.diagonal()[group], grid, kept, select))
                scale, zero = (None if t is None else t[None] for t in found[-1])
                sweep_block(block, first, first + grid.group_size, grid, scale, zero, select, store)
        if stop < k:
            W[stop:].addmm_(U[columns, stop:].t(), block.errors, alpha=-1)
    scales = _stacked(found) if found else scales
    weight, codes = W.t(), codes.t() if codes is not None else None
    if order is not None:
        back = torch.argsort(order)
        weight, codes = weight[:, back], codes[:, back] if codes is not None else None
    if grid is None or scales is None or codes is None:
        return Solved(weight)
    scale, zero = scales
    zero_point = None if zero is None else zero.t().contiguous().to(torch.int8)
    return Solved(weight, codes.contiguous(), scale.t().contiguous().to(grid.dtype), zero_point)


def sweep_block(
    block: Block,
    first: int,
    last: int,
    grid: Grid | None,
    scale: Tensor | None,
    zero: Tensor | None,
    select: Select | None,
    store: torch.dtype,
) -> None:
    """Decide columns first ... last - 1 of a block one by one; every later column of the block makes up for each error.

    scale: float32 [1, N] for all of them, or [last - first, N]; None without a grid.
    zero: the zero points, in the shape of scale; None without a grid and for a symmetric one.
    SPARSIFY_SWEEP=torch, native or triton forces the kernel.
    """
    known = select in (None, sparsegpt_select) and (grid is not None or store in (torch.bfloat16, torch.float32))
    if known and (kernel := kernel_for(FORCE, "cpu/column_sweep", block.W.device)) is not None:
        kernel.sweep_block(
            block.W, block.errors, block.U, block.codes, block.mask,
            first, last, grid, scale, zero, select is not None, store,
        )  # fmt: skip
        return
    W, U, d = block.W, block.U, block.U.diagonal()
    for i in range(first, last):
        kept = block.mask[i] if block.mask is not None else None
        if select is not None:
            if (i - first) % 4 == 0:
                pair = select(W[i : i + 4], d[i : i + 4])
            kept = pair[(i - first) % 4]
        if grid is not None and scale is not None and block.codes is not None:
            row = (i - first) % scale.shape[0]
            unit, code_of_zero = scale[row], None if zero is None else zero[row]
            code = rounded(W[i], unit, code_of_zero, grid)
            if kept is not None:
                code.mul_(kept)
            new = code * unit
            block.codes[i] = code if code_of_zero is None else code.add_(code_of_zero)
        else:
            new = W[i].to(store).float()
            if kept is not None:
                new = new * kept  # not in place: without rounding `new` is the column itself
        block.errors[i] = (W[i] - new) / d[i]
        W[i] = new
        if i + 1 < W.shape[0]:
            W[i + 1 :].addr_(U[i, i + 1 :], block.errors[i], alpha=-1)


def group_scale(W: Tensor, d: Tensor, grid: Grid, mask: Tensor | None, select: Select | None) -> Scales:
    """The scale and zero point of one group for every output, for the weights that will probably stay: those of `mask`, or those that
    `select` would keep of the weights as they are.

    W: float32 [G, N], the columns of the group; d: [G], the diagonal of U there; mask: bool [G, N] or None.
    Returns float32 [N] of each. Kernels differ from each other in the order of sums only.
    """
    searches = select in (None, sparsegpt_select) and W.shape[0] <= SEARCHED_NATIVELY and W.stride(1) == 1
    kernel = kernel_for(FORCE, "cpu/column_sweep", W.device) if searches else None
    if kernel is not None and hasattr(kernel, "search_scale"):
        found: Scales = kernel.search_scale(W, d, grid, mask, mask is None and select is not None)
        return found
    if mask is None and select is not None:
        mask = torch.cat([select(W[j : j + 4], d[j : j + 4]) for j in range(0, W.shape[0], 4)])
    return search_scale(W, grid, mask, d)


def _fixed_scales(
    W: Tensor, U: Tensor, grid: Grid, mask: Tensor | None, select: Select | None, order: Tensor | None
) -> Scales:
    """Scales and zero points [K/G, N] chosen from the weights before the sweep."""
    d = U.diagonal() if order is None else U.diagonal()[torch.argsort(order)]
    columns, kept = W.t().contiguous(), mask.t() if mask is not None else None
    groups = (slice(first, first + grid.group_size) for first in range(0, W.shape[1], grid.group_size))
    return _stacked(
        [group_scale(columns[g], d[g], grid, kept[g] if kept is not None else None, select) for g in groups]
    )


def _stacked(groups: list[Scales]) -> Scales:
    """Scales and zero points [N] of every group as [K/G, N]."""
    zeros = [zero for _, zero in groups if zero is not None]
    return torch.stack([scale for scale, _ in groups]), torch.stack(zeros) if zeros else None
