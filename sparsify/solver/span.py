"""The inner loop of the column sweep: in PyTorch, as in the paper, in C++ (`kernels/cpu/column_sweep.cpp`), in Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.processor import kernel_level
from sparsify.solver.dispatch import faster_way
from sparsify.solver.grid import SHRINK, Grid, search_scale
from sparsify.solver.masks.sparsegpt import sparsegpt_select

FORCE = "SPARSIFY_SWEEP"
MOST = 128  # inputs of a group whose scale is searched natively
DROPPED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of float32's mantissa

Select = Callable[[Tensor, Tensor], Tensor]
"""(quad [4, N], d [4]) -> bool [4, N], the two weights to keep of each group of 4; d is the diagonal of U there."""


@dataclass(frozen=True)
class Panel:
    """Inputs that are swept together, one per row, and what becomes of them.

    rows:   float32 [B, N], the weights; become what is stored
    errors: float32 [B, N], filled with (w - stored) / d for whoever updates the inputs after the panel
    U:      [B, B], the panel's part of the upper factor
    codes:  int8 [B, N], filled when there is a grid, else None
    keep:   bool [B, N], a mask decided beforehand, or None
    """

    rows: Tensor
    errors: Tensor
    U: Tensor
    codes: Tensor | None
    keep: Tensor | None


def sweep_span(
    panel: Panel,
    first: int,
    last: int,
    grid: Grid | None,
    scale: Tensor | None,
    select: Select | None,
    store: torch.dtype,
) -> None:
    """Decide inputs first ... last - 1 of a panel one by one; every later input of the panel repairs each error.

    scale: float32 [1, N] for the whole span or [last - first, N]; None without a grid.
    SPARSIFY_SWEEP=torch, native or triton forces one of the three ways.
    """
    known = select in (None, sparsegpt_select) and (grid is not None or store in (torch.bfloat16, torch.float32))
    way = faster_way(FORCE, "cpu/column_sweep", panel.rows.device) if known else None
    if way is None:
        _in_torch(panel, first, last, grid, scale, select, store)
    elif isinstance(way, ctypes.CDLL):
        _in_native(way, panel, first, last, grid, scale, select, store)
    else:
        way.sweep_panel(
            panel.rows, panel.errors, panel.U, panel.codes, panel.keep,
            first, last, grid, scale, select is not None, store,
        )  # fmt: skip


def _in_torch(
    panel: Panel,
    first: int,
    last: int,
    grid: Grid | None,
    scale: Tensor | None,
    select: Select | None,
    store: torch.dtype,
) -> None:
    rows, U, d = panel.rows, panel.U, panel.U.diagonal()
    for i in range(first, last):
        kept = panel.keep[i] if panel.keep is not None else None
        if select is not None:
            if (i - first) % 4 == 0:
                of_four = select(rows[i : i + 4], d[i : i + 4])
            kept = of_four[(i - first) % 4]
        if grid is not None and scale is not None and panel.codes is not None:
            unit = scale[(i - first) % scale.shape[0]]
            code = (rows[i] / unit).round_().clamp_(grid.low, grid.high)
            if kept is not None:
                code.mul_(kept)
            panel.codes[i] = code
            new = code * unit
        else:
            new = rows[i].to(store).float()
            if kept is not None:
                new = new * kept  # not in place: without rounding `new` is the row itself
        panel.errors[i] = (rows[i] - new) / d[i]
        rows[i] = new
        if i + 1 < rows.shape[0]:
            rows[i + 1 :].addr_(U[i, i + 1 :], panel.errors[i], alpha=-1)


def _in_native(
    library: ctypes.CDLL, panel: Panel, first: int, last: int,
    grid: Grid | None, scale: Tensor | None, select: Select | None, store: torch.dtype,
) -> None:  # fmt: skip
    rows, errors, U, codes, keep = panel.rows, panel.errors, panel.U, panel.codes, panel.keep
    keep = keep.contiguous() if keep is not None else None
    scale = scale.contiguous() if scale is not None else None
    assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (rows, errors, U, codes) if t is not None)
    library.sparsify_sweep_span(
        _pointer(rows), _int64(rows.stride(0)), _pointer(errors), _int64(errors.stride(0)),
        _pointer(U), _int64(U.stride(0)), rows.shape[0], first, last, _int64(rows.shape[1]),
        _pointer(scale), _int64(0 if scale is None or scale.shape[0] == 1 else scale.stride(0)),
        ctypes.c_float(grid.low if grid else 0), ctypes.c_float(grid.high if grid else 0),
        _pointer(codes), _int64(codes.stride(0) if codes is not None else 0),
        _pointer(keep), _int64(keep.stride(0) if keep is not None else 0),
        int(select is not None), int(store == torch.bfloat16), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip


def group_scale(rows: Tensor, d: Tensor, grid: Grid, keep: Tensor | None, select: Select | None) -> Tensor:
    """The scale of one group for every output, for the weights that will probably stay: those of `keep`, or those that
    `select` would keep of the weights as they are.

    rows: float32 [G, N], the group's inputs; d: [G], the diagonal of U there; keep: bool [G, N] or None.
    Returns float32 [N]. The ways differ in the order of sums only.
    """
    native_fits = select in (None, sparsegpt_select) and rows.shape[0] <= MOST and rows.stride(1) == 1
    way = faster_way(FORCE, "cpu/column_sweep", rows.device) if native_fits else None
    if isinstance(way, ctypes.CDLL):
        return _search_natively(way, rows, d, grid, keep, select)
    if keep is None and select is not None:
        keep = torch.cat([select(rows[j : j + 4], d[j : j + 4]) for j in range(0, rows.shape[0], 4)])
    return search_scale(rows, grid, keep, d)


def _search_natively(
    library: ctypes.CDLL, rows: Tensor, d: Tensor, grid: Grid, keep: Tensor | None, select: Select | None
) -> Tensor:
    stored = torch.finfo(grid.dtype)
    ratios = torch.tensor(SHRINK if grid.search else (1.0,), dtype=torch.float32)
    keep, d = keep.contiguous() if keep is not None else None, d.contiguous()
    weight, found = d**-2, torch.empty(rows.shape[1])
    library.sparsify_search_scale(
        _pointer(rows), _int64(rows.stride(0)), rows.shape[0], _int64(rows.shape[1]), _pointer(d), _pointer(weight),
        _pointer(ratios), len(ratios), ctypes.c_float(grid.low), ctypes.c_float(grid.high), DROPPED_BITS[grid.dtype],
        ctypes.c_float(stored.tiny), ctypes.c_float(stored.max),
        _pointer(keep), _int64(keep.stride(0) if keep is not None else 0), int(keep is None and select is not None),
        _pointer(found), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip
    return found


_int64 = ctypes.c_int64


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
