"""The inner loops of ALPS, column sweep and coordinate descent in C++: `kernels/cpu/{alps,column_sweep,coordinate_descent}.cpp`.

Each function takes what its PyTorch counterpart takes. The kernels give the same bits with any number of threads and at
every level of SPARSIFY_CPU_LEVEL.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsify.native.arguments import loaded, pointer
from sparsify.processor import kernel_level
from sparsify.solver.grid import SHRINK, Grid, Scales

DROPPED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of float32's mantissa, by the type of scales
_int64, _float = ctypes.c_int64, ctypes.c_float


def sweep_block(
    W: Tensor, errors: Tensor, U: Tensor, codes: Tensor | None, mask: Tensor | None, first: int, last: int,
    grid: Grid | None, scale: Tensor | None, zero: Tensor | None, select: bool, store: torch.dtype,
) -> None:  # fmt: skip
    """As `column_sweep.sweep_block`; select: SparseGPT's choice of two of four."""
    mask = mask.contiguous() if mask is not None else None
    scale, zero = (t.contiguous() if t is not None else None for t in (scale, zero))
    assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (W, errors, U, codes) if t is not None)
    loaded("cpu/column_sweep").sparsify_sweep_block(
        pointer(W), _int64(W.stride(0)), pointer(errors), _int64(errors.stride(0)),
        pointer(U), _int64(U.stride(0)), W.shape[0], first, last, _int64(W.shape[1]),
        pointer(scale), pointer(zero), _int64(0 if scale is None or scale.shape[0] == 1 else scale.stride(0)),
        *_range(grid), pointer(codes), _stride(codes), pointer(mask), _stride(mask),
        int(select), int(store == torch.bfloat16), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip


def search_scale(W: Tensor, d: Tensor, grid: Grid, mask: Tensor | None, select: bool) -> Scales:
    """As `column_sweep.group_scale`, for at most 128 columns."""
    stored = torch.finfo(grid.dtype)
    ratios = torch.tensor(SHRINK if grid.search else (1.0,), dtype=torch.float32)
    mask, d = mask.contiguous() if mask is not None else None, d.contiguous()
    weight, scale = d**-2, torch.empty(W.shape[1])
    zero = None if grid.symmetric else torch.empty(W.shape[1])
    loaded("cpu/column_sweep").sparsify_search_scale(
        pointer(W), _int64(W.stride(0)), W.shape[0], _int64(W.shape[1]), pointer(d), pointer(weight),
        pointer(ratios), len(ratios), *_range(grid), DROPPED_BITS[grid.dtype], _float(stored.tiny), _float(stored.max),
        pointer(mask), _stride(mask), int(select), pointer(scale), pointer(zero), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip
    return scale, zero


def visit_block(
    W: Tensor, G: Tensor, H: Tensor, scale: Tensor | None, zero: Tensor | None, grid: Grid | None,
    mask: Tensor | None, two_four: bool, store: torch.dtype,
) -> None:  # fmt: skip
    """As `coordinate_descent.visit_block`."""
    assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (W, G, H, mask) if t is not None)
    assert all(t.is_contiguous() for t in (scale, zero) if t is not None)
    loaded("cpu/coordinate_descent").sparsify_visit_block(
        pointer(W), _int64(W.stride(0)), pointer(G), _int64(G.stride(0)), pointer(H), _int64(H.stride(0)),
        W.shape[0], _int64(W.shape[1]), pointer(scale), pointer(zero), *_range(grid), pointer(mask), _stride(mask),
        int(two_four), int(store == torch.bfloat16), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip


def refit_scale(W: Tensor, G: Tensor, H: Tensor, unit: Tensor, grid: Grid) -> None:
    """As `coordinate_descent.refit_scale`, for at most 128 columns."""
    assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (W, G, H)) and unit.is_contiguous()
    stored = torch.finfo(grid.dtype)
    loaded("cpu/coordinate_descent").sparsify_refit_scale(
        pointer(W), _int64(W.stride(0)), pointer(G), _int64(G.stride(0)), pointer(H), _int64(H.stride(0)),
        W.shape[0], _int64(W.shape[1]), pointer(unit), DROPPED_BITS[grid.dtype], _float(stored.tiny), _float(stored.max),
        torch.get_num_threads(), kernel_level(),
    )  # fmt: skip


def alps_round(free: Tensor, pull: Tensor, penalty: float, V: Tensor) -> Tensor:
    """As `masks.alps.next_round`."""
    kept = torch.empty(free.shape, dtype=torch.bool)
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in (free, pull, V))
    loaded("cpu/alps").sparsify_alps_round(
        pointer(free), pointer(pull), _float(penalty), pointer(V), pointer(kept),
        _int64(free.shape[0]), _int64(free.shape[1]), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip
    return kept


def _range(grid: Grid | None) -> tuple[ctypes.c_float, ctypes.c_float]:
    return (_float(grid.low), _float(grid.high)) if grid else (_float(0), _float(0))


def _stride(tensor: Tensor | None) -> ctypes.c_int64:
    return _int64(0 if tensor is None else tensor.stride(0))
